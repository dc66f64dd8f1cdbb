"""Files of several formats in one run (data.file_formats)."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from helpers.data_rows import GOOD_ROWS, chat_row, same_arrays, tokenizer
from helpers.tiny_runs import write_paths
from minilora.config import Config, DataConfig, RowFormat
from minilora.config_checks import validate
from minilora.data import cache
from minilora.data import tokenize as tokenize_module
from minilora.data.cache import load_documents
from minilora.data.dataset import Documents, dataset_fingerprint
from minilora.data.sources import data_files
from minilora.data.tokenize import format_counts, tokenize_files
from minilora.errors import UserError

FORMATS = {
    "faq.csv": RowFormat(
        format="prompt", prompt_template="### 질문: {q}\n\n### 답변:", response_template=" {a}"
    ),
    "chats.jsonl": RowFormat(format="messages", chat=True),
    "notes.jsonl": RowFormat(format="text", response_marker="A:"),
}
NAMES = ("paths.jsonl", *FORMATS)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a file of each format, and an empty cache."""
    write_paths(tmp_path / "paths.jsonl", 7)
    lines = ["q,a", *[f"why {i}?,because {i}" for i in range(5)], "no answer,"]
    (tmp_path / "faq.csv").write_text("\n".join(lines) + "\n")
    chats = [chat_row(f"q{i}", f"a{i}", "more?", "yes") for i in range(3)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    notes = [GOOD_ROWS["text"], {"text": "without the marker"}]
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in notes))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def load(*names: str, setting: str = "train_file", **settings) -> Documents:
    data = DataConfig(**{"num_workers": 1, "chat": False, **settings})
    return load_documents(names, data, tokenizer("llama2"), setting)


def alone(name: str) -> Documents:
    """Load one file, whose format is that of the whole run."""
    given = FORMATS.get(name, RowFormat())
    names = ("format", "prompt_template", "response_template", "response_marker", "chat")
    settings = {key: getattr(given, key) for key in names if getattr(given, key) is not None}
    return load(name, **settings)


def test_each_file_is_read_in_its_own_format(files):
    together = load(*NAMES, file_formats=FORMATS)
    parts = [alone(name) for name in NAMES]
    assert together.tokens.tolist() == [id for part in parts for id in part.tokens]
    assert together.supervised.tolist() == [s for part in parts for s in part.supervised]
    assert together.edge_index.tolist() == [e for part in parts for e in part.edge_index]

    # the counts of edges are those of the files with paths
    assert together.keep_probability.tolist() == parts[0].keep_probability.tolist()
    assert 0 < together.keep_probability.min() < 1
    first_rows = np.cumsum([0, *(part.counts.read for part in parts)])
    rows = [
        start + row
        for start, part in zip(first_rows, parts, strict=False)
        for row in part.row_index
    ]
    assert together.row_index.tolist() == rows


def test_a_setting_of_draws_needs_one_file_with_paths():
    data = DataConfig(train_file=("a", "b"), format="text", eval_file=None, edge_draw="once")
    with pytest.raises(UserError, match=r"data\.edge_draw"):
        validate(Config(data=data))
    data.file_formats = {"b": RowFormat(format="paths")}
    validate(Config(data=data))


def test_the_table_of_counts_has_each_file(files):
    counts = load(*NAMES, file_formats=FORMATS).counts
    shown = format_counts(counts).splitlines()
    assert shown[:5] == [
        "paths.jsonl, faq.csv, chats.jsonl, notes.jsonl: 18 lines read, 16 kept, 2 dropped",
        "  paths.jsonl: 7 lines read, 7 kept, 0 dropped",
        "  faq.csv: 6 lines read, 5 kept, 1 dropped",
        "  chats.jsonl: 3 lines read, 3 kept, 0 dropped",
        "  notes.jsonl: 2 lines read, 1 kept, 1 dropped",
    ]
    assert any("faq.csv:7: the response is empty" in line for line in shown)
    assert any("notes.jsonl:2: " in line and "'A:'" in line for line in shown)
    one_file = format_counts(load("paths.jsonl").counts)
    assert one_file == "paths.jsonl: 7 lines read, 7 kept, 0 dropped"


def test_evaluation_and_input_files_have_their_formats_too(files):
    of_train = load("faq.csv", format="prompt", prompt_template="{q}", response_template="{a}")
    table = {"faq.csv": RowFormat("prompt", "{q}", "{a}")}
    assert same_arrays(load("faq.csv", setting="eval_file", file_formats=table), of_train)
    found = {"faq.csv": data_files("faq.csv", "input")}
    data = DataConfig(chat=False, num_workers=1, file_formats=table)
    asked = tokenize_files(found, data, tokenizer("llama2"), "input", limit=2)
    assert asked.tokens.tolist() == of_train.tokens[: of_train.offsets[2]].tolist()


def test_the_cache_knows_the_formats_that_hold(files, monkeypatch):
    made: list[str] = []
    real = cache.tokenize_files

    def recording(*arguments):
        made.append(", ".join(arguments[0]))
        return real(*arguments)

    monkeypatch.setattr(cache, "tokenize_files", recording)
    first = load(*NAMES, file_formats=FORMATS)
    changed = {**FORMATS, "notes.jsonl": RowFormat(format="text")}
    second = load(*NAMES, file_formats=changed)
    assert len(made) == 2 and len(second) == len(first) + 1
    everything = np.arange(len(first))
    fingerprints = {dataset_fingerprint(found, everything) for found in (first, second)}
    assert len(fingerprints) == 2, "a resumed run notices"

    assert same_arrays(load(*NAMES, file_formats=FORMATS), first)
    other_file = {**FORMATS, "eval.jsonl": RowFormat(format="text")}
    assert same_arrays(load(*NAMES, file_formats=other_file), first)
    assert len(made) == 2, "formats of files that are not read do not matter"


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_worker_processes_know_the_formats(start, files, monkeypatch):
    monkeypatch.setattr(tokenize_module, "CHUNK_LINES", 2)
    if start == "spawn":
        monkeypatch.setattr(tokenize_module.sys, "platform", "elsewhere")
        pools: list[str] = []

        def spawning(workers, context, initializer, arguments):
            pools.append(context.get_start_method())
            initializer(*arguments)  # what a spawned process does first, here without its start
            fork = multiprocessing.get_context("fork")
            return ProcessPoolExecutor(workers, fork)

        monkeypatch.setattr(tokenize_module, "ProcessPoolExecutor", spawning)
    in_workers = load(*NAMES, file_formats=FORMATS, num_workers=2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(files / "another_cache"))
    assert same_arrays(in_workers, load(*NAMES, file_formats=FORMATS))
    if start == "spawn":
        assert pools == ["spawn"]


def test_a_file_that_is_named_twice_is_an_error(files):
    with pytest.raises(UserError, match=r"paths\.jsonl belongs to both 'paths\.jsonl' and 'p\*"):
        load("paths.jsonl", "p*.jsonl")


@pytest.mark.parametrize("group", ["mix/*.jsonl", "mix", "mix:*.jsonl"])
def test_a_file_with_a_format_of_its_own_is_an_exception(group, files):
    (files / "mix").mkdir()
    for name in ("paths.jsonl", "chats.jsonl"):
        (files / name).rename(files / "mix" / name)
    table = {"mix/chats.jsonl": FORMATS["chats.jsonl"]}
    for names in ((group, "mix/chats.jsonl"), ("mix/chats.jsonl", group)):
        counts = load(*names, file_formats=table).counts
        assert counts.files == counts.kept_of == {group: 7, "mix/chats.jsonl": 3}
