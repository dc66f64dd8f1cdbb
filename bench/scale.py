"""Memory of one of many processes, foretold on a CPU: python bench/scale.py [--models 7B] [--ranks 8 64] [--methods lora4]

A training step of Mistral-7B, Llama-3.1-8B and Llama-3.1-70B in shards (fsdp), by the package's own code: build_model, the
step of train.py with gradient checkpointing, AdamW, 4,096 tokens a rank in one document, all supervised. Tensors are fake
(shapes without values) and the process group is torch's "fake" one, whose collectives return at once, so that neither the
memory nor the network is needed; torch's FSDPMemTracker adds up what would be allocated. Printed is "held / peak" of the
first rank, which holds the most rows, in GiB: weights and optimizer states between steps, and the most during one.

What stands in for the real thing: weights are not read (their memory is there); the positions of the packed documents and
the supervised rows are made beforehand, because fake tensors have no values to count; FSDP is given only the first rank's
piece of a parameter to choose from, not all 1,024; the optimizer has stepped once before, so that its states are there.
bitsandbytes' 4-bit products are its own, with the fakes it registers. Left out: the allocator's fragmentation, the CUDA
context and NCCL's buffers, kernels' workspaces, the block that a GPU gathers ahead, and loading.
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

from minilora import build, parallel, quant  # noqa: E402 - found through the path set above
from minilora.config import Config, LoraConfig  # noqa: E402
from minilora.loss import _ChunkedCrossEntropy  # noqa: E402
from minilora.model import PackedAttention  # noqa: E402
from minilora.tracking.window import Window  # noqa: E402
from train import adamw, finish_gradients  # noqa: E402

LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "num_key_value_heads": 8, "dtype": "bfloat16"}
MODELS = {
    "1B": {
        **LLAMA, "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
        "num_attention_heads": 32, "num_key_value_heads": 4,
    },
    "7B": {
        **LLAMA, "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "sliding_window": None,
    },
    "8B": {
        **LLAMA, "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70B": {
        **LLAMA, "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}  # fmt: skip
METHODS = {"lora16": "LoRA, 16 bits", "lora4": "LoRA, 4 bits", "full": "full, fp32 masters"}
GIB = 2**30
CPU = torch.device("cpu")


@dataclass
class Args:
    models: tuple[Literal["1B", "7B", "8B", "70B"], ...] = ("7B", "8B", "70B")
    """Shapes; 1B is that of bench/ranks.py."""
    ranks: tuple[int, ...] = (8, 64, 1024)
    """Processes that share the model."""
    methods: tuple[Literal["lora16", "lora4", "full"], ...] = ("lora16", "lora4", "full")
    """LoRA over 16 or 4 bits (rank 16, all linear layers), or full fine-tuning in bf16 with fp32 masters."""
    tokens: int = 4096
    """Length of a rank's document."""
    cell: bool = False
    """For the processes that this script starts: one cell alone, as JSON."""


def fill(model: nn.Module, directory: Path, device: torch.device, dtype: torch.dtype, quantized: dict, place) -> None:
    """In place of load_weights: parameters have their memory from sharding, buffers of double quantisation get theirs."""
    for layer in quantized.values():
        nested = torch.empty(-(-layer.blocks // quant.NESTED_BLOCK), device=device)
        layer.register_buffer("nested_absmax", nested)
        layer.register_buffer("nested_code", torch.empty(256, device=device))
        layer.register_buffer("offset", torch.empty((), device=device))


def first_chunk(tensor: Tensor, count: int, dim: int) -> list[Tensor]:
    """In place of FSDP's _chunk_with_empty, of whose chunks it uses the first and its own, here the same."""
    return [tensor.narrow(dim, 0, -(-tensor.shape[dim] // count))]


def run_config(method: str) -> Config:
    config = Config(method="full" if method == "full" else "lora", lora=LoraConfig(rank=16))
    config.model.dtype, config.model.bits = "bfloat16", 4 if method == "lora4" else 16
    config.parallel.strategy = "fsdp"
    return config


def cell(model: str, ranks: int, method: str, tokens: int) -> dict:
    """GiB of the first rank: held before the first step, at the peak of a step, and the peak's parts."""
    os.environ.update(WORLD_SIZE=str(ranks), RANK="0")
    torch.distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))  # has values: outside of the fake mode
    packed = PackedAttention([tokens], CPU)
    config, full = run_config(method), method == "full"
    fake = FakeTensorMode()
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        Path(directory, "config.json").write_text(json.dumps(MODELS[model]))
        stack.enter_context(mock.patch.object(parallel, "init_device_mesh", lambda *_, **__: mesh))
        stack.enter_context(mock.patch.object(build, "load_weights", fill))
        stack.enter_context(mock.patch.object(_fsdp_param, "_chunk_with_empty", first_chunk))
        packed.positions = fake.from_tensor(packed.positions)
        stack.enter_context(fake)
        built = build.build_model(
            Path(directory), CPU, "bfloat16", None if full else config.lora, full, gradient_checkpointing=True,
            bits=config.model.bits, run=config,
        )  # fmt: skip
        place, net = built.place, built.model.train()
        trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
        parameters = {name: nn.Parameter(place.local(p.detach())) for name, p in trained.items()}
        optimizer = adamw(built, parameters, config.train, None)
        for p in parameters.values():  # a step before the one that is looked at: the optimizer's states are there from now on
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        window = Window(CPU)
        ids = torch.zeros(tokens, dtype=torch.int64)

        def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
            return _ChunkedCrossEntropy.apply(hidden, weight, ids)

        tracker = FSDPMemTracker(net, optimizer)
        with tracker:
            held = tracker.get_tracker_snapshot()[CPU]["Total"]
            loss = net(ids, [tokens], loss_of, packed)
            loss.backward()
            window.add(loss.detach(), tokens, tokens)
            finish_gradients(built, parameters, window, config.train.max_grad_norm)
            optimizer.step()
        peak = tracker.get_tracker_snapshot("peak")[CPU]
    torch.distributed.destroy_process_group()
    parts = {str(getattr(key, "value", key)): value / GIB for key, value in peak.items()}
    return {"held": held / GIB, "peak": parts.pop("Total"), "parts": parts}


def measure(model: str, ranks: int, method: str, tokens: int) -> dict:
    """A cell in a process of its own: the process group and its fakes are global."""
    flags = f"--models {model} --ranks {ranks} --methods {method} --tokens {tokens} --cell".split()
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{model}, {ranks} ranks, {method}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(args: Args) -> None:
    if args.cell:
        print(json.dumps(cell(args.models[0], args.ranks[0], args.methods[0], args.tokens)))
        return
    print(f"| model | method | {' | '.join(f'{n:,} ranks' for n in args.ranks)} |")
    print("|---|---|" + "---|" * len(args.ranks), flush=True)
    for model in args.models:
        for method in args.methods:
            start = time.perf_counter()
            figures = [measure(model, n, method, args.tokens) for n in args.ranks]
            cells = " | ".join(f"{f['held']:.2f} / {f['peak']:.2f}" for f in figures)
            print(f"| {model} | {METHODS[method]} | {cells} |", flush=True)
            largest = [
                f"{n:,}: " + ", ".join(f"{k} {v:.2f}" for k, v in f["parts"].items() if v >= 0.005)
                for n, f in zip(args.ranks, figures, strict=True)
            ]
            print(f"{time.perf_counter() - start:.0f} s; at the peak, {'; '.join(largest)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
