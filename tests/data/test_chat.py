"""Conversations: which parts of the rendered text are supervised, whatever the chat template."""

import re

import pytest

from helpers import tiny_tokenizers
from helpers.data_rows import (
    EVERY_TOKENIZER,
    GOOD_ROWS,
    chat_row,
    load_rows,
    supervised_text,
    tokenizer,
)
from minilora.data.chat_template import MISTRAL_TEMPLATE
from minilora.data.dataset import LabelDraw
from minilora.data.tokenizer import Tokenizer
from minilora.errors import UserError

# how each family writes an assistant turn; the group is what the model has to write
ASSISTANT_TURN = {
    "mistral": r"\[/INST\](.*?</s>)",
    "llama2": r"\[/INST\](.*?</s>)",
    "metaspace": r"\[/INST\](.*?</s>)",
    "llama3": r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(.*?<\|eot_id\|>)",
    "qwen": r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)",
}
CONVERSATIONS = [
    chat_row("q", "a"),
    chat_row("q", "first", "q", "second\n\nline", "안녕", "세 번째 🤖"),
    chat_row("the same", "the same", "the same", "the same"),
    chat_row("user", "assistant", "assistant", "user"),
    chat_row("q", "one", "r", "two", "s", "three", train=(True, False, True)),
    chat_row("q", "one", "r", "two", train=(False, True)),
    chat_row("q", "one", "r", "two", train=(True, False)),
    chat_row("q", "one", "a question without an answer"),
    chat_row("q", "code:\n```\nx = [1]\n```"),
]
WITH_SYSTEM = [chat_row("q", "a", "r", "b", system="Be brief."), chat_row("q", "a", system="")]


