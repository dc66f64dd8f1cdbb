"""Runs on two processes that are killed, asked to stop, hang, fail or run out of disk.

Every run is started as a user starts it, through torchrun.
"""

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import train
from helpers.processes import (
    LIMIT,
    TORCHRUN,
    complete_checkpoints,
    final_adapter,
    free_port,
    kill_processes_of,
    launch,
    processes_of,
    run,
    start,
    write_run,
    write_script,
)
from helpers.tiny_runs import base_model, config, losses, metrics
from minilora.checkpoint.checkpointer import latest_checkpoint
from minilora.config import Config
from minilora.files import is_complete

pytestmark = pytest.mark.system

STEPS = 21
NEVER = 1000  # steps

MakeConfig = Callable[..., Config]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def make(base: Path) -> MakeConfig:
    """A run of 21 steps on two processes, half of a step's documents each."""

    def make_config(directory: Path, **changes) -> Config:
        directory.mkdir(parents=True, exist_ok=True)
        settings = {
            "train__batch_size": 2,
            "train__save_steps": 4,
            "eval__eval_steps": 6,
            "lora__dropout": 0.1,
            **changes,
        }
        return config(directory, base, **settings)

    return make_config


@pytest.fixture(scope="module")
def uninterrupted(
    make: MakeConfig, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], bytes]:
    """The final adapter of a run left alone, by strategy."""
    known: dict[str, bytes] = {}

    def adapter_of(strategy: str) -> bytes:
        if strategy not in known:
            c = make(tmp_path_factory.mktemp(strategy), parallel__strategy=strategy)
            code, output = run(c)
            assert code == 0, output
            known[strategy] = final_adapter(c)
        return known[strategy]

    return adapter_of


@pytest.fixture(autouse=True)
def nothing_left_running(tmp_path: Path) -> Iterator[None]:
    yield
    kill_processes_of(tmp_path)


# ---- processes that are killed

KILLS = {
    "ddp": {
        "start-up": "at(1, distributed, 'init_process_group', 1, kill)",
        "a step": "at(1, train, 'finish_gradients', 7, kill)",
        "a save, by the process that writes": "at(0, checkpointer, 'save_tokenizer', 1, kill)",
    },
    "fsdp": {
        "evaluation": "at(1, train, 'evaluate', 1, kill)",
        "a save, by another": "at(1, training_state, 'save_sharded', 1, kill)",
        "generation": "at(0, evaluate, 'generate_ids', 1, kill)",
    },
}


@pytest.mark.parametrize("strategy", KILLS)
def test_killed_process_ends_the_run_and_the_same_command_continues(
    strategy: str, tmp_path: Path, make: MakeConfig, uninterrupted: Callable[[str], bytes]
):
    """The kills follow each other in one run, each in the continuation of the last."""
    c = make(tmp_path / "run", parallel__strategy=strategy)
    out = Path(c.output_dir)
    for moment, fault in KILLS[strategy].items():
        code, output = run(c, fault)
        assert code != 0, f"killed in {moment}, and nobody noticed"
        assert "Signal 9 (SIGKILL)" in output, output
        complete_checkpoints(c)

    before = latest_checkpoint(out)
    code, output = run(c)
    assert code == 0 and f"resumed from {before}" in output, output
    assert len(complete_checkpoints(c)) == 6, "4, 8, ..., 20 and final"
    assert not list(out.glob(".tmp-*"))
    assert final_adapter(c) == uninterrupted(strategy)
    every_step_once = list(range(1, STEPS + 1))
    assert [row["step"] for row in metrics(c)] == every_step_once


def test_torchrun_restarts_a_run(
    tmp_path: Path, make: MakeConfig, uninterrupted: Callable[[str], bytes]
):
    """With the settings of launch/torchrun.sh.

    Without them torch's restarts meet what is left of the first start.
    """
    c = make(tmp_path / "run", parallel__strategy="ddp")
    job = {
        "FAULT": "at(1, train, 'finish_gradients', 11, kill)",
        "HEAD": "localhost",
        "PORT": str(free_port()),
        "NODES": "1",
        "GPUS": "2",
        "RESTARTS": "1",
    }
    code, output = launch("torchrun.sh", c, tmp_path, job)
    assert code == 0 and "checkpoint-8 at step 8" in output, output
    assert final_adapter(c) == uninterrupted("ddp")
    assert [row["step"] for row in metrics(c)] == list(range(1, STEPS + 1))


