"""What a row of a data file becomes before it is tokenized: text with marked places.

Places are spans of characters, never positions of tokens, so they are right whatever way the
tokenizer splits the text.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

Span = tuple[int, int]  # characters [start, end) of a text
Edge = tuple[str, str]  # parent and child, neighbors on a category path (see paths.py)


class RowError(Exception):
    """A row cannot be used.

    Attributes:
        reason: groups the row with others in the table of dropped rows, e.g. "malformed".
    """

    def __init__(self, reason: str, message: str):
        """Make the error of a reason; `message` says what is wrong with which field."""
        super().__init__(message)
        self.reason = reason


class RewrittenTurnsError(RowError):
    """A chat template renders a turn differently when other turns follow it."""


@dataclass
class Example:
    """The text of one training document and the places in it that matter for the loss."""

    text: str
    supervised: list[Span]
    """The responses, each with the token that ends its turn."""
    nodes: list[Span] = field(default_factory=list)
    """Format paths: where node v is written, for each occurrence of an edge u -> v (paths.py)."""
    edges: list[Edge] = field(default_factory=list)
    """Format paths: the edge (u, v) of each of `nodes`."""
    prompt: str = ""
    """The part that data.too_long=truncate may shorten."""
    shorten: Callable[[int], "Example"] | None = None
    """Returns the same example with only the first N characters of the whole `prompt`, also when
    it is called again for another N; None if there is no prompt to shorten."""


def column_of(row: dict, key: str) -> object:
    """Return a column of a row. Raises RowError if there is no such column."""
    if key not in row:
        columns = ", ".join(map(repr, row)) or "no columns"
        raise RowError(
            "malformed",
            f'"{key}" is missing; the row has {columns} (data.format says what a row holds)',
        )
    return row[key]


def string_of(row: dict, key: str) -> str:
    """Return a column that holds a string. Raises RowError if it is missing or something else."""
    value = column_of(row, key)
    if not isinstance(value, str):
        raise RowError("malformed", f'"{key}": expected a string, got {type(value).__name__}')
    return value
