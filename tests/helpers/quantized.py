"""Quantized models: ours, and checkpoints that transformers has quantized."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from helpers.build import build
from minilora.build import LoadedModel
from minilora.model.quantization import QuantizedLinear

# Rows of whole blocks of 64, and more than one nested block of 256.
SIZES = {"hidden_size": 128, "intermediate_size": 192}

KINDS = {"nf4 double": (4, True), "nf4": (4, False), "int8": (8, True)}  # bits, double_quant
EVERY_KIND = pytest.mark.parametrize(("bits", "double_quant"), KINDS.values(), ids=KINDS)
BOTH_NF4 = pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
BOTH_WIDTHS = pytest.mark.parametrize("bits", [4, 8])


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Draw standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build_training(directory: Path, bits: int, double_quant: bool = True, **options) -> LoadedModel:
    """Build a model in train mode; `options` are those of `helpers.build.build`."""
    loaded = build(directory, bits=bits, double_quant=double_quant, **options)
    loaded.model.train()
    return loaded


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """Iterate over a model's quantized layers, as (path, layer)."""
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield path, module


def store_quantized(
    source: Path, directory: Path, bits: int, double_quant: bool = True, **settings
) -> Path:
    """Let transformers quantize a checkpoint and save the result."""
    if bits == 4:
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": double_quant,
            **settings,
        }
    else:
        settings = {"load_in_8bit": True, **settings}
    hf = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**settings)
    )
    hf.save_pretrained(directory)
    return directory


def copy_directory(source: Path, directory: Path) -> Path:
    """Copy a checkpoint."""
    shutil.copytree(source, directory)
    return directory


def need_sharding(bits: int) -> None:
    """Skip a test of shards if torch has none for a base of so few bits: see choose_strategy."""
    major, minor = (int(number) for number in torch.__version__.split(".")[:2])
    if bits < 16 and (major, minor) < (2, 13):
        pytest.skip("torch shards a quantized base since 2.13; below it is replicated")
