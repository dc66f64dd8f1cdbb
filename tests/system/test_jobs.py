"""Long jobs of infer.py in processes that are killed or stopped: no answered row is lost."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.asking import (
    ARTICLES,
    answer_file,
    read_rows,
    train_adapter,
    write_base,
    write_rows,
)
from helpers.checkpoints import names
from helpers.processes import TORCHRUN, kill_processes_of
from minilora.config import DataConfig

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 60  # seconds for whatever a process is waited for
ROWS = [{"id": f"r{i}", "title": f"t{i * 7} 서울", "abstract": "x " * (i % 13)} for i in range(200)]
SAMPLED: dict = {"temperature": 0.7, "max_new_tokens": 24}
FILES = ["log", "out.jsonl", "out.jsonl.settings.json"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train an adapter on articles."""
    base = write_base("llama3", tmp_path_factory.mktemp("base") / "llama")
    return train_adapter(base, tmp_path_factory.mktemp("runs") / "run", DataConfig(), ARTICLES)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("questions") / "in.jsonl", ROWS)


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path, questions: Path) -> bytes:
    """Return the answers to all questions by a job that is left alone."""
    target = questions.with_name("undisturbed.jsonl")
    data = answer_file(checkpoint, questions, target, **SAMPLED)
    assert [row["id"] for row in read_rows(target)] == [row["id"] for row in ROWS]
    assert len(set(re.findall(rb'"generated": .*', data))) > 190
    return data


@pytest.fixture(autouse=True)
def nothing_left_running(tmp_path: Path) -> Iterator[None]:
    yield
    kill_processes_of(tmp_path)


class RunningJob:
    """A job of infer.py in a process of its own, as a user starts it."""

    def __init__(self, model: Path, source: Path, target: Path, launcher: list[str], **options):
        self.log = target.with_name("log")
        command = [*launcher, str(ROOT / "infer.py"), str(model)]
        command += ["--input", str(source), "--output", str(target)]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)

    def wait_for_rows(self, counts: dict[Path, int]) -> None:
        """Wait until each file has as many rows as `counts` says."""
        deadline = time.monotonic() + LIMIT
        while any(count_lines(file) < count for file, count in counts.items()):
            assert self.process.poll() is None and time.monotonic() < deadline, self.said()
            time.sleep(0.002)

    def wait(self) -> int:
        """Wait for the end; returns the exit code."""
        return self.process.wait(LIMIT)

    def said(self) -> str:
        """Return all output so far."""
        return self.log.read_text(encoding="utf-8")


def count_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def complete_lines(data: bytes) -> bytes:
    """Return data up to its last newline."""
    return data[: data.rfind(b"\n") + 1]


def test_random_kills(checkpoint: Path, questions: Path, undisturbed: bytes, tmp_path: Path):
    """The kills land while rows are answered. No answered row is lost or changed."""
    rng, target, kept = random.Random(0), tmp_path / "out.jsonl", b""
    job = (checkpoint, questions, target, [sys.executable])
    for _ in range(6):
        num_kept = kept.count(b"\n")
        running = RunningJob(*job, batch_size=2, **SAMPLED)
        running.wait_for_rows({target: num_kept + rng.randint(1, 12)})
        time.sleep(rng.uniform(0, 0.02))
        running.process.kill()
        assert running.wait() == -signal.SIGKILL
        if num_kept > 0:
            assert f"{num_kept} of 200 answers are there already" in running.said()
        assert target.read_bytes().startswith(kept)
        kept = complete_lines(target.read_bytes())
    assert 6 <= kept.count(b"\n") < 200

    running = RunningJob(*job, batch_size=2, **SAMPLED)
    assert running.wait() == 0, running.said()
    assert target.read_bytes() == undisturbed
    assert names(tmp_path) == FILES


def test_ctrl_c_keeps_what_is_answered(
    checkpoint: Path, questions: Path, undisturbed: bytes, tmp_path: Path
):
    target = tmp_path / "out.jsonl"
    running = RunningJob(checkpoint, questions, target, [sys.executable], batch_size=2, **SAMPLED)
    running.wait_for_rows({target: 5})
    running.process.send_signal(signal.SIGINT)
    assert running.wait() == 130
    said = running.said()
    assert f"stopped: {target} keeps" in said and "the same command goes on" in said
    assert "Traceback" not in said
    kept = target.read_bytes()
    assert 5 <= kept.count(b"\n") < 200 and complete_lines(kept) == kept

    assert answer_file(checkpoint, questions, target, **SAMPLED) == undisturbed
    assert set(kept.splitlines()) < set(undisturbed.splitlines())


def test_two_processes_are_killed(
    checkpoint: Path, questions: Path, undisturbed: bytes, tmp_path: Path
):
    """And one process goes on, or two do: the file is that of one."""
    (tmp_path / "two").mkdir()
    target = tmp_path / "two" / "out.jsonl"
    part = target.with_name("out.jsonl.rank1")
    running = RunningJob(checkpoint, questions, target, TORCHRUN, batch_size=1, **SAMPLED)
    running.wait_for_rows({target: 3, part: 3})
    kill_processes_of(tmp_path)
    running.wait()
    shares = []
    for file in (target, part):
        lines = complete_lines(file.read_bytes()).splitlines()
        shares.append({json.loads(line)["id"] for line in lines})
    assert not shares[0] & shares[1]
    num_kept = count_lines(target) + count_lines(part)
    assert 6 <= num_kept < 200

    one = shutil.copytree(target.parent, tmp_path / "one")
    assert answer_file(checkpoint, questions, one / "out.jsonl", **SAMPLED) == undisturbed
    running = RunningJob(checkpoint, questions, target, TORCHRUN, **SAMPLED)
    assert running.wait() == 0, running.said()
    assert f"{num_kept} of 200 answers are there already" in running.said()
    assert "200 of 200 answers" in running.said()
    assert target.read_bytes() == undisturbed
    assert names(one) == names(target.parent) == FILES


def test_two_processes_give_the_file_of_one(
    checkpoint: Path, questions: Path, undisturbed: bytes, tmp_path: Path
):
    target = tmp_path / "out.jsonl"
    running = RunningJob(checkpoint, questions, target, TORCHRUN, **SAMPLED)
    assert running.wait() == 0, running.said()
    assert target.read_bytes() == undisturbed
    assert names(tmp_path) == FILES
    assert "200 of 200 answers" in running.said()
