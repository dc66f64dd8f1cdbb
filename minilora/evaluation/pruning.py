"""Pruning of unlikely edges from a graph of category paths (OLLM, arXiv 2410.23584).

A model writes the same edge in many answers if it is sure of it, and once if it is not. So light
edges are removed: light among all edges (the absolute threshold), and light among those out of the
same node (the relative one). Which thresholds are best is searched on an evaluation set.

OLLM's paper and its public code describe the two thresholds differently. Both forms are here, and
in both a threshold of 0 removes nothing and a larger one removes more.

Shapes: E edges of a graph.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import compress, product
from typing import Literal, NamedTuple

import numpy as np
import tqdm

from minilora.errors import UserError
from minilora.evaluation.category_graph import DiGraph, title_of

PruneRule = Literal["paper", "code"]

EQUAL_SHARES = {0.0: 1.0}
"""The share by weight of edges that all weigh 0: like any edges of equal weight, all of it."""

GRID_POINTS = 21
"""Values of each threshold that `search_thresholds` tries."""


class TooLargeError(UserError):
    """A graph is too large for a figure, whatever is pruned."""


@dataclass(frozen=True)
class Thresholds:
    """Which edges `prune` removes."""

    absolute: float = 0.0
    """Remove edges that are light among all edges, about this share (0 .. 1) of them."""
    relative: float = 0.0
    """Remove the lightest edges out of each node, up to this share (0 .. 1) of their weight."""
    remove_self_loops: bool = True
    """Remove edges u -> u."""
    remove_inverse_edges: bool = True
    """Of u -> v and v -> u remove the lighter one, or neither if both weigh the same."""
    rule: PruneRule = "paper"
    """The exact meaning of absolute and relative: that of OLLM's paper or that of its code."""


PRESETS = {
    "wikipedia": Thresholds(absolute=0.97433, relative=0.025893),
    "arxiv": Thresholds(absolute=0.983681, relative=0.123872),
}
"""The thresholds that OLLM published for its two datasets.

Both numbers say how much is removed, as those of `Thresholds` do. This follows from the grid that
they are points of. Its absolute values are the shares 1 - geomspace(1/E, 1, 21) of edges to remove.
If 0.97433 were the share to keep, it would be (1/E)^(j/20) for a whole number j > 0, and the graph
would have fewer than 2 edges. The relative values of OLLM's code are p = 1.1 - geomspace(0.1, 1,
21), the share of weight to keep, from 1 down to 0.1. 0.025893 and 0.123872 are none of these. They
are 1 - p for the values 2 and 7 (counted from 0): the share to remove.
"""


def prune(graph: DiGraph, thresholds: Thresholds, root: Hashable | None = None) -> DiGraph:
    """Remove unlikely edges, and the nodes that are left without any: OLLM's post-processing.

    `absolute` (0 .. 1) by the paper's rule removes the edges that are lighter than this quantile of
    all weights (linearly interpolated), so edges of equal weight go or stay together. By the code's
    rule it removes exactly the floor(absolute * E) lightest edges; of edges of equal weight those
    whose names come first in the alphabet (OLLM's code takes arbitrary ones).

    `relative` (0 .. 1) by the paper's rule works as follows. Sort the edges out of a node by
    ascending weight, and let C of an edge be the share of their weight that this edge and those
    before it have; edges of equal weight have the C of the last of them. Edges with C <= relative
    are removed, so a node's heaviest edge stays if relative < 1. The code's rule removes one weight
    more. Sort by descending weight, and let D be the share of this edge and those before it: the
    first edge with D > 1 - relative is removed, and all that are as light as it or lighter. So the
    only edge out of a node is removed by any relative > 0.

    Every threshold is applied to the graph as given, not to what another threshold has left.

    Args:
        graph: edges have a "weight" (1 if it is missing).
        thresholds: what to remove.
        root: if given, and all its edges are removed, it is put back as the parent of every node
            that has no other, by edges of weight 1. By the code's rule each node without parent
            gets such an edge even where the root has edges left, as in OLLM's code. Nothing is put
            into a graph that had no edges.

    Returns:
        A new graph with the attributes of the given one, which is unchanged.
    """
    edges = _measure_edges(graph, thresholds)
    kept = edges.kept(thresholds.absolute, thresholds.relative)
    return _pruned_graph(graph, kept, root, thresholds.rule)


class _EdgeTable(NamedTuple):
    """The edges of a graph, and the numbers that decide which of them stay."""

    weights: np.ndarray
    """The weight of each edge [E], in the order of `graph.edges`."""
    order: np.ndarray
    """int64 [E]: the edges from the lightest to the heaviest, equal ones by name."""
    shares: np.ndarray
    """float64 [E], 0 .. 1: C of `prune` by the paper's rule, D by the code's."""
    removed: np.ndarray
    """bool [E]: self loops and inverse edges, which are removed whatever their weight."""
    rule: PruneRule

    def kept(self, absolute: float, relative: float) -> np.ndarray:
        """Return which edges the two thresholds leave: bool [E]. See `prune`."""
        if len(self.weights) == 0:  # no weights have no quantile
            return self.removed
        if self.rule == "code":
            num_light = int(absolute * len(self.weights))
            too_light = np.zeros(len(self.weights), dtype=bool)
            too_light[self.order[:num_light]] = True
            share_to_keep = 1 - relative
            unlikely_child = (self.shares > share_to_keep) & (share_to_keep < 1)
        else:
            too_light = self.weights < np.quantile(self.weights, absolute)
            unlikely_child = (self.shares <= relative) & (relative > 0)
        return ~(too_light | unlikely_child | self.removed)


