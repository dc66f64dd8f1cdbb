"""From JSONL to batches: what becomes of every line, how each format is supervised, the cache, and the order of training."""

import functools
import inspect
import json
import multiprocessing
import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

import tiny_tokenizers
from infer import ask
from minilora.config import DataConfig, UserError
from minilora.data import Batch, Documents, step_order
from minilora.labels import IGNORE
from minilora.running import examples
from minilora.running.cache import load_documents
from minilora.running.datasets import chat_template
from minilora.running.examples import Example
from minilora.running.reading import table
from minilora.tokenizer import MISTRAL_TEMPLATE, Tokenizer

EVERY = pytest.mark.parametrize("name", tiny_tokenizers.BUILDERS)
# how each family writes an assistant turn; the group is what the model has to write
ASSISTANT_TURN = {
    "mistral": r"\[/INST\](.*?</s>)",
    "llama2": r"\[/INST\](.*?</s>)",
    "metaspace": r"\[/INST\](.*?</s>)",
    "llama3": r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(.*?<\|eot_id\|>)",
    "qwen": r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)",
}
GOOD: dict[str, dict] = {
    "paths": {"title": "T", "abstract": "A", "paths": [["a", "b"]]},
    "prompt": {"prompt": "p\n", "completion": "c"},
    "messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "text": {"text": "Q: q\nA: a"},
}


def build(row: object, data: DataConfig, of: Tokenizer) -> Example:
    (example,) = examples.build(row, data, of)
    return example


@functools.cache
def tokenizer(name: str) -> Tokenizer:
    return Tokenizer(tiny_tokenizers.BUILDERS[name]())


def write(directory: Path, rows: Sequence[object]) -> str:
    """A JSONL file; strings and bytes are lines as they are."""
    lines = [
        r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)).encode() for r in rows
    ]
    file = directory / "rows.jsonl"
    file.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(file)


def load(directory: Path, rows: Sequence[object], of: Tokenizer | None = None, **settings) -> Documents:
    data = DataConfig(**{"num_workers": 1, **settings})
    return load_documents(write(directory, rows), data, of or tokenizer("mistral"), "train_file")


