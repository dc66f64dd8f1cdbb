"""Which documents an epoch goes through: weights of several files, train_size, and the preview."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import train
from helpers.data_rows import THREE_FILES, tokenizer, write_three_files
from helpers.tiny_runs import base_model, config
from minilora.config import DataConfig
from minilora.data.dataset import Documents, step_order
from minilora.data.sources import data_files
from minilora.data.tokenize import tokenize_files
from minilora.errors import UserError
from minilora.training.datasets import eval_prompts, load_data, make_tokenizer, training_indices


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return tuple(write_three_files(tmp_path_factory.mktemp("three")))


@pytest.fixture(scope="module")
def documents(files: tuple[str, ...]) -> Documents:
    found = {name: data_files(name, "train_file") for name in files}
    return tokenize_files(found, DataConfig(num_workers=1), tokenizer("llama2"), "train_file")


@pytest.mark.parametrize(
    "weights", [(1.0, 1.0, 1.0), (2.0, 0.5, 1.5), (0.25, 3.0, 1.0), (1, 2, 3), (0.999, 0.1, 2.75)]
)
def test_an_epoch_goes_through_each_file_as_often_as_its_weight_says(weights, files, documents):
    data = DataConfig(train_file=files, train_weights=weights)
    indices = training_indices(documents, data, seed=3)
    times = Counter(indices.tolist())
    starts = np.cumsum([0, *THREE_FILES.values()])
    for i, (size, weight) in enumerate(zip(THREE_FILES.values(), weights, strict=True)):
        of_file = [times[j] for j in range(starts[i], starts[i + 1])]
        assert {*of_file} <= {int(weight), int(weight) + 1}, "as often as any other, or once more"
        assert abs(sum(of_file) - weight * size) <= 0.5

    lengths = documents.lengths[indices]
    order = indices[step_order(lengths, 4, 3, 0, shuffle=True, group_by_length=True)]
    assert Counter(order.tolist()) == times, "an epoch's order holds them all"
    assert np.array_equal(indices, training_indices(documents, data, seed=3))
    if any(weight % 1 for weight in weights):
        drawn = [training_indices(documents, data, seed) for seed in range(6)]
        assert len({tuple(sorted(indices.tolist())) for indices in drawn}) > 1


def test_train_size_draws_from_the_weighted_rows(files, documents):
    weighted = DataConfig(train_file=files, train_weights=(2.0, 0.5, 1.0))
    whole = Counter(training_indices(documents, weighted, 0).tolist())
    data = DataConfig(train_file=files, train_weights=(2.0, 0.5, 1.0), train_size=11)
    drawn = [Counter(training_indices(documents, data, seed).tolist()) for seed in range(30)]
    assert all(counter.total() == 11 for counter in drawn) and drawn[0] <= whole
    of_first = sum(counter[i] for counter in drawn for i in range(9)) / (30 * 11)
    share = 18 / 29  # weighted rows that are of the first file
    assert share - 0.1 < of_first < share + 0.1


def test_edges_are_counted_over_the_rows_of_an_epoch(files, tmp_path):
    """After train_weights and train_size; evaluation files have no part in it."""
    base = base_model(tmp_path / "base")
    settings = {"data__train_file": files, "data__train_weights": (2.0, 0.5, 1.0)}
    run = config(tmp_path, base, **settings, data__train_size=11, data__eval_file=files[0])
    loaded = load_data(run, make_tokenizer(run, base), base)
    documents, indices = loaded.documents, loaded.train_indices
    assert len(indices) == 11 > len({*indices.tolist()}), "a row is there twice"

    counts: Counter[int] = Counter()
    for i in indices:
        begin, end = documents.keep_offsets[i : i + 2]
        counts.update(documents.edge_ids[begin:end].tolist())
    numbers = range(len(documents.edges))
    assert documents.edge_counts.tolist() == [counts[number] for number in numbers]
    assert min(counts[number] for number in numbers) == 0, "some edges are not trained on"
    mean = counts.total() / len(counts)
    expected = [min(1.0, mean / max(counts[number], 1)) for number in documents.edge_ids.tolist()]
    assert documents.keep_probability.tolist() == expected and min(expected) < 1

    run.data.edge_dropping = False
    kept = load_data(run, make_tokenizer(run, base), base).documents
    assert kept.edge_counts.tolist() == documents.edge_counts.tolist()
    assert (kept.keep_probability == 1).all()


@pytest.mark.parametrize("settings", [{}, {"train__max_steps": 2}])
def test_weights_that_leave_no_row_are_named(settings, tmp_path):
    base = base_model(tmp_path / "base")
    run = config(tmp_path, base, data__train_weights=(0.01,), **settings)
    with pytest.raises(UserError, match=r"data\.train_weights"):
        train.main(run)
    assert not Path(run.output_dir).exists()


def test_a_preview_goes_on_in_the_next_file(files, documents, tmp_path):
    run = config(tmp_path, base_model(tmp_path / "base"), data__train_file=files, preview=12)
    assert train.main(run) == 0
    lines = (tmp_path / "out" / "preview.jsonl").read_text(encoding="utf-8").splitlines()
    shown = [json.loads(line)["index"] for line in lines]
    assert shown == documents.row_index[:12].tolist()


@pytest.mark.parametrize("eval_steps", [0, None, 0.0])
def test_without_evaluations_no_evaluation_file_is_read(eval_steps, tmp_path, capsys):
    base = base_model(tmp_path / "base")
    run = config(tmp_path, base, data__eval_file="absent.jsonl", eval__eval_steps=eval_steps)
    of_base = make_tokenizer(run, base)
    loaded = load_data(run, of_base, base)
    assert loaded.eval_sets == [] and eval_prompts(run, loaded.eval_sets) == []
    assert len(loaded.train_indices) == 26
    off = f"eval.eval_steps={eval_steps}: no evaluations"
    not_read = "data.eval_file absent.jsonl is not read"
    no_checkpoint = "and no checkpoint before the end (train.save_steps)"
    assert f"{off}, {not_read}, {no_checkpoint}\n" in capsys.readouterr().err

    run.train.save_steps = 5
    load_data(run, of_base, base)
    assert f"{off}, {not_read}\n" in capsys.readouterr().err
    run.data.eval_file = None
    load_data(run, of_base, base)
    assert "no evaluations" not in capsys.readouterr().err
    run.train.save_steps = None
    load_data(run, of_base, base)
    assert f"{off}, {no_checkpoint}\n" in capsys.readouterr().err

    run.data.eval_file = "absent.jsonl"
    run.eval.eval_steps = 1
    with pytest.raises(UserError, match=r"data\.eval_file: 'absent\.jsonl' does not exist"):
        load_data(run, of_base, base)


def test_a_token_without_a_row_is_found_without_evaluations_too(tmp_path):
    base = base_model(tmp_path / "base")
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**values, "vocab_size": 40}))
    run = config(tmp_path, base, eval__eval_steps=0)
    with pytest.raises(UserError, match="has a vocab_size of 40"):
        load_data(run, make_tokenizer(run, base), base)
