"""The output file of a job: rows are kept, torn lines cut off, other jobs' files refused."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers.checkpoints import names
from minilora.errors import UserError
from minilora.generation.jobs import Job, Key, Row, read_input_rows, read_rows, row_key

ROOT = Path(__file__).resolve().parents[2]
KEYS: list[Key] = [("서울", 0), (7, 0), (7, 1), ("x\u2028y", 0)]
SETTINGS = ".settings.json"


def row(key: Key, text: str = "물리 \r \u2028 \x85 \x0b \\n 😀") -> dict:
    return {"id": key[0], "sample": key[1], "generated": text}


def start_job(file: Path, keys: list, settings: dict | None = None) -> bytes:
    """Write rows as a job leaves them that is killed; returns the file's content."""
    job = Job(file, settings or {"a": 1}, KEYS)
    for key in keys:
        job.add(row(key))
    return file.read_bytes() if file.exists() else b""


def complete_lines(data: bytes) -> bytes:
    """Return data up to its last newline."""
    return data[: data.rfind(b"\n") + 1]


# --- rows ---


def test_rows_come_out_in_the_order_wanted(tmp_path: Path):
    file = tmp_path / "out[1]*.jsonl"  # not a pattern
    assert Job(file, {}, KEYS).finish() == [] and not names(tmp_path)
    start_job(file, [KEYS[3], KEYS[1]])
    job = Job(file, {"a": 1}, iter(KEYS))
    assert list(job.done.items()) == [(key, row(key)) for key in (KEYS[1], KEYS[3])]
    job.add(row(KEYS[0]))
    assert KEYS[0] in job.done

    expected = [row(key) for key in (KEYS[0], KEYS[1], KEYS[3])]
    assert job.finish() == expected
    lines = file.read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines[:-1]] == expected and lines[-1] == b""
    assert list(Job(file, {"a": 1}, reversed(KEYS)).done) == [KEYS[3], KEYS[1], KEYS[0]]
    assert names(tmp_path) == [file.name, file.name + SETTINGS]


def test_lines_that_are_not_rows_are_named(tmp_path: Path):
    """And left as they are."""
    file = tmp_path / "out.jsonl"
    first, _, third = start_job(file, KEYS[:3]).splitlines(keepends=True)
    for middle, message in (
        (b"{tor", "not JSON"),
        (b"[1]", "expected a JSON object"),
        (b'{"id": "\xff"}', "not JSON"),
        (b'{"id": "other"}', "'other' is not in the input"),
    ):
        for last in (third, third[:9]):
            file.write_bytes(first + middle + b"\n" + last)
            with pytest.raises(UserError, match=rf"out\.jsonl:2: .*{message}"):
                Job(file, {"a": 1}, KEYS)
            assert file.read_bytes().startswith(first + middle + b"\n")


def test_rows_of_an_input_get_their_place_as_id(tmp_path: Path):
    """Blank lines count as lines, not as rows."""
    file = tmp_path / "in.jsonl"
    file.write_text('{"x": 1}\n\n{"id": "own", "x": 2}\n{"x": 3, "sample": 1}\n', encoding="utf-8")
    rows = read_input_rows(str(file))
    assert rows == [
        Row(1, {"id": 0, "x": 1}),
        Row(3, {"id": "own", "x": 2}),
        Row(4, {"id": 2, "x": 3, "sample": 1}),
    ]
    assert [next(iter(values)) for _, values in rows] == ["id", "id", "id"]
    assert [row_key(values) for _, values in rows] == [(0, 0), ("own", 0), (2, 1)]
    assert read_rows(file)[0] == Row(1, {"x": 1})


