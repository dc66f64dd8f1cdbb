"""Speed and memory of a LoRA training step, beside other libraries: python bench/step.py

All sides train the same random Llama (75 M parameters in matrix products; NF4 with double
quantization at --bits 4) on the same 8 documents of 96 to 512 tokens, the last two thirds of each
supervised, with rank 16 on all linear layers, the same initial adapters and AdamW. The peers are
transformers + peft, TRL (packing, loss in chunks) and litgpt, those that are installed. Weights and
arithmetic are bfloat16 if the CPU multiplies it fast, else float32; --dtype decides otherwise.

Each side runs in a process of its own, in turn, several rounds. Printed are medians and ranges:
- tokens per second (the documents' own, padding is not counted), and CPU seconds of a step;
- the share of the machine's matrix peak, which is measured in the same round: operations that the
  model needs (no padding, no recomputation) per second, of those of a large matrix product;
- the peak of resident memory;
- for each peer the ratios ours / theirs, round by round, and the largest difference of a loss.
"""

import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from peers import ALPHA, PEERS, RANK, TARGETS, Step, Work, clip_and_update, draw_A, make_optimizer

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = [96, 160, 200, 256, 320, 384, 448, 512]
VOCAB_SIZE = 32000
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 7,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
WARMUP_STEPS = 2
LOSS_TOLERANCE = 0.01
"""Relative difference of a loss above which the sides do not do the same work."""


@dataclass
class Args:
    """Options of the benchmark."""

    rounds: int = 3
    """How often the sides run in turn."""
    steps: int = 6
    """Timed steps of a run, after two for warming up."""
    checkpointing: bool = False
    """Gradient checkpointing on all sides."""
    bits: Literal[16, 8, 4] = 16
    """Width of the frozen weights; 8 and 4 through bitsandbytes (peft, TRL)."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of weights and arithmetic; auto: what the CPU multiplies faster."""
    peers: tuple[Literal["peft", "trl", "litgpt"], ...] = ("peft", "trl", "litgpt")
    """What to measure beside minilora; what is not installed is left out."""
    base: str | None = None
    """A Llama's directory, instead of the small random one."""
    side: Literal["all", "minilora", "peft", "trl", "litgpt", "peak"] = "all"
    """Measure one side only and print its figures as JSON; peak: the matrix peak."""


def make_documents() -> list[torch.Tensor]:
    """Draw the documents' token ids."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator) for length in LENGTHS]


def make_labels(document: torch.Tensor) -> torch.Tensor:
    """Return a document's labels: its first third is not supervised."""
    labels = document.clone()
    labels[: len(document) // 3] = -100
    return labels


def make_base(directory: Path, raw: dict = MODEL) -> None:
    """Write a random model of this config.json as a Hugging Face checkpoint."""
    sys.path.insert(0, str(ROOT))
    from minilora.checkpoint.hf import draw_weights
    from minilora.checkpoint.hf_writer import save_weights
    from minilora.model.hf_config import DecoderConfig
    from minilora.model.transformer import CausalLM

    with torch.device("meta"):
        model = CausalLM(DecoderConfig.from_hf(raw))
    dtype = getattr(torch, raw["dtype"])
    draw_weights(model, torch.device("cpu"), dtype, std=0.02, seed=0)
    save_weights(model, directory, dtype)
    (directory / "config.json").write_text(json.dumps(raw))


def minilora_step(work: Work) -> Step:
    """Return a function that takes one training step with minilora."""
    sys.path.insert(0, str(ROOT))
    from minilora.build import build_for_training
    from minilora.config import Config, LoraConfig
    from minilora.model.lora import lora_layers

    config = Config(lora=LoraConfig(rank=RANK, alpha=ALPHA, target_modules=TARGETS))
    config.model.dtype = str(work.dtype).removeprefix("torch.")  # type: ignore[assignment]
    config.model.bits = work.bits  # type: ignore[assignment]
    config.train.gradient_checkpointing = work.checkpointing
    model = build_for_training(config, work.base, torch.device("cpu")).model.train()
    for path, layer in lora_layers(model):
        draw_A(layer.lora_A, path)

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters)
    tokens, labels = torch.cat(work.documents), torch.cat(work.labels)
    lengths = [len(document) for document in work.documents]
    supervised = int((labels != -100).sum())

    def step() -> float:
        loss = model(tokens, lengths, labels=labels)  # a sum over tokens
        loss.backward()
        torch._foreach_mul_([p.grad for p in parameters], 1 / supervised)
        clip_and_update(parameters, optimizer)
        return float(loss.detach()) / supervised

    return step


def step_flops(base: Path) -> float:
    """Count the operations that a step of the base needs: no padding, no recomputation."""
    sys.path.insert(0, str(ROOT))
    from minilora.model.flops import training_flops
    from minilora.model.hf_config import DecoderConfig

    config = DecoderConfig.from_hf(json.loads((base / "config.json").read_text()))
    supervised = sum(int((make_labels(d) != -100).sum()) for d in make_documents())
    return training_flops(config, LENGTHS, supervised, trained="lora")


