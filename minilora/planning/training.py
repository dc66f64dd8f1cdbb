"""The plan of a training run: `python train.py CONFIG --plan`.

Of the model only config.json and the tokenizer are read; nothing is written. Under torchrun, or
with WORLD_SIZE=8 in the environment, the plan is that of as many processes.
"""

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minilora import distributed
from minilora.checkpoint.peft import adapter_vocab_size, read_adapter
from minilora.config import Config, LoraConfig
from minilora.data.tokenizer import Tokenizer, has_tokenizer
from minilora.errors import UserError
from minilora.files import read_json
from minilora.hub import DESCRIPTION_FILES, resolve
from minilora.model.flops import training_flops
from minilora.model.precision import DTYPES, Precision, choose_precision, saved_dtype
from minilora.planning.gpus import USABLE_GIB
from minilora.planning.memory import Job
from minilora.planning.model_size import ModelSize, model_size
from minilora.planning.workload import (
    Workload,
    assumed_workload,
    missing_files,
    read_workload,
)
from minilora.training.datasets import make_tokenizer


@dataclass(frozen=True)
class TrainingPlan:
    """What a run needs."""

    config: Config
    job: Job
    """On a GPU."""
    job_here: Job | None
    """On this machine's CPU, if it has no GPU and the run, of one process, needs none."""
    flops: float
    """Floating-point operations of `workload`, recomputation included, of all processes."""
    steps_per_epoch: int
    total_steps: int | None
    """None if nothing says how long the run is."""
    notes: tuple[str, ...]
    """What is assumed."""


def plan_training(config: Config) -> TrainingPlan:
    """Compute what a run needs.

    Raises:
        UserError: the configuration, the data or the model's description is wrong.
    """
    base = resolve(config.model.name, config.model.revision, "model.revision", DESCRIPTION_FILES)
    processes = distributed.world_size()
    _check_shard_size(config, processes)
    workload, vocab_size, notes = _read_data(config, base)

    measure = functools.partial(_measure, base=base, vocab_size=vocab_size)
    on_gpu = functools.partial(measure, device_type="cuda")
    job = Job(config, on_gpu(config), workload, "cuda", processes, "ddp", on_gpu)
    job = replace(job, strategy=strategy_on(job, 80))

    job_here = None
    needs_gpu = config.train.optimizer.startswith("paged") or config.parallel.cpu_offload
    if processes == 1 and not torch.cuda.is_available() and not needs_gpu:
        on_cpu = functools.partial(measure, device_type="cpu")
        job_here = replace(job, size=on_cpu(config), device_type="cpu", remeasure=on_cpu)

    train = config.train
    docs_per_step = train.batch_size * train.grad_acc_steps * processes
    steps_per_epoch = math.ceil(len(workload.lengths) / docs_per_step)
    total_steps = train.max_steps
    if total_steps is None and not workload.is_assumed:
        total_steps = math.ceil(train.epochs * steps_per_epoch)
    flops = _flops(job)
    return TrainingPlan(config, job, job_here, flops, steps_per_epoch, total_steps, notes)


def _check_shard_size(config: Config, processes: int) -> None:
    """Raise UserError if parallel.shard_size does not divide the number of processes."""
    shard_size = config.parallel.shard_size or 1
    if processes > 1 and processes % shard_size:
        raise UserError(
            f"parallel.shard_size = {shard_size} does not divide the {processes} processes"
        )


def _read_data(config: Config, base: Path) -> tuple[Workload, int, tuple[str, ...]]:
    """Read the documents if they are here.

    Returns:
        The documents, or assumed ones; the smallest vocabulary that the model must have; and notes
        on what is assumed.
    """
    missing = missing_files(config)
    reason = ""
    if missing:
        reason = f"{', '.join(missing) or 'data.train_file'} is not on this machine"
    elif not has_tokenizer(base):
        reason = f"{config.model.name} has no tokenizer"
    if not reason:
        tokenizer = make_tokenizer(config, base)
        vocab_size = tokenizer.vocab_size if config.data.add_tokens else 0
        return read_workload(config, tokenizer), vocab_size, ()

    note = f"{reason}: every document is taken to have data.max_seq_length tokens, all trained"
    vocab_size = 0
    if config.data.add_tokens and has_tokenizer(base):
        vocab_size = Tokenizer(base).vocab_size + len(config.data.add_tokens)
    return assumed_workload(config), vocab_size, (note,)


def _measure(config: Config, base: Path, vocab_size: int, device_type: str) -> ModelSize:
    """Measure the model of a run on a kind of device."""
    where = base / "config.json"
    hf_config = read_json(where)
    precision = planned_precision(config.model.dtype, hf_config, device_type)
    lora: LoraConfig | None = None if config.method == "full" else config.lora
    if lora is not None and lora.init_from is not None:
        adapter = read_adapter(resolve(lora.init_from))
        lora = adapter.lora
        vocab_size = max(vocab_size, adapter_vocab_size(adapter))
    full = lora is None
    return model_size(hf_config, where, precision, lora, full, config.model, vocab_size)


def planned_precision(wanted: str, hf_config: dict, device_type: str) -> Precision:
    """Return the dtypes of a model on a kind of device that may not be here.

    A GPU that is not here is taken to have bfloat16; float16, on those that have not, is as large.
    """
    if device_type == "cpu" or torch.cuda.is_available():
        return choose_precision(wanted, hf_config, torch.device(device_type))
    if wanted != "auto":
        return Precision(DTYPES[wanted], DTYPES[wanted])
    dtype = torch.float32 if saved_dtype(hf_config) == "float32" else torch.bfloat16
    return Precision(dtype, dtype)


def strategy_on(job: Job, memory_gb: int) -> str:
    """Return how the processes share the model on GPUs of that size: ddp, fsdp or hsdp.

    For parallel.strategy "auto" the rule is that of `sharding.choose_strategy`.
    """
    wanted = job.config.parallel.strategy
    if job.processes == 1:
        return "ddp"
    if wanted != "auto":
        return wanted
    # imports DTensor: half a second
    from minilora.sharding import BYTES_PER_TRAINED_PARAMETER, WEIGHTS_SHARE

    per_trained = BYTES_PER_TRAINED_PARAMETER[job.config.train.optimizer]
    needed = job.size.frozen_bytes + per_trained * job.size.trained
    return "ddp" if needed <= WEIGHTS_SHARE * USABLE_GIB[memory_gb] * 2**30 else "fsdp"


def _flops(job: Job) -> float:
    """Count the operations of all documents of the workload."""
    size = job.size
    adapters = 0
    if size.lora is not None:
        adapters = size.trained - size.trained_in_vocabulary
    return training_flops(
        size.decoder,
        job.workload.lengths.tolist(),
        int(job.workload.supervised.sum()),
        "full" if size.lora is None else "lora",
        job.recomputed,
        adapters,
    )
