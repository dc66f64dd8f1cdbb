"""The plan of a training run as text."""

import numpy as np

from minilora import distributed
from minilora.config import Config
from minilora.model.precision import dtype_name
from minilora.planning.advice import (
    changes,
    fits,
    fitting_sizes,
    longest_document,
    recomputed_blocks_that_fit,
)
from minilora.planning.gpus import (
    CPU_SHARE,
    GPUS,
    TRAINING_SHARE,
    USABLE_GIB,
    training_seconds,
)
from minilora.planning.memory import Job, plan_memory
from minilora.planning.table import format_bytes, format_seconds, rounded_down, table_row
from minilora.planning.training import TrainingPlan, plan_training
from minilora.training.throughput import matrix_peak


def show_plan(config: Config) -> None:
    """Print what a run needs, on the first process alone.

    Raises:
        UserError: the configuration, the data or the model's description is wrong.
    """
    if distributed.rank() > 0:
        return
    plan = plan_training(config)
    for section in (
        _model_lines(plan),
        _work_lines(plan),
        _memory_lines(plan),
        _fit_lines(plan),
        _time_lines(plan),
    ):
        print(*section, sep="\n", end="\n\n")


def _model_lines(plan: TrainingPlan) -> list[str]:
    """Describe the model and how it is trained."""
    size, config = plan.job.size, plan.config
    share = size.trained / size.parameters
    lines = [
        config.model.name,
        f"  parameters   {size.parameters:,}",
        f"  trained      {size.trained:,} ({share:.2%}), method {config.method}",
        f"  arithmetic   {dtype_name(size.precision.compute)}, base in {config.model.bits} bits",
    ]
    if plan.job.processes > 1:
        lines.append(f"  processes    {plan.job.processes}, {plan.job.strategy}")
    return lines


def _work_lines(plan: TrainingPlan) -> list[str]:
    """Describe the documents, the steps and their operations."""
    workload, config = plan.job.workload, plan.config
    tokens, labels = int(workload.lengths.sum()), int(workload.supervised.sum())
    lines = ["Work"]
    if not workload.is_assumed:
        lines += [
            f"  documents    {len(workload.lengths):,}, of {int(np.median(workload.lengths)):,} "
            f"tokens (median), at most {workload.longest:,}",
            f"  an epoch     {tokens:,} tokens, {labels:,} of them trained, in "
            f"{plan.steps_per_epoch:,} steps",
        ]
    per_step = plan.flops / plan.steps_per_epoch
    lines.append(
        f"  micro-batch  at most {workload.batch_tokens:,} tokens; a step is "
        f"{config.train.grad_acc_steps} of them on each process, {per_step:.3g} operations"
    )
    if plan.total_steps is not None:
        lines.append(f"  the run      {plan.total_steps:,} steps")
    return lines + [f"  assumed      {note}" for note in plan.notes]


def _memory_lines(plan: TrainingPlan) -> list[str]:
    """Show the memory of each process by part."""
    columns = {"on a GPU": plan_memory(plan.job)}
    if plan.job_here is not None:
        columns["on this CPU"] = plan_memory(plan.job_here)
    names: list[str] = []
    for memory in columns.values():
        names += [name for name in memory.parts if name not in names]

    lines = [table_row("Memory of each process", list(columns))]
    for name in names:
        if any(memory.parts.get(name) for memory in columns.values()):
            cells = [format_bytes(memory.parts.get(name, 0)) for memory in columns.values()]
            lines.append(table_row(f"  {name}", cells))
    lines.append(
        table_row("  together", [format_bytes(memory.peak) for memory in columns.values()])
    )
    first = columns["on a GPU"]
    others = [
        f"{moment} {format_bytes(first.total_at(moment))}"
        for moment in first.moments
        if moment != first.peak_moment
    ]
    lines.append(f"  The most is held at {first.peak_moment}; others: {', '.join(others)}.")
    if first.host:
        on_host = format_bytes(sum(first.host.values()))
        lines.append(f"  Each process has {on_host} in the machine's memory beside that.")
    return lines


