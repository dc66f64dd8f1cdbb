"""Every kind of file gives the rows of its JSON lines, and a glob its files."""

import csv
import datetime
import gzip
import io
import json
import os
import random
import re
import sys
import zlib
from pathlib import Path

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from helpers.data_rows import same_arrays, to_parquet, tokenizer
from helpers.tiny_runs import write_paths
from minilora.config import DataConfig
from minilora.data.cache import load_documents
from minilora.data.dataset import Documents
from minilora.data.sources import data_files, read_lines
from minilora.data.tokenize import tokenize_files
from minilora.errors import UserError

ODD_TEXTS = [
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
PROMPT_ROWS = [
    {"prompt": text, "completion": f"{i}: {text}", "unused": i} for i, text in enumerate(ODD_TEXTS)
]
CHAT_ROWS = []
for i, text in enumerate(ODD_TEXTS):
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": f"{text}!"}]
    CHAT_ROWS.append({"messages": turns * (1 + i % 2)})


def to_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def to_csv(rows: list[dict], delimiter: str = ",", end: str = "\r\n") -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


BYTE_ORDER_MARK = b"\xef\xbb\xbf"
NESTED_KINDS = {  # file name -> rows, which may hold lists and objects, as its content
    "x.jsonl": to_lines,
    "x.jsonl.gz": lambda rows: gzip.compress(to_lines(rows)),
    "x.txt": to_lines,
    "lines.json": to_lines,
    "bom.jsonl": lambda rows: BYTE_ORDER_MARK + to_lines(rows),
    "crlf.jsonl": lambda rows: to_lines(rows).replace(b"\n", b"\r\n"),
    "list.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "data.json": lambda rows: json.dumps({"data": rows}).encode(),
    "list.json.gz": lambda rows: gzip.compress(json.dumps(rows).encode()),
    "x.parquet": to_parquet,
}
FLAT_KINDS = {  # the same for rows of texts and numbers
    "x.csv": to_csv,
    "x.tsv": lambda rows: to_csv(rows, "\t"),
    "lf.csv": lambda rows: to_csv(rows, end="\n"),
    "bom.csv": lambda rows: BYTE_ORDER_MARK + to_csv(rows),
    "x.csv.gz": lambda rows: gzip.compress(to_csv(rows)),
}


def load(file: Path, **settings) -> Documents:
    data = DataConfig(**{"format": "prompt", "num_workers": 1, **settings})
    files = {str(file): data_files(str(file), "train_file")}
    return tokenize_files(files, data, tokenizer("llama2"), "train_file")


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line.content) for line in read_lines("x", file)]


# ---- kinds of files


@pytest.mark.parametrize("format", ["prompt", "messages", "paths"])
def test_every_kind_gives_the_same_documents(format: str, tmp_path: Path):
    of = tokenizer("llama2")
    lines = write_paths(tmp_path / "p", 9).read_text(encoding="utf-8").splitlines()
    paths_rows = [json.loads(line) for line in lines]
    rows = {"prompt": PROMPT_ROWS, "messages": CHAT_ROWS, "paths": paths_rows}[format]
    kinds = NESTED_KINDS | FLAT_KINDS if format == "prompt" else NESTED_KINDS
    for name, to_content in kinds.items():
        (tmp_path / name).write_bytes(to_content(rows))
        documents = load(tmp_path / name, format=format)
        counts = documents.counts
        assert (counts.read, counts.kept, counts.dropped) == (9, 9, {}), name
        assert same_arrays(documents, load(tmp_path / "x.jsonl", format=format)), name
        if format != "prompt":
            continue
        for i, row in enumerate(rows):  # and those are the texts that went in
            prompt = of.render([{"role": "user", "content": row["prompt"]}])
            ids = of.encode(prompt + row["completion"]).ids
            assert documents.ids(i)[:-1].tolist() == ids, name


# kind -> content, line or row numbers of the rows that are dropped, index of those that are kept
PLACES = {
    "x.csv": (
        b'prompt,completion\na\nb,c\nd,e,f\n\n"x\ny","z\n\nz"\nlast\n\xef\xbb\xbfp,c',
        [2, 4, 5, 10],
        [1, 4, 6],
    ),
    "crlf.csv": (b'prompt,completion\r\n"a\r\nb",c\r\nshort\r\nd,e\r\n', [4], [0, 2]),
    "x.tsv": (b"prompt\tcompletion\nq\ta, b\nq, a\n", [3], [0]),
    "x.jsonl": (
        b'{"prompt": "a\\n", "completion": "b"}\n{\n\n\x00\n{"prompt": "a", "completion": "b"}',
        [2, 3, 4],
        [0, 4],
    ),
    "x.json": (
        b'[{"prompt": "a",\n"completion": "b"},\n7, {"prompt": "a"}, null]',
        [2, 3, 4],
        [0],
    ),
    "lines.json": (
        b'{"prompt": "a", "completion": "b"}\n{\n{"prompt": "a", "completion": "b"}',
        [2],
        [0, 2],
    ),
    "x.parquet": (
        to_parquet([{"prompt": "a", "completion": c} for c in ("b", None, "", "c", None)]),
        [2, 3, 5],
        [0, 3],
    ),
}


