"""Merging a 1.1 B bf16 model beside transformers + peft: python bench/merge.py [--pairs 2] [--directory DIR]

A random Llama of TinyLlama's shape and a rank-32 adapter on all linear layers are written to DIR (2.2 GB; once). Each side
runs as a process of its own, in turn; printed are whole-process seconds and peak resident memory, as medians with the ratio.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minilora.config import LoraConfig  # noqa: E402 - found through the path set above
from minilora.lora import adapter_state, init_adapters, inject, to_peft_config  # noqa: E402
from minilora.model import CausalLM, DecoderConfig  # noqa: E402
from minilora.running.saving import write_safetensors  # noqa: E402
from minilora.weights import checkpoint_name  # noqa: E402

MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048,
    "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
PEFT = """
import sys, torch, transformers, peft
base, adapter, out = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


@dataclass
class Args:
    pairs: int = 2
    """How often the two sides run in turn."""
    directory: str = "out/bench-merge"
    """Where the model, the adapter and the results go."""


def write_model(base: Path, adapter: Path) -> None:
    """A random base and a random adapter, B included."""
    with torch.device("meta"):
        model = CausalLM(DecoderConfig.from_hf(MODEL))
    shapes = {checkpoint_name(name): (torch.bfloat16, tuple(p.shape)) for name, p in model.named_parameters()}
    base.mkdir(parents=True)
    (base / "config.json").write_text(json.dumps(MODEL))
    write_safetensors(base / "model.safetensors", shapes, lambda name: torch.randn(shapes[name][1]) * 0.02)
    lora = LoraConfig()
    inject(model, lora)
    init_adapters(model, 0, torch.device("cpu"))
    adapter.mkdir()
    state = {name: torch.randn_like(t) * 0.01 for name, t in adapter_state(model).items()}
    safetensors.torch.save_file(state, str(adapter / "adapter_model.safetensors"))
    (adapter / "adapter_config.json").write_text(json.dumps(to_peft_config(lora, str(base.resolve()), None)))


def run(command: list[str]) -> tuple[float, float]:
    """(seconds, peak GiB) of a process."""
    start = time.perf_counter()
    code = f"import resource, subprocess; subprocess.run({command!r}, check=True, capture_output=True); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    peak = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    return time.perf_counter() - start, peak / 2**20


def main(args: Args) -> None:
    work = Path(args.directory)
    base, adapter = work / "base", work / "adapter"
    if not adapter.is_dir():
        shutil.rmtree(work, ignore_errors=True)
        write_model(base, adapter)
    sides = {
        "minilora": [sys.executable, str(ROOT / "merge.py"), str(adapter), "--out", str(work / "ours")],
        "transformers + peft": [sys.executable, "-c", PEFT, str(base), str(adapter), str(work / "theirs")],
    }
    rows: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for _ in range(args.pairs):
        for side, command in sides.items():
            for result in ("ours", "theirs"):
                shutil.rmtree(work / result, ignore_errors=True)
            rows[side].append(run(command))
    for i, figure in enumerate(("seconds", "peak GiB")):
        ours, theirs = ([row[i] for row in rows[side]] for side in sides)
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        print(
            f"{figure:9} minilora {statistics.median(ours):.2f}   transformers + peft {statistics.median(theirs):.2f}"
            f"   theirs / ours {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main(tyro.cli(Args))
