"""The planned memory of ten runs, beside what they allocate on a CPU."""

from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import train
from helpers.tiny_models import tiny
from helpers.tiny_runs import quick_config
from helpers.tiny_tokenizers import BUILDERS
from minilora.cli import validate
from minilora.config import Config
from minilora.planning.memory import CONTEXT_BYTES, plan_memory
from minilora.planning.training import plan_training
from minilora.training.metrics import StepMetrics

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}
RECOMPUTED, KEPT = True, False
RUNS: dict[str, dict] = {
    "adapters": {"train__gradient_checkpointing": RECOMPUTED},
    "adapters, activations kept": {"train__gradient_checkpointing": KEPT, "lora__dropout": 0.1},
    "adapters, some of them kept": {"train__gradient_checkpointing": 1},
    "16 bits": {"base": "16 bits", "train__gradient_checkpointing": KEPT},
    "4 bits": {"base": "16 bits", "model__bits": 4, "train__gradient_checkpointing": KEPT},
    "long document": {"words": 250, "train__batch_size": 1, "train__gradient_checkpointing": KEPT},
    "long document in tiles": {
        "words": 250,
        "train__batch_size": 1,
        "train__gradient_checkpointing": RECOMPUTED,
        "train__mlp_tile_tokens": 128,
    },
    "large vocabulary": {
        "base": "large vocabulary",
        "lora__train_embeddings": True,
        "train__gradient_checkpointing": RECOMPUTED,
    },
    "every weight, averaged": {
        "method": "full",
        "train__ema_decay": 0.9,
        "train__grad_acc_steps": 2,
        "train__gradient_checkpointing": RECOMPUTED,
    },
    "every weight in 16 bits": {
        "base": "16 bits",
        "method": "full",
        "train__optimizer": "adamw8bit",
        "train__gradient_checkpointing": KEPT,
    },
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write the base models."""
    home = tmp_path_factory.mktemp("bases")
    changes = {
        "32 bits": {"vocab_size": 2000},
        "16 bits": {"vocab_size": 2000, "torch_dtype": "bfloat16"},
        "large vocabulary": {"vocab_size": 10_000},
    }
    for name, fields in changes.items():
        tiny("mistral", **SIZES, **fields).save_pretrained(home / name)
        for file in BUILDERS["llama2"]().iterdir():
            (home / name / file.name).write_bytes(file.read_bytes())
    return {name: home / name for name in changes}


def run_config(
    directory: Path, base: Path, words: int = 40, method: str = "lora", **changes
) -> Config:
    """Return the configuration of a run over texts of one length."""
    directory.mkdir()
    text = " ".join(["light sound old new"] * words)[: 4 * words]
    rows = directory / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "{text}"}}\n' for _ in range(8)))
    settings = {
        "data__train_file": str(rows),
        "data__eval_file": None,
        "data__format": "text",
        "data__num_workers": 1,
        "model__dtype": "auto",
        "lora__rank": 8,
        "train__max_steps": 2,
        "train__save_steps": 0,
        "eval__eval_steps": 0,
        **changes,
    }
    config = quick_config(directory, base, method=method, **settings)
    validate(config)
    return config


def held_bytes(run: train.TrainingRun) -> int:
    """Add up the memory of weights and averages, each storage once."""
    model = run.loaded.model
    tensors = [*model.parameters(), *model.buffers(), *run.ema.shadow.values()]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def measured_peak(config: Config) -> int:
    """Take two steps of a run, and return the most bytes of tensors that were there at once.

    torch's allocator reports each allocation to the profiler. What is not counted is Python,
    torch's libraries, and the work space inside of matrix products.
    """
    inputs = train.read_inputs(config)
    assert inputs is not None
    run = train.set_up(config, inputs)
    held = held_bytes(run)
    metrics = StepMetrics(run.device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for step in range(2):  # the optimizer makes its states in the first one
            train.train_step(config, run, metrics, step)
    run.tracker.close(0)

    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return held + peak


@pytest.mark.system
@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what is allocated on a CPU")
@pytest.mark.parametrize("name", RUNS)
def test_planned_memory_is_that_of_the_run(name: str, bases: dict[str, Path], tmp_path: Path):
    """The plan, without the context that no allocator sees, is within 15 % of the run's peak."""
    changes = dict(RUNS[name])
    base = bases[changes.pop("base", "32 bits")]
    config = run_config(tmp_path / "run", base, **changes)
    job = plan_training(config).job_here
    assert job is not None
    planned = plan_memory(job).peak - CONTEXT_BYTES["cpu"]
    measured = measured_peak(config)
    print(f"{name}: planned {planned / 2**20:.1f} MiB, measured {measured / 2**20:.1f}")
    assert planned == pytest.approx(measured, rel=0.15)
