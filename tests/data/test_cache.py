"""The cache of tokenized files, and the errors of a setting's files."""

import multiprocessing
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import safetensors.numpy

from helpers import tiny_tokenizers
from helpers.data_rows import (
    GOOD_ROWS,
    are_same,
    load_rows,
    to_parquet,
    tokenizer,
    write_rows,
    write_three_files,
)
from minilora.config import DataConfig
from minilora.data import cache
from minilora.data.cache import load_documents
from minilora.data.dataset import Documents
from minilora.data.tokenizer import Tokenizer
from minilora.errors import UserError

ROWS = [
    GOOD_ROWS["paths"],
    "{",
    {**GOOD_ROWS["paths"], "paths": [["a", "b"], ["a", "é"]]},
]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The texts that were tokenized, with an empty cache to begin with."""
    texts: list[str] = []
    encode = Tokenizer.encode

    def recording(self, text):
        texts.append(text)
        return encode(self, text)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Tokenizer, "encode", recording)
    return texts


# ---- what is kept, and what is made again


def test_the_second_load_tokenizes_nothing(encoded, tmp_path):
    first = load_rows(tmp_path, ROWS)
    assert len(encoded) == 2
    unrelated = {"shuffle": False, "num_workers": 2, "train_size": 1, "eval_size": 1}
    of_draws = {"edge_dropping": False, "edge_draw": "once"}
    second = load_rows(tmp_path, ROWS, **unrelated, **of_draws, eval_file="x")
    assert len(encoded) == 2 and are_same(first, second)
    assert second.edges == [("a", "b"), ("a", "é")] and second.edge_ids.tolist() == [0, 0, 1]
    message = second.counts.dropped["malformed"][0]
    assert message.startswith(f"{tmp_path / 'rows.jsonl'}:2: ")


@pytest.mark.parametrize(
    "setting",
    [
        {"max_seq_length": 30},
        {"too_long": "truncate"},
        {"chat": False},
        {"format": "prompt", "prompt_template": "{title}", "response_template": "{abstract}"},
        {"format": "text", "response_marker": None},
    ],
)
def test_another_setting_is_another_result(setting, encoded, tmp_path):
    rows = [{**GOOD_ROWS["paths"], "text": "t"}]
    load_rows(tmp_path, rows)
    before = len(encoded)
    load_rows(tmp_path, rows, **setting)
    assert len(encoded) == before + 1
    load_rows(tmp_path, rows)
    assert len(encoded) == before + 1, "and the first result is still there"


def test_another_file_or_tokenizer_is_another_result(encoded, tmp_path):
    first = load_rows(tmp_path, ROWS)
    changed = load_rows(tmp_path, [{**GOOD_ROWS["paths"], "title": "U"}, *ROWS[1:]])
    assert len(encoded) == 4 and not are_same(first, changed)

    copied = tiny_tokenizers.copy(tiny_tokenizers.mistral(), tmp_path / "t")
    assert are_same(load_rows(tmp_path, ROWS, Tokenizer(copied)), first)
    before = len(encoded)
    tiny_tokenizers.copy(copied, tmp_path / "unlegacy", legacy=False)
    load_rows(tmp_path, ROWS, Tokenizer(tmp_path / "unlegacy"))
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    load_rows(tmp_path, ROWS, Tokenizer(copied, template))
    load_rows(tmp_path, ROWS, tokenizer("qwen"))
    assert len(encoded) == before + 6


def test_each_of_several_files_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    of = tokenizer("llama2")
    names = write_three_files(tmp_path)
    real, calls = cache.tokenize_files, []

    def recording(*arguments):
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(cache, "tokenize_files", recording)

    def load(*names: str, **settings) -> Documents:
        return load_documents(names, DataConfig(num_workers=1, **settings), of, "train_file")

    first = load(*names)
    again = load(*names, train_weights=(1.0, 2.0, 3.0), train_size=3, eval_first=True)
    assert len(calls) == 1, "these settings pick among rows that are there"
    assert are_same(first, again)
    assert list(first.counts.files) == list(again.counts.files) == names

    load(*reversed(names))
    assert len(calls) == 2, "another order is another row_index"
    rows = pyarrow.parquet.read_table(names[2]).to_pylist()
    Path(names[2]).write_bytes(to_parquet(rows[:-1]))
    assert len(load(*names)) == len(first) - 1 and len(calls) == 3
    Path(names[0]).write_bytes(Path(names[0]).read_bytes() + b"\n")
    # one row fewer, one blank line more
    assert load(*names).counts.read == first.counts.read and len(calls) == 4


def test_a_damaged_cache_is_made_again(encoded, tmp_path):
    first = load_rows(tmp_path, ROWS)
    (cached,) = (tmp_path / "cache").rglob("*.safetensors")
    whole = cached.read_bytes()
    damaged = [whole[:size] for size in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1)]
    damaged += [b"garbage" * 100, safetensors.numpy.save({"tokens": np.zeros(3, np.int32)})]
    for content in damaged:
        cached.write_bytes(content)
        before = len(encoded)
        again = load_rows(tmp_path, ROWS)
        assert are_same(again, first)
        assert len(encoded) == before + 2, "taken from a damaged file"
        assert are_same(load_rows(tmp_path, ROWS), first)
        assert len(encoded) == before + 2, "not repaired"


def test_of_several_processes_the_first_does_the_work(encoded, tmp_path):
    """Ranks start together, and all but one wait for the cache."""
    file = write_rows(tmp_path, [GOOD_ROWS["paths"]] * 300)
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()

    def rank() -> None:
        data = DataConfig(num_workers=1)
        documents = load_documents(file, data, tokenizer("mistral"), "train_file")
        results.put((len(encoded), len(documents)))

    processes = [fork.Process(target=rank) for _ in range(3)]
    for process in processes:
        process.start()
    found = sorted(results.get() for _ in processes)
    for process in processes:
        process.join()
    assert found == [(0, 300), (0, 300), (300, 300)]


# ---- errors


@pytest.mark.parametrize("cached", [False, True])
def test_strict_stops_at_the_first_row_that_would_be_dropped(cached, tmp_path):
    rows = [GOOD_ROWS["paths"], {"title": "T"}, "", "{"]
    if cached:
        load_rows(tmp_path, rows)
    with pytest.raises(UserError, match=r"strict.*rows\.jsonl:2: .*paths"):
        load_rows(tmp_path, rows, strict=True)
    assert len(load_rows(tmp_path, [GOOD_ROWS["paths"]], strict=True)) == 1


@pytest.mark.parametrize("rows", [[], [""], ["{"], [{"title": 1}]])
def test_a_file_without_a_usable_row_is_the_users_error(rows, tmp_path):
    with pytest.raises(UserError, match=r"data\.train_file.*rows\.jsonl"):
        load_rows(tmp_path, rows)


def test_a_missing_file_is_named(tmp_path):
    missing = str(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match=r"data\.eval_file.*nowhere\.jsonl"):
        load_documents(missing, DataConfig(), tokenizer("mistral"), "eval_file")
