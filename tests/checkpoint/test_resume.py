"""What a new start continues from, and the changed settings that it refuses."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest

from helpers.checkpoints import short_run
from minilora.checkpoint.resume import changed_fields, read_state


@pytest.mark.parametrize("method", ["lora", "full"])
def test_read_state_returns_what_was_saved(method: str, runs: dict[str, Path], base: Path):
    config = short_run(method, base, runs[method])
    lines = (runs[method] / "metrics.jsonl").read_text().splitlines()
    last = [row for row in map(json.loads, lines) if "tokens" in row][-1]
    state, saved = read_state(runs[method] / "checkpoint-final")
    assert (state.step, state.finished) == (4, True)
    assert (state.tokens, state.supervised_tokens) == (last["tokens"], last["supervised_tokens"])
    assert changed_fields(config, saved) == []
    earlier, _ = read_state(runs[method] / "checkpoint-3")
    assert (earlier.step, earlier.finished, earlier.data) == (3, False, state.data)


INFLUENTIAL = {
    "seed": 1,
    "method": "full",
    "model.name": "other",
    "model.revision": "v2",
    "model.dtype": "float32",
    "lora.rank": 5,
    "lora.alpha": 1.0,
    "lora.dropout": 0.1,
    "lora.target_modules": ("q_proj",),
    "lora.rslora": False,
    "lora.init_from": "other",
    "data.train_file": "other",
    "data.train_size": 3,
    "data.format": "text",
    "data.prompt_template": "{title}",
    "data.chat": False,
    "data.edge_dropping": False,
    "data.max_seq_length": 7,
    "data.too_long": "truncate",
    "data.shuffle": False,
    "train.learning_rate": 2e-2,
    "train.lr_scheduler": "cosine",
    "train.warmup_steps": 1,
    "train.warmup_ratio": 0.5,
    "train.weight_decay": 0.5,
    "train.max_grad_norm": 9.0,
    "train.optimizer": "adamw8bit",
    "train.group_by_length": False,
}
FREE = {
    "output_dir": "other",
    "preview": 1,
    "data.num_workers": 1,
    "data.strict": True,
    "data.eval_file": "other",
    "data.eval_size": 9,
    "train.epochs": 7.0,
    "train.max_steps": 9,
    "train.logging_steps": 1,
    "train.save_steps": 9,
    "train.save_total_limit": 1,
    "train.resume": "never",
    "train.gradient_checkpointing": True,
    # the documents per step that these two come to are compared instead
    "train.batch_size": 5,
    "train.grad_acc_steps": 2,
    "eval.eval_steps": 1,
    "eval.batch_size": 1,
    "eval.temperature": 0.9,
    "log.tensorboard": True,
    "log.wandb_notes": "x",
}


@pytest.mark.parametrize("field", [*INFLUENTIAL, *FREE])
def test_changed_fields_names_those_that_influence_training(field: str, base: Path, tmp_path: Path):
    before = short_run("lora", base, tmp_path)
    saved = json.loads(json.dumps(dataclasses.asdict(before)))  # as trainer_state.json holds it
    config = copy.deepcopy(before)
    section, _, name = field.rpartition(".")
    owner = getattr(config, section) if section else config
    old, new = getattr(owner, name), {**INFLUENTIAL, **FREE}[field]
    assert old != new
    setattr(owner, name, new)

    changed = changed_fields(config, saved)
    if field in FREE:
        assert changed == []
    else:
        if isinstance(old, tuple):
            old, new = list(old), list(new)
        assert changed == [f"{field}: {old!r} -> {new!r}"]


def test_changed_fields_ignores_settings_that_no_longer_exist(base: Path, tmp_path: Path):
    """Checkpoints of earlier versions have `plan` and `train.compile`, and lack newer fields."""
    config = short_run("lora", base, tmp_path)
    saved = json.loads(json.dumps(dataclasses.asdict(config)))
    saved["plan"] = False
    saved["train"]["compile"] = False
    del saved["train"]["ema_decay"]
    assert changed_fields(config, saved) == []
