"""Training follows transformers + peft step by step: losses, gradient norms, learning rates."""

from pathlib import Path

import pytest

import train
from helpers.peft_training import config_to_follow, reference_run
from helpers.tiny_runs import base_model, metrics

STEPS = 50


@pytest.mark.parametrize(
    ("family", "accumulation"),
    [("mistral_v1", 1), ("llama3", 4), ("qwen2", 1), ("qwen3", 4), ("mistral_v1", 4)],
)
def test_fifty_steps_follow_peft(tmp_path: Path, family: str, accumulation: int):
    base = base_model(tmp_path / "base", family)
    config = config_to_follow(tmp_path, base, accumulation, train__max_steps=STEPS)
    assert train.main(config) == 0

    ours, reference = metrics(config), reference_run(config, Path(config.lora.init_from or ""))
    losses, norms, rates = zip(*reference, strict=True)
    assert len(ours) == len(reference) == STEPS
    assert [row["loss"] for row in ours] == pytest.approx(losses, abs=1e-4, rel=0)
    assert [row["grad_norm"] for row in ours] == pytest.approx(norms, rel=1e-2)
    assert [row["lr"] for row in ours] == pytest.approx(rates, rel=1e-6)
    falls = ours[-1]["loss"] < 0.8 * ours[0]["loss"]
    assert falls, "the run learns, or following it would show little"
