"""`--preview N` shows and writes the first examples with their masks, and trains nothing."""

import json
from pathlib import Path

import pytest

from helpers import tiny_tokenizers
from minilora.config import DataConfig
from minilora.data.cache import load_documents
from minilora.data.dataset import IGNORE_INDEX, Documents, LabelDraw
from minilora.data.tokenizer import Tokenizer
from minilora.tracking.preview import labelled_pieces, preview


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(tiny_tokenizers.BUILDERS["mistral"]())


@pytest.fixture(scope="module")
def documents(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, private_cache: None
) -> Documents:
    """Articles with an over-frequent edge, Root -> Music, and characters of several bytes."""
    rows = []
    for i in range(4):
        paths = [["Root", "Music", f"잎 {j} 🎵"] for j in range(4)]
        rows.append({"title": f"T{i} 물리학", "abstract": "Abstract", "paths": paths})
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_documents(str(file), DataConfig(num_workers=1), tokenizer, "train_file")


def test_pieces_are_the_whole_text(documents: Documents, tokenizer: Tokenizer):
    kinds = set()
    for i in range(len(documents)):
        pieces = labelled_pieces(documents, tokenizer, i, seed=0)
        text = tokenizer.decode(documents.ids(i).tolist(), skip_special_tokens=False)
        assert "".join(piece.text for piece in pieces) == text
        kinds |= {piece.kind for piece in pieces}
    assert kinds == {"prompt", "trained", "dropped"}


def test_preview_prints_and_writes_the_first_examples(
    documents: Documents, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture
):
    out = tmp_path / "new" / "out"
    preview(documents, tokenizer, 2, seed=0, directory=out)
    printed = capsys.readouterr().out
    assert "legend: prompt, ⟦trained⟧, ⟨dropped⟩ (supervised" in printed
    assert f"written to {out / 'preview.jsonl'}" in printed

    lines = (out / "preview.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2
    for i, line in enumerate(lines):
        row = json.loads(line)
        assert list(row) == ["index", "input_ids", "labels", "train_labels", "text"]
        assert row["index"] == i
        assert row["input_ids"] == documents.ids(i).tolist()
        assert row["labels"] == documents.labels(i).tolist()
        assert row["train_labels"] == documents.labels(i, LabelDraw(0, epoch=0)).tolist()
        assert row["text"] == tokenizer.decode(row["input_ids"], skip_special_tokens=False)
        num_supervised = len([label for label in row["labels"] if label != IGNORE_INDEX])
        num_trained = len([label for label in row["train_labels"] if label != IGNORE_INDEX])
        counts = f"{len(row['input_ids'])} tokens, {num_supervised} supervised, {num_trained} of"
        assert f"--- example {i}: {counts} them trained in epoch 0" in printed


def test_preview_of_more_examples_than_there_are(
    documents: Documents, tokenizer: Tokenizer, tmp_path: Path
):
    preview(documents, tokenizer, 100, seed=0, directory=tmp_path)
    lines = (tmp_path / "preview.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(documents)


def test_other_ranks_preview_nothing(
    documents: Documents, tokenizer: Tokenizer, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.setenv("RANK", "1")
    preview(documents, tokenizer, 2, seed=0, directory=tmp_path / "out")
    assert not (tmp_path / "out").exists() and capsys.readouterr().out == ""
