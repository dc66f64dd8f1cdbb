"""How rows of formats prompt, text and paths become text, and which part of it is supervised."""

import pytest

from helpers import tiny_tokenizers
from helpers.data_rows import EVERY_TOKENIZER, GOOD_ROWS, load_rows, supervised_text, tokenizer
from minilora.data.dataset import IGNORE_INDEX
from minilora.data.tokenizer import Tokenizer
from minilora.errors import UserError

# ---- prompt


@EVERY_TOKENIZER
def test_prompt_templates_take_any_columns(name, tmp_path):
    of = tokenizer(name)
    row = {"q": "물리학", "n": 7, "item": ["x"], "a": "é -> b", "unused": None}
    documents = load_rows(
        tmp_path,
        [row],
        of,
        format="prompt",
        prompt_template="{{{q}}}: {n:03d} {item[0]}",
        response_template="{a} {q}",
    )
    text = of.render(
        [
            {"role": "user", "content": "{물리학}: 007 x"},
            {"role": "assistant", "content": "é -> b 물리학"},
        ]
    )
    assert documents.ids(0).tolist() == of.encode(text).ids
    assert supervised_text(documents, 0, text, of) == ["é -> b 물리학" + of.eos_token]


@pytest.mark.parametrize(
    "template", ["{prompt", "{prompt}}", "{}", "{prompt.absent}", "{prompt:d}"]
)
def test_a_broken_prompt_template_is_the_users_error(template, tmp_path):
    with pytest.raises(UserError, match=r"data\.prompt_template"):
        load_rows(tmp_path, [GOOD_ROWS["prompt"]], format="prompt", prompt_template=template)


# null would become the text "None"; pandas writes NaN where it has no number
@pytest.mark.parametrize("name, missing", [("mistral", None), ("qwen", float("nan"))])
@pytest.mark.parametrize("value", ["b", 1.5])
def test_a_missing_value_is_malformed(value, missing, name, tmp_path):
    rows = [{"prompt": "a", "completion": value}, {"prompt": "a", "completion": missing}]
    documents = load_rows(tmp_path, rows, tokenizer(name), format="prompt")
    assert documents.row_index.tolist() == [0] and documents.counts.kept == 1
    assert "completion" in documents.counts.dropped["malformed"][0]


@EVERY_TOKENIZER
def test_without_chat_prompt_and_response_follow_each_other(name, tmp_path):
    of = tokenizer(name)
    row = {"prompt": "Q: 科学?\n", "completion": "a b"}
    documents = load_rows(tmp_path, [row], of, format="prompt", chat=False)
    text = "Q: 科学?\na b" + of.eos_token
    assert documents.ids(0).tolist() == of.encode(text).ids
    assert supervised_text(documents, 0, text, of) == ["a b" + of.eos_token]

    paths = load_rows(tmp_path, [GOOD_ROWS["paths"]], of, chat=False)
    text = "Title: T\nA\na -> b\n" + of.eos_token
    assert paths.ids(0).tolist() == of.encode(text).ids


def test_a_template_that_never_ends_the_turn_gets_eos(tmp_path):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    of = Tokenizer(tiny_tokenizers.qwen(), template)
    documents = load_rows(tmp_path, [{"prompt": "p", "completion": "c"}], of, format="prompt")
    assert documents.labels(0)[-1] == of.eos_id
    assert documents.ids(0).tolist().count(of.eos_id) == 1


# ---- text


@EVERY_TOKENIZER
def test_text_is_supervised_after_its_last_marker_or_everywhere(name, tmp_path):
    of = tokenizer(name)
    row = {"text": "Q: one\nA: two\nQ: 물리학\nA: science"}
    text = row["text"] + of.eos_token
    marked = load_rows(tmp_path, [row], of, format="text", response_marker="A:")
    assert marked.ids(0).tolist() == of.encode(text).ids
    assert supervised_text(marked, 0, text, of) == [" science" + of.eos_token]

    whole = load_rows(tmp_path, [row], of, format="text")
    assert whole.ids(0).tolist() == of.encode(text).ids
    assert whole.labels(0)[0] == IGNORE_INDEX
    assert (whole.labels(0)[1:] == whole.ids(0)[1:]).all()


@pytest.mark.parametrize("row", [{"text": "a b</s>"}, {"prompt": "a ", "completion": "b</s>"}])
def test_an_eos_in_the_row_is_not_doubled(row, tmp_path):
    of = tokenizer("mistral")
    format = "text" if "text" in row else "prompt"
    documents = load_rows(tmp_path, [row], of, format=format, chat=False)
    assert list(documents.ids(0)).count(of.eos_id) == 1
    assert documents.labels(0)[-1] == of.eos_id


# ---- paths


def test_paths_whose_white_space_a_template_changes_are_dropped(tmp_path):
    """Their nodes are places in the text, which would shift."""
    template = "{% for m in messages %}{{ m.content | indent(2) }}<|im_end|>{% endfor %}"
    of = Tokenizer(tiny_tokenizers.qwen(), template)
    two_lines, one_line = [["a", "b"], ["c", "d"]], [["a", "b"]]
    rows = [{"title": "T", "abstract": "A", "paths": paths} for paths in (two_lines, one_line)]
    documents = load_rows(tmp_path, rows, of)
    assert documents.row_index.tolist() == [1]
    assert len(documents.counts.dropped["template rewrites turns"]) == 1
