"""Rows to token ids: what becomes of every line, too long examples, several files, workers."""

import json
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from helpers import tiny_tokenizers
from helpers.data_rows import (
    EVERY_TOKENIZER,
    GOOD_ROWS,
    THREE_FILES,
    are_same,
    build_example,
    chat_row,
    load_rows,
    supervised_text,
    tokenizer,
    write_three_files,
)
from minilora.config import DataConfig
from minilora.data.cache import load_documents
from minilora.data.dataset import NO_EDGE, Documents, LabelDraw
from minilora.data.sources import data_files
from minilora.data.tokenize import format_counts, tokenize_files
from minilora.errors import UserError

# ---- every line is counted

PATHS = GOOD_ROWS["paths"]
LONG_COLUMN = "long " * 100
# format -> (line, reason it is dropped for, what its message names)
BAD_ROWS: dict[str, list[tuple]] = {
    "paths": [
        (b'{"title": "T", ', "malformed", "not JSON"),
        (b'{"title": "\xff\xfe"}', "malformed", "not JSON"),
        (b"[" * 100_000, "malformed", "not JSON"),
        ("[1, 2]", "malformed", "object"),
        ("null", "malformed", "object"),
        ({**PATHS, "title": 5}, "malformed", "title"),
        ({**PATHS, "abstract": None}, "malformed", "abstract"),
        ({"abstract": "A", "paths": [["a"]]}, "malformed", "title"),
        ({"title": "T", "abstract": "A"}, "malformed", "paths"),
        ({**PATHS, "paths": "a -> b"}, "malformed", "paths"),
        ({**PATHS, "paths": [["a", "b"], []]}, "malformed", "paths"),
        ({**PATHS, "paths": [["a"], ["a", 5]]}, "malformed", r'"paths"\[1\]\[1\]'),
        ({**PATHS, "paths": [["a", "b\nc"]]}, "malformed", r'"paths"\[0\]\[1\]'),
        ({**PATHS, "paths": [["a -> b"]]}, "malformed", r'"paths"\[0\]\[0\]'),
        ({**PATHS, "paths": [["a", " "]]}, "malformed", r'"paths"\[0\]\[1\]'),
        (
            r'{"title": "\ud800", "abstract": "A", "paths": [["a"]]}',
            "malformed",
            "surrogate|UTF-8|Unicode",
        ),
        ("", "blank line", ""),
        (" \t", "blank line", ""),
        ({**PATHS, "paths": []}, "empty response", "response"),
        (
            {**PATHS, "abstract": LONG_COLUMN},
            "longer than 64 tokens",
            "tokens.*data.max_seq_length",
        ),
    ],
    "prompt": [
        ({"prompt": "p"}, "malformed", "completion"),
        ({"completion": "c"}, "malformed", "prompt"),
        ({"prompt": "p", "completion": " \n"}, "empty response", "response"),
        ({"prompt": LONG_COLUMN, "completion": "c"}, "longer than 64 tokens", "tokens"),
    ],
    "messages": [
        ({"text": "x"}, "malformed", "messages"),
        ({"messages": []}, "malformed", "messages"),
        ({"messages": "hello"}, "malformed", "messages"),
        ({"messages": [{"role": "user"}]}, "malformed", r'"messages"\[0\].*content'),
        ({"messages": [{"content": "x"}]}, "malformed", r'"messages"\[0\].*role'),
        (
            {"messages": [*chat_row("q")["messages"], {"role": "assistant", "content": ["a"]}]},
            "malformed",
            r'"messages"\[1\]',
        ),
        (chat_row("q", "a", train=(1,)), "malformed", r'\[1\]\["train"\]'),
        (chat_row("q"), "empty response", "assistant"),
        (chat_row("q", "a", train=(False,)), "empty response", "assistant"),
        (chat_row("q", " "), "empty response", "assistant"),
    ],
    "text": [
        ({"content": "x"}, "malformed", "text"),
        ({"text": None}, "malformed", "text"),
        ({"text": "no marker at all"}, "no response marker", "response_marker"),
        ({"text": "Q: q\nA: "}, "empty response", "text"),
        ({"text": ""}, "empty response", "text"),
    ],
}


