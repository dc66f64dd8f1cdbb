"""Memory of one of many processes, computed on a CPU without any of them: python bench/scale.py

For Mistral-7B, Llama-3.1-8B and Llama-3.1-70B this takes a training step in shards (fsdp) with the
package's own code: `build_for_training`, the step of train.py with gradient checkpointing, AdamW,
and one document of 4,096 tokens per rank, all of it supervised. Tensors are fake (they have shapes
but no values) and so is the process group, whose collectives return at once. Neither the memory
nor the network is needed, and torch's FSDPMemTracker adds up what would be allocated. Printed is
"held / peak" in GiB of the first rank, which has the most rows: weights and optimizer states
between steps, and the most during a step.

Where the step differs from a real one:

- Weights are not read, but they have their memory.
- Fake tensors have no values to count, so the positions of the documents and the supervised rows
  are computed beforehand.
- FSDP cuts a parameter into one chunk per rank; here it gets the first rank's chunk only.
- The optimizer has taken a step before, so that its states are there.

bitsandbytes' 4-bit products are its own, with the fakes that it registers. Left out are the
allocator's fragmentation, the CUDA context and NCCL's buffers, the workspaces of kernels, the block
that a GPU gathers ahead of time, and loading.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

import torch
import torch.distributed
import tyro
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.testing._internal.distributed.fake_pg import FakeStore

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minilora import build, sharding  # noqa: E402 - found through the path set above
from minilora.config import Config, LoraConfig  # noqa: E402
from minilora.model import transformer  # noqa: E402
from minilora.model.attention import PackedAttention  # noqa: E402
from minilora.model.loss import _ChunkedCrossEntropy  # noqa: E402
from minilora.model.quantization import NESTED_BLOCK  # noqa: E402
from minilora.training.metrics import StepMetrics  # noqa: E402
from minilora.training.optimizer import (  # noqa: E402
    finish_gradients,
    make_optimizer,
    trainable_parameters,
)

LLAMA = {
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "num_key_value_heads": 8,
    "dtype": "bfloat16",
}
MODELS = {
    "1B": {
        **LLAMA,
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "7B": {
        **LLAMA,
        "model_type": "mistral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "sliding_window": None,
    },
    "8B": {
        **LLAMA,
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70B": {
        **LLAMA,
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
METHODS = {"lora16": "LoRA, 16 bits", "lora4": "LoRA, 4 bits", "full": "full, fp32 masters"}
GIB = 2**30
CPU = torch.device("cpu")


@dataclass
class Args:
    """Options of the benchmark."""

    models: tuple[Literal["1B", "7B", "8B", "70B"], ...] = ("7B", "8B", "70B")
    """Shapes; 1B is that of bench/ranks.py."""
    ranks: tuple[int, ...] = (8, 64, 1024)
    """Processes that share the model."""
    methods: tuple[Literal["lora16", "lora4", "full"], ...] = ("lora16", "lora4", "full")
    """LoRA over 16 or 4 bits (rank 16, all linear layers), or full fine-tuning in bf16 with fp32
    masters."""
    tokens: int = 4096
    """Length of a rank's document."""
    cell: bool = False
    """For the processes that this script starts: one cell alone, as JSON."""


# ---- what replaces code that needs values or all ranks


