"""JSONL outputs that a long job fills row by row.

Jobs are resumable: every finished row is kept, and the same command continues where it stopped.
OUT.jsonl.settings.json holds the settings that the rows of OUT.jsonl were made with, so a restart
cannot mix the answers of two models. With several processes, the first one writes OUT.jsonl and
the others OUT.jsonl.rank1, OUT.jsonl.rank2, ...; the first moves their rows into OUT.jsonl.
"""

import glob
import hashlib
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import filelock

from minilora import distributed
from minilora.data.example import RowError
from minilora.data.formats import parse_row
from minilora.data.sources import Line, data_files, first_rows, read_lines
from minilora.errors import UserError
from minilora.files import read_json, read_json_if_present, replace_file

Key = tuple[str | int, int]
"""What identifies a row of an output: its id, and which of the id's samples it is."""

NEW_SETTINGS = ("prompts",)
"""Settings that outputs of an older version do not record, and which are not compared then."""


class Row(NamedTuple):
    """One row of a file."""

    number: int
    """The line it begins in, or in a file without lines its position among the rows, from 1."""
    values: dict
    """Its columns."""


def row_key(row: dict) -> Key:
    """Return the key of a row: its "id" and "sample" (0 if it has none)."""
    return row.get("id", ""), row.get("sample", 0)


def read_rows(path: str | Path) -> list[Row]:
    """Read the rows of a JSONL output; blank lines are skipped.

    Raises:
        UserError: a line is not a JSON object; the message names file and line.
    """
    lines = enumerate(Path(path).read_bytes().split(b"\n"), start=1)
    return _parse_rows(str(path), [Line(number, content) for number, content in lines])


def read_input_rows(path: str, limit: int | None = None) -> list[Row]:
    """Read the rows of an input file of any kind (see data/sources.py); blank lines are skipped.

    Args:
        path: a file, or a dataset on the hub.
        limit: N, to read only the first N rows; None: all.

    Returns:
        The rows. A row without an "id" gets its position among the rows, from 0.

    Raises:
        UserError: a file or a row cannot be read, or two rows have the same id.
    """
    read: list[Row] = []
    for shown, file in data_files(path, "input"):
        lines = read_lines(shown, file)
        if limit is not None:
            lines = first_rows(lines, limit - len(read))
        read += _parse_rows(shown, lines)
    rows = [Row(row.number, {"id": i, **row.values}) for i, row in enumerate(read)]

    line_of_id: dict[str | int, int] = {}
    for number, values in rows:
        row_id = values["id"]
        problem = ""
        if not isinstance(row_id, str | int):
            problem = "neither text nor integer"
        elif row_id in line_of_id:
            problem = f"also in line {line_of_id[row_id]}"
        if problem:
            raise UserError(
                f'{path}:{number}: "id": {row_id!r} is {problem}: answers could not be told apart'
            )
        line_of_id[row_id] = number
    return rows


def _parse_rows(name: str, lines: Sequence[Line]) -> list[Row]:
    """Parse the lines of a file that are not blank. Raises UserError naming file and line."""
    rows: list[Row] = []
    for line in lines:
        if line.is_blank:
            continue
        try:
            values = parse_row(line)
        except RowError as error:
            raise UserError(f"{name}:{line.number}: {error}") from error
        if not isinstance(values, dict):
            kind = type(values).__name__
            raise UserError(f"{name}:{line.number}: expected a JSON object, got {kind}")
        rows.append(Row(line.number, values))
    return rows


