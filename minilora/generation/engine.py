"""Continuous batching: one forward pass computes the next token of many answers.

Each unfinished answer has a slot of the key/value cache. When an answer ends, its slot goes to the
next prompt in the same loop. No answer waits for another to end, and each pass reads the weights
once for all answers. `stream` is the loop; `generate` goes from text to text.

Shapes: S slots in use, T tokens of a pass, V vocabulary.
"""

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minilora import distributed
from minilora.data.tokenizer import Tokenizer
from minilora.errors import UserError
from minilora.generation.cache import CachedAttention, KVCache
from minilora.generation.sampling import SamplingParams, apply_repetition_penalty, sample_tokens
from minilora.generation.stopping import FinishReason, StopCriteria
from minilora.model.attention import PackedAttention
from minilora.model.small_batch import use_small_batch_matmul
from minilora.model.transformer import CausalLM


@dataclass
class Answer:
    """The continuation of one prompt, which grows token by token."""

    ids: list[int] = field(default_factory=list)
    """The token ids so far, an end token included."""
    text: str = ""
    """The text, once the answer has ended; without end token and stop string."""
    finish_reason: FinishReason | None = None
    """Why the answer ended; None while it grows, and if max_time cut it off."""


@torch.no_grad()
def stream(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    params: SamplingParams,
    indices: Sequence[int] = (),
    batch_size: int = 16,
    collective: bool = False,
) -> Iterator[tuple[int, Answer]]:
    """Continue each prompt until its answer ends; longest prompts first.

    The random draws of an answer are a function of `params.seed` and the answer's index. An answer
    does not depend on the others in its batch, except through rounding in 16 bits. The model is in
    evaluation mode meanwhile. Under `torch.autocast` the cache has autocast's dtype.

    Args:
        model: the model.
        prompts: ids of each prompt.
        tokenizer: decodes answers to find stop strings.
        params: how tokens are chosen and where answers end.
        indices: the index of each prompt's answer; default: 0, 1, ...
        batch_size: answers that grow together.
        collective: other processes hold shards of the model and decode prompts of their own. All
            of them call this function together, and run as many passes as the slowest needs.

    Yields:
        (position of the prompt in `prompts`, its answer) after each new token of that answer.

    Raises:
        UserError: a prompt is empty, or batch_size is less than 1.
    """
    if batch_size < 1:
        raise UserError("batch_size must be at least 1")
    # in collective decoding the parameters may be offloaded: on the CPU between passes
    device = distributed.default_device() if collective else model.head_weight.device
    batch = _Batch(model, prompts, params, indices or range(len(prompts)), batch_size, device)
    stop = StopCriteria(tokenizer, params)
    max_time = math.inf if params.max_time is None else params.max_time
    deadline = time.monotonic() + max_time

    with _decoding_mode(model):
        while True:
            is_working = batch.has_work() and time.monotonic() < deadline
            if _all_are_done(not is_working, collective, device):
                break
            if is_working:
                batch.admit_prompts()
            if batch.is_empty():  # only in collective decoding: other processes have answers left
                _run_placeholder(model, device)
                continue

            logits = batch.forward()
            tokens = batch.choose_tokens(logits)
            yield from batch.grow_answers(tokens, stop)


