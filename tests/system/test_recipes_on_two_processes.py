"""The recipes that share a model between processes: configs/instruct.py and configs/full.py."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import pytest
import torch
from safetensors.torch import load_file

import minilora
from helpers import ranks
from helpers.processes import TORCHRUN
from helpers.qlora import logits_of, reference_model
from helpers.recipes import (
    COMMON,
    RECIPES,
    ROOT,
    SIZES,
    as_flags,
    events,
    load_recipe,
    make_base,
    read_rows,
)
from helpers.tiny_runs import base_model

pytestmark = pytest.mark.system

# see helpers/recipes.py for the reasons
FULL_FLAGS = {
    "train.learning_rate": 2e-3,
    "train.save_steps": 15,
    "eval.eval_steps": 20,
    "eval.max_new_tokens": 8,
}
FULL_STEPS = 40


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # the files of a config are relative to it
        yield tmp_path_factory.mktemp("recipes")


# ---- instruct: every process has a copy, or a shard


@pytest.fixture(scope="module")
def instruct(home: Path) -> dict[str, Path]:
    """The output directories of the instruct recipe, by strategy."""
    recipe = RECIPES["instruct llama3"]
    base = make_base(recipe, home / "instruct-base")
    flags = as_flags({**COMMON, **recipe.flags, "model.name": base, "train.max_steps": 4})
    outputs, jobs = {}, {}
    for strategy in ("ddp", "fsdp"):
        outputs[strategy] = home / strategy
        place = ["--output_dir", str(home / strategy), "--parallel.strategy", strategy]
        jobs[strategy] = (ranks.fit, (load_recipe("instruct", *flags, *place),))
    results = ranks.launch(home / "jobs", 2, jobs)
    for name in jobs:
        ranks.outcome(results, name)
    return outputs


def test_instruct_gives_the_same_figures_with_copies_and_shards(instruct: dict[str, Path]):
    """Before the first step, after it, and of the moving average."""
    for key in ("loss", "eval/in_domain/loss", "eval/out_of_domain/loss"):
        copies, shards = events(instruct["ddp"], key), events(instruct["fsdp"], key)
        steps = {1, 2, 3, 4} if key == "loss" else {0, 2, 4}
        assert copies.keys() == shards.keys() == steps
        assert copies == pytest.approx(shards, rel=0.01)

    shapes = []
    for out in instruct.values():
        tensors = load_file(out / "checkpoint-final" / "adapter_model.safetensors")
        shapes.append({name: tensor.shape for name, tensor in tensors.items()})
    assert shapes[0] == shapes[1]


# ---- full: every process has a shard


@dataclass
class FullRun:
    """The full recipe, trained whole and trained with an interruption."""

    base: Path
    whole: Path
    resumed: Path
    stopped_at: int
    """The step at which the second run was stopped."""


def start_full(out: Path, flags: list[str]) -> subprocess.Popen:
    """Start the full recipe on two processes."""
    script = [str(ROOT / "train.py"), str(ROOT / "configs/full.py"), "--output_dir", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*TORCHRUN, *script, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=ROOT,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Wait for a run; returns exit code and output."""
    output, _ = process.communicate(timeout=200)
    return process.returncode, output


def wait_for_step(out: Path, step: int, process: subprocess.Popen) -> None:
    """Wait until a run has logged a step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (out / "metrics.jsonl").is_file() and max(events(out, "loss"), default=0) >= step:
            return
        assert process.poll() is None, finish(process)
        time.sleep(0.02)
    raise AssertionError(f"no step {step} within two minutes")


@pytest.fixture(scope="module")
def full(home: Path) -> FullRun:
    base = base_model(home / "full-base", "llama3", "llama3", torch_dtype="bfloat16", **SIZES)
    flags = as_flags({**COMMON, **FULL_FLAGS, "model.name": base})
    whole, resumed = home / "full" / "whole", home / "full" / "resumed"
    code, output = finish(start_full(whole, flags))
    assert code == 0, output

    process = start_full(resumed, flags)
    wait_for_step(resumed, 3, process)
    process.send_signal(signal.SIGTERM)
    _, output = finish(process)
    (checkpoint,) = resumed.glob("checkpoint-*")
    assert checkpoint.name != "checkpoint-final", output
    code, output = finish(start_full(resumed, flags))
    assert code == 0, output
    return FullRun(base, whole, resumed, int(checkpoint.name.split("-")[1]))


def test_full_interrupted_ends_as_uninterrupted(full: FullRun):
    assert 3 <= full.stopped_at < FULL_STEPS
    assert events(full.resumed, "loss") == events(full.whole, "loss")
    name = "checkpoint-final/model.safetensors"
    assert (full.whole / name).read_bytes() == (full.resumed / name).read_bytes()


def test_full_learns(full: FullRun):
    losses = list(events(full.whole, "loss").values())
    assert len(losses) == FULL_STEPS
    assert fmean(losses[-10:]) < 0.9 * fmean(losses[:10])

    before = load_file(full.base / "model.safetensors")
    after = load_file(full.whole / "checkpoint-final" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == torch.bfloat16
        assert not torch.equal(before[name], tensor), name


def test_full_model_is_loaded_by_transformers(full: FullRun):
    final = full.whole / "checkpoint-final"
    tokens = torch.randint(500, (120,), generator=torch.Generator().manual_seed(0))
    ours, _ = minilora.load(str(final), dtype="float32")
    with torch.no_grad():
        found = ours(tokens)
    expected = logits_of(reference_model(final), tokens)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_full_model_answers_a_thousand_prompts_on_two_processes(full: FullRun, tmp_path: Path):
    """One output file, each prompt answered once and in order."""
    source, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    rows = [{"id": f"q{i}", "prompt": f"What is {i} + {i * 7 % 13}?"} for i in range(1000)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--input", str(source), "--output", str(output)]
    flags += ["--max_new_tokens", "4", "--batch_size", "64"]
    final = full.whole / "checkpoint-final"
    done = ranks.torchrun(2, str(ROOT / "infer.py"), str(final), *flags)
    assert done.returncode == 0, done.stderr

    answers = read_rows(output)
    assert [{"id": row["id"], "prompt": row["prompt"]} for row in answers] == rows
    texts = [row["generated"] for row in answers]
    assert all(isinstance(text, str) for text in texts) and len(set(texts)) > 1
    assert "1000 of 1000 answers" in done.stderr
