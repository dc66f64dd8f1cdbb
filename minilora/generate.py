"""Text out: a key/value cache, sampling, and continuous batching.

Every pass forward gives each running answer its next token and takes in the prompts for which a slot has become free, so
no answer waits for another to end and the weights are read once for all of them.

Shapes: S slots in use, C their capacity, L the longest so far, T tokens of a pass, H query heads, K key/value heads,
G = H / K, E head size, V vocabulary.
"""

import functools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora import dist
from minilora.config import UserError
from minilora.model import CausalLM, DecoderConfig, PackedAttention
from minilora.tokenizer import Tokenizer

NUCLEUS = 256  # tokens among which top_p is looked for first: sorting a whole vocabulary takes longer than the model
FEW_ROWS = 256


class KVCache:
    """Keys and values of the tokens so far [2, slots, K, C, E] a layer: one slot an answer, those in use first."""

    def __init__(self, config: DecoderConfig, slots: int, dtype: torch.dtype, device: torch.device):
        shape = (2, slots, config.num_key_value_heads, 0, config.head_dim)
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.lengths: list[int] = []  # of the slots in use

    def reserve(self, length: int) -> None:
        """Room for `length` tokens a slot, and for half as many again, so that growing is rare."""
        if length > (capacity := self.layers[0].shape[3]):
            for i, old in enumerate(self.layers):
                self.layers[i] = F.pad(old, (0, 0, 0, length + length // 2 - capacity))

    def free(self, slot: int) -> None:
        """Give up a slot; the last one in use takes its place."""
        last = len(self.lengths) - 1
        for kv in self.layers if slot < last else ():
            kv[:, slot, :, : self.lengths[last]] = kv[:, last, :, : self.lengths[last]]
        self.lengths[slot] = self.lengths[last]
        self.lengths.pop()


class Step:
    """Attention of one pass: a token for each running slot over its cache, then new prompts, packed, each into a new slot."""

    def __init__(self, cache: KVCache, prompts: Sequence[int], device: torch.device):
        self.cache, self.running, self.longest = cache, len(cache.lengths), max(cache.lengths, default=-1) + 1
        self.prompts = PackedAttention(prompts, device) if prompts else None
        at = torch.tensor(cache.lengths, dtype=torch.int64)
        sizes = [1] * self.running + list(prompts)
        self.slots = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(device, non_blocking=True)  # [T]
        new = [torch.arange(length) for length in prompts]
        self.positions = torch.cat([at, *new]).to(device, non_blocking=True)  # [T]: the tokens before each in its slot
        self.age = (at[:, None] - torch.arange(self.longest)).to(device, non_blocking=True)  # [S, L]
        self.ragged = len(set(cache.lengths)) > 1
        cache.lengths = [n + size for n, size in zip(cache.lengths + [0] * len(prompts), sizes, strict=True)]
        cache.reserve(max(cache.lengths))
        self.visible = functools.cache(self._visible)

    def _visible(self, window: int | None) -> Tensor | None:
        """Which cached tokens each running slot attends to [S, 1, 1, L]; None: all of them."""
        if not self.ragged and (window is None or self.longest <= window):
            return None
        seen = self.age >= 0 if window is None else (self.age >= 0) & (self.age < window)
        return seen[:, None, None]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        n, cache = self.running, self.cache.layers[layer]
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # else SDPA takes its slow path
        cache[0][self.slots, :, self.positions] = k
        cache[1][self.slots, :, self.positions] = v
        parts = []
        if n:
            keys, values = cache[:, :n, :, : self.longest]  # [S, K, L, E]
            query = q[:n].unflatten(1, (k.shape[1], -1))  # [S, H, E] -> [S, K, G, E]: a group's heads are rows of one query
            parts.append(F.scaled_dot_product_attention(query, keys, values, self.visible(window)).flatten(1, 2))
        if self.prompts is not None:
            parts.append(self.prompts(layer, q[n:], k[n:], v[n:], window))
        return torch.cat(parts) if len(parts) > 1 else parts[0]  # [T, H, E]


@dataclass
class Answer:
    """One prompt's continuation while it grows. finish_reason: "stop" (an end token or stop string), "length", or None."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None


def sample(logits: Tensor, temperature: float, top_p: float, draws: Tensor, top_k: int = 0) -> Tensor:
    """Next token int64 [S] from logits [S, V]; draws fp32 [S], uniform in [0, 1), decide.

    temperature 0 is greedy. top_k keeps the k most probable tokens (0: all); top_p then keeps the most probable of them up
    to and including the one that reaches it. Equals transformers' warpers in their order (of tokens level with the k-th, which
    transformers keeps too, we keep no more than k).
    """
    if temperature == 0:
        return logits.max(dim=-1).indices  # argmax, several times faster on a CPU
    highest = logits.amax(dim=-1, keepdim=True)  # so that no temperature is too low
    probabilities = ((logits.float() - highest) / temperature).softmax(dim=-1)  # [S, V]
    vocabulary = probabilities.shape[1]
    head, order = probabilities.topk(min(top_k or NUCLEUS, vocabulary))
    if top_k or vocabulary <= NUCLEUS:
        return _draw(head / head.sum(-1, keepdim=True), order, top_p, draws)
    chosen = _draw(head, order, top_p, draws)
    beyond = head.sum(-1) <= (draws if top_p == 1.0 else top_p)  # the token drawn may be none of the head
    for row in beyond.nonzero().flatten().tolist():  # one by one: no answer depends on its neighbours
        whole, order = probabilities[row : row + 1].sort(descending=True)
        chosen[row] = _draw(whole, order, top_p, draws[row : row + 1])[0]
    return chosen


def _draw(probabilities: Tensor, order: Tensor, top_p: float, draws: Tensor) -> Tensor:
    """Inverse-transform sampling in the nucleus of the descending probabilities [S, n] of the tokens `order`."""
    cumulative = probabilities.cumsum(dim=-1)
    if top_p < 1.0:
        probabilities = probabilities.masked_fill(cumulative - probabilities >= top_p, 0)
        cumulative = probabilities.cumsum(dim=-1)
        draws = draws * cumulative[:, -1]
    chosen = torch.searchsorted(cumulative, draws[:, None], right=True)
    chosen = torch.minimum(chosen, (probabilities > 0).sum(-1, keepdim=True) - 1)  # rounding never leads beyond the last
    return order.gather(1, chosen).squeeze(1)


def penalise(logits: Tensor, seen: Iterable[Iterable[int]], penalty: float) -> None:
    """Repetition penalty (CTRL, arXiv 1909.05858), in place: the logits of tokens seen so far lose, whatever their sign."""
    for row, ids in zip(logits, seen, strict=True):
        at = torch.tensor(sorted(set(ids)), device=logits.device)
        row[at] = torch.where(row[at] > 0, row[at] / penalty, row[at] * penalty)


@torch.no_grad()
def stream(
    model: CausalLM, prompts: Sequence[Sequence[int]], tokenizer: Tokenizer, max_new_tokens: int, temperature: float = 0.0,
    top_p: float = 1.0, stop: Sequence[str] = (), stop_ids: Iterable[int] = (), seed: int = 0, indices: Sequence[int] = (),
    batch_size: int = 16, top_k: int = 0, repetition_penalty: float = 1.0, max_time: float | None = None,
    autocast: torch.dtype | None = None, together: bool = False,
) -> Iterator[tuple[int, Answer]]:  # fmt: skip
    """Continue each prompt (token ids) until an end token, a stop string or max_new_tokens; yields (its place, its answer)
    each time an answer has grown by a token. The text is there once `finish_reason` is.

    The longest prompts come first. A sample's randomness is a function of (seed, its index; default: its place), not of the
    batch (in 16 bits rounding is). The text ends before the stop string; end tokens are in `ids` alone. max_time: seconds after
    which no pass begins. together: others hold parts of the model and decode prompts of their own, in as many passes.
    """
    if batch_size < 1 or not 0 < top_p <= 1 or "" in stop:
        raise UserError("batch_size must be at least 1, top_p in (0, 1], and a stop string not empty")
    indices, stop = indices or range(len(prompts)), (stop,) if isinstance(stop, str) else stop
    if empty := [i for i, prompt in zip(indices, prompts, strict=True) if not len(prompt)]:
        raise UserError(f"prompt {empty[0]} is empty: there is nothing to continue")
    device = dist.default_device() if together else model.head_weight.device  # shards may wait in host memory
    end = _Ending(tokenizer, {i for i in (tokenizer.eos_id, *stop_ids) if i is not None}, stop, max_new_tokens)
    answers = [Answer() for _ in prompts]
    generators = [np.random.default_rng([seed, i]) for i in indices]
    waiting = deque(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))
    cache = KVCache(model.config, min(batch_size, max(1, len(prompts))), autocast or model.model.norm.weight.dtype, device)
    slots: list[int] = []  # the prompt of each slot in use
    deadline, was_training = time.monotonic() + (float("inf") if max_time is None else max_time), model.training
    few_rows(model.eval(), True)
    try:
        while True:
            working = bool(waiting or slots) and time.monotonic() < deadline
            if dist.everyone(not working, device) if together else not working:
                break
            new = [waiting.popleft() for _ in range(min((batch_size - len(slots)) * working, len(waiting)))]
            ids = [answers[i].ids[-1] for i in slots] + [token for i in new for token in prompts[i]]
            slots += new
            tokens = torch.tensor(ids or [0], device=device)  # a stand-in, while others have prompts left
            lengths = [len(prompts[i]) for i in new]
            attend = Step(cache, lengths, device) if ids else PackedAttention([1], device)
            ends = torch.tensor([1] * (len(slots) - len(new)) + lengths, device=device).cumsum(0) - 1 if new else None
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                logits = model(tokens, apply=partial(_logits_at, ends), attend=attend)
            if repetition_penalty != 1.0 and slots:
                penalise(logits := logits.float(), ([*prompts[i], *answers[i].ids] for i in slots), repetition_penalty)
            draws = torch.tensor([generators[i].random(dtype=np.float32) for i in slots] or [0.0], device=device)
            chosen = sample(logits, temperature, top_p, draws, top_k).tolist()
            for i, token in zip(grown := tuple(slots), chosen, strict=False):  # a stand-in has no answer
                answers[i].ids.append(token)
                answers[i].finish_reason = end.reason(answers[i], prompts[i])
            for slot in reversed(range(len(slots))):
                if answers[slots[slot]].finish_reason:
                    cache.free(slot)
                    slots[slot] = slots[-1]
                    slots.pop()
            yield from ((i, answers[i]) for i in grown)
    finally:
        few_rows(model, False)
        model.train(was_training)


def _logits_at(rows: Tensor | None, hidden: Tensor, weight: Tensor) -> Tensor:
    return _linear(hidden if rows is None else hidden[rows], weight.to(hidden.dtype))


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, in] times the transposed weight [out, in]. On a CPU in bfloat16 one row is a matrix-vector product, and a few are
    multiplied from the other side: the weight is then read up to twice as fast."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or weight.dtype != x.dtype or len(x) > FEW_ROWS:
        return F.linear(x, weight)
    return torch.mv(weight, x[0]).unsqueeze(0) if len(x) == 1 else (weight @ x.t()).t()


def few_rows(model: nn.Module, on: bool) -> None:
    """Let the model's plain linear layers multiply as `_linear` does, or no longer."""

    def forward(layer: nn.Linear, x: Tensor) -> Tensor:
        out = _linear(x, layer.weight)
        if layer.out_features <= layer.in_features:  # wider ones (gate, up) go through elementwise steps alone, in any layout
            out = out.contiguous()
        return out if layer.bias is None else out + layer.bias

    for layer in model.modules():
        if type(layer) is nn.Linear and on:
            layer.forward = partial(forward, layer)  # type: ignore[method-assign]
        elif type(layer) is nn.Linear:
            vars(layer).pop("forward", None)


class _Ending:
    """When answers end, and their text then."""

    def __init__(self, tokenizer: Tokenizer, ends: set[int], stop: Sequence[str], max_new_tokens: int):
        self.tokenizer, self.ends, self.stop, self.max_new_tokens = tokenizer, ends, stop, max_new_tokens
        self.window = max((len(s.encode()) for s in stop), default=0) + 8  # tokens that can hold a stop string
        self.may_stop: dict[int, bool] = {}
        self.letter = tokenizer.encode("a").ids if stop else []

    def reason(self, answer: Answer, prompt: Sequence[int]) -> str | None:
        """Why the answer ends with its last token; sets its text if it does."""
        token = answer.ids[-1]
        stopped = token in self.ends or (bool(self.stop) and self._stops(answer, prompt))
        reason = "stop" if stopped else "length" if len(answer.ids) >= self.max_new_tokens else None
        if reason:
            text = self.tokenizer.decode_after(prompt, answer.ids[:-1] if token in self.ends else answer.ids)
            answer.text = text[: min((text.find(s) for s in self.stop if s in text), default=len(text))]
        return reason

    def _stops(self, answer: Answer, prompt: Sequence[int]) -> bool:
        ids, token = answer.ids, answer.ids[-1]
        if token not in self.may_stop:  # whether one can end in this token: it has its last character, or an unfinished one
            text = self.tokenizer.decode_after(self.letter, [token])
            self.may_stop[token] = not text or "\ufffd" in text or any(s[-1] in text for s in self.stop)
        tail = self.tokenizer.whole_from(ids, len(ids) - self.window)  # before it nothing is new
        text = self.tokenizer.decode_after([*prompt, *ids[:tail]], ids[tail:]) if self.may_stop[token] else ""
        return any(s in text for s in self.stop)


def generate_ids(
    model: CausalLM, prompts: Sequence[Sequence[int]], tokenizer: Tokenizer, max_new_tokens: int, temperature: float = 0.0,
    top_p: float = 1.0, **settings,
) -> list[Answer]:  # fmt: skip
    """The answers of `stream`, complete and in the prompts' order."""
    answers = dict(stream(model, prompts, tokenizer, max_new_tokens, temperature, top_p, **settings))
    return [answers.get(i, Answer()) for i in range(len(prompts))]


def generate(
    model: CausalLM, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int = 256, temperature: float = 0.0,
    top_p: float = 1.0, stop: Sequence[str] = (), seed: int = 0, **settings,
) -> list[str]:  # fmt: skip
    """Continue each prompt; returns the new text alone. Prompts are plain text with the chat form, if any, already in it
    (`tokenizer.render`); they get exactly one BOS. temperature 0 is greedy. settings: see `stream`."""
    ids = [tokenizer.encode(prompt).ids for prompt in prompts]
    settings = {"stop": stop, "stop_ids": tokenizer.stop_ids(), "seed": seed, **settings}
    return [answer.text for answer in generate_ids(model, ids, tokenizer, max_new_tokens, temperature, top_p, **settings)]
