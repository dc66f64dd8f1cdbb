"""What a model is asked for a row or a text, held against what it was trained on."""

import pytest

from helpers.data_rows import EVERY_TOKENIZER, GOOD_ROWS, load_rows, tokenizer
from minilora.config import DataConfig
from minilora.data.example import RowError
from minilora.data.prompts import prompt_for_row, question_of_row, row_of_text
from minilora.errors import UserError


@EVERY_TOKENIZER
@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("format", GOOD_ROWS)
def test_a_model_is_asked_with_the_ids_it_was_trained_on(format, chat, name, tmp_path):
    """One rendering, one encoder, one BOS."""
    of, row = tokenizer(name), GOOD_ROWS[format]
    marker = "\nA:" if format == "text" else None
    settings = {"format": format, "chat": chat, "response_marker": marker}
    prompt, _ = load_rows(tmp_path, [row], of, **settings).prompt_and_target(0)
    asked = prompt_for_row(row, DataConfig(**settings), of)
    assert of.encode(asked).ids == prompt


def with_template(template: str) -> DataConfig:
    return DataConfig(format="prompt", prompt_template=template)


# the form, what is typed, and what is asked
ASKED: dict[str, tuple[DataConfig, str, str]] = {
    "one column": (with_template("Q: {q}"), "서울?", "Q: 서울?"),
    "one column twice": (with_template("{q} {q}"), "a", "a a"),
    "one column and braces": (with_template("{{{q}}}"), "a", "{a}"),
    "a column's item": (with_template("{q[de]}"), '{"q": {"de": "Wer?"}}', "Wer?"),
    "columns in a format": (with_template("{n:{w}}|"), '{"n": "a", "w": 3}', "a  |"),
    "a number": (with_template("{n:.1f}"), '{"n": 2}', "2.0"),
    "the row with its answer": (with_template("Q: {q}"), '{"q": "a", "x": "b"}', "Q: a"),
    "another object": (with_template("Q: {q}"), '{"x": "b"}', 'Q: {"x": "b"}'),
    "a list": (with_template("Q: {q}"), '["q"]', 'Q: ["q"]'),
    "braces in the text": (with_template("Q: {q}"), "{q} {x} {", "Q: {q} {x} {"),
    "an article": (DataConfig(), '{"title": "T", "abstract": "a"}', "Title: T\na"),
    "a text": (DataConfig(format="text", response_marker="A:"), '{"text": "Q A: r"}', "Q A:"),
    "no row": (DataConfig(format="text", response_marker="A:"), "Q A: r", "Q A:"),
    "turns": (
        DataConfig(format="messages"),
        '{"messages": [{"role": "user", "content": "x"}]}',
        "user: x",
    ),
    "a question": (DataConfig(format="messages"), "x", "x"),
}


@pytest.mark.parametrize("case", ASKED)
def test_a_text_asks_what_its_row_asks(case: str):
    """By itself, and in a row that has nothing else."""
    data, typed, asked = ASKED[case]
    assert question_of_row(row_of_text(typed, data), data) == asked
    assert question_of_row({"id": 7, "prompt": typed}, data) == asked


def test_a_json_object_that_lacks_columns_is_refused():
    """In every format: it is a row with a mistake, and no question."""
    for typed in ('{"title": "T"}', '{"title": "T", "abstrct": "a"}'):
        with pytest.raises(RowError, match="missing: abstract"):
            row_of_text(typed, DataConfig())


@pytest.mark.parametrize("data_format", ["messages", "text"])
def test_a_column_prompt_beside_those_of_training_is_not_what_is_asked(data_format: str):
    """Datasets have one (ultrachat_200k): training reads the other column."""
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    row = {"prompt": "p", "messages": turns, "text": "Hello"}
    assert "Hello" in question_of_row(row, DataConfig(format=data_format))
    assert "p" not in question_of_row(row, DataConfig(format=data_format))


def test_a_training_row_is_never_taken_for_a_text():
    """Though its one column is called prompt and holds what could be a row."""
    data, typed = DataConfig(format="prompt"), '{"prompt": "x"}'
    assert question_of_row({"prompt": typed}, data) == typed
    with pytest.raises(RowError, match="'q' of the template is missing"):
        question_of_row({"prompt": "x", "note": "y"}, with_template("{q}"))


@pytest.mark.parametrize(
    ("template", "typed", "missing"),
    [
        ("{a} {b}", "x", r"columns a, b; missing: a, b\."),
        ("{a} {b}", '{"b": 1}', r"columns a, b; missing: a\."),
        ("{a[x]} {b.y} {c:{d}}", '{"a": 1, "b": 2}', r"columns a, b, c, d; missing: c, d\."),
    ],
)
def test_missing_columns_are_named(template: str, typed: str, missing: str):
    with pytest.raises(RowError, match=missing):
        row_of_text(typed, with_template(template))


def test_a_template_that_asks_nothing_or_is_none():
    with pytest.raises(RowError, match="no column"):
        row_of_text("x", with_template("Write a poem."))
    assert question_of_row(row_of_text("{}", with_template("Write!")), with_template("Write!"))
    for broken in ("{a", "{} {}"):
        with pytest.raises(UserError, match="prompt_template"):
            question_of_row(row_of_text("x", with_template(broken)), with_template(broken))


@pytest.mark.parametrize("typed", ["caf\udcff", r'{"q": "\ud800"}'])
def test_what_is_not_text_is_refused(typed: str):
    """Bytes of a command line that are not UTF-8, and half of a surrogate pair in JSON."""
    with pytest.raises(RowError, match="the prompt is not text"):
        row_of_text(typed, with_template("{q}"))