def test_a_line_that_cannot_be_read_is_named(tmp_path: Path):
    """Also one that the reader of CSV finds wrong, whose content is empty."""
    file = tmp_path / "in.csv"
    file.write_text("a,b\n1,2\n\n1,2,3\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"in\.csv:4: has 3 fields"):
        read_input_rows(str(file))


# --- kills ---


@pytest.mark.parametrize("torn", range(6))
def test_rows_of_other_processes_are_moved_into_the_output(
    torn: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Of whole and of torn files.

    A row may be there twice, if a kill came between moving a file's rows and removing the file.
    It then counts once.
    """
    file = tmp_path / "out.jsonl"
    start_job(file, [KEYS[3], KEYS[1]])
    lines = [json.dumps(row(key), ensure_ascii=False).encode() + b"\n" for key in KEYS[1::-1]]
    data = b"".join(lines)
    num_cut = [0, 1, 9, 12, len(lines[1]), len(lines[1]) + 1][torn]
    left = data[: len(data) - num_cut]
    part = file.with_name("out.jsonl.rank3")
    part.write_bytes(left)

    done = Job(file, {"a": 1}, KEYS).done
    expected = {KEYS[1], KEYS[3]}
    if num_cut == 0:
        expected.add(KEYS[0])
    assert set(done) == expected
    assert not part.exists() and all(done[key] == row(key) for key in done)

    said = capsys.readouterr().err
    num_torn = len(left) - len(complete_lines(left))
    is_told = f"{part}: the last line is torn ({num_torn} bytes)" in said
    assert is_told == (num_torn > 0)


def test_a_kill_anywhere_in_the_end_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At each call that changes a file; what the call writes is half there."""
    num_killed = 0
    for n in range(1, 20):
        file = tmp_path / str(n) / "out.jsonl"
        file.parent.mkdir()
        start_job(file, [KEYS[3]])
        for rank, key in enumerate(KEYS[:3], start=1):
            file.with_name(f"out.jsonl.rank{rank}").write_text(json.dumps(row(key)) + "\n")

        with monkeypatch.context() as patch:
            kill_at_call(patch, n)
            try:
                Job(file, {"a": 1}, KEYS).finish()
            except KeyboardInterrupt:
                num_killed += 1
        expected = [row(key) for key in KEYS]
        assert Job(file, {"a": 1}, KEYS).finish() == expected, f"killed at call {n}"
    assert 5 < num_killed < 19, "the last ones came to an end"


def kill_at_call(patch: pytest.MonkeyPatch, n: int) -> None:
    """Raise KeyboardInterrupt in the n-th call, and in all later ones, of what changes files."""
    calls = iter(range(1, 99))

    def wrap(real: Callable) -> Callable:
        def wrapped(first, *rest, **options):
            if next(calls) < n:
                return real(first, *rest, **options)
            if real.__name__.startswith("write"):
                real(first, rest[0][: len(rest[0]) // 2], **options)
            raise KeyboardInterrupt

        return wrapped

    for owner, name in (
        (os, "replace"),
        (Path, "unlink"),
        (Path, "write_text"),
        (Path, "write_bytes"),
    ):
        patch.setattr(owner, name, wrap(getattr(owner, name)))


# --- other jobs ---


def test_a_file_of_another_job_is_refused(tmp_path: Path):
    file = tmp_path / "out.jsonl"
    mine = b'{"id": 7, "generated": "mine"}\ntorn'
    file.write_bytes(mine)
    with pytest.raises(UserError, match="not an output of this command"):
        Job(file, {"a": 1}, KEYS)
    assert file.read_bytes() == mine and names(tmp_path) == ["out.jsonl"]

    file.write_bytes(b"")  # as `touch` makes it
    data = start_job(file, KEYS[:1], {"a": (1, None), "b": "서"})
    for settings, name in (
        ({"a": (1, 2), "b": "서"}, "a"),
        ({"a": (1, None)}, "b"),
        ({"a": (1, None), "b": "서", "c": 0}, "c"),
    ):
        with pytest.raises(UserError, match=rf"other settings \({name}: "):
            Job(file, settings, KEYS)
    assert file.read_bytes() == data
    assert list(Job(file, {"b": "서", "a": [1, None]}, KEYS).done) == KEYS[:1]


def test_settings_without_rows_bind_nobody(tmp_path: Path):
    """The kill came before the first row."""
    file = tmp_path / "out.jsonl"
    start_job(file, KEYS[:1])
    file.unlink()
    start_job(file, KEYS[:2], {"a": 2})
    assert list(Job(file, {"a": 2}, KEYS).done) == KEYS[:2]


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Start another command that writes to out.jsonl, and waits."""
    code = (
        "from minilora.generation.jobs import Job\n"
        f"job = Job({str(tmp_path / 'out.jsonl')!r}, {{}}, [('a', 0)])\n"
        "print('held', flush=True)\n"
        "input()\n"
    )
    command = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        yield process
        process.kill()


@pytest.mark.system
def test_two_commands_do_not_write_one_output(holder: subprocess.Popen, tmp_path: Path):
    """The second is refused while the first lives; a kill gives the output free."""
    file = tmp_path / "out.jsonl"
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=r"out\.jsonl: another command is writing"):
        Job(file, {}, [("a", 0)])
    holder.kill()
    holder.wait()
    assert Job(file, {}, [("a", 0)]).finish() == []
