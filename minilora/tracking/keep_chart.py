"""The report's chart of dropped labels: with what probability each edge keeps its labels.

`data/paths.py` explains why labels of frequent edges are dropped in training.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minilora.data.dataset import Documents
from minilora.tracking.charts import Tick, linear_ticks, logarithmic_ticks

NUM_DROPPED_EDGES = 10
"""Edges that are named."""

MAX_POINTS = 200
"""Points of the chart, side by side."""


class KeepPoint(NamedTuple):
    """All edges that occur about equally often, as one point."""

    x: float
    """Percent from the left."""
    y: float
    """Percent from the top."""
    radius: float
    """Pixels: it grows with the number of edges."""
    first: int
    """The smallest n(u, v) of the edges."""
    last: int
    """The largest."""
    num_edges: int
    probability: float
    """With which the labels are kept, on average over the edges."""


class DroppedEdge(NamedTuple):
    """An edge whose labels are dropped often."""

    parent: str
    child: str
    num_occurrences: int
    """n(u, v)."""
    probability: float
    """With which a label is kept."""


@dataclass
class KeepChart:
    """What the template draws."""

    points: list[KeepPoint]
    x_ticks: list[Tick]
    """Of n(u, v), on a logarithmic axis."""
    y_ticks: list[Tick]
    mean: float
    """M, the mean of n(u, v) over the edges."""
    mean_x: float
    """Its place, percent from the left."""
    num_edges: int
    """Edges that are trained on."""
    num_labels: int
    """The sum of their n(u, v): the names whose labels may be dropped, in one epoch."""
    share_dropped: float
    """Share of these that lose their labels in expectation, 0 .. 1."""
    most_dropped: list[DroppedEdge]
    """The edges that lose most labels in expectation, in descending order."""


def keep_chart(documents: Documents) -> KeepChart | None:
    """Make the chart of the training documents, or None if none of their labels is dropped."""
    # shape: [edges]
    probabilities = np.ones(len(documents.edges))
    probabilities[documents.edge_ids] = documents.keep_probability
    trained = np.flatnonzero(documents.edge_counts)
    counts, probabilities = documents.edge_counts[trained], probabilities[trained]
    if not (probabilities < 1).any():
        return None

    axis = _CountAxis(int(counts.max()))
    dropped = counts * (1 - probabilities)  # in expectation
    most_dropped = []
    for i in np.argsort(-dropped, kind="stable")[:NUM_DROPPED_EDGES]:
        if dropped[i] > 0:
            parent, child = documents.edges[trained[i]]
            edge = DroppedEdge(parent, child, int(counts[i]), float(probabilities[i]))
            most_dropped.append(edge)

    mean = float(counts.mean())
    return KeepChart(
        points=_points(counts, probabilities, axis),
        x_ticks=[Tick(axis.place(value), value) for value in axis.ticks],
        y_ticks=[Tick(100 * (1 - value), value) for value in linear_ticks(0, 1)],
        mean=mean,
        mean_x=axis.place(mean),
        num_edges=len(counts),
        num_labels=int(counts.sum()),
        share_dropped=float(dropped.sum() / counts.sum()),
        most_dropped=most_dropped,
    )


class _CountAxis:
    """The logarithmic axis of n(u, v), from 1."""

    def __init__(self, largest: int):
        """Choose the ticks up to the largest n."""
        self.ticks = logarithmic_ticks(1, max(largest, 2))

    def place(self, count: float) -> float:
        """Return the place of a value, in percent from the left."""
        return float(self.places(np.array(count)))

    def places(self, counts: np.ndarray) -> np.ndarray:
        """Return the places of several values."""
        return 100 * np.log(counts) / np.log(self.ticks[-1])


def _points(counts: np.ndarray, probabilities: np.ndarray, axis: _CountAxis) -> list[KeepPoint]:
    """Make a point of all edges that would stand at about the same place of the axis.

    Args:
        counts: n(u, v) of each edge, int64 [edges].
        probabilities: of keeping a label, float64 [edges].
        axis: the axis of n.
    """
    # edges of equal n have equal probabilities, so little is lost
    places = axis.places(counts)
    columns = np.round(places / 100 * MAX_POINTS)
    points = []
    for column in np.unique(columns):
        chosen = columns == column
        probability = float(probabilities[chosen].mean())
        point = KeepPoint(
            x=float(places[chosen].mean()),
            y=100 * (1 - probability),
            radius=2 + 2 * float(np.log10(chosen.sum())),
            first=int(counts[chosen].min()),
            last=int(counts[chosen].max()),
            num_edges=int(chosen.sum()),
            probability=probability,
        )
        points.append(point)
    return points
