"""Measure merge.py beside transformers + peft: python bench/merge.py [--pairs 2] [--directory DIR]

A random Llama of TinyLlama's shape (1.1 B parameters, bfloat16) and a rank-32 adapter on all
linear layers are written to DIR once (2.2 GB). Each side runs as a process of its own, in turn.
Printed are medians of the seconds by the clock, the seconds of processor time and the peak resident
memory of a process, with their ratios. To measure as on a CPU without bfloat16:
ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python bench/merge.py
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minilora.checkpoint.hf import name_in_file  # noqa: E402 - found by the path set above
from minilora.checkpoint.peft import (  # noqa: E402
    CONFIG_FILE,
    TENSOR_FILE,
    adapter_state,
    to_peft_config,
)
from minilora.checkpoint.tensor_files import TensorEntry, write_safetensors  # noqa: E402
from minilora.config import LoraConfig  # noqa: E402
from minilora.model.hf_config import DecoderConfig  # noqa: E402
from minilora.model.lora import init_adapters, inject  # noqa: E402
from minilora.model.transformer import CausalLM  # noqa: E402

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

PEFT = """
import sys, torch, transformers, peft
base, adapter, out = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""

MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, capture_output=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss)
"""


@dataclass
class Args:
    """Measure merge.py beside transformers + peft."""

    pairs: int = 2
    """How often the two sides run in turn."""
    directory: str = "out/bench-merge"
    """Where the model, the adapter and the results go."""


class Cost(NamedTuple):
    """What one process took."""

    seconds: float
    cpu_seconds: float
    peak_gib: float


FIGURES = {"seconds": "seconds", "CPU s": "cpu_seconds", "peak GiB": "peak_gib"}
"""What `report` calls each field of Cost."""


def main(args: Args) -> None:
    """Run both sides in turn and print their medians."""
    work = Path(args.directory)
    base, adapter = work / "base", work / "adapter"
    ours, theirs = work / "ours", work / "theirs"
    if not adapter.is_dir():
        shutil.rmtree(work, ignore_errors=True)
        write_model(base, adapter)

    merge = [sys.executable, str(ROOT / "merge.py"), str(adapter), "--out", str(ours)]
    peft = [sys.executable, "-c", PEFT, str(base), str(adapter), str(theirs)]
    costs_ours: list[Cost] = []
    costs_theirs: list[Cost] = []
    for _ in range(args.pairs):
        for command, costs in ((merge, costs_ours), (peft, costs_theirs)):
            shutil.rmtree(ours, ignore_errors=True)
            shutil.rmtree(theirs, ignore_errors=True)
            costs.append(measure(command))

    for figure, field in FIGURES.items():
        ours_values = [getattr(cost, field) for cost in costs_ours]
        report(figure, ours_values, [getattr(cost, field) for cost in costs_theirs])


def write_model(base: Path, adapter: Path) -> None:
    """Write a random base and a random adapter, whose B matrices are not zero."""
    with torch.device("meta"):
        model = CausalLM(DecoderConfig.from_hf(MODEL))
    entries = {
        name_in_file(name): TensorEntry(torch.bfloat16, tuple(p.shape))
        for name, p in model.named_parameters()
    }
    base.mkdir(parents=True)
    (base / "config.json").write_text(json.dumps(MODEL))
    file = base / "model.safetensors"
    write_safetensors(file, entries, lambda name: [torch.randn(entries[name].shape) * 0.02])

    lora = LoraConfig()
    inject(model, lora)
    init_adapters(model, 0, torch.device("cpu"))
    adapter.mkdir()
    state = {name: torch.randn_like(t) * 0.01 for name, t in adapter_state(model).items()}
    safetensors.torch.save_file(state, str(adapter / TENSOR_FILE))
    peft_config = to_peft_config(lora, str(base.resolve()), None)
    (adapter / CONFIG_FILE).write_text(json.dumps(peft_config))


def measure(command: list[str]) -> Cost:
    """Run a command, as the child of a process that reports the memory of its children."""
    start = time.perf_counter()
    measuring = [sys.executable, "-c", MEASURE, *command]
    result = subprocess.run(measuring, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    cpu_seconds, peak_kib = map(float, result.stdout.split())
    return Cost(seconds, cpu_seconds, peak_kib / 2**20)


def report(figure: str, ours: list[float], theirs: list[float]) -> None:
    """Print the medians of a figure and the ratios of the pairs."""
    ratios = [their_value / value for value, their_value in zip(ours, theirs, strict=True)]
    print(
        f"{figure:9} minilora {statistics.median(ours):.2f}   "
        f"transformers + peft {statistics.median(theirs):.2f}   "
        f"theirs / ours {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main(tyro.cli(Args))
