"""Layers in 4 and 8 bits on a GPU."""

import pytest
import torch
from torch import nn

from helpers.quantized import normal
from minilora.distributed import REPLICATED
from minilora.model.quantization import Int8Linear, NF4Linear, QuantizedLinear

IN, OUT = 4096, 1024


def make_layer(kind: str, weight: torch.Tensor) -> QuantizedLinear:
    """Quantize a weight [out, in] where it is."""
    with torch.device("meta"):
        base = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer: QuantizedLinear
    if kind == "int8":
        layer = Int8Linear(base, "layer", ())
    else:
        layer = NF4Linear(base, "layer", (), kind == "nf4 double")
    layer.quantize(weight, REPLICATED)
    return layer.train()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference as a share of the norm of what was expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("tokens", [1, 5, 64, 2000])
@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT), (OUT, OUT)])
@pytest.mark.parametrize("kind", ["nf4", "nf4 double", "int8"])
def test_product_and_gradient_are_those_of_the_held_weight(kind, shape, tokens, gpu):
    """Square layers too: bitsandbytes < 0.50 took their transpose."""
    weight = (normal(*shape) * 0.02).to(gpu, torch.bfloat16)
    layer = make_layer(kind, weight)
    held = layer.weight_in(torch.float32)
    assert relative_error(held, weight) < 0.15

    x = normal(tokens, shape[1], seed=1).to(gpu, torch.bfloat16).requires_grad_()
    grad = normal(tokens, shape[0], seed=2).to(gpu, torch.bfloat16)
    out = layer(x)
    out.backward(grad)
    assert relative_error(out, x.float() @ held.t()) < 0.02
    assert relative_error(x.grad, grad.float() @ held) < 0.02


def test_bytes_are_those_that_a_cpu_makes(gpu):
    """Up to values in the middle between two levels, which kernels may round differently."""
    weight = (normal(OUT, IN) * 0.02).to(torch.bfloat16)
    on_cpu, on_gpu = make_layer("nf4", weight), make_layer("nf4", weight.to(gpu))
    differing = (on_cpu.weight != on_gpu.weight.cpu()).float().mean()
    assert differing < 1e-4
