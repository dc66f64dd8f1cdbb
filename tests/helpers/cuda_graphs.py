"""CUDA graphs on a CPU: what is recorded is replayed with the same tensors and the same numbers.

As on a GPU, a replay runs the recorded operations on the memory that they were recorded with.
Whatever Python or the CPU decided while recording stays as it was; and recording itself computes
nothing, so that memory from before is left as it was.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class EmulatedGraph:
    """Takes the place of `torch.cuda.CUDAGraph`."""

    num_recorded = 0
    num_replayed = 0

    def __init__(self) -> None:
        EmulatedGraph.num_recorded += 1
        self.calls: list[tuple[Any, tuple, dict, list]] = []  # (operation, arguments, results)

    def replay(self) -> None:
        """Run the recorded operations; their results go to the memory of the first ones."""
        EmulatedGraph.num_replayed += 1
        for operation, args, kwargs, results in self.calls:
            again = tree_leaves(operation(*args, **kwargs))
            for result, value in zip(results, again, strict=True):
                if isinstance(result, Tensor) and result.data_ptr() != value.data_ptr():
                    result.copy_(value)


class _Recording(TorchDispatchMode):
    """Records all operations in a graph, and remembers what they overwrite."""

    def __init__(self, graph: EmulatedGraph):
        super().__init__()
        self.graph = graph
        self.made_meanwhile: set[int] = set()  # addresses of memory
        self.overwritten: dict[int, tuple[Tensor, Tensor]] = {}  # by address: (tensor, its copy)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(func)
        assert "_local_scalar_dense" not in name and "nonzero" not in name, f"{name}: host waits"
        assert "lift_fresh" not in name, "a tensor made of numbers comes from the host"
        for argument, value in zip(func._schema.arguments, args, strict=False):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written and isinstance(value, Tensor):
                self._remember(value)
        executed = args
        if "index_put_" in name:  # on a GPU nothing is written, so any place within bounds will do
            indices = [None if index is None else index * 0 for index in args[1]]
            executed = (args[0], indices, *args[2:])
        result = func(*executed, **kwargs)
        results = tree_leaves(result)
        inputs = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)}
        self.made_meanwhile |= {_address(leaf) for leaf in results if _is_tensor(leaf)} - inputs
        self.graph.calls.append((func, args, kwargs, results))
        return result

    def _remember(self, tensor: Tensor) -> None:
        """Copy the whole memory of a tensor from before the recording, the first time."""
        address = _address(tensor)
        if address not in self.made_meanwhile and address not in self.overwritten:
            memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
            self.overwritten[address] = (memory, memory.clone())

    def restore(self) -> None:
        """Undo what the recorded operations have written."""
        for memory, copy in self.overwritten.values():
            memory.copy_(copy)


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, Tensor)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _NoStream:
    """Takes the place of `torch.cuda.Stream`."""

    def wait_stream(self, other: "_NoStream") -> None:
        """Everything runs in order on a CPU."""


@contextlib.contextmanager
def _record(graph: EmulatedGraph, pool: object, capture_error_mode: str) -> Iterator[None]:
    recording = _Recording(graph)
    with recording:
        yield
    recording.restore()


def emulate_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> type[EmulatedGraph]:
    """Replace torch's CUDA graphs until the test ends; the result counts what happens."""
    EmulatedGraph.num_recorded = EmulatedGraph.num_replayed = 0
    replacements = {
        "CUDAGraph": EmulatedGraph,
        "graph": _record,
        "graph_pool_handle": lambda: (0, 0),
        "Stream": _NoStream,
        "current_stream": _NoStream,
        "stream": lambda stream: contextlib.nullcontext(),
    }
    for name, replacement in replacements.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    return EmulatedGraph
