"""The best one-to-one assignment between two lists, by a similarity."""

from collections.abc import Callable

import numpy as np

MAX_COST = 20_000**3
"""Largest cost n^2 m of an assignment, n <= m, that is computed: OLLM's limit."""

SLOW_COST = 10**11
"""From this cost on it is said before that an assignment takes long."""

MAX_BYTES = 8 * 2**30
"""Largest matrix of an assignment that is computed."""

BLOCK_ROWS = 1024
"""Rows of similarities that are computed together."""


def is_affordable(shape: tuple[int, int]) -> bool:
    """Return whether an assignment is small enough to be computed.

    Time grows with n^2 m. With sentence embeddings two lists of 2,000 take a second, two of 14,000
    minutes.

    Args:
        shape: the lengths of the two lists.
    """
    return _cost(shape) <= MAX_COST and _num_bytes(shape) <= MAX_BYTES


def cost_note(figure: str, items: str, shape: tuple[int, int]) -> str | None:
    """Say that an assignment costs too much, or that it takes long; None: it does neither.

    Args:
        figure: what needs the assignment.
        items: what is assigned.
        shape: the lengths of the two lists.
    """
    cost, num_bytes = _cost(shape), _num_bytes(shape)
    assigning = f"to assign {shape[0]:,} to {shape[1]:,} {items}"
    if cost > MAX_COST:
        return (
            f"{figure} is left out: {assigning} costs up to n²m = {cost:.2g} steps, and the limit "
            f"is {MAX_COST:.2g}: prune the larger graph"
        )
    if num_bytes > MAX_BYTES:
        return (
            f"{figure} is left out: {assigning} takes {num_bytes / 2**30:,.1f} GiB of memory, and "
            f"the limit is {MAX_BYTES / 2**30:,.1f} GiB: prune the larger graph"
        )
    if cost > SLOW_COST:
        return f"{figure}: {assigning} may take minutes (n²m = {cost:.2g} steps)"
    return None


def _cost(shape: tuple[int, int]) -> int:
    """Return n^2 m, n <= m, which time grows with."""
    n, m = sorted(shape)
    return n**2 * m


def _num_bytes(shape: tuple[int, int]) -> int:
    """Return the size of the matrix of similarities, float64 [n, m]."""
    return 8 * shape[0] * shape[1]


def best_assignment(similarities: Callable[[slice], np.ndarray], shape: tuple[int, int]) -> float:
    """Return the largest possible sum of similarities if each item is assigned at most once.

    Pairs with the highest similarity cannot be taken first, not even identical items: with vectors
    in a plane, 0° and 30° in one list, 0° and -30° in the other, and cosines, the identical pair
    leaves cos 60° and sums to 1.5, while crossing over gives twice cos 30°, 1.73. So the whole
    problem is solved, by the method of shortest augmenting paths (scipy's).

    Args:
        similarities: returns the given rows of the matrix of similarities.
        shape: of that matrix, [n, m]. It takes 8 n m bytes.
    """
    from scipy.optimize import linear_sum_assignment

    num_rows, num_columns = shape
    # scipy minimises costs, and copies a matrix that is not float64 or has more rows than columns
    costs = np.empty((min(shape), max(shape)))
    by_row = costs if num_rows <= num_columns else costs.T  # [n, m]
    for start in range(0, num_rows, BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        by_row[rows] = -similarities(rows)
    return float(-costs[linear_sum_assignment(costs)].sum())
