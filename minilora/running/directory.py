"""A run's directory: its checkpoints, complete or absent, never half, and which one a new start continues from."""

import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from minilora import dist
from minilora.checkpoint import STATE
from minilora.config import Config, LoraConfig, RunError, TrainConfig, UserError
from minilora.dist import WHOLE, Whole
from minilora.evaluation import metrics
from minilora.lora import adapter_state
from minilora.model import CausalLM
from minilora.running.saving import save_adapter, save_tokenizer, save_weights
from minilora.running.settings import leaves
from minilora.running.training_state import SPREAD, TENSORS, save_spread
from minilora.tokenizer import Tokenizer
from minilora.weights import read_json

# config fields that may change between a run and its continuation: they do not bend what has been trained so far
FREE_TO_CHANGE = (
    "output_dir", "preview", "plan", "data.num_workers", "data.strict", "data.eval_file", "data.eval_size",
    "data.eval_first", "train.epochs",
    "train.max_steps", "train.logging_steps", "train.save_steps", "train.save_total_limit", "train.resume",
    "train.gradient_checkpointing", "train.compile",
    "train.batch_size", "train.grad_acc_steps", "train.early_stopping_patience",
    "train.metric_for_best_model", "eval.", "log.", "hub.", "parallel.",
)  # fmt: skip


@dataclasses.dataclass
class TrainerState:
    """Where a run stands; `step` optimizer steps are done."""

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    finished: bool = False
    data: str = ""  # digest of the tokenised training rows
    docs_per_step: int = 0
    best: dict = dataclasses.field(default_factory=dict)  # of the best evaluation: step, metric, value
    worse: int = 0  # evaluations since

    def note_evaluation(self, figures: dict[str, float], train: TrainConfig) -> bool:
        """Whether an evaluation is the best so far by train.metric_for_best_model, on the last set that has it."""
        name = train.metric_for_best_model or (train.early_stopping_patience is not None and "loss")
        if not name:
            return False
        metric = next((key for key in reversed(figures) if key.endswith(f"/{name}")), name)
        value, sign = figures.get(metric, math.nan), -1 if metrics.lower_is_better(metric) else 1
        if metric in figures and self.best.get("metric") != metric:
            self.best = {}  # there is none, or it was chosen by another figure
        better = not math.isnan(value) and (not self.best or sign * value > sign * self.best["value"])
        if better:
            self.best = {"step": self.step, "metric": metric, "value": value}
        self.worse = 0 if better else self.worse + 1
        return better

    def out_of_patience(self, train: TrainConfig) -> bool:
        return train.early_stopping_patience is not None and self.worse >= train.early_stopping_patience

    def best_text(self) -> str:
        name = "final" if self.best.get("step") == self.step else self.best.get("step")
        return "; best: checkpoint-{}, {metric} {value:.4g}".format(name, **self.best) if self.best else ""


def write_atomically(directory: Path, write: Callable[[Path], None]) -> None:
    """Make `directory` appear whole: written under a temporary name, synced to disk, listed in a manifest, renamed.

    All processes call it, and `write` runs on each of them. Raises RunError if the disk will not take it; whatever was
    there before is intact.
    """
    temporary = directory.with_name(f".tmp-{directory.name}")
    if dist.rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        make_directory(temporary)
    try:
        dist.barrier()
        write(temporary)
        dist.barrier()
        if dist.rank() > 0:
            return
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        manifest = {str(p.relative_to(temporary)): p.stat().st_size for p in files}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        for path in files:  # the safetensors library makes its files for the owner alone
            shutil.copymode(temporary / "manifest.json", path)
        for path in [*files, temporary / "manifest.json", temporary]:
            _sync(path)
        shutil.rmtree(directory, ignore_errors=True)  # incomplete, or of a run continued from before it
        os.rename(temporary, directory)
        _sync(directory.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError | safetensors.SafetensorError):  # the library reports a full disk as its own error
            raise RunError(f"{directory} could not be written ({error}); what was there before is intact") from error
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be made or is no directory: {error.strerror}") from error


