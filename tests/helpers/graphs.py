"""Graphs of categories for tests, and their figures by loops over plain dicts."""

import random
from fractions import Fraction

import networkx
import numpy as np

Edges = dict[tuple[str, str], int]
"""Weights of edges (u, v)."""


def graph_of(edges: Edges) -> networkx.DiGraph:
    """Return the graph with these edges."""
    graph = networkx.DiGraph()
    for (u, v), weight in edges.items():
        graph.add_edge(u, v, weight=weight)
    return graph


def edges_of(graph: networkx.DiGraph) -> Edges:
    """Return the edges of a graph with their weights."""
    return {(u, v): data["weight"] for u, v, data in graph.edges(data=True)}


def draw_edges(rng: random.Random, nodes: int = 9, edges: int = 30, heaviest: int = 6) -> Edges:
    """Draw weights with many ties, self loops and inverse edges."""
    drawn = {}
    for _ in range(edges):
        edge = str(rng.randrange(nodes)), str(rng.randrange(nodes))
        drawn[edge] = rng.randint(1, heaviest)
    return drawn


def literal_by_loops(predicted: networkx.DiGraph, reference: networkx.DiGraph) -> dict[str, float]:
    """Return precision, recall and F1 of edges and nodes by names."""
    figures: dict[str, float] = {}
    for what, ours, theirs in (
        ("edge", list(predicted.edges), list(reference.edges)),
        ("node", list(predicted), list(reference)),
    ):
        hits = 0
        for item in ours:
            for other in theirs:
                hits += item == other
        precision = hits / len(ours) if ours else 0.0
        recall = hits / len(theirs) if theirs else 0.0
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        if not ours and not theirs:
            precision = recall = f1 = 1.0
        figures |= {f"{what}_precision": precision, f"{what}_recall": recall, f"{what}_f1": f1}
    return figures


def is_inverse_or_loop(edges: Edges, u: str, v: str) -> bool:
    """Return whether an edge is removed whatever the thresholds are."""
    return u == v or edges.get((v, u), 0) > edges[u, v]


def prune_by_paper(edges: Edges, absolute: float, relative: float) -> Edges:
    """Prune by the wording of OLLM's paper; loops and inverse edges stay."""
    kept = {}
    quantile = float(np.quantile(list(edges.values()), absolute)) if edges else 0
    for (u, v), weight in edges.items():
        outgoing = [w for (a, _), w in edges.items() if a == u]
        cumulative = Fraction(sum(w for w in outgoing if w <= weight), sum(outgoing))
        if weight >= quantile and cumulative > relative:
            kept[u, v] = weight
    return kept


def prune_by_code(edges: Edges, absolute: float, relative: float) -> Edges:
    """Prune by the arithmetic of OLLM's code, whose p is 1 - relative; ties go by name."""
    lightest = sorted(edges, key=lambda edge: (edges[edge], edge))[: int(absolute * len(edges))]
    removed = set(lightest)
    share_to_keep = 1 - relative
    for node in {u for u, _ in edges}:
        outgoing = {edge: weight for edge, weight in edges.items() if edge[0] == node}
        descending = np.array(sorted(outgoing.values(), reverse=True))
        shares = np.cumsum(descending / descending.sum())
        if share_to_keep < 1:
            first = next(i for i, share in enumerate(shares) if share > share_to_keep)
            removed |= {edge for edge, weight in outgoing.items() if weight <= descending[first]}
    return {edge: weight for edge, weight in edges.items() if edge not in removed}
