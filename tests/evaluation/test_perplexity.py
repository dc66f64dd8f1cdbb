"""The loss of documents does not depend on how they are divided into batches."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers.tiny_models import VOCAB
from minilora.data.dataset import Counts, Documents
from minilora.evaluation.perplexity import batches_by_length, loss_and_ppl, loss_sums
from minilora.model.transformer import CausalLM

CPU = torch.device("cpu")


def make_documents(lengths: list[int]) -> Documents:
    """Return documents of random tokens, all but the first two of each supervised."""
    offsets = np.cumsum([0, *lengths])
    rng = np.random.default_rng(0)
    supervised = np.ones(offsets[-1], dtype=bool)
    for start in offsets[:-1]:
        supervised[start : start + 2] = False
    return Documents(
        tokens=rng.integers(VOCAB, size=offsets[-1]).astype(np.int32),
        supervised=supervised,
        edge_index=np.full(offsets[-1], -1, dtype=np.int32),
        offsets=offsets,
        row_index=np.arange(len(lengths)),
        edges=[],
        edge_ids=np.empty(0, dtype=np.int32),
        keep_offsets=np.zeros(len(lengths) + 1, dtype=np.int64),
        counts=Counts("made"),
    )


def test_loss_sums_are_those_of_each_document(llama: CausalLM):
    documents = make_documents([5, 9, 4])
    loss, count = 0.0, 0
    for i in range(3):
        labels = torch.from_numpy(documents.labels(i))[1:]
        with torch.no_grad():
            logits = llama(torch.from_numpy(documents.ids(i)).long())[:-1]
        loss += float(F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())

    for batches in ([[0], [1], [2]], [[2, 0], [1]], [[0, 1, 2]]):
        sums = loss_sums(llama, documents, [np.array(batch) for batch in batches], CPU)
        assert sums.dtype == torch.float64
        assert sums.tolist() == pytest.approx([loss, count], rel=1e-5)


@pytest.mark.parametrize(
    ("max_docs", "max_tokens", "batches"),
    [
        (2, 100, [[3, 0], [2, 4], [1]]),
        (100, 100, [[3, 0, 2, 4, 1]]),
        (100, 14, [[3, 0], [2, 4], [1]]),
        (100, 13, [[3, 0], [2], [4], [1]]),
        (3, 18, [[3, 0, 2], [4], [1]]),
        (100, 1, [[3], [0], [2], [4], [1]]),  # each is too long, and a batch of its own
    ],
)
def test_batches_by_length_have_a_limit_of_documents_and_tokens(
    max_docs: int, max_tokens: int, batches: list[list[int]]
):
    documents = make_documents([5, 30, 7, 4, 7, 9])
    found = batches_by_length(documents, np.arange(5), max_docs, max_tokens)
    assert [batch.tolist() for batch in found] == batches
    assert batches_by_length(documents, np.arange(0), max_docs, max_tokens) == []


def test_loss_does_not_depend_on_the_limit_of_tokens(llama: CausalLM):
    documents = make_documents([5, 30, 7, 4, 7, 9])
    figures = []
    for max_tokens in (100, 16):
        batches = batches_by_length(documents, np.arange(6), 32, max_tokens)
        figures.append(loss_sums(llama, documents, batches, CPU).tolist())
    assert len(batches) == 3
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)


def test_loss_and_ppl():
    figures = loss_and_ppl(torch.tensor([6.0, 3.0]))
    assert figures == {"loss": 2.0, "ppl": pytest.approx(math.e**2)}


def test_ppl_of_a_huge_loss_is_finite():
    assert math.isfinite(loss_and_ppl(torch.tensor([1e6, 1.0]))["ppl"])