@pytest.mark.parametrize("kind", PLACES)
def test_every_row_is_counted_with_its_place(kind: str, tmp_path: Path):
    content, dropped, kept = PLACES[kind]
    file = tmp_path / kind
    file.write_bytes(content)
    documents = load(file)
    counts = documents.counts
    messages = [message for messages in counts.dropped.values() for message in messages]
    place = re.escape(f"{file}:") + r"(\d+): ."
    numbers = [int(re.match(place, message)[1]) for message in messages]  # type: ignore[index]
    assert sorted(numbers) == dropped
    assert counts.read == counts.kept + len(messages) == len(kept) + len(dropped)
    assert counts.files == {str(file): counts.read}
    assert documents.row_index.tolist() == kept


def test_what_csv_may_hold(tmp_path: Path):
    """Cells beyond the reader's usual limit, NUL, quotes inside, a column without a name."""
    big = "word " * 40_000
    rows = [["", big, "c"], ["", "a\0b", "c"], ["7", 'an "old" word', "c"]]
    out = io.StringIO(newline="")
    csv.writer(out).writerows([["", "prompt", "completion"], *rows])
    content = out.getvalue() + 'x,an "odd" word,c\n'
    (tmp_path / "x.csv").write_text(content, encoding="utf-8", newline="")
    read = [list(row.values()) for row in rows_of(tmp_path / "x.csv")]
    assert read == [*rows, ["x", 'an "odd" word', "c"]]


def test_what_parquet_may_hold(tmp_path: Path):
    """Types that JSON lacks become text."""
    day = datetime.datetime(2020, 2, 3, 4, 5, 6)
    table = pyarrow.table(
        {
            "at": [day, None],
            "bytes": [b"\xff", b"a"],
            "list": [[["a"], []], None],
            "row": [{"k": [1, None]}, None],
            "category": pyarrow.array(["x", "y"]).dictionary_encode(),
            "number": [1.5, float("nan")],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    first, second = rows_of(tmp_path / "x.parquet")
    assert first == {
        "at": str(day),
        "bytes": "b'\\xff'",
        "list": [["a"], []],
        "row": {"k": [1, None]},
        "category": "x",
        "number": 1.5,
    }
    assert second["at"] is second["list"] is second["row"] is None
    assert second["category"] == "y"


@pytest.mark.parametrize(
    "kind", [pyarrow.date32(), pyarrow.timestamp("us"), pyarrow.timestamp("ns")], ids=str
)
def test_a_date_beyond_pythons_is_no_crash(kind, tmp_path: Path):
    """Read or refused with the file's name, never a traceback."""
    file = tmp_path / "x.parquet"
    far = pyarrow.array([2**30 if kind == pyarrow.date32() else 2**62 + 1], kind)
    table = pyarrow.table({"prompt": ["a"], "completion": ["b"], "at": far})
    pyarrow.parquet.write_table(table, file)
    try:
        assert len(load(file)) == 1
    except UserError as error:
        assert str(file) in str(error)


# ---- files that cannot be read

LONG_ROWS = [{"prompt": str(random.Random(i).random()), "completion": "c"} for i in range(2000)]
LONG = to_lines(LONG_ROWS)
LONG_GZ = gzip.compress(LONG)
LONG_PARQUET = to_parquet(LONG_ROWS[:200])


def damage(content: bytes, seed: int) -> bytes:
    """Change twenty bytes."""
    rng, copy = random.Random(seed), bytearray(content)
    for _ in range(20):
        copy[rng.randrange(20, len(copy) - 8)] ^= rng.randrange(1, 256)
    return bytes(copy)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("cut.jsonl.gz", LONG_GZ[:-100], "ended"),
        ("no.jsonl.gz", LONG, "gzip"),
        ("bad.jsonl.gz", LONG_GZ[:2000] + b"\0" * 50 + LONG_GZ[2050:], ""),
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
)
def test_a_broken_file_is_the_users_error(name: str, content: bytes, words: str, tmp_path: Path):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"{re.escape(str(file))}.*not readable as .*{words}"):
        load(file)


