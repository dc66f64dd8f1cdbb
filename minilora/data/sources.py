"""Where rows come from: files on disk, or in a dataset repository of the Hugging Face hub.

A file holds JSON lines, JSON, CSV, TSV or Parquet, and may be gzipped. Whatever it is, each row
leaves this module as a `Line` with the row as JSON, so all that follows handles a single form:
`data_files` finds the files that a setting names, `read_lines` reads one of them.
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
from typing import NamedTuple

from minilora.errors import UserError
from minilora.hub import fetch

SUFFIXES = (
    ".jsonl",
    ".jsonl.gz",
    ".json",
    ".json.gz",
    ".csv",
    ".csv.gz",
    ".tsv",
    ".tsv.gz",
    ".parquet",
)
# names of the settings in messages
SETTING_NAMES = {
    "train_file": "data.train_file",
    "eval_file": "data.eval_file",
    "input": "--input",
}
# the splits that a setting takes of a dataset: the first one that exists
DEFAULT_SPLITS = {
    "train_file": ("train",),
    "eval_file": ("validation", "test"),
    "input": ("test",),
}
# the words in the name of a file, or of its folder, that say which split it belongs to
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}


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


class DatasetName(NamedTuple):
    """The parts of `owner/name[@revision][:files]`, which names files of a dataset on the hub."""

    repository: str
    """`owner/name`."""
    revision: str | None
    """Branch, tag or commit."""
    files: str | None
    """A split, a folder, or a glob over the repository's files."""


class RepositoryFile(NamedTuple):
    """A file of a dataset repository."""

    name: Path
    """Its path in the repository."""
    path: Path
    """Where it lies on disk, in the hub's cache."""


# ---- finding files


