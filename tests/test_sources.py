"""Where rows come from: every kind of file gives the rows of its JSON lines, datasets of the hub, several files with weights."""

import csv
import datetime
import gzip
import io
import json
import random
import re
import shutil
import sys
import zlib
from collections import Counter
from itertools import pairwise
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub.utils import filter_repo_objects

import tiny_tokenizers
import train
from minilora.config import DataConfig, UserError
from minilora.data import Documents, step_order
from minilora.running import cache
from minilora.running.cache import load_documents
from minilora.running.datasets import training_rows
from minilora.running.reading import tokenise
from minilora.running.sources import data_files, lines_of
from minilora.tokenizer import Tokenizer
from tiny_runs import base_model, config, write_paths

ODD = [
    "plain",
    "two\nlines",
    'a "quoted" word',
    "comma, semicolon; pipe |",
    "tab\there",
    "물리학 é 🎵",
    " spaces ",
    "a\u2028b\x85c",
    "0",
]
PROMPT = [{"prompt": text, "completion": f"{i}: {text}", "unused": i} for i, text in enumerate(ODD)]
MESSAGES = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"{text}!"}] * (1 + i % 2)}
    for i, text in enumerate(ODD)
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(tiny_tokenizers.BUILDERS["llama2"]())


def in_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def separated(rows: list[dict], delimiter: str, end: str = "\r\n") -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def parquet(rows: list[dict]) -> bytes:
    """In row groups of two, so that a file has several."""
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out, row_group_size=2)
    return out.getvalue()


NESTED = {
    "x.jsonl": in_lines, "x.jsonl.gz": lambda rows: gzip.compress(in_lines(rows)), "x.txt": in_lines, "lines.json": in_lines,
    "bom.jsonl": lambda rows: b"\xef\xbb\xbf" + in_lines(rows), "crlf.jsonl": lambda rows: in_lines(rows).replace(b"\n", b"\r\n"),
    "list.json": lambda rows: json.dumps(rows, indent=1).encode(), "data.json": lambda rows: json.dumps({"data": rows}).encode(),
    "list.json.gz": lambda rows: gzip.compress(json.dumps(rows).encode()), "x.parquet": parquet,
}  # fmt: skip
FLAT = {
    "x.csv": lambda rows: separated(rows, ","), "x.tsv": lambda rows: separated(rows, "\t"),
    "lf.csv": lambda rows: separated(rows, ",", "\n"), "bom.csv": lambda rows: b"\xef\xbb\xbf" + separated(rows, ","),
    "x.csv.gz": lambda rows: gzip.compress(separated(rows, ",")),
}  # fmt: skip


def load(file: Path, tokenizer: Tokenizer, **settings) -> Documents:
    data = DataConfig(**{"format": "prompt", "num_workers": 1, **settings})
    return tokenise({str(file): data_files(str(file), "train_file")}, data, tokenizer, "train_file")


def arrays(documents: Documents) -> dict[str, np.ndarray]:
    return {name: value for name, value in vars(documents).items() if isinstance(value, np.ndarray)}


def assert_same(a: Documents, b: Documents) -> None:
    assert list(arrays(a)) == list(arrays(b)) and len(arrays(a)) == 7
    for name, value in arrays(a).items():
        assert np.array_equal(value, arrays(b)[name]) and value.dtype == arrays(b)[name].dtype, name


# ---- kinds of files


