"""Root-mean-square norm (arXiv 1910.07467) that keeps little for the backward pass on any device.

    y = x / sqrt(mean(x^2) + eps) * weight

Shapes: ... any leading axes, D the normalized axis.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize the last axis of x and scale it: x [..., D], weight [D] -> [..., D].

    CUDA has a kernel for it. Elsewhere autograd takes the operations of `F.rms_norm` one by one,
    and in 16 bits keeps fp32 tensors of the size of x: there `_RMSNorm` computes the same.
    """
    is_16_bit = x.dtype in (torch.bfloat16, torch.float16)
    if is_16_bit and x.device.type != "cuda" and torch.is_grad_enabled():
        return cast(Tensor, _RMSNorm.apply(x, weight, eps))
    return F.rms_norm(x, weight.shape, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """The norm, with a backward pass that needs x and one number a row.

    Both passes compute in fp32, in the order of F.rms_norm, whose results they equal to the bit.
    Beside an x in fp32 it would save no memory, and bits of a block's gradient would change: there
    autograd adds the two parts of x's gradient to the residual stream's one after the other.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return the scaled norm of x [..., D]."""
        x32 = x.float()
        mean_square = x32.square().mean(dim=-1, keepdim=True)  # [..., 1]
        inverse = mean_square.add_(eps).rsqrt_()  # 1 / root mean square
        ctx.save_for_backward(x, weight, inverse)
        return (x32 * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients of x [..., D] and weight [D]."""
        x, weight, inverse = ctx.saved_tensors
        x32, grad = x.float(), grad.float()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            over_rows = tuple(range(x.ndim - 1))
            grad_weight = (grad * (x32 * inverse)).sum(dim=over_rows).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            grad_normed = grad * weight
            # through the root mean square, on which all elements of a row depend
            grad_inverse = (grad_normed * x32).sum(dim=-1, keepdim=True)  # [..., 1]
            grad_mean_square = -0.5 * grad_inverse * inverse.pow(3)
            through_mean = x32 * (grad_mean_square / x.shape[-1] * 2)
            grad_x = grad_normed.mul_(inverse).add_(through_mean).to(x.dtype)
        return grad_x, grad_weight, None