@EVERY_TOKENIZER
@pytest.mark.parametrize("row", [*CONVERSATIONS, *WITH_SYSTEM])
def test_every_assistant_turn_is_supervised_unless_it_says_otherwise(name, row, tmp_path):
    """The reference finds the turns in the rendered text by the family's own markers."""
    of = tokenizer(name)
    if row in WITH_SYSTEM and of.chat_template == MISTRAL_TEMPLATE:
        with pytest.raises(UserError, match="alternation"):
            of.render(row["messages"])
        return
    documents = load_rows(tmp_path, [row], of, format="messages")
    messages = [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
    text = of.render(messages)
    assert documents.ids(0).tolist() == of.encode(text).ids

    flags = [m.get("train", True) for m in row["messages"] if m["role"] == "assistant"]
    written = list(re.finditer(ASSISTANT_TURN[name], text, re.DOTALL))
    trained = [turn for turn, flag in zip(written, flags, strict=True) if flag]
    expected = [turn.group(1) for turn in trained]
    assert supervised_text(documents, 0, text, of) == expected
    drawn = documents.labels(0, draw=LabelDraw(0, 0))
    assert (drawn == documents.labels(0)).all(), "no labels are dropped but those of paths"

    prompt, target = documents.prompt_and_target(0)
    count = len(prompt) + len(target)
    assert [*prompt, *target] == documents.ids(0)[:count].tolist()
    assert of.encode(text).spans[count - 1][1] == trained[-1].end()
    assert of.decode(target, skip_special_tokens=False).lstrip() == expected[-1]


def test_a_null_train_flag_is_none(tmp_path):
    """Parquet has null in every turn without a flag as soon as one turn has it."""
    flags = [{"train": None}, {"train": None}, {"train": None}, {"train": False}]
    messages = chat_row("q", "one", "r", "two")["messages"]
    row = {"messages": [m | flag for m, flag in zip(messages, flags, strict=True)]}
    of = tokenizer("qwen")
    documents = load_rows(tmp_path, [row], of, format="messages")
    text = of.render(row["messages"])
    assert supervised_text(documents, 0, text, of) == ["one<|im_end|>"]


# ---- templates that render a turn differently when others follow it

THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>') | last }}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns_gives_a_document_a_turn(tmp_path):
    """Each answer is trained after the very prompt that will ask for it."""
    of = Tokenizer(tiny_tokenizers.qwen(), THINKING)
    several = ("q", "<think>t</think>one", "r", "<think>u</think>two")
    rows = [
        chat_row(*several),
        chat_row(*several[:2]),
        chat_row(*several, train=(False, True)),
        chat_row("q", "plain", "r", "two"),
    ]
    documents = load_rows(tmp_path, rows, of, format="messages")
    assert documents.row_index.tolist() == [0, 0, 1, 2, 3]
    counts = documents.counts
    assert (counts.read, counts.kept, counts.split, counts.dropped) == (4, 4, 1, {})

    first, second = ["<think>t</think>one<|im_end|>"], ["<think>u</think>two<|im_end|>"]
    plain = ["plain<|im_end|>", "two<|im_end|>"]
    # per document: its row, how many of the row's turns it has, what is supervised
    expected = [(0, 2, first), (0, 4, second), (1, 2, first), (2, 4, second), (3, 4, plain)]
    for i, (row, num_turns, supervised) in enumerate(expected):
        text = of.render(rows[row]["messages"][:num_turns])
        assert documents.ids(i).tolist() == of.encode(text).ids
        assert supervised_text(documents, i, text, of) == supervised


def test_a_template_that_ends_earlier_turns_differently_gives_a_document_a_turn(tmp_path):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{{ '' if loop.last and m.role == 'assistant' else '<|im_end|>' }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    of = Tokenizer(tiny_tokenizers.qwen(), template)
    rows = [chat_row("q", "one", "r", "two"), chat_row("q", "one")]
    documents = load_rows(tmp_path, rows, of, format="messages")
    assert documents.row_index.tolist() == [0, 0, 1]
    # this template never ends an answer: EOS does
    for i, expected in enumerate(["one", "two", "one"]):
        labelled = [label for label in documents.labels(i) if label >= 0]
        shown = of.decode(labelled, skip_special_tokens=False)
        assert shown.replace("\n", "") == expected + of.eos_token


def test_supervision_ends_at_the_first_of_two_special_tokens_after_an_answer(tmp_path):
    """The model is to stop there; what the template writes after it is nobody's answer."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>"
        "{{ '<|endoftext|>' if m.role == 'assistant' else '' }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    of = Tokenizer(tiny_tokenizers.qwen(), template)
    row = chat_row("q", "one", "r", "two")
    documents = load_rows(tmp_path, [row], of, format="messages")
    text = of.render(row["messages"])
    assert text.count("<|im_end|><|endoftext|>") == 2
    assert supervised_text(documents, 0, text, of) == ["one<|im_end|>", "two<|im_end|>"]


# ---- conversations that a template cannot render


def test_a_template_that_changes_the_answer_is_counted(tmp_path):
    template = "{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}"
    of = Tokenizer(tiny_tokenizers.qwen(), template)
    rows = [chat_row("q", "lower"), chat_row("q", "UPPER")]
    documents = load_rows(tmp_path, rows, of, format="messages")
    assert documents.row_index.tolist() == [1]
    assert len(documents.counts.dropped["template rewrites turns"]) == 1


def test_a_conversation_the_template_refuses_is_one_dropped_row(tmp_path):
    """Not the end of the run: the Mistral form has no system turn."""
    rows = [GOOD_ROWS["messages"], chat_row("q", "a", system="s"), GOOD_ROWS["messages"]]
    documents = load_rows(tmp_path, rows, format="messages")
    assert documents.row_index.tolist() == [0, 2]
    (message,) = [m for messages in documents.counts.dropped.values() for m in messages]
    assert re.match(r".*rows\.jsonl:2: .*alternation", message)


def test_a_turn_that_a_template_cannot_begin_is_one_dropped_row(tmp_path):
    """Before a conversation that begins with the assistant, there is no turn Qwen could render."""
    rows = [chat_row("q", "one"), {"messages": chat_row("q", "one")["messages"][1:]}]
    documents = load_rows(tmp_path, rows, tokenizer("qwen"), format="messages")
    assert documents.row_index.tolist() == [0]
    message = documents.counts.dropped["refused by the chat template"][0]
    assert "rows.jsonl:2: chat template" in message
