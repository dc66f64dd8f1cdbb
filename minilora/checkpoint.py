"""What a checkpoint holds, in and out (running/directory.py makes it appear whole, and finds the one to continue from).

A checkpoint holds what others read (a PEFT adapter or HF weights, the tokenizer files) and what resuming needs
(trainer_state.json, training_state.safetensors). Random draws are pure functions of (seed, step), so no RNG state is kept.
"""

import dataclasses
import json
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from minilora import dist
from minilora.config import Config, LoraConfig, ModelConfig, UserError
from minilora.dist import WHOLE, Whole
from minilora.lora import from_peft_config, to_peft_config
from minilora.weights import open_safetensors, read_json

STATE = "trainer_state.json"
TENSORS = "training_state.safetensors"
SPREAD = "training_state"  # of a sharded run, a directory


def save_adapter(directory: Path, state: dict[str, Tensor], lora: LoraConfig, config: Config) -> None:
    """adapter_model.safetensors and adapter_config.json as PEFT reads them; state: see `adapter_state`."""
    state = {name: tensor.contiguous().cpu() for name, tensor in state.items()}
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


def training_tensors(optimizer: torch.optim.Optimizer, masters: dict[str, nn.Parameter], keep_masters: bool) -> dict[str, Tensor]:
    """The optimizer's state by parameter name, and the fp32 masters where the saved weights are rounded."""
    tensors = {f"master.{name}": p.detach().contiguous() for name, p in masters.items() if keep_masters}
    for name, p in masters.items():
        for key, value in optimizer.state.get(p, {}).items():
            value = value.clone() if key.startswith("qmap") else torch.as_tensor(value)  # a code book shared by all parameters
            tensors[f"optimizer.{name}.{key}"] = value.detach().contiguous()
    return tensors


def save_spread(directory: Path, tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter], place: Whole) -> None:
    """training_tensors of a sharded run: each process writes its rows, through torch.distributed.checkpoint.

    What is not by rows (8-bit optimizers' statistics, made over a process's own rows) is kept by process.
    """
    import torch.distributed.checkpoint as dcp

    spread = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("optimizer.").removeprefix("master.")
        p = parameters[name if key.startswith("master.") else name.rpartition(".")[0]]
        if tensor.shape == place.local(p).shape:
            spread[key] = place.spread(tensor, p)
        else:
            spread[key if tensor.ndim == 0 or ".qmap" in key else f"{key}#{dist.rank()}/{dist.world_size()}"] = tensor
    try:
        dcp.save(spread, checkpoint_id=str(directory))
    except dcp.api.CheckpointException as error:  # raised on all processes, and no Exception
        raise next(iter(error.failures.values()))[0] from error


def load_spread(directory: Path, parameters: dict[str, nn.Parameter], place: Whole) -> dict[str, Tensor]:
    """What `save_spread` wrote, on however many processes: of each tensor the rows that this process holds now."""
    import torch.distributed.checkpoint as dcp

    metadata = dcp.FileSystemReader(str(directory)).read_metadata().state_dict_metadata
    mine, state, local = f"#{dist.rank()}/{dist.world_size()}", {}, {}
    for key, entry in metadata.items():
        if "#" in key and not key.endswith(mine):
            continue
        name = key.removeprefix("optimizer.").removeprefix("master.")
        p = parameters.get(name, parameters.get(name.rpartition(".")[0]))
        assert isinstance(entry, dcp.metadata.TensorStorageMetadata)
        by_rows = p is not None and entry.size == p.shape
        shape = place.local(p).shape if p is not None and by_rows else entry.size
        rows = local[key.removesuffix(mine)] = torch.empty(shape, dtype=entry.properties.dtype)
        state[key] = place.spread(rows, p) if p is not None and by_rows else rows
    if lost := [key for key in metadata if "#" in key and key.partition("#")[0] not in local]:
        raise UserError(f"{directory}: 8-bit optimizer states continue only on as many processes as saved them ({lost[0]})")
    dcp.load(state, checkpoint_id=str(directory), no_dist=dist.world_size() == 1)
    return local


def load_training_tensors(
    directory: Path, optimizer: torch.optim.Optimizer, masters: dict[str, nn.Parameter], place: Whole = WHOLE,
    spread: dict[str, nn.Parameter] | None = None,
) -> None:  # fmt: skip
    """Put back what `training_tensors` took, on however many processes; every parameter must find its state.

    spread: the model's parameters, where `masters` are this process's rows of them.
    """
    parameters = spread or masters
    if (directory / SPREAD).is_dir():
        tensors = load_spread(directory / SPREAD, parameters, place)
    else:
        with open_safetensors(directory / TENSORS) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    for name, p in masters.items():
        whole = parameters[name]

        def own_rows(tensor: Tensor, whole: Tensor = whole, p: Tensor = p) -> Tensor:
            return tensor[place.rows(whole)] if tensor.shape == whole.shape and tensor.shape != p.shape else tensor

        if f"master.{name}" in tensors:
            p.data.copy_(own_rows(tensors[f"master.{name}"]))
        prefix = f"optimizer.{name}."
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if not state:
            raise UserError(f"{directory / TENSORS}: no optimizer state for {name}")
        if ("exp_avg" in state) != isinstance(optimizer, torch.optim.AdamW):
            raise UserError(f"{directory / TENSORS}: written by another optimizer: continue with the train.optimizer it had")
        optimizer.state[p] = {  # bitsandbytes counts its steps in an int
            key: int(value) if value.dtype == torch.int64 else own_rows(value).to(p.device, copy=True)
            for key, value in state.items()
        }