def data_files(name: str, setting: str) -> list[DataFile]:
    """Find the files that a setting names.

    Args:
        name: a file, or a dataset of the hub `owner/name[@revision][:split or glob]`. Of a
            dataset without split or glob, train_file takes the training split (or all files, if
            none is named after a split), eval_file the validation or test split, and input the
            test split.
        setting: "train_file", "eval_file" or "input".

    Raises:
        UserError: there are no such files.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return [DataFile(name, path)]
    if path.exists():
        raise UserError(f"{SETTING_NAMES[setting]}: {name!r} is not a file")

    dataset = parse_dataset_name(name)
    if dataset is None:
        raise UserError(f"{SETTING_NAMES[setting]}: {name!r} does not exist")
    files = _dataset_files(dataset, setting)
    return [DataFile(f"{dataset.repository}/{file.name}", file.path) for file in files]


DATASET_NAME = re.compile(
    r"""
    (?P<repository> \w[\w.-]* / [\w.-]+? )
    (?: @ (?P<revision> [\w./-]+ ) )?
    (?: : (?P<files> .+ ) )?
    """,
    re.VERBOSE,
)


def parse_dataset_name(name: str) -> DatasetName | None:
    """Split the name of a dataset on the hub into its parts; None for the name of a file."""
    match = DATASET_NAME.fullmatch(name)
    if match is None:
        return None
    dataset = DatasetName(match["repository"], match["revision"], match["files"])
    looks_like_file = name.lower().endswith((*SUFFIXES, ".txt"))
    return None if looks_like_file and dataset.files is None else dataset


# Files are found in two steps: `_fetch_...` downloads what may be wanted, which is less than the
# whole dataset where possible; `_pick_...` chooses among that.


def _dataset_files(dataset: DatasetName, setting: str) -> list[RepositoryFile]:
    """Return the files of a dataset that a setting takes. Raises UserError if there are none."""
    if dataset.files is None:
        files = _default_files(dataset, setting)
        _refuse_several_sets(dataset, files, setting)
    elif re.search(r"[*./]", dataset.files):  # a glob, or the path of a file
        files = _fetch_files(dataset, [dataset.files], setting)
    else:
        files = _split_or_folder_files(dataset, dataset.files.lower(), setting)
        _refuse_several_sets(dataset, files, setting)

    if not files:
        sought = dataset.files or " or ".join(DEFAULT_SPLITS[setting])
        kinds = ", ".join(SUFFIXES)
        raise UserError(
            f"{SETTING_NAMES[setting]}: dataset {dataset.repository} has no {sought} file ({kinds})"
        )
    return files


def _default_files(dataset: DatasetName, setting: str) -> list[RepositoryFile]:
    """Return what a setting takes of a dataset whose name says neither split nor files."""
    splits = DEFAULT_SPLITS[setting]
    files = _pick_split(splits, _fetch_splits(dataset, splits, setting))
    if not files and setting == "train_file":
        every_file = [_any_case(f"*{suffix}") for suffix in SUFFIXES]
        files = _pick_for_setting(setting, _fetch_files(dataset, every_file, setting))
    return files


def _split_or_folder_files(dataset: DatasetName, wanted: str, setting: str) -> list[RepositoryFile]:
    """Return a named split, or else what a setting takes of the folder with that name.

    Args:
        dataset: the dataset.
        wanted: name of the split or folder, in lower case.
        setting: the setting.
    """
    fetched = _fetch_splits(dataset, (wanted,), setting)
    files = _pick_split((wanted,), fetched)
    if not files:
        folder = [file for file in fetched if wanted in _folders(file.name)]
        files = _pick_for_setting(setting, folder)
    return files


def _pick_for_setting(setting: str, files: list[RepositoryFile]) -> list[RepositoryFile]:
    """Pick the split that a setting takes; training takes files of no split if there is none."""
    picked = _pick_split(DEFAULT_SPLITS[setting], files)
    if not picked and setting == "train_file":
        picked = [file for file in files if _split_of(file.name) is None]
    return picked


def _pick_split(splits: tuple[str, ...], files: list[RepositoryFile]) -> list[RepositoryFile]:
    """Pick the files of the first split that has any.

    A name that is not a split picks the files that are called so.
    """
    for split in splits:
        picked = []
        for file in files:
            belongs_to_split = _split_of(file.name) == split
            is_called_so = _stem(file.name).lower() == split
            if belongs_to_split or is_called_so:
                picked.append(file)
        if picked:
            return picked
    return []


def _fetch_splits(
    dataset: DatasetName, splits: tuple[str, ...], setting: str
) -> list[RepositoryFile]:
    """Fetch every data file that may belong to one of the splits, by its name or its folders."""
    patterns = []
    for split in splits:
        for word in SPLIT_WORDS.get(split, (split,)):
            patterns += [_any_case(f"*{word}*{suffix}") for suffix in SUFFIXES]
    return _fetch_files(dataset, patterns, setting)


def _fetch_files(dataset: DatasetName, patterns: list[str], setting: str) -> list[RepositoryFile]:
    """Fetch the data files whose path in the repository matches a pattern, in order of path."""
    message_start = f"{SETTING_NAMES[setting]}: {dataset.repository!r} is not a file"
    root = fetch(dataset.repository, dataset.revision, patterns, message_start, kind="dataset")
    files = []
    for path in sorted(root.rglob("*")):  # what earlier calls have fetched is there, too
        name = path.relative_to(root)
        matches = any(fnmatch.fnmatch(str(name), pattern) for pattern in patterns)
        if matches and path.name.lower().endswith(SUFFIXES) and path.is_file():
            files.append(RepositoryFile(name, path))
    return files


def _refuse_several_sets(dataset: DatasetName, files: list[RepositoryFile], setting: str) -> None:
    """Raise UserError, with a glob for each set, if the files are not all of one set."""
    globs = {_glob_of_set(file.name) for file in files}
    if len(globs) > 1:
        choices = " or ".join(f"{dataset.repository}:{pattern}" for pattern in sorted(globs))
        raise UserError(
            f"{SETTING_NAMES[setting]}: dataset {dataset.repository} holds several sets of files: "
            f"name one, {choices}"
        )


def _glob_of_set(file: Path) -> str:
    """Return the glob for a file and the others of its set, e.g. `main/train*.parquet`.

    The shards of a set differ in their numbers alone (train-00000-of-00002). Files that differ in
    anything else (folder, kind, split in the name) are of different sets.
    """
    folder = "" if file.parent == Path() else f"{file.parent}/"
    is_named_after_split = _split_of(Path(file.name)) is not None
    stem = _stem(file) if is_named_after_split else ""
    suffixes = "".join(file.suffixes)
    return f"{folder}{stem}*{suffixes}"


def _stem(file: Path) -> str:
    """Return a file's name without its suffixes and without the number of its shard."""
    return re.sub(r"-\d+-of-\d+.*", "", file.name.partition(".")[0])


def _folders(file: Path) -> list[str]:
    """Return the names of the folders that a file lies in, in lower case."""
    return [folder.lower() for folder in file.parts[:-1]]


def _split_of(file: Path) -> str | None:
    """Return the split in a file's name, or else in the nearest folder's name that has one."""
    for name in (_stem(file), *(folder.name for folder in file.parents)):
        for split, words in SPLIT_WORDS.items():
            if re.search(rf"(?<![a-z])(?:{'|'.join(words)})(?![a-z])", name.lower()):
                return split
    return None


def _any_case(pattern: str) -> str:
    """Return a glob that matches letters in either case; the hub's globs tell them apart."""
    return "".join(f"[{c.lower()}{c.upper()}]" if c.isalpha() else c for c in pattern)


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
