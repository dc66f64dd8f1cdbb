"""Decide whether a run starts anew or continues from a checkpoint, and from which one."""

import dataclasses
import json
import os
from pathlib import Path

from minilora import distributed
from minilora.checkpoint.checkpointer import FINAL, latest_checkpoint, step_checkpoints
from minilora.checkpoint.trainer_state import TRAINER_STATE_FILE, TrainerState
from minilora.config import Config, flatten_config
from minilora.errors import UserError
from minilora.files import is_complete, read_json

FREE_TO_CHANGE = (
    "output_dir",
    "preview",
    "data.num_workers",
    "data.strict",
    "data.eval_file",
    "data.eval_size",
    "data.eval_first",
    "data.file_formats",
    "train.epochs",
    "train.max_steps",
    "train.logging_steps",
    "train.save_steps",
    "train.save_total_limit",
    "train.resume",
    "train.gradient_checkpointing",
    "train.compile",
    "train.activation_offload",
    "train.mlp_tile_tokens",
    "plan",
    "train.batch_size",
    "train.grad_acc_steps",
    "train.early_stopping_patience",
    "train.metric_for_best_model",
    "eval.",
    "log.",
    "hub.",
    "parallel.",
)
"""Beginnings of the names of config fields that may change when a run continues.

Most of them have no influence on what is trained: with another value the weights would be the same,
up to rounding. What data.file_formats changes of the training rows shows in their fingerprint.
Three kinds do have an influence:

- train.epochs and train.max_steps set the total number of steps. The schedules linear and cosine
  and train.warmup_ratio depend on it, so a new total moves the learning rate of all steps that are
  still to come; the steps that are done were made on the old schedule. `constant` and, with
  warmup_steps, `constant_with_warmup` do not depend on it.
- train.early_stopping_patience, train.metric_for_best_model, the data.eval fields and all fields of
  eval decide when the run stops early and which checkpoint is kept as the best.
- With lora.dropout, train.batch_size, train.grad_acc_steps and the number of processes change what
  is dropped, which is drawn by process and pass.
"""

EVAL_SET_FIELDS = ("data.eval_file", "data.eval_size", "data.eval_first")
"""The config fields of FREE_TO_CHANGE that decide which rows a run is evaluated on."""


def find_checkpoint(
    config: Config, out: Path, fingerprint: str, docs_per_step: int
) -> tuple[Path | None, TrainerState]:
    """Return the checkpoint to continue from, if any, and the state to start in.

    Args:
        config: the run's settings; `train.resume` says what is wanted.
        out: the run's directory.
        fingerprint: of the tokenized training rows, see `data.dataset.dataset_fingerprint`.
        docs_per_step: documents in an optimizer step, over all processes.

    Raises:
        UserError: the run would mix with another one, or the checkpoint cannot be read.
    """
    checkpoint = _choose_checkpoint(config, out)
    if checkpoint is None:
        return None, TrainerState(data=fingerprint, docs_per_step=docs_per_step)

    state, saved = read_state(checkpoint)
    changed = changed_fields(config, saved)
    if state.data != fingerprint:
        changed.append("the tokenized training rows, or how often their edges are counted")
    # with another number of documents per step, an epoch's steps would begin and end elsewhere
    if state.docs_per_step != docs_per_step:
        counts = f"{state.docs_per_step} -> {docs_per_step}"
        changed.append(f"documents per optimizer step: {counts}")
    if changed and config.train.resume == "auto":
        raise UserError(
            f"{checkpoint} was trained with other settings ({'; '.join(changed)}): choose another "
            "output_dir, or continue it on purpose with --train.resume last"
        )
    for change in changed:
        distributed.log(f"continuing {checkpoint} with a change: {change}")

    state.data = fingerprint
    state.docs_per_step = docs_per_step
    _forget_other_evaluations(state, config, saved, checkpoint)
    return checkpoint, state


def _choose_checkpoint(config: Config, out: Path) -> Path | None:
    """Return the checkpoint that `train.resume` asks for; None: the run starts anew.

    Raises:
        UserError: there is none of that kind, or the run would mix with another one.
    """
    resume = config.train.resume
    latest = latest_checkpoint(out)
    if resume == "auto":
        return latest
    if resume == "never":
        if latest is not None:
            problem = f"train.resume=never, but {out} has {latest.name}"
            raise UserError(f"{problem}: choose another output_dir, or remove it")
        return None
    if resume in ("last", "best"):
        if latest is None:
            raise UserError(f"train.resume={resume}, but {out} has no complete checkpoint")
        return latest if resume == "last" else _best_checkpoint(config, out, latest)

    # a command that was interrupted after it had branched off goes on with its own work
    if latest is not None and _is_of_this_command(config, read_state(latest)[1]):
        return latest
    checkpoint = Path(resume)
    if not resume or not checkpoint.is_dir():
        problem = "train.resume is empty"
        if resume:
            problem = f"train.resume: checkpoint {resume} does not exist"
        raise UserError(f"{problem} (a checkpoint directory, or auto, never, last, best)")
    if latest is not None and latest.resolve() != checkpoint.resolve():
        problem = f"train.resume={resume}, but {out} has its own {latest.name}"
        raise UserError(f"{problem}: choose another output_dir to branch off")
    return checkpoint


