"""OUT/report.html: the report of a run in one file, which loads nothing else.

It shows charts, generated answers, masks of training examples, how many rows of the data were used
or dropped, and the settings; in a run on category paths also the graph of the answers, and which
labels are dropped. report.html.jinja is the page's template; this module fills it from the files of
the run.
"""

import contextlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path

from minilora import distributed
from minilora.checkpoint.trainer_state import TrainerState
from minilora.config import Config, TrainConfig, flatten_config
from minilora.data.dataset import Documents
from minilora.data.tokenize import format_counts
from minilora.data.tokenizer import Tokenizer
from minilora.tracking.charts import MAX_POINTS, charts, is_finite, mark_epoch_ends
from minilora.tracking.graph_tree import AnswersTree, answers_tree
from minilora.tracking.html_pages import load_template, render_page
from minilora.tracking.keep_chart import keep_chart
from minilora.tracking.overfitting import find_overfitting
from minilora.tracking.preview import labelled_pieces
from minilora.tracking.writers import Writer
from minilora.training.early_stopping import update_best

MAX_EXAMPLES = 4
"""Training examples that are shown."""

TEMPLATE_LIMITS = {
    "MAX_PIECES": 200,  # pieces (see preview.py) of one training example
    "MAX_SAMPLES": 60,  # generated answers
    "MAX_CHARACTERS": 1500,  # characters of one text
    "MAX_POINTS": MAX_POINTS,  # points of a chart's line
    "MAX_CIRCLES": 40,  # points of a line that has a circle at each
}
"""How much of each thing the template shows."""


class Report(Writer):
    """The report of a run, rewritten after each evaluation and at the end; on rank 0 alone."""

    def __init__(
        self,
        out: Path,
        sets: list[Documents],
        tokenizer: Tokenizer,
        seed: int,
        first_eval_step: int = 0,
    ):
        """Prepare the parts that do not change during the run: data counts, examples, template.

        Args:
            out: the run's directory.
            sets: the training documents, then the documents of the other evaluation sets.
            tokenizer: turns ids back to text.
            seed: the run's seed.
            first_eval_step: `TrainerState.first_eval_step`.
        """
        self.out = out
        self.first_eval_step = first_eval_step
        self.has_failed = False
        self.tables = [format_counts(documents.counts) for documents in sets]
        self.examples = [
            labelled_pieces(sets[0], tokenizer, i, seed)
            for i in range(min(MAX_EXAMPLES, len(sets[0])))
        ]
        self.keep_chart = keep_chart(sets[0])
        self.has_path_answers = len(sets[-1].edges) > 0  # samples are of the last set
        self.template = load_template("report.html.jinja", **TEMPLATE_LIMITS)

    def evaluated(self) -> None:
        """Write the report: an evaluation is complete."""
        self.write()

    def close(self) -> None:
        """Write the report: the run ends."""
        self.write()

    def write(self) -> None:
        """Render OUT/report.html anew from the run's files.

        The report is a by-product, so no error in rendering or writing it may end the run: the
        first one is logged, and later ones are ignored.
        """
        path = self.out / "report.html"
        temporary = self.out / ".tmp-report.html"
        try:
            temporary.write_text(self._page(), encoding="utf-8", newline="\n")
            os.replace(temporary, path)
        except Exception as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            if not self.has_failed:
                reason = f"{type(error).__name__}: {error}"
                distributed.log(f"{path} could not be written ({reason}); the run goes on")
            self.has_failed = True

    def _page(self) -> str:
        """Render the page from config.json, metrics.jsonl and samples.jsonl."""
        config = json.loads((self.out / "config.json").read_text(encoding="utf-8"))
        rows, num_torn_rows = read_events(self.out / "metrics.jsonl")
        samples, num_torn_samples = read_events(self.out / "samples.jsonl")

        last_values: dict = {}
        for row in rows:
            last_values.update(row)
        metric = config["train"].get("metric_for_best_model") or "loss"
        # through JSON, to compare with config.json: it has lists where the settings are tuples
        defaults = json.loads(json.dumps(flatten_config(Config())))

        return render_page(
            self.template,
            name=self.out.resolve().name,
            last=last_values,
            best=best_evaluation(rows, metric, self.first_eval_step),
            charts=charts(rows),
            epoch_ends=mark_epoch_ends(rows),
            overfitting=find_overfitting(rows, self.first_eval_step),
            samples=sorted(samples, key=lambda sample: -sample["step"]),
            answers_tree=self._answers_tree(samples),
            torn=num_torn_rows + num_torn_samples,
            examples=self.examples,
            keep_chart=self.keep_chart,
            tables=self.tables,
            config=config,
            defaults=defaults,
            written=datetime.now(UTC),
        )

    def _answers_tree(self, samples: list[dict]) -> AnswersTree | None:
        """Compare the paths of the last step's answers with those of their targets."""
        if not self.has_path_answers or not samples:
            return None
        last_step = max(sample["step"] for sample in samples)
        rows = [sample for sample in samples if sample["step"] == last_step]
        answers = [str(row.get("generated", "")) for row in rows]
        return answers_tree(answers, [str(row.get("target", "")) for row in rows])


def read_events(path: Path) -> tuple[list[dict], int]:
    """Read the events of a JSONL file.

    Returns:
        The events, and the number of lines that are not events: a kill may have cut one short.
    """
    lines = []
    if path.is_file():
        lines = [line for line in path.read_bytes().split(b"\n") if line]

    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("step"), int):
            events.append(event)
    return events, len(lines) - len(events)


def best_evaluation(rows: list[dict], metric: str, first_eval_step: int = 0) -> dict:
    """Find the best evaluation by the rule that decides which checkpoint is kept as the best.

    Args:
        rows: the events of metrics.jsonl.
        metric: a figure as in `train.metric_for_best_model`.
        first_eval_step: leave out the evaluations before this step, which were made on other rows.

    Returns:
        Its "step", "metric" and "value"; an empty dict if there was no evaluation with the metric.
    """
    evaluations: dict[int, dict] = {}
    for row in rows:
        figures = evaluations.setdefault(row["step"], {})
        for key, value in row.items():
            if key.startswith("eval/") and is_finite(value):
                figures[key] = value

    state = TrainerState()
    train = TrainConfig(metric_for_best_model=metric)
    for step, figures in evaluations.items():
        # an evaluation before the first step has no checkpoint
        if step > 0 and step >= first_eval_step:
            state.step = step
            update_best(state, figures, train)
    return state.best
