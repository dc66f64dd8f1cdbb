"""Work for several real processes: `launch` starts them under torchrun, and each does every job in one process group.

Starting processes costs seconds, so one start does many jobs. What is here runs in them: nothing slow is imported.
"""

import datetime
import os
import pickle
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal
from unittest import mock

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import train
from minilora import dist, weights
from minilora.build import Built, build_model
from minilora.config import Config
from minilora.generate import generate_ids
from minilora.running import cache
from minilora.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
Job = tuple[Callable, tuple]


class Failed(Exception):
    """A job's exception, with its traceback as text."""


def torchrun(ranks: int, *command: str, timeout: float = 240) -> subprocess.CompletedProcess:
    """Run a script in `ranks` processes on this repository."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.run([*starter, *command], capture_output=True, text=True, env=environment, timeout=timeout)


def launch(directory: Path, ranks: int, jobs: dict[str, Job], join: bool = True) -> dict[str, list]:
    """{job: what it returned (or Failed) on each rank}. join=False: the jobs join the process group themselves."""
    directory.mkdir(parents=True)
    (directory / "jobs").write_bytes(pickle.dumps((jobs, join)))
    run = torchrun(ranks, str(Path(__file__)), str(directory))
    assert run.returncode == 0, run.stderr[-6000:]
    by_rank = [pickle.loads((directory / str(rank)).read_bytes()) for rank in range(ranks)]
    return {name: [results[name] for results in by_rank] for name in jobs}


def outcome(results: dict[str, list], name: str) -> list:
    """What a job returned on each rank; raises if it failed on any."""
    for result in results[name]:
        if isinstance(result, Failed):
            raise result
    return results[name]


def work(directory: Path) -> None:
    """In each process: all jobs in turn."""
    jobs, join = pickle.loads((directory / "jobs").read_bytes())
    torch.set_num_threads(1)
    finish = dist.finish
    if join:
        dist.COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=60)  # a deadlock is a failure, not a long wait
        dist.init(CPU)
        dist.finish = dist.barrier  # the group stays for the next job
    results = {}
    for name, (function, arguments) in jobs.items():
        try:
            results[name] = function(*arguments)
        except Exception:
            results[name] = Failed(traceback.format_exc())
        dist.barrier()
    (directory / str(dist.rank())).write_bytes(pickle.dumps(results))
    finish()


# ---- jobs


def fit(config: Config) -> float:
    """Train; returns the seconds it took."""
    started = time.perf_counter()
    assert train.main(config) == 0
    return time.perf_counter() - started


def fit_counting(config: Config) -> list[tuple[int, torch.dtype]]:
    """Train; returns (elements, dtype) of every sum over processes."""
    real, sums = torch_dist.all_reduce, []

    def all_reduce(tensor: Tensor, *arguments, **options):
        sums.append((tensor.numel(), tensor.dtype))
        return real(tensor, *arguments, **options)

    with mock.patch.object(torch_dist, "all_reduce", all_reduce):
        fit(config)
    return sums


def fit_slowly(config: Config, patience: float, delay: float) -> list[bool]:
    """Train where tokenising takes longer than a collective may; returns, per file tokenised here, whether the group existed."""
    real, joined = cache.reading.tokenise, []

    def tokenise(*arguments):
        joined.append(torch_dist.is_initialized())
        time.sleep(delay)
        return real(*arguments)

    dist.COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=patience)
    with mock.patch.object(cache.reading, "tokenise", tokenise):
        fit(config)
    return joined


def spread(directory: Path, strategy: Literal["fsdp", "hsdp"] = "fsdp", shard_size: int | None = None, **options) -> Built:
    """A model spread over the processes as a run does it; with one process it is whole."""
    config = Config()
    config.method = "full" if options.get("full") else "lora"
    config.parallel.strategy, config.parallel.shard_size = strategy, shard_size
    return build_model(directory, CPU, **{"dtype": "float32", "run": config, **options})


def holdings(directory: Path, tokens: Tensor, options: dict) -> dict:
    """What this process holds of a model, what it has read for it, and what the model is in all."""
    real, read = weights.read_tensor, []

    def read_tensor(path: Path, name: str, rows: slice = slice(None)) -> Tensor:
        tensor = real(path, name, rows)
        read.append((name, rows.start, tuple(tensor.shape)))
        return tensor

    with mock.patch.object(weights, "read_tensor", read_tensor):
        built = spread(directory, **options)
    model = built.model.eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    placements = {name: str(p.placements) for name, p in parameters.items() if isinstance(p, DTensor)}
    local = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in parameters.items()}
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in parameters.items()}
    with torch.no_grad():
        logits = model(tokens)
    built.place.rest(model)
    return {
        "read": read, "placements": placements, "logits": logits, "buffers": dict(model.named_buffers()),
        "bytes": {name: p.untyped_storage().nbytes() for name, p in local.items()}, "whole": whole,
        "gathered": [name for name, p in model.named_parameters() if not isinstance(p, DTensor)],
        "trainable": [name for name, p in model.named_parameters() if p.requires_grad],
    }  # fmt: skip


def memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def local_bytes(model: nn.Module) -> int:
    parameters = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return sum(t.untyped_storage().nbytes() for t in [*parameters, *model.buffers()])


def load_peak(small: Path, large: Path, bits: int) -> tuple[int, int]:
    """(bytes held, the most that loading took over what the process had before)."""
    spread(small, bits=bits)  # imports, threads and the group's buffers are no part of it
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    model = spread(large, dtype="bfloat16", bits=bits).model
    return local_bytes(model), memory("VmHWM") - before


def answer(directory: Path, prompts: Sequence[Sequence[int]], ends: Sequence[int], options: dict, batch_size: int) -> list:
    """(index, ids, text) of this process's share of the prompts, sampled."""
    built, tokenizer = spread(directory, **options), Tokenizer(directory)
    mine = range(dist.rank(), len(prompts), dist.world_size())
    answers = generate_ids(
        built.model, [prompts[i] for i in mine], tokenizer, 12, temperature=1.0, stop_ids=ends, indices=mine,
        batch_size=batch_size, together=built.place.count > 1,
    )  # fmt: skip
    return [(i, a.ids, a.text) for i, a in zip(mine, answers, strict=True)]


if __name__ == "__main__":
    import ranks  # not __main__: what is pickled here must be found under that name

    ranks.work(Path(sys.argv[1]))