@pytest.mark.parametrize("format", ["prompt", "messages", "paths"])
def test_every_kind_gives_the_same_documents(format: str, tokenizer: Tokenizer, tmp_path: Path):
    paths = [json.loads(line) for line in write_paths(tmp_path / "p", 9).read_text(encoding="utf-8").splitlines()]
    every: dict[str, list[dict]] = {"prompt": PROMPT, "messages": MESSAGES, "paths": paths}
    rows = every[format]
    for name, content in (NESTED | (FLAT if format == "prompt" else {})).items():
        (tmp_path / name).write_bytes(content(rows))
        documents = load(tmp_path / name, tokenizer, format=format)
        assert (documents.counts.read, documents.counts.kept, documents.counts.dropped) == (9, 9, {}), name
        assert_same(documents, load(tmp_path / "x.jsonl", tokenizer, format=format))
        if format == "prompt":  # and those are the texts that went in
            for i, row in enumerate(rows):
                text = tokenizer.render([{"role": "user", "content": row["prompt"]}]) + row["completion"]
                assert documents.ids(i)[:-1].tolist() == tokenizer.encode(text).ids, name


PLACES = {  # kind: content, line or row numbers of the rows that are dropped, index of the ones that are kept
    "x.csv": (b'prompt,completion\na\nb,c\nd,e,f\n\n"x\ny","z\n\nz"\nlast\n\xef\xbb\xbfp,c', [2, 4, 5, 10], [1, 4, 6]),
    "crlf.csv": (b'prompt,completion\r\n"a\r\nb",c\r\nshort\r\nd,e\r\n', [4], [0, 2]),
    "x.tsv": (b"prompt\tcompletion\nq\ta, b\nq, a\n", [3], [0]),
    "x.jsonl": (b'{"prompt": "a\\n", "completion": "b"}\n{\n\n\x00\n{"prompt": "a", "completion": "b"}', [2, 3, 4], [0, 4]),
    "x.json": (b'[{"prompt": "a",\n"completion": "b"},\n7, {"prompt": "a"}, null]', [2, 3, 4], [0]),
    "lines.json": (b'{"prompt": "a", "completion": "b"}\n{\n{"prompt": "a", "completion": "b"}', [2], [0, 2]),
    "x.parquet": (parquet([{"prompt": "a", "completion": c} for c in ("b", None, "", "c", None)]), [2, 3, 5], [0, 3]),
}


@pytest.mark.parametrize("kind", PLACES)
def test_every_row_is_counted_with_its_place(kind: str, tokenizer: Tokenizer, tmp_path: Path):
    content, numbers, kept = PLACES[kind]
    (tmp_path / kind).write_bytes(content)
    documents = load(tmp_path / kind, tokenizer)
    counts, file = documents.counts, tmp_path / kind
    messages = [message for reason in counts.dropped.values() for message in reason]
    assert sorted(int(re.match(re.escape(f"{file}:") + r"(\d+): .", message)[1]) for message in messages) == numbers  # type: ignore[index]
    assert counts.read == counts.kept + len(messages) == len(kept) + len(numbers) and counts.files == {str(file): counts.read}
    assert documents.index.tolist() == kept


def test_what_csv_may_hold(tokenizer: Tokenizer, tmp_path: Path):
    """Cells beyond the reader's usual limit, NUL, quotes inside, columns nobody wants."""
    big = "word " * 40_000
    rows = [["", big, "c"], ["", "a\0b", "c"], ["7", 'an "old" word', "c"]]
    out = io.StringIO(newline="")
    csv.writer(out).writerows([["", "prompt", "completion"], *rows])
    (tmp_path / "x.csv").write_text(out.getvalue() + 'x,an "odd" word,c\n', encoding="utf-8", newline="")
    raw = [json.loads(line) for _, line in lines_of("x", tmp_path / "x.csv")]
    assert [list(row.values()) for row in raw] == [*rows, ["x", 'an "odd" word', "c"]]


def test_what_parquet_may_hold(tmp_path: Path):
    """Types that JSON lacks become text; so does a date that Python's have no room for."""
    day = datetime.datetime(2020, 2, 3, 4, 5, 6)
    table = pyarrow.table({
        "at": [day, None], "bytes": [b"\xff", b"a"], "list": [[["a"], []], None], "row": [{"k": [1, None]}, None],
        "category": pyarrow.array(["x", "y"]).dictionary_encode(), "number": [1.5, float("nan")],
    })  # fmt: skip
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    first, second = (json.loads(line) for _, line in lines_of("x", tmp_path / "x.parquet"))
    assert first == {
        "at": str(day),
        "bytes": "b'\\xff'",
        "list": [["a"], []],
        "row": {"k": [1, None]},
        "category": "x",
        "number": 1.5,
    }
    assert second["at"] is second["list"] is second["row"] is None and second["category"] == "y"


