"""Runs over quantized bases, and the same models in transformers + bitsandbytes + peft."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import bitsandbytes
import peft
import pytest
import torch
import transformers
from bitsandbytes import functional as bnb
from safetensors.torch import load_file
from torch import Tensor, nn

import train
from helpers.tiny_runs import base_model, config
from minilora.config import Config
from minilora.data.tokenizer import TOKENIZER_FILES
from minilora.tracking.tracker import Tracker

SIZES = {"hidden_size": 64, "intermediate_size": 128}
"""Sizes with whole blocks of 64 in each row.

Where blocks span rows bitsandbytes 0.50 dequantizes wrongly on a CPU, so it is no reference there;
tests/model/test_quantization.py compares such shapes with the arithmetic written out.
"""
LINEARS = 14
"""Linear layers of a tiny model's two blocks."""
PEFT_PREFIX = "base_model.model."
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


# ---- runs


def qlora_config(tmp_path: Path, base: Path, **overrides) -> Config:
    """Return the config of a run over a 4-bit base."""
    settings = {"model__bits": 4, "train__gradient_checkpointing": True, **overrides}
    return config(tmp_path, base, **settings)


def final(c: Config) -> Path:
    """Return the last checkpoint of a finished run."""
    return Path(c.output_dir) / "checkpoint-final"


def trained(directory: Path, base: Path, **overrides) -> Path:
    """Return the final checkpoint of a short run with steps so large that the model changes."""
    directory.mkdir(exist_ok=True)
    settings = {
        "train__max_steps": 2,
        "train__warmup_steps": 0,
        "train__learning_rate": 0.05,
        "model__dtype": "auto",
        "lora__target_modules": ("q_proj", "o_proj", "down_proj"),
        **overrides,
    }
    c = qlora_config(directory, base, **settings)
    assert train.main(c) == 0
    return final(c)


class Crash(Exception):
    """What a run is made to fail with."""


@contextmanager
def crash_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a run fail after this many optimizer steps, before anything of the last is kept."""
    taken = []

    def step(tracker: Tracker) -> None:
        taken.append(1)
        if len(taken) == steps:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "step", step)
        with pytest.raises(Crash):
            yield


# ---- files


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """Read all tensors of a directory's safetensors files."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def base_in_shards(directory: Path, family: str, shard_size: str = "1GB", **changes) -> Path:
    """Write a base model in files of at most this size."""
    base = base_model(directory, family, **SIZES, **changes)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size=shard_size)
    return base


def store_with_bitsandbytes(
    base: Path, directory: Path, bits: int, shard_size: str = "1GB"
) -> Path:
    """Let transformers quantize a base and save it, with its tokenizer."""
    settings = transformers.BitsAndBytesConfig(**(NF4 if bits == 4 else {"load_in_8bit": True}))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=settings
    )
    model.save_pretrained(directory, max_shard_size=shard_size)
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, directory / name)
    return directory


# ---- the reference


def reference_model(
    directory: Path,
    bits: int = 16,
    adapter: Path | None = None,
    dtype: str = "float32",
    double_quant: bool = True,
) -> nn.Module:
    """Return transformers' model of a directory, with a PEFT adapter on it if one is given.

    A model that is not quantized yet is quantized while it is loaded, if `bits` is less than 16.
    At 4 bits it is in train mode: in eval mode some CPUs take a kernel that rounds to bfloat16.
    """
    options = {}
    is_quantized = "quantization_config" in json.loads((directory / "config.json").read_text())
    if bits < 16 and not is_quantized:
        settings = {"load_in_8bit": True}
        if bits == 4:
            settings = {**NF4, "bnb_4bit_use_double_quant": double_quant}
        options["quantization_config"] = transformers.BitsAndBytesConfig(**settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager", **options
    )
    if adapter:
        model = peft.PeftModel.from_pretrained(model, str(adapter))

    # a checkpoint that is quantized already is read in its own dtype, whatever is asked for
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.to(getattr(torch, dtype))
    return model.train(bits == 4)


@torch.no_grad()
def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the logits [T, V] of a model of transformers or peft."""
    return model(input_ids=tokens[None]).logits[0]


def dequantized(
    directory: Path, bits: int, dtype: str = "float32", double_quant: bool = True
) -> dict[str, Tensor]:
    """Return the weights, in float64 by name, of all layers that transformers has quantized."""
    weights = {}
    model = reference_model(directory, bits, dtype=dtype, double_quant=double_quant)
    for path, layer in model.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            state = layer.weight.quant_state
            state.dtype = torch.float32
            weight = bnb.dequantize_4bit(layer.weight.data, state)
        elif isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            weight = bnb.int8_vectorwise_dequant(layer.weight.CB, layer.weight.SCB)
        else:
            continue
        weights[f"{path}.weight"] = weight.double()
    assert len(weights) == LINEARS
    return weights


def with_update(weights: dict[str, Tensor], adapter: Path) -> dict[str, Tensor]:
    """Return the weights with alpha / r * B A added where the adapter has one, in float64."""
    raw = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    changed = dict(weights)
    for name in tensors:
        if ".lora_A." in name:
            A = tensors[name].double()
            B = tensors[name.replace("lora_A", "lora_B")].double()
            path = name.removeprefix(PEFT_PREFIX).replace(".lora_A", "")
            changed[path] = weights[path].double() + raw["lora_alpha"] / raw["r"] * B @ A
    return changed
