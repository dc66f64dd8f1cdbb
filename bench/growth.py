"""Does the cost of a training step grow with its work, and no faster? python bench/growth.py

A small random Llama with LoRA takes forward and backward passes (with gradient checkpointing, the
default) over batches that grow in one respect at a time:

    tokens      1,024 to 32,768 tokens in documents of 512, two thirds supervised
    documents   8,192 tokens in documents of 64 to 8,192
    supervised  8,192 tokens in documents of 512, of which 5 to 100 % are supervised

The work of a step is its floating-point operations by `training_flops`, so the head counts by the
supervised tokens. Attention grows with the square of a document's length and runs at another speed
than matrix products: its time is measured by itself, over the same documents, shown, and taken out
of the step's time and work. What remains is seconds per operation. A *cliff* is a growth of that
number by more than 20 % from one row to the next.

All rows run in turn, several rounds; the fastest of each counts. A row's seconds are those of the
clock, or with --clock cpu the process's CPU time, which other processes disturb less.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro
from peers import ALPHA, RANK, TARGETS
from step import MODEL, chosen_dtype, make_base
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minilora.build import build_for_training  # noqa: E402 - found by the path set above
from minilora.config import Config, LoraConfig  # noqa: E402
from minilora.model.attention import PackedAttention  # noqa: E402
from minilora.model.flops import attention_flops, training_flops  # noqa: E402
from minilora.model.hf_config import DecoderConfig  # noqa: E402
from minilora.model.transformer import CausalLM  # noqa: E402

CLIFF = 1.2
CPU = torch.device("cpu")


@dataclass
class Args:
    """Options of the benchmark."""

    rounds: int = 3
    """How often every row is measured."""
    sweeps: tuple[Literal["tokens", "documents", "supervised"], ...] = (
        "tokens",
        "documents",
        "supervised",
    )
    """What grows."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of weights and arithmetic; auto: what the CPU multiplies faster."""
    clock: Literal["wall", "cpu"] = "wall"
    """What seconds are."""
    max_tokens: int = 32768
    """Leave out larger batches."""


class Row(NamedTuple):
    """A batch: its documents, and how much of them is supervised."""

    name: str
    lengths: list[int]
    supervised_share: float


def rows_of(sweep: str, max_tokens: int) -> list[Row]:
    """Return the batches of a sweep, in the order in which they grow."""
    tokens = min(8192, max_tokens)
    if sweep == "tokens":
        sizes = [1024 * 2**i for i in range(6) if 1024 * 2**i <= max_tokens]
        return [Row(f"{size:,} tokens", [512] * (size // 512), 2 / 3) for size in sizes]
    if sweep == "documents":
        lengths = [64 * 2**i for i in range(8) if 64 * 2**i <= tokens]
        return [Row(f"{n} x {tokens // n}", [n] * (tokens // n), 2 / 3) for n in lengths]
    shares = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
    return [Row(f"{share:.0%} supervised", [512] * (tokens // 512), share) for share in shares]


def make_labels(tokens: Tensor, row: Row) -> Tensor:
    """Supervise the last part of each document, as answers are; never its first token."""
    labels = tokens.clone()
    start = 0
    for length in row.lengths:
        unsupervised = max(1, round(length * (1 - row.supervised_share)))
        labels[start : start + unsupervised] = -100
        start += length
    return labels


def measure_step(model: CausalLM, row: Row, now: Callable[[], float]) -> tuple[float, int]:
    """Time a forward and a backward pass. Returns (seconds, supervised tokens)."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (sum(row.lengths),), generator=generator)
    labels = make_labels(tokens, row)
    start = now()
    model(tokens, row.lengths, labels=labels).backward()
    seconds = now() - start
    for p in model.parameters():
        p.grad = None
    return seconds, int((labels != -100).sum())


def measure_attention(
    config: DecoderConfig, row: Row, dtype: torch.dtype, now: Callable[[], float]
) -> float:
    """Time attention alone, over all blocks: two forward passes and a backward pass of each."""
    size = (sum(row.lengths), config.num_attention_heads, config.head_dim)
    key_size = (size[0], config.num_key_value_heads, config.head_dim)
    q = torch.randn(size, dtype=dtype, requires_grad=True)
    k = torch.randn(key_size, dtype=dtype, requires_grad=True)
    v = torch.randn(key_size, dtype=dtype, requires_grad=True)
    context = PackedAttention(row.lengths, CPU)
    start = now()
    for layer, window in enumerate(config.windows):
        with torch.no_grad():
            context(layer, q, k, v, window)  # the pass that is recomputed
        out = context(layer, q, k, v, window)
        out.backward(out)
    return now() - start


def measure_sweep(model: CausalLM, rows: list[Row], dtype: torch.dtype, args: Args) -> list[float]:
    """Measure and print the rows of a sweep. Returns the growth of each over the one before."""
    now = time.process_time if args.clock == "cpu" else time.perf_counter
    config = model.config
    measure_step(model, rows[0], now)  # warms up
    steps: list[list[float]] = [[] for _ in rows]
    attentions: list[list[float]] = [[] for _ in rows]
    supervised = [0] * len(rows)
    for _ in range(args.rounds):
        for i, row in enumerate(rows):
            seconds, supervised[i] = measure_step(model, row, now)
            steps[i].append(seconds)
            attentions[i].append(measure_attention(config, row, dtype, now))

    growths, before = [], None
    for i, row in enumerate(rows):
        step, attention = min(steps[i]), min(attentions[i])
        layers = config.num_hidden_layers
        flops = training_flops(config, row.lengths, supervised[i], "lora", recomputed_blocks=layers)
        flops -= 4 * attention_flops(config, row.lengths)  # forward, again, two backward products
        per_flop = (step - attention) / flops
        growth = per_flop / before if before else 1.0
        growths.append(growth)
        before = per_flop
        tokens = sum(row.lengths)
        print(
            f"{row.name:16} {step:7.3f} s   {1e6 * step / tokens:7.1f} us a token, of it "
            f"attention {1e6 * attention / tokens:6.1f}   the rest: "
            f"{1e12 * per_flop:6.2f} s for 10^12 operations, {growth:.2f} x the row before"
            f"{'   CLIFF' if growth > CLIFF else ''}"
        )
    return growths


def main(args: Args) -> None:
    """Measure all sweeps; the exit code is 1 if there is a cliff."""
    name = chosen_dtype(args.dtype)
    dtype = getattr(torch, name)
    raw = MODEL | {"num_hidden_layers": 2, "max_position_embeddings": 8192, "dtype": name}
    config = Config(lora=LoraConfig(rank=RANK, alpha=ALPHA, target_modules=TARGETS))
    config.model.dtype = name  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as base:
        make_base(Path(base), raw)
        model = build_for_training(config, Path(base), CPU).model.train()

    growths = []
    for sweep in args.sweeps:
        print(f"-- {sweep}, {name}")
        growths += measure_sweep(model, rows_of(sweep, args.max_tokens), dtype, args)
    print(f"largest growth from one row to the next: {max(growths):.2f} x")
    if max(growths) > CLIFF:
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,)))