@pytest.mark.parametrize("kind", [pyarrow.date32(), pyarrow.timestamp("us"), pyarrow.timestamp("ns")], ids=str)
def test_a_date_beyond_pythons_is_no_crash(kind, tokenizer: Tokenizer, tmp_path: Path):
    """Read or refused with the file's name, never a traceback."""
    far = pyarrow.array([2**30 if kind == pyarrow.date32() else 2**62 + 1], kind)
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "completion": ["b"], "at": far}), tmp_path / "x.parquet")
    try:
        assert len(load(tmp_path / "x.parquet", tokenizer)) == 1
    except UserError as error:
        assert str(tmp_path / "x.parquet") in str(error)


def spoilt(content: bytes, seed: int) -> bytes:
    rng, copy = random.Random(seed), bytearray(content)
    for _ in range(20):
        copy[rng.randrange(20, len(copy) - 8)] ^= rng.randrange(1, 256)
    return bytes(copy)


LONG = in_lines([{"prompt": str(random.Random(i).random()), "completion": "c"} for i in range(2000)])
LONG_PARQUET = parquet([json.loads(line) for line in LONG.splitlines()[:200]])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("cut.jsonl.gz", gzip.compress(LONG)[:-100], "ended"),
        ("no.jsonl.gz", LONG, "gzip"),
        ("bad.jsonl.gz", gzip.compress(LONG)[:2000] + b"\0" * 50 + gzip.compress(LONG)[2050:], ""),
        ("cut.parquet", LONG_PARQUET[:2000], "Parquet"),
        ("no.parquet", LONG, "Parquet"),
        ("empty.parquet", b"", "Parquet"),
        ("no.json", b"", "Expecting value"),
        ("half.json", b'[{"prompt": "a", "completion": "b"}, ', "line 1 column"),
        ("several.json", b'{"train": [1], "test": [2]}', "list of rows"),
        ("string.json", b'"text"', "list of rows"),
        ("deep.json", b"[" * 100_000, ""),
        ("latin.csv", "prompt,completion\ncafé,b\n".encode("latin1"), "utf-8"),
        ("twice.csv", b"prompt,completion,prompt\na,b,c\n", "'prompt' twice"),
        ("open.csv", b'prompt,completion\na,"b\n', "end of data"),
    ],
)  # fmt: skip
def test_a_broken_file_is_the_users_error(name: str, content: bytes, words: str, tokenizer: Tokenizer, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path / name))}.*not readable as .*{words}"):
        load(tmp_path / name, tokenizer)


@pytest.mark.parametrize("kind", ["gz", "parquet"])
def test_a_spoilt_file_is_never_a_traceback(kind: str, tmp_path: Path):
    content = gzip.compress(LONG) if kind == "gz" else LONG_PARQUET
    for seed in range(40):
        (tmp_path / f"x.{kind}").write_bytes(spoilt(content, seed))
        try:
            lines_of("x", tmp_path / f"x.{kind}")
        except UserError:
            continue
        except zlib.error as error:
            pytest.fail(f"seed {seed}: {error}")


