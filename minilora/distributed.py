"""Processes: which one this is, sums over all of them, and how they share a model's parameters.

torchrun starts several processes and tells each its rank in the environment. Everything here
works without torchrun too: a single process has rank 0 of 1, sums are its own values, and
barriers return at once.

A `Layout` says how a model's parameters are distributed over the processes. There are two. With
`Replicated`, the default, every process holds all of them (data parallel). `sharding.Sharded` gives
each process some rows of every parameter (FSDP). Code that reads, writes or sums parameters calls
the methods of `Layout` and is the same for both.
"""

import abc
import datetime
import os
import re
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as torch_distributed
import tqdm
from torch import Tensor, nn

from minilora.errors import UserError

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)
"""How long a process waits for the others in a collective operation before it fails."""


def init_process_group(device: torch.device, timeout: datetime.timedelta | None = None) -> None:
    """Join torchrun's process group, if there is one.

    Args:
        device: decides the backend: NCCL for tensors on a GPU, gloo for those on the CPU.
        timeout: how long a collective operation may wait (default: COLLECTIVE_TIMEOUT).
    """
    if world_size() > 1 and not torch_distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        torch_distributed.init_process_group(backend, timeout=timeout or COLLECTIVE_TIMEOUT)


def destroy_process_group() -> None:
    """Leave the process group, if this process is in one."""
    if torch_distributed.is_initialized():
        torch_distributed.destroy_process_group()


def rank() -> int:
    """Return this process's number from torchrun's environment, also before it joins the group."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes from torchrun's environment.

    Raises:
        UserError: it is not a number there.
    """
    number = os.environ.get("WORLD_SIZE", "1")
    if not number.isdecimal() or int(number) == 0:
        raise UserError(f"WORLD_SIZE={number!r} in the environment is not a number of processes")
    return int(number)


def default_device() -> torch.device:
    """Return this process's GPU, made torch's current one, or the CPU if there is no GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def use_expandable_segments() -> None:
    """Let CUDA's allocator grow its segments, which wastes less memory where lengths vary.

    Without it, memory that was freed in pieces of one size cannot serve a tensor of another. torch
    reads the variable when CUDA is first used. What the user has set there stays as it is.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the variable's older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device, from the CPU without waiting for the copy.

    Only memory that is pinned, which the system cannot move, is copied to a GPU while the CPU goes
    on; torch keeps it until the copy is done.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def free_bytes(device: torch.device) -> int:
    """Return the memory that this process can still use on a device.

    On a GPU that includes what torch keeps in its cache; on a CPU it is this process's share of
    what the system says is available, or, where it does not say (macOS), of all memory.
    """
    if device.type == "cuda":
        unused, _total = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return unused + cached
    meminfo = Path("/proc/meminfo")
    text = meminfo.read_text() if meminfo.is_file() else ""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", text, re.M)
    available = int(found[1]) * 1024 if found else machine_bytes()
    return available // processes_of_machine()


def machine_bytes() -> int:
    """Return how much memory this machine has, beside that of its GPUs."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def processes_of_machine() -> int:
    """Return how many of the run's processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place, and return it."""
    if torch_distributed.is_initialized():
        torch_distributed.all_reduce(tensor)
    return tensor


def barrier() -> None:
    """Wait until every process has come here."""
    if torch_distributed.is_initialized():
        torch_distributed.barrier()


def gather_objects(mine: list) -> list[list]:
    """Return every process's list, in order of rank."""
    lists: list[list] = [mine] * world_size()  # placeholders, unless there is only one process
    if torch_distributed.is_initialized():
        torch_distributed.all_gather_object(lists, mine)
    return lists


def all_agree(flag: bool, device: torch.device) -> bool:
    """Return whether `flag` is true on every process; all of them must call this together."""
    votes = all_reduce_sum(torch.tensor(float(flag), device=device))
    return bool(votes == world_size())


def log(message: str) -> None:
    """Print a message on the first process, to stderr, which leaves stdout for results.

    A progress bar on stderr is cleared first and drawn again after it.
    """
    if rank() == 0:
        tqdm.tqdm.write(message, file=sys.stderr)


