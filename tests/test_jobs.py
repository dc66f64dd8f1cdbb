"""Long jobs of infer.py: what a kill, a torn file, other settings and other rows do to their output, with one process and with
several; what the answers are worth by its metrics and its judge; and the chat, over a pipe and over a terminal."""

import fcntl
import io
import json
import math
import os
import pty
import random
import re
import select
import shutil
import signal
import statistics
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

import infer
import minilora
from minilora.config import DataConfig, UserError
from minilora.evaluation import graph, metrics
from minilora.running.jobs import Job, Key
from minilora.tokenizer import Tokenizer
from test_failures import TORCHRUN, processes
from test_infer import ARTICLES, FORMATS, NEW_TOKENS, TEXT, answer, ask, base_of, read_rows, reference, trained, user, write_rows

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 60  # seconds for whatever a process is waited for
ROWS = [{"id": f"r{i}", "title": f"t{i * 7} 서울", "abstract": "x " * (i % 13)} for i in range(200)]
SAMPLED: dict = {"temperature": 0.7, "max_new_tokens": 24}
SHORT: dict = {"max_new_tokens": NEW_TOKENS, "temperature": 0.0, "stop": ()}
SETTINGS = ".settings.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_of("llama3", tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def checkpoint(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run on articles."""
    return trained(base, tmp_path_factory.mktemp("runs") / "run", DataConfig(), ARTICLES)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("questions") / "in.jsonl", ROWS)


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path, questions: Path) -> bytes:
    """The answers to all questions by a job left alone."""
    answers = run(checkpoint, questions, questions.with_name("whole.jsonl"), **SAMPLED)
    assert [row["id"] for row in read_rows(questions.with_name("whole.jsonl"))] == [row["id"] for row in ROWS]
    assert len(set(re.findall(rb'"generated": .*', answers))) > 190
    return answers


@pytest.fixture(autouse=True)
def nothing_left_running(tmp_path: Path) -> Iterator[None]:
    yield
    kill_all(tmp_path)


def run(model: Path, source: Path, target: Path, **options) -> bytes:
    """The job in this process; returns what the output then holds."""
    assert infer.main(infer.Args(str(model), input=str(source), output=str(target), **options)) == 0
    return target.read_bytes()


def start(model: Path, source: Path, target: Path, launcher: list[str], **options) -> tuple[subprocess.Popen, Path]:
    """The job as a user starts it; returns the process, and the file that gets all it says."""
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [*launcher, str(ROOT / "infer.py"), str(model), "--input", str(source), "--output", str(target), *flags]
    log = target.with_name("log")
    with log.open("wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"}), log


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait_for_rows(process: subprocess.Popen, log: Path, counts: dict[Path, int]) -> None:
    """Until each file has so many."""
    deadline = time.monotonic() + LIMIT
    while any(lines(file) < count for file, count in counts.items()):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text(encoding="utf-8")
        time.sleep(0.002)


def kill_all(directory: Path) -> None:
    """SIGKILL to every process with a file of the directory on its command line."""
    for pid in processes(directory):
        os.kill(pid, signal.SIGKILL)


def whole_lines(data: bytes) -> bytes:
    return data[: data.rfind(b"\n") + 1]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# --- processes that are killed ---


def test_ten_random_kills(checkpoint: Path, questions: Path, undisturbed: bytes, tmp_path: Path):
    """The same command eleven times; the kills land while rows are answered. No answered row is lost or changed."""
    rng, target, kept = random.Random(0), tmp_path / "out.jsonl", b""
    for _ in range(10):
        count = kept.count(b"\n")
        process, log = start(checkpoint, questions, target, [sys.executable], batch_size=2, **SAMPLED)
        wait_for_rows(process, log, {target: count + rng.randint(1, 12)})
        time.sleep(rng.uniform(0, 0.02))
        process.kill()
        assert process.wait(LIMIT) == -signal.SIGKILL
        assert not count or f"{count} of 200 answers are there already" in log.read_text(encoding="utf-8")
        assert target.read_bytes().startswith(kept)
        kept = whole_lines(target.read_bytes())
    assert 10 <= kept.count(b"\n") < 200
    process, log = start(checkpoint, questions, target, [sys.executable], batch_size=2, **SAMPLED)
    assert process.wait(LIMIT) == 0, log.read_text(encoding="utf-8")
    assert target.read_bytes() == undisturbed
    assert names(tmp_path) == ["log", "out.jsonl", "out.jsonl" + SETTINGS]


def test_ctrl_c_keeps_what_is_answered(checkpoint: Path, questions: Path, undisturbed: bytes, tmp_path: Path):
    target = tmp_path / "out.jsonl"
    process, log = start(checkpoint, questions, target, [sys.executable], batch_size=2, **SAMPLED)
    wait_for_rows(process, log, {target: 5})
    process.send_signal(signal.SIGINT)
    assert process.wait(LIMIT) == 130
    said = log.read_text(encoding="utf-8")
    assert f"stopped: {target} keeps" in said and "the same command goes on" in said and "Traceback" not in said
    kept = target.read_bytes()
    assert 5 <= kept.count(b"\n") < 200 and whole_lines(kept) == kept
    assert run(checkpoint, questions, target, **SAMPLED) == undisturbed
    assert set(kept.splitlines()) < set(undisturbed.splitlines())


