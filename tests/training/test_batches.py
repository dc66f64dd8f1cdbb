"""Which documents a step trains on, and how processes share them."""

import numpy as np
import pytest
import torch

from minilora.config import Config
from minilora.data.dataset import Counts, Documents, LabelDraw
from minilora.training.batches import TrainingBatches, rank_micro_batches, step_seed
from minilora.training.datasets import TrainingData

CPU = torch.device("cpu")
NUM_DOCUMENTS = 10


def make_data(indices: np.ndarray | None = None) -> TrainingData:
    """Return documents of 2, 3, 4, ... tokens; document i repeats the id i."""
    lengths = np.arange(2, NUM_DOCUMENTS + 2)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.repeat(np.arange(NUM_DOCUMENTS), lengths).astype(np.int32)
    supervised = np.ones(len(tokens), dtype=bool)
    supervised[offsets[:-1]] = False
    documents = Documents(
        tokens=tokens,
        supervised=supervised,
        edge_index=np.full(len(tokens), -1, dtype=np.int32),
        offsets=offsets,
        row_index=np.arange(NUM_DOCUMENTS),
        edges=[],
        edge_ids=np.empty(0, dtype=np.int32),
        keep_offsets=np.zeros(NUM_DOCUMENTS + 1, dtype=np.int64),
        counts=Counts("made"),
    )
    if indices is None:
        indices = np.arange(NUM_DOCUMENTS)
    return TrainingData(documents, indices, [])


def make_config(**train) -> Config:
    config = Config()
    for name, value in {"batch_size": 2, "epochs": 2.0, **train}.items():
        setattr(config.train, name, value)
    return config


def set_ranks(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))


# ---- the plan of a run


@pytest.mark.parametrize(
    ("settings", "steps_per_epoch", "total_steps"),
    [
        ({"batch_size": 2}, 5, 10),
        ({"batch_size": 3}, 4, 8),  # the last step of an epoch has one document
        ({"batch_size": 2, "grad_acc_steps": 2}, 3, 6),
        ({"batch_size": 100}, 1, 2),
        ({"batch_size": 3, "epochs": 1.1}, 4, 5),
        ({"batch_size": 2, "max_steps": 7}, 5, 7),
    ],
)
def test_number_of_steps(settings: dict, steps_per_epoch: int, total_steps: int):
    batches = TrainingBatches(make_data(), make_config(**settings))
    assert (batches.steps_per_epoch, batches.total_steps) == (steps_per_epoch, total_steps)


def test_docs_per_step_count_all_processes(monkeypatch: pytest.MonkeyPatch):
    set_ranks(monkeypatch, 0, 3)
    batches = TrainingBatches(make_data(), make_config(grad_acc_steps=2))
    assert batches.docs_per_step == 12


def documents_of_step(batches: TrainingBatches, step: int, shard_count: int = 1) -> list[list[int]]:
    """Return for each micro-batch of a step the documents in it."""
    found = []
    for micro_batch in batches.of_step(step, shard_count, CPU):
        starts = np.cumsum([0, *micro_batch.lengths[:-1]])
        found.append(micro_batch.tokens[starts].tolist())
    return found


def test_epoch_visits_every_document_once_in_an_order_of_its_own():
    batches = TrainingBatches(make_data(), make_config(batch_size=3))
    epochs = []
    for first in (0, 4):
        steps = [documents_of_step(batches, step) for step in range(first, first + 4)]
        epochs.append([doc for step in steps for micro_batch in step for doc in micro_batch])
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(NUM_DOCUMENTS))
    assert epochs[0] != epochs[1]


def test_step_does_not_depend_on_the_steps_before():
    batches = TrainingBatches(make_data(), make_config())
    in_order = [documents_of_step(batches, step) for step in range(10)]
    for step in (7, 2, 9, 0):
        assert documents_of_step(batches, step) == in_order[step]
        fresh = TrainingBatches(make_data(), make_config())
        assert documents_of_step(fresh, step) == in_order[step]


def test_documents_that_are_not_trained_on_never_appear():
    indices = np.array([1, 3, 3, 8])
    batches = TrainingBatches(make_data(indices), make_config(batch_size=1))
    steps = [documents_of_step(batches, step) for step in range(4)]
    assert sorted(doc for (docs,) in steps for doc in docs) == indices.tolist()


