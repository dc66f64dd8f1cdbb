"""train.py started as a user starts it: killed, terminated and continued, and on two processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from helpers.processes import ROOT, TORCHRUN, final_adapter, write_config_file
from helpers.tiny_runs import base_model, config, losses, metrics
from minilora.config import Config

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_model(tmp_path_factory.mktemp("base") / "model")


def start(config_file: Path) -> subprocess.Popen:
    """Start train.py."""
    command = [sys.executable, str(ROOT / "train.py"), str(config_file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stderr=pipe, stdout=pipe, text=True, env=environment)


def wait_for_step(c: Config, step: int, process: subprocess.Popen) -> None:
    """Wait until a run has logged a step."""
    file = Path(c.output_dir) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if file.is_file() and any(row["step"] >= step for row in metrics(c)):
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    raise AssertionError(f"no step {step} within two minutes")


def test_killed_then_terminated_run_ends_as_an_uninterrupted_one(base: Path, tmp_path: Path):
    settings = {
        "lora__dropout": 0.1,
        "train__save_steps": 7,
        "train__epochs": 60.0,
        "rows": 10,
        "train__batch_size": 2,
    }
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole = config(tmp_path / "whole", base, **settings)
    broken = config(tmp_path / "broken", base, **settings)
    assert train.main(whole) == 0
    file = write_config_file(broken, tmp_path / "run.py")

    killed = start(file)
    wait_for_step(broken, 30, killed)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(60) == -signal.SIGKILL

    terminated = start(file)
    wait_for_step(broken, metrics(broken)[-1]["step"] + 20, terminated)
    terminated.send_signal(signal.SIGTERM)
    _, errors = terminated.communicate(timeout=60)
    assert terminated.returncode == 128 + signal.SIGTERM, errors
    assert "resumed from" in errors and "the same command continues" in errors
    last = metrics(broken)[-1]["step"]
    assert (Path(broken.output_dir) / f"checkpoint-{last}").is_dir()

    assert train.main(broken) == 0
    assert final_adapter(broken) == final_adapter(whole)
    assert losses(broken) == losses(whole)


def test_two_processes_give_the_numbers_of_one(base: Path, tmp_path: Path):
    """torchrun with two processes and half of the batch each."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = config(tmp_path / "one", base, train__epochs=2.0)
    two = config(tmp_path / "two", base, train__epochs=2.0, train__batch_size=2)
    assert train.main(one) == 0

    file = write_config_file(two, tmp_path / "two.py")
    command = [*TORCHRUN, str(ROOT / "train.py"), str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr

    tolerances = {
        "loss": 1e-5,
        "grad_norm": 1e-4,
        "eval/in_domain/loss": 1e-5,
        "eval/out_of_domain/loss": 1e-5,
    }
    for key, tolerance in tolerances.items():
        expected = [row[key] for row in metrics(one, key)]
        assert [row[key] for row in metrics(two, key)] == pytest.approx(expected, abs=tolerance)
    assert [row["tokens"] for row in metrics(one)] == [row["tokens"] for row in metrics(two)]
