"""Training follows transformers + peft step by step: losses, gradient norms, learning rates."""

from pathlib import Path

import pytest

import train
from helpers.peft_training import reference_run, save_initial_adapter
from helpers.tiny_runs import base_model, config, metrics

STEPS = 50


@pytest.mark.parametrize(
    ("family", "accumulation"),
    [("mistral_v1", 1), ("llama3", 4), ("qwen2", 1), ("qwen3", 4), ("mistral_v1", 4)],
)
def test_fifty_steps_follow_peft(tmp_path: Path, family: str, accumulation: int):
    base = base_model(tmp_path / "base", family)
    adapter = save_initial_adapter(base, tmp_path / "adapter", r=4, lora_alpha=8)
    c = config(
        tmp_path,
        base,
        rows=30,
        train__max_steps=STEPS,
        train__grad_acc_steps=accumulation,
        train__batch_size=4 // accumulation,
        train__lr_scheduler="cosine",
        train__learning_rate=5e-3,
        train__weight_decay=0.01,
        train__gradient_checkpointing=True,
        lora__init_from=str(adapter),
    )
    assert train.main(c) == 0

    ours, reference = metrics(c), reference_run(c, adapter)
    losses, norms, rates = zip(*reference, strict=True)
    assert len(ours) == len(reference) == STEPS
    assert [row["loss"] for row in ours] == pytest.approx(losses, abs=1e-4, rel=0)
    assert [row["grad_norm"] for row in ours] == pytest.approx(norms, rel=1e-2)
    assert [row["lr"] for row in ours] == pytest.approx(rates, rel=1e-6)
    falls = ours[-1]["loss"] < 0.8 * ours[0]["loss"]
    assert falls, "the run learns, or following it would show little"
