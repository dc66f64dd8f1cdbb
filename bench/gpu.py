"""What a GPU does with models of 7 and 8 B parameters: python bench/gpu.py

Random models are made on the GPU; nothing is downloaded. Measured are, in ten minutes on an H100:

- the GPU's rate in large bfloat16 products, which is what shares of the peak are shares of;
- training steps of a LoRA over an 8B, of several shapes, with the package's own settings
  (recomputation, compiled blocks), and of a QLoRA over a 7B: tokens per second, memory, and the
  memory that `--plan` computes;
- decoding with a 7B, 1, 16 and 64 prompts at a time;
- a training step of transformers + peft, and transformers' generate, if both are installed.

Printed are the tables for the README; the last line is the same as JSON. A case that fails is
reported, the others go on, and the exit code is 1. --small takes tiny models, also on a CPU: it
tries the script itself.
"""

import dataclasses
import gc
import importlib.metadata
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gpu_peers
from gpu_tools import (
    DTYPE,
    GIB,
    PROMPT_TOKENS,
    SUPERVISED_SHARE,
    TrainingCase,
    decoding_rate,
    free_memory,
    make_documents,
    make_model,
    make_training_model,
    seconds_of,
    synchronize,
    training_row,
)

from minilora import distributed
from minilora.build import LoadedModel
from minilora.config import Config, ModelConfig
from minilora.generation.engine import generate_ids
from minilora.generation.sampling import SamplingParams
from minilora.model.block_execution import recompute_blocks
from minilora.model.precision import Precision
from minilora.planning.memory import CONTEXT_BYTES, plan_memory
from minilora.planning.memory import Job as PlannedJob
from minilora.planning.model_size import model_size
from minilora.planning.workload import Workload
from minilora.training.optimizer import (
    finish_gradients,
    make_optimizer,
    take_step,
    trainable_parameters,
)
from minilora.training.throughput import matrix_peak

NEW_TOKENS = 128
"""Of the shorter answers; the longer ones have twice as many."""

LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
MISTRAL_7B = {**LLAMA_8B, "model_type": "mistral", "vocab_size": 32768, "sliding_window": None}
SMALL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass
class Args:
    """Options of the benchmark."""

    small: bool = False
    """Tiny models and documents, also on a CPU."""
    minutes: float = 9.5
    """Cases that would begin later are left out, and named."""
    peers: bool = True
    """Measure transformers and peft too, if they are installed."""


TRAINING = [
    TrainingCase("LoRA 8B, 16 x 1024", LLAMA_8B, [1024] * 16),
    TrainingCase("LoRA 8B, 8 x 2048", LLAMA_8B, [2048] * 8),
    TrainingCase("LoRA 8B, 16 x 1024", LLAMA_8B, [1024] * 16, 16, False, (0, 8, 12, 16, 24, 32)),
    TrainingCase("LoRA 8B, 16 x 1024", LLAMA_8B, [1024] * 16, 16, True, (0, 4, 8, 16, 32)),
    TrainingCase("LoRA 8B, 4 x 4096", LLAMA_8B, [4096] * 4, 16, True, (0, 4, 8, 16, 32)),
    TrainingCase(
        "LoRA 8B, 64 x 32 to 480", LLAMA_8B, list(range(32, 481, 7))[:64], 16, True, (0, 4, 8, 32)
    ),
    TrainingCase("QLoRA 7B, 4 x 2048", MISTRAL_7B, [2048] * 4, 4),
    TrainingCase("QLoRA 7B, 8 x 2048", MISTRAL_7B, [2048] * 8, 4, True, (0, 4, 8, 16, 32)),
]
DECODING_BATCHES = (1, 16, 64)


@dataclass
class Results:
    """What was measured."""

    machine: dict = field(default_factory=dict)
    training: list[dict] = field(default_factory=list)
    decoding: list[dict] = field(default_factory=list)
    not_measured: list[str] = field(default_factory=list)
    num_failed: int = 0


# ---- our side


def settings_of(case: TrainingCase) -> Config:
    """Return the settings of a training case."""
    config = Config(model=ModelConfig(bits=case.bits))  # type: ignore[arg-type]
    config.lora.alpha = config.lora.rank
    config.train.compile = case.compiled
    config.train.gradient_checkpointing = case.recomputed[0]
    return config