def test_a_stray_quote_is_named_with_its_line(tokenizer: Tokenizer, tmp_path: Path):
    """One in a thousand rows of somebody's export: refused or dropped, but with the place."""
    (tmp_path / "x.csv").write_bytes(b'prompt,completion\na,b\n"a"b,c\nd,e\n')
    try:
        counts = load(tmp_path / "x.csv", tokenizer).counts
        found = str(counts.dropped)
    except UserError as error:
        found = str(error)
    assert re.search(r"x\.csv:3\b|line 3\b", found), found


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.jsonl", "x.jsonl.gz", "x.parquet"])
def test_a_file_without_rows_is_named(name: str, tokenizer: Tokenizer, tmp_path: Path):
    empty = pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())})
    (tmp_path / name).write_bytes({"x.csv": b"", "x.tsv": b"a\tb\n", "x.jsonl.gz": gzip.compress(b"")}.get(name, b""))
    if name == "x.parquet":
        pyarrow.parquet.write_table(empty, tmp_path / name)
    with pytest.raises(UserError, match=rf"data\.train_file: no row of .*{name}"):
        load_documents(str(tmp_path / name), DataConfig(format="prompt"), tokenizer, "train_file")


def test_a_missing_library_is_named_with_its_remedy(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "x.parquet").write_bytes(LONG_PARQUET)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"x\.parquet.*pyarrow.*minilora\[parquet\]"):
        load(tmp_path / "x.parquet", tokenizer)


@pytest.mark.parametrize(
    "name", ["nowhere.jsonl", "data/trian.jsonl", "./x", "~/no_such_file.csv", "a/b/c.parquet", "o/n.json.gz", "/no/x"]
)
def test_a_misspelt_name_is_no_dataset(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match=rf"data\.eval_file: '{re.escape(name)}' does not exist"):
        data_files(name, "eval_file")


def test_a_directory_is_no_file(tmp_path: Path):
    with pytest.raises(UserError, match=r"data\.train_file: .*is no file"):
        data_files(str(tmp_path), "train_file")


# ---- datasets of the hub, here directories; the real client has its tests in test_hub.py

