"""The chart of dropped labels shows the probabilities that training draws with."""

from collections import Counter

import numpy as np
import pytest

from minilora.data.dataset import Counts, Documents
from minilora.tracking.keep_chart import keep_chart

Edge = tuple[str, str]


def documents_of(rows: list[list[Edge]]) -> Documents:
    """Return documents with these edge occurrences and no tokens."""
    edges = list(dict.fromkeys(edge for row in rows for edge in row))
    ids = [edges.index(edge) for row in rows for edge in row]
    nothing = np.zeros(0, dtype=np.int32)
    return Documents(
        tokens=nothing,
        supervised=nothing.astype(bool),
        edge_index=nothing,
        offsets=np.zeros(len(rows) + 1, dtype=np.int64),
        row_index=np.arange(len(rows)),
        edges=edges,
        edge_ids=np.array(ids, dtype=np.int32),
        keep_offsets=np.cumsum([0, *(len(row) for row in rows)]),
        counts=Counts("made up"),
    )


def random_rows() -> list[list[Edge]]:
    """Return rows whose edges have very different frequencies."""
    rng = np.random.default_rng(0)
    edges = [(f"parent {i % 7}", f"child {i}") for i in range(400)]
    shares = 1 / np.arange(1, 401)
    rows = []
    for _ in range(500):
        chosen = rng.choice(400, size=8, p=shares / shares.sum())
        rows.append([edges[i] for i in chosen])
    return rows


def test_the_chart_is_that_of_a_loop_over_the_rows_trained_on():
    rows = random_rows()
    documents = documents_of(rows)
    documents.count_edges(np.array([*range(400), *range(50)]))  # 50 rows twice, 100 not at all
    chart = keep_chart(documents)
    assert chart is not None

    n = Counter(edge for row in [*rows[:400], *rows[:50]] for edge in row)
    mean = sum(n.values()) / len(n)
    kept = {edge: min(1.0, mean / n[edge]) for edge in n}
    assert len(n) < len(documents.edges)
    assert chart.mean == pytest.approx(mean)
    assert (chart.num_edges, chart.num_labels) == (len(n), sum(n.values()))
    dropped = {edge: n[edge] * (1 - kept[edge]) for edge in n}
    assert chart.share_dropped == pytest.approx(sum(dropped.values()) / sum(n.values()))

    shown = [(edge.parent, edge.child) for edge in chart.most_dropped]
    assert len(shown) == 10
    assert [dropped[edge] for edge in shown] == sorted(dropped.values(), reverse=True)[:10]
    for edge in chart.most_dropped:
        assert edge.num_occurrences == n[edge.parent, edge.child]
        assert edge.probability == pytest.approx(kept[edge.parent, edge.child])

    # the points, measured by the axes' outermost labels
    first, last = chart.x_ticks[0], chart.x_ticks[-1]
    assert (first.place, first.value, last.place) == (0, 1, 100)
    assert chart.mean_x == pytest.approx(100 * np.log(mean) / np.log(last.value))
    assert len(chart.points) <= 201 and sum(point.num_edges for point in chart.points) == len(n)
    for point in chart.points:
        here = [edge for edge in n if point.first <= n[edge] <= point.last]
        assert len(here) == point.num_edges
        value = last.value ** (point.x / 100)
        assert point.first * 0.999 <= value <= point.last * 1.001
        probability = sum(kept[edge] for edge in here) / len(here)
        assert point.probability == pytest.approx(probability)
        assert point.y == pytest.approx(100 * (1 - probability))
    few = [point for point in chart.points if point.last <= 20]
    assert [point.first for point in few] == sorted({count for count in n.values() if count <= 20})


def test_there_is_no_chart_where_no_label_is_dropped():
    documents = documents_of(random_rows())
    assert keep_chart(documents) is not None
    documents.count_edges(np.arange(len(documents)), edge_dropping=False)
    assert keep_chart(documents) is None
    assert keep_chart(documents_of([[("R", "A")], [("R", "B")]])) is None, (
        "all are equally frequent"
    )
    assert keep_chart(documents_of([[], []])) is None, "another format than paths"


def test_few_edges_have_an_axis():
    chart = keep_chart(documents_of([[("R", "A"), ("A", "B")], [("R", "A")]]))
    assert chart is not None
    assert [(point.first, point.num_edges) for point in chart.points] == [(1, 1), (2, 1)]
    assert chart.points[1].probability == pytest.approx(0.75) and chart.points[1].x == 100
    assert [edge.child for edge in chart.most_dropped] == ["A"]
