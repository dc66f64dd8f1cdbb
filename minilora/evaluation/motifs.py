"""Motifs of a directed graph: how often each connected shape of three nodes occurs.

There are 13 such shapes up to the names of their nodes. A shape is identified by its *corners*. A
corner is a node with two neighbours, and its kind says how the node is linked to each of them:
"out" (an edge to the neighbour), "in" (an edge from it) or "both". In six shapes only one node has
two neighbours (an open triad: one corner); in seven all three have (a triangle: three corners).
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterator
from itertools import combinations_with_replacement

from minilora.evaluation.category_graph import DiGraph

Corner = tuple[str, str]
"""The links of a node to two neighbours, sorted: ("both", "out")."""

Motif = tuple[Corner, ...]
"""A shape of three nodes: its corners, sorted."""

Links = dict[Hashable, dict[Hashable, str]]
"""For each node its neighbours, and how it is linked to them: "out", "in" or "both"."""


def motif_distance(predicted: DiGraph, reference: DiGraph) -> float:
    """Compute the total variation between the motif distributions of two graphs.

    Returns:
        Half the sum of |difference| over the 13 motifs' shares, 0 (alike) .. 1. If only one of
        the graphs has motifs the distance is 1, so that an empty graph is not the best; if neither
        has any it is 0.
    """
    ours, theirs = count_motifs(predicted), count_motifs(reference)
    if not ours or not theirs:
        return float(bool(ours) != bool(theirs))
    num_ours, num_theirs = ours.total(), theirs.total()
    differences = [abs(ours[m] / num_ours - theirs[m] / num_theirs) for m in ours | theirs]
    return sum(differences) / 2


def count_motifs(graph: DiGraph) -> Counter[Motif]:
    """Count the connected induced subgraphs of three nodes by their shape.

    The corners at a node are counted by a formula from its numbers of links of each kind, so a hub
    with many children costs as much as its edges, not as its pairs. Three of them belong to each
    triangle; triangles are listed, and category graphs have few. All other corners are open triads.

    Self-loops are ignored: shapes have edges between different nodes only.

    Returns:
        The number of each motif that occurs.
    """
    links = _links(graph)
    open_corners: Counter[Corner] = Counter()
    for neighbours in links.values():
        open_corners += _corners_of_pairs(Counter(neighbours.values()))

    motifs: Counter[Motif] = Counter()
    for a, b, c in _triangles(links):
        corners = [_corner(links, a, b, c), _corner(links, b, a, c), _corner(links, c, a, b)]
        open_corners.subtract(corners)
        motifs[tuple(sorted(corners))] += 1
    for corner, count in open_corners.items():
        motifs[(corner,)] = count
    return +motifs  # without those that do not occur


def _links(graph: DiGraph) -> Links:
    """Return how each node is linked to each of its neighbours, without self-loops."""
    links: Links = {node: {} for node in graph}
    for u, v in graph.edges:
        if u == v:
            continue
        is_mutual = graph.has_edge(v, u)
        links[u][v] = "both" if is_mutual else "out"
        links[v][u] = "both" if is_mutual else "in"
    return links


def _corners_of_pairs(kinds: Counter[str]) -> Counter[Corner]:
    """Count the pairs of a node's neighbours by their links; `kinds` counts the neighbours."""
    corners: Counter[Corner] = Counter()
    for first, second in combinations_with_replacement(sorted(kinds), 2):
        if first == second:
            corners[first, second] = math.comb(kinds[first], 2)
        else:
            corners[first, second] = kinds[first] * kinds[second]
    return corners


def _triangles(links: Links) -> Iterator[tuple[Hashable, Hashable, Hashable]]:
    """Yield every three nodes that are all linked to each other, once.

    A link is followed only from the node with fewer links to the one with more, so that the many
    neighbours of a hub are not gone through again for each of them.
    """
    rank = {node: (len(links[node]), place) for place, node in enumerate(links)}
    later = {
        node: {other for other in neighbours if rank[other] > rank[node]}
        for node, neighbours in links.items()
    }
    for a, above_a in later.items():
        for b in above_a:
            for c in above_a & later[b]:
                yield a, b, c


def _corner(links: Links, node: Hashable, first: Hashable, second: Hashable) -> Corner:
    """Return the corner at `node` between two of its neighbours."""
    low, high = sorted([links[node][first], links[node][second]])
    return low, high
