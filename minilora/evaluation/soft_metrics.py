"""Metrics of two graphs of categories that compare titles by their embeddings (OLLM's).

Shapes: N nodes and E edges of one graph, M nodes and F edges of the other, D the width of an
embedding. Similarities are computed in blocks of rows, so no [E, F, D] is ever held.
"""

from typing import NamedTuple

import numpy as np

from minilora.evaluation.assignment import BLOCK_ROWS, best_assignment, is_affordable
from minilora.evaluation.category_graph import DiGraph, title_of
from minilora.evaluation.embedder import TitleEmbedder

MATCH_THRESHOLD = 0.436
"""The cosine from which on `fuzzy_scores` takes two titles for the same; the paper's value."""

NUM_PROPAGATIONS = 2
"""How often `propagate` passes vectors along the edges; the paper's value."""


class PrecisionRecall(NamedTuple):
    """How well two graphs agree."""

    precision: float
    """The share of the predicted graph that is right."""
    recall: float
    """The share of the reference that was found."""

    def f1(self) -> float:
        """Return the harmonic mean, 0 if both are 0."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


ZERO = PrecisionRecall(0.0, 0.0)


class EdgeVectors(NamedTuple):
    """The embeddings of the two titles of each edge u -> v."""

    tails: np.ndarray
    """Of u: float32 [E, D], each row of unit length."""
    heads: np.ndarray
    """Of v, likewise."""

    def similarities(self, others: "EdgeVectors", rows: slice) -> np.ndarray:
        """Return min(cos(u, u'), cos(v, v')) of some edges and all other edges: [rows, F]."""
        tails = self.tails[rows] @ others.tails.T
        heads = self.heads[rows] @ others.heads.T
        return np.minimum(tails, heads)


def embed_nodes(graph: DiGraph, embedder: TitleEmbedder) -> np.ndarray:
    """Embed the title of each node, in the graph's order: float32 [N, D]."""
    return embedder.embed([title_of(graph, node) for node in graph])


def edge_vectors(graph: DiGraph, vectors: np.ndarray) -> EdgeVectors:
    """Gather the unit vectors of the two ends of each edge from the nodes' vectors [N, D]."""
    unit_vectors = normalize(vectors)
    rows = {node: row for row, node in enumerate(graph)}
    tails = [rows[u] for u, _ in graph.edges]
    heads = [rows[v] for _, v in graph.edges]
    return EdgeVectors(unit_vectors[tails], unit_vectors[heads])


def normalize(vectors: np.ndarray) -> np.ndarray:
    """Scale each row to unit length: float32 [N, D]. Rows of zeros stay: their cosines are 0."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)  # [N, 1]
    return (vectors / np.where(lengths == 0, 1, lengths)).astype(np.float32)


def fuzzy_scores(predicted: EdgeVectors, reference: EdgeVectors) -> PrecisionRecall:
    """Match edges whose titles are similar at both ends; one edge may match many."""
    num_predicted, num_reference = len(predicted.tails), len(reference.tails)
    if not num_predicted or not num_reference:
        return ZERO
    num_right = 0
    is_found = np.zeros(num_reference, dtype=bool)
    for start in range(0, num_predicted, BLOCK_ROWS):
        similarities = predicted.similarities(reference, slice(start, start + BLOCK_ROWS))
        is_match = similarities >= MATCH_THRESHOLD  # at both ends, as it is their minimum
        num_right += int(is_match.any(axis=1).sum())
        is_found |= is_match.any(axis=0)
    num_found = int(is_found.sum())
    return PrecisionRecall(num_right / num_predicted, num_found / num_reference)


def continuous_scores(predicted: EdgeVectors, reference: EdgeVectors) -> PrecisionRecall | None:
    """Assign edges to each other so that their similarities sum up to the most.

    Returns:
        None if there are too many edges for it.
    """
    shape = len(predicted.tails), len(reference.tails)
    if 0 in shape:
        return ZERO
    if not is_affordable(shape):
        return None
    total = best_assignment(lambda rows: predicted.similarities(reference, rows), shape)
    return PrecisionRecall(total / shape[0], total / shape[1])


def graph_scores(predicted: np.ndarray, reference: np.ndarray) -> PrecisionRecall | None:
    """Assign nodes to each other so that the cosines of their vectors sum up to the most.

    Args:
        predicted: propagated vectors of one graph's nodes [N, D], see `propagate`.
        reference: those of the other graph's [M, D].

    Returns:
        None if there are too many nodes for it.
    """
    shape = len(predicted), len(reference)
    if 0 in shape:
        return ZERO
    if not is_affordable(shape):
        return None
    total = best_assignment(lambda rows: predicted[rows] @ reference.T, shape)
    return PrecisionRecall(total / shape[0], total / shape[1])


def propagate(graph: DiGraph, vectors: np.ndarray) -> np.ndarray:
    """Pass each node's vector on along the edges, so that vectors depend on the nodes above, too.

    This is a simple graph convolution (SGConv, arXiv 1902.07153) without weights: twice, a node v
    becomes the sum over itself and all u -> v of the vector of u / sqrt(d(u) d(v)), where d is the
    number of terms of that sum. A self-loop adds nothing: each node is its own term already.

    Args:
        graph: its N nodes.
        vectors: one for each node, not scaled to unit length: float32 [N, D].

    Returns:
        float32 [N, D], each row of unit length.
    """
    from scipy.sparse import coo_array, eye_array

    row_of = {node: row for row, node in enumerate(graph)}
    edges = [(row_of[v], row_of[u]) for u, v in graph.edges if u != v]
    targets, sources = np.array(edges, dtype=int).reshape(-1, 2).T  # [E, 2] -> [2, E]
    num_nodes = len(vectors)
    adjacency = coo_array((np.ones(len(edges)), (targets, sources)), (num_nodes, num_nodes))
    adjacency = adjacency.tocsr() + eye_array(num_nodes)
    scale = 1 / np.sqrt(adjacency.sum(axis=1))[:, None]  # [N, 1]

    passed = vectors.astype(np.float64)
    for _ in range(NUM_PROPAGATIONS):
        passed = scale * (adjacency @ (scale * passed))
    return normalize(passed)
