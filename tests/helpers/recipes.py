"""The recipes of configs/, made small enough to be run as they are written.

A run goes through the real scripts' main with the real config file, on a tiny random model of the
recipe's family. What differs is a flag, listed here with its reason.
"""

import contextlib
import io
import itertools
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from torch import Tensor, nn

import merge
import train
from helpers.hub_server import Hub
from helpers.tiny_runs import base_model
from minilora.cli import load_config
from minilora.config import Config
from minilora.tracking.hub_upload import HubUploader
from minilora.tracking.tracker import Tracker
from minilora.training.ema import EMA

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "hidden_size": 64,  # whole blocks of NF4 in each row
    "intermediate_size": 128,
    "num_attention_heads": 2,  # of long documents, attention takes most of the time
    "num_key_value_heads": 1,
    "head_dim": 32,
}


def load_recipe(name: str, *flags: str) -> Config:
    """Load a recipe as the command line does."""
    return load_config([str(ROOT / "configs" / f"{name}.py"), *flags])


def as_flags(values: dict[str, object]) -> list[str]:
    """Return command-line flags that set fields of the configuration."""
    flags = []
    for name, value in values.items():
        flags += [f"--{name}", str(value)]
    return flags


def read_rows(file: Path) -> list[dict]:
    """Read a JSON lines file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def events(out: Path, key: str) -> dict[int, float]:
    """Return {step: value} of the events of a run that have a figure."""
    rows = read_rows(out / "metrics.jsonl")
    return {row["step"]: row[key] for row in rows if key in row}


# ---- the recipes made small


@dataclass
class Recipe:
    """How a recipe is made small."""

    config: str
    """Its name in configs/."""
    family: str
    tokenizer: str
    flags: dict[str, object]
    """Everything that differs from its file."""
    interrupted: tuple[int, str]
    """After how many steps its second run is interrupted, and by what."""
    metrics: tuple[str, ...]
    """How infer.py scores its answers."""
    files: str
    """Its directory in examples/."""
    max_new_tokens: int | None = None
    """Longest answer to the evaluation file, if infer.py's default takes too long."""
    base_id: str | None = None
    """The base's name on the hub; without one the run names it by its directory."""


# The reasons are the same everywhere. A random model of this size learns nothing at a rate that is
# meant for a pretrained 8B. The example files make tens of steps, not thousands: logs, evaluations,
# checkpoints and warmup must come sooner. A random model does not end its answers: they are cut.
# Evaluations are of few rows, to save time.
COMMON: dict[str, object] = {"train.logging_steps": 1, "data.eval_size": 24}
RECIPES = {
    "wiki": Recipe(
        config="wiki",
        family="mistral",
        tokenizer="llama2",
        flags={
            "train.learning_rate": 5e-3,
            "train.warmup_steps": 4,
            "eval.eval_steps": 16,
            "eval.max_new_tokens": 8,
        },
        interrupted=(21, "crash"),
        metrics=("graph",),
        files="wiki",
        max_new_tokens=48,
    ),
    "arxiv": Recipe(
        config="arxiv",
        family="mistral",
        tokenizer="llama2",
        # model.name differs too: it is the merged result of the wiki recipe, as in the file, but
        # where the test has put it
        flags={"train.learning_rate": 5e-3, "eval.max_new_tokens": 8},
        interrupted=(40, "SIGTERM"),
        metrics=("graph",),
        files="wiki",
        max_new_tokens=48,
    ),
    "price": Recipe(
        config="price",
        family="llama3",
        tokenizer="llama3",
        flags={
            "train.optimizer": "adamw",  # paging moves states out of a GPU, and there is none
            "hub.repo_id": "tester/price",  # the account that the test's hub knows
            "train.learning_rate": 1e-2,
            "train.epochs": 3,
            "train.save_steps": 4,
            "eval.eval_steps": 9,
        },
        interrupted=(10, "SIGTERM"),
        metrics=("numeric",),
        files="price",
        max_new_tokens=8,
        base_id="tester/price-base",
    ),
    "kanana": Recipe(
        config="kanana",
        family="llama3",
        tokenizer="llama3",
        flags={
            "train.optimizer": "adamw8bit",  # as for price
            "train.learning_rate": 1e-2,
            "train.epochs": 4,  # 36 rows are two steps an epoch
            "eval.max_new_tokens": 16,
        },
        interrupted=(5, "crash"),
        metrics=("exact_match", "edit_distance", "chrf"),
        files="kanana",
        max_new_tokens=64,
    ),
}
INSTRUCT_FLAGS: dict[str, object] = {
    # so few rows that they are soon learnt by heart, and other rows are answered worse
    "data.train_size": 8,
    "train.learning_rate": 2e-2,
    "train.warmup_steps": 2,
    "train.epochs": 40,
    "eval.eval_steps": 2,
    "eval.max_new_tokens": 8,
}
for _family, _tokenizer, _how in (("llama3", "llama3", "crash"), ("qwen2", "qwen", "SIGTERM")):
    RECIPES[f"instruct {_family}"] = Recipe(
        config="instruct",
        family=_family,
        tokenizer=_tokenizer,
        flags=INSTRUCT_FLAGS,
        interrupted=(9, _how),
        metrics=("ppl", "bleu", "edit_distance", "rouge", "meteor"),
        files="instruct",
        max_new_tokens=16,
    )


