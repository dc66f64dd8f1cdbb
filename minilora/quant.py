"""Frozen linear layers in 4 and 8 bits, and 8-bit optimizers, through bitsandbytes: the base of QLoRA.

NF4 (Dettmers et al., arXiv 2305.14314): each block of 64 weights is 4-bit indices into the quantiles of a normal
distribution, times the block's largest magnitude (absmax); double quantisation stores those in 8 bits, in blocks of 256.
LLM.int8 (Dettmers et al., arXiv 2208.07339): 8-bit rows times one scale each.

What a layer holds can be sharded by rows as it is: plain frozen tensors, with fp32 statistics viewed as int32 so that no
mixed-precision policy rounds them. The few that do not go by rows are buffers, which sharding leaves alone.

Shapes: T tokens, in and out features, N = out * in / 64 blocks.
"""

import abc
import logging
from collections.abc import Callable, Collection, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.config import UserError
from minilora.dist import Whole

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # importing it on a CPU warns of an optional kernel package

import bitsandbytes  # noqa: E402
from bitsandbytes import functional as bnb  # noqa: E402

BLOCK, NESTED_BLOCK = 64, 256  # bitsandbytes' own, in files too
PIECE = 2**18  # weights quantised at a time
OUTLIER = 6.0  # LLM.int8's threshold: input features with a larger magnitude are multiplied in 16 bit


