"""The recipes in configs/: their values, and each run as it is written, on a tiny random model of its family.

A run goes through the real scripts' main with the real config file; what differs is a flag, listed below with its reason.
Each recipe is trained whole, trained again with an interruption, merged, asked and loaded by transformers.
"""

import contextlib
import copy
import functools
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import huggingface_hub
import pytest
import sacrebleu
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import infer
import merge
import minilora
import ranks
import tiny_tokenizers
import train
from hub_server import Hub
from minilora.config import Config, UserError
from minilora.running.ema import EMA
from minilora.running.examples import ask, trained_format
from minilora.running.settings import check_device, leaves, load_config
from minilora.tracking import Tracker
from test_qlora import logits_of, theirs
from tiny_runs import base_model

ROOT = Path(__file__).resolve().parent.parent
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
BITS4 = {"model.bits": 4, "model.double_quant": True}
OLLM = {"method": "lora", "data.format": "paths", "data.edge_dropping": True, "data.chat_template": "mistral",
        "data.max_seq_length": 2048, "model.bits": 16, "train.lr_scheduler": "constant_with_warmup", "train.batch_size": 8,
        "train.grad_acc_steps": 1, "train.warmup_ratio": None}  # fmt: skip

# What each recipe must say, from its source; what it leaves open is not here.
TABLE: dict[str, dict[str, object]] = {
    "wiki": {
        **OLLM, "model.name": "mistralai/Mistral-7B-Instruct-v0.2", "lora.rank": 32, "lora.alpha": 16, "train.learning_rate": 1e-5,
        "train.warmup_steps": 100, "train.epochs": 2, "eval.eval_steps": 500, "train.max_steps": None,
    },
    "arxiv": {
        **OLLM, "model.name": "out/wiki/checkpoint-final/merged", "lora.rank": 8, "lora.alpha": 8, "train.learning_rate": 3e-6,
        "train.warmup_steps": 10, "train.epochs": 3, "data.train_size": 2048, "data.eval_size": 256, "eval.eval_steps": 32,
        "train.group_by_length": False,
    },
    "price": {
        **BITS4, "method": "lora", "model.name": "meta-llama/Llama-3.1-8B", "data.format": "text",
        "data.response_marker": "Price is $", "train.learning_rate": 1e-4, "train.lr_scheduler": "cosine",
        "train.warmup_ratio": 0.03, "train.weight_decay": 0.001, "train.max_grad_norm": 0.3, "train.optimizer": "paged_adamw",
        "lora.target_modules": ATTENTION, "lora.dropout": 0.1, "hub.push": True,
    },
    "kanana": {
        **BITS4, "method": "lora", "model.name": "kakaocorp/kanana-1.5-8b-base", "data.format": "prompt", "data.chat": False,
        "lora.rank": 64, "lora.alpha": 128, "lora.dropout": 0.05, "train.learning_rate": 2e-4, "train.batch_size": 4,
        "train.grad_acc_steps": 8, "data.max_seq_length": 1024, "train.epochs": 1, "train.save_steps": "epoch",
    },
    "instruct": {
        "method": "lora", "model.name": "meta-llama/Llama-3.1-8B-Instruct", "data.format": "messages",
        "train.lr_scheduler": "cosine", "train.min_lr_ratio": 0.01, "train.warmup_steps": 2000, "train.warmup_ratio": None,
        "train.early_stopping_patience": 5, "eval.metrics": ("ppl", "bleu", "edit_distance", "rouge", "meteor"),
        "data.eval_size": 512, "data.eval_first": True, "eval.eval_on_start": True, "train.ema_decay": 0.999,
        "parallel.strategy": "ddp",
    },
    "full": {
        "method": "full", "model.name": "meta-llama/Llama-3.1-8B-Instruct", "model.dtype": "bfloat16", "parallel.strategy": "fsdp",
        "model.bits": 16,
    },
}  # fmt: skip


def of_file(name: str, *flags: str) -> Config:
    """A recipe as the command line reads it."""
    return load_config([str(ROOT / "configs" / f"{name}.py"), *flags])


@pytest.mark.parametrize("name", TABLE)
def test_values(name: str):
    found = leaves(of_file(name))
    assert {key: found[key] for key in TABLE[name]} == TABLE[name]


def test_the_form_of_kanana():
    data = of_file("kanana").data
    whole = (data.prompt_template + data.response_template).format(question="왜?", answer="그래서.")
    assert whole == "### 질문: 왜?\n\n### 답변: 그래서."


# ---- the runs


@dataclass
class Recipe:
    """How a recipe is made small. flags: everything that differs from its file."""

    config: str
    family: str
    tokenizer: str
    flags: dict[str, object]
    interrupted: tuple[int, str]  # after so many steps, by what
    metrics: tuple[str, ...]
    files: str
    tokens: int | None = None  # longest answer to the evaluation file, if infer.py's default takes too long


