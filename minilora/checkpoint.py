"""Checkpoints of a run: complete or absent, never half (running/directory.py finds the one to continue from).

A checkpoint holds what others read (a PEFT adapter or HF weights, the tokenizer files) and what resuming needs
(trainer_state.json, training_state.safetensors). Random draws are pure functions of (seed, step), so no RNG state is kept.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from minilora.config import Config, LoraConfig, ModelConfig, RunError, UserError
from minilora.lora import adapter_state, from_peft_config, to_peft_config
from minilora.tokenizer import Tokenizer
from minilora.weights import open_safetensors, read_json, save_config, save_weights

STATE = "trainer_state.json"
TENSORS = "training_state.safetensors"


@dataclasses.dataclass
class TrainerState:
    """Where a run stands; `step` optimizer steps are done."""

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    finished: bool = False
    data: str = ""  # digest of the tokenised training rows
    docs_per_step: int = 0


def write_atomically(directory: Path, write: Callable[[Path], None]) -> None:
    """Make `directory` appear whole: written under a temporary name, synced to disk, listed in a manifest, renamed.

    Raises RunError if the disk will not take it; whatever was there before is intact.
    """
    temporary = directory.with_name(f".tmp-{directory.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    make_directory(temporary)
    try:
        write(temporary)
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        manifest = {str(p.relative_to(temporary)): p.stat().st_size for p in files}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        for path in files:  # the safetensors library makes its files for the owner alone
            shutil.copymode(temporary / "manifest.json", path)
        for path in [*files, temporary / "manifest.json", temporary]:
            _sync(path)
        shutil.rmtree(directory, ignore_errors=True)  # incomplete, or of a run continued from before it
        os.rename(temporary, directory)
        _sync(directory.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError | safetensors.SafetensorError):  # the library reports a full disk as its own error
            raise RunError(f"{directory} could not be written ({error}); what was there before is intact") from error
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be made or is no directory: {error.strerror}") from error


def is_complete(directory: Path) -> bool:
    """Whether every file of the manifest is there in its size."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        return all((directory / name).stat().st_size == size for name, size in manifest.items())
    except (OSError, ValueError):
        return False


def save(
    directory: Path, model: nn.Module, tokenizer: Tokenizer, config: Config, lora: LoraConfig | None, state: TrainerState,
    tensors: dict[str, Tensor], base: Path, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Write a checkpoint. tensors: what resuming needs (see `training_tensors`); base: the directory of the base model."""

    def write(target: Path) -> None:
        tokenizer.save(target)
        if lora is not None:
            save_adapter(target, model, lora, config)
        else:
            save_weights(model, target, dtype)
            save_config(target, read_json(base / "config.json"), dtype)
        safetensors.torch.save_file(tensors, str(target / TENSORS))
        record = {**dataclasses.asdict(state), "config": dataclasses.asdict(config)}
        (target / STATE).write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")

    write_atomically(directory, write)


def save_adapter(directory: Path, model: nn.Module, lora: LoraConfig, config: Config) -> None:
    """adapter_model.safetensors and adapter_config.json as PEFT reads them."""
    state = {name: tensor.contiguous().cpu() for name, tensor in adapter_state(model).items()}
    safetensors.torch.save_file(state, str(directory / "adapter_model.safetensors"), metadata={"format": "pt"})
    name = config.model.name
    if Path(name).expanduser().is_dir():
        name = str(Path(name).expanduser().resolve())  # found again from any working directory
    peft = to_peft_config(lora, name, config.model.revision)
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
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
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


def training_tensors(optimizer: torch.optim.Optimizer, masters: dict[str, nn.Parameter], keep_masters: bool) -> dict[str, Tensor]:
    """The optimizer's state by parameter name, and the fp32 masters where the saved weights are rounded."""
    tensors = {f"master.{name}": p.detach().contiguous() for name, p in masters.items() if keep_masters}
    for name, p in masters.items():
        for key, value in optimizer.state.get(p, {}).items():
            value = value.clone() if key.startswith("qmap") else torch.as_tensor(value)  # a code book shared by all parameters
            tensors[f"optimizer.{name}.{key}"] = value.detach().contiguous()
    return tensors


def load_training_tensors(directory: Path, optimizer: torch.optim.Optimizer, masters: dict[str, nn.Parameter]) -> None:
    """Put back what `training_tensors` took; every parameter must find its state."""
    with open_safetensors(directory / TENSORS) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    for name, p in masters.items():
        if f"master.{name}" in tensors:
            p.data.copy_(tensors[f"master.{name}"])
        prefix = f"optimizer.{name}."
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if not state:
            raise UserError(f"{directory / TENSORS}: no optimizer state for {name}")
        if ("exp_avg" in state) != isinstance(optimizer, torch.optim.AdamW):
            raise UserError(f"{directory / TENSORS}: written by another optimizer: continue with the train.optimizer it had")
        optimizer.state[p] = {  # bitsandbytes counts its steps in an int
            key: int(value) if value.dtype == torch.int64 else value.to(p.device, copy=True) for key, value in state.items()
        }
