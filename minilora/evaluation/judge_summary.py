"""The statistics of a judge's verdicts on all answers."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from minilora.evaluation.rubric import OVERALL, Rubric


class Summary(NamedTuple):
    """The statistics of a judge's verdicts on all answers."""

    stats: dict[str, dict[str, float]]
    """The statistics of each criterion and of OVERALL; see `summarize`."""
    failed: Counter[str]
    """For each reason, how many answers have no valid verdict because of it."""

    def table(self) -> str:
        """Format the statistics as a table with a line for each criterion, then the failures."""
        name_width = max(len(name) for name in self.stats)
        headings = "".join(f"{heading:>10}" for heading in self.stats[OVERALL])
        lines = [" " * name_width + headings]
        for name, stats in self.stats.items():
            cells = [f"{stats['n']:>10}"]
            cells += [f"{value:>10.3f}" for key, value in stats.items() if key != "n"]
            lines.append(f"{name:{name_width}}" + "".join(cells))
        for reason, count in self.failed.items():
            lines.append(f"{count} without a verdict (the same command asks again): {reason}")
        return "\n".join(lines)


def summarize(rows: list[dict], rubric: Rubric, failed: Counter[str]) -> Summary:
    """Compute the statistics of all verdicts.

    Args:
        rows: verdicts with "id" and "scores".
        rubric: its criteria give the order and the scales.
        failed: for each reason, how many answers have no verdict because of it.

    Returns:
        The statistics of `_statistics` for each criterion, in its own units, and for OVERALL: an
        answer's mean over all criteria, each scaled from min .. max to 0 .. 1.
    """
    criteria = rubric["criteria"]
    ids = [row["id"] for row in rows]
    stats = {}
    for criterion in criteria:
        name = criterion["name"]
        stats[name] = _statistics(ids, [row["scores"][name] for row in rows])

    overall = []
    for row in rows:
        scaled = []
        for criterion in criteria:
            score, low, high = row["scores"][criterion["name"]], criterion["min"], criterion["max"]
            scaled.append((score - low) / (high - low))
        overall.append(statistics.fmean(scaled))
    stats[OVERALL] = _statistics(ids, overall)
    return Summary(stats, failed)


def _statistics(ids: Iterable[str | int], values: list[float]) -> dict[str, float]:
    """Summarize scores.

    Args:
        ids: of each score, the id of the row it belongs to.
        values: the scores.

    Returns:
        "n", "mean", "sd" (standard deviation, over n - 1), "min" and "max". If some ids have
        several samples, also "sd in id": the standard deviation over an id's samples, averaged over
        these ids. A figure that needs more scores than there are is NaN.
    """
    stats: dict[str, float] = {"n": len(values)}
    stats["mean"] = statistics.fmean(values) if values else math.nan
    stats["sd"] = statistics.stdev(values) if len(values) > 1 else math.nan
    stats["min"] = min(values, default=math.nan)
    stats["max"] = max(values, default=math.nan)

    values_of_id: dict[str | int, list[float]] = {}
    for row_id, value in zip(ids, values, strict=True):
        values_of_id.setdefault(row_id, []).append(value)
    deviations = [statistics.stdev(group) for group in values_of_id.values() if len(group) > 1]
    if deviations:
        stats["sd in id"] = statistics.fmean(deviations)
    return stats
