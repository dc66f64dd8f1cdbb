"""Category paths (format paths), and the labels that OLLM drops while training on them.

A row of this format is an article and the paths that lead to it through a category graph, such as
Science -> Physics -> Optics. The model learns to write the paths, one a line.

Why labels are dropped: edges near the root of the graph occur in very many paths, edges near the
leaves in few. Trained on every label, the model memorizes the frequent edges and overfits them
long before it has learnt the rare ones. OLLM (arXiv 2410.23584, section 3.2) evens this out. Let
n(u, v) be how often the edge u -> v occurs in the rows of an epoch (those that data.train_size and
data.train_weights leave; a row that is used twice counts twice), and M the mean of n over these
rows' distinct edges. Each time a document is trained on, every occurrence of u -> v keeps the
labels of its node v with probability min(1, M / n(u, v)). In expectation an edge is then trained on
min(n, M) times per epoch: frequent edges are held at the mean, and all others keep every label.

The tokens of a dropped node stay in the text, where later tokens attend to them; the loss merely
leaves them out, all tokens of the node together. Evaluation uses every label.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from minilora.data.example import Edge, RowError, Span, column_of, string_of

ARROW = " -> "
ARTICLE_END = "\n"  # between article and paths, where no chat template separates them


def article_prompt(row: dict) -> str:
    """Return the prompt of a row, in OLLM's form: title and abstract. Raises RowError."""
    return f"Title: {string_of(row, 'title')}\n{string_of(row, 'abstract')}"


def paths_of(row: dict) -> list[list[str]]:
    """Return the paths of a row, each from root to leaf. Raises RowError naming the field."""
    paths = column_of(row, "paths")
    if not isinstance(paths, list) or not all(isinstance(path, list) and path for path in paths):
        raise RowError("malformed", '"paths": expected a list of non-empty lists of strings')

    for i, path in enumerate(paths):
        for depth, node in enumerate(path):
            if not _is_valid_node(node):
                raise RowError(
                    "malformed",
                    f'"paths"[{i}][{depth}]: {node!r} is not a name: '
                    f'a non-empty string without newline or "{ARROW}"',
                )
    return paths


def _is_valid_node(node: object) -> bool:
    """Return whether a node can be written as part of a path and read back."""
    return isinstance(node, str) and bool(node.strip()) and "\n" not in node and ARROW not in node


def write_paths(paths: Iterable[Sequence[str]]) -> str:
    """Return the response of a row: one path a line, each line ended by a newline."""
    return "".join(ARROW.join(path) + "\n" for path in paths)


def node_spans(paths: Iterable[Sequence[str]]) -> list[Span]:
    """Return where `write_paths` writes node v of each edge u -> v, in the order of `path_edges`.

    The first node of a path is the end of no edge, so it has no span.
    """
    spans = []
    line_start = 0
    for path in paths:
        begin = line_start
        for depth, node in enumerate(path):
            end = begin + len(node)
            if depth > 0:
                spans.append((begin, end))
            begin = end + len(ARROW)
        line_start += len(ARROW.join(path)) + 1  # 1: the newline
    return spans


def path_edges(paths: Iterable[Sequence[str]]) -> list[Edge]:
    """Return every occurrence of an edge in the order of the text: path by path, root to leaf."""
    edges: list[Edge] = []
    for path in paths:
        edges += pairwise(path)
    return edges


def keep_probabilities(counts: np.ndarray) -> np.ndarray:
    """Return the probability min(1, M / n) with which each edge keeps its labels.

    Args:
        counts: n(u, v) of each distinct edge, int64 [edges]. M is the mean of those above 0.

    Returns:
        float64 [edges]; 1 for an edge with n = 0, which is not trained on.
    """
    probabilities = np.ones(len(counts))
    trained_on = counts > 0
    if trained_on.any():
        mean = counts[trained_on].mean()
        probabilities[trained_on] = np.minimum(1.0, mean / counts[trained_on])
    return probabilities


def draw_kept(probabilities: np.ndarray, seed: int, epoch: int, index: int) -> np.ndarray:
    """Draw which occurrences of edges in one example keep their labels in one epoch.

    The labels of the others are dropped in `dataset.Documents.labels`. The draw is a pure function
    of (seed, epoch, example index, occurrence). It is fresh in each epoch, independent for each
    occurrence (also of the same edge), and the same for any number of workers and processes and
    after a resume.

    Args:
        probabilities: float64 [occurrences], of keeping the labels.
        seed: the run's seed.
        epoch: counted from 0; with data.edge_draw="once" always 0.
        index: the row's place in all data files together, counted from 0
            (`Documents.row_index`). A row that an epoch uses twice has the same draw both times.

    Returns:
        bool [occurrences], True where the labels are kept.
    """
    generator = np.random.default_rng([seed, epoch, index])
    return generator.random(len(probabilities)) < probabilities