# The reasons are the same everywhere: a random model of this size learns nothing at a rate meant for a pretrained 8B; the
# example files make tens of steps, not thousands, so that logs, evaluations, checkpoints and warmup must come sooner; a random
# model does not end its answers, so that they are cut short to save time.
COMMON = {"train.logging_steps": 1}
RECIPES = {
    "wiki": Recipe(
        "wiki", "mistral", "mistral",
        {"train.learning_rate": 5e-3, "train.warmup_steps": 4, "eval.eval_steps": 16, "eval.max_new_tokens": 8},
        (21, "crash"), ("graph",), "wiki", 48,
    ),
    "arxiv": Recipe(
        "arxiv", "mistral", "mistral",
        # model.name too: a merged result of the wiki recipe, as in the file, but where this test has put it
        {"train.learning_rate": 5e-3, "eval.max_new_tokens": 8},
        (40, "SIGTERM"), ("graph",), "wiki", 48,
    ),
    "price": Recipe(
        "price", "llama3", "llama3",
        {"train.optimizer": "adamw",  # paging moves states out of a GPU's memory, and there is none
         "hub.repo_id": "tester/price",  # the account that the test's hub knows
         "train.learning_rate": 1e-2, "train.epochs": 3, "train.save_steps": 4, "eval.eval_steps": 9},
        (10, "SIGTERM"), ("numeric",), "price", 8,
    ),
    "kanana": Recipe(
        "kanana", "llama3", "llama3",
        {"train.optimizer": "adamw8bit",  # as for price
         "train.learning_rate": 1e-2, "train.epochs": 4, "eval.max_new_tokens": 16},  # 36 rows are two steps an epoch
        (5, "crash"), ("exact_match", "edit_distance", "chrf"), "kanana", 64,
    ),
    **{
        f"instruct {family}": Recipe(
            "instruct", family, tokenizer,
            {"train.learning_rate": 5e-2, "train.warmup_steps": 2, "train.epochs": 6, "eval.eval_steps": 2,
             "eval.max_new_tokens": 8},
            (9, how), ("ppl", "bleu", "edit_distance", "rouge", "meteor"), "instruct", 16,
        )
        for family, tokenizer, how in (("llama3", "llama3", "crash"), ("qwen2", "qwen", "SIGTERM"))
    },
}  # fmt: skip
SIZES = {"hidden_size": 64, "intermediate_size": 128}  # whole blocks of NF4 in each row
FULL = {"train.learning_rate": 2e-3, "train.save_steps": 15, "eval.eval_steps": 20, "eval.max_new_tokens": 8}


class Crash(Exception):
    pass


@dataclass
class Run:
    recipe: Recipe
    base: Path
    flags: list[str]
    whole: Path
    resumed: Path
    said: str = ""  # by train.py
    verified: str = ""  # by merge.py
    hub: Hub | None = None
    averages: list[dict[str, Tensor]] = field(default_factory=list)  # the weights that EMA took in, first those it began with

    @property
    def final(self) -> Path:
        return self.whole / "checkpoint-final"

    @property
    def merged(self) -> Path:
        return self.final / "merged"

    @property
    def source(self) -> Path:
        return ROOT / "examples" / self.recipe.files / "eval.jsonl"

    def config(self, out: Path) -> Config:
        return of_file(self.recipe.config, "--output_dir", str(out), *self.flags)


def as_flags(values: dict[str, object]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def events(out: Path, key: str) -> dict[int, float]:
    """step -> value of the events of a run that have one."""
    rows = read_rows(out / "metrics.jsonl")
    return {row["step"]: row[key] for row in rows if key in row}


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@contextlib.contextmanager
def interruption(step: int, how: str) -> Iterator[None]:
    """The run falls over, or is asked to stop, after so many steps."""
    real, taken = Tracker.step, itertools.count(1)

    def stepping(tracker: Tracker) -> None:
        real(tracker)
        if next(taken) == step:
            if how == "crash":
                raise Crash
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracker, "step", stepping)
        yield


@contextlib.contextmanager
def recording(into: list[dict[str, Tensor]]) -> Iterator[None]:
    """The weights before the first step and after each, as the average gets to see them."""

    class Recorded(EMA):
        def __init__(self, parameters: dict[str, nn.Parameter], decay: float | None):
            super().__init__(parameters, decay)
            self.note()

        def note(self) -> None:
            into.append({name: p.detach().clone() for name, p in self.parameters.items()})

        def update(self, step: int) -> None:
            super().update(step)
            self.note()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "EMA", Recorded)
        yield


