"""OUT/report.html: a run in one file that opens anywhere. Charts, answers, masks, what became of the data, settings."""

import base64
import contextlib
import hashlib
import json
import math
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import jinja2

from minilora import dist
from minilora.config import Config, TrainConfig
from minilora.data import Documents
from minilora.running.directory import TrainerState
from minilora.running.reading import table
from minilora.running.settings import leaves
from minilora.tokenizer import Tokenizer
from minilora.tracking.preview import pieces

# what is shown at most: training examples, stretches of one, generated samples, characters of one text, points of a line;
# a line of MARKED or fewer points has a mark at each
LIMITS = {"EXAMPLES": 4, "PIECES": 200, "SAMPLES": 60, "CHARACTERS": 1500, "POINTS": 800, "MARKED": 40}
TITLES = {"loss": "Loss", "lr": "Learning rate", "grad_norm": "Gradient norm, before clipping",
          "tokens_per_second": "Tokens per second"}  # fmt: skip
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # no HTML, or no UTF-8, holds them

Points = list[tuple[int, float]]  # (step, value)


class Report:
    """The report of the run in `out`, for its first process alone. sets: the training documents, then evaluation sets."""

    def __init__(self, out: Path, sets: list[Documents], tokenizer: Tokenizer, seed: int):
        self.out, self.failed = out, False
        self.tables = [table(documents.counts) for documents in sets]
        self.examples = [pieces(sets[0], tokenizer, i, seed) for i in range(min(LIMITS["EXAMPLES"], len(sets[0])))]
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        environment.globals |= {**LIMITS, "number": number, "json": lambda value: json.dumps(value, ensure_ascii=False)}
        self.template = environment.from_string(Path(__file__).with_suffix(".html.jinja").read_text(encoding="utf-8"))

    def write(self) -> None:
        """Replace OUT/report.html by what the run's files say now. Never raises: what went wrong is logged, once."""
        temporary = self.out / ".tmp-report.html"
        try:
            page = UNPRINTABLE.sub(lambda m: chr(0x2400 + ord(m[0])) if m[0] < " " else "\ufffd", self._page())
            temporary.write_text(page, encoding="utf-8", newline="\n")
            os.replace(temporary, self.out / "report.html")
        except Exception as error:  # a by-product: no fault of the report, or in it, may end the run
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            if not self.failed:
                dist.log(f"{self.out / 'report.html'} could not be written ({type(error).__name__}: {error}); the run goes on")
            self.failed = True

    def _page(self) -> str:
        defaults = json.loads(json.dumps(leaves(Config())))  # tuples as the lists that config.json has for them
        config = json.loads((self.out / "config.json").read_text(encoding="utf-8"))
        rows, torn = read_rows(self.out / "metrics.jsonl")
        samples, torn_samples = read_rows(self.out / "samples.jsonl")
        return self.template.render(
            name=self.out.resolve().name, last={key: value for row in rows for key, value in row.items()},
            best=best(rows, config["train"].get("metric_for_best_model") or "loss"), charts=charts(rows),
            samples=sorted(samples, key=lambda row: -row["step"]), torn=torn + torn_samples, examples=self.examples,
            tables=self.tables, config=config, defaults=defaults, written=datetime.now(UTC),
        )  # fmt: skip


def read_rows(path: Path) -> tuple[list[dict], int]:
    """The events of a file, and how many of its lines are none (a last one that a kill tore)."""
    lines = [line for line in path.read_bytes().split(b"\n") if line] if path.is_file() else []
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    rows = [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]
    return rows, len(lines) - len(rows)


def best(rows: list[dict], metric: str) -> dict:
    """step, metric and value of the best evaluation, by the rule that keeps the best checkpoint."""
    state, evaluations = TrainerState(), dict[int, dict]()
    for row in rows:
        evaluations.setdefault(row["step"], {}).update({k: v for k, v in row.items() if k.startswith("eval/") and finite(v)})
    for state.step, figures in evaluations.items():
        if state.step:  # an evaluation before the first step has no checkpoint
            state.note_evaluation(figures, TrainConfig(metric_for_best_model=metric))
    return state.best


