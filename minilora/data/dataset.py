"""Tokenized documents, packed batches of them, and the order in which training meets them.

`tokenize.py` makes the `Documents`, `cache.py` keeps them, and the training loop takes batches of
them. Everything that changes from epoch to epoch (the order, the draw of labels) is a pure
function of the seed, the epoch and the row, so it is the same for any number of worker processes
and ranks, and after a resume.

Shapes:
    T: tokens of a batch or of all files, the documents laid end to end
    t: tokens of one document
    D: documents
    E: occurrences of an edge (format=paths), of all documents
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minilora.data.example import Edge
from minilora.data.paths import draw_kept, keep_probabilities

IGNORE_INDEX = -100  # the label of a token without one, as in torch's cross-entropy
NO_EDGE = -1  # the edge_index of a token that is not part of node v of an edge u -> v
GROUPED_STEPS = 50  # group_by_length sorts the documents of this many optimizer steps at a time


@dataclass
class Batch:
    """Documents laid end to end.

    Attributes:
        tokens: ids, int64 [T].
        lengths: number of tokens of each document; their sum is T.
        labels: int64 [T], a supervised token's own id, IGNORE_INDEX for every other token.
    """

    tokens: Tensor
    lengths: list[int]
    labels: Tensor

    def __post_init__(self) -> None:
        """Check the shapes, and that no document begins with a supervised token."""
        assert self.tokens.shape == self.labels.shape == (sum(self.lengths),)
        starts = [0, *np.cumsum(self.lengths)[:-1]]
        first_labels = self.labels[starts]
        message = "a document's first token has nothing to be predicted from"
        assert bool((first_labels == IGNORE_INDEX).all()), message

    @property
    def num_supervised(self) -> int:
        """Number of tokens that have a label."""
        return int((self.labels != IGNORE_INDEX).sum())


@dataclass
class Counts:
    """What became of every line of some files.

    Attributes:
        name: the files' names, for display.
        read: lines read.
        kept: rows that became documents.
        files: lines read under each name of the setting, in their order. The name of a dataset on
            the hub, a directory or a glob may stand for several files.
        kept_of: rows kept under each of these names.
        dropped: reason -> one message `file:line: what is wrong` for each row dropped for it.
        truncated: rows with a shortened prompt.
        split: documents beyond the first of a row.
        straddling: tokens that cover the end of a prompt and the start of its response; they
            count as prompt.
    """

    name: str
    read: int = 0
    kept: int = 0
    files: dict[str, int] = field(default_factory=dict)
    kept_of: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    truncated: int = 0
    split: int = 0
    straddling: int = 0


class LabelDraw(NamedTuple):
    """Which of the random draws of dropped labels to use: `epoch` is 0 if all epochs share one."""

    seed: int
    epoch: int


@dataclass
class Documents:
    """Tokenized files as flat arrays; document i is tokens[offsets[i] : offsets[i + 1]].

    Attributes:
        tokens: ids, int32 [T].
        supervised: whether a token is part of a response, bool [T].
        edge_index: int32 [T], for a token in the node v of an edge u -> v the number of that
            occurrence of the edge in its document, counted from 0; NO_EDGE for every other token.
        offsets: int64 [D + 1].
        row_index: int64 [D], a document's row in the files, counted from 0 through all of them;
            it identifies the example in every random draw.
        edges: the distinct edges, in the order in which they first occur.
        edge_ids: int32 [E], for each occurrence of an edge its place in `edges`.
        keep_offsets: int64 [D + 1]; document i has the occurrences
            edge_ids[keep_offsets[i] : keep_offsets[i + 1]].
        counts: what became of every line of the files.
        edge_counts: int64 [len(edges)], n(u, v) of each distinct edge over the documents that an
            epoch goes through: all of them, until `count_edges` is called for others.
        keep_probability: float64 [E], probability with which an edge occurrence keeps its labels.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    edge_index: np.ndarray
    offsets: np.ndarray
    row_index: np.ndarray
    edges: list[Edge]
    edge_ids: np.ndarray
    keep_offsets: np.ndarray
    counts: Counts
    edge_counts: np.ndarray = field(init=False)
    keep_probability: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        """Count the edges of all documents."""
        self.count_edges(np.arange(len(self)))

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.row_index)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each document, int64 [D]."""
        return np.diff(self.offsets)

    def count_edges(self, indices: np.ndarray, edge_dropping: bool = True) -> None:
        """Count the edges that a run trains on, and set how likely each keeps its labels.

        Args:
            indices: the documents that an epoch goes through; one that is there several times
                counts as often.
            edge_dropping: False to keep every label, whatever the counts.
        """
        uses_of_document = np.bincount(indices, minlength=len(self))
        uses_of_occurrence = np.repeat(uses_of_document, np.diff(self.keep_offsets))
        # bincount sums in float64, which is exact for counts below 2**53
        counts = np.bincount(self.edge_ids, uses_of_occurrence, minlength=len(self.edges))
        self.edge_counts = counts.astype(np.int64)

        if edge_dropping:
            self.keep_probability = keep_probabilities(self.edge_counts)[self.edge_ids]
        else:
            self.keep_probability = np.ones(len(self.edge_ids))

    def ids(self, i: int) -> np.ndarray:
        """Return the token ids of document i, int32 [t]."""
        return self.tokens[self._tokens_of(i)]

    def labels(self, i: int, draw: LabelDraw | None = None) -> np.ndarray:
        """Return the labels of document i, int64 [t].

        Args:
            i: the document.
            draw: of an epoch, to get the labels that training uses in it, without those that are
                dropped; None for the labels that evaluation uses, which are all.
        """
        supervised = self.supervised[self._tokens_of(i)]
        if draw is not None:
            supervised = supervised & self._draw_labelled(i, draw)
        return np.where(supervised, self.ids(i), IGNORE_INDEX).astype(np.int64)

    def batch(self, indices: Sequence[int] | np.ndarray, draw: LabelDraw | None = None) -> Batch:
        """Return some documents as one packed batch.

        Args:
            indices: the documents. Empty: a placeholder batch without labels, for a process that
                has no documents left but must take part in the others' collective operations.
            draw: as for `labels`.
        """
        if len(indices) == 0:
            ids = [self.ids(0)]
            labels = [np.full(len(ids[0]), IGNORE_INDEX, dtype=np.int64)]
        else:
            ids = [self.ids(i) for i in indices]
            labels = [self.labels(i, draw) for i in indices]

        tokens = torch.from_numpy(np.concatenate(ids).astype(np.int64))
        lengths = [len(document) for document in ids]
        return Batch(tokens, lengths, torch.from_numpy(np.concatenate(labels)))

    def prompt_and_target(self, i: int) -> tuple[list[int], list[int]]:
        """Split document i for generation: what the model is given, and what it should answer.

        Returns:
            The ids before the last run of supervised tokens, and the ids of that run.
        """
        positions = np.flatnonzero(self.supervised[self._tokens_of(i)])
        # a new run begins after each gap in the positions; these are indices into `positions`
        later_runs = np.flatnonzero(np.diff(positions) > 1) + 1
        last_run = later_runs[-1] if len(later_runs) else 0

        begin, end = positions[last_run], positions[-1] + 1
        ids = self.ids(i).tolist()
        return ids[:begin], ids[begin:end]

    def first(self, size: int) -> np.ndarray:
        """Return the indices of the first `size` documents, or of all if there are fewer."""
        return np.arange(min(size, len(self)))

    def sample(self, size: int | None, seed: int) -> np.ndarray:
        """Draw documents without replacement.

        Args:
            size: how many; None, or more than there are, for all.
            seed: of the draw.

        Returns:
            Their indices in file order.
        """
        if size is None or size >= len(self):
            return np.arange(len(self))
        return np.sort(np.random.default_rng(seed).permutation(len(self))[:size])

    def _tokens_of(self, i: int) -> slice:
        """Return where document i lies in the arrays of length T."""
        return slice(self.offsets[i], self.offsets[i + 1])

    def _draw_labelled(self, i: int, draw: LabelDraw) -> np.ndarray:
        """Draw which tokens of document i keep their label in an epoch, bool [t].

        All tokens of an edge occurrence's node keep or lose it together; tokens outside of nodes
        always keep it.
        """
        probabilities = self.keep_probability[self.keep_offsets[i] : self.keep_offsets[i + 1]]
        edge_kept = draw_kept(probabilities, draw.seed, draw.epoch, int(self.row_index[i]))

        edge_index = self.edge_index[self._tokens_of(i)]
        in_node = edge_index != NO_EDGE
        labelled = np.ones(len(edge_index), dtype=bool)
        labelled[in_node] = edge_kept[edge_index[in_node]]
        return labelled


@dataclass
class EvalSet:
    """Documents that a run is evaluated on.

    Attributes:
        name: in the metrics' keys: in_domain or out_of_domain.
        documents: the tokenized files.
        indices: which of the documents to use, int64.
    """

    name: str
    documents: Documents
    indices: np.ndarray


def step_order(
    lengths: np.ndarray,
    docs_per_step: int,
    seed: int,
    epoch: int,
    shuffle: bool,
    group_by_length: bool,
) -> np.ndarray:
    """Return the order of one epoch's documents.

    Optimizer step s of the epoch takes order[s * docs_per_step : (s + 1) * docs_per_step]. The
    order depends on the documents per step, not on how processes and micro-batches divide them.

    Args:
        lengths: number of tokens of each document.
        docs_per_step: documents of an optimizer step, of all processes together.
        seed: of the run.
        epoch: counted from 0.
        shuffle: False for the order of the files.
        group_by_length: put shuffled documents of similar length into the same step; the steps
            themselves stay shuffled (transformers' group_by_length). Epoch 0 then begins with the
            largest step, so that a run that needs too much memory fails at once. Has no effect
            without shuffle.
    """
    if not shuffle:
        return np.arange(len(lengths))
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    if not group_by_length:
        return order

    docs_in_whole_steps = len(order) // docs_per_step * docs_per_step
    group_size = GROUPED_STEPS * docs_per_step
    steps: list[np.ndarray] = []
    for start in range(0, docs_in_whole_steps, group_size):
        group = order[start : min(start + group_size, docs_in_whole_steps)]
        longest_first = group[np.argsort(-lengths[group], kind="stable")]
        group_steps = longest_first.reshape(-1, docs_per_step)
        steps.extend(group_steps[rng.permutation(len(group_steps))])

    if epoch == 0 and steps:
        largest = int(np.argmax([lengths[step].sum() for step in steps]))
        steps[0], steps[largest] = steps[largest], steps[0]
    return np.concatenate(
        [*steps, order[docs_in_whole_steps:]]
    )  # the last, partial step stays last


def dataset_fingerprint(documents: Documents, indices: np.ndarray) -> str:
    """Return a hash of the training documents, by which a resumed run knows that they are the same.

    Args:
        documents: the tokenized training files.
        indices: which of them an epoch goes through.
    """
    sha = hashlib.sha256()
    for array in (
        documents.tokens,
        documents.supervised,
        documents.edge_index,
        documents.offsets,
        documents.keep_probability,
        indices,
    ):
        sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()[:16]