DATA = "data/{}-0000{}-of-00002.parquet"
REPOSITORIES = {
    "shards": [DATA.format("train", 0), DATA.format("train", 1), DATA.format("test", 0), "README.md"],
    "plain": ["train.jsonl", "validation.jsonl", "test.jsonl", "constraints.jsonl", "dataset_infos.json"],
    "one": ["data.csv", "README.md"],
    "configs": [f"{name}/{split}-00000-of-00001.parquet" for name in ("main", "socratic") for split in ("train", "test")],
    "folders": ["train/0.jsonl", "train/1.jsonl", "test/0.jsonl"],
    "zipped": ["en/train.jsonl.gz", "de/train.jsonl.gz"],
    "Kaggle": ["Train.csv", "Test.csv"],
    "held out": ["data.jsonl", "test.jsonl"],
    "near": ["constraints.jsonl", "latest.jsonl"],
    "val": ["train.jsonl", "val.jsonl"],
    "kinds": ["train.jsonl", "train.parquet"],
    "text": ["train.txt"],
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`hub(layout)` makes every dataset id have those files; returns what was asked for."""

    def stand_in(layout: str) -> list[tuple]:
        store, snapshot, asked = tmp_path / "store" / layout, tmp_path / "snapshot" / layout, []
        for name in REPOSITORIES[layout]:
            (store / name).parent.mkdir(parents=True, exist_ok=True)
            (store / name).write_text(json.dumps({"prompt": name, "completion": "c"}) + "\n")

        def snapshot_download(repository, *, repo_type, revision, allow_patterns):
            asked.append((repository, repo_type, revision))
            for name in filter_repo_objects(REPOSITORIES[layout], allow_patterns=allow_patterns):
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(store / name, snapshot / name)
            return str(snapshot)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return asked

    return stand_in


@pytest.mark.parametrize(
    ("layout", "name", "what", "files"),
    [
        ("shards", "o/n", "train_file", [DATA.format("train", 0), DATA.format("train", 1)]),
        ("shards", "o/n", "eval_file", [DATA.format("test", 0)]),
        ("shards", "o/n", "input", [DATA.format("test", 0)]),
        ("shards", "o/n:test", "train_file", [DATA.format("test", 0)]),
        ("shards", "o/n:data/train-00001*", "train_file", [DATA.format("train", 1)]),
        ("plain", "o/n", "train_file", ["train.jsonl"]),
        ("plain", "o/n", "eval_file", ["validation.jsonl"]),
        ("plain", "o/n:test", "eval_file", ["test.jsonl"]),
        ("plain", "o/n:constraints.jsonl", "train_file", ["constraints.jsonl"]),
        ("one", "o/n", "train_file", ["data.csv"]),
        ("configs", "o/n:main/train*", "train_file", ["main/train-00000-of-00001.parquet"]),
        ("configs", "o/n:socratic/test*", "eval_file", ["socratic/test-00000-of-00001.parquet"]),
        ("folders", "o/n", "train_file", ["train/0.jsonl", "train/1.jsonl"]),
        ("folders", "o/n", "eval_file", ["test/0.jsonl"]),
        ("zipped", "o/n:en", "train_file", ["en/train.jsonl.gz"]),
        ("val", "o/n", "train_file", ["train.jsonl"]),
        ("val", "o/n:val", "eval_file", ["val.jsonl"]),
    ],
)  # fmt: skip
def test_the_files_of_a_dataset(layout: str, name: str, what: str, files: list[str], hub):
    asked = hub(layout)
    for again in range(2):  # with what the first call left in the cache
        found = data_files(name, what)
        assert [shown for shown, _ in found] == [f"o/n/{file}" for file in files], again
        assert [json.loads(path.read_text())["prompt"] for _, path in found] == files
    assert {*asked} == {("o/n", "dataset", None)}


def test_a_revision_may_have_slashes(hub):
    asked = hub("plain")
    for name in ("some-one/n.2@refs/convert/parquet", "some-one/n.2@v1.0:test"):
        data_files(name, "train_file")
    assert [{*asked}, len(asked)] == [
        {("some-one/n.2", "dataset", "refs/convert/parquet"), ("some-one/n.2", "dataset", "v1.0")},
        2,
    ]


@pytest.mark.parametrize(
    ("layout", "name", "what", "message"),
    [
        ("configs", "o/n", "train_file", r"several sets.*o/n:main/\S+ or o/n:socratic/"),
        ("kinds", "o/n", "train_file", r"several sets.*o/n:train\*\.jsonl or o/n:train\*\.parquet"),
        ("one", "o/n", "eval_file", "no validation or .*test file"),
        ("one", "o/n:train", "train_file", "no train file"),
        ("near", "o/n:train", "train_file", "no train file"),
        ("near", "o/n", "eval_file", "no validation or .*test file"),
        ("text", "o/n", "train_file", r"no .*\.jsonl.*\.parquet"),
        ("shards", "o/n:data/dev*", "train_file", r"no data/dev\* file"),
    ],
)
def test_a_dataset_without_such_files(layout: str, name: str, what: str, message: str, hub):
    hub(layout)
    with pytest.raises(UserError, match=rf"data\.{what}: dataset o/n .*{message}"):
        data_files(name, what)


@pytest.mark.parametrize("layout", ["configs", "zipped", "kinds"])
def test_the_choices_that_are_named_are_choices(layout: str, hub):
    """What the message says to write works, and holds no row of another split."""
    hub(layout)
    with pytest.raises(UserError) as error:
        data_files("o/n", "train_file")
    for choice in re.findall(r"o/n:\S+", str(error.value)):
        assert all("train" in shown for shown, _ in data_files(choice.rstrip(","), "train_file")), choice


@pytest.mark.parametrize("layout", ["Kaggle", "held out"])
def test_no_test_file_is_trained_on_unasked(layout: str, hub):
    hub(layout)
    found = [shown for shown, _ in data_files("o/n", "train_file")]
    assert found == [f"o/n/{REPOSITORIES[layout][0]}"]


# ---- several files


SIZES = {"a": 9, "b": 14, "c": 4}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Files of three kinds; rows of the second are blank here and there."""
    home = tmp_path_factory.mktemp("three")
    a, b, c = (write_paths(home / f"{name}.jsonl", size, seed) for seed, (name, size) in enumerate(SIZES.items()))
    lines = b.read_bytes().splitlines(True)
    b.write_bytes(b"".join([b"\n", *lines[:5], b"{\n", *lines[5:], b"\n"]))
    rows = [json.loads(line) for line in c.read_text(encoding="utf-8").splitlines()]
    (home / "c.parquet").write_bytes(parquet(rows))
    return [str(a), str(b), str(home / "c.parquet")]


def rows_of(name: str) -> list[dict | None]:
    """The rows of a file; None for a line that holds none."""
    if name.endswith("parquet"):
        return pyarrow.parquet.read_table(name).to_pylist()
    lines = Path(name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) if line.strip() and line != "{" else None for line in lines]


