"""The numbers between two logs: sums, rows, and the refusal of what is not finite."""

import time
from pathlib import Path

import pytest
import torch

from minilora.checkpoint.trainer_state import TrainerState
from minilora.errors import RunError
from minilora.training.metrics import MOST_SKIPPED_IN_A_ROW, StepMetrics

CPU = torch.device("cpu")


def take_step(metrics: StepMetrics, losses: list[float]) -> torch.Tensor:
    """Add a micro-batch of 2 supervised tokens of 5 for each loss; returns what end_step does."""
    for loss in losses:
        metrics.add(torch.tensor(loss), num_supervised=2, num_tokens=5)
    return metrics.end_step()


def test_end_step_returns_the_supervised_tokens_of_the_step_alone():
    metrics = StepMetrics(CPU)
    assert float(take_step(metrics, [1.0, 2.0])) == 4
    assert float(take_step(metrics, [1.0])) == 2


def test_row_is_the_mean_since_the_last_row(tmp_path: Path):
    metrics, state = StepMetrics(CPU), TrainerState()
    take_step(metrics, [1.0, 2.0])
    metrics.sync(state, tmp_path)  # an evaluation, say: nothing is logged
    take_step(metrics, [6.0])
    metrics.sync(state, tmp_path)
    metrics.grad_norm, metrics.lr = torch.tensor(0.5), 1e-3
    row = metrics.row(state)
    assert row.pop("tokens_per_second") > 0
    assert row == {
        "loss": 9.0 / 6,
        "grad_norm": 0.5,
        "lr": 1e-3,
        "tokens": 15,
        "supervised_tokens": 6,
    }

    take_step(metrics, [8.0])
    metrics.sync(state, tmp_path)
    row = metrics.row(state)
    assert (row["loss"], row["tokens"], row["supervised_tokens"]) == (4.0, 20, 8)


def test_time_between_sync_and_restart_clock_does_not_count(tmp_path: Path):
    metrics, state = StepMetrics(CPU), TrainerState()
    take_step(metrics, [1.0])
    metrics.sync(state, tmp_path)
    time.sleep(0.2)
    metrics.restart_clock()
    take_step(metrics, [1.0])
    metrics.sync(state, tmp_path)
    assert metrics.seconds < 0.2


def test_steps_that_overflowed_are_left_out_and_counted(tmp_path: Path, capsys):
    metrics, state = StepMetrics(CPU), TrainerState(step=3)
    for loss, norm in [(1.0, 0.5), (float("nan"), float("inf")), (3.0, 0.7)]:
        take_step(metrics, [loss])
        metrics.grad_norm = torch.tensor(norm)
        metrics.leave_out_if(~metrics.grad_norm.isfinite())
    metrics.sync(state, tmp_path)
    row = metrics.row(state)
    assert (row["loss"], row["skipped_steps"], row["tokens"]) == (1.0, 1, 10)
    assert row["grad_norm"] == pytest.approx(0.7)
    assert "1 of the 3 steps up to step 3 were skipped" in capsys.readouterr().err

    # a last step that overflows is logged with the norm of the one before; the count starts again
    for norm in (0.9, float("nan")):
        take_step(metrics, [1.0])
        metrics.grad_norm = torch.tensor(norm)
        metrics.leave_out_if(~metrics.grad_norm.isfinite())
    metrics.sync(state, tmp_path)
    row = metrics.row(state)
    assert (row["loss"], row["skipped_steps"], row["tokens"]) == (0.5, 1, 15)
    assert row["grad_norm"] == pytest.approx(0.9)


def test_sync_ends_a_run_whose_steps_overflow_again_and_again(tmp_path: Path):
    metrics, state = StepMetrics(CPU), TrainerState(step=21)
    norms = [1.0] + [float("nan")] * MOST_SKIPPED_IN_A_ROW
    for step, norm in enumerate(norms):
        take_step(metrics, [float("inf") if step else 1.0])
        metrics.grad_norm = torch.tensor(norm)
        metrics.leave_out_if(~metrics.grad_norm.isfinite())
        if step < MOST_SKIPPED_IN_A_ROW:
            metrics.sync(state, tmp_path)
    with pytest.raises(RunError, match=r"last 20 steps, up to step 21, overflowed float16"):
        metrics.sync(state, tmp_path)


def test_nothing_is_logged_of_skipped_steps_alone(tmp_path: Path):
    metrics, state = StepMetrics(CPU), TrainerState(step=1)
    take_step(metrics, [float("inf")])
    metrics.grad_norm = torch.tensor(float("nan"))
    metrics.leave_out_if(~metrics.grad_norm.isfinite())
    metrics.sync(state, tmp_path)
    assert metrics.is_empty

    take_step(metrics, [2.0])
    metrics.grad_norm = torch.tensor(1.0)
    metrics.leave_out_if(~metrics.grad_norm.isfinite())
    metrics.sync(state, tmp_path)
    assert not metrics.is_empty
    assert metrics.row(state)["skipped_steps"] == 1


@pytest.mark.parametrize(("loss", "norm"), [("nan", "1.0"), ("1.0", "nan"), ("inf", "1.0")])
def test_sync_refuses_what_is_not_finite(loss: str, norm: str, tmp_path: Path):
    metrics, state = StepMetrics(CPU), TrainerState(step=7)
    take_step(metrics, [float(loss)])
    metrics.grad_norm = torch.tensor(float(norm))
    with pytest.raises(RunError, match=r"by step 7: .*Saved before it: nothing yet"):
        metrics.sync(state, tmp_path)
    assert state.tokens == state.supervised_tokens == 0
