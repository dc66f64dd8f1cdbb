"""Memory of each process that trains one model together: python bench/ranks.py [--processes 1 2 4] [--bits 16 4] [--tokens 256]

A random Llama of 1.1 B parameters is written once (bf16, 2.2 GB, in a temporary directory), then loaded and trained by 1, 2
and 4 processes under torchrun, whole in each (ddp) and in shards (fsdp), with train.py's own functions: rank 16 on all
linear layers, gradient checkpointing, a document of 256 tokens a process and step, all supervised. Printed is a table of the
largest figure of any process: bytes of parameters and buffers held once loaded, counted tensor by tensor; the peak of
resident memory while loading and over two training steps, both above what the process took before it had a model, library
and connections included; and seconds to load and of the second step. With GPUs the step's peak is the device's, allocator's
count. Linux alone: the kernel's high-water mark of resident memory is reset through /proc/self/clear_refs.
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

from minilora import dist  # noqa: E402 - found through the path set above
from minilora.config import Config, LoraConfig  # noqa: E402
from minilora.model import CausalLM, DecoderConfig  # noqa: E402
from minilora.running.saving import write_safetensors  # noqa: E402
from minilora.tracking.window import Window  # noqa: E402
from minilora.weights import checkpoint_name  # noqa: E402

MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048,
    "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
MIB, STEPS = 2**20, 2


@dataclass
class Args:
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
    """For the processes that this script starts: the model's directory; they measure one case and print JSON."""


def write_model(base: Path, layers: int) -> None:
    """A random checkpoint, streamed. All matrices of one shape are alike: memory does not depend on the values."""
    config = {**MODEL, "num_hidden_layers": layers}
    with torch.device("meta"):
        model = CausalLM(DecoderConfig.from_hf(config))
    shapes = {checkpoint_name(name): (torch.bfloat16, tuple(p.shape)) for name, p in model.named_parameters()}
    drawn = {shape: (torch.randn(shape) * 0.02).bfloat16() for _, shape in shapes.values()}
    (base / "config.json").write_text(json.dumps(config))
    write_safetensors(base / "model.safetensors", shapes, lambda name: drawn[shapes[name][1]])


def resident(field: Literal["VmRSS", "VmHWM"]) -> int:
    """Bytes of this process in memory, now or at most since the last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def reset_peak(device: torch.device) -> None:
    Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def measure(args: Args) -> dict:
    """One process's figures for one case."""
    from train import adamw, build_trainable, finish_gradients, loss_with

    if args.bits[0] < 16:
        import minilora.quant  # noqa: F401 - its libraries are no part of what the model takes
    config = Config(lora=LoraConfig(rank=16))
    config.model.dtype, config.model.bits = "bfloat16", args.bits[0]
    config.parallel.strategy = args.strategies[0]
    device = dist.default_device()
    dist.init(device)
    dist.all_reduce_sum(torch.zeros(1 << 20, device=device))  # the connections are made, with their buffers
    dist.barrier()
    before = resident("VmRSS")

    reset_peak(device)
    start = time.perf_counter()
    built, parameters = build_trainable(config, None, Path(args.base or ""), device)
    dist.barrier()
    load_seconds, load_peak = time.perf_counter() - start, resident("VmHWM") - before
    local = [built.place.local(p.detach()) for p in built.model.parameters()]
    held = sum(t.numel() * t.itemsize for t in [*local, *built.model.buffers()])

    del local
    reset_peak(device)
    optimizer = adamw(built, parameters, config.train, None)
    window = Window(device)
    generator = torch.Generator().manual_seed(dist.rank())
    tokens = torch.randint(MODEL["vocab_size"], (args.tokens,), generator=generator)
    labels = tokens.clone()
    labels[0] = -100
    step_seconds = math.nan
    for _ in range(STEPS):
        start = time.perf_counter()
        loss = built.model(tokens.to(device), [len(tokens)], loss_with(labels))
        loss.backward()
        window.add(loss.detach(), len(tokens) - 1, len(tokens))
        norm = finish_gradients(built, parameters, window, config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert math.isfinite(norm.item())  # and the device has been waited for
        step_seconds = time.perf_counter() - start
    step_peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM") - before
    return {
        "held": held, "load_peak": load_peak, "load_seconds": load_seconds, "step_peak": step_peak, "step_seconds": step_seconds
    }  # fmt: skip


def run(args: Args, base: str, processes: int, strategy: str, bits: int) -> dict:
    """The largest figures of any process."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    flags = f"--base {base} --strategies {strategy} --bits {bits} --tokens {args.tokens}".split()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", __file__, *flags]
    # fixed, so that glibc hands large tensors back when they are freed: what is measured is need, not its heap's holes
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MALLOC_MMAP_THRESHOLD_": str(20 * MIB)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(rows) != processes:
        raise SystemExit(f"{processes} processes, {strategy}, {bits} bits: exit code {done.returncode}\n{done.stderr[-3000:]}")
    return {key: max(row[key] for row in rows) for key in rows[0]}


def main(args: Args) -> None:
    if args.base:
        print(json.dumps(measure(args)) + "\n", end="", flush=True)  # in one write: lines of processes do not mix
        dist.finish()
        return
    print("| bits | strategy | processes | held MiB | x processes | load: peak MiB | load: s | step: peak MiB | step: s |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as base:
        write_model(Path(base), args.layers)
        for bits in args.bits:
            for strategy in args.strategies:
                for n in args.processes:
                    if n == 1 and strategy != args.strategies[0]:
                        continue
                    f = run(args, base, n, strategy, bits)
                    held, load, step = f["held"] / MIB, f["load_peak"] / MIB, f["step_peak"] / MIB
                    row = [
                        bits, strategy if n > 1 else "-", n, f"{held:,.1f}", f"{held * n:,.1f}", f"{load:,.0f}",
                        f"{f['load_seconds']:.1f}", f"{step:,.0f}", f"{f['step_seconds']:.1f}",
                    ]  # fmt: skip
                    print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
