"""The tracker passes events on; trackers that cannot work are refused before the run."""

import importlib.util
from pathlib import Path

import pytest

import train
from helpers.tiny_runs import base_model, config, metrics
from minilora.config import Config
from minilora.errors import UserError
from minilora.tracking.tracker import Tracker
from minilora.training.evaluate import Evaluation


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return base_model(tmp_path_factory.mktemp("base") / "model")


@pytest.mark.parametrize("clip", [0.0, 1e-3, 1.0])
def test_the_gradient_norm_is_always_logged(clip: float, tmp_path: Path, base: Path):
    """It is the norm before clipping: a limit far below it changes nothing of the first ones."""
    slow = {"train__warmup_steps": 50, "train__learning_rate": 1e-9}
    c = config(tmp_path, base, train__max_steps=3, train__max_grad_norm=clip, **slow)
    assert train.main(c) == 0
    norms = [row["grad_norm"] for row in metrics(c)]
    assert len(norms) == 3 and all(norm > 0.5 for norm in norms)


def test_wandb_that_is_not_installed_is_named(tmp_path: Path, base: Path, monkeypatch):
    real = importlib.util.find_spec

    def without_wandb(name: str, *args):
        return None if name == "wandb" else real(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", without_wandb)
    with pytest.raises(UserError, match=r"wandb is not installed.*minilora\[track\]"):
        train.main(config(tmp_path, base, log__wandb=True))


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    tracker = Tracker(Config(output_dir=str(tmp_path)), 0, 10, [], None)  # type: ignore[arg-type]
    with tracker:
        tracker.step()
        tracker.log({"step": 1, "loss": 1.0, "tokens_per_second": 1.0})
        sample = {"prompt": "p", "target": "t", "generated": "g"}
        losses = {"eval/in_domain/loss": 1.0}
        tracker.log_evaluation({"step": 1}, Evaluation([losses], [sample]))
        tracker.saved({"step": 1, "epoch": 0.5}, "checkpoint-1")
        tracker.close(patience=0)
    assert not list(tmp_path.iterdir())
