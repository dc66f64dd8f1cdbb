"""Faster linear layers for a few bfloat16 rows on a CPU, as decoding has them.

Shapes: T tokens, in and out features.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL_BATCH = 256
"""Rows of x up to which reading the weight takes longer than the arithmetic."""


def small_batch_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply by the transposed weight: `F.linear(x, weight)`, up to rounding.

    On a CPU in bfloat16 one row is computed as a matrix-vector product, and a few as the
    transpose of `weight @ x.T`: the weight is then read up to twice as fast.

    Args:
        x: [T, in].
        weight: [out, in].

    Returns:
        [T, out]; not contiguous where it is such a transpose.
    """
    is_bfloat16_on_cpu = x.device.type == "cpu" and x.dtype == weight.dtype == torch.bfloat16
    if not is_bfloat16_on_cpu or len(x) > SMALL_BATCH:
        return F.linear(x, weight)
    if len(x) == 1:
        return torch.mv(weight, x[0]).unsqueeze(0)  # [out] -> [1, out]
    return (weight @ x.t()).t()  # [out, T] -> [T, out]


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
