"""What a new start continues from, and the changed settings that it refuses."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from helpers.checkpoints import contents, names, short_run, written
from minilora.checkpoint.checkpointer import latest_checkpoint
from minilora.checkpoint.resume import (
    changed_fields,
    find_checkpoint,
    read_state,
    rename_superseded,
)
from minilora.checkpoint.trainer_state import TrainerState, write_trainer_state
from minilora.config import Config, RowFormat
from minilora.errors import UserError
from minilora.files import write_directory


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
    "data.edge_draw": "once",
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


def test_changed_fields_leaves_the_table_of_formats_to_the_fingerprint(base: Path, tmp_path: Path):
    """Its entries come and go: neither is an error."""
    config = short_run("lora", base, tmp_path)
    config.data.file_formats = {"old.csv": RowFormat(format="text")}
    saved = json.loads(json.dumps(dataclasses.asdict(config)))
    config.data.file_formats = {"new.v2.csv": RowFormat(format="prompt", chat=False)}
    assert changed_fields(config, saved) == []


def test_what_is_newer_is_set_aside_and_nothing_is_lost(tmp_path: Path):
    """Twice: the second time its names are taken."""
    for name in ("checkpoint-8", "checkpoint-16", "superseded-checkpoint-24"):
        written(tmp_path / name, name)
    for content in ("first", "second"):
        for name in ("checkpoint-24", "checkpoint-final"):
            written(tmp_path / name, content)
        rename_superseded(tmp_path, 16)
        assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-16"

    kept = {name: contents(tmp_path / name)["weights"].decode() for name in names(tmp_path)}
    assert kept == {
        "checkpoint-8": "checkpoint-8",
        "checkpoint-16": "checkpoint-16",
        "superseded-checkpoint-24": "superseded-checkpoint-24",
        "superseded-checkpoint-24-2": "first",
        "superseded-checkpoint-24-3": "second",
        "superseded-checkpoint-final": "first",
        "superseded-checkpoint-final-2": "second",
    }


# ---- find_checkpoint, of checkpoints without a model

BEST = {"step": 4, "metric": "eval/out_of_domain/loss", "value": 1.5}


def save_state(config: Config, name: str = "checkpoint-8") -> Path:
    """Write a checkpoint at step 8 that knows a best one and has nothing to train from."""
    state = TrainerState(step=8, data="rows", docs_per_step=4, best=BEST, worse=2)
    directory = Path(config.output_dir) / name
    write_directory(directory, lambda target: write_trainer_state(target, state, config))
    return directory


@pytest.mark.parametrize(
    ("field", "value"), [("eval_file", "other.jsonl"), ("eval_size", 9), ("eval_first", True)]
)
def test_other_evaluation_sets_make_a_new_best(
    field: str, value: object, tmp_path: Path, capsys: pytest.CaptureFixture
):
    config = Config(output_dir=str(tmp_path))
    checkpoint = save_state(config)
    found, state = find_checkpoint(config, tmp_path, "rows", 4)
    assert (found, state.best, state.worse, state.first_eval_step) == (checkpoint, BEST, 2, 0)
    assert capsys.readouterr().err == ""

    setattr(config.data, field, value)
    _, state = find_checkpoint(config, tmp_path, "rows", 4)
    assert (state.best, state.worse, state.first_eval_step) == ({}, 0, 9)
    assert f"does not count any more: data.{field} changed" in capsys.readouterr().err


def test_a_branch_has_no_best_checkpoint_yet(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Its output directory does not have the one of the run that it branches off."""
    checkpoint = save_state(Config(output_dir=str(tmp_path / "first")))
    config = Config(output_dir=str(tmp_path / "second"))
    config.train.resume = str(checkpoint)
    found, state = find_checkpoint(config, tmp_path / "second", "rows", 4)
    assert (found, state.best, state.worse, state.step) == (checkpoint, {}, 0, 8)
    assert f"it was one of {tmp_path / 'first'}" in capsys.readouterr().err


def test_a_branch_is_continued_by_the_same_command(tmp_path: Path):
    """Also if the checkpoint that it began with is gone. With other settings it is refused."""
    branched_off = save_state(Config(output_dir=str(tmp_path / "first")))
    config = Config(output_dir=str(tmp_path / "second"))
    config.train.resume = str(branched_off)
    own = save_state(config, "checkpoint-12")
    found, state = find_checkpoint(config, tmp_path / "second", "rows", 4)
    assert (found, state.best) == (own, BEST)

    other = copy.deepcopy(config)
    other.train.learning_rate = 1e-3
    with pytest.raises(UserError, match="has its own checkpoint-12"):
        find_checkpoint(other, tmp_path / "second", "rows", 4)
    shutil.rmtree(branched_off)
    assert find_checkpoint(config, tmp_path / "second", "rows", 4)[0] == own


@pytest.mark.parametrize("resume", ["latest", "True", ""])
def test_a_word_that_is_not_a_checkpoint_names_the_choices(resume: str, tmp_path: Path):
    config = Config(output_dir=str(tmp_path))
    config.train.resume = resume
    save_state(Config(output_dir=str(tmp_path)))
    with pytest.raises(UserError, match=r"train\.resume.*or auto, never, last, best\)"):
        find_checkpoint(config, tmp_path, "rows", 4)