def measure_peak(args: Args) -> dict[str, float]:
    """Measure the operations per second of large matrix products in this process."""
    sys.path.insert(0, str(ROOT))
    from minilora.training.throughput import matrix_peak

    dtype = getattr(torch, args.dtype)
    rates = []
    for _ in range(3):
        rates.append(matrix_peak(torch.device("cpu"), dtype))
        matrix_peak.cache_clear()
    return {"peak": max(rates)}


def measure(args: Args) -> dict:
    """Time one side's steps in this process."""
    documents = make_documents()
    labels = [make_labels(document) for document in documents]
    dtype = getattr(torch, args.dtype)
    work = Work(Path(args.base or ""), dtype, args.bits, args.checkpointing, documents, labels)
    step = minilora_step(work) if args.side == "minilora" else PEERS[args.side](work)

    losses = [step() for _ in range(WARMUP_STEPS)]
    seconds, cpu_seconds = [], []
    for _ in range(args.steps):
        start, cpu_start = time.perf_counter(), time.process_time()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # from KiB
    return {
        "tokens_per_second": sum(LENGTHS) / statistics.median(seconds),
        "cpu_seconds": statistics.median(cpu_seconds),
        "peak_gib": peak,
        "losses": losses,
    }


def chosen_dtype(wanted: str) -> str:
    """Return the dtype's name: bfloat16 for auto, if the CPU multiplies it fast."""
    if wanted != "auto":
        return wanted
    sys.path.insert(0, str(ROOT))
    from minilora.model.precision import has_fast_bfloat16

    return "bfloat16" if has_fast_bfloat16(torch.device("cpu")) else "float32"


def installed_peers(args: Args) -> list[str]:
    """Return the peers that can be measured, and say which cannot."""
    peers = []
    for peer in args.peers:
        if importlib.util.find_spec(peer) is None:
            print(f"{peer} is not installed: left out")
        elif peer == "litgpt" and args.bits < 16:
            print("litgpt has no quantized weights on a CPU: left out")
        else:
            peers.append(peer)
    return peers


def measure_rounds(args: Args, base: Path, sides: list[str]) -> dict[str, list[dict]]:
    """Run the sides in turn, each in a process of its own, and return their figures."""
    flags = ["--base", str(base), "--steps", str(args.steps), "--bits", str(args.bits)]
    flags += ["--checkpointing", str(args.checkpointing), "--dtype", args.dtype]
    rows: dict[str, list[dict]] = {side: [] for side in sides}
    for _ in range(args.rounds):
        for side, side_rows in rows.items():
            done = subprocess.run(
                [sys.executable, __file__, "--side", side, *flags], capture_output=True, text=True
            )
            if done.returncode != 0:
                raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
            side_rows.append(json.loads(done.stdout.splitlines()[-1]))
    return rows


def describe(values: list[float]) -> str:
    """Return the median of some values, and their range."""
    return f"{statistics.median(values):,.2f} ({min(values):,.2f} to {max(values):,.2f})"


def report(rows: dict[str, list[dict]], flops: float) -> None:
    """Print what was measured.

    Raises:
        SystemExit: losses differ, so the sides did not do the same work.
    """
    peaks = [row["peak"] for row in rows.pop("peak")]
    print(f"matrix peak: {describe([peak / 1e9 for peak in peaks])} GFLOP/s")
    for side, side_rows in rows.items():
        speeds = [row["tokens_per_second"] for row in side_rows]
        pairs = list(zip(speeds, peaks, strict=True))
        shares = [100 * flops * speed / sum(LENGTHS) / peak for speed, peak in pairs]
        print(f"{side:10} tokens/s {describe(speeds)}   % of the peak {describe(shares)}")
        for figure in ("cpu_seconds", "peak_gib"):
            print(f"{'':10} {figure} {describe([row[figure] for row in side_rows])}")

    ours = rows.pop("minilora")
    for side, theirs in rows.items():
        print(f"minilora / {side}:")
        for figure in ("tokens_per_second", "cpu_seconds", "peak_gib"):
            pairs = [(a[figure], b[figure]) for a, b in zip(ours, theirs, strict=True)]
            print(f"{'':10} {figure} {describe([a / b for a, b in pairs])}")
        losses = list(zip(ours[0]["losses"], theirs[0]["losses"], strict=True))
        difference = max(abs(a - b) / abs(b) for a, b in losses)
        print(f"{'':10} losses differ by {difference:.1e} at most, over {len(losses)} steps")
        if difference > LOSS_TOLERANCE:
            raise SystemExit(f"minilora and {side} do not compute the same: {losses}")


def main(args: Args) -> None:
    """Measure and print the figures."""
    args.dtype = chosen_dtype(args.dtype)  # type: ignore[assignment]
    if args.side == "peak":
        print(json.dumps(measure_peak(args)))
        return
    if args.side != "all":
        print(json.dumps(measure(args)))
        return

    sides = ["peak", "minilora", *installed_peers(args)]
    with tempfile.TemporaryDirectory() as directory:
        base = Path(args.base or directory)
        if args.base is None:
            make_base(base, MODEL | {"dtype": args.dtype})
        rows = measure_rounds(args, base, sides)
        flops = step_flops(base)
    report(rows, flops)


if __name__ == "__main__":
    main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,)))