def is_complete(directory: Path) -> bool:
    """Whether every file of the manifest is there in its size."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        return all((directory / name).stat().st_size == size for name, size in manifest.items())
    except (OSError, ValueError):
        return False


def save(
    directory: Path, model: CausalLM, tokenizer: Tokenizer, config: Config, lora: LoraConfig | None, state: TrainerState,
    tensors: dict[str, Tensor], base: Path, dtype: torch.dtype, place: Whole = WHOLE,
) -> None:  # fmt: skip
    """Write a checkpoint, all processes together. tensors: what resuming needs (see `training_tensors`); base: the
    directory of the base model."""

    def write(target: Path) -> None:
        if lora is None:
            save_weights(model, target, dtype, place)
        adapter = {} if lora is None else adapter_state(model, place)
        if place.count > 1:
            save_spread(target / SPREAD, tensors, dict(model.named_parameters()), place)
        if dist.rank() > 0:
            return
        if lora is not None:
            save_adapter(target, adapter, lora, config)
        else:
            save_config(target, read_json(base / "config.json") | {"vocab_size": model.config.vocab_size}, dtype)
        save_tokenizer(tokenizer, target)
        if place.count == 1:
            safetensors.torch.save_file(tensors, str(target / TENSORS))
        record = {**dataclasses.asdict(state), "config": dataclasses.asdict(config)}
        (target / STATE).write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")

    if dist.rank() == 0:
        _check_space(directory)
    write_atomically(directory, write)


def save_config(directory: Path, raw: dict, dtype: torch.dtype) -> None:
    """config.json with the dtype that the weights beside it have, under the name its own version uses."""
    key = "dtype" if "dtype" in raw else "torch_dtype"
    raw = {**raw, key: str(dtype).removeprefix("torch.")}
    (directory / "config.json").write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_space(directory: Path) -> None:
    """Raises RunError, before anything is written, if the disk has less room than the last checkpoint took."""
    last = newest(directory.parent)
    if last is None:
        return
    needed = sum(p.stat().st_size for p in last.rglob("*") if p.is_file())
    if (free := shutil.disk_usage(directory.parent).free) < needed:
        raise RunError(
            f"{directory} could not be written (No space left: it needs {needed / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f}); "
            "what was there before is intact. train.save_total_limit keeps fewer checkpoints"
        )


def start_directory(out: Path, config: Config) -> None:
    """Make OUT, drop what a killed save left behind, and write the resolved config; the first process does."""
    if dist.rank() > 0:
        return
    make_directory(out)
    for leftover in out.glob(".tmp-*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    (out / "config.json").write_text(
        json.dumps(dataclasses.asdict(config), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def step_checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints `checkpoint-<step>` of a run, oldest first."""
    found = [(int(m[1]), p) for p in out.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    return [path for _, path in sorted(found) if is_complete(path)]


def newest(out: Path) -> Path | None:
    """The checkpoint that `resume="auto"` continues from."""
    final = out / "checkpoint-final"
    return final if is_complete(final) else next(iter(step_checkpoints(out)[::-1]), None)


def set_aside(checkpoint: Path | None, out: Path, step: int) -> None:
    """A finished run that goes on (more epochs): its final checkpoint becomes a step checkpoint, and nothing is lost."""
    dist.barrier()  # every process has read the checkpoint under its old name
    if dist.rank() == 0 and checkpoint is not None and checkpoint.resolve() == (out / "checkpoint-final").resolve():
        os.rename(checkpoint, out / f"checkpoint-{step}")


def prune(out: Path, limit: int | None, best: int | None = None) -> None:
    """Remove the oldest step checkpoints beyond `limit`, but not the one of step `best`; renamed first, so that none is ever
    half there."""
    for old in [c for c in step_checkpoints(out)[:-limit] if c.name != f"checkpoint-{best}"] if limit else []:
        doomed = old.with_name(f".tmp-{old.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(old, doomed)
        shutil.rmtree(doomed)


def find_checkpoint(config: Config, out: Path, data_digest: str, docs_per_step: int) -> tuple[Path | None, TrainerState]:
    """The checkpoint to continue from, if any, and the state to start in. Raises UserError rather than mix two runs."""
    resume = config.train.resume
    checkpoint = newest(out) if resume in ("auto", "never") else Path(resume)
    if checkpoint is None:
        return None, TrainerState(data=data_digest, docs_per_step=docs_per_step)
    if resume == "never":
        raise UserError(f"train.resume=never, but {out} holds {checkpoint.name}: choose another output_dir, or remove it")
    last = newest(out)
    if last is not None and last.resolve() != checkpoint.resolve():
        raise UserError(f"train.resume={resume}, but {out} holds the later {last.name}: choose another output_dir to branch off")
    state, saved = read_state(checkpoint)
    changed = changed_fields(config, saved)
    if state.data != data_digest:
        changed.append("the tokenised training rows")
    if state.docs_per_step != docs_per_step:  # batch_size x grad_acc_steps x processes: where an epoch's steps begin and end
        changed.append(f"documents per optimizer step: {state.docs_per_step} -> {docs_per_step}")
    if changed and resume == "auto":
        raise UserError(
            f"{checkpoint} was trained with other settings ({'; '.join(changed)}): choose another output_dir, "
            f"or continue it on purpose with --train.resume {checkpoint}"
        )
    for change in changed:
        dist.log(f"continuing {checkpoint} with a change: {change}")
    state.data, state.docs_per_step = data_digest, docs_per_step
    return checkpoint, state


def read_state(directory: Path) -> tuple[TrainerState, dict]:
    """(state, config as saved) of a checkpoint. Raises UserError if it is not one, or not complete."""
    if not directory.is_dir():
        raise UserError(f"checkpoint {directory} does not exist")
    if not is_complete(directory):
        raise UserError(f"checkpoint {directory} is not complete (its manifest.json does not match its files)")
    record = read_json(directory / STATE)
    saved = record.pop("config")
    return TrainerState(**record), saved


def changed_fields(config: Config, saved: dict) -> list[str]:
    """`name: saved value -> new value` of every field that bends the training and differs."""
    now, defaults = ({k: list(v) if isinstance(v, tuple) else v for k, v in leaves(c).items()} for c in (config, Config()))
    then = defaults | leaves(saved)  # a field that the version of then had not has its default
    return [
        f"{name}: {then.get(name)!r} -> {value!r}"
        for name, value in now.items()
        if then.get(name) != value and not name.startswith(FREE_TO_CHANGE)
    ]