def test_two_processes_give_the_file_of_one(checkpoint: Path, questions: Path, undisturbed: bytes, tmp_path: Path):
    target = tmp_path / "out.jsonl"
    process, log = start(checkpoint, questions, target, TORCHRUN, **SAMPLED)
    assert process.wait(LIMIT) == 0, log.read_text(encoding="utf-8")
    assert target.read_bytes() == undisturbed
    assert names(tmp_path) == ["log", "out.jsonl", "out.jsonl" + SETTINGS]
    assert "200 of 200 answers" in log.read_text(encoding="utf-8")


def test_two_processes_are_killed(checkpoint: Path, questions: Path, undisturbed: bytes, tmp_path: Path):
    """And one process goes on, or two do."""
    (tmp_path / "two").mkdir()
    target = tmp_path / "two" / "out.jsonl"
    part = target.with_name("out.jsonl.rank1")
    process, log = start(checkpoint, questions, target, TORCHRUN, batch_size=1, **SAMPLED)
    wait_for_rows(process, log, {target: 3, part: 3})
    kill_all(tmp_path)
    process.wait(LIMIT)
    shares = [{json.loads(line)["id"] for line in whole_lines(file.read_bytes()).splitlines()} for file in (target, part)]
    assert not shares[0] & shares[1]
    count = lines(target) + lines(part)
    assert 6 <= count < 200
    one = shutil.copytree(target.parent, tmp_path / "one")
    assert run(checkpoint, questions, one / "out.jsonl", **SAMPLED) == undisturbed
    process, log = start(checkpoint, questions, target, TORCHRUN, **SAMPLED)
    assert process.wait(LIMIT) == 0, log.read_text(encoding="utf-8")
    assert f"{count} of 200 answers are there already" in log.read_text(encoding="utf-8")
    assert target.read_bytes() == undisturbed
    assert names(one) == names(target.parent) == ["log", "out.jsonl", "out.jsonl" + SETTINGS]


# --- the file ---

KEYS: list[Key] = [("서울", 0), (7, 0), (7, 1), ("x\u2028y", 0)]


def row(key: Key, text: str = "물리 \r \u2028 \x85 \x0b \\n 😀") -> dict:
    return {"id": key[0], "sample": key[1], "generated": text}


def begun(file: Path, keys: list, settings: dict | None = None) -> bytes:
    """Rows as a job leaves them that is killed."""
    job = Job(file, settings or {"a": 1}, KEYS)
    for key in keys:
        job.add(row(key))
    return file.read_bytes() if file.exists() else b""


def test_rows_come_out_in_the_order_wanted(tmp_path: Path):
    file = tmp_path / "out[1]*.jsonl"  # no pattern
    assert Job(file, {}, KEYS).finish() == [] and not names(tmp_path)
    begun(file, [KEYS[3], KEYS[1]])
    job = Job(file, {"a": 1}, iter(KEYS))
    assert list(job.done.items()) == [(key, row(key)) for key in (KEYS[1], KEYS[3])]
    job.add(row(KEYS[0]))
    assert KEYS[0] in job.done
    assert job.finish() == read_rows_by_newline(file) == [row(key) for key in (KEYS[0], KEYS[1], KEYS[3])]
    assert list(Job(file, {"a": 1}, reversed(KEYS)).done) == [KEYS[3], KEYS[1], KEYS[0]]
    assert names(tmp_path) == [file.name, file.name + SETTINGS]


def read_rows_by_newline(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]


