"""Runs of 21 steps with a moving average of the weights, and the average computed by hand."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import minilora
import train
from helpers import tiny_runs
from minilora.config import Config
from minilora.data.cache import load_documents
from minilora.data.tokenizer import Tokenizer

DECAY = 0.7  # from step 13 on it is less than (1 + t) / (10 + t)
STEPS = 21  # three epochs of seven steps

FULL = {"method": "full", "train__learning_rate": 1e-3}
KINDS = {"lora": {}, "full": FULL, "full bfloat16": {**FULL, "model__dtype": "bfloat16"}}


def averaged_config(home: Path, base: Path, name: str, **changes) -> Config:
    """Return the configuration of a run in home/name; its schedule does not depend on its end."""
    directory = home / name
    directory.mkdir(exist_ok=True)
    settings = {"train__ema_decay": DECAY, "eval__num_generate_samples": 0, **changes}
    return tiny_runs.config(directory, base, **settings)


def run(home: Path, base: Path, name: str, **changes) -> Config:
    """Train, and return the run's configuration."""
    config = averaged_config(home, base, name, **changes)
    assert train.main(config) == 0
    return config


def final(config: Config) -> Path:
    """Return the last checkpoint of a finished run."""
    return Path(config.output_dir) / "checkpoint-final"


def weights_file(checkpoint: Path) -> Path:
    """Return the file with the weights of a checkpoint, be it an adapter or a whole model."""
    (file,) = checkpoint.glob("*model.safetensors")
    return file


def saved_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Return the weights of a checkpoint, in float64."""
    tensors = load_file(weights_file(checkpoint))
    return {name: tensor.double() for name, tensor in tensors.items()}


def averages(
    weights: list[dict[str, Tensor]], decay: float, first_step: int = 0
) -> list[dict[str, Tensor]]:
    """Compute the average after each step, in float64.

    Args:
        weights: those before the first step, and those after each.
        decay: `train.ema_decay`.
        first_step: the number of the first step, counted from 0.

    Returns:
        What the average starts with, and the average after each step.
    """
    average = {name: weight.double() for name, weight in weights[0].items()}
    result = [average]
    for step, after in enumerate(weights[1:], start=first_step):
        d = min(decay, (1 + step) / (10 + step))
        average = {name: d * average[name] + (1 - d) * w.double() for name, w in after.items()}
        result.append(average)
    return result


def assert_weights(checkpoint: Path, expected: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    """Assert that a checkpoint holds these weights, up to a relative and absolute tolerance."""
    found = saved_weights(checkpoint)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].allclose(tensor, rtol=tolerance, atol=tolerance), name


def loss_by_hand(checkpoint: Path, config: Config, file: str) -> float:
    """Return the mean loss of a file under a saved model, document by document in float64."""
    model, tokenizer = minilora.load(str(checkpoint))
    tokenizer = Tokenizer(tokenizer.directory, tokenizer.chat_template)
    documents = load_documents(file, config.data, tokenizer, "eval_file")
    total, count = 0.0, 0
    for i in range(len(documents)):
        with torch.no_grad():
            logits = model(torch.tensor(documents.ids(i), dtype=torch.int64))[:-1].double()
        labels = torch.tensor(documents.labels(i))[1:]
        total += float(F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count
