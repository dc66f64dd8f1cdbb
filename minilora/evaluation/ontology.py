"""Metrics of ontology learning (OLLM, arXiv 2410.23584): category paths as a weighted graph.

A text has one path per line, "A -> B -> C". All paths of all answers form a directed graph; the
weight of an edge u -> v is the number of times it occurs. `score` compares the graph of the answers
with that of the references. `prune` can remove unlikely edges before, with thresholds that
`search_thresholds` finds.

Shapes: E edges of a graph.
"""

import json
from collections import Counter
from collections.abc import Iterable, Set
from dataclasses import dataclass
from itertools import accumulate, compress, pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minilora.data.paths import ARROW
from minilora.errors import UserError
from minilora.files import replace_file

DiGraph = Any
"""A networkx.DiGraph. networkx is an optional dependency, and has no type hints."""

Figures = dict[str, float | int]
"""The value of each figure by its key."""


@dataclass(frozen=True)
class Thresholds:
    """Which edges `prune` removes."""

    absolute: float = 0.0
    """Remove edges lighter than this quantile (0 .. 1) of all weights."""
    relative: float = 0.0
    """Remove the lightest edges out of each node, up to this share (0 .. 1) of their weight."""
    remove_self_loops: bool = True
    """Remove edges u -> u."""
    remove_inverse_edges: bool = True
    """Of u -> v and v -> u remove the lighter one, or neither if both weigh the same."""


class ParsedText(NamedTuple):
    """The category paths of a text."""

    paths: list[list[str]]
    """The names of each well-formed line, without whitespace around them."""
    num_lines: int
    """Number of lines that are not blank, well formed or not."""


def parse_paths(text: str, roots: Set[str] = frozenset()) -> ParsedText:
    """Read the paths of a text, one per line.

    A line is well formed if it has two names or more and none is blank.

    Args:
        text: lines such as "A -> B -> C".
        roots: names that are well formed alone on a line, too.
    """
    paths = []
    num_lines = 0
    for line in text.split("\n"):
        if not line.strip():
            continue
        num_lines += 1
        names = [name.strip() for name in line.split(ARROW)]
        if all(names) and (len(names) > 1 or names[0] in roots):
            paths.append(names)
    return ParsedText(paths, num_lines)


def build_graph(texts: Iterable[str], roots: Set[str] = frozenset()) -> DiGraph:
    """Build the graph of all paths of all texts.

    Args:
        texts: see `parse_paths`.
        roots: names that are well formed alone on a line.

    Returns:
        A networkx.DiGraph. An edge's "weight" is how often it occurs in the paths.
    """
    import networkx  # type: ignore[import-untyped]

    paths: list[list[str]] = []
    for text in texts:
        paths += parse_paths(text, roots).paths

    graph = networkx.DiGraph()
    weights: Counter[tuple[str, str]] = Counter()
    for path in paths:
        graph.add_nodes_from(path)
        weights.update(pairwise(path))
    graph.add_weighted_edges_from((u, v, weight) for (u, v), weight in weights.items())
    return graph


def write_graph(graph: DiGraph, path: str | Path) -> None:
    """Write a graph as node-link JSON. If that fails, an older file stays as it was."""
    import networkx

    links = networkx.node_link_data(graph, edges="links")
    replace_file(Path(path), json.dumps(links, ensure_ascii=False))


def read_graph(path: str | Path) -> DiGraph:
    """Read a graph that `write_graph` wrote.

    Raises:
        UserError: the file cannot be read, or holds something other than a directed graph.
    """
    import networkx

    # networkx raises any of these for JSON of another structure
    errors = (OSError, ValueError, LookupError, TypeError, AttributeError, networkx.NetworkXError)
    try:
        links = json.loads(Path(path).read_text(encoding="utf-8"))
        graph = networkx.node_link_graph(links, edges="links")
        if type(graph) is not networkx.DiGraph:
            raise TypeError("it is undirected or has parallel edges")
    except errors as error:
        message = f"{path}: expected a directed graph as node-link JSON: {error!r}"
        raise UserError(message) from error
    return graph


