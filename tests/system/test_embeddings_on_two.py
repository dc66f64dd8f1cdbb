"""Runs in two processes that add tokens and train embedding and head, against one process."""

import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers import ranks
from helpers.added_token_runs import ADDED, fit, make_bases, run_config, vocab_size
from helpers.tiny_runs import metrics
from minilora.config import Config

pytestmark = pytest.mark.system

STEPS = 4
ON_TWO = {
    "ddp": {"train__batch_size": 2, "parallel__strategy": "ddp"},
    "fsdp": {"train__batch_size": 2, "parallel__strategy": "fsdp"},
    "fsdp 1 x 2": {
        "train__batch_size": 1,
        "train__grad_acc_steps": 2,
        "parallel__strategy": "fsdp",
    },
}
VARIANTS = {  # the added tokens make an odd number of rows: two processes have unequal shares
    "untied": {"base": "llama2"},
    "tied": {"base": "qwen"},
    "untied ema": {"base": "llama2", "train__ema_decay": 0.8},
    "tied bfloat16": {"base": "bfloat16"},
    "untied bfloat16": {"base": "bfloat16 untied"},
    "tied 4 bits": {"base": "qwen", "model__bits": 4},
    "full": {
        "base": "qwen",
        "method": "full",
        "lora__train_embeddings": False,
        "train__learning_rate": 1e-5,
    },
}
# (variant, layout): every variant and layout, and both layouts for each precision
CASES = [
    ("untied", "ddp"),
    ("tied bfloat16", "ddp"),
    ("tied", "fsdp 1 x 2"),
    ("untied ema", "fsdp"),
    ("tied bfloat16", "fsdp"),
    ("untied bfloat16", "fsdp"),
    ("tied 4 bits", "fsdp"),
    ("full", "fsdp"),
]
RESUMED = ("untied ema", "tied bfloat16", "tied 4 bits", "full")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


def variant_config(home: Path, bases: dict[str, Path], name: str, variant: str, **changes):
    """A run that adds as many tokens (two or three) as make the vocabulary's size odd."""
    options = {**VARIANTS[variant], **changes}
    base = bases[str(options.pop("base"))]
    tokens = ADDED if vocab_size(base) % 2 else (*ADDED, "<third>")
    assert (vocab_size(base) + len(tokens)) % 2
    settings = {
        "data__add_tokens": tokens,
        "train__max_steps": STEPS,
        "eval__eval_steps": 2,
        "model__dtype": "auto" if "bfloat16" in variant else "float32",
        **options,
    }
    return run_config(home / name, base, **settings)


@pytest.fixture(scope="module")
def alone(home: Path, bases: dict[str, Path]):
    """`alone(variant)` trains it in this process, once."""

    @functools.cache
    def run(variant: str) -> Config:
        run = variant_config(home, bases, f"{variant} alone", variant)
        fit(run)
        return run

    return run


@pytest.fixture(scope="module")
def on_two(home: Path, bases: dict[str, Path]) -> dict[str, list]:
    """The results of all runs in two processes."""
    jobs: dict[str, ranks.Job] = {}
    for variant, layout in CASES:
        name = f"{variant}, {layout}"
        jobs[name] = ranks.fit, (variant_config(home, bases, name, variant, **ON_TWO[layout]),)
    for variant in RESUMED:
        for until in (2, STEPS):
            name = f"{variant} resumed"
            run = variant_config(home, bases, name, variant, **ON_TWO["fsdp"])
            run.train.max_steps = until
            jobs[f"{name} {until}"] = ranks.fit, (run,)
    return ranks.launch(home / "jobs", 2, jobs)


def saved_tensors(home: Path, name: str) -> dict[str, Tensor]:
    """The trained tensors of a run."""
    final = home / name / "out" / "checkpoint-final"
    adapter = final / "adapter_model.safetensors"
    return load_file(adapter if adapter.is_file() else final / "model.safetensors")


@pytest.mark.parametrize(("variant", "layout"), CASES)
def test_two_processes_are_one(variant: str, layout: str, home, bases, alone, on_two):
    name = f"{variant}, {layout}"
    ranks.outcome(on_two, name)
    one = alone(variant)
    two = variant_config(home, bases, name, variant, **ON_TWO[layout])
    in_16_bits = "bfloat16" in variant
    for key in ("loss", "grad_norm", "eval/in_domain/loss", "eval/out_of_domain/loss"):
        expected = [row[key] for row in metrics(one, key)]
        assert len(expected) == (2 if "/" in key else STEPS)
        tolerance = 1e-4
        if in_16_bits:
            tolerance = 0.1 if key == "grad_norm" else 2e-2
        assert [row[key] for row in metrics(two, key)] == pytest.approx(expected, rel=tolerance), (
            key
        )

    tensors, expected_tensors = saved_tensors(home, name), saved_tensors(home, f"{variant} alone")
    assert {key: (t.shape, t.dtype) for key, t in tensors.items()} == {
        key: (t.shape, t.dtype) for key, t in expected_tensors.items()
    }
    for key, tensor in expected_tensors.items():
        gap = (tensors[key] - tensor).float().abs()
        if in_16_bits:
            # Adam makes whole steps of the rounding of tiny gradients: a few elements differ more
            assert gap.mean() < 2e-3 and gap.max() < 0.05, key
        else:
            assert gap.max() < 1e-4, key


@pytest.mark.parametrize("variant", RESUMED)
def test_resumed_on_two_is_uninterrupted(variant: str, home, on_two):
    for job in (f"{variant} resumed 2", f"{variant} resumed {STEPS}", f"{variant}, fsdp"):
        ranks.outcome(on_two, job)
    resumed = saved_tensors(home, f"{variant} resumed")
    whole = saved_tensors(home, f"{variant}, fsdp")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