def load_no_weights(
    model: nn.Module,
    directory: Path,
    device: torch.device,
    dtype: torch.dtype,
    quantized: dict,
    *_: object,
) -> None:
    """Replace `load_weights`: make the buffers of double quantization.

    Parameters have their memory since the model was sharded.
    """
    for layer in quantized.values():
        num_nested_blocks = -(-layer.num_blocks // NESTED_BLOCK)
        layer.register_buffer("nested_absmax", torch.empty(num_nested_blocks, device=device))
        layer.register_buffer("nested_code", torch.empty(256, device=device))
        layer.register_buffer("offset", torch.empty((), device=device))


def first_chunk(tensor: Tensor, count: int, dim: int) -> list[Tensor]:
    """Replace FSDP's `_chunk_with_empty`, of whose chunks it uses its own and the first."""
    rows = -(-tensor.shape[dim] // count)
    return [tensor.narrow(dim, 0, rows)]


def loss_of_all_rows(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Replace `cross_entropy_sum`, which counts the supervised rows: here all are supervised."""
    return _ChunkedCrossEntropy.apply(hidden, weight, labels)


# ---- one cell of the table


def make_config(method: str) -> Config:
    """Return the configuration of a method."""
    config = Config(method="full" if method == "full" else "lora", lora=LoraConfig(rank=16))
    config.model.dtype = "bfloat16"
    config.model.bits = 4 if method == "lora4" else 16
    config.parallel.strategy = "fsdp"
    return config


def measure_cell(model: str, ranks: int, method: str, tokens: int) -> dict:
    """Return GiB of the first rank: between steps, at the peak of a step, and the peak's parts."""
    os.environ.update(WORLD_SIZE=str(ranks), RANK="0")
    torch.distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    # both have values, so they are made outside of the fake mode
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))
    attention = PackedAttention([tokens], CPU)

    fake_mode = FakeTensorMode()
    replacements = (
        (sharding, "init_device_mesh", lambda *_, **__: mesh),
        (build, "load_weights", load_no_weights),
        (transformer, "cross_entropy_sum", loss_of_all_rows),
        (_fsdp_param, "_chunk_with_empty", first_chunk),
    )
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        Path(directory, "config.json").write_text(json.dumps(MODELS[model]))
        for module, name, replacement in replacements:
            stack.enter_context(mock.patch.object(module, name, replacement))
        attention.positions = fake_mode.from_tensor(attention.positions)
        stack.enter_context(fake_mode)
        figures = track_step(Path(directory), make_config(method), tokens, attention)

    torch.distributed.destroy_process_group()
    return figures


def track_step(base: Path, config: Config, length: int, attention: PackedAttention) -> dict:
    """Build the model, take a step on one document, and return what the tracker has added up."""
    loaded = build.build_for_training(config, base, CPU)
    model = loaded.model.train()
    parameters = trainable_parameters(loaded)
    optimizer = make_optimizer(parameters, config.train)

    # a step before the one that is tracked: from now on the optimizer has its states
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    metrics = StepMetrics(CPU)
    ids = torch.zeros(length, dtype=torch.int64)
    tracker = FSDPMemTracker(model, optimizer)
    with tracker:
        held = tracker.get_tracker_snapshot()[CPU]["Total"]
        loss = model(ids, [length], labels=ids, attention=attention)
        loss.backward()
        metrics.add(loss.detach(), length, length)
        finish_gradients(loaded, parameters, metrics.end_step(), config.train.max_grad_norm)
        optimizer.step()

    peak = tracker.get_tracker_snapshot("peak")[CPU]
    parts = {str(getattr(key, "value", key)): value / GIB for key, value in peak.items()}
    return {"held": held / GIB, "peak": parts.pop("Total"), "parts": parts}


def measure(model: str, ranks: int, method: str, tokens: int) -> dict:
    """Measure a cell in a process of its own: the process group and its fakes are global."""
    flags = ["--models", model, "--ranks", str(ranks), "--methods", method]
    flags += ["--tokens", str(tokens), "--cell"]
    command = [sys.executable, __file__, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"{model}, {ranks} ranks, {method}: exit code {done.returncode}\n{done.stderr[-3000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


# ---- the table


def describe_peak(ranks: int, figures: dict) -> str:
    """Return the parts of a peak that are not next to nothing."""
    parts = [f"{name} {size:.2f}" for name, size in figures["parts"].items() if size >= 0.005]
    return f"{ranks:,}: " + ", ".join(parts)


def main(args: Args) -> None:
    """Measure every cell and print the table."""
    if args.cell:
        print(json.dumps(measure_cell(args.models[0], args.ranks[0], args.methods[0], args.tokens)))
        return

    columns = [f"{ranks:,} ranks" for ranks in args.ranks]
    print(f"| model | method | {' | '.join(columns)} |")
    print("|---|---|" + "---|" * len(columns), flush=True)
    for model in args.models:
        for method in args.methods:
            start = time.perf_counter()
            figures = [measure(model, ranks, method, args.tokens) for ranks in args.ranks]
            cells = [f"{cell['held']:.2f} / {cell['peak']:.2f}" for cell in figures]
            print(f"| {model} | {METHODS[method]} | {' | '.join(cells)} |", flush=True)

            seconds = time.perf_counter() - start
            peaks = [describe_peak(*pair) for pair in zip(args.ranks, figures, strict=True)]
            message = f"{seconds:.0f} s; at the peak, {'; '.join(peaks)}"
            print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