class _Product(torch.autograd.Function):
    """A frozen layer's product. Only the layer is kept for the backward pass, which dequantises its weight again."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: "QuantizedLinear") -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dequantize(grad.dtype), None  # [T, out] @ [out, in] -> [T, in]


class QuantizedLinear(nn.Linear, abc.ABC):
    """A frozen linear layer whose weight is held in fewer bits. It is filled from a checkpoint, see `fill`."""

    holds: tuple[str, ...]  # its parameters beside the bias
    marks: tuple[str, ...]  # what a checkpoint that holds this layer quantised has beside its weight
    optional: tuple[str, ...] = ()

    def __init__(self, base: nn.Linear, path: str, stored: Collection[str]):
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.requires_grad_(False)
        self.path = path
        self.is_stored = all(f"{path}.{mark}" in stored for mark in self.marks)
        extra = self.optional if any(f"{path}.{name}" in stored for name in self.optional) else ()
        self.names = ("weight", *self.marks, *extra) if self.is_stored else ("weight",)  # its tensors in the checkpoint

    def fill(self, read: Callable[[str, slice], Tensor], device: torch.device, dtype: torch.dtype, place: Whole) -> None:
        """Take the weight from a checkpoint, quantising it unless it already is; read(name, rows) gives its tensors.

        A 16-bit weight is rounded to `dtype`, the run's, before it is quantised, as transformers does. Where rows are spread
        over processes each reads and quantises its own, if rows know nothing of each other. Raises UserError.
        """
        if not self.is_stored:
            weight = read("weight", place.rows(self.weight) if self.rows_are_alone else slice(None))
            self.quantize(weight.to(device, dtype), place)
            return
        self.take({name: read(name, slice(None)) for name in self.names}, device, place)

    def check_sizes(self, tensors: dict[str, Tensor]) -> None:
        """Raises UserError if what a checkpoint holds is not of this layer's shape."""
        for name, elements in self.stored_sizes.items():
            found = tensors[name].numel() * (tensors[name].itemsize if name == "weight" else 1)
            if found != elements:
                raise UserError(f"{self.path}.{name} has {found} elements, a layer of {self.extra_repr()} needs {elements}")

    def forward(self, x: Tensor) -> Tensor:  # [T, in] -> [T, out], a fresh tensor: LoRA adds into it
        return _Product.apply(x, self) if torch.is_grad_enabled() and x.requires_grad else self.product(x)

    def _declare(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(_bits(tensor), requires_grad=False))

    def _hold(self, place: Whole, are_mine: bool = False, **tensors: Tensor) -> None:
        """Fill parameters from all their rows, or from this process's (are_mine)."""
        for name, tensor in tensors.items():
            rows = slice(None) if are_mine else place.rows(getattr(self, name))
            place.put(self, name, _bits(tensor)[rows])

    @property
    @abc.abstractmethod
    def stored_sizes(self) -> dict[str, int]:
        """Elements of what a checkpoint holds, bytes of the weight."""

    @property
    def rows_are_alone(self) -> bool:
        """Whether quantising some rows gives the same as quantising all and taking them."""
        return True

    @abc.abstractmethod
    def quantize(self, weight: Tensor, place: Whole) -> None:
        """Hold a 16- or 32-bit weight [out, in], or this process's rows of it, from now on."""

    @abc.abstractmethod
    def take(self, tensors: dict[str, Tensor], device: torch.device, place: Whole) -> None:
        """Hold what a checkpoint has quantised, to the bit."""

    @abc.abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """x W^T + bias: [T, in] -> [T, out], outside of autograd."""

    @abc.abstractmethod
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that the layer stands for."""


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor


class NF4Linear(QuantizedLinear):
    """weight uint8 [out, in / 2]; absmax [out, in / 64], or [N] where blocks cross rows (in is no multiple of 64): int32
    (fp32 bits), or with double quantisation uint8 beside the buffers nested_absmax fp32 [N / 256], nested_code [256], offset.
    """

    holds = ("weight", "absmax")
    marks = ("weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4")
    optional = ("weight.nested_absmax", "weight.nested_quant_map")
    absmax: Tensor
    nested_absmax: Tensor
    nested_code: Tensor
    offset: Tensor

    def __init__(self, base: nn.Linear, path: str, stored: Collection[str], double_quant: bool):
        super().__init__(base, path, stored)
        self.double_quant = len(self.names) > 1 + len(self.marks) if self.is_stored else double_quant
        if self.in_features % 2:
            raise UserError(f"{path} has {self.in_features} input features; model.bits=4 packs two a byte: use 8 or 16")
        self.blocks = -(-self.out_features * self.in_features // BLOCK)
        self._declare(
            weight=torch.empty(self.out_features, self.in_features // 2, dtype=torch.uint8, device="meta"),
            absmax=self._rows(torch.empty(self.blocks, dtype=self._absmax_dtype, device="meta")),
        )

    @property
    def rows_are_alone(self) -> bool:
        return self.in_features % BLOCK == 0

    @property
    def stored_sizes(self) -> dict[str, int]:
        nested = {"weight.nested_absmax": -(-self.blocks // NESTED_BLOCK), "weight.nested_quant_map": 256}
        return {"weight": self.weight.numel(), "weight.absmax": self.blocks} | (nested if self.double_quant else {})

    def quantize(self, weight: Tensor, place: Whole) -> None:
        """Piece by piece, because bitsandbytes makes fp32 and int32 copies on a CPU; blocks know nothing of each other."""
        packed = torch.empty(weight.numel() // 2, dtype=torch.uint8, device=weight.device)
        absmax = torch.empty(-(-weight.numel() // BLOCK), device=weight.device)
        pieces = zip(weight.flatten().split(PIECE), packed.split(PIECE // 2), absmax.split(PIECE // BLOCK), strict=True)
        for piece, its_packed, its_absmax in pieces:
            part, state = bnb.quantize_4bit(piece, blocksize=BLOCK, quant_type="nf4")
            its_packed.copy_(part.flatten())
            its_absmax.copy_(state.absmax)
        if self.double_quant:  # of the whole layer's blocks, everybody's
            if self.rows_are_alone:
                absmax = place.gather(self._rows(absmax), self.absmax).flatten()
            offset = absmax.mean()
            absmax, nested = bnb.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
            self._nest(bnb.QuantState(absmax, offset=offset, state2=nested))
        self._hold(place, self.rows_are_alone, weight=packed.view(-1, self.in_features // 2))
        self._hold(place, self.rows_are_alone and not self.double_quant, absmax=self._rows(absmax))

    def take(self, tensors: dict[str, Tensor], device: torch.device, place: Whole) -> None:
        stats = {name.removeprefix("weight."): tensor for name, tensor in tensors.items() if name != "weight"}
        state = bnb.QuantState.from_dict(stats, device)
        sizes = (state.blocksize, state.state2.blocksize if state.nested else NESTED_BLOCK)
        if sizes != (BLOCK, NESTED_BLOCK):
            raise UserError(f"{self.path} is quantised in blocks of {sizes[0]}; only {BLOCK} (nested {NESTED_BLOCK}) is read")
        if state.shape != (self.out_features, self.in_features) or state.absmax.dtype != self._absmax_dtype:
            raise UserError(
                f"{self.path} is quantised as {state.absmax.dtype} of {list(state.shape)}, not as {self.extra_repr()}"
            )
        self.check_sizes(tensors)
        if state.nested:
            self._nest(state)
        # a file may hold the bytes under another dtype (bnb_4bit_quant_storage)
        packed = tensors["weight"].to(device).contiguous().view(torch.uint8).view(self.out_features, -1)
        self._hold(place, weight=packed, absmax=self._rows(state.absmax))

    @property
    def _absmax_dtype(self) -> torch.dtype:
        return torch.uint8 if self.double_quant else torch.float32

    def _nest(self, state: bnb.QuantState) -> None:
        self.register_buffer("nested_absmax", state.state2.absmax)
        self.register_buffer("nested_code", state.state2.code)
        self.register_buffer("offset", state.offset)

    def _rows(self, absmax: Tensor) -> Tensor:
        return absmax.view(-1, self.in_features // BLOCK) if self.rows_are_alone else absmax

    def state(self, dtype: torch.dtype) -> bnb.QuantState:
        """The layer in bitsandbytes' terms; dtype: what it dequantises to."""
        shape, absmax, nested = torch.Size((self.out_features, self.in_features)), self.absmax.flatten(), None
        if self.double_quant:
            nested = bnb.QuantState(self.nested_absmax, code=self.nested_code, blocksize=NESTED_BLOCK, dtype=torch.float32)
        else:
            absmax = absmax.view(torch.float32)
        return bnb.QuantState(absmax, shape, None, BLOCK, "nf4", dtype, self.offset if nested else None, nested)

    def product(self, x: Tensor) -> Tensor:
        if not self.rows_are_alone:
            return F.linear(x, self.dequantize(x.dtype), self.bias)
        return bitsandbytes.matmul_4bit(x, self.weight, self.state(x.dtype), bias=self.bias)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        state = self.state(dtype)
        if not self.rows_are_alone:  # bitsandbytes 0.50 on a CPU misreads blocks that cross rows: one long row, then
            state.shape = torch.Size((1, self.out_features * self.in_features))
        return bnb.dequantize_4bit(self.weight.view(-1, 1), state).view(self.out_features, self.in_features)


