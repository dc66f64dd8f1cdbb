"""Jobs of bench/ontology.py: commands that run several at a time, and that are not repeated."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOG_LINES_SHOWN = 15  # of a job that failed


@dataclass(frozen=True)
class Job:
    """A command that writes one output."""

    name: str
    arguments: list[str]
    """Of Python: a script at the root of the repository, and its flags."""
    output: Path
    """There once the job has finished."""
    rows: Path | None = None
    """A file whose every row the output answers: with fewer rows than it, the output is
    unfinished."""

    def is_done(self) -> bool:
        """Return whether the whole output is there."""
        if self.rows is None or not self.output.exists():
            return self.output.exists()
        return _count_rows(self.output) >= _count_rows(self.rows)


def run_jobs(stage: str, jobs: Sequence[Job], at_a_time: int, logs: Path) -> None:
    """Run the jobs that are not done, each with one thread, and print what happens.

    Args:
        stage: what the jobs are, for messages.
        jobs: each of them can be run again if it was stopped.
        at_a_time: how many run at once.
        logs: directory for what the commands print, a file each.

    Raises:
        SystemExit: a job failed; the message has the end of its log.
    """
    todo = [job for job in jobs if not job.is_done()]
    print(f"-- {stage}: {len(jobs) - len(todo)} of {len(jobs)} were done before", flush=True)
    logs.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(at_a_time) as pool:
        futures = {pool.submit(_run, job, logs / f"{job.name}.log"): job for job in todo}
        for num_done, future in enumerate(as_completed(futures), start=1):
            try:
                minutes = future.result() / 60
            except BaseException:
                pool.shutdown(cancel_futures=True)  # the jobs that run are waited for
                raise
            name = futures[future].name
            print(f"   {num_done} of {len(todo)} done: {name}, {minutes:.1f} min", flush=True)


def _run(job: Job, log: Path) -> float:
    """Run a job and return its seconds. Raises SystemExit if it fails."""
    command = [sys.executable, *job.arguments]
    sys.stdout.write(f"$ {shlex.join(command)}\n")  # at once: other threads print, too
    sys.stdout.flush()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
    if done.returncode != 0 or not job.is_done():
        lines = log.read_text(encoding="utf-8").splitlines()[-LOG_LINES_SHOWN:]
        raise SystemExit(
            f"error: {job.name}: exit code {done.returncode}; the same command goes on. "
            f"The end of {log}:\n" + "\n".join(line.split("\r")[-1] for line in lines)
        )
    return time.monotonic() - start


def _count_rows(path: Path) -> int:
    """Return the number of lines of a JSONL file that are not blank."""
    return sum(1 for line in path.read_bytes().split(b"\n") if line.strip())
