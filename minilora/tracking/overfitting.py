"""Overfitting as the log of a run shows it: repeated rows lower no loss but that of training.

`find_overfitting` compares the training loss before and after the ends of epochs, where the rows
begin to repeat, with the loss on held-out rows over the same steps.
"""

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median

from minilora.tracking.charts import Points, epoch_ends, is_finite

HELD_OUT_LOSS = "eval/out_of_domain/loss"
"""The loss on the rows of data.eval_file. Those of the set in_domain may be trained on."""
MEDIAN_SQUARE = 0.4549
"""The median of the chi-squared distribution with one degree of freedom."""


@dataclass
class Overfitting:
    """Since `step` the training loss has fallen at the epoch ends, the held-out loss has not."""

    step: int
    """The evaluation with the lowest held-out loss."""
    epoch: float
    """How many epochs were done then."""
    lowest: float
    """The held-out loss then."""
    last: float
    """The held-out loss at the last evaluation."""
    num_ends: int
    """How many epochs ended between these two evaluations."""
    training_before: float
    """The training loss just before the first of these ends."""
    training_after: float
    """The training loss just after the last of them."""


def find_overfitting(rows: list[dict], first_eval_step: int = 0) -> Overfitting | None:
    """Find out whether the training loss falls at the ends of epochs, the held-out loss not.

    A model that reads a row again knows it from before. If its training loss falls where the rows
    begin to repeat, and the held-out loss does not fall as well, it learns these rows and nothing
    that holds for others. The log is asked for both, without a threshold for the size of a loss:

    - The held-out loss was lowest at an earlier evaluation than the last one, and at least one
      epoch ended between the two.
    - From before the first of these ends to after the last one, the training loss fell by more
      than its noise: by more than twice the standard error of the difference, which noise alone
      exceeds in about one run of thirty.
    - The mean held-out loss of the evaluations after these ends is above the mean of those before
      them, and this rise and the fall of the training loss together are more than twice their
      standard error. Where both losses fall alike, noise alone seldom parts them so far.

    Args:
        rows: the events of metrics.jsonl.
        first_eval_step: leave out the evaluations before this step, which were made on other rows.

    Returns:
        What the log shows; None if it does not show overfitting, or has no held-out loss.
    """
    evaluations = _finite_points(rows, HELD_OUT_LOSS)
    evaluations = [point for point in evaluations if point[0] >= first_eval_step]
    if not evaluations:
        return None
    best_step, lowest = min(evaluations, key=lambda point: point[1])
    last_step, last = evaluations[-1]
    all_ends = epoch_ends(rows, last_step)
    ends = [end for end in all_ends if end >= best_step]
    if not ends:
        return None

    steps_per_epoch = all_ends[0]
    training = _finite_points(rows, "loss")
    half = steps_per_epoch / 2
    # where losses are logged rarely, the first or last end may have none on its side
    before = next(filter(None, (_losses_before(training, end, half) for end in ends)), None)
    after = next(filter(None, (_losses_after(training, end, half) for end in ends[::-1])), None)
    if before is None or after is None:
        return None

    fall = fmean(before) - fmean(after)
    noise = _variance([loss for step, loss in training if step >= best_step])
    variance = noise / len(before) + noise / len(after)
    if fall <= 2 * math.sqrt(variance):
        return None
    rise, rise_variance = _held_out_rise(evaluations, best_step, ends, steps_per_epoch)
    if rise <= 0 or fall + rise <= 2 * math.sqrt(variance + rise_variance):
        return None
    return Overfitting(
        step=best_step,
        epoch=best_step / steps_per_epoch,
        lowest=lowest,
        last=last,
        num_ends=len(ends),
        training_before=fmean(before),
        training_after=fmean(after),
    )


def _finite_points(rows: list[dict], key: str) -> Points:
    """Return (step, value) of the rows that have a finite number under `key`."""
    return [(row["step"], row[key]) for row in rows if is_finite(row.get(key))]


# A logged training loss is the mean over the steps since the log before it. The next two functions
# leave out a loss whose steps lie on both sides of the epoch's end.


def _losses_before(training: Points, epoch_end: int, num_steps: float) -> list[float]:
    """Return the losses logged in the last steps before an epoch's end, or else the nearest one.

    Args:
        training: the logged losses.
        epoch_end: the last step of the epoch.
        num_steps: how far back to look.
    """
    ends = [step for step, _ in training]
    starts = [0, *ends[:-1]]
    end = bisect_right(ends, epoch_end)
    first = min(bisect_left(starts, epoch_end - num_steps), end - 1)
    return [loss for _, loss in training[max(first, 0) : end]]


def _losses_after(training: Points, epoch_end: int, num_steps: float) -> list[float]:
    """Return the losses logged in the first steps after an epoch's end, or else the nearest one.

    Args:
        training: the logged losses.
        epoch_end: the last step of the epoch.
        num_steps: how far to look.
    """
    ends = [step for step, _ in training]
    starts = [0, *ends[:-1]]
    first = bisect_left(starts, epoch_end)
    end = max(bisect_right(ends, epoch_end + num_steps), first + 1)
    return [loss for _, loss in training[first:end]]


def _held_out_rise(
    evaluations: Points, best_step: int, ends: list[int], steps_per_epoch: int
) -> tuple[float, float]:
    """Return how far the held-out loss rose over the ends of epochs, and the variance of that.

    Args:
        evaluations: the held-out losses.
        best_step: the evaluation with the lowest one.
        ends: the ends of epochs between this evaluation and the last one.
        steps_per_epoch: the evaluations before the first end are those of the epoch it ends.
    """
    first_step = min(best_step, ends[0] - steps_per_epoch + 1)
    before = [loss for step, loss in evaluations if first_step <= step <= ends[0]]
    after = [loss for step, loss in evaluations if step > ends[-1]]
    noise = _variance([loss for _, loss in evaluations])
    return fmean(after) - fmean(before), noise / len(before) + noise / len(after)


def _variance(losses: list[float]) -> float:
    """Estimate the variance of the noise in a falling line of losses.

    A difference of neighbors has twice the variance, and the median of the square of a normal
    number is MEDIAN_SQUARE times its variance. Unlike the spread around the mean, differences
    hardly take the fall for noise, and the median leaves out the steep ones of its beginning.

    Args:
        losses: in order; of fewer than two the variance is infinite.
    """
    if len(losses) < 2:
        return math.inf
    squares = [(after - before) ** 2 for before, after in pairwise(losses)]
    return median(squares) / MEDIAN_SQUARE / 2
