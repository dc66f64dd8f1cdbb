"""JSONL that a long job fills row by row: a kill loses no answered row, and the same command goes on where it stopped.

Beside OUT.jsonl lies OUT.jsonl.settings.json, what the rows were made with, so that a restart never mixes two models'
answers. Processes after the first write OUT.jsonl.rank1, ...; the first puts their rows into OUT.jsonl.
"""

import glob
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import filelock

from minilora import dist
from minilora.config import UserError
from minilora.running.examples import RowError, parse
from minilora.running.sources import Line, data_files, lines_of
from minilora.weights import read_json

Key = tuple[str | int, int]  # a row's id, and which of its samples


def read_rows(path: str | Path) -> list[tuple[int, dict]]:
    """(line number, row) of every line of an output that is not blank. Raises UserError naming file and line."""
    return _rows(str(path), list(enumerate(Path(path).read_bytes().split(b"\n"), start=1)))


def _rows(name: str, lines: list[Line]) -> list[tuple[int, dict]]:
    rows = []
    for number, line in lines:
        if not line.strip():
            continue
        try:
            row = parse(line)
        except RowError as error:
            raise UserError(f"{name}:{number}: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{name}:{number}: expected a JSON object, got {type(row).__name__}")
        rows.append((number, row))
    return rows


def numbered(path: str) -> list[tuple[int, dict]]:
    """(line number, row) of a file of any kind (sources.py); a row without an id gets its place. Raises UserError for an id
    that comes twice."""
    read = [row for name, file in data_files(path, "input") for row in _rows(name, lines_of(name, file))]
    rows = [(number, {"id": i, **row}) for i, (number, row) in enumerate(read)]
    first: dict = {}
    for number, row in rows:
        if not isinstance(row["id"], str | int) or row["id"] in first:
            why = f"also in line {first[row['id']]}" if isinstance(row["id"], str | int) else "neither text nor integer"
            raise UserError(f'{path}:{number}: "id": {row["id"]!r} is {why}: answers could not be told apart')
        first[row["id"]] = number
    return rows


def key_of(row: dict) -> Key:
    return row.get("id", ""), row.get("sample", 0)


class Job:
    """The output file of a job whose rows carry an "id" (and a "sample", where an id has several)."""

    def __init__(self, output: str | Path, settings: dict, wanted: Iterable[Key]):
        """Find what `output` holds already; its rows must have been made with the same `settings` and be among `wanted`.

        All processes call it together; nothing new is written before the first `add`. Raises UserError if the file is
        another job's.
        """
        self.path, self.wanted = Path(output).resolve(), list(wanted)
        self.settings_path = self.path.with_name(self.path.name + ".settings.json")
        self.settings = json.loads(json.dumps(settings))  # tuples become lists, as they will be when read
        self.part = self.path.with_name(f"{self.path.name}.rank{dist.rank()}") if dist.rank() else self.path
        self.file: IO[str] | None = None
        name = hashlib.sha256(str(self.path).encode()).hexdigest()[:16]
        # one writer at a time; a kill gives it up, and so does the end of the process
        self.lock = filelock.FileLock(Path(tempfile.gettempdir()) / f"minilora-{name}.lock", is_singleton=True)
        if dist.rank() == 0:
            try:
                self.lock.acquire(blocking=False)
            except filelock.Timeout as error:
                raise UserError(f"{self.path}: another command is writing to it: wait for it, or name another file") from error
            self._check_settings()
            self._repair()
        dist.barrier()
        self.done = self._read()
        dist.barrier()  # nobody adds before everybody has read

    def add(self, row: dict) -> None:
        """Append a finished row; from here on a kill does not lose it."""
        if self.file is None:
            _replace(self.settings_path, json.dumps(self.settings, indent=2).encode())
            self.file = self.part.open("a", encoding="utf-8")
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.file.flush()
        self.done[key_of(row)] = row

    def finish(self) -> list[dict]:
        """Everybody's rows in one file, in the order wanted, complete or not; returns them."""
        if self.file is not None:
            self.file.close()
        dist.barrier()
        if dist.rank() == 0:
            self._repair()
            rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in self._read().values()]
            if rows:
                _replace(self.path, "".join(rows).encode())
            self.lock.release(force=True)
        dist.barrier()
        return list(self._read().values())

    def _parts(self) -> list[Path]:
        return [
            p for p in (self.path, *sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.rank[0-9]*"))) if p.is_file()
        ]

    def _check_settings(self) -> None:
        """Refuse to go on with an output of other settings."""
        if not any(part.stat().st_size for part in self._parts()):
            return
        if not self.settings_path.is_file():
            raise UserError(f"{self.path} exists and is no output of this command: name another file, or remove it")
        now, then = self.settings, read_json(self.settings_path)
        for name in now | then:
            if now.get(name) != then.get(name):
                raise UserError(
                    f"{self.path} was begun with other settings ({name}: {then.get(name)!r} -> {now.get(name)!r}): "
                    "name another file, or remove this one to begin anew"
                )

    def _repair(self) -> None:
        """Take in the parts of other processes and cut off lines that a kill has torn."""
        parts = self._parts()
        contents = [part.read_bytes() for part in parts]
        whole = [data[: data.rfind(b"\n") + 1] for data in contents]
        for part, data, kept in zip(parts, contents, whole, strict=True):
            if data != kept:
                dist.log(f"{part}: the last line is torn ({len(data) - len(kept)} bytes): that row is done again")
        if contents != whole or parts not in ([], [self.path]):
            _replace(self.path, b"".join(whole))
        for part in parts:
            if part != self.path:
                part.unlink()

    def _read(self) -> dict[Key, dict]:
        """The rows so far by key, in the order wanted."""
        found: dict[Key, dict] = {}  # a kill between taking in a part and removing it leaves its rows twice
        known = set(self.wanted)
        for number, row in read_rows(self.path) if self.path.is_file() else []:
            if key_of(row) not in known:
                raise UserError(
                    f"{self.path}:{number}: id {row.get('id')!r} is not in the input: name another file, or remove it"
                )
            found.setdefault(key_of(row), row)
        return {key: found[key] for key in self.wanted if key in found}


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".tmp-{path.name}-{dist.rank()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