def _measure_edges(graph: DiGraph, thresholds: Thresholds) -> _EdgeTable:
    """Compute what `prune` needs to know of each edge.

    Of the thresholds, all but `absolute` and `relative` are applied here; these two are arguments
    of `_EdgeTable.kept`.
    """
    edges = list(graph.edges)
    weights = {(u, v): float(weight) for u, v, weight in graph.edges(data="weight", default=1)}

    shares: dict[tuple[Hashable, Hashable], float] = {}
    share_of_weight = _shares_up_to if thresholds.rule == "paper" else _shares_down_to
    for u in graph:
        outgoing = np.array([weights[u, v] for v in graph[u]])
        share = share_of_weight(outgoing)
        shares |= {(u, v): share[weights[u, v]] for v in graph[u]}

    removed = []
    for (u, v), weight in weights.items():
        is_self_loop = thresholds.remove_self_loops and u == v
        is_lighter_inverse = thresholds.remove_inverse_edges and weights.get((v, u), 0) > weight
        removed.append(is_self_loop or is_lighter_inverse)

    def by_weight_and_name(i: int) -> tuple[float, str, str]:
        u, v = edges[i]
        return weights[u, v], str(u), str(v)

    return _EdgeTable(
        weights=np.array(list(weights.values())),
        order=np.array(sorted(range(len(edges)), key=by_weight_and_name), dtype=np.int64),
        shares=np.array([shares[edge] for edge in edges]),
        removed=np.array(removed, dtype=bool),
        rule=thresholds.rule,
    )


def _shares_up_to(weights: np.ndarray) -> dict[float, float]:
    """Return {weight: share of the total that edges of this weight or a lighter one have}: C."""
    if not weights.any():
        return EQUAL_SHARES
    ascending = np.sort(weights)
    return _share_by_weight(ascending, ascending.cumsum() / ascending.sum())


def _shares_down_to(weights: np.ndarray) -> dict[float, float]:
    """Return {weight: share of the total that edges of this weight or a heavier one have}: D."""
    if not weights.any():
        return EQUAL_SHARES
    descending = np.sort(weights)[::-1]
    # divided before they are summed up, as in OLLM's code: this decides how ties are rounded
    return _share_by_weight(descending, (descending / descending.sum()).cumsum())


def _share_by_weight(weights: np.ndarray, shares: np.ndarray) -> dict[float, float]:
    """Return {weight: share}. Edges of equal weight have the share of the last of them."""
    # a dict keeps the last value of a key
    return dict(zip(weights.tolist(), shares.tolist(), strict=True))


def _pruned_graph(
    graph: DiGraph, kept: np.ndarray, root: Hashable | None, rule: PruneRule
) -> DiGraph:
    """Make a graph of the edges that are kept (bool [E]), and put the root back; see `prune`."""
    pruned = type(graph)(**graph.graph)
    pruned.add_edges_from(compress(graph.edges(data=True), kept))
    pruned.add_nodes_from([(node, graph.nodes[node]) for node in pruned])

    had_edges = len(graph.edges) > 0
    if root is not None and had_edges and (root not in pruned or rule == "code"):
        without_parent = [node for node in pruned if pruned.in_degree(node) == 0 and node != root]
        pruned.graph["root"] = root
        pruned.add_node(root, title=title_of(graph, root))
        pruned.add_edges_from([(root, node) for node in without_parent], weight=1)
    return pruned


# ---- search


def search_thresholds(
    predicted: DiGraph,
    figure: Callable[[DiGraph], float | None],
    rule: PruneRule = "paper",
    root: Hashable | None = None,
) -> tuple[Thresholds, float]:
    """Find the thresholds with which the pruned graph has the best figure.

    The grid is that of OLLM's code, 21 x 21, denser towards absolute = 1 and relative = 0. Points
    that leave the same edges are computed once.

    Args:
        predicted: the graph to prune.
        figure: of a pruned graph, the larger the better; None: it is too large to be computed, and
            these thresholds are not chosen.
        rule: see `prune`.
        root: see `prune`.

    Returns:
        The best thresholds (of equally good ones those that prune least), and their figure.

    Raises:
        TooLargeError: the figure is None for all thresholds.
    """
    edges = _measure_edges(predicted, Thresholds(rule=rule))
    absolutes = 1 - np.geomspace(1 / max(len(predicted.edges), 1), 1, GRID_POINTS)
    relatives = np.geomspace(0.1, 1, GRID_POINTS) - 0.1

    # the first thresholds that leave a set of edges are the lowest
    thresholds_of: dict[bytes, Thresholds] = {}
    for absolute, relative in product(absolutes[::-1].tolist(), relatives.tolist()):
        mask = edges.kept(absolute, relative).tobytes()
        thresholds_of.setdefault(mask, Thresholds(absolute, relative, rule=rule))

    candidates = []
    graphs = tqdm.tqdm(thresholds_of.items(), "pruning", unit=" graphs", disable=None)
    for mask, thresholds in graphs:
        kept = np.frombuffer(mask, dtype=bool)
        value = figure(_pruned_graph(predicted, kept, root, rule))
        if value is not None:
            candidates.append(_Candidate(value, int(kept.sum()), thresholds))
    if not candidates:
        raise TooLargeError("pruning: the graph is too large for this figure with any thresholds")
    best = max(candidates, key=_Candidate.rank)
    return best.thresholds, best.figure


class _Candidate(NamedTuple):
    """A pruned graph of `search_thresholds`."""

    figure: float
    num_edges: int
    """Edges that stay."""
    thresholds: Thresholds

    def rank(self) -> tuple[float, int, float, float]:
        """Return what to order candidates by: the figure, then how little is pruned."""
        thresholds = self.thresholds
        return self.figure, self.num_edges, -thresholds.absolute, -thresholds.relative
