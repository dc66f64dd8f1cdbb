"""A 16-bit checkpoint on a CPU without bfloat16: python bench/laptop.py

A random Llama of 313 M parameters, saved in bfloat16, is trained with LoRA (rank 16 on all linear
layers, gradient checkpointing, two documents of 256 tokens a step) and asked (prompts of 16 tokens)
in three ways:

    cast      minilora with dtype "auto": weights stay in 16 bits, the arithmetic is float32
    float32   minilora with dtype "float32": the weights are float32 too
    peft      transformers + peft, which computes in the checkpoint's dtype (training only)

On a CPU that has bfloat16, oneDNN is kept from using its instructions (ONEDNN_MAX_CPU_ISA); --avx2
limits torch's own kernels and MKL too, so that the machine is like a laptop in every product. Each
side runs in a process of its own, all in turn. Printed are tokens per second by the clock and by
processor time, and the peak of resident memory, with and without what the process takes after its
imports: medians, and ratios round by round. A step of peft takes minutes, so it runs once and takes
only one step, of fewer tokens.
"""

import json
import os
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
from peers import ALPHA, RANK, TARGETS, Work, make_optimizer, peft_step

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
VOCAB_SIZE = 32000
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 22,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
LENGTHS = [256, 256]
PROMPT_LENGTH = 16
WITHOUT_BFLOAT16 = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
LIKE_A_LAPTOP = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
Side = Literal["cast", "float32", "peft"]
Job = Literal["train", "decode 1", "decode 16"]
Figures = dict[str, float]


@dataclass
class Args:
    """Options of the benchmark."""

    rounds: int = 3
    """How often the sides run in turn."""
    avx2: bool = False
    """Limit all kernels to AVX2, not only oneDNN's."""
    steps: int = 2
    """Timed training steps, after one for warming up."""
    new_tokens: int = 24
    """Tokens of each answer."""
    peft_tokens: int = 32
    """Tokens of peft's only step; 0 leaves peft out."""
    model: str | None = None
    """Another 16-bit model in place of the random one; for one job also its directory."""
    job: Job | None = None
    """Do one job of one side, and print its figures as JSON."""
    side: Side = "cast"
    """The side of that job."""


def make_base(directory: Path) -> None:
    """Write the random model as a Hugging Face checkpoint."""
    from minilora.checkpoint.hf import draw_weights
    from minilora.checkpoint.hf_writer import save_weights
    from minilora.model.hf_config import DecoderConfig
    from minilora.model.transformer import CausalLM

    with torch.device("meta"):
        model = CausalLM(DecoderConfig.from_hf(MODEL))
    draw_weights(model, torch.device("cpu"), torch.bfloat16, std=0.02, seed=0)
    save_weights(model, directory, torch.bfloat16)
    (directory / "config.json").write_text(json.dumps(MODEL))


def draw_documents(lengths: list[int]) -> list[torch.Tensor]:
    """Draw the token ids of documents of these lengths."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator) for length in lengths]


def peak_gib() -> float:
    """Return the peak of this process's resident memory so far."""
    from minilora.training.throughput import peak_memory

    return peak_memory(torch.device("cpu")) / 2**30


def minilora_step(args: Args) -> Callable[[], float]:
    """Return a function that takes one training step with minilora, and returns the mean loss."""
    from minilora.build import build_for_training
    from minilora.config import Config, LoraConfig

    config = Config(lora=LoraConfig(rank=RANK, alpha=ALPHA, target_modules=TARGETS))
    config.model.dtype = "auto" if args.side == "cast" else "float32"
    loaded = build_for_training(config, Path(args.model or ""), torch.device("cpu"))
    model = loaded.model.train()
    expected = torch.bfloat16 if args.side == "cast" else torch.float32
    assert (loaded.dtype, loaded.weight_dtype) == (torch.float32, expected)

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters)
    documents = draw_documents(LENGTHS)
    tokens = torch.cat(documents)
    labels = torch.cat([document.index_fill(0, torch.tensor(0), -100) for document in documents])
    num_supervised = int((labels != -100).sum())

    def step() -> float:
        loss = model(tokens, LENGTHS, labels=labels) / num_supervised
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def train(args: Args) -> Figures:
    """Time the training steps of one side."""
    import minilora.build  # noqa: F401 - its memory is that of the program, not of the model

    imported = peak_gib()
    num_steps, lengths = args.steps, LENGTHS
    if args.side == "peft":
        num_steps, lengths = 1, [args.peft_tokens]
        documents = draw_documents(lengths)
        work = Work(Path(args.model or ""), torch.bfloat16, 16, True, documents, documents)
        step = peft_step(work)
    else:
        step = minilora_step(args)
        step()

    clock, processor = time.perf_counter(), time.process_time()
    losses = [step() for _ in range(num_steps)]
    return {
        "tokens/s": sum(lengths) * num_steps / (time.perf_counter() - clock),
        "tokens/CPU s": sum(lengths) * num_steps / (time.process_time() - processor),
        "peak GiB": peak_gib(),
        "beyond imports": peak_gib() - imported,
        "loss": losses[-1],
    }


