"""Processes: who this one is, sums over all of them, and messages from the first. With one process all of it is free."""

import datetime
import os
import signal
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


class StopSignal:
    """SIGTERM and SIGINT ask for a checkpoint and a clean end; a second one ends at once."""

    def __init__(self) -> None:
        self.number = 0
        self.agreed = False

    def __enter__(self) -> "StopSignal":
        self.previous = {s: signal.signal(s, self.request) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def request(self, number: int, frame: object) -> None:
        self.number = number
        log(f"signal {number}: stopping after this step, with a checkpoint (again to stop at once)")
        for s in self.previous:
            signal.signal(s, signal.SIG_DFL)

    def agree(self, step: int, device: torch.device) -> None:
        """Learn whether any rank was asked to stop; with several GPUs only every ten steps, because looking waits."""
        if world_size() == 1:
            self.agreed = self.number != 0
        elif device.type == "cpu" or step % 10 == 0:
            asked = torch.zeros(65, device=device)
            asked[self.number] = 1
            numbers = all_reduce_sum(asked).nonzero().flatten().tolist()
            self.number, self.agreed = max(numbers), max(numbers) > 0

    def __exit__(self, *exception: object) -> None:
        for s, handler in self.previous.items():
            signal.signal(s, handler)