@pytest.mark.parametrize("torn", range(6))
def test_parts_of_other_processes_are_taken_in(torn: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Whole or torn. A row that is there twice, since the kill came between taking a part in and removing it, counts once."""
    file = tmp_path / "out.jsonl"
    begun(file, [KEYS[3], KEYS[1]])
    rows = [json.dumps(row(key), ensure_ascii=False).encode() + b"\n" for key in (KEYS[1], KEYS[0])]
    data = b"".join(rows)
    cut = [0, 1, 9, 12, len(rows[1]), len(rows[1]) + 1][torn]
    part = file.with_name("out.jsonl.rank3")
    part.write_bytes(data[: len(data) - cut])
    done = Job(file, {"a": 1}, KEYS).done
    assert set(done) == {KEYS[1], KEYS[3]} | ({KEYS[0]} if cut == 0 else set())
    assert not part.exists() and all(done[key] == row(key) for key in done)
    said = capsys.readouterr().err
    torn_bytes = len(data) - cut - len(whole_lines(data[: len(data) - cut]))
    assert (f"{part}: the last line is torn ({torn_bytes} bytes)" in said) == (torn_bytes > 0)


def test_a_kill_anywhere_in_the_merge_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At each of its calls that change a file; what is written then is half there."""
    killed = 0
    for n in range(1, 20):
        file = tmp_path / str(n) / "out.jsonl"
        file.parent.mkdir()
        begun(file, [KEYS[3]])
        for rank, key in enumerate(KEYS[:3], start=1):
            file.with_name(f"out.jsonl.rank{rank}").write_text(json.dumps(row(key)) + "\n")
        calls = iter(range(1, 99))

        def dying(real: Callable, calls: Iterator[int] = calls, n: int = n) -> Callable:
            def wrapped(first, *rest, **kwargs):
                if next(calls) < n:
                    return real(first, *rest, **kwargs)
                if real.__name__.startswith("write"):
                    real(first, rest[0][: len(rest[0]) // 2], **kwargs)
                raise KeyboardInterrupt

            return wrapped

        with monkeypatch.context() as patch:
            for owner, name in ((os, "replace"), (Path, "unlink"), (Path, "write_text"), (Path, "write_bytes")):
                patch.setattr(owner, name, dying(getattr(owner, name)))
            try:
                Job(file, {"a": 1}, KEYS).finish()
            except KeyboardInterrupt:
                killed += 1
        assert Job(file, {"a": 1}, KEYS).finish() == [row(key) for key in KEYS], f"killed at call {n}"
    assert 5 < killed < 19, "the last ones came to an end"


def test_what_is_no_row_is_named(tmp_path: Path):
    """And left as it is."""
    file = tmp_path / "out.jsonl"
    first, _, third = begun(file, KEYS[:3]).splitlines(keepends=True)
    for middle, message in ((b"{tor", "not JSON"), (b"[1]", "expected a JSON object"), (b'{"id": "\xff"}', "not JSON"),
                            (b'{"id": "other"}', "'other' is not in the input")):  # fmt: skip
        for last in (third, third[:9]):
            file.write_bytes(first + middle + b"\n" + last)
            with pytest.raises(UserError, match=rf"out\.jsonl:2: .*{message}"):
                Job(file, {"a": 1}, KEYS)
            assert file.read_bytes().startswith(first + middle + b"\n")


def test_a_file_of_another_job_is_refused(tmp_path: Path):
    file = tmp_path / "out.jsonl"
    file.write_bytes(b'{"id": 7, "generated": "mine"}\ntorn')
    with pytest.raises(UserError, match="no output of this command"):
        Job(file, {"a": 1}, KEYS)
    assert file.read_bytes() == b'{"id": 7, "generated": "mine"}\ntorn' and names(tmp_path) == ["out.jsonl"]
    file.write_bytes(b"")  # as `touch` makes it
    data = begun(file, KEYS[:1], {"a": (1, None), "b": "서"})
    for settings, name in (({"a": (1, 2), "b": "서"}, "a"), ({"a": (1, None)}, "b"), ({"a": (1, None), "b": "서", "c": 0}, "c")):
        with pytest.raises(UserError, match=rf"other settings \({name}: "):
            Job(file, settings, KEYS)
    assert file.read_bytes() == data
    assert list(Job(file, {"b": "서", "a": [1, None]}, KEYS).done) == KEYS[:1]


def test_settings_without_rows_bind_nobody(tmp_path: Path):
    """The kill came before the first row."""
    file = tmp_path / "out.jsonl"
    begun(file, KEYS[:1])
    file.unlink()
    begun(file, KEYS[:2], {"a": 2})
    assert list(Job(file, {"a": 2}, KEYS).done) == KEYS[:2]


# --- a job that goes on ---

FEW: list[dict] = [{"id": f"질문 {i}", "title": f"t{i} 서울", "abstract": "x"} for i in range(6)]
STOPPED: dict = {"temperature": 0.7, "max_new_tokens": 8, "stop": ()}


@pytest.fixture
def job(checkpoint: Path, tmp_path: Path) -> SimpleNamespace:
    """A finished one: its files, what it wrote, and how to go on: (rows, settings) -> the output."""
    source, target = write_rows(tmp_path / "in.jsonl", FEW), tmp_path / "out.jsonl"

    def go(rows: list[dict] = FEW, model: Path = checkpoint, **options) -> bytes:
        return run(model, write_rows(source, rows), target, **STOPPED | options)

    return SimpleNamespace(source=source, target=target, data=go(), go=go)


def test_a_torn_line_is_answered_again(job: SimpleNamespace, capsys: pytest.CaptureFixture[str]):
    """Wherever it is cut, also within a character."""
    lengths = [len(line) for line in job.data.splitlines(keepends=True)]
    within = next(i for i in range(len(job.data) - 1, 0, -1) if job.data[i] & 0xC0 == 0x80)  # a byte that begins no character
    for kept in (len(job.data) - 1, within, len(job.data) - lengths[-1] + 1, 1):
        job.target.write_bytes(job.data[:kept])
        capsys.readouterr()
        assert job.go() == job.data
        rest = kept - len(whole_lines(job.data[:kept]))
        said = capsys.readouterr().err
        assert f"{job.target}: the last line is torn ({rest} bytes)" in said
        assert kept == 1 or "5 of 6 answers are there already" in said


def test_a_finished_job_needs_no_model(job: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(minilora, "load", None)
    assert job.go(metrics=(), batch_size=3) == job.data
    assert "6 of 6 answers" in capsys.readouterr().err


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_another_batch_size_changes_nothing(batch_size: int, job: SimpleNamespace):
    job.target.write_bytes(b"".join(job.data.splitlines(keepends=True)[3:1:-1]))
    assert job.go(batch_size=batch_size) == job.data


OTHER = {"seed": 1, "temperature": 0.5, "max_new_tokens": 9, "top_p": 0.5, "top_k": 3, "repetition_penalty": 1.5, "stop": ("x",),
         "num_samples": 2, "raw": True, "dtype": "bfloat16", "bits": 4, "fold": False}  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_other_settings_are_refused(name: str, job: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(minilora, "load", None)  # before the model is loaded
    with pytest.raises(UserError, match=rf"other settings \({name}: "):
        job.go(**{name: OTHER[name]})
    assert job.target.read_bytes() == job.data


WRITTEN = {"the adapter, anew": 10**9, "the adapter, an older one": -(10**15), "the base under it": 10**9}  # nanoseconds


@pytest.mark.parametrize("what", WRITTEN)
def test_another_model_is_refused(what: str, checkpoint: Path, base: Path, tmp_path: Path):
    """Also one written in place of the first."""
    below = shutil.copytree(base, tmp_path / "base")
    model = shutil.copytree(checkpoint, tmp_path / "model")
    file = model / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(below)}))
    source, target = write_rows(tmp_path / "in.jsonl", FEW), tmp_path / "out.jsonl"
    run(model, source, target, **STOPPED)
    with pytest.raises(UserError, match=r"other settings \(model: "):
        run(checkpoint, source, target, **STOPPED)
    weights = model / "adapter_model.safetensors" if "adapter" in what else below / "model.safetensors"
    stat = weights.stat()
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + WRITTEN[what]))
    with pytest.raises(UserError, match=r"other settings \(written: "):
        run(model, source, target, **STOPPED)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    run(model, source, target, **STOPPED)