class Layout(abc.ABC):
    """How a model's parameters are distributed over the processes.

    A process holds some *rows* of each parameter, that is a range of its first axis; in
    `Replicated` that is all of them.
    """

    shard_count: int
    """Number of processes that hold one copy of the model between them."""

    @abc.abstractmethod
    def local_rows(self, p: Tensor) -> slice:
        """Return which rows of a parameter this process holds."""

    @abc.abstractmethod
    def materialize(self, module: nn.Module, name: str, rows: Tensor) -> None:
        """Give the parameter `module.name`, which has a shape but no values yet, its values.

        Args:
            module: the module that has the parameter.
            name: the parameter's name in the module.
            rows: the values of this process's rows, in the dtype and on the device they shall have.
        """

    @abc.abstractmethod
    def to_local(self, p: Tensor) -> Tensor:
        """Return this process's rows of a parameter, as a view of the parameter's memory."""

    @abc.abstractmethod
    def to_dtensor(self, rows: Tensor, like: Tensor) -> Tensor:
        """Return a tensor that is distributed as the parameter `like` is.

        Args:
            rows: this process's rows of it, which are not copied.
            like: a parameter with as many rows in all.

        Returns:
            A DTensor if parameters are sharded; `rows` itself if they are replicated.
        """

    @abc.abstractmethod
    def full_tensor(self, rows: Tensor, like: Tensor) -> Tensor:
        """Gather all rows of a tensor that is distributed as the parameter `like` is.

        All processes must call this together, each with its own rows.
        """

    @abc.abstractmethod
    def set_gradient_sync(self, model: nn.Module, enabled: bool) -> None:
        """Choose whether the next backward pass sums sharded gradients over the processes."""

    @abc.abstractmethod
    def reshard(self, model: nn.Module) -> None:
        """Free the rows of other processes that forward passes without a backward pass gathered."""

    @abc.abstractmethod
    def keep_gathered(self, model: nn.Module) -> AbstractContextManager[None]:
        """Gather rows of other processes once for many forward passes without a backward pass.

        Inside the `with` block what a forward pass gathers stays for the next one, if there is
        memory for it; at the end it is freed. All processes call this together.
        """

    @abc.abstractmethod
    def sum_gradients(self, model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
        """Leave in `parameters` the gradients of one optimizer step, summed over all processes.

        Args:
            model: the model whose backward passes made the gradients.
            parameters: the trained parameters by name; of a sharded model, this process's rows.
        """

    @abc.abstractmethod
    def sum_over_shards(self, value: Tensor) -> Tensor:
        """Sum over the processes that hold one copy of the model between them, in place."""


class Replicated(Layout):
    """The layout in which every process holds all rows of every parameter (data parallel)."""

    shard_count = 1

    def local_rows(self, p: Tensor) -> slice:
        """Return all rows."""
        return slice(None)

    def materialize(self, module: nn.Module, name: str, rows: Tensor) -> None:
        """Replace the parameter, which is on the meta device, by a new one with these values."""
        requires_grad = getattr(module, name).requires_grad
        setattr(module, name, nn.Parameter(rows, requires_grad=requires_grad))

    def to_local(self, p: Tensor) -> Tensor:
        """Return the parameter itself."""
        return p

    def to_dtensor(self, rows: Tensor, like: Tensor) -> Tensor:
        """Return the rows themselves, which are all there are."""
        return rows

    def full_tensor(self, rows: Tensor, like: Tensor) -> Tensor:
        """Return the rows themselves, which are all there are."""
        return rows

    def set_gradient_sync(self, model: nn.Module, enabled: bool) -> None:
        """Do nothing: `sum_gradients` sums once per optimizer step, after all backward passes."""

    def reshard(self, model: nn.Module) -> None:
        """Do nothing: no process gathers rows of another one."""

    def keep_gathered(self, model: nn.Module) -> AbstractContextManager[None]:
        """Do nothing: no process gathers rows of another one."""
        return nullcontext()

    def sum_gradients(self, model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
        """Sum the gradients over all processes, all of them in one all-reduce."""
        grads = []
        for p in parameters.values():
            if p.grad is None:
                # This process had no documents in a last, partial step. It still takes part in the
                # sum, and must step its optimizer as the others do.
                p.grad = torch.zeros_like(p)
            grads.append(p.grad)
        if world_size() == 1:
            return

        bucket = all_reduce_sum(torch.cat([grad.flatten() for grad in grads]))
        parts = bucket.split([grad.numel() for grad in grads])
        for grad, part in zip(grads, parts, strict=True):
            grad.copy_(part.view_as(grad))

    def sum_over_shards(self, value: Tensor) -> Tensor:
        """Return the value itself: each process holds a whole copy of the model."""
        return value


REPLICATED = Replicated()
