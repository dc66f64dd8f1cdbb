"""Tiny runs that add special tokens and train embedding and head."""

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import train
from helpers.tiny_runs import base_model, config
from minilora.cli import validate
from minilora.config import Config
from minilora.model.transformer import CausalLM

ADDED = ("<edge>", "<|끝|>")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHORT_RUN = {
    "data__format": "prompt",
    "data__chat": False,
    "train__batch_size": 4,
    "train__warmup_steps": 0,
    "train__learning_rate": 3e-3,
    "train__max_steps": 4,
    "eval__num_generate_samples": 2,
}


def write_jsonl(file: Path, rows: list[dict]) -> str:
    """Write rows as JSON lines; returns the file's name."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    file.write_text("".join(lines), encoding="utf-8")
    return str(file)


def write_rows(file: Path, count: int = 12) -> str:
    """Write rows of prompt and completion that use the two added tokens."""
    words = ["music", "art", "history", "physics"]
    edge, end = ADDED
    rows = []
    for i in range(count):
        prompt = f"a{edge}{words[i % 4]} "
        rows.append({"prompt": prompt, "completion": f"{words[i % 3]} {edge}b{i}{end}"})
    return write_jsonl(file, rows)


def run_config(tmp_path: Path, base: Path, **changes) -> Config:
    """Return a run over those rows that adds the two tokens and trains embedding and head.

    Args:
        tmp_path: made if it does not exist; see `tiny_runs.config`.
        base: directory of the base model.
        changes: `section__field=value`.
    """
    tmp_path.mkdir(exist_ok=True)
    rows = write_rows(tmp_path / "rows.jsonl")
    settings = {
        **SHORT_RUN,
        "data__train_file": rows,
        "data__eval_file": rows,
        "data__add_tokens": ADDED,
        "lora__train_embeddings": True,
        **changes,
    }
    return config(tmp_path, base, **settings)


def fit(run: Config) -> Path:
    """Check the settings and train; returns the last checkpoint."""
    validate(run)
    assert train.main(run) == 0
    return Path(run.output_dir) / "checkpoint-final"


def vocab_size(directory: Path) -> int:
    """Return the vocabulary size in a model's config.json."""
    return json.loads((directory / "config.json").read_text())["vocab_size"]


def load_reference(directory: Path) -> PreTrainedModel:
    """Load a model with transformers, in its own dtype; every tensor must be used."""
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, dtype="auto"
    )
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def logits_of(model, tokens: Tensor) -> Tensor:
    """Return the logits [T, V] of minilora's or transformers' model for tokens [T]."""
    if isinstance(model, CausalLM):
        return model(tokens)
    return model(input_ids=tokens[None]).logits[0]


def copy_files(source: Path, target: Path) -> Path:
    """Copy the files of a directory into another, which is made; returns it."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def make_bases(home: Path) -> dict[str, Path]:
    """Write tiny base models of several families."""
    bfloat16 = {"torch_dtype": "bfloat16"}
    tied = {"tie_word_embeddings": True}
    return {
        "llama2": base_model(home / "llama2", "llama3", "llama2"),
        "mistral": base_model(home / "mistral", "llama2", "mistral"),  # sentencepiece
        "llama3": base_model(home / "llama3", "llama3", "llama3"),
        "qwen": base_model(home / "qwen", "qwen3", "qwen", **tied),
        "bfloat16": base_model(home / "bfloat16", "qwen3", "qwen", **tied, **bfloat16),
        "bfloat16 untied": base_model(home / "bfloat16 untied", "mistral", "llama2", **bfloat16),
    }
