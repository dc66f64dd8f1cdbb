"""Rows of every format, and the documents they become."""

import functools
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from helpers import tiny_tokenizers
from helpers.tiny_runs import write_paths
from minilora.config import DataConfig
from minilora.data.cache import load_documents
from minilora.data.dataset import IGNORE_INDEX, Documents
from minilora.data.example import Example
from minilora.data.formats import build_examples
from minilora.data.tokenizer import Tokenizer

EVERY_TOKENIZER = pytest.mark.parametrize("name", tiny_tokenizers.BUILDERS)


def chat_row(*contents: str, system: str | None = None, train: Sequence[object] = ()) -> dict:
    """Return a row of format messages.

    Args:
        contents: user and assistant in turn.
        system: a turn before them.
        train: the "train" flags of the assistant's turns.
    """
    messages: list[dict] = []
    if system is not None:
        messages.append({"role": "system", "content": system})
    for i, content in enumerate(contents):
        turn: dict = {"role": ["user", "assistant"][i % 2], "content": content}
        if turn["role"] == "assistant" and train:
            turn["train"] = train[i // 2]
        messages.append(turn)
    return {"messages": messages}


GOOD_ROWS: dict[str, dict] = {
    "paths": {"title": "T", "abstract": "A", "paths": [["a", "b"]]},
    "prompt": {"prompt": "p\n", "completion": "c"},
    "messages": chat_row("q", "a"),
    "text": {"text": "Q: q\nA: a"},
}


@functools.cache
def tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer of a key of `tiny_tokenizers.BUILDERS`; shared, so not to be changed."""
    return Tokenizer(tiny_tokenizers.BUILDERS[name]())


def write_rows(directory: Path, rows: Sequence[object]) -> str:
    """Write directory/rows.jsonl; strings and bytes are lines as they are."""
    lines = []
    for row in rows:
        if isinstance(row, bytes):
            lines.append(row + b"\n")
        elif isinstance(row, str):
            lines.append(row.encode() + b"\n")
        else:
            lines.append(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    file = directory / "rows.jsonl"
    file.write_bytes(b"".join(lines))
    return str(file)


def load_rows(
    directory: Path, rows: Sequence[object], of: Tokenizer | None = None, **settings
) -> Documents:
    """Write rows to a file and load it.

    Args:
        directory: where to write the file.
        rows: as for `write_rows`.
        of: the tokenizer (default: Mistral's).
        settings: fields of DataConfig.
    """
    data = DataConfig(**{"num_workers": 1, **settings})
    of = of or tokenizer("mistral")
    return load_documents(write_rows(directory, rows), data, of, "train_file")


def build_example(row: object, data: DataConfig, of: Tokenizer) -> Example:
    """Return the only example of a row."""
    (example,) = build_examples(row, data, of)
    return example


def supervised_text(documents: Documents, i: int, text: str, of: Tokenizer) -> list[str]:
    """Return the parts of a document's text that its evaluation labels cover."""
    spans = of.encode(text).spans
    labels = documents.labels(i)
    parts: list[list[int]] = []
    before = IGNORE_INDEX
    for (start, end), label in zip(spans, labels, strict=True):
        if label != IGNORE_INDEX and before == IGNORE_INDEX:
            parts.append([start, end])
        elif label != IGNORE_INDEX:
            parts[-1][1] = end
        before = label
    return [text[start:end] for start, end in parts]


def arrays_of(documents: Documents) -> dict[str, np.ndarray]:
    """Return the arrays of documents by name."""
    return {name: v for name, v in vars(documents).items() if isinstance(v, np.ndarray)}


def same_arrays(a: Documents, b: Documents) -> bool:
    """Return whether documents have the same arrays: names, dtypes and values."""
    arrays, others = arrays_of(a), arrays_of(b)
    assert list(arrays) == list(others) and len(arrays) == 9
    return all(
        array.dtype == others[name].dtype and np.array_equal(array, others[name])
        for name, array in arrays.items()
    )


def are_same(a: Documents, b: Documents) -> bool:
    """Return whether documents have the same arrays, edges and counts."""
    return a.counts == b.counts and a.edges == b.edges and same_arrays(a, b)


def to_parquet(rows: list[dict]) -> bytes:
    """Return rows as a Parquet file, in row groups of two so that it has several."""
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out, row_group_size=2)
    return out.getvalue()


THREE_FILES = {"a": 9, "b": 14, "c": 4}  # usable rows of each file of `write_three_files`


def write_three_files(directory: Path) -> list[str]:
    """Write a.jsonl, b.jsonl and c.parquet with articles; some lines of b are blank or broken."""
    a, b, c = (
        write_paths(directory / f"{name}.jsonl", size, seed)
        for seed, (name, size) in enumerate(THREE_FILES.items())
    )
    lines = b.read_bytes().splitlines(True)
    b.write_bytes(b"".join([b"\n", *lines[:5], b"{\n", *lines[5:], b"\n"]))

    rows = [json.loads(line) for line in c.read_text(encoding="utf-8").splitlines()]
    (directory / "c.parquet").write_bytes(to_parquet(rows))
    return [str(a), str(b), str(directory / "c.parquet")]