class Job:
    """The output file of a job. Its rows have an "id", and a "sample" if an id has several rows.

    All processes construct the object and call `finish` together; each adds rows of its own.

    Attributes:
        done: the finished rows by key, those of earlier runs included.
    """

    def __init__(self, output: str | Path, settings: dict, wanted: Iterable[Key]):
        """Find the rows that an output holds already. Nothing is written before the first `add`.

        Args:
            output: the JSONL file.
            settings: whatever decides the rows; values that JSON can hold.
            wanted: the keys of all rows that the finished output is to have, in this order.

        Raises:
            UserError: another command is writing to the file, or its rows were made with other
                settings, are not among those wanted, or cannot be read.
        """
        self.path = Path(output).resolve()
        self.settings_path = self.path.with_name(self.path.name + ".settings.json")
        self.settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
        self.wanted = list(wanted)
        self.part = self.path  # the file that this process writes
        if distributed.rank() > 0:
            self.part = self.path.with_name(f"{self.path.name}.rank{distributed.rank()}")
        self.file: IO[str] | None = None

        # the operating system releases the lock when the process ends, also if it is killed.
        # is_singleton: jobs of one process share the lock, so one that was left unfinished does
        # not block the next
        name = hashlib.sha256(str(self.path).encode()).hexdigest()[:16]
        lock_file = Path(tempfile.gettempdir()) / f"minilora-{name}.lock"
        self.lock = filelock.FileLock(lock_file, is_singleton=True)
        if distributed.rank() == 0:
            self._acquire_lock()
            self._check_settings()
            self._repair()
        distributed.barrier()
        self.done = self._read()
        distributed.barrier()  # no process may add a row before all have read the file

    def add(self, row: dict) -> None:
        """Append a finished row. Once this returns, a kill does not lose the row."""
        if self.file is None:
            replace_file(self.settings_path, json.dumps(self.settings, indent=2))
            self.file = self.part.open("a", encoding="utf-8")
        self.file.write(_to_line(row))
        self.file.flush()
        self.done[row_key(row)] = row

    def finish(self) -> list[dict]:
        """Put the rows of all processes into the output, in the order wanted, and return them.

        Rows may be missing; the output then holds those that are done.
        """
        if self.file is not None:
            self.file.close()
        distributed.barrier()
        if distributed.rank() == 0:
            self._repair()
            rows = [_to_line(row) for row in self._read().values()]
            if rows:
                replace_file(self.path, "".join(rows))
            self.lock.release(force=True)
        distributed.barrier()
        return list(self._read().values())

    def _acquire_lock(self) -> None:
        """Become the only command that writes to the output. Raises UserError."""
        try:
            self.lock.acquire(blocking=False)
        except filelock.Timeout as error:
            raise UserError(
                f"{self.path}: another command is writing to it: wait for it, or name another file"
            ) from error

    def _parts(self) -> list[Path]:
        """Return the files that hold rows: the output, then those of other processes."""
        pattern = f"{glob.escape(self.path.name)}.rank[0-9]*"
        files = [self.path, *sorted(self.path.parent.glob(pattern))]
        return [file for file in files if file.is_file()]

    def _check_settings(self) -> None:
        """Raise UserError if the output has rows that were made with other settings."""
        has_rows = any(part.stat().st_size > 0 for part in self._parts())
        if not has_rows:
            return
        if not self.settings_path.is_file():
            raise UserError(
                f"{self.path} exists and is not an output of this command: "
                "name another file, or remove it"
            )
        now, then = self.settings, read_json(self.settings_path)
        for name in now | then:
            if name in NEW_SETTINGS and name not in then:
                continue
            if now.get(name) != then.get(name):
                change = f"{name}: {then.get(name)!r} -> {now.get(name)!r}"
                raise UserError(
                    f"{self.path} was begun with other settings ({change}): "
                    "name another file, or remove this one to begin anew"
                )

    def _repair(self) -> None:
        """Move the rows of other processes into the output, without lines cut short by a kill."""
        parts = self._parts()
        complete = []
        is_any_torn = False
        for part in parts:
            content = part.read_bytes()
            end = content.rfind(b"\n") + 1  # of the last complete line
            complete.append(content[:end])
            num_torn = len(content) - end
            if num_torn > 0:
                is_any_torn = True
                distributed.log(
                    f"{part}: the last line is torn ({num_torn} bytes): that row is done again"
                )

        others = [part for part in parts if part != self.path]
        if is_any_torn or others:
            replace_file(self.path, b"".join(complete))
        for part in others:
            part.unlink()

    def _read(self) -> dict[Key, dict]:
        """Read the rows of the output by key, in the order wanted."""
        if not self.path.is_file():
            return {}
        known = set(self.wanted)
        found: dict[Key, dict] = {}
        for number, row in read_rows(self.path):
            if row_key(row) not in known:
                raise UserError(
                    f"{self.path}:{number}: id {row.get('id')!r} is not in the input "
                    "(or is beyond --limit): name another file, or remove it"
                )
            # rows are there twice after a kill between moving another process's rows and removing
            # its file
            found.setdefault(row_key(row), row)
        return {key: found[key] for key in self.wanted if key in found}


def _to_line(row: dict) -> str:
    """Return a row as a line of JSON."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def weight_file_times(directories: Sequence[Path]) -> list[int]:
    """Return when the files of a model's weights were written, so that a job notices new ones.

    Where a directory holds an adapter whose base is a local directory, the base's files count too.

    Args:
        directories: of the model or adapter, and of another adapter that is put on it.

    Returns:
        Times of modification in nanoseconds.
    """
    bases = []
    for directory in directories:
        base = read_json_if_present(directory / "adapter_config.json").get(
            "base_model_name_or_path"
        )
        if base and Path(base).is_dir():
            bases.append(Path(base))

    times = []
    for directory in [*directories, *bases]:
        files = sorted(directory.glob("*model*.safetensors"))
        times += [file.stat().st_mtime_ns for file in files]
    return times
