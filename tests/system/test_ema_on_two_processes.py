"""The moving average, weighted files and epochs on two processes: as on one."""

from pathlib import Path

import pytest

import train
from helpers import ranks, tiny_runs
from helpers.averaged_runs import (
    KINDS,
    STEPS,
    assert_weights,
    averaged_config,
    final,
    run,
    saved_weights,
    weights_file,
)
from helpers.tiny_runs import losses, metrics
from minilora.config import Config
from minilora.data.cache import load_documents
from minilora.data.tokenizer import Tokenizer

pytestmark = pytest.mark.system

SHARDED = {"train__batch_size": 2, "parallel__strategy": "fsdp"}
TOLERANCE = {"lora": 2e-4, "full": 2e-3, "full bfloat16": 4e-2}
"""Of weights: Adam turns the rounding of small gradients into steps."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.base_model(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def weighted_config(home: Path, base: Path, name: str, **changes) -> Config:
    """Return a run over two files of ten rows, of which an epoch uses 15 and 5."""
    config = averaged_config(
        home,
        base,
        name,
        train__ema_decay=None,
        data__train_weights=(1.5, 0.5),
        train__epochs=2.0,
        train__save_steps="epoch",
        eval__eval_steps="epoch",
        eval__eval_on_start=True,
        **changes,
    )
    first = tiny_runs.write_paths(home / name / "first.jsonl", 10, seed=4)
    second = tiny_runs.write_paths(home / name / "second.jsonl", 10, seed=5)
    config.data.train_file = (str(first), str(second))
    return config


@pytest.fixture(scope="module")
def on_two(home: Path, base: Path) -> None:
    """Train everything that the tests look at on two processes, which are started once."""
    configs: dict[str, Config] = {}
    for kind, changes in KINDS.items():
        settings = {"eval__eval_steps": 7, **SHARDED, **changes}
        configs[f"whole {kind}"] = averaged_config(home, base, f"two {kind}", **settings)
        for until in (5, STEPS):
            configs[f"parts {kind} {until}"] = averaged_config(
                home, base, f"two parts {kind}", train__max_steps=until, **settings
            )
    configs["begun"] = averaged_config(home, base, "begun on two", train__max_steps=5, **SHARDED)
    ddp = {"parallel__strategy": "ddp", "train__batch_size": 1, "train__grad_acc_steps": 3}
    configs["weighted"] = weighted_config(home, base, "weighted two", **ddp)

    jobs = {name: (ranks.fit, (config,)) for name, config in configs.items()}
    results = ranks.launch(home / "jobs", 2, jobs)
    for name in jobs:
        ranks.outcome(results, name)


@pytest.mark.parametrize("kind", KINDS)
def test_average_on_two_processes_is_that_on_one(kind: str, on_two: None, home: Path, base: Path):
    one = run(home, base, f"one {kind}", eval__eval_steps=7, **KINDS[kind])
    two = averaged_config(home, base, f"two {kind}")
    tolerance = TOLERANCE[kind]
    assert_weights(final(two), saved_weights(final(one)), tolerance)
    for key in ("eval/in_domain/loss", "eval/out_of_domain/loss"):
        expected = [row[key] for row in metrics(one, key)]
        assert [row[key] for row in metrics(two, key)] == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_run_in_parts_on_two_processes_is_the_same_to_the_bit(
    kind: str, on_two: None, home: Path, base: Path
):
    whole = averaged_config(home, base, f"two {kind}")
    parts = averaged_config(home, base, f"two parts {kind}")
    assert losses(whole) == losses(parts)
    files = [weights_file(final(config)) for config in (whole, parts)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_run_begun_on_two_processes_continues_on_one(on_two: None, home: Path, base: Path):
    continued = run(home, base, "begun on two")
    whole = run(home, base, "begun on one")
    assert_weights(final(continued), saved_weights(final(whole)), 2e-4)


def test_weighted_files_by_epoch_on_one_process_and_on_two(on_two: None, home: Path, base: Path):
    """20 documents at 6 a step: four steps an epoch, the last with two documents."""
    one = weighted_config(home, base, "weighted one", train__batch_size=6)
    two = weighted_config(home, base, "weighted two")
    assert train.main(one) == 0
    for config in (one, two):
        assert [row["step"] for row in metrics(config, "loss")] == [*range(1, 9)]
        assert [row["step"] for row in metrics(config, "eval/in_domain/loss")] == [0, 4, 8]
        checkpoints = [
            (row["step"], row["epoch"], row["checkpoint"]) for row in metrics(config, "checkpoint")
        ]
        assert checkpoints == [(4, 1.0, "checkpoint-4"), (8, 2.0, "checkpoint-final")]

    for key in ("loss", "grad_norm", "eval/in_domain/loss", "eval/out_of_domain/loss"):
        expected = [row[key] for row in metrics(two, key)]
        assert [row[key] for row in metrics(one, key)] == pytest.approx(expected, rel=2e-4)
    tokens = [[row["tokens"] for row in metrics(config, "tokens")] for config in (one, two)]
    assert tokens[0] == tokens[1]
    documents = load_documents(one.data.train_file, one.data, Tokenizer(base, None), "train_file")
    assert len(documents) == 20
