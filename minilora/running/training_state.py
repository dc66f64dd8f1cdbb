"""What resuming needs beside the weights: the optimizer's state, and fp32 masters where the saved weights are rounded.

Random draws are pure functions of (seed, step), so no RNG state is kept.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from minilora import dist
from minilora.config import UserError
from minilora.dist import WHOLE, Whole
from minilora.running.ema import EMA
from minilora.weights import open_safetensors

TENSORS = "training_state.safetensors"
SPREAD = "training_state"  # of a sharded run, a directory


def training_tensors(
    optimizer: torch.optim.Optimizer, masters: dict[str, nn.Parameter], keep_masters: bool, ema: EMA | None = None
) -> dict[str, Tensor]:  # fmt: skip
    """The optimizer's state by parameter name, the fp32 masters where the saved weights are rounded, and where they are an
    average (which must be applied now) the weights that training goes on with, `raw`."""
    tensors = {f"master.{name}": p.detach().contiguous() for name, p in masters.items() if keep_masters}
    tensors |= {f"raw.{name}": other.contiguous() for name, other in (ema.others if ema else {}).items()}
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
        p = parameters[parameter_of(key)]
        if tensor.shape == place.local(p).shape:
            spread[key] = place.spread(tensor, p)
        else:
            spread[key if tensor.ndim == 0 or ".qmap" in key else f"{key}#{dist.rank()}/{dist.world_size()}"] = tensor
    try:
        dcp.save(spread, checkpoint_id=str(directory))
    except dcp.api.CheckpointException as error:  # raised on all processes, and no Exception
        raise next(iter(error.failures.values()))[0] from error


def parameter_of(key: str) -> str:
    """The parameter that a key of `training_tensors` belongs to: master.NAME, raw.NAME or optimizer.NAME.STATE."""
    kind, _, name = key.partition(".")
    return name.rpartition(".")[0] if kind == "optimizer" else name


def load_spread(directory: Path, parameters: dict[str, nn.Parameter], place: Whole) -> dict[str, Tensor]:
    """What `save_spread` wrote, on however many processes: of each tensor the rows that this process holds now."""
    import torch.distributed.checkpoint as dcp

    metadata = dcp.FileSystemReader(str(directory)).read_metadata().state_dict_metadata
    mine, state, local = f"#{dist.rank()}/{dist.world_size()}", {}, {}
    for key, entry in metadata.items():
        if "#" in key and not key.endswith(mine):
            continue
        p = parameters.get(parameter_of(key))
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
    spread: dict[str, nn.Parameter] | None = None, ema: EMA | None = None,
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
        if ema and name in ema.others:
            ema.others[name].copy_(p.detach())
        if f"raw.{name}" in tensors:
            p.data.copy_(own_rows(tensors[f"raw.{name}"]))
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
