"""Adapters in PEFT's files: ours in PEFT itself, and damaged ones."""

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import minilora
from helpers.checkpoints import short_run
from helpers.tiny_models import random_tokens
from minilora.checkpoint.peft import adapter_state, load_adapter_state, read_adapter
from minilora.config import LoraConfig
from minilora.errors import UserError
from minilora.model.lora import init_adapters, inject
from minilora.model.transformer import CausalLM


def peft_model(config: LoraConfig, hf: PreTrainedModel) -> PeftModel:
    """PEFT's own model with the same settings."""
    settings = PeftLoraConfig(
        r=config.rank,
        lora_alpha=int(config.alpha),
        use_rslora=config.rslora,
        target_modules=list(config.target_modules),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(copy.deepcopy(hf), settings)


@torch.no_grad()
def test_trained_adapter_is_complete_and_loads_in_peft(
    runs: dict[str, Path], base: Path, hf: PreTrainedModel
):
    directory = runs["lora"] / "checkpoint-final"
    tensors = load_file(directory / "adapter_model.safetensors")
    expected = get_peft_model_state_dict(peft_model(short_run("lora", base, directory).lora, hf))
    expected_shapes = {name: tensor.shape for name, tensor in expected.items()}
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected_shapes
    for tensor in tensors.values():
        assert tensor.isfinite().all() and tensor.any()
        assert tensor.dtype == torch.float32

    plain = AutoModelForCausalLM.from_pretrained(base)
    theirs = PeftModel.from_pretrained(plain, directory)
    loaded = theirs.load_adapter(directory, "again")
    assert not loaded.missing_keys and not loaded.unexpected_keys
    tokens = random_tokens(24)
    model, _ = minilora.load(str(directory), device="cpu")
    their_logits = theirs(tokens.unsqueeze(0)).logits[0]
    torch.testing.assert_close(model(tokens), their_logits, rtol=0, atol=1e-4)
    untrained = hf(tokens.unsqueeze(0)).logits[0]
    assert (model(tokens) - untrained).abs().max() > 0.01  # training did something


def truncate_tensors(directory: Path) -> None:
    os.truncate(directory / "adapter_model.safetensors", 2000)


def remove_tensors(directory: Path) -> None:
    (directory / "adapter_model.safetensors").unlink()


def remove_config(directory: Path) -> None:
    (directory / "adapter_config.json").unlink()


def truncate_config(directory: Path) -> None:
    os.truncate(directory / "adapter_config.json", 20)


def set_a_nan(directory: Path) -> None:
    tensors = load_file(directory / "adapter_model.safetensors")
    tensors[sorted(tensors)[3]].view(-1)[5] = torch.nan
    save_file(tensors, directory / "adapter_model.safetensors")


DAMAGES = {
    truncate_tensors: "adapter_model.safetensors",
    remove_tensors: "adapter_model.safetensors",
    remove_config: "adapter_config.json",
    truncate_config: "adapter_config.json",
    set_a_nan: "not finite",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_adapter_is_refused_by_name(
    damage: Callable[[Path], None], runs: dict[str, Path], tmp_path: Path
):
    directory = tmp_path / "adapter"
    shutil.copytree(runs["lora"] / "checkpoint-final", directory)
    damage(directory)
    with pytest.raises(UserError) as error:
        read_adapter(directory)
    assert str(directory) in str(error.value)
    assert DAMAGES[damage] in str(error.value)


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
UNKNOWN = "base_model.model.x.lora_A.weight"


@pytest.mark.parametrize("case", ["missing", "extra", "other shape", "empty"])
def test_adapter_of_another_model_is_refused_and_changes_nothing(llama: CausalLM, case: str):
    inject(llama, LoraConfig(rank=4))
    init_adapters(llama, seed=0)
    before = copy.deepcopy(adapter_state(llama))
    tensors = {name: tensor + 1 for name, tensor in before.items()}
    word = Q_PROJ
    if case == "missing":
        del tensors[Q_PROJ]
    elif case == "extra":
        word = UNKNOWN
        tensors[UNKNOWN] = torch.zeros(4, 32)
    elif case == "other shape":
        tensors[Q_PROJ] = torch.zeros(5, 32)
    else:
        word = "lora_"
        tensors = {}

    with pytest.raises(UserError, match=f"adapter.*{word}"):
        load_adapter_state(llama, tensors, "adapter")
    for name, tensor in adapter_state(llama).items():
        assert torch.equal(tensor, before[name])
