"""What to change if a run does not fit, in order, and what each change saves."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from minilora.planning.gpus import USABLE_GIB, usable_bytes
from minilora.planning.memory import Job, plan_memory, with_settings
from minilora.planning.training import strategy_on
from minilora.planning.workload import Workload

TILE_TOKENS = 2048
"""Tokens of a tile of the feed-forward layers that is advised."""
LEAST_SAVED = 0.01
"""A change that saves a smaller share of the memory is not advised."""


@dataclass(frozen=True)
class Change:
    """A change of settings."""

    settings: str
    """As it is written in a config or on the command line."""
    job: Job
    """The run after it."""
    peak: int
    """Its memory."""


def changes(job: Job) -> Iterator[Change]:
    """Yield changes that save memory, each on top of those before it.

    First come those that change no number but by rounding, then those that change what is trained.
    """
    peak = plan_memory(job).peak
    for propose in (
        _recompute_all,
        _smaller_micro_batches,
        _smaller_evaluations,
        _no_sample_answers,
        _tiles,
        _offload,
        _eight_bit_states,
        _shards,
        _host_memory,
        _four_bits,
        _adapters,
    ):
        proposed = propose(job)
        if proposed is None:
            continue
        settings, changed = proposed
        new_peak = plan_memory(changed).peak
        if peak - new_peak < LEAST_SAVED * peak:
            continue
        job, peak = changed, new_peak
        yield Change(settings, job, peak)


Proposal = tuple[str, Job] | None
"""Settings and the run with them, or None if they are set already or cannot be."""


def _recompute_all(job: Job) -> Proposal:
    """Recompute every block."""
    if job.recomputed == job.num_layers:
        return None
    changed = with_settings(job, train__gradient_checkpointing=True)
    return "train.gradient_checkpointing True", changed


def _smaller_micro_batches(job: Job) -> Proposal:
    """Put one document into each micro-batch, and more micro-batches into a step."""
    train = job.config.train
    if train.batch_size == 1:
        return None
    accumulated = train.batch_size * train.grad_acc_steps
    changed = with_settings(job, train__batch_size=1, train__grad_acc_steps=accumulated)
    longest = job.workload.longest
    labels = min(longest, job.workload.batch_supervised)
    workload = replace(job.workload, batch_tokens=longest, batch_supervised=labels)
    settings = f"train.batch_size 1, train.grad_acc_steps {accumulated}"
    return settings, replace(changed, workload=workload)


def _smaller_evaluations(job: Job) -> Proposal:
    """Evaluate as many tokens at a time as a micro-batch has."""
    evaluation = job.config.eval
    if evaluation.is_off or evaluation.max_batch_tokens <= job.workload.batch_tokens:
        return None
    limit = job.workload.batch_tokens
    return f"eval.max_batch_tokens {limit}", with_settings(job, eval__max_batch_tokens=limit)


def _no_sample_answers(job: Job) -> Proposal:
    """Generate no answers in evaluations: their keys and values take memory."""
    if job.config.eval.is_off or job.config.eval.num_generate_samples == 0:
        return None
    return "eval.num_generate_samples 0", with_settings(job, eval__num_generate_samples=0)


def _tiles(job: Job) -> Proposal:
    """Compute the feed-forward layers in tiles."""
    if job.config.train.mlp_tile_tokens is not None:
        return None
    changed = with_settings(job, train__mlp_tile_tokens=TILE_TOKENS)
    return f"train.mlp_tile_tokens {TILE_TOKENS}", changed


def _offload(job: Job) -> Proposal:
    """Keep the inputs of recomputed blocks on the host."""
    if job.config.train.activation_offload or job.recomputed == 0:
        return None
    return "train.activation_offload True", with_settings(job, train__activation_offload=True)


def _eight_bit_states(job: Job) -> Proposal:
    """Keep the optimizer's states in 8 bits."""
    if job.config.train.optimizer != "adamw":
        return None
    return "train.optimizer adamw8bit", with_settings(job, train__optimizer="adamw8bit")


def _shards(job: Job) -> Proposal:
    """Share the model among the processes."""
    if job.processes == 1 or job.shards > 1:
        return None
    changed = with_settings(job, parallel__strategy="fsdp")
    return "parallel.strategy fsdp", replace(changed, strategy="fsdp")


def _host_memory(job: Job) -> Proposal:
    """Keep the shards in host memory."""
    if job.shards == 1 or job.config.parallel.cpu_offload:
        return None
    return "parallel.cpu_offload True", with_settings(job, parallel__cpu_offload=True)


def _four_bits(job: Job) -> Proposal:
    """Hold the base in 4 bits."""
    if job.config.model.bits == 4 or job.config.method == "full" or job.remeasure is None:
        return None
    changed = with_settings(job, model__bits=4)
    settings = "model.bits 4 (QLoRA: another base, slightly)"
    return settings, replace(changed, size=job.remeasure(changed.config))


def _adapters(job: Job) -> Proposal:
    """Train adapters instead of every weight."""
    if job.config.method != "full" or job.remeasure is None:
        return None
    changed = replace(job, config=replace(job.config, method="lora"))
    settings = "method lora (adapters in place of every weight)"
    return settings, replace(changed, size=job.remeasure(changed.config))


def fits(job: Job, memory_gb: int) -> bool:
    """Return whether a run fits in GPUs of that size, shared among processes as it would be."""
    shared = replace(job, strategy=strategy_on(job, memory_gb))
    return plan_memory(shared).peak <= usable_bytes(memory_gb)


def fitting_sizes(peak: int) -> list[int]:
    """Return the sizes of GPU memory, in GB, that a peak fits in."""
    return [size for size in USABLE_GIB if peak <= usable_bytes(size)]


def longest_document(job: Job, memory_gb: int) -> int:
    """Return the longest document, alone in its micro-batch, that fits in a GPU, in tokens.

    The memory grows linearly with the tokens, so two lengths tell the rest. All its tokens are
    taken to be supervised; evaluations and the data's own documents do not count.
    """
    job = with_settings(job, eval__eval_steps=0, train__batch_size=1)
    at_1, at_2 = 2**14, 2**15
    peak_1, peak_2 = (plan_memory(_with_document(job, length)).peak for length in (at_1, at_2))
    bytes_per_token = (peak_2 - peak_1) / (at_2 - at_1)
    return max(0, int(at_1 + (usable_bytes(memory_gb) - peak_1) / bytes_per_token))


def _with_document(job: Job, length: int) -> Job:
    """Return the job with one document of that many tokens."""
    workload: Workload = replace(job.workload, batch_tokens=length, batch_supervised=length)
    return replace(job, workload=workload)


def recomputed_blocks_that_fit(job: Job, memory_gb: int) -> int:
    """Return how many blocks train.gradient_checkpointing="auto" recomputes on a GPU of that size.

    Like the run itself it takes the fewest with which the plan fits; all of them if none does.
    """
    for number in range(job.num_layers):
        changed = with_settings(job, train__gradient_checkpointing=number)
        if plan_memory(changed).peak <= usable_bytes(memory_gb):
            return number
    return job.num_layers
