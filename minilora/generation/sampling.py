"""Choose the next token of an answer from the model's logits.

`SamplingParams` holds the settings. `apply_repetition_penalty` changes the logits, and
`sample_tokens` draws one token for each answer.

Shapes: S answers, V vocabulary, C candidates (the most probable tokens, in descending order).
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minilora.errors import UserError

# A vocabulary takes longer to sort than the model takes to compute, so the nucleus is looked for
# among this many tokens first. It is rarely larger.
MAX_CANDIDATES = 256


@dataclass(frozen=True)
class SamplingParams:
    """Settings that decide the tokens of an answer, and where it ends.

    Raises:
        UserError: a value is out of its range; the message begins with the field's name.
    """

    max_new_tokens: int = 256
    """Longest answer in tokens."""
    temperature: float = 0.0
    """Divides the logits. 0 is greedy: always the most probable token."""
    top_p: float = 1.0
    """Sample from the most probable tokens up to and including the one with which their
    probability reaches top_p (nucleus sampling, arXiv 1904.09751)."""
    top_k: int = 0
    """Sample from the top_k most probable tokens only; 0: from all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that occur in prompt or answer become less likely (arXiv 1909.05858)."""
    stop: str | Sequence[str] = ()
    """An answer ends before any of these strings."""
    stop_token_ids: Collection[int] | None = None
    """An answer ends with any of these tokens or with EOS; None: those of the tokenizer's
    `stop_ids()`."""
    seed: int = 0
    """The random draws of an answer are a function of the seed and of the answer's index."""
    max_time: float | None = None
    """Seconds after which no further forward pass begins; None: no limit."""

    def __post_init__(self):
        checks = {
            "max_new_tokens must be at least 1": self.max_new_tokens >= 1,
            "temperature must be >= 0": self.temperature >= 0,
            "top_p must be in (0, 1]": 0 < self.top_p <= 1,
            "top_k must be >= 0 (0: all tokens)": self.top_k >= 0,
            "repetition_penalty must be above 0": 0 < self.repetition_penalty < math.inf,
            "stop: an empty string would end every answer at once": "" not in self.stop_strings,
            "seed must be >= 0": self.seed >= 0,
            "max_time must be above 0": self.max_time is None or self.max_time > 0,
        }
        for message, holds in checks.items():
            if not holds:
                raise UserError(message)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple, also where `stop` is a single string."""
        if isinstance(self.stop, str):
            return (self.stop,)
        return tuple(self.stop)


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> None:
    """Lower the logits of tokens that occur in prompt or answer, in place (arXiv 1909.05858).

    Args:
        logits: [S, V].
        seen: whether a token occurs in the prompt or the answer so far, bool [S, V].
        penalty: positive logits are divided by it, negative ones multiplied.
    """
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    logits.copy_(torch.where(seen, penalized, logits))


def sample_tokens(logits: Tensor, params: SamplingParams, draws: Tensor) -> Tensor:
    """Choose the next token of each answer.

    Temperature, top_k and top_p act in this order and as in transformers. Of several tokens that
    are as probable as the one at rank top_k, transformers keeps all; here top_k tokens stay.

    Args:
        logits: [S, V].
        params: temperature, top_k and top_p are used.
        draws: a random number in [0, 1) for each answer, fp32 [S].

    Returns:
        Token ids, int64 [S].
    """
    if params.temperature == 0:
        return logits.max(dim=-1).indices  # argmax, but several times faster on a CPU

    highest = logits.amax(dim=-1, keepdim=True)  # [S, 1]; keeps exponents finite at any temperature
    probabilities = ((logits.float() - highest) / params.temperature).softmax(dim=-1)  # [S, V]
    vocabulary = probabilities.shape[1]
    # A GPU sorts the vocabulary in less time than the host takes to look whether that is needed.
    max_candidates = vocabulary if logits.is_cuda else MAX_CANDIDATES
    num_candidates = min(params.top_k or max_candidates, vocabulary)
    candidates, tokens = probabilities.topk(num_candidates)  # [S, C] each

    if params.top_k or num_candidates == vocabulary:
        candidates = candidates / candidates.sum(dim=-1, keepdim=True)
        return _draw_from_nucleus(candidates, tokens, params.top_p, draws)

    sampled = _draw_from_nucleus(candidates, tokens, params.top_p, draws)

    # where the candidates have too little probability together, the token drawn from the whole
    # vocabulary may not be among them: sort the whole vocabulary, answer by answer, so that no
    # answer's numbers depend on the other answers
    needed = draws if params.top_p == 1.0 else params.top_p
    is_beyond = candidates.sum(dim=-1) <= needed  # bool [S]
    for row in is_beyond.nonzero().flatten().tolist():
        rows = slice(row, row + 1)
        candidates, tokens = probabilities[rows].sort(descending=True)  # [1, V] each
        sampled[rows] = _draw_from_nucleus(candidates, tokens, params.top_p, draws[rows])
    return sampled


def _draw_from_nucleus(
    probabilities: Tensor, tokens: Tensor, top_p: float, draws: Tensor
) -> Tensor:
    """Draw one of the most probable tokens by inverse transform sampling.

    Args:
        probabilities: of the candidates, in descending order [S, C].
        tokens: ids of the candidates, int64 [S, C].
        top_p: probability that the nucleus must reach.
        draws: uniform in [0, 1), fp32 [S].

    Returns:
        Token ids, int64 [S].
    """
    cumulative = probabilities.cumsum(dim=-1)
    if top_p < 1.0:
        is_outside = cumulative - probabilities >= top_p  # those before it reach top_p already
        probabilities = probabilities.masked_fill(is_outside, 0)
        cumulative = probabilities.cumsum(dim=-1)
        draws = draws * cumulative[:, -1]

    positions = torch.searchsorted(cumulative, draws[:, None], right=True)  # [S, 1]
    last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1  # the nucleus's last position [S, 1]
    positions = torch.minimum(positions, last)  # rounding must not lead beyond the nucleus
    return tokens.gather(1, positions).squeeze(1)