def make_base(recipe: Recipe, directory: Path) -> Path:
    """Write a tiny random model in 16 bits, as the real one is published."""
    base = base_model(directory, recipe.family, recipe.tokenizer, torch_dtype="bfloat16", **SIZES)
    if recipe.config in ("price", "kanana"):
        # Llama's base models end a text with another token than a turn, and have no chat template
        file = base / "tokenizer_config.json"
        config = json.loads(file.read_text())
        config["eos_token"] = "<|end_of_text|>"
        del config["chat_template"]
        file.write_text(json.dumps(config))
    return base


# ---- runs


@dataclass
class Run:
    """What is left of a recipe that was trained twice, once with an interruption, and merged."""

    name: str
    recipe: Recipe
    base: Path
    flags: list[str]
    whole: Path
    """Output directory of the run without an interruption."""
    resumed: Path
    """That of the run with one."""
    hub: Hub
    train_log: str = ""
    """What train.py printed in the run without an interruption."""
    verify_log: str = ""
    """What merge.py --verify printed."""
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    """Weights before the first step and after each, as the moving average takes them in."""

    @property
    def final(self) -> Path:
        return self.whole / "checkpoint-final"

    @property
    def merged(self) -> Path:
        """The merged model in the dtype of the base."""
        return self.final / "merged"

    @property
    def exact(self) -> Path:
        """The merged model in float32; over 4 bits, merged into the weights trained over."""
        return self.final / "exact"

    @property
    def eval_file(self) -> Path:
        return ROOT / "examples" / self.recipe.files / "eval.jsonl"

    def config(self, out: Path, *flags: str) -> Config:
        return load_recipe(self.recipe.config, "--output_dir", str(out), *self.flags, *flags)

    @property
    def hub_id(self) -> str:
        """The run's repository on the hub."""
        return f"tester/{self.name.replace(' ', '-')}"

    def eval_losses(self) -> dict[int, float]:
        return events(self.whole, "eval/out_of_domain/loss")


class Crash(Exception):
    """What a run is made to fail with."""


@contextlib.contextmanager
def interruption(step: int, how: str) -> Iterator[None]:
    """Let the run fail, or be asked to stop, after this many steps."""
    real, taken = Tracker.step, itertools.count(1)

    def interrupted_step(tracker: Tracker) -> None:
        real(tracker)
        if next(taken) != step:
            return
        if how == "crash":
            raise Crash
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracker, "step", interrupted_step)
        yield