class Int8Linear(QuantizedLinear):
    """weight int8 [out, in]; SCB int32 [out]: fp32 bits of each row's largest magnitude."""

    holds = ("weight", "SCB")
    marks = ("SCB",)
    optional = ("weight_format",)
    SCB: Tensor

    def __init__(self, base: nn.Linear, path: str, stored: Collection[str]):
        super().__init__(base, path, stored)
        weight = torch.empty(self.out_features, self.in_features, dtype=torch.int8, device="meta")
        self._declare(weight=weight, SCB=torch.empty(self.out_features, device="meta"))

    @property
    def stored_sizes(self) -> dict[str, int]:
        return {"weight": self.weight.numel(), "SCB": self.out_features}

    def quantize(self, weight: Tensor, place: Whole) -> None:
        packed = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        scale = torch.empty(len(weight), device=weight.device)
        rows = max(1, PIECE // self.in_features)  # at a time, as above
        for piece, its_packed, its_scale in zip(weight.split(rows), packed.split(rows), scale.split(rows), strict=True):
            part, largest, _ = bnb.int8_vectorwise_quant(piece.to(torch.float16))
            its_packed.copy_(part)
            its_scale.copy_(largest)
        self._hold(place, are_mine=True, weight=packed, SCB=scale)

    def take(self, tensors: dict[str, Tensor], device: torch.device, place: Whole) -> None:
        self.check_sizes(tensors)
        if tensors["weight"].shape != self.weight.shape:
            raise UserError(f"{self.path}.weight has shape {list(tensors['weight'].shape)}, not that of {self.extra_repr()}")
        if "weight_format" in tensors and int(tensors["weight_format"]) != 0:
            raise UserError(f"{self.path} is stored for one kind of GPU (weight_format); save it again with bitsandbytes >= 0.46")
        self._hold(place, weight=tensors["weight"].to(device), SCB=tensors["SCB"].to(device, torch.float32))

    def product(self, x: Tensor) -> Tensor:
        """LLM.int8: inputs in 8 bits too, outliers apart. Training on a CPU, which has no fast kernel for it, multiplies by
        the dequantised weight, as bitsandbytes does."""
        if self.training and not x.is_cuda:
            return F.linear(x, self.dequantize(x.dtype), self.bias)
        x16 = x.to(torch.float16, copy=True)  # the next line changes it
        packed, scale, outliers = bnb.int8_vectorwise_quant(x16, threshold=OUTLIER)
        multiply = torch.ops.bitsandbytes.int8_mixed_scaled_mm
        return multiply(x, packed, self.weight, scale, self.SCB.view(torch.float32), outliers, self.bias)[0]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype, copy=True).mul_(self.SCB.view(torch.float32)[:, None] * (1 / 127))


def quantize_linears(model: nn.Module, bits: int, double_quant: bool, stored: Collection[str]) -> dict[str, QuantizedLinear]:
    """Replace the linear layers of the blocks (not lm_head) by unfilled quantised ones, and return them by path.

    stored: the tensor names of a checkpoint that is quantised already, else empty; layers it keeps in 16 bit stay so.
    """
    layers: dict[str, QuantizedLinear] = {}
    for path, module in list(model.named_modules()):
        if type(module) is not nn.Linear or path == "lm_head":
            continue
        layer = NF4Linear(module, path, stored, double_quant) if bits == 4 else Int8Linear(module, path, stored)
        if stored and not layer.is_stored:
            continue
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
        layers[path] = layer
    return layers


def bitsandbytes_adamw(name: str, groups: Iterable[dict], lr: float) -> torch.optim.Optimizer:
    """adamw8bit, paged_adamw or paged_adamw8bit (Dettmers et al., arXiv 2110.02861). The paged ones need a GPU."""
    optim = bitsandbytes.optim
    kinds = {"adamw8bit": optim.AdamW8bit, "paged_adamw": optim.PagedAdamW32bit, "paged_adamw8bit": optim.PagedAdamW8bit}
    optimizer = kinds[name](list(groups), lr=lr)
    if name.startswith("paged"):

        def page(*_: object) -> None:  # before the first step: what a resume has put into device memory becomes pageable
            for p, state in optimizer.state.items():
                for key in ("state1", "state2"):
                    state[key] = optimizer.get_state_buffer(p, dtype=state[key].dtype).copy_(state[key])
            once.remove()

        once = optimizer.register_step_pre_hook(page)
    return optimizer
