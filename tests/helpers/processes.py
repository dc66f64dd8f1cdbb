"""Runs of train.py in processes of their own, with a fault in one of them if wanted.

A worker script stands in for train.py. It puts one fault into the training (environment variable
FAULT), always at a certain call of a certain function, so that no test depends on the speed of the
machine.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import safetensors.torch

from minilora.config import Config, flatten_config
from minilora.files import is_complete

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
LIMIT = 60  # seconds after which nothing of a failed run may be left

# at(rank, owner, name, n, act): on that rank, call act just before the n-th call of owner.name
WORKER = """
import datetime, itertools, os, signal, sys, time
from pathlib import Path

sys.path.insert(0, ROOT)
import train
from minilora import distributed
from minilora.checkpoint import checkpointer, training_state
from minilora.cli import load_config
from minilora.exit_codes import run_script
from minilora.training import evaluate

def at(rank, owner, name, n, act):
    real, calls = getattr(owner, name), itertools.count(1)
    def wrapped(*args, **kwargs):
        if next(calls) == n:
            act(*args, **kwargs)
        return real(*args, **kwargs)
    if rank == distributed.rank():
        setattr(owner, name, wrapped)

def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

def children(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

def terminate(*pids):
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    time.sleep(1)  # until the launcher, too, has reacted to it

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def fail(*_, **__):
    raise RuntimeError("no good reason")

def make_nan(loaded, parameters, *_):
    next(iter(parameters.values())).grad.fill_(float("nan"))

def fill_disk(*_, **__):
    with open(Path(sys.argv[1]).parent / "out" / "filler", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass

if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
    exec(os.environ.get("FAULT", ""))
run_script(lambda: train.main(load_config(sys.argv[1:])))
"""


def write_config_file(config: Config, path: Path) -> Path:
    """Write a configuration as a file that train.py reads, and return its path."""
    lines = ["from minilora.config import Config", "", "config = Config()"]
    for name, value in flatten_config(config).items():
        lines.append(f"config.{name} = {value!r}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_script(path: Path, body: str) -> Path:
    """Write a script that imports from this repository, and return its path."""
    path.write_text(f"ROOT = {str(ROOT)!r}\n{body}", encoding="utf-8")
    return path


def write_run(config: Config) -> Path:
    """Write config.py and worker.py beside the output directory; returns the former."""
    file = Path(config.output_dir).parent / "config.py"
    write_script(file.with_name("worker.py"), WORKER)
    return write_config_file(config, file)


def start(
    config: Config, fault: str = "", command: list[str] = TORCHRUN
) -> tuple[subprocess.Popen, Path]:
    """Start `command worker.py config.py`; returns the process, and the file with all output."""
    file = write_run(config)
    log = file.with_name("log")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FAULT": fault}
    words = [*command, str(file.with_name("worker.py")), str(file)]
    with log.open("wb") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out, env=environment, cwd=ROOT)
    return process, log


def run(config: Config, fault: str = "", command: list[str] = TORCHRUN) -> tuple[int, str]:
    """Run to the end, which must come in time and leave no process behind.

    Returns:
        Exit code and output.
    """
    process, log = start(config, fault, command)
    try:
        code = process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"not over after {LIMIT} s:\n{log.read_text()}") from None
    assert not processes_of(log.parent), "a process is left behind"
    return code, log.read_text(encoding="utf-8")


def processes_of(directory: Path) -> dict[int, str]:
    """Find the processes with a file of a directory on their command line.

    Returns:
        {pid: the process's RANK, or an empty string}
    """
    found = {}
    for path in Path("/proc").iterdir():
        if not path.name.isdigit() or int(path.name) == os.getpid():
            continue
        try:
            if f"{directory}/".encode() not in (path / "cmdline").read_bytes():
                continue
            rank = re.search(rb"(?:^|\0)RANK=(\d+)", (path / "environ").read_bytes())
        except OSError:  # it has ended meanwhile
            continue
        found[int(path.name)] = rank[1].decode() if rank else ""
    return found


def kill_processes_of(directory: Path) -> None:
    """Kill what a failed test has left running."""
    for pid in processes_of(directory):
        os.kill(pid, signal.SIGKILL)


def final_adapter(config: Config) -> bytes:
    """Return the bytes of the adapter that a finished run has saved."""
    checkpoint = Path(config.output_dir) / "checkpoint-final"
    return (checkpoint / "adapter_model.safetensors").read_bytes()


def complete_checkpoints(config: Config) -> list[str]:
    """Assert that all checkpoints are complete, readable and finite, and return their names."""
    found = sorted(Path(config.output_dir).glob("checkpoint-*"))
    for checkpoint in found:
        assert is_complete(checkpoint), checkpoint
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        tensors = safetensors.torch.load_file(checkpoint / "adapter_model.safetensors")
        assert tensors, checkpoint
        assert all(tensor.isfinite().all() for tensor in tensors.values()), checkpoint
    return [checkpoint.name for checkpoint in found]


# ---- the files of launch/


def write_program(directory: Path, name: str, body: str) -> None:
    """Write a shell program, for a PATH that begins with `directory`."""
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
    (directory / name).chmod(0o755)


def slurm_environment(tmp_path: Path) -> dict[str, str]:
    """Return a batch job's environment on one node, with programs that do what Slurm's do there.

    What `scontrol` is asked for is written to tmp_path/scontrol.log.
    """
    tools = tmp_path / "tools"
    srun = 'while [[ $1 == --* ]]; do shift; done\nexec "$@"'
    log = tmp_path / "scontrol.log"
    scontrol = f'[ "$1 $2" = "show hostnames" ] && echo localhost || echo "$@" >> {log}'
    write_program(tools, "srun", srun)
    write_program(tools, "scontrol", scontrol)
    return {
        "SLURM_JOB_NODELIST": "node",
        "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_JOB_ID": str(free_port() - 20000),
        "PATH": f"{tools}:{os.environ['PATH']}",
    }


def free_port() -> int:
    """Find a free port in the range that launch/slurm.sbatch uses, 20000 to 29999."""
    for port in range(20000 + os.getpid() % 9000, 30000):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise AssertionError("no free port")


def launch(
    script: str, config: Config, tmp_path: Path, environment: dict[str, str]
) -> tuple[int, str]:
    """Run a script of launch/ with the worker instead of train.py.

    Returns:
        Exit code and output.
    """
    file = write_run(config)
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **slurm_environment(tmp_path), **environment}
    torchrun = f"""
words=("$@")
for i in "${{!words[@]}}"; do
    [[ ${{words[i]}} == *train.py ]] && words[i]={file.with_name("worker.py")}
done
exec "{sys.executable}" -m torch.distributed.run "${{words[@]}}"
"""
    write_program(tmp_path / "tools", "torchrun", torchrun)
    command = ["bash", str(ROOT / "launch" / script), str(file)]
    done = subprocess.run(
        command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT
    )
    return done.returncode, done.stdout + done.stderr