def charts(rows: list[dict]) -> list[dict]:
    """The loss of training and evaluations, the course of training, then each further figure of the evaluations."""
    figures: dict[str, dict[str, Points]] = {key: {"training": []} for key in TITLES}
    for row in rows:
        for key, value in row.items():
            name, _, figure = key.removeprefix("eval/").partition("/") if key.startswith("eval/") else ("training", "", key)
            if figure in TITLES or key.startswith("eval/"):
                figures.setdefault(figure or name, {}).setdefault(name, []).append((row["step"], value))
    last = max([1, *(row["step"] for row in rows)])
    names = list(dict.fromkeys(name for lines in figures.values() for name in lines))  # a set has one colour in all charts
    found = [(TITLES.get(f, f), lines) for f, lines in figures.items() if f == "loss" or any(lines.values())]
    return [chart(title, lines, last) | {"names": names} for title, lines in found]


def chart(title: str, lines: dict[str, Points], last: int) -> dict:
    """What the template draws: places in percent from the upper left, ticks, and what was changed or left out."""
    good = {name: [(step, value) for step, value in points if finite(value)] for name, points in lines.items()}
    values = [value for points in good.values() for _, value in points] or [0]
    positive = [value for value in values if value > 0]
    log = bool(positive) and min(values) >= 0 and max(positive) > 10 * median(positive)  # else most would lie on the floor
    ticks = log_ticks(min(positive), max(positive)) if log else linear_ticks(min(values), max(values))
    notes = [f"logarithmic axis: the largest value is {max(positive) / median(positive):,.0f} times the median"] if log else []
    notes += [f"{values.count(0):,} × 0 at the foot"] if log and 0 in values else []

    def up(value: float) -> float:
        low, high, at = (math.log10(max(v, ticks[0])) if log else v for v in (ticks[0], ticks[-1], value))
        return 100 * (high - at) / (high - low)

    drawn = {}
    for name, points in good.items():
        shown, lost = thin(points), len(lines[name]) - len(points)
        drawn[name] = [(100 * step / last, up(value), step, value) for step, value in shown]
        notes += [f"{name}: {len(points):,} points, drawn by the extremes of each stretch"] if len(shown) < len(points) else []
        notes += [f"{name}: {lost:,} not finite, left out"] if lost else []
    across = [(100 * tick / last, tick) for tick in linear_ticks(0, last) if tick <= last and tick == int(tick)]
    return {"title": title, "lines": drawn, "x": across, "y": [(up(tick), tick) for tick in ticks], "last": last, "notes": notes}


def thin(points: Points) -> Points:
    """At most LIMITS["POINTS"] points and two: first, last, and the smallest and largest of equal stretches."""
    if (size := math.ceil(2 * len(points) / LIMITS["POINTS"])) <= 2:
        return points
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = sorted(range(start, min(start + size, len(points))), key=lambda i: points[i][1])
        kept |= {stretch[0], stretch[-1]}
    return [points[i] for i in sorted(kept)]


def linear_ticks(low: float, high: float) -> list[float]:
    """Round numbers around low .. high, some five steps; from 0 if that is not far away."""
    low = 0 if 0 <= low < 0.5 * high else low
    if high - low <= 5e-4 * abs(high):  # a flat line, and what five digits cannot tell from one
        low, high = min(0.0, 1.25 * low), max(0.0, 1.25 * high) or float(low == 0)
    unit = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= (high - low) / 5.001)
    return [float(f"{i * step:.9g}") for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Ones, twos and fives around low .. high, 0 < low < high; if those are many, the ends and powers of ten between."""
    first, end = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = [m * 10.0**i for i in range(first - 1, end + 1) for m in (1, 2, 5)]
    low, high = max(tick for tick in every if tick <= low), min(tick for tick in every if tick >= high)
    ticks = [tick for tick in every if low <= tick <= high]
    tens = [10.0**i for i in range(first, end + 1) if 2.5 * low < 10.0**i < high / 2.5]
    return ticks if len(ticks) <= 7 else [low, *tens[:: math.ceil(len(tens) / 5)], high]


def finite(value: object) -> bool:
    return isinstance(value, int | float) and -1e300 < value < 1e300  # no NaN either


def number(value: float) -> str:
    return str(value) if not finite(value) else f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.5g}"
