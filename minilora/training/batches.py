"""Which documents each optimizer step trains on, divided into micro-batches and processes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from minilora import distributed
from minilora.config import Config
from minilora.data.dataset import LabelDraw, step_order
from minilora.training.datasets import TrainingData

Interval = int | float | Literal["epoch"] | None
"""How often something happens, see `TrainingBatches.is_due`."""


@dataclass
class MicroBatch:
    """The documents of one forward and backward pass, laid end to end, T tokens in all.

    Attributes:
        tokens: int64 [T], on the device that trains.
        lengths: the documents' lengths, which sum to T.
        labels: int64 [T], on the CPU; a token's own id, or -100 where there is nothing to learn.
        num_supervised: how many labels are not -100.
        num_tokens: T, or 0 for a placeholder (see `rank_share`).
        is_last: whether it is this process's last one of the optimizer step.
    """

    tokens: Tensor
    lengths: list[int]
    labels: Tensor
    num_supervised: int
    num_tokens: int
    is_last: bool


class TrainingBatches:
    """The documents of every optimizer step of a run.

    A step takes `docs_per_step` documents, those of all processes and micro-batches together; the
    last step of an epoch takes what is left. They depend on the data, the settings and the step
    alone, not on earlier steps, so a resumed run goes on as if it had not been stopped.
    """

    def __init__(self, data: TrainingData, config: Config):
        train = config.train
        self.data = data
        self.config = config

        self.docs_per_step = train.batch_size * train.grad_acc_steps * distributed.world_size()
        self.steps_per_epoch = math.ceil(len(data.train_indices) / self.docs_per_step)
        self.total_steps = train.max_steps or math.ceil(train.epochs * self.steps_per_epoch)

        # the order of documents in the epoch that was asked for last
        self._epoch: int | None = None
        self._epoch_indices = np.empty(0, dtype=np.int64)

    def of_step(self, step: int, shard_count: int, device: torch.device) -> Iterator[MicroBatch]:
        """Yield this process's micro-batches of an optimizer step, each made when its turn comes.

        Args:
            step: the optimizer step, counted from 0.
            shard_count: how many processes hold one copy of the model between them. If there are
                several, each gets the same number of micro-batches (see `rank_share`).
            device: where the model computes.
        """
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        start = step_of_epoch * self.docs_per_step
        docs = self._indices_of_epoch(epoch)[start : start + self.docs_per_step]

        micro_batches = rank_micro_batches(docs, self.config.train.batch_size, shard_count)
        draw_epoch = 0 if self.config.data.edge_draw == "once" else epoch
        draw = LabelDraw(self.config.seed, draw_epoch)
        for i, indices in enumerate(micro_batches):
            batch = self.data.documents.batch(indices, draw=draw)
            yield MicroBatch(
                tokens=distributed.to_device(batch.tokens, device),
                lengths=batch.lengths,
                labels=batch.labels,
                num_supervised=batch.num_supervised,
                num_tokens=len(batch.tokens) if len(indices) else 0,
                is_last=i + 1 == len(micro_batches),
            )

    def is_due(self, every: Interval, steps_done: int) -> bool:
        """Return whether something that happens at an interval happens after `steps_done` steps.

        Args:
            every: a number of steps; "epoch" for the end of each epoch; a number between 0 and 1
                for that part of an epoch, rounded up to whole steps each time, so that 0.25 is due
                four times in every epoch that has as many steps; 0 or None for never. After the
                last step of the run everything is due.
            steps_done: optimizer steps done, so 1 after the first.
        """
        if steps_done == self.total_steps:
            return True
        if not every:
            return False
        if every == "epoch":
            interval = Fraction(self.steps_per_epoch)
        elif every < 1:
            interval = Fraction(str(every)) * self.steps_per_epoch  # exact, unlike a float
        else:
            interval = Fraction(int(every))
        # whether the last step has reached or passed a multiple of the interval
        return steps_done // interval > (steps_done - 1) // interval

    def _indices_of_epoch(self, epoch: int) -> np.ndarray:
        """Return the order in which an epoch goes through the documents."""
        if epoch != self._epoch:
            indices = self.data.train_indices
            order = step_order(
                self.data.documents.lengths[indices],
                self.docs_per_step,
                self.config.seed,
                epoch,
                self.config.data.shuffle,
                self.config.train.group_by_length,
            )
            self._epoch, self._epoch_indices = epoch, indices[order]
        return self._epoch_indices


def rank_micro_batches(docs: np.ndarray, batch_size: int, shard_count: int) -> list[np.ndarray]:
    """Divide documents into micro-batches and return this process's share of them.

    Args:
        docs: indices of the documents of all processes.
        batch_size: documents of a micro-batch; the last one may have fewer.
        shard_count: how many processes hold one copy of the model between them.
    """
    starts = range(0, len(docs), batch_size)
    micro_batches = [docs[start : start + batch_size] for start in starts]
    return rank_share(micro_batches, shard_count)


def rank_share(micro_batches: list[np.ndarray], shard_count: int) -> list[np.ndarray]:
    """Return this process's share of the micro-batches of all processes.

    Process r of n takes micro-batch r and every n-th after it. Processes that hold shards of one
    model must run the same number of passes, so there a process whose documents are used up gets
    an empty micro-batch, for which `Documents.batch` makes a placeholder without labels.

    Args:
        micro_batches: indices of the documents of each.
        shard_count: how many processes hold one copy of the model between them.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    share = micro_batches[rank::world_size]
    if shard_count > 1 and len(share) < math.ceil(len(micro_batches) / world_size):
        no_documents = np.empty(0, dtype=np.int64)
        share.append(no_documents)
    return share


def step_seed(seed: int, step: int) -> int:
    """Return a seed for what torch draws in an optimizer step (dropout) on this process."""
    sequence = np.random.SeedSequence([seed, step, distributed.rank()])
    return int(sequence.generate_state(1)[0])
