"""The norm equals F.rms_norm to the bit, and keeps less for the backward pass."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from minilora.model.rms_norm import rms_norm

EPS = 1e-5


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def values_and_kept_bytes(norm, x: Tensor, weight: Tensor) -> tuple[list[Tensor], int]:
    """Return a norm's output and gradients, and the bytes that it keeps beside its arguments."""
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in (x, weight)]
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = norm(*leaves, EPS)
    for leaf in leaves:
        kept.pop(leaf.untyped_storage().data_ptr(), None)

    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    return [y, *torch.autograd.grad(y, trained, grad)], sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("shape", [(70, 96), (21, 3, 33), (0, 8)], ids=str)
def test_equals_torch_to_the_bit_and_keeps_less(
    shape: tuple[int, ...], trained: bool, dtype: torch.dtype
):
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()
    weight = torch.randn(shape[-1], generator=generator).to(dtype).requires_grad_(trained)
    ours, kept = values_and_kept_bytes(rms_norm, x, weight)
    expected, kept_by_torch = values_and_kept_bytes(plain_rms_norm, x, weight)
    assert len(ours) == 2 + trained
    for value, reference in zip(ours, expected, strict=True):
        assert value.dtype == dtype and torch.equal(value, reference)
    rows = x.numel() // shape[-1]
    assert kept <= 4 * rows  # one fp32 number a row
    if x.numel():
        assert kept_by_torch >= 4 * x.numel()


def test_without_gradients_nothing_is_kept():
    x, weight = torch.ones(2, 4, requires_grad=True), torch.ones(4)
    with torch.no_grad():
        y = rms_norm(x, weight, EPS)
    assert y.grad_fn is None and torch.equal(y, plain_rms_norm(x, weight, EPS))
