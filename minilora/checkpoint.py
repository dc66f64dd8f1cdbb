"""Adapters as files in PEFT's layout, in and out (running/directory.py makes a checkpoint of one, whole or absent)."""

import dataclasses
import json
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from minilora.config import Config, LoraConfig, ModelConfig, UserError
from minilora.lora import from_peft_config, to_peft_config
from minilora.weights import open_safetensors, read_json

STATE = "trainer_state.json"


def save_adapter(directory: Path, state: dict[str, Tensor], lora: LoraConfig, config: Config) -> None:
    """adapter_model.safetensors and adapter_config.json as PEFT reads them; state: see `adapter_state`."""
    state = {name: tensor.contiguous().cpu() for name, tensor in state.items()}
    safetensors.torch.save_file(state, str(directory / "adapter_model.safetensors"), metadata={"format": "pt"})
    name = config.model.name
    if Path(name).expanduser().is_dir():
        name = str(Path(name).expanduser().resolve())  # found again from any working directory
    peft = to_peft_config(lora, name, config.model.revision, state)
    (directory / "adapter_config.json").write_text(json.dumps(peft, indent=2), encoding="utf-8")


def read_adapter(directory: Path) -> tuple[LoraConfig, dict[str, Tensor], dict]:
    """(settings, tensors, raw adapter_config.json) of a PEFT adapter. Raises UserError."""
    raw = read_json(directory / "adapter_config.json")
    path = directory / "adapter_model.safetensors"
    if not path.is_file():
        raise UserError(f"{path} does not exist (adapters saved as .bin are pickles, which are never loaded)")
    with open_safetensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
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