def decode(args: Args, batch_size: int) -> Figures:
    """Time the answers to a batch of prompts, with minilora."""
    from minilora.build import build_for_inference
    from minilora.generation.engine import generate_ids
    from minilora.generation.sampling import SamplingParams

    class NoTokenizer:
        """Prompts and answers are token ids, so no text is needed."""

        eos_id = None

        def decode_after(self, prompt: list[int], ids: list[int]) -> str:
            return ""

    imported = peak_gib()
    dtype = "auto" if args.side == "cast" else "float32"
    model = build_for_inference(Path(args.model or ""), torch.device("cpu"), dtype).model
    prompts = [ids.tolist() for ids in draw_documents([PROMPT_LENGTH] * batch_size)]

    def answer(new_tokens: int) -> None:
        params = SamplingParams(max_new_tokens=new_tokens, stop_token_ids=())
        generate_ids(model, prompts, NoTokenizer(), params, batch_size=batch_size)

    answer(2)
    clock, processor = time.perf_counter(), time.process_time()
    answer(args.new_tokens)
    num_tokens = batch_size * args.new_tokens
    return {
        "tokens/s": num_tokens / (time.perf_counter() - clock),
        "tokens/CPU s": num_tokens / (time.process_time() - processor),
        "peak GiB": peak_gib(),
        "beyond imports": peak_gib() - imported,
    }


def run_job(args: Args, job: Job, side: Side, base: str) -> Figures:
    """Do a job of one side in a process of its own, and return its figures."""
    environment = {**os.environ, **WITHOUT_BFLOAT16, **(LIKE_A_LAPTOP if args.avx2 else {})}
    command = [sys.executable, __file__, "--job", job, "--side", side, "--model", base]
    command += ["--steps", str(args.steps), "--new-tokens", str(args.new_tokens)]
    command += ["--peft-tokens", str(args.peft_tokens)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def describe(values: list[float]) -> str:
    """Return the median of some values, and their range."""
    return f"{statistics.median(values):,.3g} ({min(values):,.3g} to {max(values):,.3g})"


def report(job: Job, rows: dict[Side, list[Figures]]) -> None:
    """Print the figures of a job, and ratios of cast to the other sides, round by round."""
    for side, of_side in rows.items():
        for name in of_side[0]:
            line = f"{job:10} {side:8} {name:13} {describe([row[name] for row in of_side]):32}"
            if side != "cast":
                pairs = zip(rows["cast"], of_side, strict=False)  # peft has one round only
                line += f"cast is {describe([ours[name] / other[name] for ours, other in pairs])} x"
            print(line, flush=True)


def compare(args: Args, base: str) -> None:
    """Measure all jobs of all sides."""
    jobs: tuple[Job, ...] = ("train", "decode 1", "decode 16")
    for job in jobs:
        rows: dict[Side, list[Figures]] = {"cast": [], "float32": []}
        if job == "train" and args.peft_tokens:
            rows["peft"] = []
        for number in range(args.rounds):
            for side, of_side in rows.items():
                if side == "peft" and number > 0:
                    continue  # one round of it is slow enough
                of_side.append(run_job(args, job, side, base))
        report(job, rows)


def main(args: Args) -> None:
    """Measure, and print the figures."""
    if args.job == "train":
        print(json.dumps(train(args)))
    elif args.job is not None:
        print(json.dumps(decode(args, int(args.job.removeprefix("decode ")))))
    elif args.model:
        compare(args, args.model)
    else:
        with tempfile.TemporaryDirectory() as base:
            make_base(Path(base))
            compare(args, base)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, config=(tyro.conf.FlagConversionOff,)))
