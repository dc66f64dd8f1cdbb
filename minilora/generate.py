"""Text out: a key/value cache, sampling, and decoding of several prompts at a time.

Shapes: S prompts decoded together (slots), T tokens, H query heads, K key/value heads, E head size, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minilora import dist
from minilora.config import UserError
from minilora.model import CausalLM, DecoderConfig, PackedAttention
from minilora.tokenizer import Tokenizer


class KVCache:
    """Keys and values of the tokens so far, one slot a prompt, each with its own length."""

    def __init__(self, config: DecoderConfig, slots: int, capacity: int, dtype: torch.dtype, device: torch.device):
        shape = (slots, capacity, config.num_key_value_heads, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=device)


class Prefill(PackedAttention):
    """Attention over the prompts, packed, that also fills the cache: prompt s goes to slot s."""

    def __init__(self, cache: KVCache, lengths: Sequence[int], device: torch.device):
        super().__init__(lengths, device)
        self.cache = cache
        self.slots = torch.arange(len(self.lengths), device=device).repeat_interleave(torch.tensor(self.lengths, device=device))
        cache.lengths = torch.tensor(self.lengths, device=device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        self.cache.keys[layer][self.slots, self.positions] = k
        self.cache.values[layer][self.slots, self.positions] = v
        return super().__call__(layer, q, k, v, window)


class DecodeStep:
    """Attention of one new token per slot over that slot's cache."""

    def __init__(self, cache: KVCache):
        self.cache = cache
        self.positions = cache.lengths  # [S]: a token's position is the number of tokens before it
        self.slots = torch.arange(len(self.positions), device=self.positions.device)
        self.longest = int(self.positions.max()) + 1
        age = self.positions[:, None] - torch.arange(self.longest, device=self.positions.device)  # [S, longest]
        self.age = age[:, None, None, :]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.slots, self.positions] = k
        values[self.slots, self.positions] = v
        visible = self.age >= 0 if window is None else (self.age >= 0) & (self.age < window)
        keys, values = (x[:, : self.longest].transpose(1, 2) for x in (keys, values))  # [S, K, longest, E]
        query = q.unsqueeze(2)  # [S, H, E] -> [S, H, 1, E]
        out = F.scaled_dot_product_attention(query, keys, values, visible, enable_gqa=q.shape[1] != k.shape[1])
        return out.squeeze(2)  # [S, H, E]


@dataclass
class Answer:
    """One prompt's continuation while it grows."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finished: bool = False


def sample(logits: Tensor, temperature: float, top_p: float, draws: Tensor) -> Tensor:
    """Next token int64 [S] from logits [S, V]; draws fp32 [S], uniform in [0, 1), decide.

    temperature 0 is greedy; top_p keeps the most probable tokens up to and including the one that reaches it.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities, order = (logits.float() / temperature).softmax(dim=-1).sort(dim=-1, descending=True)  # [S, V]
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities[before >= top_p] = 0
    cumulative = probabilities.cumsum(dim=-1)
    chosen = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)
    return order.gather(1, chosen.clamp_(max=order.shape[1] - 1)).squeeze(1)


