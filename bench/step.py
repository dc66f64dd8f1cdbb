"""A LoRA training step beside transformers + peft: python bench/step.py [--pairs 3] [--bits 4] [--checkpointing True]

The same random Llama (75 M parameters in matrix products, bf16, NF4 with double quantisation at --bits 4), the same 8
documents of 96 to 512 tokens, all supervised from a third on, rank 16 on all linear layers, AdamW. Each side runs in a
process of its own, in turn; printed are tokens/s (documents' own tokens, padding not counted) and the peak resident memory,
as medians, with the ratio pair by pair.
"""

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

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = [96, 160, 200, 256, 320, 384, 448, 512]
MODEL = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 7,
    "num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Args:
    pairs: int = 3
    """How often the two sides run in turn."""
    steps: int = 6
    """Timed steps of a run, after two for warming up."""
    checkpointing: bool = False
    """Gradient checkpointing on both sides."""
    bits: Literal[16, 8, 4] = 16
    """Width of the frozen weights; 8 and 4 through bitsandbytes on both sides."""
    base: str | None = None
    """The random model's directory (made when missing)."""
    side: Literal["both", "minilora", "peft"] = "both"
    """One side only prints its own figures, as JSON."""


def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(MODEL["vocab_size"], (n,), generator=generator) for n in LENGTHS]


def masked(document: torch.Tensor) -> torch.Tensor:
    labels = document.clone()
    labels[: len(document) // 3] = -100
    return labels


def make_base(directory: Path, raw: dict = MODEL) -> None:
    """The random model as a Hugging Face checkpoint."""
    sys.path.insert(0, str(ROOT))
    from minilora.model import CausalLM, DecoderConfig
    from minilora.running.saving import save_weights
    from minilora.weights import draw_weights

    with torch.device("meta"):
        model = CausalLM(DecoderConfig.from_hf(raw))
    draw_weights(model, torch.device("cpu"), torch.bfloat16, 0.02, 0)
    save_weights(model, directory, torch.bfloat16)
    (directory / "config.json").write_text(json.dumps({**raw, "architectures": ["LlamaForCausalLM"]}))


def minilora_step(args: Args):
    sys.path.insert(0, str(ROOT))
    from minilora.build import build_model
    from minilora.config import LoraConfig
    from minilora.loss import cross_entropy_sum

    lora = LoraConfig(rank=16, alpha=32, target_modules=TARGETS)
    model = build_model(
        Path(args.base or ""), torch.device("cpu"), "bfloat16", lora, gradient_checkpointing=args.checkpointing, bits=args.bits
    ).model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    tokens, labels = torch.cat(documents()), torch.cat([masked(d) for d in documents()])

    def step() -> None:
        loss = model(tokens, LENGTHS, lambda hidden, weight: cross_entropy_sum(hidden, weight, labels))
        loss.backward()
        torch._foreach_mul_([p.grad for p in parameters], 1 / int((labels != -100).sum()))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def peft_step(args: Args):
    import peft
    import transformers

    settings = {}
    if args.bits == 8:
        settings["quantization_config"] = transformers.BitsAndBytesConfig(load_in_8bit=True)
    if args.bits == 4:
        settings["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )
    base = transformers.AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.bfloat16, **settings)
    model = peft.get_peft_model(base, peft.LoraConfig(r=16, lora_alpha=32, target_modules=list(TARGETS), task_type="CAUSAL_LM"))
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    pad = torch.nn.utils.rnn.pad_sequence
    ids, mask = pad(documents(), batch_first=True), pad([torch.ones_like(d) for d in documents()], batch_first=True)
    labels = pad([masked(d) for d in documents()], batch_first=True, padding_value=-100)

    def step() -> None:
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(args: Args) -> dict:
    step = (minilora_step if args.side == "minilora" else peft_step)(args)
    for _ in range(2):
        step()
    times = []
    for _ in range(args.steps):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"tokens_per_second": sum(LENGTHS) / statistics.median(times), "peak_gib": peak}


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.2f} ({min(values):,.2f} to {max(values):,.2f})"


def main(args: Args) -> None:
    if args.side != "both":
        print(json.dumps(measure(args)))
        return
    rows: dict[str, list[dict]] = {"minilora": [], "peft": []}
    with tempfile.TemporaryDirectory() as base:
        make_base(Path(base))
        flags = f"--base {base} --steps {args.steps} --checkpointing {args.checkpointing} --bits {args.bits}".split()
        for _ in range(args.pairs):
            for side in rows:
                command = [sys.executable, __file__, "--side", side, *flags]
                run = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                rows[side].append(json.loads(run.stdout.splitlines()[-1]))
    for figure in ("tokens_per_second", "peak_gib"):
        ours, theirs = ([row[figure] for row in rows[side]] for side in ("minilora", "peft"))
        ratio = spread([a / b for a, b in zip(ours, theirs, strict=True)])
        print(f"{figure:20} minilora {spread(ours)}   transformers + peft {spread(theirs)}   ratio {ratio}")


if __name__ == "__main__":
    main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,)))
