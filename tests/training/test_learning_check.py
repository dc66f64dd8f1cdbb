"""The warning of runs that learn nothing, in real runs, and that no other run is warned of."""

from pathlib import Path

import numpy as np
import pytest

import train
from helpers import tiny_runs
from helpers.tiny_runs import metrics
from minilora.data.dataset import IGNORE_INDEX, Batch, Documents


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.base_model(tmp_path_factory.mktemp("base") / "base")


def warnings_of(base: Path, directory: Path, capsys: pytest.CaptureFixture, **changes) -> list[str]:
    """Run with a log in every step; return the warnings that it printed."""
    tiny_runs.run(directory, base, rows=12, eval__eval_steps=0, **changes)
    return [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]


def drop_labels_of_call(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Let no token be supervised in one micro-batch (from 1)."""
    real, calls = Documents.batch, []

    def batch(documents: Documents, indices: np.ndarray, **options) -> Batch:
        made = real(documents, indices, **options)
        calls.append(1)
        if len(calls) == call:
            made.labels.fill_(IGNORE_INDEX)
        return made

    monkeypatch.setattr(Documents, "batch", batch)


def test_alpha_0(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """It is said once, in the first log."""
    (warning,) = warnings_of(base, tmp_path, capsys, lora__alpha=0.0)
    assert "gradient norm of step 1 is 0" in warning and "lora.alpha is 0" in warning


def test_a_step_without_labels(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """The run goes on with the next step."""
    drop_labels_of_call(monkeypatch, 4)
    config = tiny_runs.quick_config(tmp_path, base, rows=12, eval__eval_steps=0)
    assert train.main(config) == 0
    printed = capsys.readouterr().err
    assert printed.count("warning: ") == 1
    assert "gradient norm of step 4 is 0: none of its tokens is supervised" in printed
    rows = metrics(config)
    assert [row["step"] for row in rows if row["grad_norm"] == 0] == [4]
    assert rows[3]["supervised_tokens"] == rows[2]["supervised_tokens"]
    assert rows[-1]["loss"] < rows[2]["loss"]


def test_a_learning_rate_below_the_precision_of_the_weights(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """Step 1 is the first of the warmup, with a learning rate of 0; step 2 is looked at."""
    settings = {"method": "full", "train__learning_rate": 1e-14}
    (warning,) = warnings_of(base, tmp_path, capsys, **settings)
    assert "no trained weight has changed by step 2" in warning
    assert "train.learning_rate=1e-14 is too small" in warning


def test_a_run_that_ends_in_the_first_step_of_its_warmup(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    (warning,) = warnings_of(base, tmp_path, capsys, train__max_steps=1)
    assert "no trained weight has changed by step 1" in warning and "warmup" in warning


@pytest.mark.parametrize(
    "settings",
    [
        {"train__max_steps": 2},  # ends in its warmup, with a learning rate above 0
        {"train__warmup_steps": 0, "train__max_steps": 1},
        {"method": "full", "train__learning_rate": 1e-6, "train__max_steps": 3},
        {"train__ema_decay": 0.999, "train__max_steps": 3},
        {"train__lr_scheduler": "linear"},
    ],
)
def test_a_run_that_learns_is_not_warned(
    settings: dict, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert warnings_of(base, tmp_path, capsys, **settings) == []
