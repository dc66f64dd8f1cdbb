"""What bench/gpu.py and bench/gpu_peers.py share: random models on the GPU, time and memory."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minilora.build import LoadedModel
from minilora.checkpoint.hf import base_parameters, materialize_parameter
from minilora.config import Config
from minilora.distributed import REPLICATED
from minilora.model.block_execution import prepare_blocks
from minilora.model.flops import training_flops
from minilora.model.hf_config import DecoderConfig
from minilora.model.lora import init_adapters, inject, lora_layers
from minilora.model.quantization import quantize_linears
from minilora.model.transformer import CausalLM

DTYPE = torch.bfloat16
SUPERVISED_SHARE = 0.5
"""Of each document, the last half is supervised."""
STEPS = 5
"""Timed steps of a case; the median counts."""
PROMPT_TOKENS = 256
GIB = 2**30


@dataclass
class TrainingCase:
    """A training step to measure."""

    name: str
    shape: dict
    lengths: list[int]
    """Tokens of each document."""
    bits: int = 16
    compiled: bool = False
    recomputed: tuple[int, ...] = (32,)
    """Numbers of blocks to recompute: the first for which the memory suffices is measured."""


def make_model(shape: dict, device: torch.device) -> CausalLM:
    """Make a model with random weights, to be asked.

    Args:
        shape: the fields of config.json.
        device: where the weights are drawn: for billions of them the CPU would take minutes.
    """
    torch.manual_seed(0)
    with torch.device("meta"):
        model = CausalLM(DecoderConfig.from_hf(shape))
    draw_missing_weights(model, device)
    return model.eval().requires_grad_(False)


def make_training_model(shape: dict, config: Config, device: torch.device) -> LoadedModel:
    """Make a model with random weights and adapters, as `build_for_training` does from files.

    Args:
        shape: the fields of config.json.
        config: model.bits, lora and train are used.
        device: where the weights are drawn.
    """
    torch.manual_seed(0)
    with torch.device("meta"):
        model = CausalLM(DecoderConfig.from_hf(shape))
    num_parameters = sum(p.numel() for p in model.parameters())
    bits = config.model.bits
    layers = quantize_linears(model, bits, config.model.double_quant, ()) if bits < 16 else {}
    inject(model, config.lora)
    prepare_blocks(model, config.train)

    for layer in layers.values():
        weight = torch.randn(layer.out_features, layer.in_features, dtype=DTYPE, device=device)
        layer.quantize(weight.mul_(0.02), REPLICATED)
    draw_missing_weights(model, device)
    init_adapters(model, 0, device)
    for _, adapter in lora_layers(model):
        adapter.lora_B.data.normal_(0, 0.01)  # at 0, half of the gradients would be 0
    return LoadedModel(
        model.train(),
        dtype=DTYPE,
        weight_dtype=DTYPE,
        lora=config.lora,
        num_parameters=num_parameters,
    )


def draw_missing_weights(model: CausalLM, device: torch.device) -> None:
    """Give random values to all weights that have none yet, except the adapters'."""
    for path, p in list(base_parameters(model)):
        if p.is_meta:
            values = torch.ones(p.shape, dtype=DTYPE, device=device)
            if p.ndim > 1:
                values.normal_(0, 0.02)
            materialize_parameter(model, path, values, REPLICATED)


def make_documents(lengths: list[int], vocab_size: int) -> tuple[Tensor, Tensor]:
    """Draw the tokens [T] of documents, and their labels [T]."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (sum(lengths),), generator=generator)
    labels = tokens.clone()
    start = 0
    for length in lengths:
        num_prompt = max(1, round(length * (1 - SUPERVISED_SHARE)))
        labels[start : start + num_prompt] = -100
        start += length
    return tokens, labels


def synchronize() -> None:
    """Wait until the GPU has done what was asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free_memory() -> None:
    """Give the memory of the last case back, and begin a new count of the peak."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float | None:
    """Return the most GPU memory that was allocated, in GiB; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    return round(torch.cuda.max_memory_allocated() / GIB, 2)


def seconds_of(step: Callable[[], object], warmup: int = 2) -> tuple[float, float]:
    """Return the median seconds of a step, and the seconds of its warmup."""
    seconds = []
    for _ in range(warmup + STEPS):
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[warmup:]), sum(seconds[:warmup])


def training_row(
    case: TrainingCase, seconds: float, peak: float, adapter_parameters: int
) -> dict[str, object]:
    """Return the figures of a training step that every library has.

    Args:
        case: what was trained.
        seconds: of a step.
        peak: operations per second of the GPU in large products.
        adapter_parameters: how many parameters are trained.
    """
    num_tokens = sum(case.lengths)
    _, labels = make_documents(case.lengths, case.shape["vocab_size"])
    flops = training_flops(
        DecoderConfig.from_hf(case.shape),
        case.lengths,
        int((labels != -100).sum()),
        "lora",
        adapter_parameters=adapter_parameters,
    )
    return {
        "tokens/s": round(num_tokens / seconds),
        "share of peak": round(flops / seconds / peak, 3),
        "GiB": peak_gib(),
        "s": round(seconds, 3),
    }


def decoding_rate(answer: Callable[[int], float], batch: int, new_tokens: int) -> dict:
    """Return tokens per second and milliseconds of a pass, without the prompts.

    Args:
        answer: answers `batch` prompts with that many tokens, and returns the seconds it took.
        batch: number of prompts.
        new_tokens: of the short answers; the long ones have twice as many.
    """
    answer(2 * new_tokens)
    differences = [answer(2 * new_tokens) - answer(new_tokens) for _ in range(3)]
    seconds = max(1e-9, statistics.median(differences)) / new_tokens
    return {"tokens/s": round(batch / seconds), "ms a pass": round(seconds * 1000, 2)}