def _is_of_this_command(config: Config, saved: dict) -> bool:
    """Return whether a checkpoint was saved with exactly the settings of now."""
    return saved == json.loads(json.dumps(dataclasses.asdict(config)))


def _best_checkpoint(config: Config, out: Path, latest: Path) -> Path:
    """Return the best checkpoint of a run, or the newest if this command has gone back before.

    A command that went back to the best checkpoint and was then interrupted continues its own work
    when it is started again: its checkpoints hold exactly its settings.

    Args:
        config: the run's settings.
        out: the run's directory.
        latest: its newest checkpoint, which knows the best one.

    Raises:
        UserError: no checkpoint is known to be the best, or it is not there any more.
    """
    state, saved = read_state(latest)
    if _is_of_this_command(config, saved):
        return latest
    if not state.best:
        raise UserError(
            f"train.resume=best, but {latest} knows of no best one: its run had no "
            "train.metric_for_best_model. To start from another checkpoint, name it in "
            "train.resume and choose another output_dir"
        )
    best = latest
    if state.best["step"] != state.step:
        best = out / f"checkpoint-{state.best['step']}"
    metric, value = state.best["metric"], state.best["value"]
    distributed.log(f"the best checkpoint is {best} with {metric} {value:.4g}")
    return best


def _forget_other_evaluations(
    state: TrainerState, config: Config, saved: dict, checkpoint: Path
) -> None:
    """Forget the best evaluation if it is not one of this run, or not of its evaluation sets.

    Args:
        state: of the checkpoint; its fields `best`, `worse` and `first_eval_step` are changed.
        config: the settings now.
        saved: the config in the checkpoint.
        checkpoint: where the run continues from. If it lies in the output directory of another
            run, so do the earlier ones, of which the best one is no checkpoint of this run.
    """
    then, now = _saved_values(saved), _as_json(flatten_config(config))
    changes = [name for name in EVAL_SET_FIELDS if then[name] != now[name]]
    if changes:
        state.first_eval_step = state.step + 1
        reason = f"{', '.join(changes)} changed"
    elif checkpoint.resolve().parent != Path(config.output_dir).resolve():
        reason = f"it was one of {checkpoint.parent}"
    else:
        return

    if state.best:
        distributed.log(f"the best checkpoint so far does not count any more: {reason}")
    state.best, state.worse = {}, 0


def rename_superseded(out: Path, step: int) -> None:
    """Rename the checkpoints that are newer than the step a run goes on from, and say so.

    They are called superseded-checkpoint-<step> then, are not found as checkpoints of the run any
    more, and can be used as before. Only with train.resume=best there are any. All processes call
    this together, after they have read what they need.

    Args:
        out: the run's directory.
        step: optimizer steps that are done.
    """
    distributed.barrier()  # every process has decided from which checkpoint it goes on
    if distributed.rank() > 0:
        return
    newer = [
        path for path in step_checkpoints(out) if int(path.name.removeprefix("checkpoint-")) > step
    ]
    if is_complete(out / FINAL):  # the run does not go on from it: see `demote_final`
        newer.append(out / FINAL)
    # the newest first: if the process is killed meanwhile, what is left is a run that was shorter
    for path in reversed(newer):
        target = out / f"superseded-{path.name}"
        number = 1
        while target.exists():
            number += 1
            target = out / f"superseded-{path.name}-{number}"
        os.rename(path, target)
        distributed.log(f"{path} is newer than step {step}: now {target.name}")


def read_state(directory: Path) -> tuple[TrainerState, dict]:
    """Return a checkpoint's state and, as a nested dict, the config it was saved with.

    Raises:
        UserError: it is not a checkpoint, or not a complete one.
    """
    if not directory.is_dir():
        raise UserError(f"checkpoint {directory} does not exist")
    if not is_complete(directory):
        problem = "its manifest.json does not match its files"
        raise UserError(f"checkpoint {directory} is not complete ({problem})")
    record = read_json(directory / TRAINER_STATE_FILE)
    saved = record.pop("config")
    return TrainerState(**record), saved


def changed_fields(config: Config, saved: dict) -> list[str]:
    """Describe every field that differs from a saved config and influences what is trained.

    Args:
        config: the settings now.
        saved: the config in a trainer_state.json. A field that it lacks is newer than it, and has
            its default; a field that only it has is one that this version no longer knows.

    Returns:
        "name: saved value -> value now" for each such field.
    """
    values_then = _saved_values(saved)
    changes = []
    for name, now in _as_json(flatten_config(config)).items():
        if name.startswith(FREE_TO_CHANGE):
            continue
        then = values_then[name]
        if then != now:
            changes.append(f"{name}: {then!r} -> {now!r}")
    return changes


def _saved_values(saved: dict) -> dict[str, object]:
    """Return the fields of a saved config by name, with defaults for those newer than it."""
    values = _as_json(flatten_config(Config()))
    values.update(flatten_config(saved))
    return values


def _as_json(values: dict[str, object]) -> dict[str, object]:
    """Replace tuples by lists, which is how JSON gives them back."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items()
    }