def test_rows_may_be_added(job: SimpleNamespace, checkpoint: Path, tmp_path: Path):
    added = [*FEW, {"id": "new", "title": "t", "abstract": "y"}, {"title": "without id", "abstract": ""}]
    data = job.go(added)
    assert data.startswith(job.data) and data == run(checkpoint, job.source, tmp_path / "anew.jsonl", **STOPPED)
    assert json.loads(data.splitlines()[-1])["id"] == 7, "its place"
    added[-1] = {"id": 7} | added[-1]
    more = job.go([{"id": "first", "title": "t", "abstract": "y"}, *added[::-1]])
    assert [json.loads(line)["id"] for line in more.splitlines()] == ["first", 7, "new", *(r["id"] for r in FEW[::-1])]
    assert set(data.splitlines()) < set(more.splitlines())


def test_rows_may_not_change(job: SimpleNamespace):
    changes: dict[str, dict] = {
        "abstract changed": {"abstract": "y"},
        "note changed": {"note": 1},
        "is not in the input": {"id": "other"},
    }
    for message, change in changes.items():
        with pytest.raises(UserError, match=message) as error:
            job.go([*FEW[:2], FEW[2] | change, *FEW[3:]])
        assert f"{job.target}:3" in str(error.value) or f"{job.source}:3" in str(error.value)
    for gone in (0, 5):
        with pytest.raises(UserError, match=rf"out\.jsonl:{gone + 1}: id .* is not in the input"):
            job.go(FEW[:gone] + FEW[gone + 1 :])
    assert job.target.read_bytes() == job.data


def test_a_column_may_not_go(job: SimpleNamespace):
    noted = [row | {"note": "n"} for row in FEW]
    job.target.unlink()
    job.go(noted)
    with pytest.raises(UserError, match=r"in\.jsonl:1: note changed"):
        job.go()


def test_a_row_may_not_change_though_only_a_later_sample_is_there(job: SimpleNamespace):
    """Samples end in any order."""
    job.target.unlink()
    data = job.go(num_samples=2)
    job.target.write_bytes(data.splitlines(keepends=True)[1])
    with pytest.raises(UserError, match=r"in\.jsonl:1: abstract changed"):
        job.go([FEW[0] | {"abstract": "y"}, *FEW[1:]], num_samples=2)


COLUMNS: dict[str, dict] = {
    "an earlier answer": {"generated": "old"},
    "not a number": {"score": math.nan},
    "a sample": {"sample": 4},
}


@pytest.mark.parametrize("case", COLUMNS)
def test_columns_that_are_ours_are_refused_or_no_trouble(case: str, job: SimpleNamespace):
    """Never an error once the rows are answered, and the job goes on."""
    rows = [row | COLUMNS[case] for row in FEW]
    job.target.unlink()
    job.target.with_name(job.target.name + SETTINGS).unlink()
    try:
        data = job.go(rows)
    except UserError as error:
        assert "changed since" not in str(error)
        assert names(job.target.parent) == ["in.jsonl"]
        return
    assert len(data.splitlines()) == len(FEW)
    job.target.write_bytes(b"".join(data.splitlines(keepends=True)[:3]))
    assert job.go(rows) == data


@pytest.mark.parametrize("ids", [("a", "a"), (1, None), (1.5, 2), ([], "a"), (True, 1)])
def test_ids_must_tell_rows_apart(ids: tuple, checkpoint: Path, tmp_path: Path):
    """A row without an id gets its place: here None, at place 1."""
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "x"} | ({} if i is None else {"id": i}) for i in ids])
    with pytest.raises(UserError, match=r'in\.jsonl:[12]: "id": '):
        run(checkpoint, source, tmp_path / "out.jsonl")
    assert names(tmp_path) == ["in.jsonl"]


def test_nothing_is_written_before_the_first_answer(checkpoint: Path, tmp_path: Path):
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    (broken / "adapter_model.safetensors").unlink()
    for model, last in ((broken, FEW[5]), (checkpoint, {"title": "no abstract"})):
        source = write_rows(tmp_path / "in.jsonl", [*FEW[:5], last])
        with pytest.raises(UserError):
            run(model, source, tmp_path / "out.jsonl", **STOPPED)
        assert names(tmp_path) == ["broken", "in.jsonl"]


def test_max_time(checkpoint: Path, questions: Path, undisturbed: bytes, tmp_path: Path, monkeypatch, capsys):
    """By a clock that a pass of the model puts forward by a second."""
    target = tmp_path / "out.jsonl"
    for limit, most in ((1, 0), (90, 199), (90, 199)):
        clock = iter(range(10**6))
        monkeypatch.setattr(sys.modules["minilora.generate"], "time", SimpleNamespace(monotonic=lambda clock=clock: next(clock)))
        before = lines(target)
        assert infer.main(infer.Args(str(checkpoint), input=str(questions), output=str(target), max_time=limit, **SAMPLED)) == 0
        count = lines(target)
        assert before < count <= most if most else names(tmp_path) == []
        assert f"{count} of 200 answers: {target}; the same command goes on" in capsys.readouterr().err
    order = [json.loads(line)["id"] for line in target.read_bytes().splitlines()]
    assert order == sorted(order, key=lambda name: int(name[1:]))
    monkeypatch.undo()
    assert run(checkpoint, questions, target, **SAMPLED) == undisturbed


