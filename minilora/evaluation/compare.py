"""Comparison of two outputs over the same rows, such as those before and after training."""

import json
from collections.abc import Sequence
from pathlib import Path

from minilora import distributed
from minilora.data.example import RowError, string_of
from minilora.errors import UserError
from minilora.evaluation.category_graph import Figures
from minilora.evaluation.text import format_figure
from minilora.files import read_json_if_present
from minilora.generation.jobs import Key, read_rows, row_key

MODEL_FIGURES = ("loss", "ppl", "loss/rows")
"""The figures that need the model. Those of the other model are read from a file of figures."""


def read_other(path: str, answers: Sequence[dict]) -> tuple[list[dict], list[dict]]:
    """Read another output, and pair its rows with the rows here.

    Args:
        path: an earlier output over the same rows (OTHER.jsonl).
        answers: rows of the output here; of them only "id" and "sample" and the columns of the
            input are used.

    Returns:
        The rows of the other output and those of `answers` that have the same id and sample, in
        the order of `answers`; both lists are equally long.

    Raises:
        UserError: a row there has no answer, or is not the row here that has the same id; or there
            are no rows in common.
    """
    others = _read_by_key(path)
    pairs = []
    for row in answers:
        key = row_key(row)
        if key in others:
            number, other = others[key]
            _check_same_row(f"{path}:{number}", other, row)
            pairs.append((other, row))
    if not pairs:
        raise UserError(
            f"--compare: no row of {path} has the id of a row here: name an output over the same "
            "rows"
        )
    return [other for other, _ in pairs], [row for _, row in pairs]


def other_model_figures(path: str, here: Figures) -> Figures:
    """Return loss and perplexity of another output, if its file of figures has them.

    They are over all rows of its input. If those are not as many as here they cannot be compared,
    which is said, and they are left out.

    Args:
        path: the other output, OTHER.jsonl; the file is OTHER.metrics.json.
        here: the figures here; only those of MODEL_FIGURES that are among them are wanted.
    """
    if "loss/rows" not in here:
        return {}
    file = Path(path).with_name(Path(path).stem + ".metrics.json")
    there = read_json_if_present(file)
    if "loss/rows" not in there:
        distributed.log(f"--compare: {file} has no loss: ask there with --metrics loss ppl, too")
        return {}
    if there["loss/rows"] != here["loss/rows"]:
        distributed.log(
            f"--compare: the loss in {file} is over {there['loss/rows']} rows, and here over "
            f"{here['loss/rows']}: left out"
        )
        return {}
    return {name: there[name] for name in MODEL_FIGURES if name in here and name in there}


def compare_table(before: Figures, after: Figures, before_name: str, after_name: str) -> str:
    """Format the figures of two outputs as a table with their differences.

    Args:
        before: figures of one output.
        after: figures of the other output.
        before_name: heading of the first one's column.
        after_name: heading of the second one's column.

    Returns:
        A line for each figure with its two values and the difference, after minus before; "-" where
        there is nothing to show.
    """
    table = [["metric", before_name, after_name, "difference"]]
    for name in {**before, **after}:
        cells = [_cell(figures, name) for figures in (before, after)]
        difference = "-"
        if name in before and name in after:
            difference = format_figure(after[name] - before[name], sign="+")  # 0 is +0
        table.append([name, *cells, difference])

    widths = [max(len(line[column]) for line in table) for column in range(4)]
    lines = []
    for name, *cells in table:
        columns = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([f"{name:<{widths[0]}}", *columns]))
    return "\n".join(lines)


def _read_by_key(path: str) -> dict[Key, tuple[int, dict]]:
    """Read the rows of an output as {key: (line number, row)}. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"--compare: {path!r} does not exist")
    found: dict[Key, tuple[int, dict]] = {}
    for number, row in read_rows(path):
        try:
            string_of(row, "generated")
        except RowError as error:
            raise UserError(f"{path}:{number}: {error}") from error
        if not isinstance(row.get("id"), str | int) or row_key(row) in found:
            message = '"id": expected a string or an integer that no other row has'
            raise UserError(f"{path}:{number}: {message}")
        found[row_key(row)] = number, row
    return found


def _check_same_row(place: str, other: dict, row: dict) -> None:
    """Raise UserError if a column that both rows have is not the same in both."""
    for name in row.keys() & other.keys() - {"generated"}:
        # as JSON, in which NaN equals NaN
        if json.dumps(row[name]) != json.dumps(other[name]):
            raise UserError(
                f"{place}: {name!r} is not that of the row with id {row['id']!r} here: --compare "
                "needs an output over the same rows"
            )


def _cell(figures: Figures, name: str) -> str:
    """Format a figure, or return "-" if there is no such figure."""
    return format_figure(figures[name]) if name in figures else "-"
