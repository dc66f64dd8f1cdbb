"""Time until something happens: python bench/startup.py

Measured are whole processes, in turn, several rounds: `--help` of the three scripts beside what
they cannot do without (torch) and beside the help of a script of transformers and peft; and the
start of a run, which is a run of one step without evaluations, from a cache of its data. The
model is the one of examples/, so nearly all of it is imports, checks and files.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from step import describe

ROOT = Path(__file__).resolve().parent.parent

PEER_HELP = """
import peft, transformers
transformers.HfArgumentParser(transformers.TrainingArguments).parse_args_into_dataclasses(["--help"])
"""


@dataclass
class Args:
    """Options of the benchmark."""

    rounds: int = 5
    """How often each command runs."""


def commands(directory: Path) -> dict[str, list[str]]:
    """Return what is measured, by name.

    Args:
        directory: where runs write to.
    """
    help_of = {
        f"{script} --help": [str(ROOT / script), "--help"]
        for script in ("train.py", "merge.py", "infer.py")
    }
    run = [str(ROOT / "train.py"), str(ROOT / "configs/tiny.py"), "--train.max_steps", "1"]
    run += ["--train.resume", "never", "--eval.eval_steps", "0", "--train.save_steps", "0"]
    return {
        "import torch": ["-c", "import torch"],
        **help_of,
        "transformers + peft --help": ["-c", PEER_HELP],
        "a run of one step": [*run, "--output_dir", str(directory / "out")],
    }


def measure(command: list[str], directory: Path) -> tuple[float, float]:
    """Run a command. Returns (seconds, CPU seconds)."""
    for old in (directory / "out").glob("checkpoint-*"):
        old.rename(directory / f"old-{time.monotonic_ns()}")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    environment = {**os.environ, "XDG_CACHE_HOME": str(directory / "cache")}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        raise SystemExit(f"{command} failed:\n{done.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return seconds, user + system


def main(args: Args) -> None:
    """Run every command in turn and print the figures."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        all_commands = commands(directory)
        costs: dict[str, list[tuple[float, float]]] = {what: [] for what in all_commands}
        for command in all_commands.values():
            measure(command, directory)  # fills caches of files and of data
        for _ in range(args.rounds):
            for what, command in all_commands.items():
                costs[what].append(measure(command, directory))

    for what, pairs in costs.items():
        seconds = describe([wall for wall, _ in pairs])
        cpu_seconds = describe([cpu for _, cpu in pairs])
        print(f"{what:27} seconds {seconds}   CPU seconds {cpu_seconds}")


if __name__ == "__main__":
    main(tyro.cli(Args))
