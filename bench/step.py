"""Speed and memory of a LoRA training step, beside transformers + peft: python bench/step.py

Both sides train the same random Llama (75 M parameters in matrix products, bf16; NF4 with double
quantization at --bits 4) on the same 8 documents of 96 to 512 tokens, the last two thirds of each
supervised, with rank 16 on all linear layers and AdamW. Each side runs in a process of its own,
the two in turn. Printed are tokens per second (the documents' own, padding is not counted) and the
peak of resident memory: medians, and the ratio of the two sides pair by pair.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

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
RANK, ALPHA = 16, 32
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WARMUP_STEPS = 2


@dataclass
class Args:
    """Options of the benchmark."""

    pairs: int = 3
    """How often the two sides run in turn."""
    steps: int = 6
    """Timed steps of a run, after two for warming up."""
    checkpointing: bool = False
    """Gradient checkpointing on both sides."""
    bits: Literal[16, 8, 4] = 16
    """Width of the frozen weights; 8 and 4 through bitsandbytes on both sides."""
    base: str | None = None
    """The random model's directory, for one side alone."""
    side: Literal["both", "minilora", "peft"] = "both"
    """Measure one side only and print its figures as JSON."""


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
    draw_weights(model, torch.device("cpu"), torch.bfloat16, std=0.02, seed=0)
    save_weights(model, directory, torch.bfloat16)
    (directory / "config.json").write_text(json.dumps(raw))


def minilora_step(args: Args) -> Callable[[], None]:
    """Return a function that takes one training step with minilora."""
    sys.path.insert(0, str(ROOT))
    from minilora.build import build_for_training
    from minilora.config import Config, LoraConfig

    config = Config(lora=LoraConfig(rank=RANK, alpha=ALPHA, target_modules=TARGETS))
    config.model.dtype = "bfloat16"
    config.model.bits = args.bits
    config.train.gradient_checkpointing = args.checkpointing
    model = build_for_training(config, Path(args.base or ""), torch.device("cpu")).model.train()

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    tokens = torch.cat(make_documents())
    labels = torch.cat([make_labels(document) for document in make_documents()])

    def step() -> None:
        loss = model(tokens, LENGTHS, labels=labels)
        loss.backward()
        torch._foreach_mul_([p.grad for p in parameters], 1 / int((labels != -100).sum()))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def peft_step(args: Args) -> Callable[[], None]:
    """Return a function that takes the same training step with transformers and peft."""
    import peft
    import transformers

    settings = {}
    if args.bits == 8:
        settings["quantization_config"] = transformers.BitsAndBytesConfig(load_in_8bit=True)
    if args.bits == 4:
        settings["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    base = transformers.AutoModelForCausalLM.from_pretrained(
        args.base, dtype=torch.bfloat16, **settings
    )
    lora = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, lora)
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    documents = make_documents()
    labels = [make_labels(document) for document in documents]
    mask = [torch.ones_like(document) for document in documents]
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {
        "input_ids": pad(documents, batch_first=True),
        "attention_mask": pad(mask, batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }

    def step() -> None:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(args: Args) -> dict[str, float]:
    """Time one side's steps in this process."""
    step = minilora_step(args) if args.side == "minilora" else peft_step(args)
    for _ in range(WARMUP_STEPS):
        step()

    seconds = []
    for _ in range(args.steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # from KiB
    return {"tokens_per_second": sum(LENGTHS) / statistics.median(seconds), "peak_gib": peak}


def measure_pairs(args: Args) -> dict[str, list[dict[str, float]]]:
    """Run both sides in turn, each in a process of its own, and return their figures."""
    rows: dict[str, list[dict[str, float]]] = {"minilora": [], "peft": []}
    with tempfile.TemporaryDirectory() as base:
        make_base(Path(base))
        flags = ["--base", base, "--steps", str(args.steps), "--bits", str(args.bits)]
        flags += ["--checkpointing", str(args.checkpointing)]
        for _ in range(args.pairs):
            for side, side_rows in rows.items():
                command = [sys.executable, __file__, "--side", side, *flags]
                done = subprocess.run(
                    command,
                    check=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
                side_rows.append(json.loads(done.stdout.splitlines()[-1]))
    return rows


def describe(values: list[float]) -> str:
    """Return the median of some values, and their range."""
    return f"{statistics.median(values):,.2f} ({min(values):,.2f} to {max(values):,.2f})"


def main(args: Args) -> None:
    """Measure and print the figures."""
    if args.side != "both":
        print(json.dumps(measure(args)))
        return

    rows = measure_pairs(args)
    for figure in ("tokens_per_second", "peak_gib"):
        ours = [row[figure] for row in rows["minilora"]]
        theirs = [row[figure] for row in rows["peft"]]
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        print(
            f"{figure:20} minilora {describe(ours)}   transformers + peft {describe(theirs)}   "
            f"ratio {describe(ratios)}"
        )


if __name__ == "__main__":
    main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,)))