def test_several_samples(checkpoint: Path, tmp_path: Path):
    """Keys are (id, sample); neither the batch nor a restart decides what they are."""
    source, options = write_rows(tmp_path / "in.jsonl", FEW), STOPPED | {"num_samples": 3, "temperature": 1.0}
    data = run(checkpoint, source, tmp_path / "out.jsonl", **options)
    rows = read_rows(tmp_path / "out.jsonl")
    assert [(r["id"], r["sample"]) for r in rows] == [(r["id"], i) for r in FEW for i in range(3)]
    assert len({r["generated"] for r in rows}) == 18
    assert run(checkpoint, source, tmp_path / "small.jsonl", batch_size=1, **options) == data
    some = random.Random(0).sample(data.splitlines(keepends=True), 7)
    (tmp_path / "out.jsonl").write_bytes(b"".join(some) + data[:20])
    assert run(checkpoint, source, tmp_path / "out.jsonl", batch_size=4, **options) == data


# --- the adapter ---


def test_fold(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The same texts, with the adapter in 16- or 32-bit weights or beside them."""
    folded: list = []
    monkeypatch.setattr(infer, "fold", lambda model, real=infer.fold: folded.append(real(model)))
    for options in (SHORT, SHORT | {"temperature": 1.0}):
        assert ask(checkpoint, FEW, tmp_path, **options) == ask(checkpoint, FEW, tmp_path, fold=False, **options)
    assert len(folded) == 2


@pytest.mark.parametrize("over", [16, 4, 8])
def test_no_adapter_goes_into_quantised_weights(over: int, checkpoint: Path, tmp_path: Path):
    """Asked for, or those that the adapter was trained over."""
    directory = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    state = json.loads((directory / "trainer_state.json").read_text())
    state["config"]["model"]["bits"] = over  # as such a run leaves it
    (directory / "trainer_state.json").write_text(json.dumps(state))
    bits = 4 if over == 16 else over
    model, tokenizer = minilora.load(str(checkpoint), bits=bits)
    prompts = [tokenizer.render(user(f"Title: {r['title']}\n{r['abstract']}"), add_generation_prompt=True) for r in FEW]
    expected = minilora.generate(model, tokenizer, prompts, NEW_TOKENS)
    assert expected != [r["generated"] for r in ask(checkpoint, FEW, tmp_path)]
    for options in ({"bits": bits}, {"bits": bits, "fold": False}) if over == 16 else ({},):
        assert [r["generated"] for r in ask(directory, FEW, tmp_path, **options)] == expected


# --- metrics ---

WANTED: dict[str, Callable[[dict], str]] = {
    "paths": lambda row: "".join(" -> ".join(path) + "\n" for path in row["paths"]),
    "prompt": lambda row: row["completion"],
    "messages": lambda row: row["messages"][-1]["content"],
    "text": lambda row: row["text"].split("### Answer:\n")[1],
}


def token_losses(directory: Path, name: str, row: dict) -> list[float]:
    """Of the supervised tokens of a row, by transformers and PEFT."""
    model, tokens = reference(directory)

    def render(turns: list[dict], **kwargs) -> list[int]:
        return tokens.apply_chat_template(turns, return_dict=False, **kwargs)

    if name == "text":
        asked, marker, _ = row["text"].rpartition("### Answer:\n")
        ids = tokens(row["text"] + tokens.eos_token).input_ids
        spans = [(len(tokens(asked + marker).input_ids), len(ids))]
    else:
        asked = FORMATS[name][2](row)
        turns = row.get("messages") or [*asked, {"role": "assistant", "content": WANTED[name](row)}]
        ids = render(turns)
        spans = [(len(render(turns[:i], add_generation_prompt=True)), len(render(turns[: i + 1])))
                 for i, turn in enumerate(turns) if turn["role"] == "assistant"]  # fmt: skip
    with torch.no_grad():
        found = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [-found[i - 1, ids[i]].item() for begin, end in spans for i in range(begin, end)]


@pytest.mark.parametrize("name", WANTED)
def test_metrics(name: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The figures are those of the output's rows; the loss is transformers'."""
    data, rows, _ = FORMATS[name]
    model, target = trained(base, tmp_path / "run", data, rows), tmp_path / "answers.jsonl"
    asked = ("chrf", "exact_match", "edit_distance", "rouge", *(("graph",) if name == "paths" else ()))
    source = write_rows(tmp_path / "in.jsonl", rows)
    capsys.readouterr()
    run(model, source, target, metrics=("ppl", *asked, "loss"), batch_size=3, **SHORT)
    figures = json.loads((tmp_path / "answers.metrics.json").read_text(encoding="utf-8"))
    assert capsys.readouterr().out == metrics.table(figures) + "\n"
    losses = [loss for row in rows for loss in token_losses(model, name, row)]
    assert figures.pop("loss") == pytest.approx(statistics.fmean(losses), rel=1e-4)
    assert figures.pop("ppl") == pytest.approx(math.exp(statistics.fmean(losses)), rel=1e-3)
    texts, references = [row["generated"] for row in read_rows(target)], [WANTED[name](row) for row in rows]
    assert figures == {"answers": len(rows), "loss/rows": len(rows), **metrics.score(asked, texts, references)}
    assert (tmp_path / "answers.graph.json").exists() == (name == "paths")


def answered(args: infer.Args, texts: list[str]) -> None:
    """Leave the job of args with these answers."""
    rows = [row for _, row in infer.numbered(args.input or "")]
    job = Job(args.output or "", infer.settings_of(args), [(row["id"], 0) for row in rows])
    for row, text in zip(rows, texts, strict=True):
        job.add(row | {"generated": text})
    job.finish()


PATHS = [[["Main", "A", "B"], ["Main", "C"]], [["Main", "A", "D"]], [["Main", "E", "F"]], [["Main", "C", "G"]]]
MADE = [
    "Main -> A -> B\nMain -> A\nx -> x\n", "Main -> A -> D\nMain -> Z\nno path\n", "Main -> E -> F\n", "G -> C\nC -> G\nC -> G\n",
]  # fmt: skip
TUNED = ["Main -> A -> B\nMain -> A -> Z\n", "Main -> A -> D\nMain -> D\n", "Main -> A -> D\n", "Main -> C\nMain -> C -> A\n"]
ROWS_OF_PATHS: list[dict] = [{"id": i, "title": f"t{i}", "abstract": "a", "paths": paths} for i, paths in enumerate(PATHS)]


@pytest.fixture
def graph_args(checkpoint: Path, tmp_path: Path) -> infer.Args:
    """A finished job with answers that are paths."""
    source = write_rows(tmp_path / "in.jsonl", ROWS_OF_PATHS)
    args = infer.Args(str(checkpoint), input=str(source), output=str(tmp_path / "out.jsonl"), metrics=("graph", "exact_match"))
    answered(args, MADE)
    return args


def test_graph_of_answers_that_are_there(graph_args: infer.Args, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without the model."""
    monkeypatch.setattr(minilora, "load", None)
    assert infer.main(graph_args) == 0
    references = [WANTED["paths"](row) for row in ROWS_OF_PATHS]
    figures = json.loads((tmp_path / "out.metrics.json").read_text())
    assert figures == {"answers": 4, **metrics.score(graph_args.metrics, MADE, references)}
    assert figures["graph/lines"] == 10 and figures["graph/well_formed"] == 0.9 and figures["exact_match"] == 0.25
    edges = {(u, v): n for u, v, n in graph.read(tmp_path / "out.graph.json").edges(data="weight")}
    assert edges[("Main", "A")] == 3 and edges[("C", "G")] == 2 and edges[("x", "x")] == 1 and len(edges) == 9


def test_thresholds_are_found_on_the_evaluation_answers(graph_args: infer.Args, tmp_path: Path, capsys):
    graph_args.prune_on = str(tmp_path / "eval.jsonl")
    tuning = [row | {"generated": text} for row, text in zip(ROWS_OF_PATHS, TUNED, strict=True)]
    write_rows(tmp_path / "eval.jsonl", tuning)
    assert infer.main(graph_args) == 0
    references = [WANTED["paths"](row) for row in ROWS_OF_PATHS]
    found, best = graph.search(graph.build(TUNED), graph.build(references))
    own, _ = graph.search(graph.build(MADE), graph.build(references))
    assert own != found != graph.Thresholds()
    figures, pruned = graph.score(MADE, references, found)
    assert f"edge F1 {best:.4f}" in capsys.readouterr().err
    written = json.loads((tmp_path / "out.metrics.json").read_text())
    assert {key: written[key] for key in written if "graph/" in key} == {f"graph/{key}": figures[key] for key in figures}
    assert sorted(graph.read(tmp_path / "out.graph.json").edges(data=True)) == sorted(pruned.edges(data=True))
    assert 0 < len(pruned.edges) < figures["edges"]


@pytest.mark.parametrize("name", ["paths", "generated"])
def test_an_evaluation_answer_without_its_columns_is_named(name: str, graph_args: infer.Args, tmp_path: Path):
    graph_args.prune_on = str(tmp_path / "eval.jsonl")
    tuning = [row | {"generated": text} for row, text in zip(ROWS_OF_PATHS, TUNED, strict=True)]
    tuning[1] = {key: value for key, value in tuning[1].items() if key != name}
    write_rows(tmp_path / "eval.jsonl", tuning)
    with pytest.raises(UserError, match=rf'eval\.jsonl:2: .*"{name}"'):
        infer.main(graph_args)


@pytest.mark.parametrize("paths", [None, "a", [1], ["ab"], [["a", 1]]])
def test_an_answer_without_reference_is_named(paths: object, graph_args: infer.Args, tmp_path: Path):
    graph_args.output = str(tmp_path / "other.jsonl")
    rows = [*ROWS_OF_PATHS[:2], {k: v for k, v in (ROWS_OF_PATHS[2] | {"paths": paths}).items() if v}, ROWS_OF_PATHS[3]]
    write_rows(tmp_path / "in.jsonl", rows)
    answered(graph_args, MADE)
    with pytest.raises(UserError, match=r'in\.jsonl:3: .*"paths"'):
        infer.main(graph_args)


def test_metrics_of_raw_prompts(checkpoint: Path, tmp_path: Path):
    """Are the same when the answers are there already."""
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": TEXT, "completion": "x"}, {"prompt": "y", "completion": "z"}])
    found = []
    for _ in range(2):
        run(checkpoint, source, tmp_path / "out.jsonl", raw=True, metrics=("edit_distance",), **SHORT)
        found.append((tmp_path / "out.metrics.json").read_bytes())
        (tmp_path / "out.metrics.json").unlink()
    assert found[0] == found[1]


def test_a_loss_of_no_tokens_is_refused(base: Path, tmp_path: Path):
    """Every row is longer than the run's longest document."""
    short = DataConfig(format="prompt", max_seq_length=40)
    model = trained(base, tmp_path / "run", short, [{"prompt": "a", "completion": "b"}])
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "word " * 60, "completion": "b"}])
    with pytest.raises(UserError):
        run(model, source, tmp_path / "out.jsonl", metrics=("loss",), **SHORT)


