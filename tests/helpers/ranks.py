"""Jobs for several real processes.

`launch` starts the processes, and each of them does every job in one process group. A start costs
seconds, so one start does many jobs. The functions of the second half are the jobs; they run in
those processes, so this file must not import anything slow.
"""

import datetime
import os
import pickle
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

import torch
import torch.distributed as torch_distributed
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import train
from minilora import distributed
from minilora.build import LoadedModel, build_for_training
from minilora.checkpoint import hf
from minilora.config import Config, LoraConfig
from minilora.data import cache
from minilora.data.tokenizer import Tokenizer
from minilora.generation.engine import generate_ids
from minilora.generation.sampling import SamplingParams
from minilora.model import precision

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
Job = tuple[Callable, tuple]
"""A function of a module and its arguments, which must be picklable."""
Results = dict[str, list]
"""For each job what it returned, or a JobError, by rank."""


class JobError(Exception):
    """A job has raised an exception; this holds its traceback as text."""


def torchrun(ranks: int, *command: str, timeout: float = 240) -> subprocess.CompletedProcess:
    """Run a script of this repository in `ranks` processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, f"--nproc_per_node={ranks}", *command],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=timeout,
    )


def environment() -> dict[str, str]:
    """Return the environment of processes that import from this repository and its tests."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def launch(directory: Path, ranks: int, jobs: dict[str, Job], join: bool = True) -> Results:
    """Let `ranks` processes do jobs, one after another.

    Args:
        directory: where jobs and results are exchanged; must not exist.
        ranks: number of processes.
        jobs: by name.
        join: whether the processes join a process group first, or leave that to the jobs.
    """
    directory.mkdir(parents=True)
    (directory / "jobs").write_bytes(pickle.dumps((jobs, join)))
    command = [sys.executable, str(Path(__file__)), str(directory), str(ranks)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=240)
    assert run.returncode == 0, run.stderr[-6000:]
    by_rank = [pickle.loads((directory / str(rank)).read_bytes()) for rank in range(ranks)]
    return {name: [results[name] for results in by_rank] for name in jobs}


def outcome(results: Results, name: str) -> list:
    """Return what a job returned, by rank. Raises JobError if it failed on any."""
    for result in results[name]:
        if isinstance(result, JobError):
            raise result
    return results[name]


def fork_workers(directory: Path, ranks: int) -> None:
    """Fork `ranks` processes that call `work`, with what torchrun tells its own.

    torchrun would start each with a new Python, and each would import torch for itself: seconds of
    processor time that `helpers.processes` spends where the launcher is what is tested.
    """
    import torch._dynamo  # every run imports it, and it takes a second

    store = torch_distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is here, not in the first worker
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    # ends all when one fails
    torch.multiprocessing.start_processes(work, (directory,), ranks, start_method="fork")


