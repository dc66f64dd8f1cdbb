"""Read and write safetensors files one tensor at a time.

Only safetensors are read. Nothing is ever unpickled, so a downloaded file cannot run code.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from torch import Tensor

from minilora.errors import UserError

DTYPE_CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
DTYPE_OF_CODE = {code: dtype for dtype, code in DTYPE_CODES.items()}
ALL_ROWS = slice(None)
PIECE_ELEMENTS = 2**22
"""The most elements of a piece: 16 MiB in float32. The allocator keeps memory of this size for the
next piece, while memory of a whole large tensor comes from the system, page by page, each time."""


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
    with _open_and_name_errors(path) as file:
        if rows == ALL_ROWS:
            return file.get_tensor(name)  # also a tensor without axes, which has no slices
        return file.get_slice(name)[rows]


def read_shape(path: Path, name: str) -> tuple[int, ...]:
    """Return the shape of a tensor. Raises UserError if the file does not have it."""
    with _open_and_name_errors(path) as file:
        return tuple(file.get_slice(name).get_shape())


@contextmanager
def _open_and_name_errors(path: Path) -> Iterator[safetensors.safe_open]:
    """Open a file; an error of the library becomes a UserError that names the file."""
    with open_safetensors(path) as file:
        try:
            yield file
        except safetensors.SafetensorError as error:
            message = f"{path}: {error} (does the index beside it belong to these files?)"
            raise UserError(message) from error


def row_pieces(shape: tuple[int, ...]) -> list[slice]:
    """Return the rows of a tensor in pieces of at most PIECE_ELEMENTS, at least a row each."""
    size = math.prod(shape)
    if size <= PIECE_ELEMENTS:
        return [ALL_ROWS]
    num_rows = shape[0]
    step = max(1, PIECE_ELEMENTS * num_rows // size)
    return [slice(start, start + step) for start in range(0, num_rows, step)]


def write_safetensors(
    path: Path, entries: dict[str, TensorEntry], pieces_of: Callable[[str], Iterable[Tensor]]
) -> None:
    """Write a file piece by piece; the library's own writer wants all tensors in memory.

    The format (https://huggingface.co/docs/safetensors): 8 bytes with the length of the header, a
    JSON header with dtype, shape and byte range of each tensor, the bytes of the tensors.

    Args:
        path: the file.
        entries: what the file holds, in order.
        pieces_of: makes the tensor of a name, whole (in a list) or some of its rows after the
            others; called once for each name, in order. The pieces are converted to the dtype of
            the entry.
    """
    header = _header(entries)
    with open(path, "wb") as file, ThreadPoolExecutor(1) as writer:
        # one piece is written while the next one is made
        writing = writer.submit(file.write, header)
        for name, (dtype, shape) in entries.items():
            written = 0
            for piece in pieces_of(name):
                assert piece.shape[1:] == torch.Size(shape[1:]), name
                written += piece.numel()
                converted = piece.detach().to("cpu", dtype).contiguous()
                writing.result()
                writing = writer.submit(file.write, _bytes_of(converted))
            assert written == math.prod(shape), name
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
