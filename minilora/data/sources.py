"""Where rows come from: files on disk, or a dataset of the Hugging Face hub (dataset_files.py).

A file holds JSON lines, JSON, CSV, TSV or Parquet, and may be gzipped. Whatever it is, each row
leaves this module as a `Line` with the row as JSON, so all that follows handles a single form:
`data_files` finds the files that a setting names, `read_lines` reads one of them.
"""

import csv
import glob
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from minilora.data.dataset_files import (
    SETTING_NAMES,
    SUFFIXES,
    dataset_files,
    is_data_file,
    parse_dataset_name,
    parse_directory_name,
)
from minilora.errors import UserError


class DataFile(NamedTuple):
    """A file with rows."""

    shown: str
    """Its name in messages: as the user wrote it, or its place on the hub."""
    path: Path
    """Where it lies on disk."""


FilesByName = dict[str, list[DataFile]]  # each name that a setting holds -> the files it names


class Line(NamedTuple):
    """One row of a file."""

    number: int
    """The line it begins in, or its place among the rows, counted from 1."""
    content: bytes
    """The row as JSON."""
    problem: str = ""
    """Why the row cannot be read; empty if it can."""

    @property
    def is_blank(self) -> bool:
        """Whether nothing is written in the line."""
        return not self.problem and not self.content.strip()


# ---- finding files


def data_files(name: str, setting: str) -> list[DataFile]:
    """Find the files that a setting names.

    Args:
        name: a file; a directory[:split or glob]; a glob of files; or a dataset of the hub
            `owner/name[@revision][:split or glob]`. Of a directory or dataset without split or
            glob, train_file takes the training split (or all files, if none is named after a
            split), eval_file the validation or test split, and input the test split.
        setting: "train_file", "eval_file" or "input".

    Raises:
        UserError: there are no such files.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return [DataFile(name, path)]

    directory = parse_directory_name(name)
    if directory is None and path.exists():
        raise UserError(f"{SETTING_NAMES[setting]}: {name!r} is neither a file nor a directory")

    dataset = directory or parse_dataset_name(name)
    if dataset is not None:
        files = dataset_files(dataset, setting)
        return [DataFile(f"{dataset.repository}/{file.name}", file.path) for file in files]
    if re.search(r"[*?[]", name):
        return _files_of_glob(path, setting)
    raise UserError(f"{SETTING_NAMES[setting]}: {name!r} does not exist")


def _files_of_glob(pattern: Path, setting: str) -> list[DataFile]:
    """Return the data files that match a glob. Raises UserError if there are none."""
    found = [Path(name) for name in sorted(glob.glob(str(pattern), recursive=True))]
    files = [DataFile(str(path), path) for path in found if is_data_file(path)]
    if not files:
        raise UserError(
            f"{SETTING_NAMES[setting]}: '{pattern}' matches no data file ({', '.join(SUFFIXES)})"
        )
    return files


# ---- reading a file


def read_lines(name: str, path: Path) -> list[Line]:
    """Read every row of a file.

    Args:
        name: the file's name in messages.
        path: the file. Its suffix tells what it holds; any other than SUFFIXES means JSON lines.

    Returns:
        All rows in order. A row that cannot be read is among them, with its problem.

    Raises:
        UserError: the file as a whole cannot be read as what its name says.
    """
    try:
        return list(_read_file(path))
    except (OSError, EOFError, ValueError, RecursionError, OverflowError, zlib.error) as error:
        kind = path.suffix.lstrip(".") or "JSON lines"
        raise UserError(f"{name}: not readable as {kind}: {error}") from error


def first_rows(lines: list[Line], limit: int) -> list[Line]:
    """Return the lines through the first `limit` that are not blank."""
    rows = [i for i, line in enumerate(lines) if not line.is_blank]
    if limit >= len(rows):
        return lines
    return lines[: rows[limit]] if limit > 0 else []


def _read_file(path: Path) -> Iterator[Line]:
    """Yield the rows of a file; errors are those of the libraries that read it, or ValueError."""
    file_name = path.name.lower()
    kind = Path(file_name.removesuffix(".gz")).suffix
    if kind == ".parquet":
        yield from _read_parquet(path)
        return

    with gzip.open(path, "rb") if file_name.endswith(".gz") else open(path, "rb") as file:
        content = file.read()
    if kind == ".csv":
        yield from _read_csv(content, delimiter=",")
    elif kind == ".tsv":
        yield from _read_csv(content, delimiter="\t")
    elif kind == ".json":
        yield from _read_json(content)
    else:
        yield from _read_json_lines(content)


def _read_json_lines(content: bytes) -> Iterator[Line]:
    """Yield each line of a file as a row."""
    for number, line in enumerate(content.splitlines(), start=1):
        yield Line(number, line)


def _read_json(content: bytes) -> Iterator[Line]:
    """Yield the rows of one JSON value: a list of rows, {"name": [rows]}, or a single row."""
    try:
        value = json.loads(content)
    except ValueError as error:
        has_second_value = str(error).startswith("Extra data")  # in the words of json
        if not has_second_value:
            raise
        yield from _read_json_lines(content)  # JSON lines in a file called .json are common
        return

    rows = _rows_of_object(value) if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise ValueError(
            "expected a list of rows, or an object that holds one such list and nothing else"
        )
    for number, row in enumerate(rows, start=1):
        yield Line(number, _to_json(row))


def _rows_of_object(value: dict) -> list | None:
    """Return the rows of a JSON object: those of its only list, or itself as one row.

    None if it holds nothing, or several lists. A list under "messages" is a column of a row.
    """
    lists = [item for key, item in value.items() if isinstance(item, list) and key != "messages"]
    if len(lists) < len(value):
        return [value]
    return lists[0] if len(lists) == 1 else None


def _to_json(row: object) -> bytes:
    """Return a row as JSON; dates and other values that JSON lacks become strings."""
    return json.dumps(row, default=str).encode()


def _read_csv(content: bytes, delimiter: str) -> Iterator[Line]:
    """Yield rows as objects whose keys the first line names; numbers are those of lines."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{error}: save it as UTF-8") from error

    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    number = 1  # line in which the next row begins; a quoted field may hold line ends
    try:
        header = next(reader, [])
        _check_csv_header(header, delimiter)
        number = reader.line_num + 1
        for fields in reader:
            yield _csv_line(number, fields, header)
            number = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"the row that begins in line {number}: {error}") from error


def _check_csv_header(header: list[str], delimiter: str) -> None:
    """Raise ValueError if the first line is separated otherwise, or names a column twice."""
    if len(header) == 1:
        for other in ";\t,":
            if other in header[0]:
                raise ValueError(
                    f"columns are to be separated by {delimiter!r}, the first line has {other!r}"
                )
    repeated = sorted(name for name in header if header.count(name) > 1)
    if repeated:
        raise ValueError(f"the first line names {repeated[0]!r} twice")


def _csv_line(number: int, fields: list[str], header: list[str]) -> Line:
    """Return one row of a CSV file."""
    if len(fields) == len(header):
        return Line(number, _to_json(dict(zip(header, fields, strict=True))))
    if not fields:
        return Line(number, b"")
    problem = f"has {len(fields)} fields, the first line names {len(header)}"
    return Line(number, b"", problem)


def _read_parquet(path: Path) -> Iterator[Line]:
    """Yield the rows of a Parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        message = f"{path}: reading Parquet needs pyarrow (pip install 'minilora[parquet]')"
        raise UserError(message) from error

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield Line(number, _to_json(row))
    except pyarrow.ArrowException as error:
        raise ValueError(error) from error