def measure_training(case: TrainingCase, peak: float, device: torch.device) -> list[dict]:
    """Measure a training step: all of its micro-batch, the gradients' norm, the update."""
    config = settings_of(case)
    loaded = make_training_model(case.shape, config, device)
    parameters = trainable_parameters(loaded)
    optimizer = make_optimizer(parameters, config.train)
    tokens, labels = make_documents(case.lengths, case.shape["vocab_size"])
    num_supervised = torch.tensor(int((labels != -100).sum()), device=device)

    def step() -> None:
        on_device = distributed.to_device(tokens, device)
        loaded.model(on_device, case.lengths, labels=labels).backward()
        grad_norm = finish_gradients(loaded, parameters, num_supervised, 1.0)
        take_step(optimizer, grad_norm, DTYPE)
        optimizer.zero_grad(set_to_none=True)

    start = time.perf_counter()
    recomputed = fit_in_memory(loaded, optimizer, step, case.recomputed)
    first = time.perf_counter() - start  # also compiles
    seconds, warmup = seconds_of(step)
    config.train.gradient_checkpointing = recomputed
    adapter_parameters = sum(p.numel() for p in parameters.values())
    row = {
        "case": case.name,
        "compiled": case.compiled,
        "recomputed blocks": recomputed,
        **training_row(case, seconds, peak, adapter_parameters),
        "warmup s": round(first + warmup, 1),
        "GiB planned": planned_gib(case, config),
    }
    return [row]


def fit_in_memory(
    loaded: LoadedModel,
    optimizer: torch.optim.Optimizer,
    step: Callable[[], None],
    numbers: tuple[int, ...],
) -> int:
    """Recompute the first of `numbers` blocks with which a step has enough memory; return it.

    Raises:
        torch.OutOfMemoryError: not even the last of them is enough.
    """
    for number in numbers:
        recompute_blocks(loaded.model, number)
        try:
            step()
            synchronize()
            break
        except torch.OutOfMemoryError:
            if number == numbers[-1]:
                raise
        # outside of `except`, which holds the activations of the step that failed
        optimizer.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return number


