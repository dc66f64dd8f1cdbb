"""Causal attention among packed documents: no token sees another document.

The decoder's layers call an *attention context* for the one step in which tokens look at other
tokens. `PackedAttention` is the context of training and evaluation; generation/cache.py has
another, which also sees the tokens of earlier passes.

Shapes: T tokens of all documents, t of one document, H query heads, K key/value heads (H is a
multiple of K), E head size.
"""

import functools
import inspect
from collections.abc import Sequence
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.errors import UserError


class AttentionContext(Protocol):
    """Which tokens attend to which; one object serves all layers of a forward pass."""

    positions: Tensor
    """Position of each token in its document, from 0: int64 [T]."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Let each query attend to the keys of the tokens that it may see.

        Args:
            layer: index of the calling layer, by which a cache tells its keys and values apart.
            q: queries [T, H, E], already rotated.
            k: keys [T, K, E], already rotated.
            v: values [T, K, E].
            window: a token sees itself and the `window - 1` tokens before it; None: all before it.

        Returns:
            softmax(q k^T / sqrt(E)) v over those tokens, [T, H, E].
        """
        ...


class PackedAttention:
    """Causal attention within each of several documents that are laid end to end.

    On CUDA in half precision all documents are one call of a variable-length kernel. Elsewhere
    each document is a call of scaled_dot_product_attention.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device):
        """Prepare the attention of one batch.

        Args:
            lengths: tokens of each document.
            device: where the model computes.
        """
        self.lengths = list(lengths)
        self.longest = max(self.lengths)
        self.on_cuda = device.type == "cuda"

        starts = torch.tensor([0, *self.lengths]).cumsum(0)  # of each document, and the end
        start_of_token = starts[:-1].repeat_interleave(torch.tensor(self.lengths))  # [T]
        positions = torch.arange(int(starts[-1])) - start_of_token

        # made on the host and copied without waiting for the device
        self.positions = positions.to(device, non_blocking=True)
        # cumulative sequence lengths, as variable-length kernels take them: int32 [documents + 1]
        self.cu_seqlens = starts.to(device, torch.int32, non_blocking=True)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        has_kernel = self.on_cuda and q.dtype in (torch.float16, torch.bfloat16)
        if has_kernel:
            return _variable_length_attention(q, k, v, self.cu_seqlens, self.longest, window)

        documents = zip(
            q.split(self.lengths), k.split(self.lengths), v.split(self.lengths), strict=True
        )
        return torch.cat(
            [document_attention(q_doc, k_doc, v_doc, window) for q_doc, k_doc, v_doc in documents]
        )


def document_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Apply causal attention within one document.

    Args:
        q: queries [t, H, E].
        k: keys [t, K, E].
        v: values [t, K, E].
        window: as for `AttentionContext`.

    Returns:
        [t, H, E].
    """
    length, num_heads, _ = q.shape
    num_kv_heads = k.shape[1]

    mask = None
    if window is not None and length > window:
        ones = torch.ones(length, length, dtype=torch.bool, device=q.device)
        mask = ones.tril_().triu_(1 - window)  # row i: True in columns i - window + 1 to i

    q = q.transpose(0, 1).unsqueeze(0)  # [t, H, E] -> [1, H, t, E]
    k = k.transpose(0, 1).unsqueeze(0)  # [t, K, E] -> [1, K, t, E]
    v = v.transpose(0, 1).unsqueeze(0)  # [t, K, E] -> [1, K, t, E]
    out = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, enable_gqa=num_heads != num_kv_heads
    )
    return out.squeeze(0).transpose(0, 1)  # [1, H, t, E] -> [t, H, E]


def _variable_length_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, window: int | None
) -> Tensor:
    """Apply causal attention within every document, by torch's variable-length kernel for CUDA.

    Args:
        q: queries [T, H, E], of 16 bits.
        k: keys [T, K, E].
        v: values [T, K, E].
        cu_seqlens: where documents begin, and the end of the last: int32 [documents + 1].
        longest: tokens of the longest document.
        window: as for `AttentionContext`.

    Returns:
        [T, H, E].
    """
    from torch.nn.attention.varlen import varlen_attn

    group_size = q.shape[1] // k.shape[1]
    bounds = (cu_seqlens, cu_seqlens, longest, longest)  # of queries, and the same of keys

    # torch 2.12 has replaced is_causal by window_size: how many tokens a query sees to its left
    # (-1: all) and to its right
    if _varlen_attn_has_window():
        before = -1 if window is None else window - 1
        out = varlen_attn(q, k, v, *bounds, window_size=(before, 0), enable_gqa=group_size > 1)
        return cast(Tensor, out)

    if window is not None and longest > window:
        raise UserError(
            f"a document of {longest} tokens is longer than the model's sliding window of "
            f"{window}, which needs torch >= 2.12"
        )
    k = k.repeat_interleave(group_size, dim=1)  # [T, K, E] -> [T, H, E]
    v = v.repeat_interleave(group_size, dim=1)  # [T, K, E] -> [T, H, E]
    return cast(Tensor, varlen_attn(q, k, v, *bounds, is_causal=True))  # type: ignore[call-arg]


@functools.cache
def _varlen_attn_has_window() -> bool:
    """Return whether `varlen_attn` takes `window_size`, as it does from torch 2.12 on."""
    from torch.nn.attention.varlen import varlen_attn

    return "window_size" in inspect.signature(varlen_attn).parameters
