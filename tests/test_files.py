"""Directories and files that are written whole or not at all, and JSON."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from helpers.checkpoints import DAMAGES, contents, names, write_two_files, written
from minilora.errors import RunError, UserError
from minilora.files import (
    is_complete,
    make_directory,
    read_json,
    read_json_if_present,
    replace_file,
    write_directory,
    write_json,
)


def test_write_directory_appears_complete(tmp_path: Path):
    """It is invisible while it is written, and its manifest lists every file."""
    directory = tmp_path / "run" / "checkpoint-1"  # the parent is made too

    def write(target: Path) -> None:
        write_two_files(target, "content")
        assert not directory.exists()
        # only within one file system can it be renamed
        assert target.parent == directory.parent

    write_directory(directory, write)
    assert is_complete(directory)
    assert names(directory.parent) == ["checkpoint-1"]
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest == {"weights": 7, "sub/state": 7}
    assert contents(directory).keys() == {"weights", "sub/state", "manifest.json"}


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_write_directory_leaves_nothing_after_an_exception(
    error: type[BaseException], tmp_path: Path
):
    before = contents(written(tmp_path / "checkpoint-1"))

    def write(target: Path) -> None:
        write_two_files(target, "content")
        raise error

    with pytest.raises(RunError if error is OSError else error):
        write_directory(tmp_path / "checkpoint-2", write)
    assert names(tmp_path) == ["checkpoint-1"]
    assert contents(tmp_path / "checkpoint-1") == before


def die(target: Path) -> None:
    write_two_files(target, "half")
    os._exit(9)


@pytest.mark.system
def test_write_directory_after_a_crash_starts_afresh(tmp_path: Path):
    directory = tmp_path / "checkpoint-2"
    fork = multiprocessing.get_context("fork")
    crash = fork.Process(target=write_directory, args=(directory, die))
    crash.start()
    crash.join()
    assert crash.exitcode == 9
    assert names(tmp_path) == [".tmp-checkpoint-2"]
    assert not is_complete(directory)

    written(directory, "whole")
    assert contents(directory)["weights"] == b"whole"
    assert names(tmp_path) == ["checkpoint-2"]


def test_write_directory_syncs_everything_before_it_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    directory, synced = tmp_path / "checkpoint-1", []
    real = os.fsync

    def fsync(handle: int) -> None:
        synced.append((os.fstat(handle).st_ino, directory.exists()))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    written(directory)
    for path in (directory, *(file for file in directory.rglob("*") if file.is_file())):
        assert (path.stat().st_ino, False) in synced, path
    assert synced[-1] == (tmp_path.stat().st_ino, True)  # and then the rename itself


def test_write_directory_replaces_an_incomplete_one(tmp_path: Path):
    directory = tmp_path / "checkpoint-1"
    directory.mkdir()
    (directory / "other").touch()
    written(directory)
    assert contents(directory).keys() == {"weights", "sub/state", "manifest.json"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_is_complete_sees_what_is_missing(damage: str, tmp_path: Path):
    directory = written(tmp_path / "checkpoint")
    (directory / "more").touch()  # files that others add do no harm
    assert is_complete(directory)
    DAMAGES[damage](directory)
    assert not is_complete(directory)


def test_replace_file_writes_text_and_bytes(tmp_path: Path):
    file = tmp_path / "file"
    replace_file(file, "größe\r\n")
    assert file.read_bytes() == "größe\r\n".encode()
    replace_file(file, b"\xff")
    assert file.read_bytes() == b"\xff"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("text", "problem"), [("{", "not readable as JSON"), ("[]", "expected a JSON object, got list")]
)
def test_read_json_names_the_file_and_the_problem(text: str, problem: str, tmp_path: Path):
    file = tmp_path / "file.json"
    with pytest.raises(UserError, match=r"file\.json does not exist"):
        read_json(file)
    assert read_json_if_present(file) == {}
    file.write_text(text)
    for read in (read_json, read_json_if_present):
        with pytest.raises(UserError, match=rf"file\.json: {problem}"):
            read(file)


def test_write_json_is_what_read_json_reads(tmp_path: Path):
    file = tmp_path / "file.json"
    write_json(file, {"größe": [1, None]})
    assert read_json(file) == {"größe": [1, None]}
    assert file.read_bytes() == '{\n  "größe": [\n    1,\n    null\n  ]\n}\n'.encode()


def test_make_directory_refuses_a_file(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        make_directory(tmp_path / "file")
