"""Checkpoints made without training, and what is in a directory."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from helpers.build import CPU
from minilora.build import build_for_training
from minilora.checkpoint.checkpointer import Checkpointer
from minilora.checkpoint.trainer_state import TrainerState
from minilora.config import (
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    TrainConfig,
)
from minilora.data.tokenizer import Tokenizer
from minilora.files import write_directory
from minilora.model.lora import lora_layers
from minilora.training.optimizer import trainable_parameters


def write_two_files(target: Path, content: str) -> None:
    (target / "weights").write_text(content)
    (target / "sub").mkdir()
    (target / "sub" / "state").write_text(content)


def written(directory: Path, content: str = "content") -> Path:
    """Write a complete directory of two small files."""
    write_directory(directory, lambda target: write_two_files(target, content))
    return directory


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a file is missing": lambda directory: (directory / "weights").unlink(),
    "a file is short": lambda directory: os.truncate(directory / "sub" / "state", 3),
    "a file is empty": lambda directory: os.truncate(directory / "weights", 0),
    "no manifest": lambda directory: (directory / "manifest.json").unlink(),
    "a short manifest": lambda directory: os.truncate(directory / "manifest.json", 10),
    "no directory": shutil.rmtree,
}
"""Ways in which what `written` wrote becomes incomplete."""


def contents(directory: Path) -> dict[str, bytes]:
    """Return {relative path: bytes} of all files."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}


def names(directory: Path) -> list[str]:
    """Return the sorted names of what is in a directory."""
    return sorted(path.name for path in directory.iterdir())


def short_run(method: Any, base: Path, out: Path) -> Config:
    """Return the config of a run of four steps on the rows.jsonl beside the base."""
    targets = ("q_proj", "o_proj", "up_proj", "down_proj")
    return Config(
        output_dir=str(out),
        method=method,
        model=ModelConfig(name=str(base)),
        lora=LoraConfig(rank=4, alpha=6, rslora=True, target_modules=targets),
        data=DataConfig(train_file=str(base / "rows.jsonl"), format="prompt", eval_size=2),
        train=TrainConfig(
            max_steps=4,
            batch_size=4,
            learning_rate=1e-2,
            warmup_steps=0,
            gradient_checkpointing=False,
        ),
        eval=EvalConfig(eval_steps=3, num_generate_samples=0),
        log=LogConfig(tensorboard=False),
    )


def random_adapter(
    base: Path, directory: Path, lora: LoraConfig, data: DataConfig | None = None
) -> Path:
    """Write a checkpoint with a random adapter, whose B matrices are not zero."""
    config = Config(model=ModelConfig(name=str(base)), lora=lora, data=data or DataConfig())
    loaded = build_for_training(config, base, CPU)
    generator = torch.Generator().manual_seed(1)
    for _, layer in lora_layers(loaded.model):
        torch.nn.init.normal_(layer.lora_B, std=0.1, generator=generator)

    parameters = trainable_parameters(loaded)
    checkpointer = Checkpointer(config, loaded, parameters, Tokenizer(base), base, {})
    optimizer = torch.optim.SGD(parameters.values())
    optimizer.state[next(iter(parameters.values()))]["x"] = torch.zeros(1)
    checkpointer.write(directory, TrainerState(), optimizer)
    return directory
