"""Writers of the figures and sample answers of a run: files, trackers, the progress bar."""

import json
import os
from pathlib import Path

import tqdm

from minilora.config import Config, flatten_config
from minilora.files import replace_file


class Writer:
    """Base class with a method for each kind of event of a run.

    Here every method does nothing; a subclass overrides those for the events that it writes.
    """

    def step(self) -> None:
        """Handle the end of an optimizer step."""

    def log(self, row: dict) -> None:
        """Handle the figures of one event; row["step"] is the number of optimizer steps done."""

    def log_samples(self, rows: list[dict]) -> None:
        """Handle the answers of one evaluation, each with "step", "prompt", "generated" etc."""

    def evaluated(self) -> None:
        """Handle the end of an evaluation."""

    def close(self) -> None:
        """Handle the end of the run, or its failure."""


class ProgressBar(Writer):
    """The progress bar on stderr: steps done, the last loss, speed, memory."""

    def __init__(self, start_step: int, total_steps: int):
        """Show the bar, with `start_step` of `total_steps` steps done."""
        self.bar = tqdm.tqdm(
            total=total_steps,
            initial=start_step,
            desc="training",
            unit=" steps",
            dynamic_ncols=True,
        )

    def step(self) -> None:
        """Move the bar."""
        self.bar.update()

    def log(self, row: dict) -> None:
        """Show the figures of a log entry at the next update."""
        if "loss" not in row:
            return
        shown = {"loss": f"{row['loss']:.4f}", "tok_s": f"{row['tokens_per_second']:,.0f}"}
        if "share_of_peak" in row:
            shown["peak"] = f"{row['share_of_peak']:.0%}"
        if "peak_memory" in row:
            shown["mem"] = f"{row['peak_memory'] / 2**30:.1f}GiB"
        self.bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        """Leave the bar as it is, and end its line."""
        self.bar.close()


class JsonLinesWriter(Writer):
    """OUT/metrics.jsonl and OUT/samples.jsonl."""

    def __init__(self, out: Path, start_step: int):
        """Remove the lines that an earlier process wrote after the step this run starts from."""
        self.metrics_file = out / "metrics.jsonl"
        self.samples_file = out / "samples.jsonl"
        _drop_lines_after(self.metrics_file, start_step)
        _drop_lines_after(self.samples_file, start_step)

    def log(self, row: dict) -> None:
        """Append an event."""
        append_json_lines(self.metrics_file, [row])

    def log_samples(self, rows: list[dict]) -> None:
        """Append the answers of one evaluation."""
        append_json_lines(self.samples_file, rows)


class TensorBoardWriter(Writer):
    """TensorBoard's event files in a directory."""

    def __init__(self, directory: Path, start_step: int):
        """Open a new file; TensorBoard hides the events after `start_step` in older files."""
        from torch.utils.tensorboard import SummaryWriter

        first_step = start_step + 1 if start_step > 0 else 0
        self.writer = SummaryWriter(str(directory), purge_step=first_step)

    def log(self, row: dict) -> None:
        """Write every number as a scalar."""
        for key, value in _scalars(row).items():
            self.writer.add_scalar(key, value, row["step"])
        self.writer.flush()

    def log_samples(self, rows: list[dict]) -> None:
        """Write the answers as a text summary that is shown as a table."""
        self.writer.add_text("samples", markdown_table(rows), rows[0]["step"])

    def close(self) -> None:
        """Close the event file."""
        self.writer.close()


class WandbWriter(Writer):
    """A run of Weights & Biases, with the config and all metrics."""

    def __init__(self, config: Config):
        """Start the run, or continue it if it was started in the same output directory."""
        import wandb

        out = Path(config.output_dir)
        self.run = wandb.init(
            project=config.log.wandb_project,
            notes=config.log.wandb_notes,
            config=flatten_config(config),
            dir=str(out),
            id=_wandb_id(out),
            resume="allow",
        )

    def log(self, row: dict) -> None:
        """Log every number."""
        self.run.log(_scalars(row), step=row["step"])

    def log_samples(self, rows: list[dict]) -> None:
        """Log the answers as a table."""
        import wandb

        cells = [list(row.values()) for row in rows]
        table = wandb.Table(columns=list(rows[0]), data=cells)
        self.run.log({"samples": table}, step=rows[0]["step"])

    def close(self) -> None:
        """Finish the run, which waits until everything is uploaded."""
        self.run.finish()


def append_json_lines(path: Path, rows: list[dict]) -> None:
    """Append rows as lines of JSON, and close the file."""
    # backslashreplace writes a lone surrogate, which UTF-8 cannot hold, as JSON's own escape
    with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _drop_lines_after(path: Path, step: int) -> None:
    """Remove the lines that a resumed run will write again, and a last line cut short by a kill.

    Args:
        path: a JSONL file of events, if it exists.
        step: the step the run starts from; lines of later steps are removed, and all of them if
            it is 0.
    """
    if not path.is_file():
        return
    kept = []
    # every complete line ends in a newline, so the last part is empty or cut short. splitlines
    # would also split at U+2028, which JSON may hold
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    for line in lines:
        try:
            line_step = json.loads(line)["step"]
        except (ValueError, KeyError):
            continue
        if step > 0 and 0 <= line_step <= step:
            kept.append(line + "\n")
    replace_file(path, "".join(kept))


def markdown_table(rows: list[dict]) -> str:
    """Format sample answers as a markdown table, for TensorBoard.

    Args:
        rows: at least one; all have the keys of the first.
    """
    columns = list(rows[0])
    table = [columns, ["---"] * len(columns)]
    table += [[_markdown_cell(value) for value in row.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


def _markdown_cell(value: object) -> str:
    """Escape a value so that nothing of it is taken for markdown or HTML."""
    lines = str(value).splitlines() or [""]
    return "<br>".join("".join(_escape(char) for char in line) for line in lines)


def _escape(char: str) -> str:
    """Return a letter, digit or space as it is, and any other character as an HTML reference."""
    return char if char.isalnum() or char == " " else f"&#{ord(char)};"


def _scalars(row: dict) -> dict[str, float]:
    """Return the numbers of an event, apart from its step."""
    numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
    numbers.pop("step", None)
    return numbers


def _wandb_id(out: Path) -> str:
    """Return the id of the run in a directory; the first call draws and stores it."""
    file = out / "wandb_id"
    if not file.is_file():
        file.write_text(os.urandom(4).hex(), encoding="utf-8")
    return file.read_text(encoding="utf-8")
