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
from collections.abc import Iterator
from pathlib import Path

from minilora.config import UserError
from minilora.weights import fetch

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
LABELS = {"train_file": "data.train_file", "eval_file": "data.eval_file", "input": "--input"}
SPLITS = {"train_file": ("train",), "eval_file": ("validation", "valid", "dev", "test"), "input": ("test",)}

Line = tuple[int, bytes | str]  # number in the file from 1 and the row as JSON, or (a str) what is wrong with it


def data_files(name: str, what: str) -> list[tuple[str, Path]]:
    """(name to show, file) of what a setting names: a file, or `owner/name[@revision][:split or glob]` on the hub.

    Of a dataset without a split or glob, train_file takes the files with "train" in their name (all, if no split is
    named), eval_file those of the validation split. Raises UserError.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return [(name, path)]
    found = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?(?::(.+))?", name)
    if path.exists():
        raise UserError(f"{LABELS[what]}: {name!r} is no file")
    if not found or name.startswith((".", "~")) or (not found[3] and name.removesuffix(".gz").endswith((*SUFFIXES, ".txt"))):
        raise UserError(f"{LABELS[what]}: {name!r} does not exist")
    return _from_hub(found[1], found[2], found[3], what)


def _from_hub(repository: str, revision: str | None, wanted: str | None, what: str) -> list[tuple[str, Path]]:
    splits = (wanted,) if wanted and not re.search(r"[*./]", wanted) else () if wanted else SPLITS[what]
    patterns = [f"*{split}*" for split in splits] or [wanted or "*"]
    files = _fetch(repository, revision, patterns, what)
    for split in splits:  # the first that there is
        named = [f for f in files if re.search(rf"(?<![a-z]){re.escape(split)}(?![a-z])", str(f[0]).lower())]
        if named:
            files = named
            break
    else:
        if splits and not wanted and what == "train_file":  # no file is named after a split: all of them are data
            files = _fetch(repository, revision, ["*"], what)
            splits = ()
        files = [] if splits else [f for f in files if wanted is None or fnmatch.fnmatch(str(f[0]), wanted)]
    if not files:
        raise UserError(
            f"{LABELS[what]}: dataset {repository} has no {' or '.join(splits) or wanted or 'data'} file ({', '.join(SUFFIXES)})"
        )
    kinds = sorted({str(f.parent / "*") + "".join(f.suffixes[-1:]) for f, _ in files})
    if len(kinds) > 1:
        choices = " or ".join(f"{repository}:{kind.removeprefix('./')}" for kind in kinds)
        raise UserError(f"{LABELS[what]}: dataset {repository} holds several sets of files: name one, {choices}")
    return [(f"{repository}/{f}", path) for f, path in files]


def _fetch(repository: str, revision: str | None, patterns: list[str], what: str) -> list[tuple[Path, Path]]:
    """(name in the repository, local file) of the data files that match, through the hub's cache."""
    endings = tuple(suffix + gz for suffix in SUFFIXES for gz in ("", ".gz"))
    allowed = [p + end for p in patterns for end in ("", *endings) if (p + end).endswith(endings)]
    root = fetch(repository, revision, allowed, f"{LABELS[what]}: {repository!r} is no file", kind="dataset")
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.name.endswith(endings))
    return [(p.relative_to(root), p) for p in files]


def lines_of(name: str, path: Path) -> list[Line]:
    """Every row of a file. Raises UserError if it cannot be read as what its name says; a bad row is no reason for that."""
    try:
        return list(_read(path))
    except (OSError, EOFError, ValueError, csv.Error) as error:
        raise UserError(f"{name}: not readable as {path.suffix.lstrip('.') or 'JSON lines'}: {error}") from error


def _read(path: Path) -> Iterator[Line]:
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if kind == ".parquet":
        yield from _parquet(path)
        return
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        content = file.read()
    if kind in (".csv", ".tsv"):
        yield from _csv(content.decode("utf-8-sig"), "\t" if kind == ".tsv" else ",")
        return
    if kind == ".json":
        try:
            rows = json.loads(content)
        except ValueError as error:
            if not str(error).startswith("Extra data"):  # JSON lines under this name are common
                raise
        else:
            rows = next(iter(rows.values())) if isinstance(rows, dict) and len(rows) == 1 else rows
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
    header = next(reader, [])
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