def literal_figures(predicted: DiGraph, reference: DiGraph) -> Figures:
    """Compute precision, recall and F1 of edges and of nodes, matched by exact names, 0 .. 1.

    The F1 of edges is OLLM's Literal F1. If only one of the graphs has edges, the figures of edges
    are 0; if neither has any, they are 1. The same holds for nodes.
    """
    return {
        **_overlap("edge", predicted.edges, reference.edges),
        **_overlap("node", predicted.nodes, reference.nodes),
    }


def _overlap(what: str, predicted: Set, reference: Set) -> Figures:
    """Compute precision, recall and F1 of two sets; `what` begins the keys of the figures."""
    if predicted or reference:
        common = sum(1 for item in predicted if item in reference)
        precision = common / max(len(predicted), 1)
        recall = common / max(len(reference), 1)
        f1 = 2 * common / (len(predicted) + len(reference))
    else:
        precision = recall = f1 = 1.0
    return {f"{what}_precision": precision, f"{what}_recall": recall, f"{what}_f1": f1}


def prune(graph: DiGraph, thresholds: Thresholds) -> DiGraph:
    """Remove unlikely edges, and the nodes that are left without any: OLLM's post-processing.

    `thresholds.relative` works as follows. Sort the edges out of a node by ascending weight, and
    let C of an edge be the share of their weight that this edge and those before it have. Edges
    with C <= relative are removed. Edges of equal weight have the C of the last of them, so their
    order does not matter. If relative < 1, a node's heaviest edge stays. OLLM's own code removes
    one edge more: the first with C > relative.

    Every threshold is applied to the graph as given, not to what another threshold has left.

    Returns:
        A new graph; the given one is unchanged.
    """
    edges = _measure_edges(graph, thresholds)
    return edges.select(type(graph), thresholds.absolute, thresholds.relative)


class _EdgeTable(NamedTuple):
    """The edges of a graph, and the numbers that decide which of them stay."""

    edges: list[tuple]
    """(u, v, attributes) of each edge."""
    weights: np.ndarray
    """The weight of each edge [E]."""
    cumulative_shares: np.ndarray
    """float64 [E]: C of `prune`, 0 .. 1."""
    removed: np.ndarray
    """bool [E]: self loops and inverse edges, which are removed whatever their weight."""

    def select(self, graph_class: type, absolute: float, relative: float) -> DiGraph:
        """Make a graph of the edges that the two thresholds leave; see `Thresholds`."""
        if not self.edges:  # no weights have no quantile
            return graph_class()
        min_weight = np.quantile(self.weights, absolute)
        kept = (self.weights >= min_weight) & (self.cumulative_shares > relative) & ~self.removed
        return graph_class(compress(self.edges, kept))


def _measure_edges(graph: DiGraph, thresholds: Thresholds) -> _EdgeTable:
    """Compute what `prune` needs to know of each edge.

    Of the thresholds, `remove_self_loops` and `remove_inverse_edges` are applied here; `absolute`
    and `relative` are arguments of `_EdgeTable.select`.
    """
    weights = {(u, v): weight for u, v, weight in graph.edges(data="weight", default=1)}

    shares: dict[tuple[str, str], float] = {}
    for u in graph:
        ascending = sorted(weights[u, v] for v in graph[u])
        # {weight: sum up to it}. A dict keeps the last value of a key, so edges of equal weight
        # have the sum up to the last of them
        cumulative = dict(zip(ascending, accumulate(ascending), strict=True))
        for v in graph[u]:
            shares[u, v] = cumulative[weights[u, v]] / cumulative[ascending[-1]]

    removed = []
    for (u, v), weight in weights.items():
        is_self_loop = thresholds.remove_self_loops and u == v
        is_lighter_inverse = thresholds.remove_inverse_edges and weights.get((v, u), 0) > weight
        removed.append(is_self_loop or is_lighter_inverse)

    return _EdgeTable(
        edges=list(graph.edges(data=True)),
        weights=np.array(list(weights.values())),
        cumulative_shares=np.array([shares[edge] for edge in weights]),
        removed=np.array(removed, dtype=bool),
    )


