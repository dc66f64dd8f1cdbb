"""The tensors of training_state.safetensors: what resuming needs beside the saved weights.

That is the optimizer's state; the float32 weights where the saved ones are rounded to 16 bits; and
the trained weights where the saved ones are their moving average (EMA). The tensors are named

    optimizer.PARAMETER.KEY     a tensor of the parameter's optimizer state
    master.PARAMETER            the saved weight in float32; with EMA that is the average
    raw.PARAMETER               only with EMA: the weight that training goes on with

A run that shards its model writes them with torch.distributed.checkpoint, any other run as one
safetensors file. Both can be continued with another number of processes, except sharded states of
8-bit optimizers, whose statistics belong to the rows that one process had. States of random
generators are not needed: all draws are functions of the seed and the step.
"""

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from minilora import distributed
from minilora.checkpoint.tensor_files import open_safetensors
from minilora.distributed import REPLICATED, Layout
from minilora.errors import UserError

TENSORS_FILE = "training_state.safetensors"
SHARDED_DIRECTORY = "training_state"


def training_tensors(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    keep_masters: bool,
    raw_weights: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Collect the tensors that resuming needs.

    Args:
        optimizer: has the state of the parameters.
        parameters: the parameters by name, with the values that are saved; of a sharded model,
            this process's rows.
        keep_masters: include these values in float32, because the saved ones are rounded.
        raw_weights: with EMA the weights that training goes on with, because `parameters` now hold
            their average; otherwise None or empty.
    """
    tensors: dict[str, Tensor] = {}
    if keep_masters:
        for name, p in parameters.items():
            tensors[f"master.{name}"] = p.detach().contiguous()
    if raw_weights is not None:
        for name, weight in raw_weights.items():
            tensors[f"raw.{name}"] = weight.contiguous()
    for name, p in parameters.items():
        for key, value in optimizer.state.get(p, {}).items():
            if key.startswith("qmap"):
                # bitsandbytes' code book is one tensor in the states of all parameters,
                # and safetensors refuses tensors that share memory
                value = value.clone()
            tensor = torch.as_tensor(value)
            tensors[f"optimizer.{name}.{key}"] = tensor.detach().contiguous()
    return tensors


def save_training_tensors(
    directory: Path,
    tensors: dict[str, Tensor],
    model_parameters: dict[str, nn.Parameter],
    layout: Layout,
) -> None:
    """Write `training_tensors` into a checkpoint's directory; all processes call this together.

    Args:
        directory: the checkpoint's directory.
        tensors: see `training_tensors`.
        model_parameters: the model's parameters by name.
        layout: which rows of them this process holds.
    """
    if layout.shard_count > 1:
        save_sharded(directory / SHARDED_DIRECTORY, tensors, model_parameters, layout)
    elif distributed.rank() == 0:
        safetensors.torch.save_file(tensors, str(directory / TENSORS_FILE))


def save_sharded(
    directory: Path,
    tensors: dict[str, Tensor],
    model_parameters: dict[str, nn.Parameter],
    layout: Layout,
) -> None:
    """Write the tensors of a sharded run: each process writes its rows.

    Statistics of 8-bit optimizers are not rows of a parameter, because they are computed over
    blocks of what a process holds. They are written once for each process, under a name that ends
    with `#RANK/WORLD_SIZE`.
    """
    import torch.distributed.checkpoint as dcp

    stored = {}
    for key, tensor in tensors.items():
        p = model_parameters[_parameter_of(key)]
        # A tensor of the parameter's shape has one value for each weight. The statistics and the
        # code book (qmap) of an 8-bit state have one axis, and never the length of a parameter with
        # one axis: bitsandbytes keeps 32-bit states of parameters that small.
        if tensor.shape == layout.to_local(p).shape:
            stored[key] = layout.to_dtensor(tensor, p)
        elif tensor.ndim == 0 or ".qmap" in key:
            stored[key] = tensor  # the same on all processes
        else:
            stored[key + _process_suffix()] = tensor
    try:
        dcp.save(stored, checkpoint_id=str(directory))
    except dcp.api.CheckpointException as error:
        # All processes get this error. It is not an Exception, and it hides the one that matters.
        first_failure, _traceback = next(iter(error.failures.values()))
        raise first_failure from error


def load_sharded(
    directory: Path, model_parameters: dict[str, nn.Parameter], layout: Layout
) -> dict[str, Tensor]:
    """Read what `save_sharded` wrote, on any number of processes but for 8-bit optimizers.

    Returns:
        The tensors by name; of those that are rows of a parameter, the rows that this process
        holds now.

    Raises:
        UserError: there are statistics of 8-bit optimizers for another number of processes.
    """
    import torch.distributed.checkpoint as dcp

    metadata = dcp.FileSystemReader(str(directory)).read_metadata().state_dict_metadata
    suffix = _process_suffix()
    stored: dict[str, Tensor] = {}  # by the names in the files; dcp.load fills them
    row_names = set()  # which of them are rows of a parameter
    of_other_processes = []  # keys of statistics that processes have written for themselves
    for key, entry in metadata.items():
        if "#" in key and not key.endswith(suffix):
            of_other_processes.append(key)
            continue
        assert isinstance(entry, dcp.metadata.TensorStorageMetadata)
        p = model_parameters.get(_parameter_of(key))
        if p is not None and entry.size == p.shape:  # one value for each weight, see save_sharded
            rows = torch.empty_like(layout.to_local(p), dtype=entry.properties.dtype)
            stored[key] = layout.to_dtensor(rows, p)
            row_names.add(key)
        else:
            stored[key] = torch.empty(entry.size, dtype=entry.properties.dtype)

    for key in of_other_processes:
        name, _, _ = key.partition("#")
        if name not in stored and name + suffix not in stored:  # there is none of this process
            raise UserError(
                f"{directory}: states of an 8-bit optimizer can only be continued with the number "
                f"of processes that saved them ({key})"
            )
    dcp.load(stored, checkpoint_id=str(directory), no_dist=distributed.world_size() == 1)

    local = {}
    for key, tensor in stored.items():
        # A DTensor may have copied the rows that it was made of: those that were filled are its own
        name = key.removesuffix(suffix)
        local[name] = layout.to_local(tensor) if key in row_names else tensor
    return local


def _process_suffix() -> str:
    """Return the end of the names of tensors that each process writes for itself."""
    return f"#{distributed.rank()}/{distributed.world_size()}"


def _parameter_of(key: str) -> str:
    """Return the name of the parameter that a key of `training_tensors` belongs to."""
    kind, _, name = key.partition(".")
    if kind == "optimizer":
        name, _, _ = name.rpartition(".")
    return name


def load_training_tensors(
    directory: Path,
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    average: dict[str, Tensor] | None = None,
    layout: Layout = REPLICATED,
    model_parameters: dict[str, nn.Parameter] | None = None,
) -> None:
    """Restore what `training_tensors` collected, maybe on another number of processes.

    Args:
        directory: a checkpoint.
        optimizer: gets the state.
        parameters: the trained parameters by name; of a sharded model, this process's rows. They
            have the checkpoint's weights, and get those that training goes on with.
        average: the moving average of the weights by name, if there is one; it gets the values that
            the checkpoint has.
        layout: which rows this process holds.
        model_parameters: the model's parameters by name (default: `parameters`).

    Raises:
        UserError: a parameter has no state there, or the state of another optimizer.
    """
    if model_parameters is None:
        model_parameters = parameters
    source = directory / SHARDED_DIRECTORY
    if source.is_dir():
        tensors = load_sharded(source, model_parameters, layout)
    else:
        source = directory / TENSORS_FILE
        with open_safetensors(source) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}

    saved: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for key, tensor in tensors.items():
        name = _parameter_of(key)
        if name in parameters:
            p, model_p = parameters[name], model_parameters[name]
            # a sharded run continues one that was not: it takes its rows from the whole tensor
            has_all_rows = tensor.shape == model_p.shape and tensor.shape != p.shape
            saved[name][key] = tensor[layout.local_rows(model_p)] if has_all_rows else tensor

    for name, p in parameters.items():
        master = saved[name].pop(f"master.{name}", None)
        raw = saved[name].pop(f"raw.{name}", None)
        # The parameter has the saved weight now: of an EMA run the average, maybe in 16 bits.
        # First, replace it by the same weight before it was rounded.
        if master is not None:
            p.data.copy_(master)
        # Second, while the parameter still has the average, restore the average.
        if average and name in average:
            average[name].copy_(p.detach())
        # Third, give the parameter the weight that training goes on with.
        if raw is not None:
            p.data.copy_(raw)

        where = f"{source}: {name}"
        state = {key.rpartition(".")[2]: tensor for key, tensor in saved[name].items()}
        optimizer.state[p] = _optimizer_state(state, optimizer, p, where)


def _optimizer_state(
    saved: dict[str, Tensor], optimizer: torch.optim.Optimizer, p: nn.Parameter, where: str
) -> dict[str, Tensor | int]:
    """Return a parameter's state as its optimizer keeps it. Raises UserError."""
    if not saved:
        raise UserError(f"{where}: there is no optimizer state of this parameter")
    saved_by_torch = "exp_avg" in saved  # bitsandbytes has state1 in place of it
    is_torch = isinstance(optimizer, torch.optim.AdamW)
    if saved_by_torch != is_torch:
        raise UserError(
            f"{where}: written by another optimizer: continue with the train.optimizer that it had"
        )
    state: dict[str, Tensor | int] = {}
    for key, tensor in saved.items():
        if key == "step" and not is_torch:
            state[key] = int(tensor)  # bitsandbytes counts in an int, torch in an fp32 tensor
        else:
            state[key] = tensor.to(p.device, copy=True)
    return state
