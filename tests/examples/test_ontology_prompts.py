"""examples/ontology/prompts.py: prompts with solved examples, and what it refuses."""

import importlib
import itertools
import re
from pathlib import Path
from types import ModuleType

import pytest

import infer
from helpers.asking import infer_args, read_rows, write_rows
from minilora.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "examples/ontology")
    return importlib.import_module("prompts")


def article(number: int, root: str = "Things") -> dict:
    return {
        "id": number,
        "title": f"Title <{number}>",
        "abstract": f"{{All}} of {number}.",
        "paths": [[root, "a", f"b{number}"], [root, f"c{number}"]],
    }


TRAINING = [article(i) for i in range(20)]
ASKED = [article(i) for i in range(100, 104)]


def written(prompts: ModuleType, tmp_path: Path, asked: list = ASKED, **flags) -> list[dict]:
    """Run the command; return the rows that it writes."""
    rows, out = write_rows(tmp_path / "rows.jsonl", asked), tmp_path / "out.jsonl"
    if flags.get("shots"):
        flags.setdefault("examples", write_rows(tmp_path / "train.jsonl", TRAINING))
    assert prompts.main(prompts.Args(rows, out, **flags)) == 0
    return read_rows(out)


def example_numbers(prompt: str) -> list[int]:
    return [int(number) for number in re.findall(r"Title: Title <(\d+)>", prompt)]


def test_without_examples_a_prompt_has_the_form_of_an_answer(prompts, tmp_path):
    rows = written(prompts, tmp_path)
    for row, source in zip(rows, ASKED, strict=True):
        assert {name: row[name] for name in source} == source
        number = source["id"]
        assert row["completion"] == f"Things -> a -> b{number}\nThings -> c{number}\n"
        assert '"Things"' in row["prompt"] and "\nThings -> " in row["prompt"]
        question = f"Title: Title <{number}>\n{{All}} of {number}.\nAnswer:\n"
        assert row["prompt"].endswith("\n\n" + question)
        assert example_numbers(row["prompt"]) == [number]
        assert f"b{number}" not in row["prompt"]


@pytest.mark.parametrize("shots", [1, 3])
def test_examples_are_drawn_from_training_rows_for_each_prompt(shots, prompts, tmp_path):
    rows = written(prompts, tmp_path, shots=shots)
    drawn = []
    for row in rows:
        *numbers, asked = example_numbers(row["prompt"])
        assert asked == row["id"]
        assert len(set(numbers)) == len(numbers) == shots
        for number in numbers:
            solved = article(number)
            lines = f"Title: {solved['title']}\n{solved['abstract']}\nAnswer:\n"
            lines += f"Things -> a -> b{number}\nThings -> c{number}\n\n"
            assert lines in row["prompt"]
        drawn.append(numbers)
    assert len(set(map(tuple, drawn))) > 1
    assert set(itertools.chain(*drawn)) <= set(range(20))
    assert written(prompts, tmp_path, shots=shots) == rows
    assert written(prompts, tmp_path, shots=shots, seed=1) != rows


def test_an_article_is_not_its_own_example(prompts, tmp_path):
    rows = written(prompts, tmp_path, asked=TRAINING, shots=19)
    for row in rows:
        assert sorted(example_numbers(row["prompt"])) == list(range(20))
        assert row["prompt"].count(f"b{row['id']}\n") == 0


def test_another_template_and_root(prompts, tmp_path):
    template = tmp_path / "mine.jinja"
    text = "{% for e in examples %}{{ e.paths[0] | last }} {% endfor %}{{ root }}: {{ title }}\n"
    template.write_text(text)
    asked = [{"title": "x", "abstract": "y"}]
    rows = written(prompts, tmp_path, asked, template=template, root="Everything")
    assert rows == [{"title": "x", "abstract": "y", "prompt": "Everything: x\n"}]
    (row,) = written(prompts, tmp_path, asked, template=template, shots=2)
    assert re.fullmatch(r"b\d+ b\d+ Things: x\n", row["prompt"])


def test_mistakes_are_named(prompts, tmp_path):
    bad_template = tmp_path / "bad.jinja"
    bad_template.write_text("{{ titel }}")
    unclosed = tmp_path / "unclosed.jinja"
    unclosed.write_text("{% if examples %}")
    train = write_rows(tmp_path / "train.jsonl", TRAINING)
    bare = write_rows(tmp_path / "bare.jsonl", [{"title": "x", "abstract": "y"}])
    for asked, flags, message in (
        (ASKED, {"shots": 1, "examples": tmp_path / "none.jsonl"}, "--examples: .*none.jsonl"),
        (ASKED, {"examples": train}, "--shots K and --examples TRAIN.jsonl go together"),
        (ASKED, {"shots": 21}, "--examples has 20 rows other than 'Title <100>'"),
        (ASKED, {"shots": 1, "examples": bare}, r'bare.jsonl:1: an example without "paths"'),
        ([article(1), article(2, "B")], {}, r"rows.jsonl:2: a path begins with 'B'.* 'Things'"),
        (ASKED, {"root": "B"}, r"rows.jsonl:1: a path begins with 'Things'"),
        ([{"title": "x", "abstract": "y"}], {}, "--root NAME"),
        ([{"title": "x"}], {}, r'rows.jsonl:1: "abstract" is missing'),
        ([{**article(1), "paths": [["a", ""]]}], {}, r'rows.jsonl:1: "paths"\[0\]\[1\]'),
        ([], {}, "has no rows"),
        (ASKED, {"template": tmp_path / "x.jinja"}, "--template: .*x.jinja' does not exist"),
        (ASKED, {"template": bad_template}, "bad.jinja: 'titel' is undefined"),
        (ASKED, {"template": unclosed}, "unclosed.jinja: Unexpected end of template"),
    ):
        with pytest.raises(UserError, match=message):
            written(prompts, tmp_path, asked, **flags)
        assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.system
def test_infer_asks_the_prompts_and_scores_the_answers(prompts, tmp_path):
    written(prompts, tmp_path, shots=1)
    answers = tmp_path / "answers.jsonl"
    args = infer_args(
        ROOT / "examples/tiny-mistral",
        input=str(tmp_path / "out.jsonl"),
        output=str(answers),
        format="prompt",
        prompt_template="{prompt}",
        response_template="{completion}",
        chat=False,
        max_new_tokens=4,
        metrics=("chrf",),
    )
    assert infer.main(args) == 0
    assert [row["id"] for row in read_rows(answers)] == [row["id"] for row in ASKED]
    assert answers.with_suffix(".metrics.json").is_file()
