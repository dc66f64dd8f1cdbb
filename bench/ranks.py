"""Memory of each of the processes that train one model together: python bench/ranks.py

A random Llama of 1.1 B parameters is written once (bf16, 2.2 GB, in a temporary directory). 1, 2
and 4 processes under torchrun load and train it with the package's own functions, once replicated
in each (ddp) and once sharded (fsdp): rank 16 on all linear layers, gradient checkpointing, and one
document of 256 tokens per process and step, all of it supervised. Printed is a table of the largest
figure of any process:

    held    bytes of parameters and buffers after loading, counted tensor by tensor
    load    peak of resident memory while loading
    step    the same over two training steps; with GPUs the device's, as its allocator counts it

The peaks are above what the process took before it had a model, libraries and connections
included. The seconds are those of loading and of the second step. Linux only: the kernel's record
of the peak is reset through /proc/self/clear_refs.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minilora import distributed  # noqa: E402 - found through the path set above
from minilora.build import LoadedModel, build_for_training  # noqa: E402
from minilora.checkpoint.hf import name_in_file  # noqa: E402
from minilora.checkpoint.tensor_files import TensorEntry, write_safetensors  # noqa: E402
from minilora.config import Config, LoraConfig  # noqa: E402
from minilora.model.hf_config import DecoderConfig  # noqa: E402
from minilora.model.transformer import CausalLM  # noqa: E402
from minilora.training.metrics import StepMetrics  # noqa: E402
from minilora.training.optimizer import (  # noqa: E402
    finish_gradients,
    make_optimizer,
    trainable_parameters,
)

VOCAB_SIZE = 32000
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
MIB = 2**20
STEPS = 2
HEADER = (
    "bits",
    "strategy",
    "processes",
    "held MiB",
    "x processes",
    "load: peak MiB",
    "load: s",
    "step: peak MiB",
    "step: s",
)


@dataclass
class Args:
    """Options of the benchmark."""

    processes: tuple[int, ...] = (1, 2, 4)
    """How many share the model, in turn; on a machine with GPUs at most as many as there are."""
    bits: tuple[Literal[16, 8, 4], ...] = (16, 4)
    """Widths of the frozen weights."""
    strategies: tuple[Literal["ddp", "fsdp"], ...] = ("ddp", "fsdp")
    """parallel.strategy; with one process there is no difference."""
    tokens: int = 256
    """Length of a process's document."""
    layers: int = 22
    """Blocks of the model; fewer for a quick look."""
    base: str | None = None
    """For the processes that this script starts: the model's directory. They measure one case and
    print JSON."""


def write_model(base: Path, layers: int) -> None:
    """Write a random checkpoint, one tensor at a time.

    All matrices of one shape have the same values: memory does not depend on them.
    """
    raw = {**MODEL, "num_hidden_layers": layers}
    with torch.device("meta"):
        model = CausalLM(DecoderConfig.from_hf(raw))
    entries = {
        name_in_file(name): TensorEntry(torch.bfloat16, tuple(p.shape))
        for name, p in model.named_parameters()
    }
    shapes = {entry.shape for entry in entries.values()}
    drawn = {shape: (torch.randn(shape) * 0.02).bfloat16() for shape in shapes}

    (base / "config.json").write_text(json.dumps(raw))
    file = base / "model.safetensors"
    write_safetensors(file, entries, lambda name: [drawn[entries[name].shape]])


