"""Trackers get the numbers of metrics.jsonl; what a resumed run writes again is not there twice."""

import json
from pathlib import Path

import pytest

import train
from minilora.config import UserError
from minilora.running.cache import load_documents
from minilora.tokenizer import Tokenizer
from minilora.tracking import Tracker, append
from tiny_runs import base_model, config, metrics


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return base_model(tmp_path_factory.mktemp("base") / "model")


def test_tensorboard_holds_the_metrics(tmp_path, base):
    from tensorboard.backend.event_processing import event_accumulator

    c = config(tmp_path, base, train__max_steps=5, eval__eval_steps=2, log__tensorboard=True)
    assert train.main(c) == 0
    events = event_accumulator.EventAccumulator(str(Path(c.output_dir) / "runs"))
    events.Reload()
    for key in ("loss", "grad_norm", "lr", "eval/in_domain/loss", "eval/out_of_domain/ppl"):
        written = [(e.step, pytest.approx(e.value, rel=1e-6)) for e in events.Scalars(key)]
        assert [(row["step"], row[key]) for row in metrics(c, key)] == written


def test_wandb_offline(tmp_path, base, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    c = config(tmp_path, base, train__max_steps=2, log__wandb=True)
    assert train.main(c) == 0
    wandb.finish()
    assert list((Path(c.output_dir) / "wandb").glob("offline-run-*/*.wandb"))


def test_wandb_that_is_not_installed_is_named(tmp_path, base, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else real(name, *rest))
    with pytest.raises(UserError, match=r"wandb is not installed.*minilora\[track\]"):
        train.main(config(tmp_path, base, log__wandb=True))


def test_lines_after_the_checkpoint_are_written_anew(tmp_path, base):
    append(tmp_path / "metrics.jsonl", [{"step": step, "loss": 1.0} for step in (1, 2, 3, 4)])
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "lo')  # torn by a kill
    c, tokenizer = config(tmp_path, base, output_dir=str(tmp_path)), Tokenizer(base)
    documents = load_documents(c.data.train_file, c.data, tokenizer, "train_file")
    tracker = Tracker(c, tmp_path, 2, 9, [documents], tokenizer, hub=None)
    tracker.log({"step": 3, "loss": 2.0, "tokens_per_second": 1.0})
    tracker.close(patience=0)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 1.0), (3, 2.0)]