# --- a judge ---


def test_a_judge_end_to_end(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """By the rubric of examples/. Asked again, the same command asks for nothing; and the key is in no file."""
    import test_judge

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", test_judge.SECRET)
    source, target = write_rows(tmp_path / "in.jsonl", FEW), tmp_path / "out.jsonl"
    data = run(checkpoint, source, target, **STOPPED)
    answers = [row["generated"] for row in read_rows(target)]
    scores = {text: {"correctness": 1 + i % 5, "faithfulness": 5, "style": 1 + i % 3} for i, text in enumerate(answers)}
    server = test_judge.Endpoint()
    server.reply = lambda answer, n: json.dumps({"scores": scores[answer], "reason": "이유"})
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    options = {"judge": server.url, "judge_model": "j", "rubric": str(ROOT / "examples" / "rubric.json"), "judge_requests": 3}
    try:
        capsys.readouterr()
        assert run(checkpoint, source, target, **options, **STOPPED) == data
        printed = capsys.readouterr().out
        assert len(server.bodies) == 6 and server.keys == {f"Bearer {test_judge.SECRET}"} and server.most <= 3
        assert run(checkpoint, source, target, **options, **STOPPED) == data
        assert len(server.bodies) == 6
    finally:
        server.shutdown()
        server.server_close()
    verdicts = read_rows(tmp_path / "out.judge.jsonl")
    assert [row["id"] for row in verdicts] == [row["id"] for row in FEW]
    assert [row["scores"] for row in verdicts] == [scores[text] for text in answers]
    asked = [body["messages"][1]["content"] for body in server.bodies]
    assert all(any(f"\nTitle: {row['title']}\n{row['abstract']}\n====" in text for text in asked) for row in FEW)
    summary = json.loads((tmp_path / "out.judge.json").read_text())
    assert summary["failed"] == {} and summary["stats"]["correctness"]["n"] == 6
    assert summary["stats"]["correctness"]["mean"] == pytest.approx((1 + 2 + 3 + 4 + 5 + 1) / 6)
    assert summary["stats"]["style"]["sd"] == pytest.approx(statistics.stdev([1, 2, 3, 1, 2, 3]))
    assert re.search(r"^faithfulness +6 +5\.000 +0\.000", printed, re.MULTILINE)
    for file in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert test_judge.SECRET.encode() not in file.read_bytes(), file


# --- chat ---


@pytest.fixture(scope="module")
def talker(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run on questions, whose chat has no settings of its own."""
    return trained(base, tmp_path_factory.mktemp("talker") / "run", *FORMATS["prompt"][:2])


def chat(model: Path, typed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], **options) -> str:
    """What a chat in this process shows."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert infer.main(infer.Args(str(model), **SHORT | options)) == 0
    return capsys.readouterr().out


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def test_chat_over_a_pipe(talker: Path):
    """The conversation so far is part of the question, until a new one begins."""
    first = answer(talker, user("q1 서울?"))
    second = answer(talker, [*user("q1 서울?"), assistant(first), *user("q2")])
    third = answer(talker, [*user("q1 서울?"), assistant(first), *user("q2"), assistant(second), *user("q1 서울?")])
    assert len({first, second, third, answer(talker, user("q2"))}) == 4
    command = [sys.executable, str(ROOT / "infer.py"), str(talker), "--temperature", "0", "--max_new_tokens", str(NEW_TOKENS)]
    typed = "q1 서울?\n  \nq2\nq1 서울?\n /new \nq1 서울?"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, input=typed.encode(), capture_output=True, timeout=LIMIT, env=environment)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert done.stdout.decode() == "".join(text + "\n" for text in (first, second, third, first))


@pytest.mark.parametrize("name", ["prompt without chat", "text"])
def test_a_chat_with_a_model_of_plain_text(name: str, base: Path, tmp_path: Path, monkeypatch, capsys):
    """Each line is put to it as it is, as by --prompt."""
    model = trained(base, tmp_path / "run", *FORMATS[name][:2])
    assert chat(model, "a\nb\n", monkeypatch, capsys) == answer(model, "a") + "\n" + answer(model, "b") + "\n"


def test_stop_strings_in_a_chat(talker: Path, monkeypatch, capsys):
    """What may begin one is held back; nothing is shown twice."""
    whole = answer(talker, user(TEXT))
    for stop in ("never there", whole[:4] + "no", "\n\n\n\n"):
        assert chat(talker, TEXT, monkeypatch, capsys, stop=(stop, "~~~")) == whole + "\n"
    for at in range(len(whole) - 2):
        stop = whole[at : at + 3]
        assert chat(talker, TEXT, monkeypatch, capsys, stop=(stop,)) == whole[: whole.index(stop)] + "\n"


def test_an_answer_cut_off_stays_in_the_conversation(talker: Path, monkeypatch, capsys):
    """As far as it was shown."""
    real, asked = infer.answers_to, []

    def cut(args, model, tokenizer, prompts, indices):
        asked.append(prompts[0])
        for n, each in enumerate(real(args, model, tokenizer, prompts, indices)):
            if n == 5 and len(asked) == 1:
                raise KeyboardInterrupt
            yield each

    monkeypatch.setattr(infer, "answers_to", cut)
    first, second = chat(talker, f"{TEXT}\nq2", monkeypatch, capsys).rsplit("\n", 2)[:2]
    assert 0 < len(first) < len(answer(talker, user(TEXT))) and answer(talker, user(TEXT)).startswith(first)
    turns = [*user(TEXT), assistant(first), *user("q2")]
    assert asked[1] == reference(talker)[1].apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert second == answer(talker, turns)


class Terminal:
    """A process on a terminal of its own."""

    def __init__(self, command: list[str]):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env=os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb", "INPUTRC": "/dev/null"},
        )  # fmt: skip
        os.close(slave)

    def until(self, condition: Callable[[bytes], object]) -> bytes:
        """What it shows from now on until the condition holds for that."""
        shown, deadline = b"", time.monotonic() + LIMIT
        while not condition(shown):
            assert time.monotonic() < deadline, shown[-500:]
            if select.select([self.master], [], [], 1)[0]:
                shown += os.read(self.master, 65536)
        return shown

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)


