"""Packed batches, samples, and the order in which training meets the documents."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.data_rows import GOOD_ROWS, load_rows, tokenizer
from minilora.data.dataset import IGNORE_INDEX, Batch, Documents, LabelDraw, step_order


@pytest.fixture
def documents(tmp_path: Path) -> Documents:
    """Twelve articles with one or two paths each, after a blank line."""
    rows: list[object] = [""]
    for i in range(12):
        paths = [["r", "x", f"n{i}"], ["r", "x"]]
        rows.append({**GOOD_ROWS["paths"], "paths": paths[: i % 2 + 1]})
    return load_rows(tmp_path, rows)


# ---- batches


@pytest.mark.parametrize("draw", [None, LabelDraw(0, 1)])
def test_a_batch_is_its_documents_end_to_end(draw, documents):
    indices = [7, 0, 11]
    batch = documents.batch(indices, draw)
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.tokens.tolist() == [token for i in indices for token in documents.ids(i)]
    labels = [label for i in indices for label in documents.labels(i, draw)]
    assert batch.labels.tolist() == labels
    assert batch.lengths == [len(documents.ids(i)) for i in indices]
    assert batch.lengths == documents.lengths[indices].tolist()
    assert batch.num_supervised == sum(label != IGNORE_INDEX for label in labels) > 0
    supervised = batch.labels != IGNORE_INDEX
    assert torch.equal(batch.labels[supervised], batch.tokens[supervised]), "a token's own id"


def test_a_batch_that_breaks_its_contract_is_refused():
    tokens = torch.arange(5)
    labels = torch.tensor([IGNORE_INDEX, 1, 2, IGNORE_INDEX, 4])
    assert Batch(tokens, [3, 2], labels).num_supervised == 3
    for lengths in ([3, 1], [3, 3], [2, 3], [5, 0, 1]):
        with pytest.raises(AssertionError):
            Batch(tokens, lengths, labels)
    with pytest.raises(AssertionError):
        Batch(tokens, [3, 2], labels[:4])


def test_a_batch_of_no_documents_is_a_placeholder_without_labels(documents):
    batch = documents.batch([])
    assert batch.tokens.tolist() == documents.ids(0).tolist()
    assert batch.lengths == [len(documents.ids(0))] and batch.num_supervised == 0


def test_prompt_and_target_divide_a_document(documents):
    of = tokenizer("mistral")
    prompt, target = documents.prompt_and_target(0)
    assert prompt == of.encode("<s>[INST] Title: T\nA [/INST]").ids
    assert [*prompt, *target] == documents.ids(0).tolist()
    assert of.decode(target, skip_special_tokens=False) == "r -> x -> n0\n</s>"


# ---- samples


def test_a_sample_is_a_function_of_its_seed(documents):
    np.random.seed(0)
    first = documents.sample(5, 3)
    np.random.seed(1)
    again = documents.sample(5, 3)
    assert again.tolist() == first.tolist() == sorted(set(first.tolist()))
    assert len({tuple(documents.sample(5, seed)) for seed in range(20)}) > 15

    drawn = np.concatenate([documents.sample(5, seed) for seed in range(200)])
    assert set(drawn.tolist()) == set(range(12))
    assert np.bincount(drawn).min() > 40, "every document has its chance"
    for size in (None, 12, 100):
        assert documents.sample(size, 3).tolist() == list(range(12))


def test_the_first_documents_are_not_a_sample(documents):
    assert documents.first(5).tolist() == [0, 1, 2, 3, 4]
    assert documents.first(1000).tolist() == list(range(len(documents)))
    first, second = (documents.sample(5, seed).tolist() for seed in (0, 1))
    assert first != [0, 1, 2, 3, 4] != second


# ---- order


def random_lengths(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(10, 2000, n)


def whole_steps(order: np.ndarray, docs_per_step: int) -> list[np.ndarray]:
    """The documents of each step but a partial last one."""
    count = len(order) // docs_per_step
    return [order[i * docs_per_step : (i + 1) * docs_per_step] for i in range(count)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize(
    "n, docs_per_step", [(1, 8), (7, 8), (8, 8), (1003, 8), (1000, 1), (5000, 64)]
)
def test_every_document_is_met_once_per_epoch(n, docs_per_step, group, shuffle):
    for epoch in range(3):
        order = step_order(random_lengths(n), docs_per_step, 0, epoch, shuffle, group)
        assert sorted(order.tolist()) == list(range(n))
        assert shuffle or order.tolist() == list(range(n))


@pytest.mark.parametrize("group", [True, False])
def test_the_order_is_a_function_of_seed_and_epoch(group):
    orders = {}
    for seed in range(3):
        for epoch in range(3):
            np.random.seed(seed + epoch)
            torch.manual_seed(seed + epoch)
            order = step_order(random_lengths(400), 8, seed, epoch, True, group)
            orders[seed, epoch] = tuple(order)
    assert len(set(orders.values())) == 9
    for (seed, epoch), order in orders.items():
        assert tuple(step_order(random_lengths(400), 8, seed, epoch, True, group)) == order

    # ranks and micro-batches divide a step among them and have no say in what is in it
    parameters = inspect.signature(step_order).parameters
    assert set(parameters) == {
        "lengths",
        "docs_per_step",
        "seed",
        "epoch",
        "shuffle",
        "group_by_length",
    }


@pytest.mark.parametrize("epoch", [0, 1])
def test_grouping_by_length_puts_similar_lengths_into_a_step(epoch):
    lengths = random_lengths(1003)
    spread = {}
    for group in (True, False):
        steps = whole_steps(step_order(lengths, 8, 0, epoch, True, group), 8)
        spread[group] = np.mean([np.ptp(lengths[step]) for step in steps])
    assert spread[True] < spread[False] / 5

    steps = whole_steps(step_order(lengths, 8, 0, epoch, True, True), 8)
    sums = [int(lengths[step].sum()) for step in steps]
    correlation = np.corrcoef(sums, range(len(sums)))[0, 1]
    assert abs(correlation) < 0.3, "the steps themselves are not in order of length"


def test_the_largest_step_comes_first_in_epoch_0_alone():
    """Running out of memory happens at once or never."""
    for seed in range(5):
        lengths = random_lengths(1003, seed)
        steps = whole_steps(step_order(lengths, 8, seed, 0, True, True), 8)
        sums = [int(lengths[step].sum()) for step in steps]
        assert sums[0] == max(sums)

    first_sums = set()
    for epoch in range(1, 20):
        first_step = whole_steps(step_order(lengths, 8, 0, epoch, True, True), 8)[0]
        first_sums.add(lengths[first_step].sum())
    assert len(first_sums) > 10


@pytest.mark.parametrize("epoch", [0, 1])
def test_the_partial_step_stays_last(epoch):
    plain = step_order(random_lengths(1003), 8, 0, epoch, True, False)
    grouped = step_order(random_lengths(1003), 8, 0, epoch, True, True)
    assert grouped[-3:].tolist() == plain[-3:].tolist()
