"""What a run computes: the documents of an epoch, and its largest micro-batch."""

import glob
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minilora import distributed
from minilora.config import Config
from minilora.data.cache import load_documents
from minilora.data.dataset import step_order
from minilora.data.dataset_files import parse_directory_name
from minilora.data.tokenizer import Tokenizer
from minilora.training.datasets import training_indices


@dataclass(frozen=True)
class Workload:
    """The lengths of documents, read from the data or assumed."""

    lengths: np.ndarray
    """Tokens of each document of an epoch, int64; without data those of one step."""
    supervised: np.ndarray
    """Of each, the tokens that have a label."""
    batch_tokens: int
    """Of the largest micro-batch."""
    batch_supervised: int
    """Labels in a micro-batch, at most."""
    is_assumed: bool
    """Whether there was no data to read."""

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int(self.lengths.max())


def missing_files(config: Config) -> list[str]:
    """Return the training files that are not on this machine; datasets of the hub are among them.

    A plan downloads no data.
    """
    missing = []
    for name in config.data.train_files:
        directory = parse_directory_name(name)
        is_here = bool(name) and (Path(name).expanduser().exists() or directory is not None)
        if name and not is_here:
            is_here = bool(glob.glob(str(Path(name).expanduser()), recursive=True))
        if not is_here:
            missing.append(name)
    return missing


def assumed_workload(config: Config) -> Workload:
    """Return a step of documents that are all as long as data.max_seq_length, all supervised."""
    train, length = config.train, config.data.max_seq_length
    docs_per_step = train.batch_size * train.grad_acc_steps * distributed.world_size()
    lengths = np.full(docs_per_step, length)
    tokens = train.batch_size * length
    return Workload(lengths, lengths, tokens, tokens, is_assumed=True)


def read_workload(config: Config, tokenizer: Tokenizer) -> Workload:
    """Tokenize the training files, or take them from the cache, and find the largest micro-batch.

    Raises:
        UserError: a file cannot be read.
    """
    documents = load_documents(config.data.train_file, config.data, tokenizer, "train_file")
    indices = training_indices(documents, config.data, config.seed)
    lengths = documents.lengths[indices]
    labels_before = np.concatenate([[0], np.cumsum(documents.supervised, dtype=np.int64)])
    labels = labels_before[documents.offsets[1:]] - labels_before[documents.offsets[:-1]]
    supervised = labels[indices]

    train = config.train
    docs_per_step = train.batch_size * train.grad_acc_steps * distributed.world_size()
    order = step_order(
        lengths,
        docs_per_step,
        config.seed,
        0,  # the epoch; the largest micro-batches of the others are about as large
        config.data.shuffle,
        train.group_by_length,
    )
    tokens_of_batch = [
        (int(lengths[batch].sum()), int(supervised[batch].sum()))
        for start in range(0, len(order), docs_per_step)
        for batch in _split(order[start : start + docs_per_step], train.batch_size)
    ]
    return Workload(
        lengths,
        supervised,
        batch_tokens=max(tokens for tokens, _ in tokens_of_batch),
        batch_supervised=max(labels for _, labels in tokens_of_batch),
        is_assumed=False,
    )


def _split(docs: np.ndarray, size: int) -> list[np.ndarray]:
    """Cut a step's documents into micro-batches."""
    return [docs[start : start + size] for start in range(0, len(docs), size)]
