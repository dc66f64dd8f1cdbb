"""The checkpoints in a run's output directory: written, found, removed, and resumed from.

A run writes OUT/checkpoint-<step>, and OUT/checkpoint-final at its end. Each is complete or absent
whatever happens (see `files.write_directory`). Which one a new start continues is decided in
resume.py.
"""

import dataclasses
import os
import re
import shutil
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from minilora import distributed
from minilora.checkpoint.hf_writer import save_config, save_weights
from minilora.checkpoint.model_record import ModelRecord, write_model_record
from minilora.checkpoint.peft import adapter_state, save_adapter
from minilora.checkpoint.tokenizer_writer import plan_export, save_tokenizer
from minilora.checkpoint.trainer_state import TrainerState, write_trainer_state
from minilora.checkpoint.training_state import (
    load_training_tensors,
    save_training_tensors,
    training_tensors,
)
from minilora.config import Config, LoraConfig
from minilora.data.tokenizer import Tokenizer
from minilora.distributed import Layout
from minilora.errors import RunError
from minilora.files import is_complete, make_directory, read_json, write_directory, write_json
from minilora.model.transformer import CausalLM

FINAL = "checkpoint-final"


class TrainedModel(Protocol):
    """The fields of `build.LoadedModel` that checkpoints need.

    A protocol, because build.py imports this folder and so cannot be imported here.
    """

    model: CausalLM
    weight_dtype: torch.dtype
    lora: LoraConfig | None
    layout: Layout


