"""The charts of a report: their lines, and the places of the points and of the axes' ticks.

`charts` turns the rows of metrics.jsonl into `Chart` objects, which report.html.jinja draws. Places
are in percent of the chart's width or height, measured from its upper left corner.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, count
from statistics import median
from typing import NamedTuple, TypeGuard

TITLES = {
    "loss": "Loss",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm, before clipping",
    "tokens_per_second": "Tokens per second",
}
"""The training's figures that have a chart, each with its title, in the order of the charts."""

MAX_POINTS = 800
"""A line with more points than this is thinned out."""

MAX_EPOCH_ENDS = 25
"""If more epochs end in a run, only every second, fifth, tenth, ... end is drawn: on a phone, where
a chart is about 280 pixels wide, 25 lines are 11 pixels apart."""

TRAINING = "training"
"""The name of the line of the training's own figures; the others are named by evaluation sets."""

Points = list[tuple[int, float]]
"""(optimizer step, value) in the order of the log."""


class Mark(NamedTuple):
    """A point of a line, and its place in the chart."""

    x: float
    """Percent from the left."""
    y: float
    """Percent from the top."""
    step: int
    value: float


class Tick(NamedTuple):
    """A labeled place on an axis."""

    place: float
    """Percent from the left, or from the top."""
    value: float
    """What the label shows."""


@dataclass
class Chart:
    """What the template draws."""

    title: str
    all_names: list[str]
    """The names of the lines of all charts; a line's index in this list decides its color."""
    lines: dict[str, list[Mark]]
    """The points of each line by its name."""
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    last_step: int
    """The step at the right edge."""
    notes: list[str]
    """Remarks below the chart: a logarithmic axis, points that are left out."""


@dataclass
class EpochEnds:
    """The vertical lines at the ends of epochs, the same in all charts."""

    ticks: list[Tick]
    """The places of the lines, and the epochs that end there, counted from 1."""
    every: int
    """Every how many epochs there is a line: 1, 2, 5, 10, ..."""
    num_all: int
    """How many epochs end before the right edge."""


def charts(rows: list[dict]) -> list[Chart]:
    """Make the charts of a run.

    The first one holds the losses of training and of all evaluation sets; the learning rate, the
    gradient norm and the speed follow, then every further figure of the evaluations.

    Args:
        rows: the events of metrics.jsonl.
    """
    figures = _points_by_figure(rows)
    all_names = list(dict.fromkeys(chain.from_iterable(figures.values())))
    last_step = _last_step(rows)

    made = []
    for figure, lines in figures.items():
        # the chart of the loss is shown even without points: it then says so
        if figure == "loss" or any(lines.values()):
            title = TITLES.get(figure, figure)
            made.append(_chart(title, lines, all_names, last_step))
    return made