def base_of(recipe: Recipe, directory: Path) -> Path:
    """A tiny random model in 16 bits, as the real one is published."""
    base = base_model(directory, recipe.family, recipe.tokenizer, torch_dtype="bfloat16", **SIZES)
    if recipe.config in ("price", "kanana"):  # Llama's base models end a text with another token than a turn, and know no turns
        config = json.loads((base / "tokenizer_config.json").read_text())
        config |= {"eos_token": "<|end_of_text|>"}
        del config["chat_template"]
        (base / "tokenizer_config.json").write_text(json.dumps(config))
    return base


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # the files of a config are relative to it
        yield tmp_path_factory.mktemp("recipes")


@pytest.fixture(scope="module")
def hub(home: Path) -> Iterator[Hub]:
    http = huggingface_hub.utils._http
    with pytest.MonkeyPatch.context() as patch, Hub() as hub:
        patch.setattr(http, "_GLOBAL_CLIENT_FACTORY", http._GLOBAL_CLIENT_FACTORY)
        hub.connect(patch, home / "hf")
        yield hub
    huggingface_hub.close_session()
    huggingface_hub.utils.enable_progress_bars()


@pytest.fixture(scope="module")
def runs(home: Path, hub: Hub) -> Callable[[str], Run]:
    @functools.cache
    def run(name: str) -> Run:
        recipe = RECIPES[name]
        base = runs_of_wiki() if name == "arxiv" else base_of(recipe, home / f"{name}-base")
        flags = as_flags({**COMMON, **recipe.flags, "model.name": base})
        made = Run(recipe, base, flags, home / name / "whole", home / name / "resumed", hub=hub)
        said, verified = io.StringIO(), io.StringIO()
        with contextlib.redirect_stderr(said), recording(made.averages):
            assert train.main(made.config(made.whole)) == 0
        made.said = said.getvalue()
        step, how = recipe.interrupted
        with interruption(step, how):
            if how == "crash":
                with pytest.raises(Crash):
                    train.main(made.config(made.resumed))
            else:
                assert train.main(made.config(made.resumed)) == 128 + signal.SIGTERM
        assert not (made.resumed / "checkpoint-final").exists()
        assert train.main(made.config(made.resumed)) == 0
        assert merge.main(merge.Args(str(made.final))) == 0
        quantised = made.config(made.whole).model.bits == 4
        with contextlib.redirect_stdout(verified):
            args = merge.Args(str(made.final), dtype="float32", verify=True, out=str(made.final / "exact"))
            args.from_quantised = quantised
            assert merge.main(args) == 0
        made.verified = verified.getvalue()
        return made

    def runs_of_wiki() -> Path:
        return run("wiki").merged

    return run


@pytest.fixture(scope="module", params=RECIPES)
def run(request: pytest.FixtureRequest, runs: Callable[[str], Run]) -> Run:
    return runs(request.param)


def test_the_loss_falls(run: Run):
    losses = list(events(run.whole, "loss").values())
    part = max(1, len(losses) // 4)
    assert fmean(losses[-part:]) < 0.9 * fmean(losses[:part]), losses


def test_resumed_is_uninterrupted(run: Run):
    name = "checkpoint-final/adapter_model.safetensors"
    assert (run.resumed / name).read_bytes() == (run.whole / name).read_bytes()
    assert events(run.resumed, "loss") == events(run.whole, "loss")
    for key in ("eval/in_domain/loss", "eval/out_of_domain/loss"):
        assert events(run.resumed, key) == events(run.whole, key) != {}


def tokens_of(run: Run) -> Tensor:
    """Two rows of the evaluation file, as they are asked."""
    data, tokenizer = trained_format(str(run.merged), None, None, False), minilora.tokenizer.Tokenizer(run.merged)
    texts = [ask(row, data, tokenizer) for row in read_rows(run.source)[:2]]
    return torch.tensor([token for text in texts for token in tokenizer.encode(text).ids][:300])


def test_merged_is_the_live_model(run: Run):
    """As transformers and PEFT have both; over 4 bits, merged into the weights that were trained over."""
    bits, tokens = run.config(run.whole).model.bits, tokens_of(run)
    live = theirs(run.base, bits, run.final)
    for module in live.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    expected = logits_of(live, tokens)
    scale = float(expected.abs().max())
    gap = float((logits_of(theirs(run.final / "exact"), tokens) - expected).abs().max())
    assert gap < 2e-4 * scale
    printed = {m[1] or "": float(m[2]) for m in re.finditer(r"(original|dequantised)? *(?:base|merged:?) +(\d[\d.e+-]*)", run.verified)}
    if bits == 4:
        original = float((logits_of(theirs(run.merged), tokens) - expected).abs().max())
        assert original > 10 * gap
        assert printed["original"] > 10 * printed["dequantised"]
    assert (printed["dequantised"] if bits == 4 else printed[""]) < 2e-4 * scale, run.verified


def test_transformers_loads_the_merged_model(run: Run):
    tokens = tokens_of(run)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        run.merged, dtype="float32", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    ours, _ = minilora.load(str(run.merged), dtype="float32")
    expected = logits_of(model, tokens)
    with torch.no_grad():
        found = ours(tokens)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
