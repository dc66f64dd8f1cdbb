"""Rubrics: what is wrong with one is said with its place in the file."""

import json
import re
from pathlib import Path

import pytest

from minilora.errors import UserError
from minilora.evaluation.rubric import OVERALL, read_rubric

pytest.importorskip("jsonschema")


def criterion(**changes) -> dict:
    """Return a valid criterion with changes; None removes a field."""
    fields = {"name": "a", "description": "b", "min": 1, "max": 5} | changes
    return {name: value for name, value in fields.items() if value is not None}


@pytest.mark.parametrize(
    ("rubric", "message"),
    [
        ([], "expected a JSON object"),
        ({}, r"\$: 'criteria' is a required property"),
        ({"criteria": []}, r"\$\.criteria: "),
        ({"criteria": [criterion()], "scale": 5}, r"\$: .*'scale' was unexpected"),
        (
            {"criteria": [criterion(), criterion(name="b", weight=2)]},
            r"\$\.criteria\[1\]: .*'weight' was unexpected",
        ),
        (
            {"criteria": [criterion(description=None)]},
            r"\$\.criteria\[0\]: 'description' is a required",
        ),
        (
            {"criteria": [criterion()], "prompt": "{question} {answr}"},
            r"\$\.prompt: \{answr\} is none of \{question\}, \{answer\}, \{reference\}",
        ),
        ({"criteria": [criterion()], "prompt": "{answer!r}"}, r"\$\.prompt: \{answer!r\} is none"),
        ({"criteria": [criterion()], "prompt": "{answer.x}"}, r"\$\.prompt: \{answer.x\} is none"),
        ({"criteria": [criterion()], "prompt": "{answer} {"}, r"\$\.prompt: .*write \{\{ and"),
        (
            {"criteria": [criterion()], "prompt": "{reference}"},
            r"\$\.prompt: \{answer\} is missing",
        ),
        ({"criteria": [criterion()], "prompt": 5}, r"\$\.prompt: 5 is not of type 'string'"),
        (
            {"criteria": [criterion(min="1")]},
            r"\$\.criteria\[0\]\.min: '1' is not of type 'integer'",
        ),
        ({"criteria": [criterion(max=4.5)]}, r"\$\.criteria\[0\]\.max"),
        ({"criteria": [criterion(name="")]}, r"\$\.criteria\[0\]\.name"),
        ({"criteria": [criterion(min=5)]}, r"\$\.criteria\[0\]: min 5 must be less than max 5"),
        ({"criteria": [criterion(), criterion()]}, r"\$\.criteria\[1\]\.name: 'a' is taken"),
        ({"criteria": [criterion(name=OVERALL)]}, "is taken"),
        (
            {"criteria": [criterion()], "instructions": 5},
            r"\$\.instructions: 5 is not of type 'string'",
        ),
    ],
)
def test_errors_name_the_file_and_the_place(tmp_path: Path, rubric: object, message: str):
    path = tmp_path / "rubric.json"
    path.write_text(json.dumps(rubric), encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(str(path)) + ".*" + message):
        read_rubric(path)


def test_a_file_that_is_missing_or_not_json_is_named(tmp_path: Path):
    (tmp_path / "rubric.json").write_text("{")
    for name in ("rubric.json", "missing.json"):
        with pytest.raises(UserError, match=name):
            read_rubric(tmp_path / name)