def turns(*contents: str, system: str | None = None, train: tuple = ()) -> dict:
    """A row of format messages: user and assistant in turn; train: flags of the assistant's turns."""
    messages: list[dict] = [{"role": "system", "content": system}] if system is not None else []
    for i, content in enumerate(contents):
        messages.append({"role": ["user", "assistant"][i % 2], "content": content})
        if i % 2 and train:
            messages[-1]["train"] = train[i // 2]
    return {"messages": messages}


def same(a: Documents, b: Documents) -> bool:
    arrays = [k for k, v in vars(a).items() if isinstance(v, np.ndarray)]
    return a.counts == b.counts and all(
        np.array_equal(getattr(a, k), getattr(b, k)) and getattr(a, k).dtype == getattr(b, k).dtype for k in arrays
    )


def supervised_text(documents: Documents, i: int, text: str, of: Tokenizer) -> list[str]:
    """The stretches of a document's text that its evaluation labels cover."""
    stretches: list[list[int]] = []
    spans, labels = of.encode(text).spans, documents.labels(i)
    for (start, end), label, before in zip(spans, labels, [IGNORE, *labels[:-1]], strict=True):
        if label != IGNORE and before == IGNORE:
            stretches.append([start, end])
        elif label != IGNORE:
            stretches[-1][1] = end
    return [text[start:end] for start, end in stretches]


# ---- counts

BAD: dict[str, list[tuple]] = {
    "paths": [
        (b'{"title": "T", ', "malformed", "not JSON"),
        (b'{"title": "\xff\xfe"}', "malformed", "not JSON"),
        (b"[" * 100_000, "malformed", "not JSON"),
        ("[1, 2]", "malformed", "object"),
        ("null", "malformed", "object"),
        ({**GOOD["paths"], "title": 5}, "malformed", "title"),
        ({**GOOD["paths"], "abstract": None}, "malformed", "abstract"),
        ({"abstract": "A", "paths": [["a"]]}, "malformed", "title"),
        ({"title": "T", "abstract": "A"}, "malformed", "paths"),
        ({**GOOD["paths"], "paths": "a -> b"}, "malformed", "paths"),
        ({**GOOD["paths"], "paths": [["a", "b"], []]}, "malformed", "paths"),
        ({**GOOD["paths"], "paths": [["a"], ["a", 5]]}, "malformed", r'"paths"\[1\]\[1\]'),
        ({**GOOD["paths"], "paths": [["a", "b\nc"]]}, "malformed", r'"paths"\[0\]\[1\]'),
        ({**GOOD["paths"], "paths": [["a -> b"]]}, "malformed", r'"paths"\[0\]\[0\]'),
        ({**GOOD["paths"], "paths": [["a", " "]]}, "malformed", r'"paths"\[0\]\[1\]'),
        (r'{"title": "\ud800", "abstract": "A", "paths": [["a"]]}', "malformed", "surrogate|UTF-8|Unicode"),
        ("", "blank line", ""),
        (" \t", "blank line", ""),
        ({**GOOD["paths"], "paths": []}, "empty response", "response"),
        ({**GOOD["paths"], "abstract": "long " * 100}, "longer than 64 tokens", "tokens.*data.max_seq_length"),
    ],
    "prompt": [
        ({"prompt": "p"}, "malformed", "completion"),
        ({"completion": "c"}, "malformed", "prompt"),
        ({"prompt": "p", "completion": " \n"}, "empty response", "response"),
        ({"prompt": "long " * 100, "completion": "c"}, "longer than 64 tokens", "tokens"),
    ],
    "messages": [
        ({"text": "x"}, "malformed", "messages"),
        ({"messages": []}, "malformed", "messages"),
        ({"messages": "hello"}, "malformed", "messages"),
        ({"messages": [{"role": "user"}]}, "malformed", r'"messages"\[0\].*content'),
        ({"messages": [{"content": "x"}]}, "malformed", r'"messages"\[0\].*role'),
        ({"messages": [*turns("q")["messages"], {"role": "assistant", "content": ["a"]}]}, "malformed", r'"messages"\[1\]'),
        (turns("q", "a", train=(1,)), "malformed", r'\[1\]\["train"\]'),
        (turns("q"), "empty response", "assistant"),
        (turns("q", "a", train=(False,)), "empty response", "assistant"),
        (turns("q", " "), "empty response", "assistant"),
    ],
    "text": [
        ({"content": "x"}, "malformed", "text"),
        ({"text": None}, "malformed", "text"),
        ({"text": "no marker at all"}, "no response marker", "response_marker"),
        ({"text": "Q: q\nA: "}, "empty response", "text"),
        ({"text": ""}, "empty response", "text"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("format", BAD)
def test_every_line_is_counted_with_its_place_and_field(format, tmp_path):
    """Pitfall rows 23 and 31."""
    rows = [GOOD[format], *(line for line, _, _ in BAD[format]), GOOD[format]]
    documents = load(tmp_path, rows, format=format, max_seq_length=64, response_marker="A: " if format == "text" else None)
    counts = documents.counts
    assert counts.read == len(rows)
    assert counts.kept == len(documents) == counts.read - sum(map(len, counts.dropped.values()))
    assert documents.index.tolist() == [0, len(rows) - 1]
    shown = table(counts)
    assert f"{len(rows)} lines read, 2 kept, {len(rows) - 2} dropped" in shown
    file = re.escape(str(tmp_path / "rows.jsonl"))
    for number, (_, reason, field) in enumerate(BAD[format], start=2):
        assert any(re.match(rf"{file}:{number}: .*({field})", message) for message in counts.dropped[reason]), (
            number,
            reason,
            field,
        )
    for reason, messages in counts.dropped.items():
        assert f"{len(messages)} {reason}" in shown
        assert all(message in shown for message in messages[:3])


def test_the_table_shows_a_few_places_of_many(tmp_path):
    shown = table(load(tmp_path, [GOOD["paths"], *[""] * 10]).counts)
    assert "10 blank line" in shown and "rows.jsonl:4:" in shown and "rows.jsonl:5:" not in shown and "and 7 more" in shown


@pytest.mark.parametrize("again", [False, True])
def test_strict_stops_at_the_first_row_that_would_be_dropped(again, tmp_path):
    rows = [GOOD["paths"], {"title": "T"}, "", "{"]
    if again:  # the same from the cache
        load(tmp_path, rows)
    with pytest.raises(UserError, match=r"strict.*rows\.jsonl:2: .*paths"):
        load(tmp_path, rows, strict=True)
    assert len(load(tmp_path, [GOOD["paths"]], strict=True)) == 1


@pytest.mark.parametrize("rows", [[], [""], ["{"], [{"title": 1}]])
def test_a_file_without_a_usable_row_is_the_users_error(rows, tmp_path):
    with pytest.raises(UserError, match=r"data\.train_file.*rows\.jsonl"):
        load(tmp_path, rows)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"data\.eval_file.*nowhere\.jsonl"):
        load_documents(str(tmp_path / "nowhere.jsonl"), DataConfig(), tokenizer("mistral"), "eval_file")


def test_a_conversation_the_template_refuses_is_one_dropped_row(tmp_path):
    """Not the end of the run, and not without its line: the Mistral form has no system turn."""
    documents = load(tmp_path, [GOOD["messages"], turns("q", "a", system="s"), GOOD["messages"]], format="messages")
    assert documents.index.tolist() == [0, 2]
    (message,) = [m for messages in documents.counts.dropped.values() for m in messages]
    assert re.match(r".*rows\.jsonl:2: .*alternation", message)


# ---- lines


def test_unicode_line_separators_and_windows_line_ends_break_nothing(tmp_path):
    abstract = "one\u2028two\u2029three\x85four\x1cfive\x0bsix"
    row = {"title": "T", "abstract": abstract, "paths": [["a", "b\u2028c"]]}
    written = json.dumps(row, ensure_ascii=False).encode()
    assert "\u2028".encode() in written
    plain = load(tmp_path, [written, GOOD["paths"]])
    assert plain.counts.read == plain.counts.kept == 2
    assert abstract in tokenizer("mistral").decode(plain.ids(0)) and "b\u2028c" in tokenizer("mistral").decode(plain.ids(0))
    windows = load(tmp_path, [written + b"\r", json.dumps(GOOD["paths"]).encode() + b"\r"])
    assert same(windows, plain)


def test_a_byte_order_mark_and_a_missing_last_newline_lose_no_row(tmp_path):
    line = json.dumps(GOOD["paths"]).encode()
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + line + b"\n" + line)
    documents = load_documents(str(file), DataConfig(num_workers=1), tokenizer("mistral"), "train_file")
    assert documents.counts.read == documents.counts.kept == 2
    assert documents.ids(0).tolist() == documents.ids(1).tolist()


# ---- formats


@EVERY
def test_prompt_templates_take_any_columns(name, tmp_path):
    settings = {"format": "prompt", "prompt_template": "{{{q}}}: {n:03d} {item[0]}", "response_template": "{a} {q}"}
    documents = load(
        tmp_path, [{"q": "물리학", "n": 7, "item": ["x"], "a": "é -> b", "unused": None}], tokenizer(name), **settings
    )
    of = tokenizer(name)
    text = of.render([{"role": "user", "content": "{물리학}: 007 x"}, {"role": "assistant", "content": "é -> b 물리학"}])
    assert documents.ids(0).tolist() == of.encode(text).ids
    assert supervised_text(documents, 0, text, of) == ["é -> b 물리학" + of.eos_token]


def test_a_broken_prompt_template_is_the_users_error(tmp_path):
    for template in ("{prompt", "{prompt}}", "{}", "{prompt.absent}", "{prompt:d}"):
        with pytest.raises(UserError, match=r"data\.prompt_template"):
            load(tmp_path, [GOOD["prompt"]], format="prompt", prompt_template=template)


@EVERY
def test_without_chat_prompt_and_response_are_laid_end_to_end(name, tmp_path):
    of = tokenizer(name)
    documents = load(tmp_path, [{"prompt": "Q: 科学?\n", "completion": "a b"}], of, format="prompt", chat=False)
    text = "Q: 科学?\na b" + of.eos_token
    assert documents.ids(0).tolist() == of.encode(text).ids
    assert supervised_text(documents, 0, text, of) == ["a b" + of.eos_token]
    paths = load(tmp_path, [GOOD["paths"]], of, chat=False)
    assert paths.ids(0).tolist() == of.encode("Title: T\nA\na -> b\n" + of.eos_token).ids


CONVERSATIONS = [
    turns("q", "a"),
    turns("q", "first", "q", "second\n\nline", "안녕", "세 번째 🤖"),
    turns("the same", "the same", "the same", "the same"),
    turns("user", "assistant", "assistant", "user"),
    turns("q", "one", "r", "two", "s", "three", train=(True, False, True)),
    turns("q", "one", "r", "two", train=(False, True)),
    turns("q", "one", "r", "two", train=(True, False)),
    turns("q", "one", "a question without an answer"),
    turns("q", "code:\n```\nx = [1]\n```"),
]
SYSTEM = [turns("q", "a", "r", "b", system="Be brief."), turns("q", "a", system="")]


@EVERY
@pytest.mark.parametrize("row", [*CONVERSATIONS, *SYSTEM])
def test_every_assistant_turn_is_supervised_unless_it_says_otherwise(name, row, tmp_path):
    """Pitfall row 7: the reference finds the turns in the rendered text by the family's own markers."""
    of = tokenizer(name)
    if row in SYSTEM and of.chat_template == MISTRAL_TEMPLATE:
        with pytest.raises(UserError, match="alternation"):
            of.render(row["messages"])
        return
    documents = load(tmp_path, [row], of, format="messages")
    text = of.render([{"role": m["role"], "content": m["content"]} for m in row["messages"]])
    assert documents.ids(0).tolist() == of.encode(text).ids
    flags = [m.get("train", True) for m in row["messages"] if m["role"] == "assistant"]
    written = re.findall(ASSISTANT_TURN[name], text, re.DOTALL)
    expected = [turn for turn, train in zip(written, flags, strict=True) if train]
    assert supervised_text(documents, 0, text, of) == expected
    assert (documents.labels(0, draw=(0, 0)) == documents.labels(0)).all(), "no labels are drawn but those of paths"

    prompt, target = documents.prompt_and_target(0)
    end = max(m.end() for m, train in zip(re.finditer(ASSISTANT_TURN[name], text, re.DOTALL), flags, strict=True) if train)
    assert [*prompt, *target] == documents.ids(0)[: len(prompt) + len(target)].tolist()
    assert of.encode(text).spans[len(prompt) + len(target) - 1][1] == end
    assert of.decode(target, skip_special_tokens=False).lstrip() == expected[-1]


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>') | last }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns_gives_a_document_a_turn(tmp_path):
    """Pitfall row 8: each answer is trained after the very prompt that will ask for it."""
    of = Tokenizer(tiny_tokenizers.qwen(), THINKING)
    several = ("q", "<think>t</think>one", "r", "<think>u</think>two")
    rows = [turns(*several), turns(*several[:2]), turns(*several, train=(False, True)), turns("q", "plain", "r", "two")]
    documents = load(tmp_path, rows, of, format="messages")
    assert documents.index.tolist() == [0, 0, 1, 2, 3]
    counts = documents.counts
    assert (counts.read, counts.kept, counts.split, counts.dropped) == (4, 4, 1, {})
    first, second = ["<think>t</think>one<|im_end|>"], ["<think>u</think>two<|im_end|>"]
    for i, (row, through, expected) in enumerate(
        [(0, 2, first), (0, 4, second), (1, 2, first), (2, 4, second), (3, 4, ["plain<|im_end|>", "two<|im_end|>"])]
    ):
        text = of.render(rows[row]["messages"][:through])
        assert documents.ids(i).tolist() == of.encode(text).ids
        assert supervised_text(documents, i, text, of) == expected


def test_a_template_that_ends_earlier_turns_differently_gives_a_document_a_turn(tmp_path):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{{ '' if loop.last and m.role == 'assistant' else '<|im_end|>' }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    of = Tokenizer(tiny_tokenizers.qwen(), template)
    documents = load(tmp_path, [turns("q", "one", "r", "two"), turns("q", "one")], of, format="messages")
    assert documents.index.tolist() == [0, 0, 1]
    for i, expected in enumerate(["one", "two", "one"]):  # this template never ends an answer: EOS does
        shown = of.decode([t for t in documents.labels(i) if t >= 0], skip_special_tokens=False)
        assert shown.replace("\n", "") == expected + of.eos_token


def test_a_template_that_changes_the_answer_is_counted(tmp_path):
    of = Tokenizer(tiny_tokenizers.qwen(), "{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}")
    documents = load(tmp_path, [turns("q", "lower"), turns("q", "UPPER")], of, format="messages")
    assert documents.index.tolist() == [1] and len(documents.counts.dropped["template rewrites turns"]) == 1


def test_a_template_that_never_ends_the_turn_gets_eos(tmp_path):
    of = Tokenizer(tiny_tokenizers.qwen(), "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    documents = load(tmp_path, [{"prompt": "p", "completion": "c"}], of, format="prompt")
    assert documents.labels(0)[-1] == of.eos_id and documents.ids(0).tolist().count(of.eos_id) == 1


@EVERY
def test_text_is_supervised_after_its_last_marker_or_everywhere(name, tmp_path):
    of = tokenizer(name)
    text = "Q: one\nA: two\nQ: 물리학\nA: science"
    marked = load(tmp_path, [{"text": text}], of, format="text", response_marker="A:")
    assert marked.ids(0).tolist() == of.encode(text + of.eos_token).ids
    assert supervised_text(marked, 0, text + of.eos_token, of) == [" science" + of.eos_token]
    whole = load(tmp_path, [{"text": text}], of, format="text")
    assert whole.ids(0).tolist() == of.encode(text + of.eos_token).ids
    assert (whole.labels(0)[1:] == whole.ids(0)[1:]).all() and whole.labels(0)[0] == IGNORE


@EVERY
@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("format", GOOD)
def test_a_model_is_asked_with_the_ids_it_was_trained_on(format, chat, name, tmp_path):
    """Pitfall rows 12 and 35: one rendering, one encoder, one BOS."""
    of = tokenizer(name)
    settings = {"format": format, "chat": chat, "response_marker": "\nA:" if format == "text" else None}
    prompt, _ = load(tmp_path, [GOOD[format]], of, **settings).prompt_and_target(0)
    assert of.encode(ask(GOOD[format], DataConfig(**settings), of)).ids == prompt


# ---- too long

LONG = " ".join(f"word{i} 과학 é" for i in range(60))
LONG_ROWS: dict[str, dict] = {
    "paths": {"title": "T", "abstract": LONG, "paths": [["a", "b"], ["a", "物理学"]]},
    "prompt": {"prompt": LONG + "\n", "completion": "the answer 한국어"},
    "messages": turns("short", "first answer", LONG, "second answer"),
    "text": {"text": LONG + "\nA: the answer"},
}
FORMS = [("paths", True), ("paths", False), ("prompt", True), ("prompt", False), ("messages", True), ("text", True)]


@EVERY
@pytest.mark.parametrize("format, chat", FORMS)
@pytest.mark.parametrize("limit", [151, 152, 200])
def test_truncating_shortens_the_prompt_alone(limit, format, chat, name, tmp_path):
    """The response is whole and stays apart from the prompt; the ids are those of tokenising the shortened text at once."""
    of = tokenizer(name)
    settings = {"format": format, "chat": chat, "response_marker": "\nA:" if format == "text" else None}
    documents = load(tmp_path, [LONG_ROWS[format]], of, **settings, too_long="truncate", max_seq_length=limit)
    assert documents.counts.truncated == 1 and "1 kept with a shortened prompt" in table(documents.counts)
    assert limit - 8 <= len(documents.ids(0)) <= limit, "no more is lost than needed"

    whole = build(LONG_ROWS[format], DataConfig(**settings), of)
    assert whole.shorten is not None and LONG in whole.text
    texts = [whole.shorten(length).text for length in range(len(whole.prompt))]
    text = next(text for text in texts if of.encode(text).ids == documents.ids(0).tolist())
    kept = next(i for i in range(len(text)) if text[i] != whole.text[i])
    assert whole.text.endswith(text[kept:]), "the prompt lost its end and nothing else was touched"
    assert supervised_text(documents, 0, text, of)[-1] == whole.text[slice(*whole.supervised[-1])]
    assert len(documents.keep) == len(whole.edges) and set(documents.node.tolist()) - {-1} == set(range(len(whole.edges)))


@EVERY
def test_truncating_leaves_the_line_break_between_prompt_and_response(name, tmp_path):
    of = tokenizer(name)
    for limit in range(100, 130):
        documents = load(tmp_path, [LONG_ROWS["paths"]], of, chat=False, too_long="truncate", max_seq_length=limit)
        text = of.decode(documents.ids(0).tolist())
        head, abstract, *response = text.split("\n")
        assert (head, response) == ("Title: T", ["a -> b", "a -> 物理学", ""]) and LONG.startswith(abstract)
        assert documents.counts.straddling == 0


@EVERY
def test_plain_text_is_cut_at_its_end(name, tmp_path):
    """The rest of a longer text is not there, so nothing says that it ends here: no EOS."""
    of = tokenizer(name)
    documents = load(tmp_path, [{"text": LONG}], of, format="text", too_long="truncate", max_seq_length=50)
    ids = documents.ids(0).tolist()
    assert 42 <= len(ids) <= 50 and of.eos_id not in ids
    assert LONG.startswith(of.decode(ids)) and ids == of.encode(of.decode(ids)).ids


@pytest.mark.parametrize("format", LONG_ROWS)
def test_too_long_rows_are_dropped_or_stop_the_run(format, tmp_path):
    settings = {"format": format, "max_seq_length": 100, "response_marker": "\nA:" if format == "text" else None}
    documents = load(tmp_path, [GOOD[format] | {"text": "Q\nA: a"}, LONG_ROWS[format]], **settings)
    assert documents.index.tolist() == [0]
    (message,) = documents.counts.dropped["longer than 100 tokens"]
    length = len(tokenizer("mistral").encode(build(LONG_ROWS[format], DataConfig(**settings), tokenizer("mistral")).text).ids)
    assert re.match(rf".*rows\.jsonl:2: {length} tokens", message)
    with pytest.raises(UserError, match=rf"data\.too_long=error: .*rows\.jsonl:2: {length} tokens"):
        load(tmp_path, [GOOD[format] | {"text": "Q\nA: a"}, LONG_ROWS[format]], **settings, too_long="error")


@pytest.mark.parametrize("name", ["mistral", "qwen"])
@pytest.mark.parametrize("too_long", ["drop", "truncate"])
@pytest.mark.parametrize("format", LONG_ROWS)
def test_no_document_without_targets(format, too_long, name, tmp_path):
    """Pitfall row 4: whatever the limit, what is kept has its whole last response to learn from."""
    of, marker = tokenizer(name), "\nA:" if format == "text" else None
    whole = build(LONG_ROWS[format], DataConfig(format=format, response_marker=marker), of)
    response = whole.text[slice(*whole.supervised[-1])]
    for limit in range(2, 60, 3):
        rows = [LONG_ROWS[format], GOOD[format]]
        try:
            documents = load(tmp_path, rows, of, format=format, response_marker=marker, too_long=too_long, max_seq_length=limit)
        except UserError:  # nothing fits
            continue
        for i in range(len(documents)):
            for draw in (None, (0, 0)):
                batch = documents.batch([i], draw)
                assert batch.supervised > 0 and batch.lengths[0] <= limit
            if documents.index[i] == 0:
                _, target = documents.prompt_and_target(i)
                assert of.decode(target, skip_special_tokens=False).strip() == response.strip()


def test_a_response_longer_than_the_limit_is_dropped_even_when_truncating(tmp_path):
    rows = [{"prompt": "p", "completion": LONG}, GOOD["prompt"]]
    documents = load(tmp_path, rows, format="prompt", too_long="truncate", max_seq_length=50)
    assert documents.index.tolist() == [1] and documents.counts.truncated == 0
    assert "without its prompt" in documents.counts.dropped["longer than 50 tokens"][0]


# ---- the cache


@pytest.fixture
def calls(monkeypatch, tmp_path) -> list[str]:
    """The texts that were tokenised, with an empty cache to begin with."""
    texts: list[str] = []
    encode = Tokenizer.encode

    def counting(self, text):
        texts.append(text)
        return encode(self, text)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Tokenizer, "encode", counting)
    return texts


ROWS = [GOOD["paths"], "{", {**GOOD["paths"], "paths": [["a", "b"], ["a", "é"]]}]


def test_the_second_load_tokenises_nothing(calls, tmp_path):
    first = load(tmp_path, ROWS)
    assert len(calls) == 2
    second = load(
        tmp_path, ROWS, shuffle=False, num_workers=2, train_size=1, eval_size=1, eval_file="x"
    )  # of no consequence here
    assert len(calls) == 2 and same(first, second)
    assert second.counts.dropped["malformed"][0].startswith(f"{tmp_path / 'rows.jsonl'}:2: ")


@pytest.mark.parametrize(
    "setting",
    [
        {"max_seq_length": 30}, {"too_long": "truncate"}, {"chat": False}, {"edge_dropping": False},
        {"format": "prompt", "prompt_template": "{title}", "response_template": "{abstract}"},
        {"format": "text", "response_marker": None},
    ],
)  # fmt: skip
def test_another_setting_is_another_result(setting, calls, tmp_path):
    rows = [{**GOOD["paths"], "text": "t"}]
    load(tmp_path, rows)
    before = len(calls)
    load(tmp_path, rows, **setting)
    assert len(calls) == before + 1
    load(tmp_path, rows)
    assert len(calls) == before + 1, "and the first result is still there"


def test_another_file_or_tokenizer_is_another_result(calls, tmp_path):
    first = load(tmp_path, ROWS)
    changed = load(tmp_path, [{**GOOD["paths"], "title": "U"}, *ROWS[1:]])
    assert len(calls) == 4 and not same(first, changed)

    copied = tiny_tokenizers.copy(tiny_tokenizers.mistral(), tmp_path / "t")
    assert same(load(tmp_path, ROWS, Tokenizer(copied)), first)
    before = len(calls)
    tiny_tokenizers.copy(copied, tmp_path / "unlegacy", legacy=False)
    load(tmp_path, ROWS, Tokenizer(tmp_path / "unlegacy"))
    load(tmp_path, ROWS, Tokenizer(copied, "{% for m in messages %}{{ m.content }}{% endfor %}"))
    load(tmp_path, ROWS, tokenizer("qwen"))
    assert len(calls) == before + 6


def test_a_damaged_cache_is_made_again(calls, tmp_path):
    first = load(tmp_path, ROWS)
    (cached,) = (tmp_path / "cache").rglob("*.safetensors")
    whole = cached.read_bytes()
    damaged = [whole[:size] for size in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1)]
    damaged += [b"garbage" * 100, safetensors.numpy.save({"tokens": np.zeros(3, np.int32)})]
    for content in damaged:
        cached.write_bytes(content)
        before = len(calls)
        assert same(load(tmp_path, ROWS), first)
        assert len(calls) == before + 2, "taken from a damaged file"
        assert same(load(tmp_path, ROWS), first) and len(calls) == before + 2, "not repaired"


def test_of_several_processes_the_first_does_the_work(calls, tmp_path):
    """Pitfall row 28: ranks start together, and all but one wait for the cache."""
    file = write(tmp_path, [GOOD["paths"]] * 300)
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()

    def rank() -> None:
        documents = load_documents(file, DataConfig(num_workers=1), tokenizer("mistral"), "train_file")
        results.put((len(calls), len(documents)))

    ranks = [fork.Process(target=rank) for _ in range(3)]
    for process in ranks:
        process.start()
    found = sorted(results.get() for _ in ranks)
    for process in ranks:
        process.join()
    assert found == [(0, 300), (0, 300), (300, 300)]


def test_the_number_of_workers_changes_nothing(monkeypatch, tmp_path):
    rng = random.Random(8)
    rows: list[object] = []
    for i in range(2_500):
        rows.append(
            "{"
            if i % 97 == 0
            else {"title": f"t{i}", "abstract": "x " * rng.randint(0, 40), "paths": [["r", f"n{i % 7}"], ["é"]]}
        )
    results = []
    for workers in (1, 3):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache{workers}"))
        results.append(load(tmp_path, rows, num_workers=workers, max_seq_length=50))
    assert same(*results)
    assert results[0].counts.read == 2_500 and 100 < results[0].counts.kept < 2_450
    assert (np.diff(results[0].index) > 0).all()


# ---- batches


@pytest.fixture
def some(tmp_path) -> Documents:
    return load(tmp_path, ["", *({**GOOD["paths"], "paths": [["r", "x", f"n{i}"], ["r", "x"]][: i % 2 + 1]} for i in range(12))])


@pytest.mark.parametrize("draw", [None, (0, 1)])
def test_a_batch_is_its_documents_end_to_end(draw, some):
    which = [7, 0, 11]
    batch = some.batch(which, draw)
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.tokens.tolist() == [t for i in which for t in some.ids(i)]
    assert batch.labels.tolist() == [label for i in which for label in some.labels(i, draw)]
    assert batch.lengths == [len(some.ids(i)) for i in which] == some.lengths[which].tolist()
    assert batch.supervised == sum(label != IGNORE for label in batch.labels.tolist()) > 0
    wanted = batch.labels != IGNORE
    assert torch.equal(batch.labels[wanted], batch.tokens[wanted]), "a label is its token's own id"


def test_a_batch_that_breaks_its_contract_is_refused():
    tokens, labels = torch.arange(5), torch.tensor([IGNORE, 1, 2, IGNORE, 4])
    assert Batch(tokens, [3, 2], labels).supervised == 3
    for lengths in ([3, 1], [3, 3], [2, 3], [5, 0, 1]):
        with pytest.raises(AssertionError):
            Batch(tokens, lengths, labels)
    with pytest.raises(AssertionError):
        Batch(tokens, [3, 2], labels[:4])


def test_prompt_and_target_divide_a_document(some):
    of = tokenizer("mistral")
    prompt, target = some.prompt_and_target(0)
    assert prompt == of.encode("<s>[INST] Title: T\nA [/INST]").ids
    assert [*prompt, *target] == some.ids(0).tolist()
    assert of.decode(target, skip_special_tokens=False) == "r -> x -> n0\n</s>"


def test_a_sample_is_a_function_of_its_seed(some):
    np.random.seed(0)
    first = some.sample(5, 3)
    np.random.seed(1)
    assert some.sample(5, 3).tolist() == first.tolist() == sorted(set(first.tolist()))
    assert len({tuple(some.sample(5, seed)) for seed in range(20)}) > 15
    drawn = np.concatenate([some.sample(5, seed) for seed in range(200)])
    assert set(drawn.tolist()) == set(range(12)) and np.bincount(drawn).min() > 40, "every document has its chance"
    for size in (None, 12, 100):
        assert some.sample(size, 3).tolist() == list(range(12))


# ---- order


def lengths(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(10, 2000, n)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize("n, docs_per_step", [(1, 8), (7, 8), (8, 8), (1003, 8), (1000, 1), (5000, 64)])
def test_every_document_is_met_once_per_epoch(n, docs_per_step, group, shuffle):
    for epoch in range(3):
        order = step_order(lengths(n), docs_per_step, 0, epoch, shuffle, group)
        assert sorted(order.tolist()) == list(range(n))
        assert shuffle or order.tolist() == list(range(n))


@pytest.mark.parametrize("group", [True, False])
def test_the_order_is_a_function_of_seed_and_epoch(group):
    """Pitfall row 27."""
    orders = {}
    for seed in range(3):
        for epoch in range(3):
            np.random.seed(seed + epoch)
            torch.manual_seed(seed + epoch)
            orders[seed, epoch] = tuple(step_order(lengths(400), 8, seed, epoch, True, group))
    assert len(set(orders.values())) == 9
    for (seed, epoch), order in orders.items():
        assert tuple(step_order(lengths(400), 8, seed, epoch, True, group)) == order
    # ranks and micro-steps divide a step among them and have no say in what is in it
    assert set(inspect.signature(step_order).parameters) == {"lengths", "docs_per_step", "seed", "epoch", "shuffle", "group"}


def steps_of(order: np.ndarray, docs_per_step: int) -> list[np.ndarray]:
    return [
        order[start : start + docs_per_step] for start in range(0, len(order) // docs_per_step * docs_per_step, docs_per_step)
    ]


@pytest.mark.parametrize("epoch", [0, 1])
def test_grouping_by_length_puts_similar_lengths_into_a_step(epoch):
    sizes = lengths(1003)
    spread = {}
    for group in (True, False):
        order = step_order(sizes, 8, 0, epoch, True, group)
        spread[group] = np.mean([np.ptp(sizes[step]) for step in steps_of(order, 8)])
    assert spread[True] < spread[False] / 5
    sums = [int(sizes[step].sum()) for step in steps_of(step_order(sizes, 8, 0, epoch, True, True), 8)]
    assert abs(np.corrcoef(sums, range(len(sums)))[0, 1]) < 0.3, "the steps themselves are not in order of length"


def test_the_largest_step_comes_first_of_all():
    """Pitfall row 29: running out of memory happens at once or never."""
    for seed in range(5):
        sizes = lengths(1003, seed)
        sums = [int(sizes[step].sum()) for step in steps_of(step_order(sizes, 8, seed, 0, True, True), 8)]
        assert sums[0] == max(sums)
    first = [sizes[steps_of(step_order(sizes, 8, 0, epoch, True, True), 8)[0]].sum() for epoch in range(1, 20)]
    assert len(set(first)) > 10, "but only once"


@pytest.mark.parametrize("epoch", [0, 1])
def test_the_partial_step_stays_last(epoch):
    plain, grouped = (step_order(lengths(1003), 8, 0, epoch, True, group) for group in (False, True))
    assert grouped[-3:].tolist() == plain[-3:].tolist()


def test_a_null_column_of_a_template_is_malformed(tmp_path):
    """Not the text "None"."""
    documents = load(tmp_path, [{"prompt": "a", "completion": None}, {"prompt": "a", "completion": "b"}], format="prompt")
    assert documents.counts.kept == 1 and "completion" in documents.counts.dropped["malformed"][0]


@pytest.mark.parametrize("row", [{"text": "a b</s>"}, {"prompt": "a ", "completion": "b</s>"}])
def test_eos_is_there_once(row, tmp_path):
    of = tokenizer("mistral")
    documents = load(tmp_path, [row], of, format="text" if "text" in row else "prompt", chat=False)
    assert list(documents.ids(0)).count(of.eos_id) == 1 and documents.labels(0)[-1] == of.eos_id


@pytest.mark.parametrize("value", [float("nan"), None])
def test_a_missing_number_is_no_target(value, tmp_path):
    """pandas writes NaN where it has no number."""
    documents = load(
        tmp_path, [{"prompt": "p", "completion": 1.5}, {"prompt": "p", "completion": value}], tokenizer("qwen"), format="prompt"
    )
    assert documents.index.tolist() == [0] and "completion" in documents.counts.dropped["malformed"][0]


def test_a_null_train_flag_is_none(tmp_path):
    """Parquet has null in every turn without a flag as soon as one has it."""
    flags = [{"train": None}, {"train": None}, {"train": None}, {"train": False}]
    row = {"messages": [m | f for m, f in zip(turns("q", "one", "r", "two")["messages"], flags, strict=True)]}
    of = tokenizer("qwen")
    documents = load(tmp_path, [row], of, format="messages")
    assert supervised_text(documents, 0, of.render(row["messages"]), of) == ["one<|im_end|>"]


@pytest.mark.parametrize("content, message", [(b"", "is empty"), (b" \n", "is empty"), ("{{ x }}".encode("utf-16"), "UTF-8")])
def test_a_template_file_that_is_none(content, message, tmp_path):
    (tmp_path / "t.jinja").write_bytes(content)
    with pytest.raises(UserError, match=f"data.chat_template: .*{message}"):
        chat_template(str(tmp_path / "t.jinja"))


def test_a_turn_that_a_template_cannot_begin_is_one_dropped_row(tmp_path):
    """Qwen's template looks at the first turn: what comes before an assistant's first turn is nothing it can render."""
    rows = [turns("q", "one"), {"messages": turns("q", "one")["messages"][1:]}]
    documents = load(tmp_path, rows, tokenizer("qwen"), format="messages")
    assert documents.index.tolist() == [0]
    assert "rows.jsonl:2: chat template" in documents.counts.dropped["refused by the chat template"][0]


def test_paths_whose_white_space_a_template_changes_are_dropped(tmp_path):
    """Their nodes are places in the text, which would shift."""
    of = Tokenizer(tiny_tokenizers.qwen(), "{% for m in messages %}{{ m.content | indent(2) }}<|im_end|>{% endfor %}")
    rows = [{"title": "T", "abstract": "A", "paths": paths} for paths in ([["a", "b"], ["c", "d"]], [["a", "b"]])]
    documents = load(tmp_path, rows, of)
    assert documents.index.tolist() == [1] and len(documents.counts.dropped["template rewrites turns"]) == 1