@pytest.fixture(scope="module")
def mixed(three: list[str], tokenizer: Tokenizer) -> Documents:
    files = {name: data_files(name, "train_file") for name in three}
    return tokenise(files, DataConfig(num_workers=1), tokenizer, "train_file")


def test_several_files_are_one_after_the_other(three: list[str], mixed: Documents, tokenizer: Tokenizer):
    every = [row for name in three for row in rows_of(name)]
    wanted = [i for i, row in enumerate(every) if row is not None]
    assert mixed.index.tolist() == wanted and len({*mixed.index.tolist()}) == sum(SIZES.values())
    assert mixed.counts.files == {name: len(rows_of(name)) for name in three} and mixed.counts.read == len(every)
    for document, i in enumerate(wanted):
        row = every[i]
        assert row is not None and f"Title: {row['title']}\n{row['abstract']}" in tokenizer.decode(mixed.ids(document).tolist())
    (blank,), (torn,) = ({m.split(":")[0] for m in mixed.counts.dropped[r]} for r in ("blank line", "malformed"))
    assert blank == torn == three[1]
    assert [m for m in mixed.counts.dropped["malformed"] if m.startswith(f"{three[1]}:7: ")]


def test_edges_are_counted_over_all_files(three: list[str], mixed: Documents):
    rows = [row for name in three for row in rows_of(name) if row is not None]
    edges = [[edge for path in row["paths"] for edge in pairwise(path)] for row in rows]
    n = Counter(edge for row in edges for edge in row)
    mean = sum(n.values()) / len(n)
    expected = [min(1.0, mean / n[edge]) for row in edges for edge in row]
    assert mixed.keep.tolist() == pytest.approx(expected, rel=1e-12) and min(expected) < 1
    assert np.diff(mixed.keep_offsets).tolist() == [len(row) for row in edges]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (2.0, 0.5, 1.5), (0.25, 3.0, 1.0), (1, 2, 3), (0.999, 0.1, 2.75)])
def test_an_epoch_goes_through_each_file_as_often_as_its_weight_says(weights: tuple, three: list[str], mixed: Documents):
    data = DataConfig(train_file=tuple(three), train_weights=weights)
    rows = training_rows(mixed, data, seed=3)
    times = Counter(rows.tolist())
    starts = np.cumsum([0, *SIZES.values()])
    for i, (size, weight) in enumerate(zip(SIZES.values(), weights, strict=True)):
        mine = [times[j] for j in range(starts[i], starts[i + 1])]
        assert {*mine} <= {int(weight), int(weight) + 1}, "each row as often as any other, or once more"
        assert abs(sum(mine) - weight * size) <= 0.5
    order = rows[step_order(mixed.lengths[rows], 4, 3, 0, shuffle=True, group=True)]
    assert Counter(order.tolist()) == times, "an epoch's order holds them all"
    assert np.array_equal(rows, training_rows(mixed, data, seed=3))
    if any(w % 1 for w in weights):
        assert len({tuple(sorted(training_rows(mixed, data, seed).tolist())) for seed in range(6)}) > 1, "drawn with the seed"