def work(rank: int, directory: Path) -> None:
    """Do all jobs in turn; every process that `launch` starts calls this."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    jobs, join = pickle.loads((directory / "jobs").read_bytes())
    torch.set_num_threads(1)
    destroy_process_group = distributed.destroy_process_group
    if join:
        # a deadlock shall be a failure, not a long wait
        distributed.COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=60)
        distributed.init_process_group(CPU)
        distributed.destroy_process_group = distributed.barrier  # the group stays for the next job

    results = {}
    for name, (function, arguments) in jobs.items():
        try:
            results[name] = function(*arguments)
        except Exception:
            results[name] = JobError(traceback.format_exc())
        distributed.barrier()
    (directory / str(distributed.rank())).write_bytes(pickle.dumps(results))
    destroy_process_group()


# ---- jobs: training


def fit(config: Config) -> float:
    """Train, and return the seconds that it took."""
    started = time.perf_counter()
    assert train.main(config) == 0
    return time.perf_counter() - started


def fit_logging(config: Config) -> list[str]:
    """Train, and return what this process has logged."""
    messages: list[str] = []
    with mock.patch.object(distributed, "log", messages.append):
        fit(config)
    return messages


def fit_counting(config: Config) -> list[tuple[int, torch.dtype]]:
    """Train, and return (elements, dtype) of every sum over processes."""
    real, sums = torch_distributed.all_reduce, []

    def all_reduce(tensor: Tensor, *arguments, **options):
        sums.append((tensor.numel(), tensor.dtype))
        return real(tensor, *arguments, **options)

    with mock.patch.object(torch_distributed, "all_reduce", all_reduce):
        fit(config)
    return sums


def fit_slowly(config: Config, timeout: float, delay: float) -> list[bool]:
    """Train where tokenizing takes `delay` seconds, and a collective may take `timeout`.

    Returns:
        For each setting whose files are tokenized in this process whether there was a process
        group.
    """
    real, had_group = cache.tokenize_files, []

    def tokenize_files(*arguments):
        had_group.append(torch_distributed.is_initialized())
        time.sleep(delay)
        return real(*arguments)

    distributed.COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=timeout)
    with mock.patch.object(cache, "tokenize_files", tokenize_files):
        fit(config)
    return had_group


# ---- jobs: a sharded model


@dataclass(frozen=True)
class ModelOptions:
    """How `sharded_model` builds a model."""

    method: Literal["lora", "full"] = "lora"
    bits: int = 16
    double_quant: bool = True
    rank: int = 4
    init: Literal["pretrained", "random"] = "pretrained"
    seed: int = 0
    dtype: Literal["auto", "bfloat16", "float32"] = "float32"
    cpu_has_bfloat16: bool = True
    strategy: Literal["fsdp", "hsdp"] = "fsdp"
    shard_size: int | None = None


def sharded_model(directory: Path, options: ModelOptions) -> LoadedModel:
    """Build a model that the processes share, as a run does; one process holds it alone."""
    config = Config(method=options.method, seed=options.seed, lora=LoraConfig(rank=options.rank))
    config.model.bits, config.model.double_quant = options.bits, options.double_quant
    config.model.dtype, config.model.init = options.dtype, options.init
    config.train.gradient_checkpointing = False
    config.parallel.strategy = options.strategy
    config.parallel.shard_size = options.shard_size
    if options.cpu_has_bfloat16:
        return build_for_training(config, directory, CPU)
    with mock.patch.object(precision, "has_fast_bfloat16", lambda device: False):
        return build_for_training(config, directory, CPU)


@dataclass
class Holdings:
    """What one process holds of a model."""

    reads: list[tuple[str, int | None, tuple[int, ...]]]
    """(name, first row, shape) of everything that it has read from the checkpoint."""
    placements: dict[str, str]
    """How torch describes the distribution of each parameter."""
    local_bytes: dict[str, int]
    """The memory of each parameter."""
    full: dict[str, Tensor]
    """Each parameter with the rows of all processes."""
    buffers: dict[str, Tensor]
    trainable: list[str]
    logits: Tensor
    unsharded: list[str]
    """The parameters that it holds as a whole after passes forward."""


def holdings(directory: Path, tokens: Tensor, options: ModelOptions) -> Holdings:
    """Build a model, and return what this process holds of it."""
    real, reads = hf.read_tensor, []

    def read_tensor(path: Path, name: str, rows: slice = slice(None)) -> Tensor:
        tensor = real(path, name, rows)
        reads.append((name, rows.start, tuple(tensor.shape)))
        return tensor

    with mock.patch.object(hf, "read_tensor", read_tensor):
        loaded = sharded_model(directory, options)
    model = loaded.model.eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    sharded = {name: p for name, p in parameters.items() if isinstance(p, DTensor)}
    full = {**parameters, **{name: p.full_tensor() for name, p in sharded.items()}}
    with torch.no_grad():
        logits = model(tokens)
    loaded.layout.reshard(model)

    after = dict(model.named_parameters())
    return Holdings(
        reads=reads,
        placements={name: str(p.placements) for name, p in sharded.items()},
        local_bytes={name: local_bytes(p) for name, p in parameters.items()},
        full=full,
        buffers=dict(model.named_buffers()),
        trainable=[name for name, p in after.items() if p.requires_grad],
        logits=logits,
        unsharded=[name for name, p in after.items() if not isinstance(p, DTensor)],
    )


def local_bytes(tensor: Tensor) -> int:
    """Return the memory that this process has for a tensor."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage().nbytes()


def memory(key: str) -> int:
    """Return a figure of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def load_peak(small: Path, large: Path, options: ModelOptions) -> tuple[int, int]:
    """Load a large model, and return (bytes held, most bytes beyond those used before)."""
    sharded_model(small, options)  # imports, threads and the group's buffers do not count
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    model: nn.Module = sharded_model(large, options).model
    held = sum(local_bytes(tensor) for tensor in [*model.parameters(), *model.buffers()])
    return held, memory("VmHWM") - before


def answer(
    directory: Path,
    prompts: Sequence[Sequence[int]],
    stop_token_ids: tuple[int, ...],
    options: ModelOptions,
    batch_size: int,
) -> list[tuple[int, list[int], str]]:
    """Sample an answer to each of this process's share of the prompts.

    Returns:
        (index, ids, text) of each.
    """
    loaded, tokenizer = sharded_model(directory, options), Tokenizer(directory)
    indices = range(distributed.rank(), len(prompts), distributed.world_size())
    params = SamplingParams(max_new_tokens=12, temperature=1.0, stop_token_ids=stop_token_ids)
    answers = generate_ids(
        loaded.model,
        [prompts[i] for i in indices],
        tokenizer,
        params,
        indices,
        batch_size,
        collective=loaded.layout.shard_count > 1,
    )
    return [(i, a.ids, a.text) for i, a in zip(indices, answers, strict=True)]


if __name__ == "__main__":
    # under its proper name, so that what is unpickled is of the same classes
    from helpers import ranks

    ranks.fork_workers(Path(sys.argv[1]), int(sys.argv[2]))
