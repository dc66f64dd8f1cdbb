"""OUT/report.html: the report of a run in one file, which loads nothing else.

It shows charts, generated answers, masks of training examples, how many rows of the data were used
or dropped, and the settings. report.html.jinja is the page's template; this module fills it from
the files of the run.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path

import jinja2

from minilora import distributed
from minilora.checkpoint.trainer_state import TrainerState
from minilora.config import Config, TrainConfig, flatten_config
from minilora.data.dataset import Documents
from minilora.data.tokenize import format_counts
from minilora.data.tokenizer import Tokenizer
from minilora.tracking.charts import MAX_POINTS, charts, is_finite, mark_epoch_ends
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

UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Characters that HTML or UTF-8 cannot represent."""


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
        self.template = _load_template()

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
            page = UNPRINTABLE.sub(_printable, self._page())
            temporary.write_text(page, encoding="utf-8", newline="\n")
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

        return self.template.render(
            name=self.out.resolve().name,
            last=last_values,
            best=best_evaluation(rows, metric, self.first_eval_step),
            charts=charts(rows),
            epoch_ends=mark_epoch_ends(rows),
            overfitting=find_overfitting(rows, self.first_eval_step),
            samples=sorted(samples, key=lambda sample: -sample["step"]),
            torn=num_torn_rows + num_torn_samples,
            examples=self.examples,
            tables=self.tables,
            config=config,
            defaults=defaults,
            written=datetime.now(UTC),
        )


def _load_template() -> jinja2.Template:
    """Compile report.html.jinja with its functions. Every value that it shows is escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["sha256"] = _sha256_base64
    environment.globals["format_number"] = format_number
    environment.globals["to_json"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals.update(TEMPLATE_LIMITS)
    source = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source)


def _sha256_base64(text: str) -> str:
    """Hash a script for the page's Content-Security-Policy."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _printable(match: re.Match) -> str:
    """Return a character to show in place of an unprintable one."""
    char = match[0]
    if char < " ":
        return chr(0x2400 + ord(char))  # Unicode's pictures of control characters
    return "\ufffd"


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


def format_number(value: float) -> str:
    """Format a number for a reader: five digits, or whole thousands with commas."""
    if not is_finite(value):
        return str(value)
    if 1e4 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.5g}"
