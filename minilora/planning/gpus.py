"""GPUs by name, and how long a step takes on them.

seconds = floating-point operations / (peak of matrix products x share that training reaches)
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GPU:
    """The figures of a GPU's data sheet: dense products, without the doubling for sparse ones."""

    name: str
    memory_gb: tuple[int, ...]
    """Sizes that it is sold with."""
    tflops_16: float
    """Matrix products in 16 bits, summed in fp32: 10^12 operations a second."""
    tflops_32: float
    """In fp32."""
    bandwidth: float
    """Of its memory, in 10^9 bytes a second."""


GPUS = (
    GPU("A100", (40, 80), 312, 19.5, 2000),
    GPU("H100", (80,), 989, 67, 3350),
    GPU("H200", (141,), 989, 67, 4800),
    GPU("4090", (24,), 165, 83, 1008),
    GPU("L4", (24,), 121, 30, 300),
    GPU("T4", (16,), 65, 8.1, 320),
)

TRAINING_SHARE = 0.4
"""Share of the peak that a training step reaches, operations of recomputation included. Published
runs of LoRA on 7 and 8 B models reach 0.41 to 0.48 on an H100 (12,500 and 14,110 tokens/s in
NVIDIA's NeMo AutoModel) and 0.39 on an A100 (3,600 tokens/s, Hugging Face's peft)."""
CPU_SHARE = 0.65
"""The same of the measured peak of a CPU: a LoRA step of this project in bfloat16 reached 0.67
(bench/README.md)."""
DECODING_SHARE = 0.6
"""Share of the memory bandwidth at which decoding reads weights: 140 tokens/s of a 7B in 16 bits on
an H100 are 0.6 of it."""

USABLE_GIB = {16: 14.7, 24: 23.5, 40: 39.4, 80: 79.1, 141: 139.8}
"""By the size that a GPU is sold with, the GiB that a program can have."""
FITS_SHARE = 0.95
"""Share of that which a plan may take; the rest is for what torch's allocator cannot use."""


def usable_bytes(memory_gb: int) -> int:
    """Return how many bytes a plan may take on a GPU of that size."""
    return int(USABLE_GIB[memory_gb] * FITS_SHARE * 2**30)


def training_seconds(gpu: GPU, flops: float, dtype: torch.dtype) -> float:
    """Return how long the GPU takes for a number of operations in training."""
    peak = gpu.tflops_32 if dtype == torch.float32 else gpu.tflops_16
    return flops / (peak * 1e12 * TRAINING_SHARE)