def test_chat_over_a_terminal(base: Path, tmp_path: Path):
    """Ctrl-C cuts off an answer without end, not the chat; Ctrl-D ends it."""
    model = shutil.copytree(base, tmp_path / "model")
    tensors, tokens = safetensors.torch.load_file(model / "model.safetensors"), Tokenizer(model)
    for token in {tokens.eos_id, *tokens.stop_ids()}:
        tensors["lm_head.weight"][token] = 0  # others are always likelier
    safetensors.torch.save_file(tensors, model / "model.safetensors", {"format": "pt"})
    terminal = Terminal([sys.executable, str(ROOT / "infer.py"), str(model), "--max_new_tokens", "100000"])
    try:
        assert b"Ctrl-C cuts an answer off" in terminal.until(lambda shown: shown.endswith(b"> "))
        for _ in range(2):
            terminal.type(b"question\n")
            terminal.until(lambda shown: len(shown.partition(b"question\r\n")[2]) > 200)
            terminal.type(b"\x03")
            terminal.until(lambda shown: shown.endswith(b"\r\n> "))
        terminal.type(b"\x04")
        assert terminal.process.wait(LIMIT) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.master)


# --- one writer at a time, and what else a shell can do ---


def test_two_commands_do_not_write_one_output(tmp_path: Path):
    """The second is refused while the first lives; a kill gives the output free."""
    file = tmp_path / "out.jsonl"
    code = (
        f"from minilora.running.jobs import Job; job = Job({str(file)!r}, {{}}, [('a', 0)]); print('held', flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=r"out\.jsonl: another command is writing"):
            Job(file, {}, [("a", 0)])
        holder.kill()
        holder.wait()
    assert Job(file, {}, [("a", 0)]).finish() == []


def test_an_output_that_is_a_link_stays_one(checkpoint: Path, tmp_path: Path):
    source, real, link = write_rows(tmp_path / "in.jsonl", FEW), tmp_path / "elsewhere" / "real.jsonl", tmp_path / "out.jsonl"
    real.parent.mkdir()
    link.symlink_to(real)
    run(checkpoint, source, link, **SHORT)
    assert link.is_symlink() and len(read_rows(real)) == len(FEW)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "/dev/null"}, "no regular file"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty"),
        ({"max_time": float("nan")}, "max_time"),
        ({"temperature": float("nan")}, "temperature"),
        ({"input": "empty.jsonl"}, "no rows"),
    ],
)
def test_odd_arguments_are_refused(
    changes: dict, message: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "in.jsonl", FEW)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=message):
        infer.main(infer.Args(str(checkpoint), **{"input": "in.jsonl", "output": "out.jsonl", **changes}))
    assert names(tmp_path) == ["empty.jsonl", "in.jsonl"]


