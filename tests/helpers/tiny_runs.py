"""Tiny training runs: a random base model, a corpus of category paths, and their configuration."""

import json
import random
from pathlib import Path

import pytest
import torch

import train
from helpers import tiny_tokenizers
from helpers.tiny_models import tiny
from minilora.config import Config
from minilora.data.tokenizer import Tokenizer
from minilora.model import transformer

NAMES = [
    "Science",
    "Arts",
    "Physics",
    "Optics",
    "Music",
    "Film",
    "Café culture",
    "20th-century art",
    "물리학",
    "Food, drink",
]
WORDS = ["light", "sound", "old", "new", "work", "of", "the"]


def base_model(
    directory: Path, family: str = "mistral", tokenizer: str = "llama2", **changes
) -> Path:
    """Write a random model of `family` and a tokenizer whose vocabulary it fits.

    Args:
        directory: where to write both, in Hugging Face layout.
        family: a key of `tiny_models.FAMILIES`.
        tokenizer: a key of `tiny_tokenizers.BUILDERS`.
        changes: fields of config.json to change.
    """
    source = tiny_tokenizers.BUILDERS[tokenizer]()
    vocab_size = Tokenizer(source).vocab_size
    model = tiny(family, vocab_size=vocab_size, max_position_embeddings=256, **changes)
    model.save_pretrained(directory)
    for file in source.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def write_paths(file: Path, rows: int, seed: int = 0) -> Path:
    """Write `rows` articles with two or three category paths each.

    Edges near the root occur far more often than those near the leaves.
    """
    rng = random.Random(seed)
    with file.open("w", encoding="utf-8") as out:
        for i in range(rows):
            paths = []
            for _ in range(rng.randint(2, 3)):
                field = rng.choice(NAMES[:2])
                paths.append(["Main", field, *rng.sample(NAMES[2:], rng.randint(1, 3))])
            abstract = " ".join(rng.choices(WORDS, k=rng.randint(3, 25)))
            row = {"id": str(i), "title": f"Topic {i}", "abstract": abstract, "paths": paths}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    return file


def config(tmp_path: Path, base: Path, rows: int = 26, **overrides) -> Config:
    """Return the configuration of a LoRA run of a few dozen steps.

    Args:
        tmp_path: the run writes to its subdirectory out; the data files lie beside it.
        base: directory of the base model.
        rows: rows of the training file.
        overrides: `section__field=value`, or `field=value` for the fields of Config itself.
    """
    config = Config(output_dir=str(tmp_path / "out"))
    config.model.name = str(base)
    config.model.dtype = "float32"
    config.lora.rank = 4
    config.lora.alpha = 8
    config.data.train_file = str(write_paths(tmp_path / "train.jsonl", rows))
    config.data.eval_file = str(write_paths(tmp_path / "eval.jsonl", 6, seed=1))
    config.data.chat_template = "mistral"
    config.train.batch_size = 4
    config.train.epochs = 3.0
    config.train.learning_rate = 1e-2
    config.train.warmup_steps = 3
    config.train.logging_steps = 1
    config.train.gradient_checkpointing = False
    config.eval.eval_steps = 1000
    config.eval.num_generate_samples = 1
    config.eval.max_new_tokens = 4
    config.log.tensorboard = False

    for name, value in overrides.items():
        section, _, field = name.rpartition("__")
        target = getattr(config, section) if section else config
        setattr(target, field, value)
    return config


def quick_config(directory: Path, base: Path, **changes) -> Config:
    """Return the configuration of a run that generates no samples unless told."""
    directory.mkdir(exist_ok=True)
    return config(directory, base, **{"eval__num_generate_samples": 0, **changes})


def run(directory: Path, base: Path, **changes) -> Config:
    """Train with a quick configuration, and return it."""
    settings = quick_config(directory, base, **changes)
    assert train.main(settings) == 0
    return settings


def poison_loss(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Make the loss of a run's micro-batch number `call` (from 1) NaN; evaluations do not count."""
    real, calls = transformer.cross_entropy_sum, []

    def poisoned(hidden, weight, labels):
        loss = real(hidden, weight, labels)
        if not torch.is_grad_enabled():
            return loss
        calls.append(1)
        return loss * (float("nan") if len(calls) == call else 1.0)

    monkeypatch.setattr(transformer, "cross_entropy_sum", poisoned)


def metrics(config: Config, key: str = "loss") -> list[dict]:
    """Return the events in a run's metrics.jsonl that hold `key`."""
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if key in row]


def losses(config: Config) -> list[float]:
    """Return the losses that a run logged."""
    return [row["loss"] for row in metrics(config)]
