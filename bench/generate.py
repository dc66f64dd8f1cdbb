"""Speed of decoding, beside transformers' `generate`: python bench/generate.py

Both sides decode the same random prompts greedily with the same random Llama (56 M parameters in
matrix products, bf16). There are three kinds of work: 16 prompts at a time, one at a time, and
answers that end at different times (64 prompts, 16 at a time, where a random tenth of the
vocabulary ends an answer: 87 tokens on average, median 38, one in five reaches the 256 allowed).

Each side runs in a process of its own, the two in turn. Printed are tokens per second (padding
after the end of an answer is not counted): medians, the ratio of the two sides pair by pair, and
what our side would reach if nothing but the matrix products took time. --model and --device
measure another model.
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro
from step import describe, make_base

ROOT = Path(__file__).resolve().parent.parent
MODEL = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 5,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
SHAPE_7B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
WARMUP_TOKENS = 8
Prompts = list[list[int]]


class Work(NamedTuple):
    """What both sides have to do."""

    num_prompts: int
    batch_size: int
    new_tokens: int
    """The longest answer."""
    end_share: float
    """The share of the vocabulary that ends an answer."""


WORK = {
    "batch16": Work(16, 16, 64, 0.0),
    "batch1": Work(4, 1, 64, 0.0),
    "mixed": Work(64, 16, 256, 0.1),
    "batch64": Work(64, 64, 128, 0.0),
}


@dataclass
class Args:
    """Options of the benchmark."""

    pairs: int = 3
    """How often the two sides run in turn."""
    work: tuple[Literal["batch16", "batch1", "mixed", "batch64"], ...] = (
        "batch16",
        "batch1",
        "mixed",
    )
    """What to measure."""
    model: str | None = None
    """A model's directory instead of the small random one."""
    shape_7b: bool = False
    """Measure a random model of Mistral-7B's shape (for a GPU)."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of weights and arithmetic."""
    device: str = "cpu"
    """cpu or cuda."""
    side: Literal["both", "minilora", "transformers"] = "both"
    """Measure one side only and print its figures as JSON."""


class Side(NamedTuple):
    """One of the two libraries with the model loaded."""

    run: Callable[[Prompts, list[int], int, int], int]
    """Answers prompts; of (prompts, end tokens, batch size, new tokens) the number of tokens."""
    vocab_size: int
    product_seconds: Callable[[int], float] | None = None
    """Times the matrix products of one pass with N rows."""


def make_prompts(work: Work, vocab_size: int) -> tuple[Prompts, list[int]]:
    """Draw prompts of 8 to 64 tokens, and the tokens that end an answer."""
    rng = random.Random(0)
    prompts = []
    for _ in range(work.num_prompts):
        length = rng.randint(8, 64)
        prompts.append([rng.randrange(vocab_size) for _ in range(length)])
    num_ends = round(work.end_share * vocab_size)
    return prompts, sorted(rng.sample(range(vocab_size), num_ends))


def minilora_side(args: Args) -> Side:
    """Load the model with minilora."""
    sys.path.insert(0, str(ROOT))
    from minilora.build import build_for_inference
    from minilora.generation.engine import generate_ids
    from minilora.generation.sampling import SamplingParams
    from minilora.model.small_batch import small_batch_linear

    device = torch.device(args.device)
    model = build_for_inference(Path(args.model or ""), device, args.dtype).model

    class NoTokenizer:
        """Prompts and answers are token ids, so no text is needed."""

        eos_id = None

        def decode_after(self, prompt: list[int], ids: list[int]) -> str:
            return ""

    def run(prompts: Prompts, ends: list[int], batch_size: int, new_tokens: int) -> int:
        params = SamplingParams(max_new_tokens=new_tokens, stop_token_ids=ends)
        answers = generate_ids(model, prompts, NoTokenizer(), params, batch_size=batch_size)
        return sum(len(answer.ids) for answer in answers)

    def product_seconds(rows: int) -> float:
        linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        pairs = [(m.weight.new_ones(rows, m.in_features), m.weight) for m in linears]
        seconds = []
        for _ in range(20):
            start = time.perf_counter()
            for x, weight in pairs:
                small_batch_linear(x, weight)
            if args.device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    return Side(run, model.config.vocab_size, product_seconds)