def test_a_reference_without_number_is_refused_before_anything_is_asked(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):  # fmt: skip
    monkeypatch.setattr(minilora, "load", None)
    source = write_rows(tmp_path / "in.jsonl", [{**row, "paths": [["Main", "no number"]]} for row in FEW])
    with pytest.raises(UserError, match="numeric: reference 1"):
        run(checkpoint, source, tmp_path / "out.jsonl", metrics=("numeric",), **SHORT)


def test_the_wrong_base_and_too_long_prompts_are_said(
    checkpoint: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):  # fmt: skip
    other = tmp_path / "other"
    shutil.copytree(base, other)
    source = write_rows(tmp_path / "in.jsonl", [FEW[0], {**FEW[1], "abstract": "long " * 3000}])
    run(other, source, tmp_path / "out.jsonl", adapter=str(checkpoint), **SHORT)
    said = capsys.readouterr().err
    assert f"was trained over {base}" in said and "the longest prompt has" in said


def test_bytes_that_are_no_text_and_a_reader_that_leaves(checkpoint: Path):
    command = [sys.executable, "infer.py", str(checkpoint), "--max_new_tokens", "4"]
    chat = subprocess.run(command, cwd=ROOT, input=b"bad \xff\xfe\nok\n", capture_output=True, timeout=120)
    assert chat.returncode == 0 and chat.stdout.count(b"\n") >= 2, chat.stderr.decode()
    shell = f"{' '.join(command)} --prompt hi | true; exit ${{PIPESTATUS[0]}}"
    left = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, timeout=120)
    assert left.returncode in (0, 141) and b"Traceback" not in left.stderr, left.stderr.decode()
