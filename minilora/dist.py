"""Processes: who this one is, sums over all of them, and messages from the first. With one process all of it is free."""

import datetime
import os
import sys

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)


def init(device: torch.device, timeout: datetime.timedelta | None = None) -> None:
    """Join torchrun's process group, if there is one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch_dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        torch_dist.init_process_group(backend, timeout=timeout or COLLECTIVE_TIMEOUT)


def rank() -> int:
    """This process's number, from torchrun's environment (known before the group is joined)."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def default_device() -> torch.device:
    """This process's accelerator, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over all processes, in place."""
    if torch_dist.is_initialized():
        torch_dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    if torch_dist.is_initialized():
        torch_dist.barrier()


def finish() -> None:
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def log(message: str) -> None:
    """Print on the first process, to stderr, so that stdout stays for results."""
    if rank() == 0:
        print(message, file=sys.stderr, flush=True)


def gather_objects(mine: list) -> list[list]:
    """Every process's list, in order of rank."""
    lists: list[list] = [mine] * world_size()
    if torch_dist.is_initialized():
        torch_dist.all_gather_object(lists, mine)
    return lists


def everyone(flag: bool, device: torch.device) -> bool:
    """Whether `flag` holds on all processes; all of them must ask."""
    return bool(all_reduce_sum(torch.tensor(float(flag), device=device)) == world_size())


class Whole:
    """Where parameters lie: whole on every process (data parallel). `parallel.Shards` spreads their rows instead."""

    count = 1  # processes that hold one copy of the model between them

    def rows(self, p: Tensor) -> slice:
        """The rows (first axis) of a parameter that this process holds."""
        return slice(None)

    def put(self, module: nn.Module, name: str, rows: Tensor) -> None:
        """Give the parameter `module.name`, until now on the meta device, these values of its rows."""
        setattr(module, name, nn.Parameter(rows, requires_grad=getattr(module, name).requires_grad))

    def local(self, p: Tensor) -> Tensor:
        """This process's rows of a parameter, in the parameter's own memory."""
        return p

    def spread(self, rows: Tensor, like: Tensor) -> Tensor:
        """`rows` as this process's part of a tensor that is spread as the parameter `like` is."""
        return rows

    def gather(self, rows: Tensor, like: Tensor) -> Tensor:
        """All rows, from everybody's, of a tensor that is spread as `like` is; all processes must ask."""
        return rows

    def reduce(self, model: nn.Module, now: bool) -> None:
        """Whether the next backward pass sums gradients over processes; here `sum_gradients` does it."""

    def rest(self, model: nn.Module) -> None:
        """After passes forward alone: keep no more than this process's rows."""

    def sum_gradients(self, model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
        """Leave in `parameters` (see `local`) the sums over all processes of the gradients of an optimizer step."""
        for p in parameters.values():
            if p.grad is None:  # a process without documents in a last, partial step
                p.grad = torch.zeros_like(p)
        if world_size() > 1:
            grads = [p.grad for p in parameters.values() if p.grad is not None]
            bucket = all_reduce_sum(torch.cat([g.flatten() for g in grads]))
            for g, part in zip(grads, bucket.split([g.numel() for g in grads]), strict=True):
                g.copy_(part.view_as(g))

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the processes that hold one copy of the model between them."""
        return value


WHOLE = Whole()
