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

from minilora.distributed import to_device
from minilora.model.compiled_attention import compiled_attention


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

    On recent GPUs all documents are one call of a variable-length kernel, in 16 bits. Elsewhere
    each document is a call of scaled_dot_product_attention.

    A compiled block (block_execution.py) would be compiled anew for every value that it meets in an
    attribute. So what it reads is the same for all batches, or a tensor.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device):
        """Prepare the attention of one batch.

        Args:
            lengths: tokens of each document.
            device: where the model computes.
        """
        self.lengths = list(lengths)
        self.has_kernel = has_variable_length_kernel(device)
        self.kernel_takes_groups = self.has_kernel and _varlen_attn_takes_groups()
        self.longest = _round_up(max(lengths))

        starts = torch.tensor([0, *lengths]).cumsum(0)  # of each document, and the end
        start_of_token = starts[:-1].repeat_interleave(starts.diff())  # [T]
        positions = torch.arange(len(start_of_token)) - start_of_token

        # made on the host and copied without waiting for the device
        self.positions = to_device(positions, device)
        # cumulative sequence lengths, as variable-length kernels take them: int32 [documents + 1]
        self.cu_seqlens = to_device(starts.to(torch.int32), device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        if self._uses_kernel(q):
            return _variable_length_attention(
                q, k, v, self.cu_seqlens, self.longest, window, self.kernel_takes_groups
            )
        if torch.compiler.is_compiling():  # on a CPU, see `can_be_compiled`
            return compiled_attention(q, k, v, self.cu_seqlens, window)
        return _attention_by_document(q, k, v, self.lengths, window)

    def can_be_compiled(self, x: Tensor) -> bool:
        """Return whether a compiled block can call this: not on a GPU without the kernel."""
        return x.device.type == "cpu" or self._uses_kernel(x)

    def _uses_kernel(self, x: Tensor) -> bool:
        """Return whether all documents are one call of the kernel."""
        return self.has_kernel and x.dtype in (torch.float16, torch.bfloat16)


@functools.cache
def has_variable_length_kernel(device: torch.device) -> bool:
    """Return whether torch's variable-length attention runs on a device: GPUs from Ampere on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _round_up(longest: int) -> int:
    """Return a bound on the length of documents that is the same for most batches.

    It may be too large: the kernel stops at each document's end.
    """
    return max(2048, 1 << (longest - 1).bit_length())


def _attention_by_document(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window: int | None
) -> Tensor:
    """Apply causal attention within every document, one after the other.

    Args:
        q: queries [T, H, E].
        k: keys [T, K, E].
        v: values [T, K, E].
        lengths: tokens of each document.
        window: as for `AttentionContext`.

    Returns:
        [T, H, E].
    """
    documents = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    window: int | None,
    takes_groups: bool,
) -> Tensor:
    """Apply causal attention within every document, by torch's variable-length kernel for CUDA.

    Args:
        q: queries [T, H, E], of 16 bits.
        k: keys [T, K, E].
        v: values [T, K, E].
        cu_seqlens: where documents begin, and the end of the last: int32 [documents + 1].
        longest: no document is longer.
        window: as for `AttentionContext`.
        takes_groups: see `_varlen_attn_takes_groups`.

    Returns:
        [T, H, E].
    """
    from torch.nn.attention.varlen import varlen_attn

    bounds = (cu_seqlens, cu_seqlens, longest, longest)  # of queries, and the same of keys
    # how many tokens a query sees to its left (-1: all) and to its right
    visible = (-1 if window is None else window - 1, 0)
    group_size = q.shape[1] // k.shape[1]
    if takes_groups:
        out = varlen_attn(q, k, v, *bounds, window_size=visible, enable_gqa=group_size > 1)
    else:
        k = k.repeat_interleave(group_size, dim=1)  # [T, K, E] -> [T, H, E]
        v = v.repeat_interleave(group_size, dim=1)  # [T, K, E] -> [T, H, E]
        out = varlen_attn(q, k, v, *bounds, window_size=visible)
    return cast(Tensor, out)


@functools.cache
def _varlen_attn_takes_groups() -> bool:
    """Return whether `varlen_attn` takes `enable_gqa`, as it does from torch 2.12 on."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters
