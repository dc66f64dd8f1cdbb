"""Safetensors files that are written one tensor at a time, read by the library itself."""

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from minilora.checkpoint.tensor_files import (
    PIECE_ELEMENTS,
    TensorEntry,
    read_shape,
    read_tensor,
    row_pieces,
    write_safetensors,
)
from minilora.errors import UserError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_write_safetensors_is_read_by_safetensors(dtype: torch.dtype, tmp_path: Path):
    tensors = {
        "größe": torch.randn(6, 4).t(),  # not contiguous
        "row": torch.randn(3),
        "odd": torch.randn(1, 7, 1),
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 4),
    }
    entries = {name: TensorEntry(dtype, tuple(t.shape)) for name, t in tensors.items()}
    file = tmp_path / "file.safetensors"
    write_safetensors(file, entries, lambda name: [tensors[name]])

    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    read = load_file(file)
    assert read.keys() == tensors.keys()
    for name, tensor in read.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, tensors[name].to(dtype)), name


def test_write_safetensors_holds_few_tensors_at_a_time(tmp_path: Path):
    made: list[weakref.ref] = []

    def pieces_of(name: str) -> list[Tensor]:
        memory = np.zeros(5, np.float32)
        made.append(weakref.ref(memory))
        # this one, the one that is being written, and one that the writing thread still refers to
        assert sum(each() is not None for each in made) <= 3
        return [torch.from_numpy(memory)]

    entries = {f"t{i}": TensorEntry(torch.float32, (5,)) for i in range(20)}
    write_safetensors(tmp_path / "file", entries, pieces_of)
    assert len(load_file(tmp_path / "file")) == len(made) == 20


def test_read_tensor_reads_rows_and_names_what_is_missing(tmp_path: Path):
    file = tmp_path / "file"
    matrix = torch.randn(5, 3)
    entries = {"matrix": TensorEntry(torch.float32, (5, 3))}
    write_safetensors(file, entries, lambda name: [matrix])
    assert torch.equal(read_tensor(file, "matrix"), matrix)
    assert torch.equal(read_tensor(file, "matrix", slice(1, 3)), matrix[1:3])
    assert read_shape(file, "matrix") == (5, 3)
    for read in (read_tensor, read_shape):
        with pytest.raises(UserError, match=r"file: .*absent"):
            read(file, "absent")


def test_write_safetensors_joins_pieces(tmp_path: Path):
    matrix = torch.randn(5, 3)
    entries = {name: TensorEntry(torch.float16, (5, 3)) for name in ("first", "second")}
    write_safetensors(tmp_path / "file", entries, lambda name: iter(matrix.split(2)))
    for tensor in load_file(tmp_path / "file").values():
        assert torch.equal(tensor, matrix.half())

    for incomplete in ([matrix[:4]], [matrix.t()]):
        with pytest.raises(AssertionError, match="first"):
            write_safetensors(tmp_path / "file", entries, {"first": incomplete}.__getitem__)


@pytest.mark.parametrize(
    ("shape", "n_pieces"),
    [
        ((), 1),
        ((0, 4), 1),
        ((4096, 1024), 1),
        ((4097, 1024), 2),
        ((128_256, 4096), 126),  # the head of an 8B
        ((2, 2**23), 2),  # a row is larger than a piece
        ((2**23,), 2),
    ],
)
def test_row_pieces_cover_all_rows_once(shape: tuple[int, ...], n_pieces: int):
    tensor = torch.empty(shape, device="meta")
    pieces = [tensor[rows] if shape else tensor for rows in row_pieces(shape)]
    assert len(pieces) == n_pieces
    assert sum(piece.numel() for piece in pieces) == tensor.numel()
    for piece in pieces:
        assert piece.numel() <= PIECE_ELEMENTS or len(piece) == 1
