"""The base class of frozen linear layers whose weights are quantized.

quantization.py has the two kinds of them, NF4 and LLM.int8. What they share is here: how a layer
gets its weight from a checkpoint, and the form of its parameters. What they share with `CastLinear`
is in frozen_linear.py.

Parameters have integer dtypes. FSDP splits them by rows like any others, and its mixed-precision
policy casts only floats; fp32 statistics are therefore held as the same bits in int32. Tensors that
cannot be split by rows are buffers, which sharding replicates.

Shapes: T tokens, in and out features.
"""

import abc
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from minilora.distributed import Layout
from minilora.errors import UserError
from minilora.model.frozen_linear import FrozenLinear


class QuantizedLinear(FrozenLinear):
    """A frozen linear layer whose weight is held in fewer bits than it was trained in.

    It gets its values by `load`.
    """

    parameter_names: tuple[str, ...]
    """The parameters that `load` fills: all but the bias, which is read like any other tensor."""
    stat_names: tuple[str, ...]
    """Tensors beside the weight, which only a checkpoint that holds the layer quantized has."""
    optional_names: tuple[str, ...] = ()
    """Tensors that such a checkpoint may have in addition: all of them or none."""

    is_prequantized: bool
    """Whether the checkpoint holds the layer quantized already."""
    tensor_names: tuple[str, ...]
    """The layer's tensors in the checkpoint."""

    def __init__(self, base: nn.Linear, path: str, checkpoint_names: Collection[str]):
        """Create a layer of the shape of `base`.

        Args:
            base: the plain layer.
            path: its path in the model.
            checkpoint_names: all tensors' names, of a checkpoint that is quantized already; empty
                for one that is not.
        """
        super().__init__(base)
        self.path = path

        def is_in_checkpoint(name: str) -> bool:
            return f"{path}.{name}" in checkpoint_names

        self.is_prequantized = all(is_in_checkpoint(name) for name in self.stat_names)
        self.tensor_names = ("weight",)
        if self.is_prequantized:
            self.tensor_names += self.stat_names
            if any(is_in_checkpoint(name) for name in self.optional_names):
                self.tensor_names += self.optional_names

    def load(
        self,
        read: Callable[[str, slice], Tensor],
        device: torch.device,
        dtype: torch.dtype,
        layout: Layout,
    ) -> None:
        """Take the weight from a checkpoint, and quantize it unless it is quantized already.

        Args:
            read: `read(name, rows)` returns rows of one of the layer's tensors in the checkpoint.
            device: where to hold the weight.
            dtype: a weight that is to be quantized is rounded to it first, as transformers does.
            layout: how parameters are distributed over processes. If no quantization block spans
                two rows, each process reads and quantizes only its own rows.

        Raises:
            UserError: the checkpoint's tensors do not fit this layer.
        """
        if self.is_prequantized:
            tensors = {name: read(name, slice(None)) for name in self.tensor_names}
            self.load_prequantized(tensors, device, layout)
        else:
            rows = layout.local_rows(self.weight) if self.rows_independent else slice(None)
            weight = read("weight", rows).to(device, dtype)
            self.quantize(weight, layout)

    def check_sizes(self, tensors: dict[str, Tensor]) -> None:
        """Raise UserError if a prequantized checkpoint's tensors do not have this layer's sizes."""
        for name, expected in self.stored_sizes.items():
            size = tensors[name].numel()
            if name == "weight":
                size *= tensors[name].itemsize
            if size != expected:
                raise UserError(
                    f"{self.path}.{name} has {size} elements, "
                    f"a layer of {self.extra_repr()} needs {expected}"
                )

    def _declare_parameters(self, **tensors: Tensor) -> None:
        """Create frozen parameters with the shapes and dtypes of these tensors on the meta device.

        A parameter of a tensor in fp32 is int32, see the top of this file.
        """
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(_as_integers(tensor), requires_grad=False))

    def _set_from_local_rows(self, layout: Layout, **tensors: Tensor) -> None:
        """Give parameters their values, from tensors that have this process's rows only."""
        for name, tensor in tensors.items():
            layout.materialize(self, name, _as_integers(tensor))

    def _set_from_all_rows(self, layout: Layout, **tensors: Tensor) -> None:
        """Give parameters their values, from tensors that have the rows of all processes."""
        for name, tensor in tensors.items():
            rows = layout.local_rows(getattr(self, name))
            layout.materialize(self, name, _as_integers(tensor)[rows])

    @property
    @abc.abstractmethod
    def stored_sizes(self) -> dict[str, int]:
        """Sizes of tensors in a prequantized checkpoint, by name: their numbers of elements.

        Of the weight it is the number of bytes, which files may hold under another dtype.
        """

    @property
    def rows_independent(self) -> bool:
        """Whether no quantization block spans two rows, so that rows can be quantized apart."""
        return True

    @abc.abstractmethod
    def quantize(self, weight: Tensor, layout: Layout) -> None:
        """Quantize a weight and hold the result.

        Args:
            weight: [out, in] of 16 or 32 bits; this process's rows of it if `rows_independent`.
            layout: how parameters are distributed over processes.
        """

    @abc.abstractmethod
    def load_prequantized(
        self, tensors: dict[str, Tensor], device: torch.device, layout: Layout
    ) -> None:
        """Hold exactly what a quantized checkpoint holds.

        Args:
            tensors: the layer's tensors in the checkpoint, see `tensor_names`.
            device: where to hold them.
            layout: how parameters are distributed over processes.

        Raises:
            UserError: they do not fit this layer.
        """


def _as_integers(tensor: Tensor) -> Tensor:
    """View an fp32 tensor as int32; return others as they are."""
    return tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor
