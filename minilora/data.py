"""Tokenised documents -> packed batches, and the order in which training meets them (running/reading.py makes them).

All that depends on the epoch (order, label draws) is a pure function of (seed, epoch, index), so it is the same for any
number of workers and ranks and after a resume.

Shapes: T tokens of a batch or file, all documents laid end to end.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from minilora.labels import IGNORE, draw_kept


@dataclass
class Batch:
    """Documents laid end to end: tokens int64 [T], their lengths, labels int64 [T] (a token's own id, or -100)."""

    tokens: Tensor
    lengths: list[int]
    labels: Tensor

    def __post_init__(self) -> None:
        starts = [0, *np.cumsum(self.lengths)[:-1]]
        assert self.tokens.shape == self.labels.shape == (sum(self.lengths),)
        assert bool((self.labels[starts] == IGNORE).all()), "a document's first token has nothing to be predicted from"

    @property
    def supervised(self) -> int:
        return int((self.labels != IGNORE).sum())


@dataclass
class Counts:
    """What became of every line of some files."""

    name: str
    read: int = 0
    kept: int = 0
    files: dict[str, int] = field(default_factory=dict)  # lines read of each, in order
    dropped: dict[str, list[str]] = field(default_factory=dict)  # reason -> file:line: message, one per row
    truncated: int = 0
    split: int = 0  # documents beyond the first of a row
    straddling: int = 0  # tokens across the border of prompt and response, counted as prompt


@dataclass
class Documents:
    """A tokenised file as flat arrays; document i is tokens[offsets[i]:offsets[i + 1]]."""

    tokens: np.ndarray  # int32 [T]
    supervised: np.ndarray  # bool [T]
    node: np.ndarray  # int32 [T]: occurrence of an edge within the document whose node this token is part of, or -1
    offsets: np.ndarray  # int64 [documents + 1]
    index: np.ndarray  # int64 [documents]: line in the files, from 0; the example's identity in every draw
    keep: np.ndarray  # float64 [occurrences]: probability that an occurrence keeps its labels
    keep_offsets: np.ndarray  # int64 [documents + 1]
    counts: Counts

    def __len__(self) -> int:
        return len(self.index)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def ids(self, i: int) -> np.ndarray:
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    def labels(self, i: int, draw: tuple[int, int] | None = None) -> np.ndarray:
        """Labels int64 [t] of document i: its evaluation labels, or with draw = (seed, epoch) its training labels."""
        here = slice(self.offsets[i], self.offsets[i + 1])
        wanted, node = self.supervised[here], self.node[here]
        if draw is not None:
            keep = self.keep[self.keep_offsets[i] : self.keep_offsets[i + 1]]
            kept = draw_kept(keep, *draw, int(self.index[i]))
            wanted = wanted & np.append(kept, True)[node]  # node -1, no node, reads the True at the end
        return np.where(wanted, self.tokens[here], IGNORE).astype(np.int64)

    def batch(self, which: Sequence[int] | np.ndarray, draw: tuple[int, int] | None = None) -> Batch:
        """The documents of `which` as one packed batch; draw as for `labels`. Of none: a stand-in without labels, for a
        process that must keep step with the others."""
        ids = [self.ids(i) for i in which] or [self.ids(0)]
        labels = np.concatenate([self.labels(i, draw) for i in which] or [np.full(len(ids[0]), IGNORE, dtype=np.int64)])
        tokens = np.concatenate(ids).astype(np.int64)
        return Batch(torch.from_numpy(tokens), [len(x) for x in ids], torch.from_numpy(labels))

    def prompt_and_target(self, i: int) -> tuple[list[int], list[int]]:
        """Ids up to the last supervised stretch of document i, and that stretch: what to ask, and what to expect."""
        wanted = np.append(self.supervised[self.offsets[i] : self.offsets[i + 1]], False)
        edges = np.flatnonzero(wanted[1:] != wanted[:-1]) + 1
        begin, end = (edges[-2], edges[-1]) if len(edges) > 1 else (0, edges[-1])
        ids = self.ids(i).tolist()
        return ids[:begin], ids[begin:end]

    def sample(self, size: int | None, seed: int | None) -> np.ndarray:
        """`size` documents drawn without replacement, in file order (all, if size is None or too large; the first, without
        a seed)."""
        if size is None or size >= len(self) or seed is None:
            return np.arange(len(self))[:size]
        return np.sort(np.random.default_rng(seed).permutation(len(self))[:size])


def step_order(lengths: np.ndarray, docs_per_step: int, seed: int, epoch: int, shuffle: bool, group: bool) -> np.ndarray:
    """Order of one epoch's documents; optimizer step s takes [s * docs_per_step : (s + 1) * docs_per_step].

    group: among 50 steps' worth of shuffled documents, those of similar length share a step (transformers'
    group_by_length), the steps themselves stay shuffled, and epoch 0 begins with the largest, so that running out of
    memory happens at once or never. It depends on documents per step only, not on how ranks and micro-steps divide them.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths)) if shuffle else np.arange(len(lengths))
    if not (group and shuffle):
        return order
    full = len(order) // docs_per_step * docs_per_step  # the last, partial step keeps its place
    steps: list[np.ndarray] = []
    for start in range(0, full, 50 * docs_per_step):
        mega = order[start : min(start + 50 * docs_per_step, full)]
        mega = mega[np.argsort(-lengths[mega], kind="stable")].reshape(-1, docs_per_step)
        steps += list(mega[rng.permutation(len(mega))])
    if epoch == 0 and steps:
        largest = int(np.argmax([lengths[s].sum() for s in steps]))
        steps[0], steps[largest] = steps[largest], steps[0]
    return np.concatenate([*steps, order[full:]])
