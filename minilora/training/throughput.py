"""How fast a run computes, beside what the machine could do, and how much memory it takes."""

import functools
import os
import re
import resource
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from minilora import distributed
from minilora.build import LoadedModel
from minilora.model.flops import training_flops
from minilora.model.lora import lora_layers
from minilora.training.batches import MicroBatch

PEAK_SECONDS = 0.2
"""How long the peak is measured, at most."""
FULL_PRODUCTS = 4
"""After this many products of the largest size measuring ends earlier."""


class Throughput:
    """The model's operations per second as a share of the machine's peak, and the peak of memory.

    A model's operations are those of `training_flops` without any recomputation: a run that
    computes its blocks twice, to save memory, shows a smaller share.
    """

    def __init__(self, loaded: LoadedModel, device: torch.device):
        """Measure the machine's peak. All processes must do this together.

        Args:
            loaded: the model in training.
            device: where it is trained.
        """
        adapters = [layer for _, layer in lora_layers(loaded.model)]
        self.adapter_parameters = sum(a.lora_A.numel() + a.lora_B.numel() for a in adapters)
        self.loaded = loaded
        self.device = device
        self.flops = 0.0
        """Of this process, since the last `figures`."""

        distributed.barrier()  # processes that share the cores of a CPU share them here too
        own_peak = matrix_peak(device, loaded.dtype)
        self.peak = self._sum(own_peak)
        """Operations per second of all processes together."""

    def add(self, micro_batch: MicroBatch) -> None:
        """Count the operations of a micro-batch; a placeholder has none."""
        if micro_batch.num_tokens == 0:
            return
        self.flops += training_flops(
            self.loaded.model.config,
            micro_batch.lengths,
            micro_batch.num_supervised,
            trained="full" if self.loaded.lora is None else "lora",
            adapter_parameters=self.adapter_parameters,
        )

    def figures(self, seconds: float) -> dict[str, float]:
        """Return what a log entry shows, and start counting again. All processes call it together.

        Args:
            seconds: what the steps since the last call took.

        Returns:
            share_of_peak, and peak_memory in bytes, which is that of this process.
        """
        flops_per_second = self._sum(self.flops) / max(seconds, 1e-9)
        self.flops = 0.0
        # if the machine was busy while the peak was measured, the run may be faster than it
        self.peak = max(self.peak, flops_per_second)
        share = flops_per_second / self.peak
        return {
            "share_of_peak": float(f"{share:.3g}"),
            "peak_memory": peak_memory(self.device),
        }

    def _sum(self, value: float) -> float:
        """Sum a number over all processes."""
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        return float(distributed.all_reduce_sum(total))


@functools.cache
def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measure how many operations per second the device does in large matrix products.

    The products are [n, size] by [size, size] with n growing: the first ones are so small that a
    slow machine, too, is measured in time. The fastest counts, so a disturbance does little harm.

    Returns:
        Floating-point operations per second.
    """
    size = 8192 if device.type == "cuda" else 2048
    rows = size // 32
    # Random numbers, because a GPU multiplies constants faster; not from the run's own generator.
    # Some rows again and again, because on a CPU it takes longer to draw all of them.
    generator = torch.Generator(device).manual_seed(0)
    drawn = torch.randn(rows, size, generator=generator, device=device).to(dtype)
    matrix = drawn.repeat(size // rows, 1)  # [size, size]
    _product_seconds(drawn, matrix)  # the first product loads the library

    rates = []
    next_seconds = 0.0  # as predicted from the last product
    full_products = 0
    end = time.perf_counter() + PEAK_SECONDS
    while full_products < FULL_PRODUCTS and time.perf_counter() + next_seconds < end:
        seconds = _product_seconds(matrix[:rows], matrix)
        rates.append(2 * rows * size * size / seconds)
        next_seconds = seconds
        if rows == size:
            full_products += 1
        else:
            rows, next_seconds = 2 * rows, 2 * seconds
    return max(rates)


def _product_seconds(x: Tensor, matrix: Tensor) -> float:
    """Time x [n, size] times the transpose of a matrix [size, size], on a device that is idle."""
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    torch.mm(x, matrix.t())
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(device: torch.device) -> int:
    """Return the most memory this process has held so far, in bytes.

    On a GPU that is what torch had allocated of it; on a CPU the resident memory of the process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    text = status.read_text() if status.is_file() else ""
    found = re.search(r"VmHWM:\s+(\d+) kB", text)
    if found:
        return int(found[1]) * 1024
    # not first, because on Linux it begins with the memory of the process that started this one
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def allocated_memory(device: torch.device) -> int:
    """Return the memory that this process holds now, in bytes, counted as by `peak_memory`.

    0 on a CPU whose system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        return 0
    _size, resident_pages, *_ = statm.read_text().split()
    return int(resident_pages) * os.sysconf("SC_PAGE_SIZE")