def transformers_side(args: Args) -> Side:
    """Load the model with transformers."""
    import transformers

    dtype = getattr(torch, args.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    model = model.to(args.device)

    def run_batch(prompts: Prompts, ends: list[int], new_tokens: int) -> int:
        longest = max(len(prompt) for prompt in prompts)
        padding = [longest - len(prompt) for prompt in prompts]
        pairs = list(zip(padding, prompts, strict=True))
        ids = [[0] * n + prompt for n, prompt in pairs]
        mask = [[0] * n + [1] * len(prompt) for n, prompt in pairs]
        settings = {"eos_token_id": ends} if ends else {"min_new_tokens": new_tokens}
        out = model.generate(
            torch.tensor(ids, device=args.device),
            attention_mask=torch.tensor(mask, device=args.device),
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=0,
            **settings,
        )
        answers = out[:, longest:].tolist()
        return sum(_length_to_end(answer, set(ends)) for answer in answers)

    def run(prompts: Prompts, ends: list[int], batch_size: int, new_tokens: int) -> int:
        tokens = 0
        for start in range(0, len(prompts), batch_size):
            tokens += run_batch(prompts[start : start + batch_size], ends, new_tokens)
        return tokens

    return Side(run, model.config.vocab_size)


def _length_to_end(answer: list[int], ends: set[int]) -> int:
    """Count the tokens of an answer up to and with the first end token."""
    for i, token in enumerate(answer):
        if token in ends:
            return i + 1
    return len(answer)


def measure(args: Args) -> dict[str, float]:
    """Time one side in this process."""
    side = minilora_side(args) if args.side == "minilora" else transformers_side(args)
    figures = {}
    for name in args.work:
        work = WORK[name]
        prompts, ends = make_prompts(work, side.vocab_size)
        side.run(prompts[: work.batch_size], ends, work.batch_size, WARMUP_TOKENS)
        start = time.perf_counter()
        tokens = side.run(prompts, ends, work.batch_size, work.new_tokens)
        figures[name] = tokens / (time.perf_counter() - start)
        if side.product_seconds is not None:
            figures[f"{name} limit"] = work.batch_size / side.product_seconds(work.batch_size)
    return figures


def measure_pairs(args: Args) -> dict[str, list[dict[str, float]]]:
    """Run both sides in turn, each in a process of its own, and return their figures."""
    rows: dict[str, list[dict[str, float]]] = {"minilora": [], "transformers": []}
    with tempfile.TemporaryDirectory() as base:
        if args.model is None:
            make_base(Path(base), MODEL | SHAPE_7B if args.shape_7b else MODEL)
        flags = ["--model", args.model or base, "--dtype", args.dtype, "--device", args.device]
        flags += ["--work", *args.work]
        for _ in range(args.pairs):
            for side, side_rows in rows.items():
                done = subprocess.run(
                    [sys.executable, __file__, "--side", side, *flags],
                    check=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
                side_rows.append(json.loads(done.stdout.splitlines()[-1]))
    return rows


def main(args: Args) -> None:
    """Measure and print the figures."""
    if args.side != "both":
        print(json.dumps(measure(args)))
        return

    rows = measure_pairs(args)
    for name in args.work:
        ours = [row[name] for row in rows["minilora"]]
        theirs = [row[name] for row in rows["transformers"]]
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        limits = [row[f"{name} limit"] for row in rows["minilora"]]
        print(
            f"{name:8} tokens/s: minilora {describe(ours)}   transformers {describe(theirs)}   "
            f"ratio {describe(ratios)}   products alone {describe(limits)}"
        )


if __name__ == "__main__":
    main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,)))