def mark_epoch_ends(rows: list[dict]) -> EpochEnds:
    """Return where the charts show the ends of epochs.

    The right edge gets no line, so there is none in a run of one epoch or less.

    Args:
        rows: the events of metrics.jsonl.
    """
    last_step = _last_step(rows)
    ends = epoch_ends(rows, last_step)
    round_numbers = (factor * 10**power for power in count() for factor in (1, 2, 5))
    every = next(number for number in round_numbers if len(ends) // number <= MAX_EPOCH_ENDS)
    ticks = []
    for epoch in range(every, len(ends) + 1, every):
        ticks.append(Tick(100 * ends[epoch - 1] / last_step, epoch))
    return EpochEnds(ticks, every, len(ends))


def epoch_ends(rows: list[dict], last_step: int) -> list[int]:
    """Return the last steps of the epochs 1, 2, 3, ... that end before `last_step`.

    Args:
        rows: the events of metrics.jsonl, whose "step" and "epoch" tell the steps of an epoch.
        last_step: a step of the run.
    """
    steps_per_epoch = None
    for row in rows:
        epoch = row.get("epoch")
        if is_finite(epoch) and epoch > 0 and row["step"] > 0:
            steps_per_epoch = max(1, round(row["step"] / epoch))
    if steps_per_epoch is None:
        return []
    return list(range(steps_per_epoch, last_step, steps_per_epoch))


def _last_step(rows: list[dict]) -> int:
    """Return the step at the right edge: 1 before the first one, since the axis needs a length."""
    return max([1, *(row["step"] for row in rows)])


def _points_by_figure(rows: list[dict]) -> dict[str, dict[str, Points]]:
    """Collect {figure: {line: points}} from the events of metrics.jsonl.

    The key "eval/SET/FIGURE" is a point of line SET in the chart of FIGURE; "eval/FIGURE" is a
    point of a line that has the figure's own name.
    """
    figures: dict[str, dict[str, Points]] = {figure: {TRAINING: []} for figure in TITLES}
    for row in rows:
        for key, value in row.items():
            if key.startswith("eval/"):
                line, _, figure = key.removeprefix("eval/").partition("/")
                if not figure:
                    figure = line
            elif key in TITLES:
                line, figure = TRAINING, key
            else:
                continue
            figures.setdefault(figure, {}).setdefault(line, []).append((row["step"], value))
    return figures


def _chart(title: str, lines: dict[str, Points], all_names: list[str], last_step: int) -> Chart:
    """Make one chart: choose its axes, and place the points of its lines.

    Args:
        title: of the chart.
        lines: the points of each line by its name.
        all_names: see `Chart`.
        last_step: the step at the right edge.
    """
    finite = {}
    for name, points in lines.items():
        finite[name] = [(step, value) for step, value in points if is_finite(value)]
    axis = ValueAxis(value for points in finite.values() for _, value in points)

    notes = list(axis.notes)
    drawn: dict[str, list[Mark]] = {}
    for name, points in finite.items():
        thinned = thin_out(points)
        if len(thinned) < len(points):
            notes.append(f"{name}: {len(points):,} points, drawn by the extremes of each stretch")
        num_left_out = len(lines[name]) - len(points)
        if num_left_out:
            notes.append(f"{name}: {num_left_out:,} not finite, left out")
        drawn[name] = [
            Mark(100 * step / last_step, axis.place(value), step, value) for step, value in thinned
        ]

    ticks = linear_ticks(0, last_step)
    steps = [tick for tick in ticks if tick <= last_step and tick.is_integer()]
    return Chart(
        title=title,
        all_names=all_names,
        lines=drawn,
        x_ticks=[Tick(100 * step / last_step, step) for step in steps],
        y_ticks=[Tick(axis.place(value), value) for value in axis.ticks],
        last_step=last_step,
        notes=notes,
    )


class ValueAxis:
    """The vertical axis of a chart, linear or logarithmic.

    Attributes:
        ticks: the labeled values, ascending; the first is at the foot, the last at the top.
        notes: remarks for the reader of the chart.
    """

    def __init__(self, values: Iterable[float]):
        """Choose an axis for these values, all of them finite.

        It is logarithmic if no value is negative and the largest is more than 10 times the median:
        a linear axis would show most of the values close to its foot.
        """
        values = list(values) or [0]  # an axis without values shows 0
        positive = [value for value in values if value > 0]
        self.is_logarithmic = (
            len(positive) > 0 and min(values) >= 0 and max(positive) > 10 * median(positive)
        )
        self.notes: list[str] = []
        if not self.is_logarithmic:
            self.ticks = linear_ticks(min(values), max(values))
            return

        self.ticks = logarithmic_ticks(min(positive), max(positive))
        ratio = max(positive) / median(positive)
        self.notes.append(f"logarithmic axis: the largest value is {ratio:,.0f} times the median")
        if 0 in values:
            self.notes.append(f"{values.count(0):,} × 0 at the foot")

    def place(self, value: float) -> float:
        """Return the place of a value, in percent from the top."""
        low, high = self.ticks[0], self.ticks[-1]
        if self.is_logarithmic:
            value = math.log10(max(value, low))
            low, high = math.log10(low), math.log10(high)
        return 100 * (high - value) / (high - low)


def thin_out(points: Points) -> Points:
    """Return at most MAX_POINTS + 2 of a line's points, in order.

    The points are divided into stretches of equal length. The smallest and the largest of each
    stretch are kept, so that no peak is lost, and the first and last point of the line.
    """
    stretch_length = math.ceil(2 * len(points) / MAX_POINTS)
    if stretch_length <= 2:  # every point would be kept
        return points

    kept = {0, len(points) - 1}
    for start in range(0, len(points), stretch_length):
        stretch = range(start, min(start + stretch_length, len(points)))
        ascending = sorted(stretch, key=lambda i: points[i][1])
        kept |= {ascending[0], ascending[-1]}
    return [points[i] for i in sorted(kept)]


def linear_ticks(low: float, high: float) -> list[float]:
    """Return round numbers that enclose low .. high, in about five equal steps.

    They begin at 0 if `low` is not negative and less than half of `high`.
    """
    if 0 <= low < 0.5 * high:
        low = 0
    if high - low <= 5e-4 * abs(high):  # a line that is flat, or looks so in labels of five digits
        low, high = min(0.0, 1.25 * low), max(0.0, 1.25 * high)
        if low == high == 0:
            high = 1.0

    # the smallest of 1, 2, 5 times a power of ten that makes five steps or fewer; 5.001, 1e-9 and
    # the nine digits absorb rounding
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= (high - low) / 5.001)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.9g}") for i in range(first, last + 1)]


def logarithmic_ticks(low: float, high: float) -> list[float]:
    """Return ticks that enclose low .. high, with 0 < low < high.

    They are 1, 2 and 5 times powers of ten. If that makes more than seven ticks, they are the
    outermost two and some powers of ten between them.
    """
    first, end = math.floor(math.log10(low)), math.ceil(math.log10(high))
    powers = [10.0**i for i in range(first - 1, end + 1)]
    round_numbers = [m * power for power in powers for m in (1, 2, 5)]
    low = max(tick for tick in round_numbers if tick <= low)
    high = min(tick for tick in round_numbers if tick >= high)
    ticks = [tick for tick in round_numbers if low <= tick <= high]
    if len(ticks) <= 7:
        return ticks

    between = [10.0**i for i in range(first, end + 1) if 2.5 * low < 10.0**i < high / 2.5]
    return [low, *between[:: math.ceil(len(between) / 5)], high]


def is_finite(value: object) -> TypeGuard[float]:
    """Return whether a value of the log is a number that can be drawn.

    It must be far from the largest float (1.8e308), so that the arithmetic of axes stays finite.
    """
    return isinstance(value, int | float) and -1e300 < value < 1e300