def test_train_size_draws_from_the_weighted_rows(three: list[str], mixed: Documents):
    data = DataConfig(train_file=tuple(three), train_weights=(2.0, 0.5, 1.0), train_size=11)
    whole = Counter(training_rows(mixed, DataConfig(train_file=tuple(three), train_weights=(2.0, 0.5, 1.0)), 0).tolist())
    drawn = [Counter(training_rows(mixed, data, seed).tolist()) for seed in range(30)]
    assert all(d.total() == 11 for d in drawn) and drawn[0] <= whole
    from_first = sum(d[i] for d in drawn for i in range(9)) / (30 * 11)
    assert 18 / 29 - 0.1 < from_first < 18 / 29 + 0.1  # 18 of 29 weighted rows are of the first file


@pytest.mark.parametrize("settings", [{}, {"train__max_steps": 2}])
def test_weights_that_leave_no_row_are_named(settings: dict, three: list[str], tmp_path: Path, hf_llama):
    c = config(tmp_path, base_model(tmp_path / "base"), data__train_weights=(0.01,), **settings)
    with pytest.raises(UserError, match=r"data\.train_weights"):
        train.main(c)
    assert not Path(c.output_dir).exists()


def test_eval_first_are_the_first_rows(three: list[str], tokenizer: Tokenizer, mixed: Documents):
    assert mixed.sample(5, None).tolist() == [0, 1, 2, 3, 4] and mixed.sample(1000, None).tolist() == [*range(len(mixed))]
    assert mixed.sample(5, 0).tolist() != [0, 1, 2, 3, 4] != mixed.sample(5, 1).tolist()


def test_a_preview_goes_on_in_the_next_file(three: list[str], mixed: Documents, tmp_path: Path):
    c = config(tmp_path, base_model(tmp_path / "base"), data__train_file=tuple(three), preview=12)
    assert train.main(c) == 0
    shown = [json.loads(line) for line in (tmp_path / "out" / "preview.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["index"] for row in shown] == mixed.index[:12].tolist()


def test_the_cache_knows_each_file(three: list[str], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real, calls = cache.reading.tokenise, []
    names = [str(shutil.copy(name, tmp_path)) for name in three]
    monkeypatch.setattr(cache.reading, "tokenise", lambda *a: calls.append(a) or real(*a))  # type: ignore[func-returns-value]

    def documents(*names: str, **settings) -> Documents:
        return load_documents(names, DataConfig(num_workers=1, **settings), tokenizer, "train_file")

    first = documents(*names)
    again = documents(*names, train_weights=(1.0, 2.0, 3.0), train_size=3, eval_first=True)
    assert len(calls) == 1, "these settings choose among rows that are there"
    assert_same(first, again)
    assert first.counts == again.counts and list(first.counts.files) == list(again.counts.files) == names
    documents(*reversed(names))
    assert len(calls) == 2, "another order is another index"
    rows = pyarrow.parquet.read_table(names[2]).to_pylist()
    Path(names[2]).write_bytes(parquet(rows[:-1]))
    assert len(documents(*names)) == len(first) - 1 and len(calls) == 3
    Path(names[0]).write_bytes(Path(names[0]).read_bytes() + b"\n")
    assert documents(*names).counts.read == first.counts.read and len(calls) == 4  # one row fewer, one blank line more


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"prompt;completion\na;b\n", "separated by ',', the first line has ';'"),
        ("a.csv", b"prompt\tcompletion\na\tb\n", r"separated by ',', the first line has '\\t'"),
        ("a.csv", "prompt,completion\n가,나\n".encode("cp949"), "save it as UTF-8"),
    ],
)
def test_a_spreadsheets_other_ways_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        lines_of(name, tmp_path / name)
