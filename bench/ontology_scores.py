"""Scores, tables and chart of bench/ontology.py.

Scores compare the graph of a method's answers with the reference graph of a split. A method is also
scored after pruning, with the thresholds that are best for its own answers to the evaluation split.
"""

import html
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from minilora.evaluation.category_graph import (
    DiGraph,
    build_graph,
    parse_paths,
    read_rooted_graph,
    root_title,
)
from minilora.evaluation.embedder import TitleEmbedder
from minilora.evaluation.ontology import OptionalFigures, compare_graphs
from minilora.evaluation.pruning import Thresholds, prune, search_thresholds
from minilora.generation.jobs import read_rows

CHOSEN_BY = "continuous_f1"
"""Thresholds and hyperparameters are those with the best value of this figure."""

SHOWN = {
    "literal_f1": "literal F1",
    "fuzzy_f1": "fuzzy F1",
    "continuous_f1": "continuous F1",
    "graph_f1": "graph F1",
    "motif_distance": "motif distance",
}
"""The figures of the paper's table, and how they are called there."""


class Predictions(NamedTuple):
    """What a method predicts: a graph for each split, or answers that are made into one."""

    method: str
    seed: int
    files: dict[str, Path]
    """For eval and test: answers (.jsonl), or a graph (.json)."""


@dataclass
class Score:
    """Figures of one method with one seed on the test split."""

    method: str
    seed: int
    counts: dict[str, int]
    """Lines of the answers, those of them that are paths from the root, edges, edges kept."""
    thresholds: Thresholds
    unpruned: OptionalFigures
    pruned: OptionalFigures


class Scorer:
    """Compares predictions with the reference graphs of a directory that prepare.py wrote."""

    def __init__(self, data: Path, embedder: TitleEmbedder):
        """Read the references.

        Args:
            data: holds eval_graph.json and test_graph.json.
            embedder: of titles.
        """
        self.embedder = embedder
        self.references = {s: read_rooted_graph(data / f"{s}_graph.json") for s in ("eval", "test")}
        self.root = root_title(self.references["test"])
        """The name that paths begin with."""

    def graph(self, path: Path) -> DiGraph:
        """Read a graph, or build that of a file of answers."""
        if path.suffix == ".json":
            return read_rooted_graph(path)
        return build_graph(read_answers(path), self.root)

    def best_thresholds(self, predicted: DiGraph) -> tuple[Thresholds, float]:
        """Return the thresholds that are best on the evaluation split, and the figure there."""

        def figure(pruned: DiGraph) -> float | None:
            reference = self.references["eval"]
            figures = compare_graphs(
                pruned, reference, self.embedder, ("continuous",), log_costs=False
            )
            return figures[CHOSEN_BY]

        return search_thresholds(predicted, figure, "paper", predicted.graph["root"])

    def score(self, predictions: Predictions) -> Score:
        """Score predictions on the test split; thresholds are of those on the evaluation split."""
        thresholds, _ = self.best_thresholds(self.graph(predictions.files["eval"]))
        path, reference = predictions.files["test"], self.references["test"]
        unpruned = self.graph(path)
        pruned = prune(unpruned, thresholds, unpruned.graph["root"])

        counts = {}
        if path.suffix == ".jsonl":
            counts = count_lines(read_answers(path), self.root)
        counts |= {"edges": len(unpruned.edges), "edges after pruning": len(pruned.edges)}
        return Score(
            predictions.method,
            predictions.seed,
            counts,
            thresholds,
            compare_graphs(unpruned, reference, self.embedder),
            compare_graphs(pruned, reference, self.embedder),
        )


def read_answers(path: Path) -> list[str]:
    """Return the texts of a file of answers."""
    return [row.values["generated"] for row in read_rows(path)]


def count_lines(answers: Sequence[str], root: str) -> dict[str, int]:
    """Count the lines of answers that are not blank, and those that are paths from the root."""
    parsed = [parse_paths(answer, {root}) for answer in answers]
    return {
        "lines": sum(text.num_lines for text in parsed),
        "valid lines": sum(len(text.paths) for text in parsed),
    }


# ---- tables


def methods_of(scores: Sequence[Score]) -> dict[str, list[Score]]:
    """Return the scores of each method, in order."""
    methods: dict[str, list[Score]] = {}
    for score in scores:
        methods.setdefault(score.method, []).append(score)
    return methods


def table(scores: Sequence[Score], figures_of: Callable[[Score], OptionalFigures]) -> str:
    """Return the table of the paper in Markdown: mean and standard deviation over seeds.

    Args:
        scores: of all methods.
        figures_of: which figures of a score: unpruned or pruned.
    """
    lines = [f"| | {' | '.join(SHOWN.values())} |", "|---" * (1 + len(SHOWN)) + "|"]
    for method, own in methods_of(scores).items():
        cells = [describe([figures_of(score)[name] for score in own]) for name in SHOWN]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def difference_table(before: Sequence[Score], after: Sequence[Score]) -> str:
    """Return in Markdown what one method gains over another, seed by seed, both pruned."""
    lines = ["| pruned | difference | better in |", "|---|---|---|"]
    for name, shown in SHOWN.items():
        pairs = [(a.pruned[name], b.pruned[name]) for a, b in zip(before, after, strict=True)]
        gains = [b - a for a, b in pairs if a is not None and b is not None]
        sign = -1 if name == "motif_distance" else 1
        num_better = sum(1 for gain in gains if sign * gain > 0)
        lines.append(f"| {shown} | {describe(gains, '+')} | {num_better} of {len(gains)} |")
    return "\n".join(lines)


