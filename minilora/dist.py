"""Processes: who this one is, sums over all of them, and messages from the first. With one process all of it is free."""

import datetime
import os
import sys

import torch
import torch.distributed as torch_dist
from torch import Tensor

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)


def init(device: torch.device) -> None:
    """Join torchrun's process group, if there is one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch_dist.is_initialized():
        torch_dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT)


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
