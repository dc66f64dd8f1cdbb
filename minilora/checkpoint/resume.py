"""Decide whether a run starts anew or continues from a checkpoint, and from which one."""

from pathlib import Path

from minilora import distributed
from minilora.checkpoint.checkpointer import latest_checkpoint
from minilora.checkpoint.run_record import TRAINER_STATE_FILE
from minilora.checkpoint.trainer_state import TrainerState
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
    "train.epochs",
    "train.max_steps",
    "train.logging_steps",
    "train.save_steps",
    "train.save_total_limit",
    "train.resume",
    "train.gradient_checkpointing",
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
up to rounding. Three kinds do have one:

- train.epochs and train.max_steps set the total number of steps. The schedules linear and cosine
  and train.warmup_ratio depend on it, so a new total moves the learning rate of all steps that are
  still to come; the steps that are done were made on the old schedule. `constant` and, with
  warmup_steps, `constant_with_warmup` do not depend on it.
- train.early_stopping_patience, train.metric_for_best_model, the data.eval fields and all fields of
  eval decide when the run stops early and which checkpoint is kept as the best.
- With lora.dropout, train.batch_size, train.grad_acc_steps and the number of processes change what
  is dropped, which is drawn by process and pass.
"""


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
    resume = config.train.resume
    latest = latest_checkpoint(out)
    is_named = resume not in ("auto", "never")
    checkpoint = Path(resume) if is_named else latest
    if checkpoint is None:
        return None, TrainerState(data=fingerprint, docs_per_step=docs_per_step)

    if resume == "never":
        problem = f"train.resume=never, but {out} has {checkpoint.name}"
        raise UserError(f"{problem}: choose another output_dir, or remove it")
    if latest is not None and latest.resolve() != checkpoint.resolve():
        problem = f"train.resume={resume}, but {out} has its own {latest.name}"
        raise UserError(f"{problem}: choose another output_dir to branch off")

    state, saved = read_state(checkpoint)
    changed = changed_fields(config, saved)
    if state.data != fingerprint:
        changed.append("the tokenized training rows")
    # with another number of documents per step, an epoch's steps would begin and end elsewhere
    if state.docs_per_step != docs_per_step:
        counts = f"{state.docs_per_step} -> {docs_per_step}"
        changed.append(f"documents per optimizer step: {counts}")
    if changed and resume == "auto":
        raise UserError(
            f"{checkpoint} was trained with other settings ({'; '.join(changed)}): choose another "
            f"output_dir, or continue it on purpose with --train.resume {checkpoint}"
        )
    for change in changed:
        distributed.log(f"continuing {checkpoint} with a change: {change}")

    state.data = fingerprint
    state.docs_per_step = docs_per_step
    return checkpoint, state


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
    values_then = _as_json(flatten_config(Config()))  # for fields that are newer than the file
    values_then.update(flatten_config(saved))

    changes = []
    for name, now in _as_json(flatten_config(config)).items():
        then = values_then[name]
        if then != now and not name.startswith(FREE_TO_CHANGE):
            changes.append(f"{name}: {then!r} -> {now!r}")
    return changes


def _as_json(values: dict[str, object]) -> dict[str, object]:
    """Replace tuples by lists, which is how JSON gives them back."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items()
    }
