"""Where a run's numbers go: metrics.jsonl, samples.jsonl and report.html always, TensorBoard, wandb and the hub on request."""

import importlib.util
import json
import os
from pathlib import Path

import tqdm

from minilora import dist
from minilora.config import Config, UserError
from minilora.data import Documents
from minilora.running.settings import leaves
from minilora.tokenizer import Tokenizer
from minilora.tracking.hub import HubPush
from minilora.tracking.report import Report

FAILED_UPLOAD = 15  # seconds to wait for an upload when a run fails


def prepare(config: Config) -> HubPush | None:
    """Refuse trackers that cannot work, before anything is written; on the first process returns what uploads checkpoints, if
    that is asked for. Raises UserError."""
    if dist.rank() > 0:
        return None
    if config.log.wandb:
        if importlib.util.find_spec("wandb") is None:
            raise UserError("log.wandb: wandb is not installed (pip install 'minilora[track]')")
        import wandb

        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False, verify=False):
            raise UserError("log.wandb: there is no key: set WANDB_API_KEY (or `wandb login`), or WANDB_MODE=offline")
    return HubPush(config) if config.hub.push else None


class Tracker:
    """Writes on the first process, does nothing on the others. Steps are optimizer steps done."""

    def __init__(
        self, config: Config, out: Path, start_step: int, total_steps: int, sets: list[Documents], tokenizer: Tokenizer,
        hub: HubPush | None,
    ):  # fmt: skip
        """sets: what the report shows the counts of, and of the first the masks; hub: where checkpoints go."""
        self.active = dist.rank() == 0
        self.writers: list = []  # of a row of numbers
        self.tables: list = []  # writers of samples
        self.closers: list = []
        if not self.active:
            return
        self.out, self.hub = out, hub
        self.report = Report(out, sets, tokenizer, config.seed)
        for name in ("metrics.jsonl", "samples.jsonl"):
            _forget_after(out / name, start_step)
        if config.log.tensorboard:
            self._open_tensorboard(start_step)
        if config.log.wandb:
            self._open_wandb(config)
        self.bar = tqdm.tqdm(total=total_steps, initial=start_step, desc="training", unit=" steps", dynamic_ncols=True)

    def _open_tensorboard(self, start_step: int) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            dist.log("log.tensorboard: tensorboard is not installed (pip install 'minilora[track]'), metrics.jsonl only")
            return
        from torch.utils.tensorboard import SummaryWriter

        self.tensorboard = SummaryWriter(str(self.out / "runs"), purge_step=start_step + 1 if start_step else 0)
        self.writers.append(self._write_tensorboard)
        self.tables.append(lambda rows: self.tensorboard.add_text("samples", markdown(rows), rows[0]["step"]))
        self.closers.append(self.tensorboard.close)

    def _write_tensorboard(self, row: dict) -> None:
        for key, value in _scalars(row).items():
            self.tensorboard.add_scalar(key, value, row["step"])
        self.tensorboard.flush()

    def _open_wandb(self, config: Config) -> None:
        import wandb

        run = wandb.init(
            project=config.log.wandb_project, notes=config.log.wandb_notes, config=leaves(config), dir=str(self.out),
            id=_wandb_id(self.out), resume="allow",
        )  # fmt: skip
        self.writers.append(lambda row: run.log(_scalars(row), step=row["step"]))

        def write_table(rows: list[dict]) -> None:
            table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
            run.log({"samples": table}, step=rows[0]["step"])

        self.tables.append(write_table)
        self.closers.append(run.finish)

    def step(self) -> None:
        """One optimizer step is done."""
        if self.active:
            self.bar.update()

    def log(self, row: dict) -> None:
        """One event: an object of metrics.jsonl, scalars everywhere else."""
        if not self.active:
            return
        append(self.out / "metrics.jsonl", [row])
        for write in self.writers:
            write(row)
        if "loss" in row:
            self.bar.set_postfix(loss=f"{row['loss']:.4f}", tok_s=f"{row['tokens_per_second']:,.0f}", refresh=False)

    def samples(self, rows: list[dict]) -> None:
        """Answers of one evaluation."""
        if self.active:
            append(self.out / "samples.jsonl", rows)
            for write in self.tables:
                write(rows)

    def evaluated(self) -> None:
        """An evaluation is complete: the report shows it."""
        if self.active:
            self.report.write()

    def saved(self, position: dict, name: str) -> None:
        """A checkpoint is there."""
        self.log(position | {"checkpoint": name})
        if self.active and self.hub is not None:
            self.hub.push(self.out / name, position["step"], f"step {position['step']}, epoch {position['epoch']:.4g}")

    def close(self, patience: float) -> None:
        """The run ends; patience: seconds to wait for an upload that is under way."""
        if self.active:
            self.bar.close()
            self.report.write()
            for close in self.closers:
                close()
            if self.hub is not None:
                self.hub.close(patience)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None:  # the run fails: what is known is shown, and an upload gets a moment
            self.close(FAILED_UPLOAD)


def append(path: Path, rows: list[dict]) -> None:
    """Add JSON lines, on disk when this returns from the file's close."""
    with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:  # a lone surrogate becomes JSON's escape
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _forget_after(path: Path, step: int) -> None:
    """A resumed run writes again what came after its checkpoint: drop those lines, and a torn last one."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:  # not splitlines: JSON may hold U+2028
        try:
            if 0 <= json.loads(line)["step"] <= step > 0:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def markdown(rows: list[dict]) -> str:
    """Samples as a table, for TensorBoard."""

    def cell(value: object) -> str:  # nothing of it is taken for markdown or HTML
        lines = str(value).splitlines() or [""]
        return "<br>".join("".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in line) for line in lines)

    lines = [list(rows[0]), ["---"] * len(rows[0]), *(map(cell, row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _scalars(row: dict) -> dict[str, float]:
    return {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}


def _wandb_id(out: Path) -> str:
    """The same id for a run and its continuation."""
    file = out / "wandb_id"
    if not file.is_file():
        file.write_text(os.urandom(4).hex(), encoding="utf-8")
    return file.read_text(encoding="utf-8")
