"""A finished run, and what of its checkpoints should be on the hub."""

import json
from pathlib import Path

import train
from helpers import tiny_runs
from minilora.config import Config

LOCAL_FILES = {
    "training_state.safetensors",
    "training_state",
    "trainer_state.json",
    "manifest.json",
}
"""What of a checkpoint only resuming needs."""


def finished_run(directory: Path) -> Config:
    """Train a LoRA over a local base, both in `directory`. Returns the run's config."""
    base = tiny_runs.base_model(directory / "the-base")
    config = tiny_runs.config(directory, base, rows=8, train__max_steps=3, eval__eval_steps=2)
    assert train.main(config) == 0
    return config


def final(config: Config) -> Path:
    """Return a run's last checkpoint."""
    return Path(config.output_dir) / "checkpoint-final"


def uploadable_files(checkpoint: Path) -> dict[str, bytes]:
    """Return what of a checkpoint should be on the hub: nothing local, neither files nor paths."""
    files = {p.name: p.read_bytes() for p in checkpoint.iterdir() if p.name not in LOCAL_FILES}
    if "adapter_config.json" in files:
        raw = json.loads(files["adapter_config.json"])
        raw["base_model_name_or_path"] = raw["base_model_name_or_path"].rpartition("/")[2]
        files["adapter_config.json"] = json.dumps(raw, indent=2).encode()
    return files
