"""Frozen linear layers in 4 and 8 bits, through bitsandbytes: the base of QLoRA.

NF4 (Dettmers et al., arXiv 2305.14314): 64 consecutive weights are a block. A block stores its
largest magnitude, `absmax`; each weight is the 4-bit index of one of 16 quantiles of a normal
distribution, relative to absmax. Double quantization stores the absmax values in 8 bits as well, in
blocks of 256.

LLM.int8 (Dettmers et al., arXiv 2208.07339): each row of the weight is 8-bit integers times one
scale.

Shapes: T tokens, in and out features, N blocks of a layer, which is in * out / 64 rounded up.
"""

import logging
import math
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.distributed import Layout
from minilora.errors import UserError
from minilora.model.quantized_linear import QuantizedLinear

# without a GPU, importing bitsandbytes logs a warning that an optional kernel package is missing
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import bitsandbytes  # noqa: E402
from bitsandbytes import functional as bnb_functional  # noqa: E402

BLOCK = 64
"""Weights in a block of NF4: bitsandbytes' default, also in files."""
NESTED_BLOCK = 256
"""Absmax values in a block of double quantization: bitsandbytes' default, also in files."""
PIECE = 2**18
"""Weights quantized at a time. On a CPU bitsandbytes copies them to fp32 and int32, which for a
whole matrix would take 8 bytes a weight."""
PIECE_ON_GPU = 2**26
"""The same on a GPU, which needs no such copies, and waits for the host after each piece."""
OUTLIER_THRESHOLD = 6.0
"""LLM.int8: inputs of a larger magnitude are multiplied in 16 bits."""