def planned_gib(case: TrainingCase, config: Config) -> float:
    """Return what `--plan` says of the step's memory, without CUDA's context, in GiB."""
    size = model_size(
        case.shape, Path("config.json"), Precision(DTYPE, DTYPE), config.lora, False, config.model
    )
    lengths = np.array(case.lengths)
    num_supervised = round(sum(case.lengths) * SUPERVISED_SHARE)
    workload = Workload(lengths, lengths // 2, sum(case.lengths), num_supervised, is_assumed=False)
    memory = plan_memory(PlannedJob(config, size, workload, "cuda"))
    return round((memory.peak - CONTEXT_BYTES["cuda"]) / GIB, 2)


class NoTokenizer:
    """Prompts and answers are token ids here, so no text is needed."""

    eos_id = None

    def decode_after(self, prompt: list[int], ids: list[int]) -> str:
        """Return no text."""
        return ""


def measure_decoding(
    shape: dict, batches: tuple[int, ...], new_tokens: int, device: torch.device
) -> list[dict]:
    """Measure greedy answers of one length: the time of a long answer less that of a short one.

    Prompts and whatever is captured or compiled at the start take the same time in both.
    """
    model = make_model(shape, device)
    generator = torch.Generator().manual_seed(0)

    rows = []
    for batch in batches:
        prompts = torch.randint(
            shape["vocab_size"], (batch, PROMPT_TOKENS), generator=generator
        ).tolist()

        def answer(num_tokens: int, prompts: list[list[int]] = prompts) -> float:
            params = SamplingParams(max_new_tokens=num_tokens, stop_token_ids=[])
            synchronize()
            start = time.perf_counter()
            generate_ids(model, prompts, NoTokenizer(), params, batch_size=len(prompts))  # type: ignore[arg-type]
            synchronize()
            return time.perf_counter() - start

        rows.append({"prompts": batch, **decoding_rate(answer, batch, new_tokens)})
    return rows


# ---- the report


def print_table(rows: list[dict]) -> None:
    """Print rows as a Markdown table; a column that a row lacks is empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    print(f"\n| {' | '.join(columns)} |")
    print("|" + "---|" * len(columns))
    for row in rows:
        cells = ["" if row.get(name) is None else f"{row[name]}" for name in columns]
        print(f"| {' | '.join(cells)} |")


def describe_machine(device: torch.device) -> dict:
    """Return the GPU's name and the versions of what computes."""
    name, capability = "CPU", ""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, capability = properties.name, f"{properties.major}.{properties.minor}"
    versions = {"torch": str(torch.__version__)}
    for package in ("bitsandbytes", "transformers", "peft"):
        if importlib.util.find_spec(package) is not None:
            versions[package] = importlib.metadata.version(package)
    return {"device": name, "capability": capability, "cuda": torch.version.cuda, **versions}


def make_small(case: TrainingCase) -> TrainingCase:
    """Return a case with a tiny model and short documents."""
    numbers = tuple(min(number, SMALL["num_hidden_layers"]) for number in case.recomputed)
    return dataclasses.replace(
        case,
        shape={**case.shape, **SMALL},
        lengths=[max(4, length // 32) for length in case.lengths[:4]],
        recomputed=numbers,
    )


@dataclass
class Job:
    """A measurement."""

    name: str
    rows: list[dict]
    """Where its results go."""
    measure: Callable[[], list[dict]]


def make_jobs(args: Args, results: Results, peak: float, device: torch.device) -> list[Job]:
    """Return all measurements, the peers' last."""
    cases, shape, new_tokens = TRAINING, MISTRAL_7B, NEW_TOKENS
    if args.small:
        cases = [make_small(case) for case in TRAINING]
        shape, new_tokens = {**MISTRAL_7B, **SMALL}, 8

    jobs = []
    for case in cases:
        measure = partial(measure_training, case, peak, device)
        jobs.append(Job(case.name, results.training, measure))
    answering = (shape, DECODING_BATCHES, new_tokens, device)
    jobs.append(Job("decoding", results.decoding, partial(measure_decoding, *answering)))
    if args.peers and importlib.util.find_spec("peft") is not None:
        measure_peft = partial(gpu_peers.measure_peft, cases[1], peak, device)
        jobs.append(Job("transformers + peft", results.training, measure_peft))
        measure_generate = partial(gpu_peers.measure_transformers_decoding, *answering)
        jobs.append(Job("transformers' generate", results.decoding, measure_generate))
    return jobs


def run_job(job: Job, results: Results) -> None:
    """Measure, and go on after an error: the other measurements may work."""
    free_memory()
    try:
        found = job.measure()
    except Exception as error:
        results.num_failed += 1
        reason = [*str(error).splitlines(), ""][0][:200]
        found = []
        results.not_measured.append(f"{job.name}: FAILED, {type(error).__name__}: {reason}")
        print(results.not_measured[-1], file=sys.stderr)
    job.rows.extend(found)
    for row in found:
        print(row, file=sys.stderr)


def main(args: Args) -> int:
    """Measure everything and print it. Returns 1 if a case failed, else 0."""
    if not torch.cuda.is_available() and not args.small:
        print("error: there is no GPU here (--small tries the script on a CPU)", file=sys.stderr)
        return 2
    distributed.use_expandable_segments()
    device = distributed.default_device()
    results = Results(machine=describe_machine(device))
    peak = matrix_peak(device, DTYPE)
    results.machine["TFLOP/s"] = round(peak / 1e12, 2)

    jobs = make_jobs(args, results, peak, device)
    end = time.monotonic() + 60 * args.minutes
    for job in jobs:
        if time.monotonic() > end:
            results.not_measured.append(f"{job.name}: out of time")
        else:
            run_job(job, results)

    print_table([results.machine])
    print_table(results.training)
    print_table(results.decoding)
    for reason in results.not_measured:
        print(f"\nnot measured: {reason}")
    print(json.dumps(dataclasses.asdict(results)))
    return 1 if results.num_failed else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