@pytest.mark.parametrize("format", BAD_ROWS)
def test_every_line_is_counted_with_its_place_and_field(format, tmp_path):
    bad = BAD_ROWS[format]
    rows = [GOOD_ROWS[format], *(line for line, _, _ in bad), GOOD_ROWS[format]]
    marker = "A: " if format == "text" else None
    documents = load_rows(tmp_path, rows, format=format, max_seq_length=64, response_marker=marker)
    counts = documents.counts
    assert counts.read == len(rows)
    assert counts.kept == len(documents) == counts.read - sum(map(len, counts.dropped.values()))
    assert documents.row_index.tolist() == [0, len(rows) - 1]

    shown = format_counts(counts)
    assert f"{len(rows)} lines read, 2 kept, {len(rows) - 2} dropped" in shown
    file = re.escape(str(tmp_path / "rows.jsonl"))
    for number, (_, reason, field) in enumerate(bad, start=2):
        pattern = rf"{file}:{number}: .*({field})"
        assert any(re.match(pattern, message) for message in counts.dropped[reason]), (
            number,
            reason,
            field,
        )
    for reason, messages in counts.dropped.items():
        assert f"{len(messages)} {reason}" in shown
        assert all(message in shown for message in messages[:3])


def test_the_table_shows_three_of_many_messages(tmp_path):
    shown = format_counts(load_rows(tmp_path, [PATHS, *[""] * 10]).counts)
    assert "10 blank line" in shown and "and 7 more" in shown
    assert "rows.jsonl:4:" in shown and "rows.jsonl:5:" not in shown


def test_unicode_line_separators_and_windows_line_ends_break_nothing(tmp_path):
    abstract = "one\u2028two\u2029three\x85four\x1cfive\x0bsix"
    row = {"title": "T", "abstract": abstract, "paths": [["a", "b\u2028c"]]}
    line = json.dumps(row, ensure_ascii=False).encode()
    assert "\u2028".encode() in line
    plain = load_rows(tmp_path, [line, PATHS])
    assert plain.counts.read == plain.counts.kept == 2
    decoded = tokenizer("mistral").decode(plain.ids(0))
    assert abstract in decoded and "b\u2028c" in decoded

    windows = load_rows(tmp_path, [line + b"\r", json.dumps(PATHS).encode() + b"\r"])
    assert are_same(windows, plain)


def test_a_byte_order_mark_and_a_missing_last_newline_lose_no_row(tmp_path):
    line = json.dumps(PATHS).encode()
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + line + b"\n" + line)
    data = DataConfig(num_workers=1)
    documents = load_documents(str(file), data, tokenizer("mistral"), "train_file")
    assert documents.counts.read == documents.counts.kept == 2
    assert documents.ids(0).tolist() == documents.ids(1).tolist()


def test_the_number_of_workers_changes_nothing(monkeypatch, tmp_path):
    rng = random.Random(8)
    rows: list[object] = []
    for i in range(2_500):
        if i % 97 == 0:
            rows.append("{")
            continue
        abstract = "x " * rng.randint(0, 40)
        paths = [["r", f"n{i % 7}"], ["é"]]
        rows.append({"title": f"t{i}", "abstract": abstract, "paths": paths})

    results = []
    for workers in (1, 3):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache{workers}"))
        results.append(load_rows(tmp_path, rows, num_workers=workers, max_seq_length=50))
    one, three = results
    assert are_same(one, three)
    assert one.counts.read == 2_500 and 100 < one.counts.kept < 2_450
    assert (np.diff(one.row_index) > 0).all()


# ---- too long examples

LONG = " ".join(f"word{i} 과학 é" for i in range(60))
LONG_ROWS: dict[str, dict] = {
    "paths": {"title": "T", "abstract": LONG, "paths": [["a", "b"], ["a", "物理学"]]},
    "prompt": {"prompt": LONG + "\n", "completion": "the answer 한국어"},
    "messages": chat_row("short", "first answer", LONG, "second answer"),
    "text": {"text": LONG + "\nA: the answer"},
}
SHORT_ROWS = {**GOOD_ROWS, "text": {"text": "Q\nA: a"}}
# (format, chat)
FORMS = [
    ("paths", True),
    ("paths", False),
    ("prompt", True),
    ("prompt", False),
    ("messages", True),
    ("text", True),
]


def marker_of(format: str) -> str | None:
    return "\nA:" if format == "text" else None


LIMITS = [151, 152, 200]


def truncations() -> list[tuple]:
    """(limit, format, chat, tokenizer): each form with each tokenizer, each limit with both."""
    cases = []
    for i, name in enumerate(tiny_tokenizers.BUILDERS):
        for j, (format, chat) in enumerate(FORMS):
            cases.append((LIMITS[(i + j) % 3], format, chat, name))
    return cases


