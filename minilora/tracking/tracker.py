"""The tracker: the training loop reports every event of a run to this one object.

It passes the events on to metrics.jsonl, samples.jsonl, the report and the progress bar, and on
request to TensorBoard, Weights & Biases and the Hugging Face hub.
"""

import importlib.util
import os
from pathlib import Path

from minilora import distributed
from minilora.config import Config
from minilora.data.dataset import Documents
from minilora.data.tokenizer import Tokenizer
from minilora.errors import UserError
from minilora.tracking.hub_upload import HubUploader
from minilora.tracking.report import Report
from minilora.tracking.writers import (
    JsonLinesWriter,
    ProgressBar,
    TensorBoardWriter,
    WandbWriter,
    Writer,
)
from minilora.training.evaluate import Evaluation

FAILED_RUN_PATIENCE = 15  # seconds to wait for an upload when a run fails


def check_trackers(config: Config) -> HubUploader | None:
    """Check that the trackers asked for can work, and open the uploader to the hub.

    The uploader may create the repository on the hub. Nothing is written to the output directory.

    Returns:
        The uploader of checkpoints on rank 0 if hub.push is set, else None.

    Raises:
        UserError: wandb is not installed or has no key, or the hub refuses to be written to.
    """
    if distributed.rank() > 0:
        return None
    if config.log.wandb:
        _check_wandb()
    return HubUploader(config) if config.hub.push else None


def _check_wandb() -> None:
    """Raise UserError if wandb is not installed, or has no key and is not offline."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError("log.wandb: wandb is not installed (pip install 'minilora[track]')")
    import wandb

    is_online = os.environ.get("WANDB_MODE", "online") == "online"
    if is_online and not wandb.login(prompt=False, verify=False):
        remedy = "set WANDB_API_KEY (or `wandb login`), or WANDB_MODE=offline"
        raise UserError(f"log.wandb: there is no key: {remedy}")


class Tracker:
    """Passes the events of a run on; does nothing on ranks other than 0.

    As a context manager it is closed if an exception leaves the `with` block; a run that ends
    without one calls `close` itself.
    """

    def __init__(
        self,
        config: Config,
        start_step: int,
        total_steps: int,
        sets: list[Documents],
        tokenizer: Tokenizer,
        uploader: HubUploader | None = None,
        first_eval_step: int = 0,
    ):
        """Open the files and trackers.

        Args:
            config: the run's settings; its output_dir exists.
            start_step: optimizer steps done so far; lines of later steps are removed from the
                files.
            total_steps: optimizer steps of the whole run.
            sets: documents whose counts the report shows, the training documents first.
            tokenizer: decodes the report's training examples.
            uploader: uploads the checkpoints; from `check_trackers`.
            first_eval_step: the report does not compare evaluations before this step with later
                ones.
        """
        self.out = Path(config.output_dir)
        self.uploader = uploader
        self.writers: list[Writer] = []
        if distributed.rank() > 0:
            return

        self.writers.append(Report(self.out, sets, tokenizer, config.seed, first_eval_step))
        self.writers.append(JsonLinesWriter(self.out, start_step))
        if config.log.tensorboard:
            if importlib.util.find_spec("tensorboard") is None:
                missing = "tensorboard is not installed (pip install 'minilora[track]')"
                distributed.log(f"log.tensorboard: {missing}, metrics.jsonl only")
            else:
                self.writers.append(TensorBoardWriter(self.out / "runs", start_step))
        if config.log.wandb:
            self.writers.append(WandbWriter(config))
        # opened last and closed first, so that no message of another writer is printed into the
        # bar's line
        self.writers.insert(0, ProgressBar(start_step, total_steps))

    def step(self) -> None:
        """Note that one optimizer step is done."""
        for writer in self.writers:
            writer.step()

    def log(self, row: dict) -> None:
        """Log one event: a line of metrics.jsonl, and scalars in the other trackers.

        Args:
            row: "step", "epoch", and the figures of the event.
        """
        for writer in self.writers:
            writer.log(row)

    def log_evaluation(self, position: dict, evaluation: Evaluation) -> None:
        """Log the losses, the answers and the scores of an evaluation.

        Args:
            position: "step" and "epoch".
            evaluation: what `training.evaluate.evaluate` returned.
        """
        for losses in evaluation.losses:
            self.log(position | losses)
        if evaluation.samples:
            rows = [position | sample for sample in evaluation.samples]
            for writer in self.writers:
                writer.log_samples(rows)
        if evaluation.scores is not None:
            self.log(position | evaluation.scores)
        for writer in self.writers:
            writer.evaluated()

    def saved(self, position: dict, name: str) -> None:
        """Log a new checkpoint, and upload it if that is asked for.

        Args:
            position: "step" and "epoch".
            name: of the checkpoint, a directory in the run's directory.
        """
        self.log(position | {"checkpoint": name})
        if self.uploader is not None:
            message = f"step {position['step']}, epoch {position['epoch']:.4g}"
            self.uploader.push(self.out / name, position["step"], message)

    def close(self, patience: float) -> None:
        """End the run's tracking.

        Args:
            patience: seconds to wait for uploads that are not done.
        """
        for writer in self.writers:
            writer.close()
        if self.uploader is not None:
            self.uploader.close(patience)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        """Close the tracker if the run fails: write the report, and wait briefly for uploads."""
        if kind is not None:
            self.close(FAILED_RUN_PATIENCE)
