"""Frozen linear layers whose weight is held in fewer bits than their product is computed in.

There are three ways of holding a weight: in 16 bits (`CastLinear`, here), and in 8 or 4 bits
(quantization.py). They share `FrozenLinear`: the product gets a weight that was cast or dequantized
for it, and nothing of it is kept. For the gradient of the input it is made once more.

`CastLinear` is for a CPU without 16-bit arithmetic, see precision.py.

Shapes: T tokens, in and out features.
"""

import abc
import threading

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 32
"""Rows of x up to which reading the weight takes longer than the arithmetic."""
CACHE_TILE = 2**18
"""Weights cast at a time for a few rows, by each thread: 1 MiB in fp32, which stays in the cache of
a core."""
MEMORY_TILE = 2**26
"""Weights cast at a time for many rows: 256 MiB in fp32."""


class _FrozenProduct(torch.autograd.Function):
    """The product of a frozen layer, with a gradient for its input.

    For the backward pass only the layer is kept: its weight is cast or dequantized once more there.
    """

    @staticmethod
    def forward(ctx, x: Tensor, layer: "FrozenLinear") -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.input_gradient(grad), None


class FrozenLinear(nn.Linear, abc.ABC):
    """A linear layer that is not trained, and makes its weight anew for each product.

    It is created on the meta device, in place of a plain layer.
    """

    waits_for_device = False
    """Whether the host waits for the product, which a CUDA graph could then not hold."""

    def __init__(self, base: nn.Linear):
        """Create a layer of the shape of `base`."""
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute x W^T + bias: [T, in] -> [T, out], a new tensor, to which LoRA adds in place."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _FrozenProduct.apply(x, self)  # autograd would keep the weight that was made
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """Compute x W^T + bias without autograd: [T, in] -> [T, out]."""
        return F.linear(x, self.weight_in(x.dtype), self.bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """Compute the gradient of the input from that of the output: [T, out] -> [T, in]."""
        return grad @ self.weight_in(grad.dtype)  # [T, out] @ [out, in] -> [T, in]

    @abc.abstractmethod
    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [out, in] in a floating-point dtype."""


class CastLinear(FrozenLinear):
    """A linear layer whose weight is in 16 bits, and is cast to the dtype of its input."""

    def product(self, x: Tensor) -> Tensor:
        """Multiply by the weight, of which only a part is cast at a time if x has few rows."""
        return cast_linear(x, self.weight, self.bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """Compute the gradient of the input from that of the output: [T, out] -> [T, in]."""
        return grad @ _cast_for_product(self.weight, grad.dtype)  # [T, out] @ [out, in]

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [out, in] in a floating-point dtype."""
        return self.weight.to(dtype)


def cast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `F.linear(x, weight.to(x.dtype), bias)`, without autograd.

    If x has many rows, the whole weight is cast, and the result is to the bit that of a weight held
    in the dtype of x. For a few rows, as decoding has them, that would take longer than the
    product, because memory would be written and read once more. The weight is then cast in tiles of
    some rows, each of which is multiplied while it is in the processor's cache. A head that is
    larger than any other matrix is cast in tiles too, so that there is no second copy of it.

    Args:
        x: [T, in].
        weight: [out, in], of any floating-point dtype.
        bias: [out], of the dtype of x.

    Returns:
        [T, out].
    """
    has_few_rows = len(x) <= FEW_ROWS
    tile_elements = MEMORY_TILE
    if has_few_rows:
        tile_elements = CACHE_TILE * torch.get_num_threads()
    if weight.dtype == x.dtype or (weight.numel() <= tile_elements and not has_few_rows):
        return F.linear(x, _cast_for_product(weight, x.dtype), bias)

    rows = max(1, tile_elements // weight.shape[1])
    out = x.new_empty(len(x), weight.shape[0])
    for tile, out_tile in zip(weight.split(rows), out.split(rows, dim=1), strict=True):
        matrix = _cast_for_product(tile, x.dtype)
        if len(x) == 1:
            torch.mv(matrix, x[0], out=out_tile[0])  # [rows, in] @ [in] -> [rows]
        else:
            # [rows, in] @ [in, T] -> [rows, T]; for a few rows of x faster than x @ matrix.t()
            out_tile.copy_((matrix @ x.t()).t())
    return out if bias is None else out.add_(bias)


_scratch = threading.local()
"""Has `memory`, where this thread casts one weight after the other: as large as the largest."""


def _cast_for_product(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight in another dtype, for one product and no longer.

    On a CPU the next call overwrites the result. New memory for each weight would be taken from the
    system and given back all the time, or, between the activations that a step keeps, leave holes
    in the heap that nothing else fits into.
    """
    is_plain = type(weight) in (Tensor, nn.Parameter)  # not sharded, and not a fake one
    if weight.dtype == dtype or weight.device.type != "cpu" or not is_plain:
        return weight.to(dtype)
    if torch.compiler.is_compiling():
        return weight.to(dtype)

    memory: Tensor | None = getattr(_scratch, "memory", None)
    if memory is None or memory.dtype != dtype or memory.numel() < weight.numel():
        with torch.inference_mode(False):  # its memory may be used in training too
            memory = _scratch.memory = torch.empty(weight.numel(), dtype=dtype)
    return memory[: weight.numel()].view(weight.shape).copy_(weight)


def hold_in_16_bits(model: nn.Module) -> None:
    """Replace the plain linear layers of the blocks by `CastLinear`, on the meta device.

    The head stays as it is: it is an `LMHead`, whose weight `transformer.project` and loss.py cast.
    """
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(path, CastLinear(module))