def search_thresholds(
    predicted: DiGraph, reference: DiGraph, metric: str = "edge_f1"
) -> tuple[Thresholds, float]:
    """Find the thresholds with which the pruned graph is most like the reference.

    The grid is that of OLLM's code, 21 x 21, denser towards absolute = 1 and relative = 0.

    Args:
        predicted: the graph to prune.
        reference: the graph to compare with.
        metric: the figure of `literal_figures` to maximize.

    Returns:
        The best thresholds (of equally good ones those that prune least), and their figure.
    """
    edges = _measure_edges(predicted, Thresholds())
    absolutes = 1 - np.geomspace(1 / max(len(predicted.edges), 1), 1, 21)
    relatives = np.geomspace(0.1, 1, 21) - 0.1

    candidates = []
    for absolute, relative in product(absolutes.tolist(), relatives.tolist()):
        pruned = edges.select(type(predicted), absolute, relative)
        figure = literal_figures(pruned, reference)[metric]
        candidates.append(_Candidate(figure, len(pruned.edges), absolute, relative))
    best = max(candidates, key=_Candidate.rank)
    return Thresholds(best.absolute, best.relative), best.figure


class _Candidate(NamedTuple):
    """One point of the grid of `search_thresholds`."""

    figure: float
    num_edges: int
    """Edges of the pruned graph."""
    absolute: float
    relative: float

    def rank(self) -> tuple[float, int, float, float]:
        """Return what to order candidates by: the figure, then how little is pruned."""
        return self.figure, self.num_edges, -self.absolute, -self.relative


def score(
    answers: list[str], references: list[str], thresholds: Thresholds | None = None
) -> tuple[Figures, DiGraph]:
    """Compare the graph of the answers' paths with the graph of the references' paths.

    Args:
        answers: generated texts, one path per line.
        references: the reference of each answer. A name alone on a line is well formed if it
            begins a path of some reference.
        thresholds: prune the answers' graph with these, and score it too.

    Returns:
        The figures, and the answers' graph (pruned if there are thresholds). The figures are
        "lines" (number of lines of all answers that are not blank), "well_formed" (the share of
        them that are well formed, 0 .. 1), "nodes" and "edges" (their numbers in the graph) and
        those of `literal_figures`. With thresholds, the figures of the graph are repeated for the
        pruned graph under keys that end in "_pruned".

    Raises:
        UserError: a reference has a line that is not a path.
    """
    roots = set()
    for text in references:
        roots |= {line.split(ARROW)[0].strip() for line in text.split("\n")}
    for row, text in enumerate(references, start=1):
        parsed = parse_paths(text, roots)
        if len(parsed.paths) < parsed.num_lines:
            place = f"reference {row} of {len(references)}"
            raise UserError(f"graph: {place}: a name is blank in a line of {text[:200]!r}")

    paths, num_lines = parse_paths("\n".join(answers), roots)
    graph, reference_graph = build_graph(answers, roots), build_graph(references, roots)
    figures: Figures = {"lines": num_lines, "well_formed": len(paths) / max(num_lines, 1)}
    figures |= _graph_figures(graph, reference_graph)
    if thresholds is not None:
        graph = prune(graph, thresholds)
        pruned_figures = _graph_figures(graph, reference_graph)
        figures |= {f"{key}_pruned": value for key, value in pruned_figures.items()}
    return figures, graph


def _graph_figures(graph: DiGraph, reference: DiGraph) -> Figures:
    """Count a graph's nodes and edges, and compare it with the reference."""
    counts = {"nodes": len(graph), "edges": len(graph.edges)}
    return {**counts, **literal_figures(graph, reference)}
