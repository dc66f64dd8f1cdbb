"""The values of the recipes in configs/."""

import pytest
import torch

from helpers.recipes import load_recipe
from minilora.cli import check_compiler, check_device
from minilora.config import flatten_config
from minilora.errors import UserError
from train import read_inputs

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
BITS4 = {"model.bits": 4, "model.double_quant": True}
OLLM = {
    "method": "lora",
    "data.format": "paths",
    "data.edge_dropping": True,
    "data.chat_template": "mistral",
    "data.max_seq_length": 2048,
    "model.bits": 16,
    "train.lr_scheduler": "constant_with_warmup",
    "train.batch_size": 8,
    "train.grad_acc_steps": 1,
    "train.warmup_ratio": None,
}

# What each recipe must say, from its source; what the source leaves open is not here.
VALUES: dict[str, dict[str, object]] = {
    "qlora": {**BITS4, "method": "lora", "lora.rank": 32, "train.optimizer": "adamw"},
    "wiki": {
        **OLLM,
        "model.name": "mistralai/Mistral-7B-Instruct-v0.2",
        "lora.rank": 32,
        "lora.alpha": 16,
        "train.learning_rate": 1e-5,
        "train.warmup_steps": 100,
        "train.epochs": 2,
        "train.max_steps": None,
        "eval.eval_steps": 500,
    },
    "arxiv": {
        **OLLM,
        "model.name": "out/wiki/checkpoint-final/merged",
        "lora.rank": 8,
        "lora.alpha": 8,
        "train.learning_rate": 3e-6,
        "train.warmup_steps": 10,
        "train.epochs": 3,
        "data.train_size": 2048,
        "data.eval_size": 256,
        "eval.eval_steps": 32,
        "train.group_by_length": False,
        "train.metric_for_best_model": "loss",
        "train.early_stopping_patience": None,  # it runs to its end, and the best is kept
    },
    "price": {
        **BITS4,
        "method": "lora",
        "model.name": "meta-llama/Llama-3.1-8B",
        "data.format": "text",
        "data.response_marker": "Price is $",
        "train.learning_rate": 1e-4,
        "train.lr_scheduler": "cosine",
        "train.warmup_ratio": 0.03,
        "train.weight_decay": 0.001,
        "train.max_grad_norm": 0.3,
        "train.optimizer": "paged_adamw",
        "lora.target_modules": ATTENTION,
        "lora.dropout": 0.1,
        "hub.push": True,
    },
    "kanana": {
        **BITS4,
        "method": "lora",
        "model.name": "kakaocorp/kanana-1.5-8b-base",
        "data.format": "prompt",
        "data.chat": False,
        "lora.rank": 64,
        "lora.alpha": 128,
        "lora.dropout": 0.05,
        "train.learning_rate": 2e-4,
        "train.batch_size": 4,
        "train.grad_acc_steps": 8,
        "data.max_seq_length": 1024,
        "train.epochs": 1,
        "train.save_steps": "epoch",
    },
    "instruct": {
        "method": "lora",
        "model.name": "meta-llama/Llama-3.1-8B-Instruct",
        "data.format": "messages",
        "train.lr_scheduler": "cosine",
        "train.min_lr_ratio": 0.01,
        "train.warmup_steps": 2000,
        "train.warmup_ratio": None,
        "train.early_stopping_patience": 5,
        "eval.metrics": ("ppl", "bleu", "edit_distance", "rouge", "meteor"),
        "data.eval_size": 512,
        "data.eval_first": True,
        "eval.eval_on_start": True,
        "train.ema_decay": 0.999,
        "parallel.strategy": "ddp",
    },
    "full": {
        "method": "full",
        "model.name": "meta-llama/Llama-3.1-8B-Instruct",
        "model.dtype": "bfloat16",
        "parallel.strategy": "fsdp",
        "model.bits": 16,
    },
}


@pytest.mark.parametrize("name", VALUES)
def test_recipe_has_the_values_of_its_source(name: str):
    found = flatten_config(load_recipe(name))
    assert {key: found[key] for key in VALUES[name]} == VALUES[name]


def test_kanana_has_the_form_of_its_source():
    data = load_recipe("kanana").data
    template = data.prompt_template + data.response_template
    text = template.format(question="왜?", answer="그래서.")
    assert text == "### 질문: 왜?\n\n### 답변: 그래서."


@pytest.mark.parametrize(
    "flags",
    [(), ("--parallel.strategy", "fsdp"), ("--model.name", "Qwen/Qwen2.5-7B-Instruct")],
)
def test_instruct_may_be_changed_as_its_docstring_says(flags: tuple[str, ...]):
    check_device(load_recipe("instruct", *flags))


def test_instruct_may_be_offloaded_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch):
    flags = ("--parallel.strategy", "fsdp", "--parallel.cpu_offload", "True")
    offloaded = load_recipe("instruct", *flags)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_device(offloaded)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="cpu_offload"):
        check_device(offloaded)


def test_compiling_needs_a_compiler(monkeypatch, tmp_path):
    """It is refused before the data is read, with what to install; a preview or plan needs none."""
    config = load_recipe("instruct", "--train.compile", "True")
    check_compiler(config)  # there is one where tests run

    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"no-such-compiler here: .*g\+\+"):
        check_compiler(config)
    config.data.train_file = "no-such-data.jsonl"
    config.model.name = str(tmp_path)
    with pytest.raises(UserError, match="no-such-compiler"):
        read_inputs(config)
    config.plan = True
    check_compiler(config)
    config.plan, config.train.compile = False, False
    check_compiler(config)


def test_compiling_needs_python_headers(monkeypatch, tmp_path):
    config = load_recipe("instruct", "--train.compile", "True")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"Python's headers.*python3-dev"):
        check_compiler(config)


def test_compiling_on_a_gpu_needs_triton_and_a_c_compiler(monkeypatch):
    config = load_recipe("instruct", "--train.compile", "True")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install triton"):
        check_compiler(config)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(UserError, match="no-such-compiler"):
        check_compiler(config)
