"""The report finds that repeated rows lower no loss but that of training, and is silent else."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.tiny_runs import base_model, run
from minilora.tracking.overfitting import Overfitting, find_overfitting

STEPS_PER_EPOCH = 20


def stairs(epoch: int) -> float:
    """Return a training loss that falls at each epoch end, and not in between."""
    return 2.0 - 0.15 * epoch


def log(
    training: Callable[[int], float],
    held_out: list[float],
    logging_steps: int = 1,
    noise: float = 0.05,
    seed: int = 0,
) -> list[dict]:
    """Write the events of a run that is evaluated at each epoch's end.

    Args:
        training: the training loss in epoch 0, 1, ..., without noise.
        held_out: the held-out loss at the end of epoch 1, 2, ...
        logging_steps: steps from one logged training loss to the next.
        noise: standard deviation of the loss of one step.
        seed: of the noise.
    """
    rng = random.Random(seed)
    rows: list[dict] = []
    losses: list[float] = []
    for step in range(1, STEPS_PER_EPOCH * len(held_out) + 1):
        position = {"step": step, "epoch": step / STEPS_PER_EPOCH}
        losses.append(training((step - 1) // STEPS_PER_EPOCH) + rng.gauss(0, noise))
        if step % logging_steps == 0:
            rows.append(position | {"loss": sum(losses) / len(losses)})
            losses = []
        if step % STEPS_PER_EPOCH == 0:
            rows.append(position | {"eval/in_domain/loss": 1.0 / step})
            loss = held_out[step // STEPS_PER_EPOCH - 1]
            rows.append(position | {"eval/out_of_domain/loss": loss})
    return rows


def test_stairs_in_training_without_a_fall_of_the_held_out_loss():
    rows = log(stairs, [1.9, 1.7, 1.8, 1.75, 1.9], noise=0.01)
    found = find_overfitting(rows)
    assert found == Overfitting(
        step=40,
        epoch=2.0,
        lowest=1.7,
        last=1.9,
        num_ends=3,
        training_before=pytest.approx(stairs(1), abs=0.01),
        training_after=pytest.approx(stairs(4), abs=0.01),
    )


@pytest.mark.parametrize("logging_steps", [1, 3, 7, 20, 33, 50])
def test_it_is_found_however_rarely_the_run_logs(logging_steps: int):
    """With 33 and 50 steps most logged losses are means over several epochs."""
    held_out = [1.9, 1.7] + [1.8] * 10
    found = find_overfitting(log(stairs, held_out, logging_steps))
    assert found is not None
    assert (found.step, found.num_ends) == (40, 10)
    assert found.training_before > found.training_after + 0.7


def test_one_clear_stair_is_enough():
    assert find_overfitting(log(stairs, [1.7, 1.71])) is not None
    assert find_overfitting(log(stairs, [1.7, 1.71], noise=1.0)) is None, "it may be noise"


@pytest.mark.parametrize(
    "held_out",
    [
        [1.9, 1.8, 1.7, 1.6, 1.5],  # it falls as well
        [1.9, 1.5, 1.8, 1.6, 1.49],  # not at every end, but the last is the lowest
        [1.9],  # no row was repeated yet
    ],
)
def test_nothing_is_said_where_the_held_out_loss_falls_too(held_out: list[float]):
    assert find_overfitting(log(stairs, held_out)) is None


def test_noise_alone_is_seldom_taken_for_a_fall():
    """Training does not fall at all, and every run ends with a held-out loss that rose."""
    held_out = [1.7, 1.8, 1.9, 2.0]
    found = [find_overfitting(log(lambda _: 1.0, held_out, seed=seed)) for seed in range(400)]
    num_wrong = sum(each is not None for each in found)
    assert num_wrong <= 20, "twice as many as two standard errors allow (2.3 %)"

    rising = [find_overfitting(log(lambda e: 1 + e / 10, held_out, seed=i)) for i in range(20)]
    assert rising == [None] * 20


def noisy_log(seed: int, held_out_fall: float) -> list[dict]:
    """Write the events of three epochs of 100 steps in which the training loss falls by 0.15.

    Args:
        seed: of the noise, 0.03 in the training loss and 0.08 in the held-out loss.
        held_out_fall: how far the held-out loss falls over the run.
    """
    rng = random.Random(seed)
    rows: list[dict] = []
    for step in range(10, 301, 10):
        position = {"step": step, "epoch": step / 100}
        rows.append(position | {"loss": 2.0 - 0.15 * step / 300 + rng.gauss(0, 0.03)})
        if step % 50 == 0:
            loss = 2.0 - held_out_fall * step / 300 + rng.gauss(0, 0.08)
            rows.append(position | {"eval/out_of_domain/loss": loss})
    return rows


def test_noise_of_the_held_out_loss_is_seldom_taken_for_a_rise():
    """Both losses fall alike, but the lowest of six noisy evaluations is rarely the last."""
    found = [find_overfitting(noisy_log(seed, held_out_fall=0.15)) for seed in range(200)]
    assert sum(each is not None for each in found) <= 10, "5 %"
    rising = [find_overfitting(noisy_log(seed, held_out_fall=-0.6)) for seed in range(200)]
    assert sum(each is not None for each in rising) >= 150, "where noise is not larger it is found"


def test_a_held_out_loss_that_stays_is_not_one_that_rises():
    assert find_overfitting(log(stairs, [1.7, 1.7, 1.7])) is None


def test_a_steep_beginning_is_not_taken_for_noise():
    """A loss that falls far at first hides no rise, if the evaluations are more than a few."""
    held_out = [4.0, 2.5, 1.9, 1.7, 1.65, 1.7, 1.74, 1.8, 1.83]
    found = find_overfitting(log(stairs, held_out))
    assert found is not None and found.step == 5 * STEPS_PER_EPOCH


def test_evaluations_of_other_rows_are_left_out():
    """The first two were made on an easier file."""
    rows = log(stairs, [1.0, 0.9, 1.9, 1.8, 1.7])
    assert find_overfitting(rows) is not None
    assert find_overfitting(rows, first_eval_step=2 * STEPS_PER_EPOCH + 1) is None


def test_logs_without_what_is_compared():
    rows = log(stairs, [1.7, 1.8, 1.9])
    without_held_out = [row for row in rows if "eval/out_of_domain/loss" not in row]
    without_training = [row for row in rows if "loss" not in row]
    without_epochs = [{k: v for k, v in row.items() if k != "epoch"} for row in rows]
    one_training_loss = [*without_training, rows[0]]
    for log_rows in ([], without_held_out, without_training, without_epochs, one_training_loss):
        assert find_overfitting(log_rows) is None

    broken = [row | {"loss": float("nan")} if row["step"] == 30 else row for row in rows]
    broken.insert(5, {"step": 5, "epoch": 0.25, "eval/out_of_domain/loss": float("nan")})
    broken.insert(5, {"step": 5, "epoch": None, "loss": None})
    assert find_overfitting(broken) is not None


@pytest.mark.parametrize(("rows", "epochs"), [(8, 16.0), (36, 2.0)])
def test_the_report_of_a_run(rows: int, epochs: float, tmp_path: Path):
    """Eight rows are learnt by heart; with more of them the held-out loss falls to the end."""
    base = base_model(tmp_path / "base")
    settings = run(
        tmp_path,
        base,
        rows=rows,
        train__epochs=epochs,
        eval__eval_steps=4,
        train__save_steps=1000,
        method="full",
        train__learning_rate=2e-2,
        data__edge_dropping=False,
    )
    page = (Path(settings.output_dir) / "report.html").read_text(encoding="utf-8")
    assert ("Overfitting:" in page) is (rows == 8)
    assert page.count("<title>end of epoch 1<") == page.count("<figure"), "in each chart"