class Checkpointer:
    """Writes a run's checkpoints, and restores the state of training from one."""

    def __init__(
        self,
        config: Config,
        loaded: TrainedModel,
        parameters: dict[str, nn.Parameter],
        tokenizer: Tokenizer,
        base: Path,
        shadow: dict[str, Tensor],
    ):
        """Keep references to what checkpoints are made of, and log how its tokenizer is saved.

        Args:
            config: the run's settings.
            loaded: the model in training.
            parameters: the trained parameters by name; of a sharded model, this process's rows.
            tokenizer: its files become part of each checkpoint.
            base: the directory of the base model.
            shadow: `EMA.shadow`, empty without EMA. It is shared with the EMA, which writes to it,
                and means one thing in each method: in `resume` it is the average; in `save`, which
                runs inside `EMA.applied`, the average is in the model and `shadow` is the weights
                that training goes on with.
        """
        self.config = config
        self.loaded = loaded
        self.parameters = parameters
        self.tokenizer = tokenizer
        self.base = base
        self.shadow = shadow
        self.tokenizer_export = plan_export(tokenizer, config.data)
        for note in self.tokenizer_export.notes:
            distributed.log(note)

    def save(self, state: TrainerState, optimizer: torch.optim.Optimizer) -> str:
        """Write the checkpoint of the step that is done, and remove old ones beyond the limit.

        All processes call this together, in a run with EMA inside of `EMA.applied`: the model's
        weights are then the average, and it is the average that is written as the model.

        Returns:
            The checkpoint's name: checkpoint-<step>, or checkpoint-final at the end of the run.

        Raises:
            RunError: the disk is full, or cannot be written to.
        """
        out = Path(self.config.output_dir)
        name = FINAL if state.finished else f"checkpoint-{state.step}"
        self.write(out / name, state, optimizer)
        if distributed.rank() == 0:
            limit, best_step = self.config.train.save_total_limit, state.best.get("step")
            delete_old(out, limit, best_step)
        distributed.barrier()
        return name

    def write(self, directory: Path, state: TrainerState, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint to any directory, as `save` does and under the same conditions.

        Raises:
            RunError: the disk is full, or cannot be written to.
        """
        # of a full run, the saved weights are the float32 ones, maybe rounded
        is_rounded = self.config.method == "full" and self.loaded.weight_dtype != torch.float32
        raw_weights = self.shadow  # not the average, which is in the model now
        tensors = training_tensors(optimizer, self.parameters, is_rounded, raw_weights)
        if distributed.rank() == 0:
            _check_space(directory)

        def write_files(target: Path) -> None:
            self._write_model(target)
            model_parameters = dict(self.loaded.model.named_parameters())
            save_training_tensors(target, tensors, model_parameters, self.loaded.layout)
            if distributed.rank() == 0:
                save_tokenizer(self.tokenizer, target, self.tokenizer_export)
                write_trainer_state(target, state, self.config)
                write_model_record(
                    target, ModelRecord(self.config.data.asked_form, self.config.model)
                )

        write_directory(directory, write_files)

    def _write_model(self, target: Path) -> None:
        """Write the adapter, or the whole model if all of it is trained."""
        model, lora = self.loaded.model, self.loaded.lora
        if lora is None:
            save_weights(model, target, self.loaded.weight_dtype, self.loaded.layout)
            if distributed.rank() == 0:
                # the vocabulary may have grown by data.add_tokens
                raw = read_json(self.base / "config.json")
                raw["vocab_size"] = model.config.vocab_size
                new_eos = self.tokenizer_export.new_eos
                if new_eos is not None:
                    raw["eos_token_id"] = self.tokenizer.specials[new_eos]
                save_config(target, raw, self.loaded.weight_dtype)
        else:
            adapter = adapter_state(model, self.loaded.layout)
            if distributed.rank() == 0:
                save_adapter(target, adapter, lora, self.config.model)

    def resume(self, checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
        """Restore optimizer state, float32 weights and moving average from a checkpoint.

        The model must have been built with the checkpoint's weights. `EMA.applied` must not be
        active: afterwards the model has the weights to train, and `shadow` their average.

        Raises:
            UserError: the checkpoint does not have what this run needs.
        """
        load_training_tensors(
            checkpoint,
            optimizer,
            self.parameters,
            average=self.shadow,
            layout=self.loaded.layout,
            model_parameters=dict(self.loaded.model.named_parameters()),
        )


def _check_space(directory: Path) -> None:
    """Raise RunError if the disk has less room than the last checkpoint took."""
    last = latest_checkpoint(directory.parent)
    if last is None:
        return
    needed = sum(path.stat().st_size for path in last.rglob("*") if path.is_file())
    free = shutil.disk_usage(directory.parent).free
    if free < needed:
        sizes = f"it needs {needed / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f}"
        raise RunError(
            f"{directory} could not be written (No space left: {sizes}); what was there before is "
            "intact. train.save_total_limit keeps fewer checkpoints"
        )


def start_directory(out: Path, config: Config) -> None:
    """Make a run's directory, remove what a killed run left half-written, and write the config.

    The first process does it.
    """
    if distributed.rank() > 0:
        return
    make_directory(out)
    for leftover in out.glob(".tmp-*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    write_json(out / "config.json", dataclasses.asdict(config))


def step_checkpoints(out: Path) -> list[Path]:
    """Return the complete checkpoints named after a step, oldest first."""
    found = []
    for path in out.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match:
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found) if is_complete(path)]


def latest_checkpoint(out: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, if there is one."""
    final = out / FINAL
    if is_complete(final):
        return final
    checkpoints = step_checkpoints(out)
    return checkpoints[-1] if checkpoints else None


def demote_final(checkpoint: Path | None, out: Path, step: int) -> None:
    """Rename checkpoint-final to checkpoint-<step> if the run now goes on from it.

    All processes call this together, after they have read the checkpoint.

    Args:
        checkpoint: the checkpoint that the run continues from, if any.
        out: the run's directory.
        step: the step of `checkpoint`.
    """
    distributed.barrier()  # every process has read the checkpoint under its old name
    if checkpoint is None or distributed.rank() > 0:
        return
    if checkpoint.resolve() == (out / FINAL).resolve():
        os.rename(checkpoint, out / f"checkpoint-{step}")


def delete_old(out: Path, limit: int | None, best_step: int | None = None) -> None:
    """Remove the oldest checkpoints that are named after a step.

    Each is renamed before it is removed, so that no half of it can be taken for a checkpoint.

    Args:
        out: the run's directory.
        limit: how many to keep; None or 0 keeps all.
        best_step: the step of a checkpoint to keep in any case.
    """
    if not limit:
        return
    for old in step_checkpoints(out)[:-limit]:
        if old.name == f"checkpoint-{best_step}":
            continue
        renamed = old.with_name(f".tmp-{old.name}")
        shutil.rmtree(renamed, ignore_errors=True)
        os.rename(old, renamed)
        shutil.rmtree(renamed)