@torch.no_grad()
def generate_ids(
    model: CausalLM, prompts: Sequence[Sequence[int]], tokenizer: Tokenizer, max_new_tokens: int, temperature: float = 0.0,
    top_p: float = 1.0, stop: Sequence[str] = (), stop_ids: Iterable[int] = (), seed: int = 0, indices: Sequence[int] = (),
    batch_size: int = 16, autocast: torch.dtype | None = None, progress: Callable[[int], object] = lambda tokens: None,
    together: bool = False,
) -> list[Answer]:  # fmt: skip
    """Continue each prompt (token ids) until EOS, a stop id, a stop string or max_new_tokens.

    A sample's randomness is a function of (seed, its index; default: its place), so it does not depend on the batch. The
    answer ends before the stop string; end tokens are kept in `ids` and not in `text`. together: other processes hold parts
    of the model and decode prompts of their own, so all take the same number of steps.
    """
    indices = indices or range(len(prompts))
    if empty := [i for i, prompt in zip(indices, prompts, strict=True) if not len(prompt)]:
        raise UserError(f"prompt {empty[0]} is empty: there is nothing to continue")
    device = dist.default_device() if together else model.head_weight.device  # shards may wait in host memory
    was_training = model.training
    model.eval()
    ends = {i for i in (tokenizer.eos_id, *stop_ids) if i is not None}
    answers = [Answer() for _ in prompts]
    generators = [np.random.default_rng([seed, i]) for i in indices]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))

    def all_of_us(flag: bool) -> bool:
        return dist.everyone(flag, device) if together else flag

    start = 0
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        while not all_of_us(start >= len(prompts)):
            batch = by_length[start : start + batch_size]
            start += batch_size
            ids = [prompts[i] for i in batch] or [[0]]  # a stand-in, while others have prompts left
            lengths = [len(x) for x in ids]
            cache = KVCache(model.config, len(ids), max(lengths) + max_new_tokens, autocast or model.head_weight.dtype, device)
            tokens = torch.tensor([t for x in ids for t in x], device=device)
            last = torch.tensor(lengths, device=device).cumsum(0) - 1  # the last token of each prompt
            logits = model(tokens, apply=partial(_logits_at, last), attend=Prefill(cache, lengths, device))
            for new in range(1, max_new_tokens + 1):
                uniform = [generators[i].random(dtype=np.float32) for i in batch] or [0.0]
                draws = torch.tensor(uniform, dtype=torch.float32, device=device)
                tokens = sample(logits, temperature, top_p, draws)
                for i, token in zip(batch, tokens.tolist(), strict=False):  # a stand-in has no answer
                    if not answers[i].finished:
                        _extend(answers[i], token, prompts[i], tokenizer, ends, stop)
                progress(sum(not answers[i].finished for i in batch))
                if new == max_new_tokens or all_of_us(all(answers[i].finished for i in batch)):
                    break
                logits = model(tokens, attend=DecodeStep(cache))
                cache.lengths = cache.lengths + 1
    for i, answer in enumerate(answers):
        answer.text = _text(answer, prompts[i], tokenizer, ends, stop)
    model.train(was_training)
    return answers


def _logits_at(rows: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    return F.linear(hidden[rows], weight)


def _extend(answer: Answer, token: int, prompt: Sequence[int], tokenizer: Tokenizer, ends: set[int], stop: Sequence[str]) -> None:
    answer.ids.append(token)
    answer.finished = token in ends
    if stop and not answer.finished:  # only the tail can hold a stop string that was not there before
        tail = answer.ids[-(max(len(s.encode()) for s in stop) + 8) :]
        before = [*prompt, *answer.ids][: -len(tail)]
        answer.finished = any(s in tokenizer.decode_after(before, tail) for s in stop)


def _text(answer: Answer, prompt: Sequence[int], tokenizer: Tokenizer, ends: set[int], stop: Sequence[str]) -> str:
    ids = answer.ids[:-1] if answer.ids and answer.ids[-1] in ends else answer.ids
    text = tokenizer.decode_after(prompt, ids)
    return text[: min((text.find(s) for s in stop if s in text), default=len(text))]


def generate(
    model: CausalLM, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int = 256, temperature: float = 0.0,
    top_p: float = 1.0, stop: Sequence[str] = (), seed: int = 0,
) -> list[str]:  # fmt: skip
    """Continue each prompt; returns the new text alone. Prompts are plain text with the chat form, if any, already in it
    (`tokenizer.render`); they get exactly one BOS. temperature 0 is greedy."""
    ids = [tokenizer.encode(prompt).ids for prompt in prompts]
    answers = generate_ids(model, ids, tokenizer, max_new_tokens, temperature, top_p, stop, tokenizer.stop_ids(), seed)
    return [answer.text for answer in answers]