class NF4Linear(QuantizedLinear):
    """A linear layer in 4 bits.

    If in_features is a multiple of 64, blocks lie within rows, and absmax has a row for each row
    of the weight. Otherwise blocks span rows, and absmax has one axis.

        weight         uint8 [out, in / 2]: two weights a byte
        absmax         [out, in / 64] or [N]: the bits of fp32 values as int32, or, with double
                       quantization, uint8 indices into nested_code
        nested_absmax  fp32 [N / 256, rounded up], only with double quantization, as are:
        nested_code    fp32 [256]
        offset         fp32 []: the mean of the absmax values, which is subtracted from them first
    """

    parameter_names = ("weight", "absmax")
    stat_names = ("weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4")
    optional_names = ("weight.nested_absmax", "weight.nested_quant_map")
    absmax: Tensor
    nested_absmax: Tensor
    nested_code: Tensor
    offset: Tensor

    def __init__(
        self, base: nn.Linear, path: str, checkpoint_names: Collection[str], double_quant: bool
    ):
        """Create a layer of the shape of `base`.

        Args:
            base: the plain layer.
            path: its path in the model.
            checkpoint_names: as for `QuantizedLinear`.
            double_quant: whether to quantize absmax; a prequantized checkpoint decides itself.

        Raises:
            UserError: the number of input features is odd.
        """
        super().__init__(base, path, checkpoint_names)
        if self.in_features % 2:
            raise UserError(
                f"{path} has {self.in_features} input features; model.bits=4 packs two a byte: "
                "use 8 or 16"
            )
        if self.is_prequantized:
            self.double_quant = "weight.nested_absmax" in self.tensor_names
        else:
            self.double_quant = double_quant

        self.num_blocks = math.ceil(self.out_features * self.in_features / BLOCK)
        weight_shape = (self.out_features, self.in_features // 2)
        absmax = torch.empty(self.num_blocks, dtype=self._absmax_dtype, device="meta")
        self._declare_parameters(
            weight=torch.empty(weight_shape, dtype=torch.uint8, device="meta"),
            absmax=self._by_rows(absmax),
        )

    @property
    def rows_independent(self) -> bool:
        """Whether each row is a whole number of blocks."""
        return self.in_features % BLOCK == 0

    @property
    def stored_sizes(self) -> dict[str, int]:
        """See `QuantizedLinear`."""
        sizes = {"weight": self.weight.numel(), "weight.absmax": self.num_blocks}
        if self.double_quant:
            sizes["weight.nested_absmax"] = math.ceil(self.num_blocks / NESTED_BLOCK)
            sizes["weight.nested_quant_map"] = 256
        return sizes

    def quantize(self, weight: Tensor, layout: Layout) -> None:
        """Quantize a weight and hold the result; see `QuantizedLinear`.

        The given weight has this process's rows if blocks lie within rows, and all rows otherwise.
        """
        packed, absmax = _quantize_in_pieces(weight)
        packed = packed.view(-1, self.in_features // 2)

        if not self.rows_independent:  # every process has quantized all rows
            if self.double_quant:
                absmax = self._quantize_absmax(absmax)
            self._set_from_all_rows(layout, weight=packed, absmax=absmax)
            return

        self._set_from_local_rows(layout, weight=packed)
        local_absmax = self._by_rows(absmax)
        if self.double_quant:
            # the mean and the nested blocks run over the rows of all processes
            all_absmax = layout.full_tensor(local_absmax, self.absmax).flatten()
            indices = self._quantize_absmax(all_absmax)
            self._set_from_all_rows(layout, absmax=self._by_rows(indices))
        else:
            self._set_from_local_rows(layout, absmax=local_absmax)

    def _quantize_absmax(self, absmax: Tensor) -> Tensor:
        """Quantize the absmax values of all rows to 8 bits, and hold what dequantizing needs.

        Args:
            absmax: fp32 [N].

        Returns:
            Indices into `nested_code`, uint8 [N].
        """
        offset = absmax.mean()
        indices, nested = bnb_functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
        self._set_nested(nested, offset)
        return indices

    def load_prequantized(
        self, tensors: dict[str, Tensor], device: torch.device, layout: Layout
    ) -> None:
        """Hold exactly what a quantized checkpoint holds; see `QuantizedLinear`."""
        stats = {
            name.removeprefix("weight."): tensor
            for name, tensor in tensors.items()
            if name != "weight"
        }
        state = bnb_functional.QuantState.from_dict(stats, device)
        nested_blocksize = state.state2.blocksize if state.nested else NESTED_BLOCK
        if (state.blocksize, nested_blocksize) != (BLOCK, NESTED_BLOCK):
            raise UserError(
                f"{self.path} is quantized in blocks of {state.blocksize} (nested "
                f"{nested_blocksize}); only {BLOCK} (nested {NESTED_BLOCK}) is supported"
            )
        shape = (self.out_features, self.in_features)
        if state.shape != shape or state.absmax.dtype != self._absmax_dtype:
            raise UserError(
                f"{self.path} is quantized as {state.absmax.dtype} of {list(state.shape)}, "
                f"not as {self.extra_repr()}"
            )
        self.check_sizes(tensors)

        if state.nested:
            self._set_nested(state.state2, state.offset)
        # a file may hold the bytes under another dtype (transformers' bnb_4bit_quant_storage)
        packed = tensors["weight"].to(device).contiguous().view(torch.uint8)
        packed = packed.view(self.out_features, -1)
        absmax = self._by_rows(state.absmax)
        self._set_from_all_rows(layout, weight=packed, absmax=absmax)

    @property
    def _absmax_dtype(self) -> torch.dtype:
        """Dtype of the absmax values, as bitsandbytes has them."""
        return torch.uint8 if self.double_quant else torch.float32

    def _set_nested(self, nested: bnb_functional.QuantState, offset: Tensor) -> None:
        """Hold the statistics of double quantization: those of absmax - offset, and the offset."""
        self.register_buffer("nested_absmax", nested.absmax)
        self.register_buffer("nested_code", nested.code)
        self.register_buffer("offset", offset)

    def _by_rows(self, absmax: Tensor) -> Tensor:
        """Give absmax values [N] an axis of weight rows, if no block spans two of them."""
        if not self.rows_independent:
            return absmax
        return absmax.view(-1, self.in_features // BLOCK)

    def bnb_state(self, dtype: torch.dtype) -> bnb_functional.QuantState:
        """Describe the layer as bitsandbytes' functions take it.

        Args:
            dtype: what the weight is dequantized to.
        """
        absmax = self.absmax.flatten()
        offset = None
        nested = None
        if self.double_quant:
            offset = self.offset
            nested = bnb_functional.QuantState(
                self.nested_absmax,
                code=self.nested_code,
                blocksize=NESTED_BLOCK,
                dtype=torch.float32,
            )
        else:
            absmax = absmax.view(torch.float32)
        return bnb_functional.QuantState(
            absmax,
            shape=torch.Size((self.out_features, self.in_features)),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=offset,
            state2=nested,
        )

    def product(self, x: Tensor) -> Tensor:
        """Multiply by the weight, which bitsandbytes dequantizes; see `FrozenLinear`."""
        if not self.rows_independent:  # matmul_4bit needs blocks within rows, see `weight_in`
            return F.linear(x, self.weight_in(x.dtype), self.bias)
        return bitsandbytes.matmul_4bit(x, self.weight, self.bnb_state(x.dtype), bias=self.bias)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [out, in] that the quantized one represents."""
        state = self.bnb_state(dtype)
        if not self.rows_independent:
            # bitsandbytes 0.50 on a CPU misreads blocks that span rows; one long row it reads right
            state.shape = torch.Size((1, self.out_features * self.in_features))
        weight = bnb_functional.dequantize_4bit(self.weight.view(-1, 1), state)
        return weight.view(self.out_features, self.in_features)


def _piece(device: torch.device) -> int:
    """Return how many weights are quantized at a time on a device."""
    return PIECE_ON_GPU if device.type == "cuda" else PIECE


def _quantize_in_pieces(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize consecutive weights to NF4.

    Args:
        weight: whole rows of a matrix, of 16 or 32 bits.

    Returns:
        The packed weights uint8 [elements / 2], and absmax fp32 [elements / 64, rounded up].
    """
    packed = torch.empty(weight.numel() // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(math.ceil(weight.numel() / BLOCK), device=weight.device)
    piece = _piece(weight.device)
    pieces = zip(
        weight.flatten().split(piece),
        packed.split(piece // 2),
        absmax.split(piece // BLOCK),
        strict=True,
    )
    for weight_piece, packed_piece, absmax_piece in pieces:
        result, state = bnb_functional.quantize_4bit(
            weight_piece, blocksize=BLOCK, quant_type="nf4"
        )
        packed_piece.copy_(result.flatten())
        absmax_piece.copy_(state.absmax)
    return packed, absmax


class Int8Linear(QuantizedLinear):
    """A linear layer in 8 bits.

    weight  int8 [out, in]
    SCB     int32 [out]: the bits of each row's largest magnitude in fp32 (bitsandbytes' name)
    """

    parameter_names = ("weight", "SCB")
    stat_names = ("SCB",)
    optional_names = ("weight_format",)
    waits_for_device = True  # the host counts outliers, so a CUDA graph cannot hold the product
    SCB: Tensor

    def __init__(self, base: nn.Linear, path: str, checkpoint_names: Collection[str]):
        """Create a layer of the shape of `base`; arguments are those of `QuantizedLinear`."""
        super().__init__(base, path, checkpoint_names)
        weight_shape = (self.out_features, self.in_features)
        self._declare_parameters(
            weight=torch.empty(weight_shape, dtype=torch.int8, device="meta"),
            SCB=torch.empty(self.out_features, device="meta"),
        )

    @property
    def stored_sizes(self) -> dict[str, int]:
        """See `QuantizedLinear`."""
        return {"weight": self.weight.numel(), "SCB": self.out_features}

    def quantize(self, weight: Tensor, layout: Layout) -> None:
        """Quantize this process's rows of a weight and hold the result."""
        packed = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        scale = torch.empty(len(weight), device=weight.device)
        rows = max(1, _piece(weight.device) // self.in_features)
        pieces = zip(weight.split(rows), packed.split(rows), scale.split(rows), strict=True)
        for weight_piece, packed_piece, scale_piece in pieces:
            half_piece = weight_piece.to(torch.float16)  # the function takes no other dtype
            result, largest, _ = bnb_functional.int8_vectorwise_quant(half_piece)
            packed_piece.copy_(result)
            scale_piece.copy_(largest)
        self._set_from_local_rows(layout, weight=packed, SCB=scale)

    def load_prequantized(
        self, tensors: dict[str, Tensor], device: torch.device, layout: Layout
    ) -> None:
        """Hold exactly what a quantized checkpoint holds; see `QuantizedLinear`."""
        self.check_sizes(tensors)
        shape = tensors["weight"].shape
        if shape != self.weight.shape:
            raise UserError(
                f"{self.path}.weight has shape {list(shape)}, not that of {self.extra_repr()}"
            )
        if "weight_format" in tensors and int(tensors["weight_format"]) != 0:
            raise UserError(
                f"{self.path} is stored for one kind of GPU (weight_format); "
                "save it again with bitsandbytes >= 0.46"
            )
        self._set_from_all_rows(
            layout,
            weight=tensors["weight"].to(device),
            SCB=tensors["SCB"].to(device, torch.float32),
        )

    def product(self, x: Tensor) -> Tensor:
        """Multiply in 8 bits, the inputs too, except for the outliers among them.

        Training on a CPU, which has no fast kernel for this, multiplies by the dequantized weight
        instead, as bitsandbytes does.
        """
        if self.training and not x.is_cuda:
            return F.linear(x, self.weight_in(x.dtype), self.bias)

        x16 = x.to(torch.float16, copy=True)  # a copy, because the next line writes into it
        packed, scale, outliers = bnb_functional.int8_vectorwise_quant(
            x16, threshold=OUTLIER_THRESHOLD
        )
        result, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
            x, packed, self.weight, scale, self.SCB.view(torch.float32), outliers, self.bias
        )
        return result

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [out, in] that the quantized one represents."""
        # times 1/127 instead of divided by 127, as bitsandbytes has it: the two round differently
        scale = self.SCB.view(torch.float32)[:, None] * (1 / 127)  # [out, 1]
        return self.weight.to(dtype, copy=True).mul_(scale)


def quantize_linears(
    model: nn.Module, bits: int, double_quant: bool, checkpoint_names: Collection[str]
) -> dict[str, QuantizedLinear]:
    """Replace the linear layers of the blocks by quantized ones, which have no values yet.

    Args:
        model: the model on the meta device; its head stays as it is.
        bits: 8 or 4.
        double_quant: with 4 bits, whether to quantize the blocks' absmax values too.
        checkpoint_names: all tensors' names, of a checkpoint that is quantized already; empty for
            one that is not. A layer that such a checkpoint does not hold quantized stays as it is.

    Returns:
        The new layers by path.
    """
    layers: dict[str, QuantizedLinear] = {}
    for path, module in list(model.named_modules()):
        if type(module) is not nn.Linear:  # the head is an LMHead
            continue
        layer: QuantizedLinear
        if bits == 4:
            layer = NF4Linear(module, path, checkpoint_names, double_quant)
        else:
            layer = Int8Linear(module, path, checkpoint_names)
        if checkpoint_names and not layer.is_prequantized:
            continue
        model.set_submodule(path, layer)
        layers[path] = layer
    return layers
