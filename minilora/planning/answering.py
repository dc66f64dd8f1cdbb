"""The plan of answering: `python infer.py MODEL --plan`.

Of the model only config.json, the tokenizer and the adapter are read.
"""

from dataclasses import dataclass
from typing import Literal

from minilora.checkpoint.peft import adapter_vocab_size, read_adapter
from minilora.config import LoraConfig, ModelConfig
from minilora.files import read_json
from minilora.generation.arguments import ModelArgs
from minilora.loading import ModelFiles
from minilora.model.precision import dtype_name
from minilora.planning.advice import fitting_sizes
from minilora.planning.gpus import DECODING_SHARE, GPUS, usable_bytes
from minilora.planning.memory import CONTEXT_BYTES, SPARE_ROOM, cache_bytes_per_token
from minilora.planning.model_size import ModelSize, model_size
from minilora.planning.table import format_bytes, table_row
from minilora.planning.training import planned_precision

ASSUMED_PROMPT = 512
"""Tokens of a prompt, if none is given."""
BATCH_SIZES = (1, 16, 64)
"""Answers decoded together, in the table."""
LENGTHS = (1024, 4096, 16384, 65536)
"""Tokens of a prompt with its answer, in the table."""


@dataclass(frozen=True)
class AnsweringPlan:
    """What a model that answers needs."""

    size: ModelSize
    weights: int
    """Bytes of all weights, adapters included unless they are merged."""
    bits: int
    """Of the linear layers of the blocks."""
    prompt_tokens: int
    """Of the longest prompt."""
    is_assumed: bool
    """Whether no prompt was given."""
    new_tokens: int
    """Of an answer, at most."""

    def peak(self, batch_size: int, length: int) -> int:
        """Return the bytes on a GPU for answers that are decoded together.

        Args:
            batch_size: how many.
            length: tokens of each, with its prompt.
        """
        cache = int(batch_size * length * SPARE_ROOM) * cache_bytes_per_token(self.size)
        return self.weights + CONTEXT_BYTES["cuda"] + cache + self.prompt_pass(batch_size)

    def prompt_pass(self, batch_size: int) -> int:
        """Return the bytes that computing the first prompts takes, beside keys and values."""
        return self.size.blocks.count(batch_size * self.prompt_tokens, False, None).evaluation


def plan_answers(
    files: ModelFiles, model: ModelArgs, new_tokens: int, prompt_tokens: int
) -> AnsweringPlan:
    """Compute what a model needs on a GPU to answer.

    Args:
        files: its directories; weights need not be there.
        model: dtype, bits and fold are used.
        new_tokens: tokens of an answer, at most.
        prompt_tokens: of the longest prompt; 0 if none is given.

    Raises:
        UserError: the model is not supported.
    """
    bits = model.bits or files.bits()
    double_quant, dtype = True, model.dtype
    if files.record is not None:
        double_quant = files.record.model.double_quant
        if dtype == "auto":
            dtype = files.record.model.dtype

    where = files.base / "config.json"
    hf_config = read_json(where)
    precision = planned_precision(dtype, hf_config, "cuda")
    lora: LoraConfig | None = None
    vocab_size = 0
    if files.adapter is not None:
        adapter = read_adapter(files.adapter)
        lora = adapter.lora
        vocab_size = adapter_vocab_size(adapter)
    is_merged = model.fold and bits == 16
    held = ModelConfig(bits=_as_bits(bits), double_quant=double_quant)
    kept_lora = None if is_merged else lora
    size = model_size(hf_config, where, precision, kept_lora, False, held, vocab_size)

    # adapters stay in fp32; an embedding and head that come with them are cast
    matrices = size.trained_in_vocabulary
    trained = 4 * (size.trained - matrices) + precision.compute.itemsize * matrices
    weights = size.frozen_bytes + trained + size.converted_bytes
    is_assumed = prompt_tokens == 0
    prompt_tokens = prompt_tokens or ASSUMED_PROMPT
    return AnsweringPlan(size, weights, bits, prompt_tokens, is_assumed, new_tokens)


