"""Two outputs over the same rows: which rows are compared, and the table of their figures."""

import json
from pathlib import Path

import pytest

from minilora.errors import UserError
from minilora.evaluation.compare import compare_table, other_model_figures, read_other


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def answered(row_id: str | int, text: str, **columns) -> dict:
    return {"id": row_id, "prompt": f"Q{row_id}", **columns, "generated": text}


def test_rows_that_both_have_are_paired(tmp_path: Path):
    """By id and sample, in the order of the rows here, however far the other output is."""
    others = [
        answered(2, "c"),
        answered("a", "d", sample=1, price=float("nan")),
        answered("a", "e", sample=0),
        answered("only there", "f"),
    ]
    here = [
        answered("a", "", sample=0),
        answered("a", "", sample=1, price=float("nan")),
        answered("only here", ""),
        answered(2, "", extra="a column of this input alone"),
    ]
    before, after = read_other(write_rows(tmp_path / "other.jsonl", others), here)
    assert [row["generated"] for row in before] == ["e", "d", "c"]
    assert [id(row) for row in after] == [id(here[0]), id(here[1]), id(here[3])]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([answered(0, "x"), answered(1, "x", title="u")], r"other\.jsonl:2: 'title' is not that"),
        ([answered(0, "x"), {"id": 1, "prompt": "Q1"}], r'other\.jsonl:2: "generated" is missing'),
        ([answered(0, "x"), answered(0, "x")], r'other\.jsonl:2: "id": .*no other row'),
        ([{"prompt": "Q1", "generated": "x"}], r'other\.jsonl:1: "id"'),
        ([answered("0", "x")], "--compare: no row of .* has the id"),
        ([], "--compare: no row of"),
    ],
)
def test_another_file_is_refused(rows: list[dict], message: str, tmp_path: Path):
    here = [answered(0, ""), answered(1, "", title="t")]
    with pytest.raises(UserError, match=message):
        read_other(write_rows(tmp_path / "other.jsonl", rows), here)


def test_a_file_that_is_missing_or_not_json_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"--compare: .*missing\.jsonl' does not exist"):
        read_other(str(tmp_path / "missing.jsonl"), [])
    (tmp_path / "other.jsonl").write_text('{"id": 0}\n{', encoding="utf-8")
    with pytest.raises(UserError, match=r"other\.jsonl:"):
        read_other(str(tmp_path / "other.jsonl"), [])


def test_table_has_both_sides_and_their_difference():
    before = {"answers": 1200, "bleu": 12.5, "only before": 1.0}
    after = {"answers": 1200, "bleu": 10.0, "loss": 0.25}
    lines = compare_table(before, after, "base.jsonl", "G.jsonl").splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["metric", "base.jsonl", "G.jsonl", "difference"],
        ["answers", "1,200", "1,200", "+0"],
        ["bleu", "12.5000", "10.0000", "-2.5000"],
    ]
    assert lines[3].split() == ["only", "before", "1.0000", "-", "-"]
    assert lines[4].split() == ["loss", "-", "0.2500", "-"]
    assert len({len(line) for line in lines}) == 1


def test_loss_of_the_other_output_is_in_its_file_of_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    path = str(tmp_path / "other.jsonl")
    here = {"answers": 3, "loss": 1.0, "loss/rows": 3, "bleu": 2.0}
    assert other_model_figures(path, here) == {}
    assert "other.metrics.json has no loss" in capsys.readouterr().err

    there = {"answers": 3, "loss": 2.0, "ppl": 7.4, "loss/rows": 3, "bleu": 1.0}
    (tmp_path / "other.metrics.json").write_text(json.dumps(there), encoding="utf-8")
    assert other_model_figures(path, here) == {"loss": 2.0, "loss/rows": 3}
    assert other_model_figures(path, {"bleu": 2.0}) == {}
    assert capsys.readouterr().err == ""

    assert other_model_figures(path, here | {"loss/rows": 2}) == {}
    assert "is over 3 rows, and here over 2: left out" in capsys.readouterr().err