@pytest.mark.parametrize("limit, format, chat, name", truncations())
def test_truncating_shortens_the_prompt_alone(limit, format, chat, name, tmp_path):
    """The ids are those of tokenizing the shortened text at once."""
    of = tokenizer(name)
    row = LONG_ROWS[format]
    settings = {"format": format, "chat": chat, "response_marker": marker_of(format)}
    documents = load_rows(
        tmp_path, [row], of, **settings, too_long="truncate", max_seq_length=limit
    )
    assert documents.counts.truncated == 1
    assert "1 kept with a shortened prompt" in format_counts(documents.counts)
    assert limit - 8 <= len(documents.ids(0)) <= limit, "no more is lost than needed"

    whole = build_example(row, DataConfig(**settings), of)
    assert whole.shorten is not None and LONG in whole.text
    ids = documents.ids(0).tolist()
    texts = (whole.shorten(length).text for length in range(len(whole.prompt)))
    text = next(text for text in texts if of.encode(text).ids == ids)
    kept = next(i for i in range(len(text)) if text[i] != whole.text[i])
    assert whole.text.endswith(text[kept:]), "the prompt lost its end and nothing else changed"
    response = whole.text[slice(*whole.supervised[-1])]
    assert supervised_text(documents, 0, text, of)[-1] == response
    assert len(documents.keep_probability) == len(whole.edges)
    occurrences = set(documents.edge_index.tolist()) - {NO_EDGE}
    assert occurrences == set(range(len(whole.edges)))


@pytest.mark.parametrize("limit", [20, 31, 50])
def test_truncating_loses_no_token_more_than_needed(limit, tmp_path):
    """Each word of this prompt is one token, so every length can be reached."""
    row = {"prompt": " ".join(["the"] * 100), "completion": "of"}
    settings = {"format": "prompt", "too_long": "truncate", "max_seq_length": limit}
    documents = load_rows(tmp_path, [row], tokenizer("mistral"), **settings)
    assert documents.lengths.tolist() == [limit]


@EVERY_TOKENIZER
def test_truncating_leaves_the_line_break_between_prompt_and_response(name, tmp_path):
    of = tokenizer(name)
    settings = {"chat": False, "too_long": "truncate"}
    for limit in range(100, 130):
        documents = load_rows(tmp_path, [LONG_ROWS["paths"]], of, **settings, max_seq_length=limit)
        text = of.decode(documents.ids(0).tolist())
        head, abstract, *response = text.split("\n")
        assert (head, response) == ("Title: T", ["a -> b", "a -> 物理学", ""])
        assert LONG.startswith(abstract)
        assert documents.counts.straddling == 0


@EVERY_TOKENIZER
def test_plain_text_is_cut_at_its_end(name, tmp_path):
    """The rest of a longer text is missing, so nothing says that it ends here: no EOS."""
    of = tokenizer(name)
    settings = {"format": "text", "too_long": "truncate", "max_seq_length": 50}
    documents = load_rows(tmp_path, [{"text": LONG}], of, **settings)
    ids = documents.ids(0).tolist()
    assert 42 <= len(ids) <= 50 and of.eos_id not in ids
    assert LONG.startswith(of.decode(ids)) and ids == of.encode(of.decode(ids)).ids


@pytest.mark.parametrize("format", LONG_ROWS)
def test_too_long_rows_are_dropped_or_stop_the_run(format, tmp_path):
    of = tokenizer("mistral")
    rows = [SHORT_ROWS[format], LONG_ROWS[format]]
    settings = {"format": format, "max_seq_length": 100, "response_marker": marker_of(format)}
    documents = load_rows(tmp_path, rows, **settings)
    assert documents.row_index.tolist() == [0]
    (message,) = documents.counts.dropped["longer than 100 tokens"]
    example = build_example(LONG_ROWS[format], DataConfig(**settings), of)
    length = len(of.encode(example.text).ids)
    assert re.match(rf".*rows\.jsonl:2: {length} tokens", message)

    with pytest.raises(UserError, match=rf"data\.too_long=error: .*rows\.jsonl:2: {length} tokens"):
        load_rows(tmp_path, rows, **settings, too_long="error")


