"""Continuous batching: one forward pass computes the next token of many answers.

Each unfinished answer has a slot of the key/value cache. When an answer ends, its slot goes to the
next prompt in the same loop. No answer waits for another to end, and each pass reads the weights
once for all answers. `stream` is the loop; `generate` goes from text to text.

The tensors of a pass are in passes.py; here are the prompts and answers.
"""

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from minilora import distributed
from minilora.data.tokenizer import Tokenizer
from minilora.errors import UserError
from minilora.generation.passes import DecodingPasses, cache_dtype, can_use_graphs
from minilora.generation.sampling import SamplingParams
from minilora.generation.stopping import FinishReason, StopCriteria
from minilora.model.attention import PackedAttention
from minilora.model.small_batch import use_cast_adapters, use_small_batch_matmul
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
    indices = indices or range(len(prompts))
    batch = _Batch(model, prompts, params, indices, batch_size, device, collective)
    stop = StopCriteria(tokenizer, params)
    max_time = math.inf if params.max_time is None else params.max_time
    deadline = time.monotonic() + max_time

    with _decoding_mode(model, device, collective):
        while True:
            is_working = batch.has_work() and time.monotonic() < deadline
            if _all_are_done(not is_working, collective, device):
                break
            if is_working:
                batch.admit_prompts()
            if batch.is_empty():  # only in collective decoding: other processes have answers left
                _run_placeholder(model, device)
                continue

            for tokens in batch.run_passes():
                yield from batch.grow_answers(tokens, stop)
            batch.free_slots()


class _Batch:
    """What the host knows: prompts, those of them that hold a slot of the cache, and answers.

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
        collective: bool,
    ):
        """Queue the prompts; arguments as for `stream`. Raises UserError for an empty prompt."""
        for index, prompt in zip(indices, prompts, strict=True):
            if len(prompt) == 0:
                raise UserError(f"prompt {index} is empty: there is nothing to continue")

        self.model = model
        self.prompts = prompts
        self.params = params
        self.batch_size = batch_size
        self.answers = [Answer() for _ in prompts]
        self.generators = [np.random.default_rng([params.seed, index]) for index in indices]

        longest_first = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        self.waiting = deque(longest_first)
        self.slots: list[int] = []
        self.num_new = 0

        num_slots = min(batch_size, max(1, len(prompts)))
        use_graphs = not collective and can_use_graphs(model, device)
        self.passes = DecodingPasses(model, params, num_slots, device, use_graphs)
        self.max_passes = passes_per_read(device, collective)

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

    def run_passes(self) -> list[list[int]]:
        """Run a pass, on CUDA several, over the last token of each answer and over new prompts.

        Answers may end before the last of several passes; the tokens after that are superfluous.

        Returns:
            For each pass the next token in each slot.
        """
        num_running = len(self.slots) - self.num_new
        last_tokens = [self.answers[i].ids[-1] for i in self.slots[:num_running]]
        new_prompts = [self.prompts[i] for i in self.slots[num_running:]]
        self.num_new = 0

        shortest = min(len(self.answers[i].ids) for i in self.slots)
        num_passes = min(self.max_passes, self.params.max_new_tokens - shortest)
        draws = []
        for _ in range(num_passes):
            draws.append([self.generators[i].random(dtype=np.float32) for i in self.slots])
        return self.passes.run(last_tokens, new_prompts, draws)

    def grow_answers(self, tokens: Sequence[int], stop: StopCriteria) -> list[tuple[int, Answer]]:
        """Append the token of each slot to its answer, unless that has ended.

        Returns:
            (position of the prompt, answer) of every answer that has grown.
        """
        grown = []
        for i, token in zip(self.slots, tokens, strict=True):
            answer, prompt = self.answers[i], self.prompts[i]
            if answer.finish_reason:
                continue
            answer.ids.append(token)
            answer.finish_reason = stop.finish_reason(prompt, answer.ids)
            if answer.finish_reason:
                answer.text = stop.text(prompt, answer.ids)
            grown.append((i, answer))
        return grown

    def free_slots(self) -> None:
        """Free the slots of answers that have ended."""
        for slot in reversed(range(len(self.slots))):
            if self.answers[self.slots[slot]].finish_reason:
                self.passes.free(slot)  # moves the last slot into this one, as the next line does
                self.slots[slot] = self.slots[-1]
                self.slots.pop()


def passes_per_read(device: torch.device, collective: bool) -> int:
    """Return after how many passes the host reads the tokens and looks which answers have ended.

    A GPU is idle while the host looks. In collective decoding the processes agree before each pass
    whether they go on.
    """
    return 8 if device.type == "cuda" and not collective else 1


@contextmanager
def _decoding_mode(model: CausalLM, device: torch.device, collective: bool) -> Iterator[None]:
    """Inside a `with` block, put the model into evaluation mode and use layers for a few rows."""
    was_training = model.training
    model.eval()
    adapters: AbstractContextManager[None] = nullcontext()
    if not collective:  # the rows of sharded adapters are gathered, and cast, in each pass
        adapters = use_cast_adapters(model, cache_dtype(model, device))
    try:
        with use_small_batch_matmul(model), adapters:
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
