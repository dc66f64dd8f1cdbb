"""Read and write safetensors files one tensor at a time.

Only safetensors are read. Nothing is ever unpickled, so a downloaded file cannot run code.
"""

import json
import math
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from torch import Tensor

from minilora.errors import UserError

DTYPE_CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
DTYPE_OF_CODE = {code: dtype for dtype, code in DTYPE_CODES.items()}
ALL_ROWS = slice(None)


class TensorEntry(NamedTuple):
    """The dtype and shape that a tensor has in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def open_safetensors(path: Path) -> safetensors.safe_open:
    """Open a file; the result is a context manager with keys(), get_tensor() and get_slice().

    Raises:
        UserError: the file is truncated, or is not a safetensors file.
    """
    try:
        return safetensors.safe_open(str(path), "pt")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from error


def read_tensor(path: Path, name: str, rows: slice = ALL_ROWS) -> Tensor:
    """Read one tensor, or some of its rows.

    The file is opened for this tensor alone: pages of a file that stays open would count as memory
    of this process.

    Raises:
        UserError: the file does not have the tensor.
    """
    with open_safetensors(path) as file:
        try:
            if rows == ALL_ROWS:
                return file.get_tensor(name)  # also a tensor without axes, which has no slices
            return file.get_slice(name)[rows]
        except safetensors.SafetensorError as error:
            message = f"{path}: {error} (does the index beside it belong to these files?)"
            raise UserError(message) from error


def write_safetensors(
    path: Path, entries: dict[str, TensorEntry], tensor_of: Callable[[str], Tensor]
) -> None:
    """Write a file one tensor at a time; the library's own writer wants all of them in memory.

    The format (https://huggingface.co/docs/safetensors): 8 bytes with the length of the header, a
    JSON header with dtype, shape and byte range of each tensor, the bytes of the tensors.

    Args:
        path: the file.
        entries: what the file holds, in order.
        tensor_of: makes the tensor of a name; called once for each, in order. The tensor is
            converted to the dtype of its entry.
    """
    header = _header(entries)
    with open(path, "wb") as file, ThreadPoolExecutor(1) as writer:
        # one tensor is written while the next one is made
        writing = writer.submit(file.write, header)
        for name, (dtype, shape) in entries.items():
            tensor = tensor_of(name).detach().to("cpu", dtype).contiguous()
            assert tensor.shape == torch.Size(shape), name
            writing.result()
            writing = writer.submit(file.write, _bytes_of(tensor))
        writing.result()
        file.flush()
        os.fsync(file.fileno())


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return a view of a contiguous tensor's memory; numpy itself has no bfloat16."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _header(entries: dict[str, TensorEntry]) -> bytes:
    """Return everything that stands before the first tensor."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape) in entries.items():
        end = start + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_CODES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
        start = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    padding = -len(encoded) % 8  # to the next multiple of 8, at which the tensors begin
    encoded += b" " * padding
    return struct.pack("<Q", len(encoded)) + encoded
