"""The two kinds of failure that a script reports as one message, without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """The user's input is wrong. The scripts print the message and exit with code 2."""


class RunError(Exception):
    """A run cannot go on although its input is right (a full disk, a loss that is not finite).

    The scripts print the message and exit with code 1.
    """


def require(condition: object, message: str) -> None:
    """Raise UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'X'?` for the known name closest to `name`, or an empty string."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""