@contextlib.contextmanager
def recorded_weights(weights: list[dict[str, Tensor]]) -> Iterator[None]:
    """Record the weights before the first step and after each."""

    class RecordingEMA(EMA):
        def __init__(self, parameters: dict[str, nn.Parameter], decay: float | None):
            super().__init__(parameters, decay)
            self.record()

        def update(self, step: int) -> None:
            super().update(step)
            self.record()

        def record(self) -> None:
            weights.append({name: p.detach().clone() for name, p in self.parameters.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "EMA", RecordingEMA)
        yield


def run_recipe(name: str, base: Path, home: Path, hub: Hub) -> Run:
    """Train a recipe whole, and again with an interruption, and merge the result twice."""
    recipe = RECIPES[name]
    if recipe.base_id is not None:
        hub.add_directory(recipe.base_id, base)
    flags = as_flags({**COMMON, **recipe.flags, "model.name": recipe.base_id or base})
    run = Run(name, recipe, base, flags, home / name / "whole", home / name / "resumed", hub)

    log = io.StringIO()
    with contextlib.redirect_stderr(log), recorded_weights(run.weights):
        assert train.main(run.config(run.whole)) == 0
    run.train_log = log.getvalue()

    step, how = recipe.interrupted
    with interruption(step, how):
        if how == "crash":
            with pytest.raises(Crash):
                train.main(run.config(run.resumed))
        else:
            assert train.main(run.config(run.resumed)) == 128 + signal.SIGTERM
    assert not (run.resumed / "checkpoint-final").exists()
    assert train.main(run.config(run.resumed)) == 0

    assert merge.main(merge.Args(str(run.final))) == 0
    args = merge.Args(str(run.final), dtype="float32", verify=True, out=str(run.exact))
    args.from_quantized = run.config(run.whole).model.bits == 4
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        assert merge.main(args) == 0
    run.verify_log = log.getvalue()
    return run


# ---- where a model can be asked


@dataclass
class Place:
    """A model, as infer.py and `minilora.load` are given it."""

    model: str
    adapter: str | None = None


def push(run: Run) -> None:
    """Upload a run's last checkpoint as train.py does, if it has not done so."""
    if run.hub_id in run.hub.repos:
        return
    config = run.config(run.whole, "--hub.push", "True", "--hub.repo_id", run.hub_id)
    uploader = HubUploader(config)
    uploader.push(run.final, max(events(run.whole, "loss")), "final")
    uploader.close(60)
    assert run.hub_id in run.hub.repos


def places_of(run: Run) -> dict[str, Place]:
    """Return the places of a run's model: its checkpoint and the merged model, here and on the hub.

    The merged model is the exact one: in float32, and over 4 bits of the weights trained over.
    """
    push(run)
    run.hub.add_directory(f"{run.hub_id}-merged", run.exact)
    on_hub = Place(str(run.base), adapter=run.hub_id)
    if run.recipe.base_id is not None:
        on_hub = Place(run.hub_id)
    return {
        "checkpoint": Place(str(run.final)),
        "on the hub": on_hub,
        "merged": Place(str(run.exact)),
        "merged, on the hub": Place(f"{run.hub_id}-merged"),
    }


def places_of_full_model(home: Path, hub: Hub) -> dict[str, Place]:
    """Take two steps of the full recipe, which pushes; return the places of its model."""
    base = base_model(home / "full-base", "llama3", "llama3", torch_dtype="bfloat16", **SIZES)
    flags: dict[str, object] = {
        "model.name": base,
        "train.learning_rate": 2e-3,
        "train.max_steps": 2,
        "eval.num_generate_samples": 0,
        "data.eval_size": 2,
        "hub.push": True,
        "hub.repo_id": "tester/full",
    }
    out = home / "full"
    assert train.main(load_recipe("full", "--output_dir", str(out), *as_flags(flags))) == 0
    return {
        "checkpoint": Place(str(out / "checkpoint-final")),
        "on the hub": Place("tester/full"),
    }
