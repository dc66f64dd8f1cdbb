"""JSONL that a long job fills row by row: a kill loses no answered row, and the same command goes on where it stopped.

Beside OUT.jsonl lies OUT.jsonl.settings.json, what the rows were made with, so that a restart never mixes two models'
answers. Processes after the first write OUT.jsonl.rank1, ...; the first puts their rows into OUT.jsonl.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from minilora import dist
from minilora.config import UserError
from minilora.running.examples import RowError, parse
from minilora.weights import read_json

Key = tuple[str | int, int]  # a row's id, and which of its samples


def read_rows(path: str | Path) -> list[tuple[int, dict]]:
    """(line number, row) of every line that is not blank. Raises UserError naming file and line."""
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file.read().split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                row = parse(line)
            except RowError as error:
                raise UserError(f"{path}:{number}: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
            rows.append((number, row))
    return rows


def key_of(row: dict) -> Key:
    return row["id"], row.get("sample", 0)


class Job:
    """The output file of a job whose rows carry an "id" (and a "sample", where an id has several)."""

    def __init__(self, output: str | Path, settings: dict, wanted: Iterable[Key]):
        """Open `output`, whose rows so far must have been made with the same `settings` and be among `wanted`.

        All processes call it together. Raises UserError if the file is another job's.
        """
        self.path, self.wanted = Path(output), list(wanted)
        self.settings_path = self.path.with_name(self.path.name + ".settings.json")
        if dist.rank() == 0:
            self._check_settings(json.loads(json.dumps(settings)))
            self._repair()
        dist.barrier()
        self.done: dict[Key, dict] = {key_of(row): row for row in self._rows()}
        part = self.path if dist.rank() == 0 else self.path.with_name(f"{self.path.name}.rank{dist.rank()}")
        dist.barrier()
        self.file = open(part, "a", encoding="utf-8")  # noqa: SIM115 - closed by finish, or with the process

    def add(self, row: dict) -> None:
        """Append a finished row; from here on a kill does not lose it."""
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.file.flush()
        self.done[key_of(row)] = row

    def finish(self) -> list[dict]:
        """Everybody's rows in one file, in the order wanted, complete or not; returns them."""
        self.file.close()
        dist.barrier()
        if dist.rank() == 0:
            self._repair()
            self.done = {key_of(row): row for row in self._rows()}
            rows = [self.done[key] for key in self.wanted if key in self.done]
            self._replace("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        dist.barrier()
        return [self.done[key] for key in self.wanted if key in self.done]

    def _check_settings(self, settings: dict) -> None:
        """Refuse to go on with an output of other settings."""
        begun = self.path.is_file() and self.path.stat().st_size > 0
        if begun and not self.settings_path.is_file():
            raise UserError(f"{self.path} exists and is no output of this command: name another file, or remove it")
        if begun:
            before = read_json(self.settings_path)
            if changed := [k for k in settings | before if settings.get(k) != before.get(k)]:
                k = changed[0]
                raise UserError(
                    f"{self.path} was begun with other settings: {k} was {before.get(k)!r}, now {settings.get(k)!r}; "
                    "name another file, or remove this one to begin anew"
                )
        self.settings_path.write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")

    def _repair(self) -> None:
        """Take in the parts of other processes and cut off lines that a kill has torn."""
        parts = sorted(self.path.parent.glob(f"{self.path.name}.rank*"))
        whole = b""
        for file in [self.path] * self.path.is_file() + parts:
            data = file.read_bytes()
            end = data.rfind(b"\n") + 1
            if end < len(data):
                dist.log(f"{file}: the last line is torn ({len(data) - end} bytes): that row is done again")
            whole += data[:end]
        if parts or (self.path.is_file() and len(whole) < self.path.stat().st_size):
            self._replace(whole.decode("utf-8"))
        for part in parts:
            part.unlink()

    def _rows(self) -> list[dict]:
        known, seen, rows = set(self.wanted), set(), []
        for number, row in read_rows(self.path) if self.path.is_file() else []:
            if key_of(row) not in known:
                raise UserError(f'{self.path}:{number}: id {row["id"]!r} is not in the input: name another file, or remove this one')
            if key_of(row) not in seen:  # a kill between taking in a part and removing it leaves its rows twice
                rows.append(row)
            seen.add(key_of(row))
        return rows

    def _replace(self, text: str) -> None:
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, self.path)