@pytest.mark.parametrize("edge_draw", ["epoch", "once"])
def test_labels_are_drawn_anew_in_each_epoch_or_once(edge_draw: str):
    """Document 3 is used twice in each epoch: both times with the same draw."""
    data = make_data(np.array([1, 3, 3, 8]))
    for i in range(NUM_DOCUMENTS):  # token j of a document is the node of its edge occurrence j - 1
        data.documents.edge_index[data.documents.offsets[i] + 1 : data.documents.offsets[i + 1]] = (
            np.arange(i + 1)
        )
    data.documents.keep_offsets = np.cumsum([0, *range(1, NUM_DOCUMENTS + 1)])
    data.documents.keep_probability = np.full(data.documents.keep_offsets[-1], 0.5)
    config = make_config(batch_size=1, epochs=6.0)
    config.data.edge_draw = edge_draw

    batches = TrainingBatches(data, config)
    labels_of: dict[int, list[list[int]]] = {1: [], 3: [], 8: []}
    for step in range(batches.total_steps):
        (micro_batch,) = batches.of_step(step, 1, CPU)
        labels_of[int(micro_batch.tokens[0])].append(micro_batch.labels.tolist())
        twin = data.documents.labels(int(micro_batch.tokens[0]), LabelDraw(config.seed, step // 4))
        if edge_draw == "epoch" or step < 4:
            assert micro_batch.labels.tolist() == twin.tolist()

    assert labels_of[3][0::2] == labels_of[3][1::2], "the two uses of an epoch"
    num_different = [len({tuple(labels) for labels in labels_of[i]}) for i in (3, 8)]
    if edge_draw == "once":
        assert num_different == [1, 1]
    else:
        assert min(num_different) > 3
    assert any(-100 in labels[1:] for labels in labels_of[8])


def test_micro_batches_count_their_tokens():
    batches = TrainingBatches(make_data(), make_config(grad_acc_steps=2))
    micro_batches = list(batches.of_step(0, 1, CPU))
    assert [micro_batch.is_last for micro_batch in micro_batches] == [False, True]
    for micro_batch in micro_batches:
        assert micro_batch.num_tokens == len(micro_batch.tokens) == sum(micro_batch.lengths)
        assert micro_batch.num_supervised == int((micro_batch.labels != -100).sum())
        assert micro_batch.num_supervised == micro_batch.num_tokens - 2  # two documents


def test_placeholder_has_no_tokens_that_count(monkeypatch: pytest.MonkeyPatch):
    set_ranks(monkeypatch, 1, 2)
    batches = TrainingBatches(make_data(), make_config(batch_size=8))
    (micro_batch,) = batches.of_step(0, 2, CPU)  # documents 8 and 9 are the second process's
    assert micro_batch.num_tokens > 0
    batches = TrainingBatches(make_data(), make_config(batch_size=10))
    (micro_batch,) = batches.of_step(0, 2, CPU)
    assert (micro_batch.num_supervised, micro_batch.num_tokens) == (0, 0)
    assert micro_batch.is_last and len(micro_batch.tokens) > 0


def test_is_due_every_n_steps_at_epochs_and_at_the_end():
    batches = TrainingBatches(make_data(), make_config(batch_size=3, max_steps=11))
    steps = range(1, 12)
    assert [step for step in steps if batches.is_due(3, step)] == [3, 6, 9, 11]
    assert [step for step in steps if batches.is_due("epoch", step)] == [4, 8, 11]
    assert [step for step in steps if batches.is_due(100, step)] == [11]
    assert [step for step in steps if batches.is_due(0, step)] == [11]
    assert [step for step in steps if batches.is_due(None, step)] == [11]


@pytest.mark.parametrize(
    ("batch_size", "fraction", "due"),
    [
        # multiples of 2.5 steps, each rounded up
        (1, 0.25, [3, 5, 8, 10, 13, 15, 18, 20]),
        # multiples of one step: in floats, 0.1 * 3 * 10 is more than 3
        (1, 0.1, list(range(1, 21))),
        (1, 0.7, [7, 14, 20]),
        # shorter than a step: due once a step
        (5, 0.25, [1, 2, 3, 4]),
        (3, 0.5, [2, 4, 6, 8]),
    ],
)
def test_a_part_of_an_epoch_is_due_as_often_in_every_epoch(
    batch_size: int, fraction: float, due: list[int]
):
    batches = TrainingBatches(make_data(), make_config(batch_size=batch_size))
    steps = range(1, batches.total_steps + 1)
    assert [step for step in steps if batches.is_due(fraction, step)] == due


@pytest.mark.parametrize("batch_size", range(1, 4))
def test_a_quarter_is_due_four_times_in_every_epoch(batch_size: int):
    batches = TrainingBatches(make_data(), make_config(batch_size=batch_size, epochs=50.0))
    for epoch in range(50):
        first = epoch * batches.steps_per_epoch + 1
        steps = range(first, first + batches.steps_per_epoch)
        assert sum(batches.is_due(0.25, step) for step in steps) == 4


def test_tokens_go_to_a_gpu_from_pinned_memory_without_waiting(monkeypatch: pytest.MonkeyPatch):
    """Recorded, as there may be no GPU: labels stay on the CPU."""
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: calls.append("pin") or t)
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *to, **how: calls.append((*to, how)) or t)
    batches = TrainingBatches(make_data(), make_config())
    device = torch.device("cuda", 0)
    (micro_batch,) = batches.of_step(0, 1, device)
    assert calls == ["pin", (device, {"non_blocking": True})]
    assert micro_batch.labels.device == CPU


# ---- processes


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_all_documents(world_size: int, monkeypatch: pytest.MonkeyPatch):
    docs = np.arange(11)
    shares = []
    for rank in range(world_size):
        set_ranks(monkeypatch, rank, world_size)
        shares.append(rank_micro_batches(docs, 2, shard_count=1))
    whole = [micro_batch.tolist() for share in shares for micro_batch in share]
    assert sorted(whole) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10]]
    assert shares[0][0].tolist() == [0, 1] and len(shares[0]) == -(-6 // world_size)


def test_processes_with_shards_have_equally_many_micro_batches(monkeypatch: pytest.MonkeyPatch):
    docs = np.arange(7)
    shares = []
    for rank in range(4):
        set_ranks(monkeypatch, rank, 4)
        share = rank_micro_batches(docs, 1, shard_count=4)
        shares.append([micro_batch.tolist() for micro_batch in share])
    assert shares == [[[0], [4]], [[1], [5]], [[2], [6]], [[3], []]]


def test_step_seed_differs_by_seed_step_and_process(monkeypatch: pytest.MonkeyPatch):
    seeds = [step_seed(seed, step) for seed in (0, 1) for step in (0, 1)]
    set_ranks(monkeypatch, 1, 2)
    seeds.append(step_seed(0, 0))
    assert len(set(seeds)) == 5
    assert step_seed(0, 0) == seeds[-1]