class _Batch:
    """The prompts, those of them that hold a slot of the cache, and their answers.

    Attributes:
        waiting: positions of the prompts that have no slot yet, longest first.
        slots: for each slot in use the position of its prompt.
        num_new: how many of the last slots hold prompts that no pass has computed yet.
    """

    def __init__(
        self,
        model: CausalLM,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        indices: Sequence[int],
        batch_size: int,
        device: torch.device,
    ):
        """Queue the prompts; arguments as for `stream`. Raises UserError for an empty prompt."""
        for index, prompt in zip(indices, prompts, strict=True):
            if len(prompt) == 0:
                raise UserError(f"prompt {index} is empty: there is nothing to continue")

        self.model = model
        self.prompts = prompts
        self.params = params
        self.batch_size = batch_size
        self.device = device
        self.answers = [Answer() for _ in prompts]
        self.generators = [np.random.default_rng([params.seed, index]) for index in indices]

        longest_first = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        self.waiting = deque(longest_first)
        self.slots: list[int] = []
        self.num_new = 0

        num_slots = min(batch_size, max(1, len(prompts)))
        self.cache = KVCache(model.config, num_slots, _cache_dtype(model, device), device)
        # made once, for the passes without new prompts: each slot then has one token
        self.all_rows = torch.arange(num_slots, device=device)

    def has_work(self) -> bool:
        """Return whether any answer has not ended."""
        return bool(self.waiting or self.slots)

    def is_empty(self) -> bool:
        """Return whether no slot is in use."""
        return not self.slots

    def admit_prompts(self) -> None:
        """Give free slots to waiting prompts; the next pass computes them."""
        num_free = self.batch_size - len(self.slots)
        self.num_new = min(num_free, len(self.waiting))
        for _ in range(self.num_new):
            self.slots.append(self.waiting.popleft())

    def forward(self) -> Tensor:
        """Run one pass over the last token of each answer and over all tokens of new prompts.

        Returns:
            Logits of the next token in each slot [S, V].
        """
        num_running = len(self.slots) - self.num_new
        tokens = [self.answers[i].ids[-1] for i in self.slots[:num_running]]
        prompt_lengths = []
        for i in self.slots[num_running:]:
            tokens.extend(self.prompts[i])
            prompt_lengths.append(len(self.prompts[i]))
        self.num_new = 0

        attention = CachedAttention(self.cache, prompt_lengths, self.device)
        if prompt_lengths:
            counts = torch.tensor([1] * num_running + prompt_lengths, device=self.device)
            last_rows = counts.cumsum(0) - 1  # the last token of each slot [S]
        else:
            last_rows = self.all_rows[:num_running]
        return self.model(
            torch.tensor(tokens, device=self.device), logits_at=last_rows, attention=attention
        )

    def choose_tokens(self, logits: Tensor) -> list[int]:
        """Choose the next token in each slot.

        Args:
            logits: [S, V].

        Returns:
            S token ids.
        """
        if self.params.repetition_penalty != 1.0:
            seen = [[*self.prompts[i], *self.answers[i].ids] for i in self.slots]
            logits = logits.float()
            apply_repetition_penalty(logits, seen, self.params.repetition_penalty)
        draws = [self.generators[i].random(dtype=np.float32) for i in self.slots]
        draws_tensor = torch.tensor(draws, device=self.device)  # [S]
        return sample_tokens(logits, self.params, draws_tensor).tolist()

    def grow_answers(self, tokens: Sequence[int], stop: StopCriteria) -> list[tuple[int, Answer]]:
        """Append a token to the answer of each slot, and free the slots of answers that end.

        Returns:
            (position of the prompt, answer) of every slot.
        """
        grown = []
        for i, token in zip(self.slots, tokens, strict=True):
            answer, prompt = self.answers[i], self.prompts[i]
            answer.ids.append(token)
            answer.finish_reason = stop.finish_reason(prompt, answer.ids)
            if answer.finish_reason:
                answer.text = stop.text(prompt, answer.ids)
            grown.append((i, answer))

        for slot in reversed(range(len(self.slots))):
            if self.answers[self.slots[slot]].finish_reason:
                self.cache.free(slot)  # moves the last slot into this one, as the next line does
                self.slots[slot] = self.slots[-1]
                self.slots.pop()
        return grown


def _cache_dtype(model: CausalLM, device: torch.device) -> torch.dtype:
    """Return the dtype of keys and values: autocast's, or that of the model's activations."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return model.model.norm.weight.dtype


@contextmanager
def _decoding_mode(model: CausalLM) -> Iterator[None]:
    """Inside a `with` block, put the model into evaluation mode and use small-batch matmuls."""
    was_training = model.training
    model.eval()
    try:
        with use_small_batch_matmul(model):
            yield
    finally:
        model.train(was_training)


def _all_are_done(is_done: bool, collective: bool, device: torch.device) -> bool:
    """Return whether this process is done and, in collective decoding, all others are too."""
    return distributed.all_agree(is_done, device) if collective else is_done


def _run_placeholder(model: CausalLM, device: torch.device) -> None:
    """Run a pass of collective decoding over a token that belongs to no answer.

    The other processes have answers left, and each of their passes needs this process's shards.
    """
    tokens = torch.zeros(1, dtype=torch.int64, device=device)
    row = torch.zeros(1, dtype=torch.int64, device=device)
    model(tokens, logits_at=row, attention=PackedAttention([1], device))


def generate_ids(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    params: SamplingParams,
    indices: Sequence[int] = (),
    batch_size: int = 16,
    collective: bool = False,
) -> list[Answer]:
    """Return the complete answers of `stream`, in the order of the prompts."""
    growing = stream(model, prompts, tokenizer, params, indices, batch_size, collective)
    answers = dict(growing)
    # max_time may leave prompts without even a first token
    return [answers.get(i, Answer()) for i in range(len(prompts))]


def generate(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    params: SamplingParams | None = None,
    batch_size: int = 16,
    **sampling: Any,
) -> list[str]:
    """Continue texts.

    Args:
        model: from `minilora.load`.
        tokenizer: from `minilora.load`.
        prompts: text, in the form of the model's training (see `minilora.format_prompt`). Each gets
            exactly one BOS token.
        params: sampling settings; default: greedy, up to 256 tokens.
        batch_size: prompts that are answered together.
        **sampling: fields of `SamplingParams` by name, e.g. max_new_tokens, temperature, top_p,
            stop or seed; they replace those of `params`.

    Returns:
        The new text of each prompt.
    """
    params = replace(params or SamplingParams(), **sampling)
    ids = [tokenizer.encode(prompt).ids for prompt in prompts]
    answers = generate_ids(model, ids, tokenizer, params, batch_size=batch_size)
    return [answer.text for answer in answers]
