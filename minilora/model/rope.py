"""Rotary position embedding (RoPE, arXiv 2104.09864), and its scalings for longer contexts.

Each pair of dimensions of a query or key is rotated by an angle that is proportional to the
token's position: dimension i and dimension i + E/2 by `position * frequency[i]`. The dot
product of a query and a key then depends on their distance only. The positions themselves, which
restart at 0 in every document, come from the attention context (see attention.py).

Shapes: T tokens, E head size.
"""

import math

import torch
from torch import Tensor


def rope_frequencies(rope: dict, head_dim: int) -> tuple[Tensor, float]:
    """Compute the angle per position of every pair of dimensions.

    Equals transformers' `ROPE_INIT_FUNCTIONS` for default, linear, llama3 and yarn.

    Args:
        rope: `DecoderConfig.rope`, with rope_type and rope_theta. A scaling has more keys: linear
            has factor; llama3 has factor, low_freq_factor, high_freq_factor and
            original_max_position_embeddings; yarn's are in `_yarn_frequencies`.
        head_dim: the head size E.

    Returns:
        Frequencies in radians a position, fp32 [E/2] on the CPU (transformers calls them inv_freq).
        And a factor on cos and sin, which is 1 except for YaRN: there it sharpens attention in long
        contexts.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim  # [E/2]
    inv_freq = 1.0 / rope["rope_theta"] ** exponents

    if rope["rope_type"] == "linear":
        return inv_freq / rope["factor"], 1.0
    if rope["rope_type"] == "llama3":
        return _llama3_frequencies(inv_freq, rope), 1.0
    if rope["rope_type"] == "yarn":
        return _yarn_frequencies(inv_freq, rope, head_dim)
    return inv_freq, 1.0


def _llama3_frequencies(inv_freq: Tensor, rope: dict) -> Tensor:
    """Slow down the low frequencies by `factor`, keep the high ones, and blend in between."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    # full turns over the length of the original context
    turns = rope["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slowed down, 1: kept
    return inv_freq * ((1 - keep) / rope["factor"] + keep)


def _yarn_frequencies(inv_freq: Tensor, rope: dict, head_dim: int) -> tuple[Tensor, float]:
    """Apply YaRN (arXiv 2309.00071): slow down the low frequencies, and sharpen attention.

    Args:
        inv_freq: the unscaled inverse frequencies, fp32 [E/2].
        rope: has original_max_position_embeddings, and factor or max_position_embeddings;
            beta_fast, beta_slow, truncate, mscale, mscale_all_dim and attention_factor may be
            absent.
        head_dim: the head size E.

    Returns:
        As `rope_frequencies`.
    """
    original_length = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or rope["max_position_embeddings"] / original_length

    def pair_with_turns(turns: float) -> float:
        """Return the fractional index of the pair that makes `turns` turns over that length.

        This is `original_length * theta^(-2 i / E) = 2 pi * turns`, solved for i.
        """
        log_theta = math.log(rope["rope_theta"])
        return head_dim * math.log(original_length / (turns * 2 * math.pi)) / (2 * log_theta)

    # pairs up to ramp_start are kept, pairs from ramp_end on are slowed down by the whole factor
    ramp_start = pair_with_turns(rope.get("beta_fast") or 32)
    ramp_end = pair_with_turns(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        ramp_start, ramp_end = math.floor(ramp_start), math.ceil(ramp_end)
    ramp_start = max(ramp_start, 0)
    ramp_end = min(ramp_end, head_dim - 1)  # there are only E/2 pairs; the bound is transformers'

    pairs = torch.arange(head_dim // 2, device="cpu")
    slow = ((pairs - ramp_start) / max(ramp_end - ramp_start, 1e-3)).clamp(0, 1)
    inv_freq = inv_freq * (slow / factor + 1 - slow)  # slow 0: kept, 1: slowed down

    attention_factor = rope.get("attention_factor")
    return inv_freq, attention_factor or _yarn_attention_factor(rope, factor)


def _yarn_attention_factor(rope: dict, factor: float) -> float:
    """Return the factor on cos and sin; its square is a factor on the attention logits.

    In the paper it is sqrt(1/t) = 0.1 ln(factor) + 1. DeepSeek's variant divides two such values,
    with weights mscale and mscale_all_dim.
    """

    def weighted(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return weighted(mscale) / weighted(mscale_all_dim)
    return weighted(1)


_KNOWN_FREQUENCIES: dict[tuple, tuple[Tensor, float]] = {}
"""What `_frequencies_on` has returned, by its arguments."""


def _frequencies_on(device: torch.device, rope: dict, head_dim: int) -> tuple[Tensor, float]:
    """Return `rope_frequencies` with the tensor on a device, where it is kept.

    To copy it in every forward pass would let the host wait for a GPU.
    """
    key = (device, head_dim, repr(sorted(rope.items())))
    if key in _KNOWN_FREQUENCIES:
        return _KNOWN_FREQUENCIES[key]
    inv_freq, scaling = rope_frequencies(rope, head_dim)
    inv_freq = inv_freq.to(device)
    if type(inv_freq) is Tensor:  # not a fake tensor, which has no values
        _KNOWN_FREQUENCIES[key] = (inv_freq, scaling)
    return inv_freq, scaling


def rotary_cos_sin(
    positions: Tensor, rope: dict, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute the cosines and sines that `rotate` takes.

    They are computed anew in each forward pass, once for all layers. So the model has no buffers
    for them, which would have to be put on a device and kept in fp32. Only the frequencies are kept
    between passes.

    Args:
        positions: of each token in its document, int64 [T].
        rope: `DecoderConfig.rope`.
        head_dim: the head size E.
        dtype: of the result; the angles are computed in fp32.

    Returns:
        cos and sin, each [T, 1, E].
    """
    inv_freq, scaling = _frequencies_on(positions.device, rope, head_dim)
    angles = torch.outer(positions.float(), inv_freq)  # [T, E/2]
    angles = angles.repeat(1, 2).unsqueeze(1)  # [T, E/2] -> [T, E] -> [T, 1, E]
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys by their positions.

    Args:
        x: [T, heads, E].
        cos: [T, 1, E] in x's dtype, see `rotary_cos_sin`.
        sin: the same.

    Returns:
        [T, heads, E].
    """
    # (a, b) -> (a cos - b sin, b cos + a sin)
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin
