"""Where rows come from: JSON lines, JSON, CSV and Parquet, also gzipped, on disk or in a dataset repository of the hub.

Whatever the file, a row leaves here as one line of JSON, so that everything after knows a single form.
"""

import csv
import fnmatch
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

from minilora.config import UserError
from minilora.weights import fetch

SUFFIXES = (*(kind + gz for kind in (".jsonl", ".json", ".csv", ".tsv") for gz in ("", ".gz")), ".parquet")
LABELS = {"train_file": "data.train_file", "eval_file": "data.eval_file", "input": "--input"}
# names of splits, as words of a file's name or else of its folders'; and which of them a setting takes, the first that is there
WORDS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev", "eval"), "test": ("test", "testing")}
SPLITS = {"train_file": ("train",), "eval_file": ("validation", "test"), "input": ("test",)}

Files = dict[str, list[tuple[str, Path]]]  # what a setting names -> its files, see `data_files`
Line = tuple[int, bytes | str]  # number in the file from 1 and the row as JSON, or (a str) what is wrong with it


def data_files(name: str, what: str) -> list[tuple[str, Path]]:
    """(name to show, file) of what a setting names: a file, or `owner/name[@revision][:split or glob]` on the hub.

    Of a dataset without a split or glob, train_file takes the training split (all files, if none is named after a split),
    eval_file the validation or test split. Raises UserError.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return [(name, path)]
    if path.exists():
        raise UserError(f"{LABELS[what]}: {name!r} is no file")
    if not (found := on_hub(name)):
        raise UserError(f"{LABELS[what]}: {name!r} does not exist")
    return _from_hub(found[1], found[2], found[3], what)


def on_hub(name: str) -> re.Match | None:
    """Repository, revision, and split or glob, of a dataset on the hub; None for the name of a file."""
    found = re.fullmatch(r"(\w[\w.-]*/[\w.-]+?)(?:@([\w./-]+))?(?::(.+))?", name)
    return found if found and (found[3] or not name.lower().endswith((*SUFFIXES, ".txt"))) else None


def _from_hub(repository: str, revision: str | None, wanted: str | None, what: str) -> list[tuple[str, Path]]:
    def fetched(patterns: list[str]) -> list[tuple[Path, Path]]:
        """(name in the repository, local file) of the data files that match, through the hub's cache."""
        root = fetch(repository, revision, patterns, f"{LABELS[what]}: {repository!r} is no file", kind="dataset")
        files = sorted(p for p in root.rglob("*") if p.is_file() and p.name.lower().endswith(SUFFIXES))
        return [(p.relative_to(root), p) for p in files]

    if wanted and re.search(r"[*./]", wanted):
        files = [f for f in fetched([wanted]) if fnmatch.fnmatch(str(f[0]), wanted)]
    else:
        splits = (wanted.lower(),) if wanted else SPLITS[what]
        words = [word for split in splits for word in WORDS.get(split, (split,))]
        there = fetched([_any_case(f"*{word}*{suffix}") for word in words for suffix in SUFFIXES])
        files = _first_of(splits, there)
        if not files and wanted:  # a folder: of it what the setting would take
            there = [f for f in there if wanted.lower() in map(str.lower, f[0].parts[:-1])]
        elif not files and what == "train_file":
            there = fetched([_any_case(f"*{suffix}") for suffix in SUFFIXES])
        if not files:
            files = _first_of(SPLITS[what], there) or [f for f in there if what == "train_file" and not _split_of(f[0])]
        _refuse_several_sets(repository, files, what)
    if not files:
        sought = wanted or " or ".join(SPLITS[what])
        raise UserError(f"{LABELS[what]}: dataset {repository} has no {sought} file ({', '.join(SUFFIXES)})")
    return [(f"{repository}/{f}", path) for f, path in files]


def _first_of(splits: tuple[str, ...], files: list[tuple[Path, Path]]) -> list[tuple[Path, Path]]:
    """The files of the first split, or of the first name, that there is."""
    found = ([f for f in files if split in (_split_of(f[0]), _stem(f[0]).lower())] for split in splits)
    return next(filter(None, found), [])


def _refuse_several_sets(repository: str, files: list[tuple[Path, Path]], what: str) -> None:
    """Shards of one set differ in their numbers alone (train-00000-of-00002); whatever else differs is another set."""
    sets = set()
    for f, _ in files:
        named = str(f.parent / _stem(f)) if _split_of(Path(f.name)) else f"{f.parent}/"
        sets.add(named.removeprefix("./") + "*" + "".join(f.suffixes))
    if len(sets) > 1:
        choices = " or ".join(f"{repository}:{kind}" for kind in sorted(sets))
        raise UserError(f"{LABELS[what]}: dataset {repository} holds several sets of files: name one, {choices}")


def _stem(file: Path) -> str:
    return re.sub(r"-\d+-of-\d+.*", "", file.name.partition(".")[0])


def _split_of(file: Path) -> str | None:
    """The split that a file's name, or else the nearest folder's, says it belongs to."""
    for part in (_stem(file), *(folder.name for folder in file.parents)):
        for split, words in WORDS.items():
            if re.search(rf"(?<![a-z])(?:{'|'.join(words)})(?![a-z])", part.lower()):
                return split
    return None


def _any_case(pattern: str) -> str:
    return "".join(f"[{c.lower()}{c.upper()}]" if c.isalpha() else c for c in pattern)


def lines_of(name: str, path: Path) -> list[Line]:
    """Every row of a file. Raises UserError if it cannot be read as what its name says; a bad row is no reason for that."""
    try:
        return list(_read(path))
    except (OSError, EOFError, ValueError, RecursionError, OverflowError, zlib.error) as error:
        raise UserError(f"{name}: not readable as {path.suffix.lstrip('.') or 'JSON lines'}: {error}") from error


def _read(path: Path) -> Iterator[Line]:
    kind = Path(path.name.lower().removesuffix(".gz")).suffix
    if kind == ".parquet":
        yield from _parquet(path)
        return
    with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb") as file:
        content = file.read()
    if kind in (".csv", ".tsv"):
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{error}: save it as UTF-8") from error
        yield from _csv(text, "\t" if kind == ".tsv" else ",")
        return
    if kind == ".json":
        try:
            rows = json.loads(content)
        except ValueError as error:
            if not str(error).startswith("Extra data"):  # JSON lines under this name are common
                raise
        else:
            if isinstance(rows, dict):  # {"data": [...]}, or a single row
                lists = [value for key, value in rows.items() if isinstance(value, list) and key != "messages"]
                rows = [rows] if len(lists) < len(rows) else lists[0] if len(lists) == 1 else None
            if not isinstance(rows, list):
                raise ValueError("expected a list of rows, or an object that holds one such list and nothing else")
            yield from ((i, _dumped(row)) for i, row in enumerate(rows, start=1))
            return
    yield from enumerate(content.splitlines(), start=1)


def _dumped(row: object) -> bytes:
    return json.dumps(row, default=str).encode()


def _csv(text: str, delimiter: str) -> Iterator[Line]:
    """Rows by the names in the first line; numbers are those of the lines where a row begins."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    number = 1
    try:
        header = next(reader, [])
        if len(header) == 1 and (other := [c for c in ";\t," if c in header[0]]):
            raise ValueError(f"columns are to be separated by {delimiter!r}, the first line has {other[0]!r}")
        if twice := {name for name in header if header.count(name) > 1}:
            raise ValueError(f"the first line names {sorted(twice)[0]!r} twice")
        number = reader.line_num + 1
        for row in reader:
            if len(row) == len(header):
                yield number, _dumped(dict(zip(header, row, strict=True)))
            elif not row:
                yield number, b""
            else:
                yield number, f"has {len(row)} fields, the first line names {len(header)}"
            number = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"the row that begins in line {number}: {error}") from error


def _parquet(path: Path) -> Iterator[Line]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: reading Parquet needs pyarrow (pip install 'minilora[parquet]')") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, _dumped(row)
    except pyarrow.ArrowException as error:
        raise ValueError(error) from error