@pytest.mark.parametrize("kind", ["gz", "parquet"])
def test_a_damaged_file_is_never_a_traceback(kind: str, tmp_path: Path):
    content = LONG_GZ if kind == "gz" else LONG_PARQUET
    for seed in range(40):
        (tmp_path / f"x.{kind}").write_bytes(damage(content, seed))
        try:
            read_lines("x", tmp_path / f"x.{kind}")
        except UserError:
            continue
        except zlib.error as error:
            pytest.fail(f"seed {seed}: {error}")


def test_a_stray_quote_is_named_with_its_line(tmp_path: Path):
    """One in a thousand rows of somebody's export: refused or dropped, but with the place."""
    (tmp_path / "x.csv").write_bytes(b'prompt,completion\na,b\n"a"b,c\nd,e\n')
    try:
        message = str(load(tmp_path / "x.csv").counts.dropped)
    except UserError as error:
        message = str(error)
    assert re.search(r"x\.csv:3\b|line 3\b", message), message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"prompt;completion\na;b\n", "separated by ',', the first line has ';'"),
        ("a.csv", b"prompt\tcompletion\na\tb\n", r"separated by ',', the first line has '\\t'"),
        ("a.csv", "prompt,completion\n가,나\n".encode("cp949"), "save it as UTF-8"),
    ],
)
def test_other_ways_to_write_a_spreadsheet_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_lines(name, tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", b""),
        ("x.tsv", b"a\tb\n"),
        ("x.jsonl", b""),
        ("x.jsonl.gz", gzip.compress(b"", mtime=0)),
        ("x.parquet", None),
    ],
)
def test_a_file_without_rows_is_named(name: str, content: bytes | None, tmp_path: Path):
    if content is None:
        empty = pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())})
        pyarrow.parquet.write_table(empty, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    data = DataConfig(format="prompt")
    with pytest.raises(UserError, match=rf"data\.train_file: no row of .*{name}"):
        load_documents(str(tmp_path / name), data, tokenizer("llama2"), "train_file")


def test_a_missing_library_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "x.parquet").write_bytes(LONG_PARQUET)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"x\.parquet.*pyarrow.*minilora\[parquet\]"):
        load(tmp_path / "x.parquet")


MISSPELT = [
    "nowhere.jsonl",
    "data/trian.jsonl",
    "./x",
    "~/no_such_file.csv",
    "a/b/c.parquet",
    "o/n.json.gz",
    "/no/x",
]


@pytest.mark.parametrize("name", MISSPELT)
def test_a_misspelt_name_is_not_looked_for_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch):
    def snapshot_download(*arguments, **options):
        pytest.fail("asked the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=rf"data\.eval_file: '{re.escape(name)}' does not exist"):
        data_files(name, "eval_file")


def test_a_pipe_is_neither_file_nor_directory(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"data\.train_file: .*is neither a file nor a directory"):
        data_files(str(tmp_path / "pipe"), "train_file")


# ---- globs


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where the hub is asked."""

    def snapshot_download(*arguments, **options):
        pytest.fail("asked the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def test_a_glob_names_every_data_file_that_matches(offline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["b.jsonl", "a.csv", "a/c.jsonl", "a/b/d.jsonl", "a.md", "x[1].jsonl"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}\n")

    def found(pattern: str) -> list[str]:
        files = data_files(pattern, "train_file")
        assert all(Path(shown).samefile(path) for shown, path in files)
        return [shown for shown, _ in files]

    assert found("*.jsonl") == ["b.jsonl", "x[1].jsonl"]
    assert found("[ab].*") == ["a.csv", "b.jsonl"], "a.md is not of a kind that holds rows"
    assert found("**/*.jsonl") == ["a/b/d.jsonl", "a/c.jsonl", "b.jsonl", "x[1].jsonl"]
    assert found(f"{tmp_path}/?/*") == [f"{tmp_path}/a/c.jsonl"]
    assert found("x[1].jsonl") == ["x[1].jsonl"], "a file of that name comes first"
    for pattern in ("c*.jsonl", "*.md", "?"):
        with pytest.raises(UserError, match=r"data\.eval_file: .* matches no data file .*\.jsonl"):
            data_files(pattern, "eval_file")


def test_a_glob_makes_one_set_of_its_files(offline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        row = {"prompt": f"p{i}", "completion": "c"}
        (tmp_path / f"rows-{i}.jsonl").write_text(json.dumps(row) + "\n{\n")
    data = DataConfig(format="prompt", num_workers=1)
    counts = load_documents("rows-*.jsonl", data, tokenizer("llama2"), "train_file").counts
    assert (counts.kept, counts.files) == (3, {"rows-*.jsonl": 6})
    broken = [message.split(": ")[0] for message in counts.dropped["malformed"]]
    assert broken == [f"rows-{i}.jsonl:2" for i in range(3)]