@pytest.mark.parametrize("name", ["mistral", "qwen"])
@pytest.mark.parametrize("too_long", ["drop", "truncate"])
@pytest.mark.parametrize("format", LONG_ROWS)
def test_every_document_has_its_whole_last_response(format, too_long, name, tmp_path):
    """Whatever the limit, what is kept has something to learn from."""
    of, marker = tokenizer(name), marker_of(format)
    whole = build_example(LONG_ROWS[format], DataConfig(format=format, response_marker=marker), of)
    response = whole.text[slice(*whole.supervised[-1])]
    rows = [LONG_ROWS[format], GOOD_ROWS[format]]
    settings = {"format": format, "response_marker": marker, "too_long": too_long}
    for limit in range(2, 60, 3):
        try:
            documents = load_rows(tmp_path, rows, of, **settings, max_seq_length=limit)
        except UserError:  # nothing fits
            continue
        for i in range(len(documents)):
            for draw in (None, LabelDraw(0, 0)):
                batch = documents.batch([i], draw)
                assert batch.num_supervised > 0 and batch.lengths[0] <= limit
            if documents.row_index[i] == 0:
                _, target = documents.prompt_and_target(i)
                decoded = of.decode(target, skip_special_tokens=False)
                assert decoded.strip() == response.strip()


def test_a_response_longer_than_the_limit_is_dropped_even_when_truncating(tmp_path):
    rows = [{"prompt": "p", "completion": LONG}, GOOD_ROWS["prompt"]]
    settings = {"format": "prompt", "too_long": "truncate", "max_seq_length": 50}
    documents = load_rows(tmp_path, rows, **settings)
    assert documents.row_index.tolist() == [1] and documents.counts.truncated == 0
    assert "without its prompt" in documents.counts.dropped["longer than 50 tokens"][0]


# ---- several files


@pytest.fixture(scope="module")
def three_files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_three_files(tmp_path_factory.mktemp("three"))


@pytest.fixture(scope="module")
def three_tokenized(three_files: list[str]) -> Documents:
    files = {name: data_files(name, "train_file") for name in three_files}
    return tokenize_files(files, DataConfig(num_workers=1), tokenizer("llama2"), "train_file")


def rows_of(name: str) -> list[dict | None]:
    """The rows of a file; None for a line that holds none."""
    if name.endswith("parquet"):
        return pyarrow.parquet.read_table(name).to_pylist()
    lines = Path(name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) if line.strip() and line != "{" else None for line in lines]


def test_several_files_follow_each_other(three_files, three_tokenized):
    documents, counts = three_tokenized, three_tokenized.counts
    rows = [row for name in three_files for row in rows_of(name)]
    usable = [i for i, row in enumerate(rows) if row is not None]
    assert documents.row_index.tolist() == usable
    assert len({*documents.row_index.tolist()}) == sum(THREE_FILES.values())
    assert counts.files == {name: len(rows_of(name)) for name in three_files}
    assert counts.read == len(rows)

    for document, i in enumerate(usable):
        row = rows[i]
        text = tokenizer("llama2").decode(documents.ids(document).tolist())
        assert row is not None and f"Title: {row['title']}\n{row['abstract']}" in text

    for reason in ("blank line", "malformed"):
        names = {message.split(":")[0] for message in counts.dropped[reason]}
        assert names == {three_files[1]}
    assert any(m.startswith(f"{three_files[1]}:7: ") for m in counts.dropped["malformed"])


def test_edges_are_counted_over_all_files(three_files, three_tokenized):
    rows = [row for name in three_files for row in rows_of(name) if row is not None]
    edges = [[edge for path in row["paths"] for edge in pairwise(path)] for row in rows]
    n = Counter(edge for row in edges for edge in row)
    mean = sum(n.values()) / len(n)
    expected = [min(1.0, mean / n[edge]) for row in edges for edge in row]
    assert three_tokenized.keep_probability.tolist() == pytest.approx(expected, rel=1e-12)
    assert min(expected) < 1
    assert np.diff(three_tokenized.keep_offsets).tolist() == [len(row) for row in edges]


@pytest.mark.parametrize("limit", [0, 4, 9, 15, 16, 27, 99])
def test_a_limit_takes_the_first_rows_that_are_not_blank(limit, three_files):
    files = {name: data_files(name, "input") for name in three_files}
    data = DataConfig(num_workers=1)
    documents = tokenize_files(files, data, tokenizer("llama2"), "input", limit)
    # the rows of all files, among them a broken one, which counts as a row
    rows = [row for name in three_files for row in lines_of(name)]
    taken = [i for i, row in enumerate(rows) if row != b""][:limit]
    assert documents.counts.read - len(documents.counts.dropped.get("blank line", ())) == len(taken)
    assert documents.row_index.tolist() == [i for i in taken if rows[i] != b"{"]


def lines_of(name: str) -> list[bytes]:
    """The lines of a file as they are; of a Parquet file one per row."""
    if name.endswith("parquet"):
        return [b"row"] * pyarrow.parquet.read_table(name).num_rows
    return Path(name).read_bytes().splitlines()