def _as_bits(bits: int) -> Literal[16, 8, 4]:
    """Return a number of bits as the type of the setting."""
    if bits == 4:
        return 4
    return 8 if bits == 8 else 16


def describe_plan(plan: AnsweringPlan, name: str, batch_size: int) -> str:
    """Write a plan as text.

    Args:
        plan: what to write.
        name: of the model.
        batch_size: answers decoded together.
    """
    length = plan.prompt_tokens + plan.new_tokens
    lines = [*_model_lines(plan, name), "", *_memory_lines(plan, batch_size, length), ""]
    lines += _table_lines(plan)
    if plan.bits == 16:
        lines += ["", *_speed_lines(plan, batch_size, length)]
    return "\n".join(lines)


def _model_lines(plan: AnsweringPlan, name: str) -> list[str]:
    """Describe the model and the length of its answers."""
    origin = "assumed: no --prompt or --input is given" if plan.is_assumed else "the longest one"
    return [
        name,
        f"  parameters   {plan.size.parameters:,}",
        f"  arithmetic   {dtype_name(plan.size.precision.compute)}, base in {plan.bits} bits",
        f"  prompt       {plan.prompt_tokens:,} tokens, {origin}",
        f"  answer       at most {plan.new_tokens:,} tokens (--max_new_tokens)",
    ]


def _memory_lines(plan: AnsweringPlan, batch_size: int, length: int) -> list[str]:
    """Show the memory by part."""
    peak = plan.peak(batch_size, length)
    per_token = cache_bytes_per_token(plan.size)
    context = CONTEXT_BYTES["cuda"]
    prompt_pass = plan.prompt_pass(batch_size)
    cache = peak - plan.weights - prompt_pass - context
    parts = {
        "weights": plan.weights,
        f"keys and values of {batch_size} answers": cache,
        "the pass over their prompts": prompt_pass,
        "context": context,
        "together": peak,
    }
    lines = [table_row(f"Memory with --batch_size {batch_size}", ["on a GPU"])]
    lines += [table_row(f"  {part}", [format_bytes(size)]) for part, size in parts.items()]
    sizes = ", ".join(f"{size} GB" for size in fitting_sizes(peak)) or "none of those known here"
    lines.append(f"  Fits in: {sizes}.")
    if plan.size.converted_bytes:
        lines.append("  The weights include one matrix as it is dequantized for its product.")
    lines.append(
        f"  A token's keys and values take {per_token / 1024:.4g} KiB; the cache has room for half "
        "as many tokens again."
    )
    return lines


def _table_lines(plan: AnsweringPlan) -> list[str]:
    """Show memory and the smallest GPU by the number of answers and their length."""
    lengths = [f"{length:,}" for length in LENGTHS]
    lines = [table_row("Tokens of prompt and answer", lengths, cell_width=20)]
    for batch_size in BATCH_SIZES:
        cells = []
        for length in LENGTHS:
            peak = plan.peak(batch_size, length)
            sizes = fitting_sizes(peak)
            smallest = f"{sizes[0]} GB" if sizes else "none"
            cells.append(f"{format_bytes(peak)} ({smallest})")
        noun = "answer" if batch_size == 1 else "answers"
        lines.append(table_row(f"  {batch_size} {noun} at a time", cells, cell_width=20))
    return lines


def _speed_lines(plan: AnsweringPlan, batch_size: int, length: int) -> list[str]:
    """Show how fast tokens come: a pass reads all weights and the answers' keys and values once."""
    title = f"Tokens/s at most, reading memory at {DECODING_SHARE:.0%} of its bandwidth"
    batches = sorted({1, batch_size})
    lines = [table_row(title, [f"{batch} at a time" for batch in batches], width=62)]
    for gpu in GPUS:
        if not any(plan.peak(1, length) <= usable_bytes(size) for size in gpu.memory_gb):
            continue
        cells = []
        for batch in batches:
            read = plan.weights + batch * length * cache_bytes_per_token(plan.size)
            seconds = read / (gpu.bandwidth * 1e9 * DECODING_SHARE)
            cells.append(f"{batch / seconds:,.0f}")
        lines.append(table_row(f"  {gpu.name}", cells, width=62))
    return lines