def resident(field: Literal["VmRSS", "VmHWM"]) -> int:
    """Return the bytes of this process in memory: now, or at most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(field)]
    return int(line.split()[1]) * 1024


def reset_peak(device: torch.device) -> None:
    """Begin a new record of the peak of memory."""
    Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def measure(args: Args) -> dict[str, float]:
    """Return one process's figures for one case."""
    bits, strategy = args.bits[0], args.strategies[0]
    if bits < 16:
        import minilora.model.quantization  # noqa: F401 - its libraries are not part of the model
    config = Config(lora=LoraConfig(rank=16))
    config.model.dtype, config.model.bits = "bfloat16", bits
    config.parallel.strategy = strategy

    device = distributed.default_device()
    distributed.init_process_group(device)
    # this makes the connections and their buffers, which are not part of the model either
    distributed.all_reduce_sum(torch.zeros(1 << 20, device=device))
    distributed.barrier()
    before = resident("VmRSS")

    reset_peak(device)
    start = time.perf_counter()
    loaded = build_for_training(config, Path(args.base or ""), device)
    distributed.barrier()
    load_seconds = time.perf_counter() - start
    load_peak = resident("VmHWM") - before
    held = local_bytes(loaded)

    reset_peak(device)
    step_seconds = take_steps(loaded, config, args.tokens, device)
    step_peak = resident("VmHWM") - before
    if device.type == "cuda":
        step_peak = torch.cuda.max_memory_allocated(device)
    return {
        "held": held,
        "load_peak": load_peak,
        "load_seconds": load_seconds,
        "step_peak": step_peak,
        "step_seconds": step_seconds,
    }


def local_bytes(loaded: LoadedModel) -> int:
    """Return the bytes of the parameters and buffers that this process holds."""
    tensors = [loaded.layout.to_local(p.detach()) for p in loaded.model.parameters()]
    tensors += loaded.model.buffers()
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def take_steps(loaded: LoadedModel, config: Config, length: int, device: torch.device) -> float:
    """Train on a random document, and return the seconds of the last step."""
    parameters = trainable_parameters(loaded)
    optimizer = make_optimizer(parameters, config.train)
    metrics = StepMetrics(device)
    loaded.model.train()

    generator = torch.Generator().manual_seed(distributed.rank())
    tokens = torch.randint(VOCAB_SIZE, (length,), generator=generator)
    labels = tokens.clone()
    labels[0] = -100

    seconds = math.nan
    for _ in range(STEPS):
        start = time.perf_counter()
        loss = loaded.model(tokens.to(device), [length], labels=labels)
        loss.backward()
        metrics.add(loss.detach(), length - 1, length)
        supervised_tokens = metrics.end_step()
        max_norm = config.train.max_grad_norm
        norm = finish_gradients(loaded, parameters, supervised_tokens, max_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert math.isfinite(norm.item())  # this also waits for the device
        seconds = time.perf_counter() - start
    return seconds


def run(args: Args, base: str, processes: int, strategy: str, bits: int) -> dict[str, float]:
    """Measure one case in processes under torchrun, and return the largest figures of any."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    flags = ["--base", base, "--strategies", strategy, "--bits", str(bits)]
    flags += ["--tokens", str(args.tokens)]
    command = [*torchrun, f"--nproc_per_node={processes}", __file__, *flags]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        # Fixed, so that glibc returns large tensors to the system when they are freed: the figures
        # shall show what is needed, not the holes of its heap.
        "MALLOC_MMAP_THRESHOLD_": str(20 * MIB),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(rows) != processes:
        raise SystemExit(
            f"{processes} processes, {strategy}, {bits} bits: exit code {done.returncode}\n"
            f"{done.stderr[-3000:]}"
        )
    return {key: max(row[key] for row in rows) for key in rows[0]}


def table_row(cells: tuple) -> str:
    """Return a row of a markdown table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def main(args: Args) -> None:
    """Measure every case and print the table."""
    if args.base:
        # in one write, so that the lines of several processes do not mix
        print(json.dumps(measure(args)) + "\n", end="", flush=True)
        distributed.destroy_process_group()
        return

    print(table_row(HEADER))
    print("|" + "---|" * len(HEADER), flush=True)
    cases = [(b, s, n) for b in args.bits for s in args.strategies for n in args.processes]
    with tempfile.TemporaryDirectory() as base:
        write_model(Path(base), args.layers)
        for bits, strategy, processes in cases:
            if processes == 1 and strategy != args.strategies[0]:
                continue
            figures = run(args, base, processes, strategy, bits)
            held = figures["held"] / MIB
            cells = (
                bits,
                strategy if processes > 1 else "-",
                processes,
                f"{held:,.1f}",
                f"{held * processes:,.1f}",
                f"{figures['load_peak'] / MIB:,.0f}",
                f"{figures['load_seconds']:.1f}",
                f"{figures['step_peak'] / MIB:,.0f}",
                f"{figures['step_seconds']:.1f}",
            )
            print(table_row(cells), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
