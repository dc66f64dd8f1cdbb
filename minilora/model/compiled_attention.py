"""Attention per document on a CPU, in a form that torch.compile takes as one operation.

A compiler follows a Python loop by writing out its passes, so a loop over documents would be
compiled anew for every batch. Here the loop is inside a custom operator, which a compiled block
calls with the documents' bounds as a tensor. Being opaque, the operator needs its own backward
pass; it calls the kernels that scaled_dot_product_attention uses on a CPU.

Shapes: T tokens of all documents, t of one document, H query heads, K key/value heads, E head size.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def compiled_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None
) -> Tensor:
    """Apply causal attention within every document.

    Args:
        q: queries [T, H, E].
        k: keys [T, K, E].
        v: values [T, K, E].
        cu_seqlens: where documents begin, and the end of the last: int32 [documents + 1].
        window: as for `AttentionContext`.

    Returns:
        [T, H, E].
    """
    group_size = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group_size, dim=1)  # [T, K, E] -> [T, H, E]
    v = v.repeat_interleave(group_size, dim=1)  # [T, K, E] -> [T, H, E]
    out, _logsumexp = _attention(q, k, v, cu_seqlens, window)
    return out


@torch.library.custom_op("minilora::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None
) -> tuple[Tensor, Tensor]:
    """Return the output [T, H, E], and the logsumexp of the scores [T, H] for the backward pass."""
    outputs, logsumexps = [], []
    for rows in _documents(cu_seqlens):
        mask = _window_bias(len(q[rows]), window, q.dtype)
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *_heads_first(q[rows], k[rows], v[rows]), is_causal=mask is None, attn_mask=mask
        )
        outputs += _tokens_first(out)
        logsumexps.append(logsumexp[0].t())  # [1, H, t] -> [t, H]
    return torch.cat(outputs), torch.cat(logsumexps)


@torch.library.custom_op("minilora::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    tensors: list[Tensor],
    cu_seqlens: Tensor,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; `tensors` are q, k, v, the output and its logsumexp."""
    q, k, v, out, logsumexp = tensors
    grads: tuple[list[Tensor], ...] = ([], [], [])
    for rows in _documents(cu_seqlens):
        mask = _window_bias(len(q[rows]), window, q.dtype)
        document = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *_heads_first(grad[rows], q[rows], k[rows], v[rows], out[rows]),
            logsumexp[rows].t().unsqueeze(0),  # [t, H] -> [1, H, t]
            dropout_p=0.0,
            is_causal=mask is None,
            attn_mask=mask,
        )
        for parts, part in zip(grads, _tokens_first(*document), strict=True):
            parts.append(part)
    grad_q, grad_k, grad_v = (torch.cat(parts) for parts in grads)
    return grad_q, grad_k, grad_v


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None):
    """Tell the compiler the shapes of `_attention`."""
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@_attention_backward.register_fake
def _(grad: Tensor, tensors: list[Tensor], cu_seqlens: Tensor, window: int | None):
    """Tell the compiler the shapes of `_attention_backward`."""
    q, k, v, _out, _logsumexp = tensors
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep_for_backward(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    """Keep what `_differentiate` needs of a call of `_attention`."""
    q, k, v, cu_seqlens, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _differentiate(ctx, grad: Tensor, _grad_logsumexp: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of all arguments of `_attention`."""
    *tensors, cu_seqlens = ctx.saved_tensors
    return *_attention_backward(grad, tensors, cu_seqlens, ctx.window), None, None


_attention.register_autograd(_differentiate, setup_context=_keep_for_backward)


def _documents(cu_seqlens: Tensor) -> Iterator[slice]:
    """Iterate over the rows of each document."""
    bounds = cu_seqlens.tolist()
    return map(slice, bounds[:-1], bounds[1:])


def _window_bias(length: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
    """Return what a sliding window adds to the scores of a document [t, t]: 0 or -inf.

    None if the window is as long as the document: attention is then just causal.
    """
    if window is None or length <= window:
        return None
    visible = torch.ones(length, length, dtype=torch.bool).tril_().triu_(1 - window)
    return torch.zeros(length, length, dtype=dtype).masked_fill_(~visible, float("-inf"))


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """Bring tensors of a document into the kernels' order: [t, H, E] -> [1, H, t, E]."""
    return [tensor.transpose(0, 1).unsqueeze(0) for tensor in tensors]


def _tokens_first(*tensors: Tensor) -> list[Tensor]:
    """Undo `_heads_first`: [1, H, t, E] -> [t, H, E]."""
    return [tensor.squeeze(0).transpose(0, 1) for tensor in tensors]
