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
        **OLLM, "model.name": "mistralai/Mistral-7B-Instruct-v0.2", "lora.rank": 32, "lora.alpha": 16,
        "train.learning_rate": 1e-5, "train.warmup_steps": 100, "train.epochs": 2, "train.max_steps": None,
        "eval.eval_steps": 500,
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
        "method": "full", "model.name": "meta-llama/Llama-3.1-8B-Instruct", "model.dtype": "bfloat16",
        "parallel.strategy": "fsdp", "model.bits": 16,
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
        "wiki", "mistral", "llama2",
        {"train.learning_rate": 5e-3, "train.warmup_steps": 4, "eval.eval_steps": 16, "eval.max_new_tokens": 8},
        (21, "crash"), ("graph",), "wiki", 48,
    ),
    "arxiv": Recipe(
        "arxiv", "mistral", "llama2",
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
            {"data.train_size": 8,  # so few that they are soon learnt by heart, and other rows are answered worse
             "train.learning_rate": 2e-2, "train.warmup_steps": 2, "train.epochs": 40, "eval.eval_steps": 2,
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
    found = re.findall(r"(original base|dequantised base|and merged:) +(\d[\d.e+-]*)", run.verified)
    printed = {what: float(number) for what, number in found}
    if bits == 4:
        original = float((logits_of(theirs(run.merged), tokens) - expected).abs().max())
        assert original > 10 * gap
        assert printed["original base"] > 10 * printed["dequantised base"]
    assert printed["dequantised base" if bits == 4 else "and merged:"] < 2e-4 * scale, run.verified


def test_transformers_loads_the_merged_model(run: Run):
    tokens = tokens_of(run)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, info = load(run.merged, dtype="float32", attn_implementation="eager", output_loading_info=True)
    assert not any(info.values()), info
    ours, _ = minilora.load(str(run.merged), dtype="float32")
    expected = logits_of(model, tokens)
    with torch.no_grad():
        found = ours(tokens)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


# ---- what is trained, and what is asked


def turns_trained(row: dict) -> list[str]:
    return [turn["content"] for turn in row["messages"] if turn["role"] == "assistant" and turn.get("train", True)]


# the texts of a row that are supervised, each followed by the token that ends it
SUPERVISED: dict[str, tuple[Callable[[dict], list[str]], str]] = {
    "wiki": (lambda row: ["".join(" -> ".join(path) + "\n" for path in row["paths"])], "</s>"),
    "price": (lambda row: [row["text"].split("Price is $")[1]], "<|end_of_text|>"),
    "kanana": (lambda row: [" " + row["answer"]], "<|end_of_text|>"),
    "instruct llama3": (turns_trained, "<|eot_id|>"),
    "instruct qwen2": (turns_trained, "<|im_end|>"),
}


@pytest.mark.parametrize("name", SUPERVISED)
def test_exactly_the_answers_are_supervised(
    name: str, runs: Callable[[str], Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Every row of the example file, by transformers' tokenizer: the labels are whole tokens of the text, and give the answer
    and its end, nothing more and nothing less."""
    run = runs(name)
    rows = read_rows(ROOT / "examples" / run.recipe.files / "train.jsonl")
    assert train.main(of_file(run.recipe.config, *run.flags, "--output_dir", str(tmp_path), "--preview", str(len(rows)))) == 0
    said = capsys.readouterr().err
    assert f"{len(rows)} lines read, {len(rows)} kept, 0 dropped" in said and "straddle" not in said
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.final)
    decode = functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    answers, end = SUPERVISED[name]
    shown = read_rows(tmp_path / "preview.jsonl")
    assert [row["index"] for row in shown] == list(range(len(rows)))
    for row, document in zip(rows, shown, strict=True):
        ids, labels = document["input_ids"], document["labels"]
        assert ids == tokenizer(document["text"], add_special_tokens=False).input_ids
        assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
        found = str(decode([label for label in labels if label != -100]))
        expected = "".join(answer + end for answer in answers(row))
        assert found == expected if name != "wiki" else found.strip() == expected  # sentencepiece's space before the first word


def test_a_long_description_loses_its_end_and_the_price_stays(runs: Callable[[str], Run], tmp_path: Path):
    run = runs("price")
    rows = read_rows(ROOT / "examples/price/train.jsonl")
    assert train.main(of_file("price", *run.flags, "--output_dir", str(tmp_path), "--preview", str(len(rows)))) == 0
    documents = read_rows(tmp_path / "preview.jsonl")
    assert max(len(document["input_ids"]) for document in documents) == 182
    cut = [(d["text"], row["text"]) for d, row in zip(documents, rows, strict=True) if row["text"] not in d["text"]]
    assert 5 < len(cut) < len(rows)
    for text, whole in cut:
        description, price = text.removeprefix("<|begin_of_text|>").removesuffix("<|end_of_text|>").split("Price is $")
        assert whole.startswith(description.rstrip()) and whole.endswith("Price is $" + price)
        assert description.endswith("\n\n"), "the blank line before the marker stays"


def test_a_row_is_asked_as_it_was_trained(run: Run, tmp_path: Path):
    """The prompt's tokens are those that stand before the last answer in training, by transformers' tokenizer."""
    args = ["--data.train_file", str(run.source), "--output_dir", str(tmp_path), "--preview", "100"]
    assert train.main(of_file(run.recipe.config, *run.flags, *args)) == 0
    data = trained_format(str(run.merged), None, None, False)
    ours, theirs = minilora.tokenizer.Tokenizer(run.merged), transformers.AutoTokenizer.from_pretrained(run.merged)
    documents, rows, alike = read_rows(tmp_path / "preview.jsonl"), read_rows(run.source), 0
    for document, row in zip(documents, rows, strict=True):
        if run.recipe.config == "price" and row["text"] not in document["text"]:
            continue  # shortened
        ids, labels = document["input_ids"], document["labels"]
        text = ask(row, data, ours)
        asked = ours.encode(text).ids
        last = len(labels) - next(i for i, label in enumerate(reversed([*labels, -100][:-1])) if label != -100)
        begin = next(i for i in range(last, 0, -1) if labels[i - 1] == -100)
        assert ids[:begin] == asked == theirs(text, add_special_tokens=not text.startswith(theirs.bos_token or "\0")).input_ids
        alike += 1
    assert alike >= 2


# ---- the answers to the evaluation file


def of_answers(name: str, answers: list[str], wanted: list[str]) -> dict[str, float]:
    """Some figures of each metric, computed here."""
    pairs = [(a.strip(), w.strip()) for a, w in zip(answers, wanted, strict=True)]
    if name == "graph":
        paths = [[[node.strip() for node in line.split(" -> ")] for text in texts for line in text.split("\n")] for texts in
                 (answers, wanted)]  # fmt: skip
        ours, true = ({edge for path in side if all(path) for edge in itertools.pairwise(path)} for side in paths)
        return {"graph/edge_f1": 2 * len(ours & true) / (len(ours) + len(true))}
    if name == "numeric":
        numbers = [(re.search(r"\d+(\.\d+)?", a), float(w)) for a, w in pairs]
        errors = [abs(float(found[0]) - w) for found, w in numbers if found]
        return {"numeric/parsed": len(errors) / len(pairs), "numeric/mae": fmean(errors)}
    if name == "exact_match":
        return {name: fmean(a == w for a, w in pairs)}
    if name == "chrf":
        return {name: sacrebleu.corpus_chrf([a for a, _ in pairs], [[w for _, w in pairs]]).score}
    if name == "bleu":
        return {name: sacrebleu.corpus_bleu([a for a, _ in pairs], [[w for _, w in pairs]]).score}
    return {name: fmean(levenshtein(a, w) / max(len(a), len(w)) for a, w in pairs)} if name == "edit_distance" else {}


def levenshtein(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


WANTED: dict[str, Callable[[dict], str]] = {
    "wiki": lambda row: "".join(" -> ".join(path) + "\n" for path in row["paths"]),
    "price": lambda row: row["text"].split("Price is $")[1],
    "kanana": lambda row: row["answer"],
    "instruct": lambda row: row["messages"][-1]["content"],
}


def test_the_evaluation_file_is_answered_and_scored(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output, rows = tmp_path / "answers.jsonl", read_rows(run.source)
    names = run.recipe.metrics
    args = infer.Args(str(run.merged), input=str(run.source), output=str(output), metrics=names, max_new_tokens=run.recipe.tokens)
    assert infer.main(args) == 0
    answers = read_rows(output)
    assert [{k: v for k, v in row.items() if k not in ("generated", "id")} for row in answers] == [
        {k: v for k, v in row.items() if k != "id"} for row in rows
    ]
    texts, wanted = [row["generated"] for row in answers], [WANTED[run.recipe.files](row) for row in rows]
    assert sum(bool(text.strip()) for text in texts) >= len(texts) / 2
    figures = json.loads((tmp_path / "answers.metrics.json").read_text())
    expected = {k: v for name in names for k, v in of_answers(name, texts, wanted).items()}
    assert {k: figures[k] for k in expected} == pytest.approx(expected) and figures["answers"] == len(rows)
    printed = capsys.readouterr().out
    assert all(key in printed for key in figures)
    if "graph" in names:
        assert (tmp_path / "answers.graph.json").is_file()
    if "ppl" in names:  # of the merged model in 16 bits what the run itself saw last
        assert figures["ppl"] == pytest.approx(list(events(run.whole, "eval/out_of_domain/ppl").values())[-1], rel=0.1)
    if run.recipe.config == "price":
        assert figures["numeric/parsed"] > 0.5, "it has learnt that a price is a number"


# ---- what only some recipes have


def test_each_checkpoint_of_price_is_pushed(runs: Callable[[str], Run]):
    run = runs("price")
    assert run.hub is not None
    repo = run.hub.repos["tester/price"]
    saves = sorted(step for step in events(run.whole, "checkpoint"))
    assert saves == [4, 8, 12, 16, 20, 24, 27]
    pushed = re.search(r"hub.push: pushed (\d+) of (\d+) checkpoints to \S+(?:, (\d+) superseded)?", run.said)
    assert pushed and int(pushed[2]) == len(saves) == int(pushed[1]) + int(pushed[3] or 0) and "failed" not in run.said
    assert repo.private and int(pushed[1]) < len(repo.commits)
    for name in ("adapter_model.safetensors", "tokenizer.json"):
        assert repo.files[name] == (run.final / name).read_bytes()


def test_only_attention_is_trained_for_prices(runs: Callable[[str], Run]):
    names = load_file(runs("price").final / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in names} == set(ATTENTION)


def test_kanana_is_saved_each_epoch(runs: Callable[[str], Run]):
    run = runs("kanana")
    assert [row["epoch"] for row in read_rows(run.whole / "metrics.jsonl") if "checkpoint" in row] == [1, 2, 3, 4]
    states = load_file(run.final / "training_state.safetensors")
    assert any(tensor.dtype == torch.uint8 for tensor in states.values()), "states in 8 bits"


INSTRUCT = [name for name in RECIPES if name.startswith("instruct")]


@pytest.mark.parametrize("name", INSTRUCT)
def test_instruct_stops_early_and_keeps_the_best(name: str, runs: Callable[[str], Run]):
    run = runs(name)
    losses = events(run.whole, "eval/out_of_domain/loss")
    best = min(losses, key=losses.__getitem__)
    assert [step for step in losses if step > best] == list(range(best + 2, best + 11, 2)), "five that were no better"
    assert best > 0 and max(losses) < 80, "80 steps were asked for"
    assert f"best: checkpoint-{best}" in run.said and (run.whole / f"checkpoint-{best}" / "adapter_model.safetensors").is_file()
    kept = [p.name for p in run.whole.glob("checkpoint-*")]
    assert len(kept) <= 4, kept


@pytest.mark.parametrize("name", INSTRUCT)
def test_instruct_is_evaluated_before_it_learns(name: str, runs: Callable[[str], Run]):
    """The first row is that of the base model, as transformers computes it."""
    run = runs(name)
    first = read_rows(run.whole / "metrics.jsonl")[0]
    assert first["step"] == 0 and first["epoch"] == 0
    logged = {k: v[0] for k in ("loss", "ppl", "bleu", "edit_distance", "rougeL", "meteor")
              if (v := events(run.whole, f"eval/out_of_domain/{k}"))}  # fmt: skip
    assert len(logged) == 6
    expected = loss_by_transformers(run, theirs(run.base))
    assert logged["loss"] == pytest.approx(expected, rel=0.01)
    assert [row["step"] for row in read_rows(run.whole / "samples.jsonl")][:8] == [0] * 8


def loss_by_transformers(run: Run, model: nn.Module) -> float:
    """Mean loss over what is supervised of the evaluation file, a turn at a time."""
    tokenizer, total, count = transformers.AutoTokenizer.from_pretrained(run.final), 0.0, 0
    for row in read_rows(run.source):
        turns = row["messages"]
        for i, turn in enumerate(turns):
            if turn["role"] == "assistant":
                prompt = tokenizer.apply_chat_template(turns[:i], add_generation_prompt=True, return_dict=False)
                end = SUPERVISED[f"instruct {run.recipe.family}"][1]
                answer = tokenizer(turn["content"] + end, add_special_tokens=False).input_ids
                logits = logits_of(model, torch.tensor(prompt + answer))[len(prompt) - 1 : -1]
                total += float(nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
                count += len(answer)
    return total / count


@pytest.mark.parametrize("name", INSTRUCT)
def test_instruct_evaluates_and_saves_the_average_of_its_weights(name: str, runs: Callable[[str], Run]):
    run = runs(name)
    average, *taken = (copy.deepcopy(weights) for weights in run.averages)
    for step, weights in enumerate(taken):
        decay = min(0.999, (1 + step) / (10 + step))
        average = {key: decay * average[key] + (1 - decay) * weight for key, weight in weights.items()}
    saved = load_file(run.final / "adapter_model.safetensors")
    assert len(saved) == len(average) and len(taken) == max(events(run.whole, "loss"))
    for key, tensor in average.items():
        found = saved[f"base_model.model.{key}.weight"]
        torch.testing.assert_close(found, tensor, rtol=1e-4, atol=1e-6)
        assert not torch.equal(found, taken[-1][key])
    last = list(events(run.whole, "eval/out_of_domain/loss").values())[-1]
    assert last == pytest.approx(loss_by_transformers(run, theirs(run.base, adapter=run.final)), rel=0.02)


def test_instruct_may_be_sharded_and_offloaded(monkeypatch: pytest.MonkeyPatch):
    for flags in ((), ("--parallel.strategy", "fsdp"), ("--model.name", "Qwen/Qwen2.5-7B-Instruct")):
        check_device(of_file("instruct", *flags))
    offloaded = of_file("instruct", "--parallel.strategy", "fsdp", "--parallel.cpu_offload", "True")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_device(offloaded)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="cpu_offload"):
        check_device(offloaded)


# ---- two processes


@pytest.fixture(scope="module")
def shared(home: Path) -> dict[str, Config]:
    """The instruct recipe on two processes, each with a copy and each with a shard; what differs is as above."""
    recipe = RECIPES["instruct llama3"]
    base = base_of(recipe, home / "shared-base")
    flags = as_flags({**COMMON, **recipe.flags, "model.name": base, "train.max_steps": 4})
    configs = {s: of_file("instruct", *flags, "--output_dir", str(home / s), "--parallel.strategy", s) for s in ("ddp", "fsdp")}
    results = ranks.launch(home / "jobs", 2, {s: (ranks.fit, (config,)) for s, config in configs.items()})
    for name in results:
        ranks.outcome(results, name)
    return configs


def test_instruct_on_two_processes(shared: dict[str, Config]):
    """Copies and shards give the same figures, before the first step, after it, and of the average."""
    whole, sharded = (Path(shared[s].output_dir) for s in ("ddp", "fsdp"))
    for key in ("loss", "eval/in_domain/loss", "eval/out_of_domain/loss"):
        one, two = events(whole, key), events(sharded, key)
        assert one.keys() == two.keys() == set(range(1, 5) if key == "loss" else (0, 2, 4))
        assert one == pytest.approx(two, rel=0.01)
    copies, shards = (load_file(out / "checkpoint-final" / "adapter_model.safetensors") for out in (whole, sharded))
    assert {k: v.shape for k, v in copies.items()} == {k: v.shape for k, v in shards.items()}


@dataclass
class FullRun:
    base: Path
    whole: Path
    resumed: Path
    before: int  # the step of the checkpoint that the run was stopped at


def start(out: Path, flags: list[str]) -> subprocess.Popen:
    """The full recipe in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "train.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command += [str(ROOT / "configs/full.py"), "--output_dir", str(out), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT)


def finish(process: subprocess.Popen) -> str:
    out, _ = process.communicate(timeout=200)
    return f"exit {process.returncode}\n{out}"


@pytest.fixture(scope="module")
def full(home: Path) -> FullRun:
    base = base_model(home / "full-base", "llama3", "llama3", torch_dtype="bfloat16", **SIZES)
    flags = as_flags({**COMMON, **FULL, "model.name": base})
    whole, resumed = home / "full" / "whole", home / "full" / "resumed"
    assert finish(start(whole, flags)).startswith("exit 0")
    process = start(resumed, flags)
    deadline = time.monotonic() + 120
    while not (resumed / "metrics.jsonl").is_file() or not any(step >= 3 for step in events(resumed, "loss")):
        assert process.poll() is None and time.monotonic() < deadline, finish(process)
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said = finish(process)
    (checkpoint,) = resumed.glob("checkpoint-*")
    assert checkpoint.name != "checkpoint-final", said
    assert "exit 0" in finish(start(resumed, flags))
    return FullRun(base, whole, resumed, int(checkpoint.name.split("-")[1]))


def test_full_is_resumed_as_if_nothing_had_been(full: FullRun):
    assert 3 <= full.before < 40
    assert events(full.resumed, "loss") == events(full.whole, "loss")
    one, two = (out / "checkpoint-final" / "model.safetensors" for out in (full.whole, full.resumed))
    assert one.read_bytes() == two.read_bytes()


def test_full_learns(full: FullRun):
    losses = list(events(full.whole, "loss").values())
    assert len(losses) == 40 and fmean(losses[-10:]) < 0.9 * fmean(losses[:10])
    before, after = (load_file(path / "model.safetensors") for path in (full.base, full.whole / "checkpoint-final"))
    assert before.keys() == after.keys() and not any(torch.equal(before[name], after[name]) for name in before)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}


def test_transformers_loads_the_full_model(full: FullRun):
    final = full.whole / "checkpoint-final"
    tokens = torch.randint(500, (120,), generator=torch.Generator().manual_seed(0))
    ours, _ = minilora.load(str(final), dtype="float32")
    with torch.no_grad():
        found = ours(tokens)
    expected = logits_of(theirs(final), tokens)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_thousand_prompts_in_one_go(full: FullRun, tmp_path: Path):
    """Two processes, one output, each prompt answered once and in order."""
    source, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    rows = [{"id": f"q{i}", "prompt": f"What is {i} + {i * 7 % 13}?"} for i in range(1000)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = [str(full.whole / "checkpoint-final"), "--input", str(source), "--output", str(output), "--max_new_tokens", "4"]
    done = ranks.torchrun(2, str(ROOT / "infer.py"), *args, "--batch_size", "64")
    assert done.returncode == 0, done.stderr
    answers = read_rows(output)
    assert [{"id": row["id"], "prompt": row["prompt"]} for row in answers] == rows
    assert all(isinstance(row["generated"], str) for row in answers) and len({row["generated"] for row in answers}) > 1
    assert "1000 of 1000 answers" in done.stderr
