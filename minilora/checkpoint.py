"""Adapters as files in PEFT's layout, and what a checkpoint says of its run (running/saving.py and directory.py write them)."""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from minilora.config import LoraConfig, ModelConfig, UserError
from minilora.lora import EMBEDDING, HEAD, from_peft_config
from minilora.weights import open_safetensors, read_json

STATE = "trainer_state.json"


def read_adapter(directory: Path) -> tuple[LoraConfig, dict[str, Tensor], dict]:
    """(settings, tensors, raw adapter_config.json) of a PEFT adapter. Raises UserError."""
    raw = read_json(directory / "adapter_config.json")
    path = directory / "adapter_model.safetensors"
    if not path.is_file():
        raise UserError(f"{path} does not exist (adapters saved as .bin are pickles, which are never loaded)")
    with open_safetensors(path) as file:
        copies = (".original_module.", ".modules_to_save.")  # PEFT's, of matrices that stand there by their own names too
        tensors = {name: file.get_tensor(name) for name in file.keys() if not any(part in name for part in copies)}
    if len(whole := tensors.keys() & {EMBEDDING, HEAD}) == 1 and not raw.get("ensure_weight_tying"):
        raise UserError(f"{path}: has {whole.pop()} alone: supported are embed_tokens.weight and lm_head.weight together")
    for name in tensors:
        if ".lora_A." in name and name.replace(".lora_A.", ".lora_B.") not in tensors:
            raise UserError(f"{path}: {name} has no lora_B beside it")
    if bad := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise UserError(f"{path}: {bad[0]} is not finite")
    return from_peft_config(raw, list(tensors), str(directory / "adapter_config.json")), tensors, raw


def trained_over(directory: Path) -> ModelConfig | None:
    """The model settings of the run that wrote a checkpoint; None for anybody else's adapter."""
    if not (directory / STATE).is_file():
        return None
    values = read_json(directory / STATE)["config"]["model"]
    return ModelConfig(**{f.name: values[f.name] for f in dataclasses.fields(ModelConfig) if f.name in values})


def base_of(raw: dict, where: str) -> tuple[str, str | None]:
    """(name, revision) of the base model that an adapter_config.json names."""
    name = raw.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}/adapter_config.json: base_model_name_or_path names no base model")
    return name, raw.get("revision")
