"""Tiny training runs: a random base in Hugging Face layout, a corpus of category paths, and their configuration."""

import json
import random
from pathlib import Path

import pytest

import tiny_tokenizers
import train
from minilora.config import Config
from minilora.tokenizer import Tokenizer
from tiny_models import tiny

NAMES = ["Science", "Arts", "Physics", "Optics", "Music", "Film", "Café culture", "20th-century art", "물리학", "Food, drink"]


def base_model(directory: Path, family: str = "mistral", tokenizer: str = "llama2", **changes) -> Path:
    """A random model of `family` with a tokenizer whose vocabulary it fits."""
    source = tiny_tokenizers.BUILDERS[tokenizer]()
    model = tiny(family, vocab_size=Tokenizer(source).vocab_size, max_position_embeddings=256, **changes)
    model.save_pretrained(directory)
    for file in source.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def write_paths(file: Path, rows: int, seed: int = 0) -> Path:
    """`rows` articles with two or three category paths each; upper edges are far more frequent than lower ones."""
    rng = random.Random(seed)
    with file.open("w", encoding="utf-8") as out:
        for i in range(rows):
            paths = [["Main", rng.choice(NAMES[:2]), *rng.sample(NAMES[2:], rng.randint(1, 3))] for _ in range(rng.randint(2, 3))]
            abstract = " ".join(rng.choices(["light", "sound", "old", "new", "work", "of", "the"], k=rng.randint(3, 25)))
            row = {"id": str(i), "title": f"Topic {i}", "abstract": abstract, "paths": paths}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    return file


def config(tmp_path: Path, base: Path, rows: int = 26, **overrides) -> Config:
    """A LoRA run of a few dozen steps; overrides are `section__field=value`."""
    config = Config(output_dir=str(tmp_path / "out"))
    config.model.name, config.model.dtype = str(base), "float32"
    config.lora.rank, config.lora.alpha = 4, 8
    config.data.train_file = str(write_paths(tmp_path / "train.jsonl", rows))
    config.data.eval_file = str(write_paths(tmp_path / "eval.jsonl", 6, seed=1))
    config.data.chat_template = "mistral"
    config.train.batch_size, config.train.epochs, config.train.learning_rate = 4, 3.0, 1e-2
    config.train.warmup_steps, config.train.logging_steps, config.train.gradient_checkpointing = 3, 1, False
    config.eval.eval_steps, config.eval.num_generate_samples, config.eval.max_new_tokens = 1000, 1, 4
    config.log.tensorboard = False
    for name, value in overrides.items():
        section, _, field = name.rpartition("__")
        setattr(getattr(config, section) if section else config, field, value)
    return config


def poison_loss(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Make the call-th loss of a run NaN."""
    real, calls = train.cross_entropy_sum, []

    def poisoned(hidden, weight, labels):
        calls.append(1)
        return real(hidden, weight, labels) * (float("nan") if len(calls) == call else 1.0)

    monkeypatch.setattr(train, "cross_entropy_sum", poisoned)


def metrics(config: Config, key: str = "loss") -> list[dict]:
    """The events of a run that hold `key`."""
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if key in row]


def losses(config: Config) -> list[float]:
    return [row["loss"] for row in metrics(config)]