def _fit_lines(plan: TrainingPlan) -> list[str]:
    """Say in which GPUs the run fits, and what to change for the others."""
    job = plan.job
    answers = [f"{size} GB {'yes' if fits(job, size) else 'no'}" for size in USABLE_GIB]
    lines = [table_row("Fits in a GPU of", answers)]
    if job.config.train.gradient_checkpointing == "auto":
        recomputed = [str(recomputed_blocks_that_fit(job, size)) for size in USABLE_GIB]
        lines.append(table_row(f"  blocks recomputed, of {job.num_layers}", recomputed))
    longest = [rounded_down(longest_document(job, size)) for size in USABLE_GIB]
    lengths = [f"{length:,}" if length else "none" for length in longest]
    lines.append(table_row("  longest document to train on, tokens", lengths))
    if plan.job_here is not None:
        free = distributed.free_bytes(distributed.default_device())
        relation = "fits" if plan_memory(plan.job_here).peak <= free else "does not fit"
        lines.append(f"  On this CPU it {relation}: {format_bytes(free)} are free now.")

    if not fits(job, min(USABLE_GIB)):
        lines += ["", *_change_lines(job)]
    return lines


def _change_lines(job: Job) -> list[str]:
    """Show what to change, one after the other, until the run fits in the smallest GPU."""
    lines = [table_row("To change, one after the other", ["saves", "then", "fits in"], width=50)]
    before = plan_memory(job).peak
    for change in changes(job):
        sizes = fitting_sizes(change.peak)
        fits_in = f"{sizes[0]} GB" if sizes else "none"
        saved = format_bytes(before - change.peak)
        lines.append(
            table_row(f"  {change.settings}", [saved, format_bytes(change.peak), fits_in], width=50)
        )
        before = change.peak
        if min(USABLE_GIB) in sizes:
            break
    if len(lines) == 1:
        lines.append("  nothing that this plan knows: a smaller model, or more GPUs")
    return lines


def _time_lines(plan: TrainingPlan) -> list[str]:
    """Show how long the run takes on GPUs by name, and on this machine."""
    job = plan.job
    tokens = int(job.workload.lengths.sum())
    flops_per_process = plan.flops / job.processes
    has_length = plan.total_steps is not None
    what = f"the run, {plan.total_steps:,} steps" if has_length else "1,000 steps"
    num_steps = plan.total_steps if plan.total_steps is not None else 1000
    passes = num_steps / plan.steps_per_epoch

    title = f"Time at {TRAINING_SHARE:.0%} of the peak, without evaluations"
    lines = [table_row(title, ["tokens/s", what], width=50, cell_width=24)]
    for gpu in GPUS:
        seconds = training_seconds(gpu, flops_per_process, job.size.precision.compute)
        name = gpu.name if job.processes == 1 else f"{job.processes} x {gpu.name}"
        does_fit = any(fits(job, size) for size in gpu.memory_gb)
        note = "" if does_fit else " (does not fit)"
        cells = [f"{rounded_down(int(tokens / seconds)):,}", format_seconds(seconds * passes)]
        lines.append(table_row(f"  {name}{note}", cells, width=50, cell_width=24))

    device = distributed.default_device()
    if plan.job_here is None and device.type == "cpu":
        return lines
    here = plan.job_here or job
    peak = matrix_peak(device, here.size.precision.compute)
    share = CPU_SHARE if device.type == "cpu" else TRAINING_SHARE
    seconds = flops_per_process / (peak * share)
    cells = [f"{rounded_down(int(tokens / seconds)):,}", format_seconds(seconds * passes)]
    name = f"  this machine: {share:.0%} of {peak:.3g} operations/s, measured"
    lines.append(table_row(name, cells, width=50, cell_width=24))
    return lines