# Trains again and again in forked processes, and kills 50 of them. All that a run imports is
# imported before: torch._dynamo alone takes a second.
KILL_FIFTY_TIMES = """
import os, random, signal, sys, time
from pathlib import Path

sys.path.insert(0, ROOT)
import torch
import torch._dynamo
import train
from minilora.cli import load_config

torch.set_num_threads(1)
config, rng = load_config(sys.argv[1:]), random.Random(0)
metrics, kills = Path(config.output_dir) / "metrics.jsonl", 0
for _ in range(200):
    size_before = metrics.stat().st_size if metrics.exists() else 0
    child = os.fork()
    if child == 0:
        os._exit(train.main(config))
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        is_training = metrics.exists() and metrics.stat().st_size > size_before
        if is_training and kills < 50:
            time.sleep(rng.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
            if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
                kills += 1
            break
        time.sleep(0.001)
    else:
        break
print(f"{kills} kills")
"""


def test_fifty_random_kills_change_nothing(tmp_path: Path, make: MakeConfig):
    """One process, killed anywhere and started again, ends where an uninterrupted one does."""
    settings = {
        "rows": 8,
        "eval__eval_steps": NEVER,
        "train__epochs": 40.0,
        "train__save_total_limit": 3,
        "data__num_workers": 1,
    }
    whole = make(tmp_path / "whole", train__save_steps=NEVER, **settings)
    broken = make(tmp_path / "broken", train__save_steps=2, **settings)
    assert train.main(whole) == 0

    file = write_run(broken)
    script = write_script(file.with_name("kill_fifty_times.py"), KILL_FIFTY_TIMES)
    command = [sys.executable, str(script), str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert "50 kills" in done.stdout, done.stdout + done.stderr
    assert done.stderr.count("resumed from") >= 40, "most kills come after a checkpoint"
    assert len(complete_checkpoints(broken)) == 4
    assert not list(Path(broken.output_dir).glob(".tmp-*"))
    assert final_adapter(broken) == final_adapter(whole)
    assert losses(broken) == losses(whole)


# ---- processes that are asked to stop


def test_sigterm_saves_one_checkpoint(
    tmp_path: Path, make: MakeConfig, uninterrupted: Callable[[str], bytes]
):
    """SIGTERM to one process, to torchrun, and to the batch job, one after the other in one run."""
    never = {"train__save_steps": NEVER, "eval__eval_steps": NEVER}
    c = make(tmp_path / "run", parallel__strategy="ddp", **never)
    receivers = {
        "one process": "os.getpid()",
        "torchrun": "os.getppid()",
        "the batch job": "parent(os.getppid())",
    }
    expected = set()
    for step, (receiver, pid) in zip((4, 8, 12), receivers.items(), strict=True):
        fault = f"at(1, train, 'finish_gradients', 4, lambda *_: terminate({pid}))"
        if receiver == "the batch job":
            code, output = launch("slurm.sbatch", c, tmp_path, {"FAULT": fault})
            assert "requeue" in (tmp_path / "scontrol.log").read_text(encoding="utf-8")
        else:
            code, output = run(c, fault)
        where = f"SIGTERM to {receiver}:\n{output}"
        assert code != 0 and "stopped by signal 15 after step" in output, where
        expected.add(f"checkpoint-{step}")
        assert set(complete_checkpoints(c)) == expected, where

    code, output = run(c)
    assert code == 0 and "checkpoint-12 at step 12" in output, output
    assert final_adapter(c) == uninterrupted("ddp")


def test_sigterm_to_everybody_counts_once(tmp_path: Path, make: MakeConfig):
    """Each process gets the signal twice.

    Slurm signals all processes of a job step, and torchrun passes its own signal on to them.
    """
    c = make(tmp_path / "run", train__save_steps=NEVER, eval__eval_steps=NEVER)
    everybody = "os.getppid(), *children(os.getppid())"
    fault = f"at(1, train, 'finish_gradients', 4, lambda *_: terminate({everybody}))"
    code, output = run(c, fault)
    assert code != 0 and "stopped by signal 15 after step 4" in output, output
    assert complete_checkpoints(c) == ["checkpoint-4"]


# ---- processes that fail by themselves


def test_nan_on_one_process_stops_all(tmp_path: Path, make: MakeConfig):
    """It is found at the next log, two steps later."""
    changes = {"train__logging_steps": 3, "eval__eval_steps": NEVER}
    c = make(tmp_path / "run", parallel__strategy="ddp", **changes)
    code, output = run(c, "at(1, train, 'finish_gradients', 5, make_nan)")
    assert code != 0
    message = re.search(r"error: loss .* by step (\d+): .*Saved before it: (\S+)\.", output)
    assert message and 5 <= int(message[1]) <= 6, output
    assert Path(message[2]) == Path(c.output_dir) / "checkpoint-4"
    assert complete_checkpoints(c) == ["checkpoint-4"]
    assert all(math.isfinite(loss) for loss in losses(c))


def test_exception_on_one_process_is_reported_by_all(tmp_path: Path, make: MakeConfig):
    c = make(tmp_path / "run", parallel__strategy="fsdp", eval__eval_steps=NEVER)
    code, output = run(c, "at(1, train, 'finish_gradients', 6, fail)")
    assert code != 0 and "RuntimeError: no good reason" in output
    assert "error: process 0 of 2 lost" in output, output
    assert complete_checkpoints(c) == ["checkpoint-4"]


def test_hanging_process_is_given_up(tmp_path: Path, make: MakeConfig):
    patience = 3  # seconds
    c = make(tmp_path / "run", parallel__strategy="ddp", eval__eval_steps=NEVER)
    timeout = f"distributed.COLLECTIVE_TIMEOUT = datetime.timedelta(seconds={patience})"
    hang = "at(1, train, 'finish_gradients', 6, lambda *_: time.sleep(1000))"
    process, log = start(c, f"{timeout}\n{hang}")
    deadline = time.monotonic() + 30
    while not is_complete(Path(c.output_dir) / "checkpoint-4"):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)

    deadline = time.monotonic() + patience + 30
    while "0" in processes_of(tmp_path).values():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    for pid, rank in processes_of(tmp_path).items():
        if rank == "1":  # torchrun asks it to end, and would kill it half a minute later
            os.kill(pid, signal.SIGKILL)
    assert process.wait(LIMIT) != 0 and not processes_of(tmp_path)

    output = log.read_text()
    assert re.search("error: process 0 of 2 lost .*(hangs|time)", output), output
    assert complete_checkpoints(c) == ["checkpoint-4"]


