"""Models to be asked by infer.py, rows to ask them about, and transformers' answers to these."""

import copy
import dataclasses
import functools
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import infer
import train
from helpers import tiny_tokenizers
from helpers.tiny_models import tiny
from minilora.config import (
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    TrainConfig,
)
from minilora.data.tokenizer import Tokenizer
from minilora.generation.arguments import ModelArgs

NEW_TOKENS = 12
TEXT = "Art in 서울?"
SHORT: dict = {"max_new_tokens": NEW_TOKENS, "temperature": 0.0, "stop": ()}
"""Options of infer.py for short greedy answers, whatever the model was trained on."""
_answer_files = itertools.count()  # no output may be another job's


# ---- models


def write_base(name: str, directory: Path) -> Path:
    """Write a tiny random Llama over the vocabulary of a tiny tokenizer, in HF layout."""
    shutil.copytree(tiny_tokenizers.BUILDERS[name](), directory)
    tokens = Tokenizer(directory)
    hf = tiny("llama3", vocab_size=tokens.vocab_size, eos_token_id=tokens.eos_id)
    hf.save_pretrained(directory)
    return directory


def short_training(**settings) -> Config:
    """Return the config of a run of two steps, so large that the answers change."""
    return Config(
        lora=LoraConfig(rank=4),
        train=TrainConfig(
            max_steps=2,
            batch_size=4,
            learning_rate=0.1,
            warmup_steps=0,
            gradient_checkpointing=False,
        ),
        eval=EvalConfig(num_generate_samples=0),
        log=LogConfig(tensorboard=False),
        **settings,
    )


def train_adapter(base: str | Path, out: Path, data: DataConfig, rows: list[dict]) -> Path:
    """Train an adapter on rows for two steps; returns the final checkpoint."""
    data = copy.copy(data)
    data.train_file = str(write_rows(out.with_suffix(".jsonl"), rows))
    model = ModelConfig(name=str(base))
    assert train.main(short_training(output_dir=str(out), model=model, data=data)) == 0
    return out / "checkpoint-final"


# ---- rows


def write_rows(file: Path, rows: list[dict]) -> Path:
    """Write rows as JSON lines; returns the file."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    file.write_text("".join(lines), encoding="utf-8")
    return file


def read_rows(file: Path) -> list[dict]:
    """Read rows from JSON lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def user(content: str) -> list[dict]:
    """Return a conversation of one question."""
    return [{"role": "user", "content": content}]


def assistant(content: str) -> dict:
    """Return a turn of the assistant."""
    return {"role": "assistant", "content": content}


class Format(NamedTuple):
    """A way in which models are trained, with rows, and what these ask."""

    data: DataConfig
    rows: list[dict]
    asked: Callable[[dict], str | list[dict]]
    """What a row asks: a text, or the turns of a conversation."""


ARTICLES = [
    {
        "id": f"article {i}",
        "title": f"title {i}",
        "abstract": "All of\nit. 物理",
        "paths": [["a", "b"], ["a", f"c{i}"]],
    }
    for i in range(4)
]
QUESTIONS = [{"question": f"history {i}", "year": i, "completion": "museums"} for i in range(4)]
CHATS = [
    {"messages": [{"role": "system", "content": "Be brief."}, *user(f"q{i}"), assistant(f"r{i}")]}
    for i in range(4)
]
CHATS[3]["messages"] += [*user("and?"), {**assistant("more"), "train": True}]
NOTES = [{"text": f"note {i}\n### Answer:\nof {i}"} for i in range(4)]


def article_of(row: dict) -> str:
    """Return what a row of format paths asks."""
    return f"Title: {row['title']}\n{row['abstract']}"


FORMATS = {
    "paths": Format(DataConfig(), ARTICLES, lambda row: user(article_of(row))),
    "paths without chat": Format(
        DataConfig(chat=False), ARTICLES, lambda row: article_of(row) + "\n"
    ),
    "paths in Mistral's form": Format(
        DataConfig(chat_template="mistral"), ARTICLES, lambda row: user(article_of(row))
    ),
    "prompt": Format(
        DataConfig(format="prompt", prompt_template="Q: {question} ({year})?"),
        QUESTIONS,
        lambda row: user(f"Q: {row['question']} ({row['year']})?"),
    ),
    "prompt without chat": Format(
        DataConfig(format="prompt", prompt_template="Q: {question}?\nA:", chat=False),
        QUESTIONS,
        lambda row: f"Q: {row['question']}?\nA:",
    ),
    "messages": Format(DataConfig(format="messages"), CHATS, lambda row: row["messages"][:-1]),
    "text": Format(
        DataConfig(format="text", response_marker="### Answer:\n"),
        NOTES,
        lambda row: row["text"].split("of")[0],
    ),
    "text without marker": Format(DataConfig(format="text"), NOTES, lambda row: row["text"]),
}


# ---- answers


def infer_args(model: str | Path, **flags) -> infer.Args:
    """Return the arguments of infer.py for a model; `flags` are named as on the command line."""
    args = infer.Args(ModelArgs(str(model)))
    themes = [getattr(args, theme.name) for theme in dataclasses.fields(args)]
    for name, value in flags.items():
        (theme,) = [theme for theme in themes if hasattr(theme, name)]
        setattr(theme, name, value)
    return args


def answer_file(model: Path, source: Path, target: Path, **options) -> bytes:
    """Run infer.py on a file; returns what the output then holds."""
    assert infer.main(infer_args(model, input=str(source), output=str(target), **options)) == 0
    return target.read_bytes()


def ask(model: Path, rows: list[dict], tmp_path: Path, **options) -> list[dict]:
    """Return the rows that infer.py writes for these, with answers."""
    source = write_rows(tmp_path / "questions.jsonl", rows)
    target = tmp_path / f"answers{next(_answer_files)}.jsonl"
    answer_file(model, source, target, **SHORT | options)
    return read_rows(target)


@functools.cache
def transformers_model(directory: Path):
    """Return transformers' (or PEFT's) model of a directory, and transformers' tokenizer."""
    tokens = AutoTokenizer.from_pretrained(directory)
    if not (directory / "adapter_config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(directory), tokens
    config = json.loads((directory / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    return PeftModel.from_pretrained(base, directory), tokens


def transformers_answer(directory: Path, prompt: str | list[dict]) -> str:
    """Return transformers' greedy answer to a text, or to turns in the model's chat form."""
    model, tokens = transformers_model(directory)
    if isinstance(prompt, str):
        ids = tokens(prompt).input_ids
    else:
        ids = tokens.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    given = torch.tensor([ids])
    out = model.generate(
        input_ids=given,
        attention_mask=torch.ones_like(given),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=0,
    )
    decode = functools.partial(
        tokens.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return decode(out[0])[len(decode(ids)) :]