def mean_and_spread(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Return mean and standard deviation over seeds; None if a value was not computed."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return statistics.mean(known), statistics.stdev(known) if len(known) > 1 else 0.0


def describe(values: Sequence[float | None], sign: str = "") -> str:
    """Return mean and standard deviation as text; the value alone if there is one."""
    found = mean_and_spread(values)
    if found is None:
        return "not computed"
    mean, spread = found
    return f"{mean:{sign}.3f} ± {spread:.3f}" if len(values) > 1 else f"{mean:{sign}.3f}"


def results(scores: Sequence[Score], choice: dict[str, Any]) -> dict[str, Any]:
    """Return everything that was measured, as JSON can hold it."""
    return {"choice": choice, "scores": [asdict(score) for score in scores]}


# ---- chart

WIDTH, LEFT, PANEL, AXIS = 900, 114, 156, 86
"""Of the chart in pixels: its width; where panels begin, their width, and that of their axes."""
TOP, ROW_HEIGHT, BOTTOM = 84, 40, 34
"""In pixels: the height above the rows, of a row, and below them."""
BLUE, ORANGE, GREY = "#0a6ea8", "#c05f00", "#777"


def draw_chart(scores: Sequence[Score], picture: Path) -> None:
    """Draw the figures of all methods into a PNG."""
    from docs.screenshot import find_browser, screenshot  # needs Pillow

    browser = find_browser()
    height = TOP + ROW_HEIGHT * len(methods_of(scores)) + BOTTOM
    with tempfile.TemporaryDirectory() as name:
        page = Path(name) / "chart.html"
        page.write_text(chart_page(scores, height), encoding="utf-8")
        screenshot(browser, page, picture.resolve(), WIDTH, height)


def chart_page(scores: Sequence[Score], height: int) -> str:
    """Return an HTML page with a panel for each figure, and in it a row for each method.

    A filled dot is the mean over seeds after pruning, with a line of one standard deviation to both
    sides; a ring is the mean without pruning.
    """
    methods = methods_of(scores)
    parts = []
    for i, method in enumerate(methods):
        y = row_middle(i)
        parts.append(f'<text x="12" y="{y + 5}">{html.escape(method)}</text>')
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 12}" y1="{y}" y2="{y}" stroke="#eee"/>')
    for i, (name, shown) in enumerate(SHOWN.items()):
        parts.append(chart_panel(LEFT + PANEL * i, name, shown, list(methods.values())))
    return f"""<!doctype html><meta charset="utf-8"><body style="margin:0;background:#fdfdfb">
<svg width="{WIDTH}" height="{height}" font-family="DejaVu Sans, sans-serif" font-size="13"
fill="#333">
<circle cx="18" cy="21" r="5" fill="{BLUE}"/>
<text x="30" y="26">pruned: mean over seeds, standard deviation</text>
<circle cx="368" cy="21" r="5" fill="{ORANGE}"/>
<text x="380" y="26">the best of a figure</text>
<circle cx="548" cy="21" r="4" fill="none" stroke="{GREY}"/>
<text x="560" y="26">not pruned</text>
{"".join(parts)}</svg>"""


def row_middle(i: int) -> int:
    """Return the height of the middle of a method's row."""
    return TOP + ROW_HEIGHT * i + ROW_HEIGHT // 2


def chart_panel(left: float, name: str, shown: str, methods: Sequence[Sequence[Score]]) -> str:
    """Draw one figure of all methods.

    Args:
        left: the panel's left edge.
        name: of the figure.
        shown: its title.
        methods: the scores of each.
    """
    pruned = [mean_and_spread([score.pruned[name] for score in own]) for own in methods]
    unpruned = [mean_and_spread([score.unpruned[name] for score in own]) for own in methods]
    ends = [mean + side * spread for mean, spread in filter(None, pruned) for side in (-1, 1)]
    ends += [mean for mean, _ in filter(None, unpruned)]
    low = max(math.floor(10 * min(ends, default=0.0)), 0) / 10  # the axis ends at tenths
    high = max(math.ceil(10 * max(ends, default=1.0)) / 10, low + 0.1)
    choose = min if name == "motif_distance" else max
    best = choose((mean for mean, _ in filter(None, pruned)), default=None)

    def x(value: float) -> float:
        return round(left + 6 + (AXIS - 12) * (max(value, low) - low) / (high - low), 1)

    bottom = TOP + ROW_HEIGHT * len(methods)
    direction = "lower is better" if name == "motif_distance" else "higher is better"
    parts = [
        f'<text x="{left}" y="56" font-weight="bold">{shown}</text>'
        f'<text x="{left}" y="72" font-size="11" fill="#666">{direction}</text>'
    ]
    for end in (low, high):
        parts.append(
            f'<line x1="{x(end)}" x2="{x(end)}" y1="{TOP}" y2="{bottom}" stroke="#ccc"/>'
            f'<text x="{x(end)}" y="{bottom + 16}" font-size="11" fill="#666"'
            f' text-anchor="middle">{end:.1f}</text>'
        )
    for i, (with_pruning, without) in enumerate(zip(pruned, unpruned, strict=True)):
        y = row_middle(i)
        if without is not None:
            parts.append(
                f'<circle cx="{x(without[0])}" cy="{y}" r="4" fill="none" stroke="{GREY}"/>'
            )
        if with_pruning is not None:
            mean, spread = with_pruning
            color = ORANGE if mean == best else BLUE
            parts.append(
                f'<line x1="{x(mean - spread)}" x2="{x(mean + spread)}" y1="{y}" y2="{y}"'
                f' stroke="{color}" stroke-width="2"/>'
                f'<circle cx="{x(mean)}" cy="{y}" r="5" fill="{color}"/>'
                f'<text class="value" x="{left + AXIS + 6}" y="{y + 5}" fill="{color}">'
                f"{mean:.3f}</text>"
            )
    return "".join(parts)