@pytest.mark.parametrize(
    "fault",
    [
        "at(1, training_state, 'save_sharded', 2, fill_disk)",
        "at(0, checkpointer, 'save_adapter', 2, fill_disk)",
    ],
)
def test_full_disk_in_a_sharded_save_keeps_the_checkpoint_before(
    fault: str, tmp_path: Path, make: MakeConfig
):
    """The disk is a small file system in a mount namespace of the run.

    What is on it is copied out afterwards.
    """
    c = make(tmp_path / "run", parallel__strategy="fsdp", eval__eval_steps=NEVER)
    out, after = Path(c.output_dir), tmp_path / "after"
    out.mkdir()
    mount = (
        f'mount -t tmpfs -o size=20m tmpfs {out} && ("$@"; code=$?; rm -f {out}/filler; '
        f"cp -a {out} {after}; exit $code)"
    )
    namespace = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-Urm"]
    code, output = run(c, fault, [*namespace, "bash", "-c", mount, "bash", *TORCHRUN])

    c.output_dir = str(after)
    assert code == 1 and complete_checkpoints(c) == ["checkpoint-4"], output
    assert not list(after.glob(".tmp-*"))
    assert re.search(r"error: \S+checkpoint-8 could not be written.*No space left", output), output
    # torchrun may end the other process before it ends by itself
    first = re.search(r"Root Cause.*?exitcode\s*: (-?\d+)", output, re.DOTALL)
    assert first is not None and first[1] == "1", output
