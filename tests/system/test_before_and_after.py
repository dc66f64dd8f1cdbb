"""A model before and after its training, on the same rows, in one table (infer.py --compare)."""

import json
import shutil
from pathlib import Path

import pytest

import infer
from helpers.asking import (
    FORMATS,
    SHORT,
    answer_file,
    infer_args,
    read_rows,
    train_adapter,
    write_base,
    write_rows,
)
from minilora.errors import UserError

METRICS = ("chrf", "edit_distance", "loss", "ppl")
TEMPLATE = "Q: {question}?\nA:"


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Answer rows with a base in the form of a training, then train; returns (adapter, folder)."""
    folder = tmp_path_factory.mktemp("compared")
    base = write_base("llama3", folder / "llama")
    data, rows, _ = FORMATS["prompt without chat"]
    source = write_rows(folder / "in.jsonl", rows)
    form = {"prompt_template": TEMPLATE, "chat": False}
    answer_file(base, source, folder / "before.jsonl", metrics=METRICS, **form, **SHORT)
    return train_adapter(base, folder / "run", data, rows), folder


def figures_of(folder: Path, name: str) -> dict[str, float]:
    return json.loads((folder / f"{name}.metrics.json").read_text())


def test_before_and_after(
    compared: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    """The figures are those of the two metrics files; the loss fell in training."""
    adapter, folder = compared
    capsys.readouterr()
    options = {"metrics": METRICS, "compare": str(folder / "before.jsonl"), **SHORT}
    answer_file(adapter, folder / "in.jsonl", tmp_path / "after.jsonl", **options)
    before, after = figures_of(folder, "before"), figures_of(tmp_path, "after")
    assert before["loss"] > after["loss"] and before["chrf"] != after["chrf"]

    out, err = capsys.readouterr()
    assert "4 of 4 answers are compared" in err
    table = {line.split()[0]: line.split()[1:] for line in out.splitlines()[1:]}
    assert table.keys() == before.keys() == after.keys()
    for name in METRICS:
        shown = [float(cell.replace(",", "")) for cell in table[name]]
        difference = after[name] - before[name]
        assert shown == pytest.approx([before[name], after[name], difference], abs=1e-4)


def test_rows_that_only_one_answered_do_not_count(
    compared: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    adapter, folder = compared
    for name in ("before.jsonl", "before.metrics.json"):
        shutil.copy(folder / name, tmp_path / name)
    other = write_rows(tmp_path / "before.jsonl", read_rows(tmp_path / "before.jsonl")[1:])
    options = {"metrics": ("exact_match",), "compare": str(other), "limit": 3, **SHORT}
    answer_file(adapter, folder / "in.jsonl", tmp_path / "after.jsonl", **options)
    out, err = capsys.readouterr()
    assert "2 of 3 answers are compared" in err
    assert out.splitlines()[1].split() == ["answers", "2", "2", "+0"]
    assert figures_of(tmp_path, "after")["answers"] == 3


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("other ids", r"--compare: no row of .*other\.jsonl has the id"),
        ("other rows", r"other\.jsonl:2: 'question' is not that of the row with id"),
        ("no answers", r'other\.jsonl:2: "generated" is missing'),
    ],
)
def test_what_cannot_be_compared_is_refused_before_the_model_is_loaded(
    case: str,
    message: str,
    compared: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    adapter, folder = compared
    rows = read_rows(folder / "before.jsonl")
    if case == "other ids":
        rows = [row | {"id": f"other {row['id']}"} for row in rows]
    elif case == "other rows":
        rows[1]["question"] = "another"
    else:
        rows[1].pop("generated")
    other = write_rows(tmp_path / "other.jsonl", rows)
    monkeypatch.setattr(infer, "load_files", None)
    paths = {"input": str(folder / "in.jsonl"), "output": str(tmp_path / "out.jsonl")}
    with pytest.raises(UserError, match=message):
        infer.main(infer_args(adapter, **paths, compare=str(other), metrics=("chrf",), **SHORT))
    assert not (tmp_path / "out.jsonl").exists()
