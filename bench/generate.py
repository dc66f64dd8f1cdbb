"""Decoding beside transformers' `generate`: python bench/generate.py [--pairs 3] [--work batch16 batch1 mixed]

The same random Llama (56 M parameters in matrix products, bf16), greedily, three kinds of work: 16 prompts at a time, one
at a time, and answers that end at different times (64 prompts, 16 at a time; a random tenth of the vocabulary ends an answer:
87 tokens on average, median 38, one in five reaches the 256 allowed). Each side runs in a process of its own, in turn;
printed are answers' tokens/s (padding after an answer's end is not counted) as medians, with the ratio pair by pair, and
what our side would reach if nothing but the matrix products took time. --model and --device measure another model.
"""

import json
import random
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
from step import make_base, spread

ROOT = Path(__file__).resolve().parent.parent
MODEL = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 5,
    "num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
WORK = {  # prompts, how many at a time, new tokens, share of the vocabulary that ends an answer
    "batch16": (16, 16, 64, 0.0), "batch1": (4, 1, 64, 0.0), "mixed": (64, 16, 256, 0.1), "batch64": (64, 64, 128, 0.0),
}  # fmt: skip


@dataclass
class Args:
    pairs: int = 3
    """How often the two sides run in turn."""
    work: tuple[Literal["batch16", "batch1", "mixed", "batch64"], ...] = ("batch16", "batch1", "mixed")
    """What to measure."""
    model: str | None = None
    """A model's directory instead of the small random one."""
    shape_7b: bool = False
    """A random model of Mistral-7B's shape (for a GPU)."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of weights and arithmetic."""
    device: str = "cpu"
    """cpu or cuda."""
    side: Literal["both", "minilora", "transformers"] = "both"
    """One side only prints its own figures, as JSON."""


def prompts_of(work: str, vocabulary: int) -> tuple[list[list[int]], list[int]]:
    """Random prompts of 8 to 64 tokens, and the ids that end an answer."""
    rng = random.Random(0)
    count, _, _, share = WORK[work]
    prompts = [[rng.randrange(vocabulary) for _ in range(rng.randint(8, 64))] for _ in range(count)]
    return prompts, sorted(rng.sample(range(vocabulary), round(share * vocabulary)))


def minilora_side(args: Args):
    sys.path.insert(0, str(ROOT))
    from minilora.build import build_model
    from minilora.generate import _linear, generate_ids

    model = build_model(Path(args.model or ""), torch.device(args.device), args.dtype).model.eval().requires_grad_(False)

    class NoText:  # the prompts are ids, and so are the answers
        eos_id = None

        def decode_after(self, prompt, ids):
            return ""

    def run(prompts: list[list[int]], ends: list[int], batch_size: int, new: int) -> int:
        answers = generate_ids(model, prompts, NoText(), new, stop_ids=ends, batch_size=batch_size)
        return sum(len(answer.ids) for answer in answers)

    def products(rows: int) -> float:
        """Seconds of a step's matrix products, and of nothing else."""
        layers = [(m.weight, m.weight.new_ones(rows, m.in_features)) for m in model.modules() if isinstance(m, torch.nn.Linear)]
        times = []
        for _ in range(20):
            start = time.perf_counter()
            for weight, x in layers:
                _linear(x, weight)
            if args.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    return run, products, model.config.vocab_size


def transformers_side(args: Args):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(args.device)

    def run(prompts: list[list[int]], ends: list[int], batch_size: int, new: int) -> int:
        tokens = 0
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            longest = max(map(len, batch))
            ids = torch.tensor([[0] * (longest - len(p)) + p for p in batch], device=args.device)
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch], device=args.device)
            settings = {"eos_token_id": ends} if ends else {"min_new_tokens": new}
            out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=0, **settings)
            for answer in out[:, longest:].tolist():
                tokens += next((i + 1 for i, token in enumerate(answer) if token in set(ends)), len(answer))
        return tokens

    return run, None, model.config.vocab_size


def measure(args: Args) -> dict:
    run, products, vocabulary = (minilora_side if args.side == "minilora" else transformers_side)(args)
    rows = {}
    for work in args.work:
        prompts, ends = prompts_of(work, vocabulary)
        _, batch_size, new, _ = WORK[work]
        run(prompts[:batch_size], ends, batch_size, 8)  # warm up
        start = time.perf_counter()
        tokens = run(prompts, ends, batch_size, new)
        rows[work] = tokens / (time.perf_counter() - start)
        if products:
            rows[f"{work} limit"] = batch_size / products(batch_size)
    return rows


def main(args: Args) -> None:
    if args.side != "both":
        print(json.dumps(measure(args)))
        return
    rows: dict[str, list[dict]] = {"minilora": [], "transformers": []}
    with tempfile.TemporaryDirectory() as base:
        if args.model is None:
            wide = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
            make_base(Path(base), MODEL | (wide | {"num_key_value_heads": 8} if args.shape_7b else {}))
        flags = ["--model", args.model or base, "--dtype", args.dtype, "--device", args.device, "--work", *args.work]
        for _ in range(args.pairs):
            for side in rows:
                command = [sys.executable, __file__, "--side", side, *flags]
                run = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                rows[side].append(json.loads(run.stdout.splitlines()[-1]))
    for work in args.work:
        ours, theirs = ([row[work] for row in rows[side]] for side in ("minilora", "transformers"))
        ratio = spread([a / b for a, b in zip(ours, theirs, strict=True)])
        limit = spread([row[f"{work} limit"] for row in rows["minilora"]])
        print(
            f"{work:8} tokens/s: minilora {spread(ours)}   transformers {spread(theirs)}   ratio {ratio}   products alone {limit}"
        )


if __name__ == "__main__":
    main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,)))
