"""CPU seconds of LoRA on a small model with short rows, beside transformers + peft:
python bench/small_model.py

Both sides train a model of SmolLM2-135M's shapes (30 thin layers, a tied vocabulary of 49,152) in
float32 on the same 8 documents of 65 tokens, every token supervised, with the same initial adapter
of rank 16 on all linear layers and AdamW. The weights are random; --model DIR takes those of a
real checkpoint. Each side runs in a process of its own, the two in turn. Printed are the seconds
of processor time of all steps: medians, and the ratio of the two sides pair by pair; then the
largest difference between the losses of the two sides.
"""

import json
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
from peers import ALPHA, RANK, TARGETS
from step import WARMUP_STEPS, describe, make_base

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHAPES = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "dtype": "float32",
}
LEARNING_RATE = 1e-3


@dataclass
class Args:
    """Options of the benchmark."""

    model: str | None = None
    """A checkpoint in Hugging Face layout in place of random weights."""
    pairs: int = 3
    """How often the two sides run in turn."""
    steps: int = 15
    """Timed steps of a run, after two for warming up."""
    documents: int = 8
    """Documents of a step."""
    tokens: int = 65
    """Tokens of each document."""
    checkpointing: bool = False
    """Gradient checkpointing on both sides."""
    side: Literal["both", "minilora", "peft"] = "both"
    """Measure one side only and print its figures as JSON."""
    adapter: str | None = None
    """The initial adapter's directory, for one side alone."""


def make_rows(args: Args, vocab_size: int) -> torch.Tensor:
    """Draw the token ids [documents, tokens]; the same for all steps, so that the loss falls."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (args.documents, args.tokens), generator=generator)


def make_adapter(base: str, directory: Path) -> None:
    """Write the adapter that both sides start from."""
    from minilora.checkpoint.peft import adapter_state, save_adapter
    from minilora.config import LoraConfig, ModelConfig
    from minilora.model.hf_config import DecoderConfig
    from minilora.model.lora import init_adapters, inject
    from minilora.model.transformer import CausalLM

    lora = LoraConfig(rank=RANK, alpha=ALPHA, target_modules=TARGETS)
    with torch.device("meta"):
        model = CausalLM(
            DecoderConfig.from_hf(json.loads((Path(base) / "config.json").read_text()))
        )
        inject(model, lora)
    init_adapters(model, seed=0, device=torch.device("cpu"))
    save_adapter(directory, adapter_state(model), lora, ModelConfig(name=base))


def minilora_step(args: Args) -> Callable[[], float]:
    """Return a function that takes one training step with minilora and returns its loss."""
    from minilora.build import build_for_training
    from minilora.config import Config, LoraConfig
    from minilora.training.optimizer import finish_gradients, make_optimizer, trainable_parameters

    config = Config(lora=LoraConfig(init_from=args.adapter))
    config.model.dtype = "float32"
    config.train.gradient_checkpointing = args.checkpointing
    config.train.weight_decay = 0.0
    loaded = build_for_training(config, Path(args.model or ""), torch.device("cpu"))
    model = loaded.model.train()
    config.train.learning_rate = LEARNING_RATE
    parameters = trainable_parameters(loaded)
    optimizer = make_optimizer(parameters, config.train)

    rows = make_rows(args, model.config.vocab_size)
    labels = rows.clone()
    labels[:, 0] = -100  # no token comes before a document's first
    num_supervised = (labels != -100).sum()

    def step() -> float:
        loss = model(rows.flatten(), [args.tokens] * args.documents, labels=labels.flatten())
        loss.backward()
        finish_gradients(loaded, parameters, num_supervised, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return (loss / num_supervised).item()

    return step


def peft_step(args: Args) -> Callable[[], float]:
    """Return a function that takes the same training step with transformers and peft."""
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, args.adapter, is_trainable=True)
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    rows = make_rows(args, base.config.vocab_size)
    batch = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows}

    def step() -> float:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def measure(args: Args) -> dict:
    """Take one side's steps in this process; return processor seconds and all losses."""
    step = minilora_step(args) if args.side == "minilora" else peft_step(args)
    losses = [step() for _ in range(WARMUP_STEPS)]
    start = time.process_time()
    losses += [step() for _ in range(args.steps)]
    return {"seconds": time.process_time() - start, "losses": losses}


def measure_pairs(args: Args) -> dict[str, list[dict]]:
    """Run both sides in turn, each in a process of its own, and return their figures."""
    figures: dict[str, list[dict]] = {"minilora": [], "peft": []}
    with tempfile.TemporaryDirectory() as directory:
        base = args.model or f"{directory}/base"
        if args.model is None:
            Path(base).mkdir()
            make_base(Path(base), SHAPES)
        adapter = Path(directory) / "adapter"
        adapter.mkdir()
        make_adapter(base, adapter)

        flags = ["--model", base, "--adapter", str(adapter), "--steps", str(args.steps)]
        flags += ["--documents", str(args.documents), "--tokens", str(args.tokens)]
        flags += ["--checkpointing", str(args.checkpointing)]
        for _ in range(args.pairs):
            for side, side_figures in figures.items():
                command = [sys.executable, __file__, "--side", side, *flags]
                done = subprocess.run(
                    command,
                    check=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
                side_figures.append(json.loads(done.stdout.splitlines()[-1]))
    return figures


def main(args: Args) -> None:
    """Measure and print the figures."""
    if args.side != "both":
        print(json.dumps(measure(args)))
        return

    figures = measure_pairs(args)
    ours = [run["seconds"] for run in figures["minilora"]]
    theirs = [run["seconds"] for run in figures["peft"]]
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    print(
        f"CPU seconds of {args.steps} steps: minilora {describe(ours)}   "
        f"transformers + peft {describe(theirs)}   ratio {describe(ratios)}"
    )
    losses = zip(figures["minilora"][0]["losses"], figures["peft"][0]["losses"], strict=True)
    differences = [abs(a - b) / b for a, b in losses]
    first, last = (figures["minilora"][0]["losses"][i] for i in (0, -1))
    print(
        f"losses: from {first:.4f} to {last:.4f}, "
        f"the two sides differ by {max(differences):.1e} of the loss at most"
    )


if __name__ == "__main__":
    main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,)))
