"""The two label sets: everything of the response for evaluation, and a subset for training.

OLLM (arXiv 2410.23584, section 3.2) trains on category paths, in which edges near the root occur far more often than
those near the leaves. So that each edge weighs about the same, the labels of node v in an occurrence of the edge u -> v
are kept with probability min(1, M / n(u, v)), where n counts the edge over the training file and M is the mean of n over
distinct edges. All tokens of the node are kept or dropped together, anew in each epoch.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

IGNORE = -100  # the label of a token without one, as in torch's and transformers' cross-entropy

Edge = tuple[str, str]
Span = tuple[int, int]


def path_edges(paths: Iterable[Sequence[str]]) -> list[Edge]:
    """Every occurrence of an edge, in the order of the text: path by path, root to leaf."""
    return [edge for path in paths for edge in pairwise(path)]


def keep_probabilities(counts: Counter[Edge]) -> dict[Edge, float]:
    """min(1, M / n) of each edge; counts: n(u, v) over all paths of the training file."""
    mean = sum(counts.values()) / len(counts) if counts else 1.0
    return {edge: min(1.0, mean / n) for edge, n in counts.items()}


def draw_kept(probabilities: np.ndarray, seed: int, epoch: int, index: int) -> np.ndarray:
    """Which occurrences of one example keep their labels: bool, one per probability.

    A pure function of (seed, epoch, example index, occurrence): workers, ranks and resuming change nothing.
    """
    return np.random.default_rng([seed, epoch, index]).random(len(probabilities)) < probabilities


def mark_tokens(text: str, spans: Sequence[Span], supervised: Sequence[Span], nodes: Sequence[Span]):
    """Per token: is it supervised (bool [T]), and which occurrence's node is it part of (int32 [T], -1 for none).

    spans: characters of each token; supervised, nodes: characters of the response and of each occurrence's node.
    A token is supervised if it begins inside a supervised span: one that straddles the border with the prompt belongs
    to the prompt, and their number is returned third. A node's tokens are those that touch its text or the one space
    before it (a lone space token and the byte pieces of a character included).
    """
    starts = np.array([s for s, _ in spans], dtype=np.int64)
    ends = np.array([e for _, e in spans], dtype=np.int64)
    is_supervised = np.zeros(len(spans), dtype=bool)
    straddling = 0
    for begin, end in supervised:
        is_supervised |= (starts >= begin) & (starts < end)
        straddling += int(((starts < begin) & (ends > begin)).sum())
    node = np.full(len(spans), -1, dtype=np.int32)
    for occurrence, (begin, end) in enumerate(nodes):
        begin -= text[begin - 1 : begin] == " "
        node[(starts < end) & (ends > begin)] = occurrence
    node[~is_supervised] = -1
    return is_supervised, node, straddling
