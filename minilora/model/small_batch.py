"""Faster linear layers for a few rows, as decoding has them.

Shapes: T tokens, in and out features, R rank of an adapter.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.model.lora import LoRALinear, lora_layers

SMALL_BATCH = 256
"""Rows of x in bfloat16 up to which reading the weight takes longer than the arithmetic."""
SMALL_BATCH_FLOAT32 = range(8, 33)
"""Rows of x in float32 for which the transposed product is faster (measured: up to 1.5 times)."""


def small_batch_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply by the transposed weight: `F.linear(x, weight)`, up to rounding.

    On a CPU one row in bfloat16 is computed as a matrix-vector product, and a few rows, there and
    in float32, as the transpose of `weight @ x.T`: the weight is then read up to twice as fast.

    Args:
        x: [T, in].
        weight: [out, in].

    Returns:
        [T, out]; not contiguous where it is such a transpose.
    """
    if x.device.type != "cpu" or x.dtype != weight.dtype:
        return F.linear(x, weight)
    rows = len(x)
    if rows == 1 and x.dtype == torch.bfloat16:
        return torch.mv(weight, x[0]).unsqueeze(0)  # [out] -> [1, out]
    is_faster_transposed = (x.dtype == torch.bfloat16 and rows <= SMALL_BATCH) or (
        x.dtype == torch.float32 and rows in SMALL_BATCH_FLOAT32
    )
    if is_faster_transposed:
        return (weight @ x.t()).t()  # [out, T] -> [T, out]
    return F.linear(x, weight)


@contextmanager
def use_small_batch_matmul(model: nn.Module) -> Iterator[None]:
    """Let the model's plain linear layers multiply by `small_batch_linear` inside a `with` block.

    Quantized layers and the head are left as they are. Blocks may be nested: the inner one changes
    nothing.
    """
    layers = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and "forward" not in vars(module)  # not changed already
    ]
    for layer in layers:
        # an attribute of the layer hides the method of its class
        layer.forward = partial(_small_batch_forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _small_batch_forward(layer: nn.Linear, x: Tensor) -> Tensor:
    """Compute what `layer(x)` would: x [T, in] -> [T, out]."""
    out = small_batch_linear(x, layer.weight)
    # The result is transposed, and making it contiguous costs a copy. Layers that widen do without
    # it: gate_proj and up_proj, whose results only meet elementwise operations and the next product
    # (and q_proj of small Qwen3 models, where it is right too). Other layers' results are cut into
    # heads or added to the residual stream.
    if layer.out_features <= layer.in_features:
        out = out.contiguous()
    return out if layer.bias is None else out + layer.bias


@contextmanager
def use_cast_adapters(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Cast the adapters of a model once inside a `with` block, instead of in each forward pass.

    For inference only: the adapters' own values get no gradient, and are read at the beginning.

    Args:
        model: not sharded.
        dtype: of the activations.
    """
    layers = [layer for _, layer in lora_layers(model) if layer.lora_A.dtype != dtype]
    layers = [layer for layer in layers if "forward" not in vars(layer)]  # not changed already
    for layer in layers:
        A, B = layer.lora_A.detach().to(dtype), layer.lora_B.detach().to(dtype)
        layer.forward = partial(_cast_adapter_forward, layer, A, B)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _cast_adapter_forward(layer: LoRALinear, A: Tensor, B: Tensor, x: Tensor) -> Tensor:
    """Compute what `layer(x)` would, with A [R, in] and B [out, R] in x's dtype."""
    h = F.linear(x, A)  # [T, in] -> [T, R]
    return layer.base_layer(x).addmm_(h, B.t(), alpha=layer.scaling)  # [T, out]
