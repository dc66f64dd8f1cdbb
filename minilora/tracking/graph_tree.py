"""A graph of categories as an indented tree, compared with a reference graph.

The report shows the paths of a model's answers with it, and `graph_page.py` whole graphs.
graph_tree.html.jinja draws the tree.

An edge u -> v is the line v below a line u. A graph is more than a tree, since a node may have
several parents and edges may form cycles. Such a node has a line below each of its parents, but
its own children are listed below one of these lines only, and the other lines say where. So every
edge has exactly one line, and a cycle ends.
"""

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import pairwise

from minilora.data.example import Edge
from minilora.evaluation.category_graph import parse_paths

RIGHT, WRONG, MISSING = "right", "wrong", "missing"
"""The kinds of edges: in both graphs; not in the reference; in the reference alone."""
UNJUDGED = "unjudged"
"""The kind of every edge if there is no reference."""
START = "start"
"""The kind of the lines at the top, which are no edges."""

PREFERENCE = {RIGHT: 0, UNJUDGED: 0, WRONG: 1, MISSING: 2}
"""Below which of several parents the children of a node are listed; the lowest number wins."""

MAX_LINES = 1500
"""Lines of a tree; a page of them has less than a megabyte."""
MAX_CHILDREN = 40
"""Lines directly below a line, of a graph that has more than MAX_LINES edges."""
MAX_LEVELS = 20
"""Levels of a tree, as a browser and the template nest elements as deep."""
MAX_OPEN_LINES = 100
"""Levels are opened from the top as long as no more lines than this are visible."""


@dataclass
class TreeLine:
    """A line of the tree: a node below one of its parents."""

    title: str
    kind: str
    weight: float = 0
    """Of the edge from the parent in the predicted graph; 0 if it is not there."""
    level: int = 0
    """0 at the top."""
    children: list["TreeLine"] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    """How many children of each kind have no line, because there would be too many."""
    is_cycle: bool = False
    """One of the lines above this one is the same node."""
    listed_below: str | None = None
    """Another parent, below which the node's children are listed; "" for the top."""


@dataclass
class GraphTree:
    """What the template draws."""

    lines: list[TreeLine]
    """The lines at the top."""
    left_out: Counter[str]
    """Lines at the top that are left out, as `TreeLine.left_out`."""
    counts: Counter[str]
    """The number of edges of each kind in the two graphs."""
    num_shown: int
    """Edges that have a line. The others are left out, or lie below a line that is."""
    open_levels: int
    """Levels whose children are visible when the page is opened."""


LinesBelow = dict[str, list[TreeLine]]
"""The line of each edge by the edge's parent."""


@dataclass
class AnswersTree:
    """The graph of some answers' paths."""

    tree: GraphTree
    num_answers: int
    num_lines: int
    """Lines of all answers that are not blank."""
    num_malformed: int
    """How many of them are not paths from a root, and not in the tree."""


def answers_tree(answers: Sequence[str], targets: Iterable[str]) -> AnswersTree | None:
    """Compare the paths of answers with those of their targets.

    The weight of an edge is the number of answers that hold it. As for the figures of the metric
    `graph`, paths begin with a name that begins the path of some target.

    Returns:
        The tree, or None if no target has a path.
    """
    reference: set[Edge] = set()
    roots: Counter[str] = Counter()
    for text in targets:
        for path in parse_paths(text).paths:
            reference.update(pairwise(path))
            roots[path[0]] += 1
    if not reference:
        return None

    predicted: Counter[Edge] = Counter()
    num_lines = num_paths = 0
    for text in answers:
        parsed = parse_paths(text, roots.keys())
        predicted.update({edge for path in parsed.paths for edge in pairwise(path)})
        num_lines += parsed.num_lines
        num_paths += len(parsed.paths)

    [(root, _)] = roots.most_common(1)
    tree = make_tree(predicted, reference, root)
    return AnswersTree(tree, len(answers), num_lines, num_lines - num_paths)


def make_tree(
    predicted: Mapping[Edge, float], reference: Set[Edge] | None, root: str | None
) -> GraphTree:
    """Arrange the edges of two graphs as a tree.

    Below each line the heaviest edges come first, and those of the reference alone last. If there
    are too many lines, the last ones of a long list and the lowest levels are left out.

    Args:
        predicted: the weight of each edge (parent's title, child's title).
        reference: the right edges; None if they are not known.
        root: the title that stands first at the top.
    """
    below = _lines_below(predicted, reference)
    homes = _find_homes(below, root)
    top = TreeLine("", START, level=-1)
    starts = [TreeLine(title, START) for title, home in homes.items() if home is None]

    counts = Counter(line.kind for lines in below.values() for line in lines)
    max_children = MAX_CHILDREN if counts.total() > MAX_LINES else MAX_LINES

    lines_of_level: Counter[int] = Counter()
    queue = deque([(top, starts)])
    while queue:
        line, children = queue.popleft()
        room = 0
        if line.level + 1 < MAX_LEVELS:
            room = MAX_LINES - lines_of_level.total()
        line.children = children[: min(room, max_children)]
        line.left_out = Counter(child.kind for child in children[len(line.children) :])
        for child in line.children:
            child.level = line.level + 1
            lines_of_level[child.level] += 1
            grandchildren = below.get(child.title, [])
            home = homes[child.title]
            if line is top or home == line.title:
                queue.append((child, grandchildren))
            elif _is_above(child.title, line.title, homes):
                child.is_cycle = True
            elif grandchildren:
                child.listed_below = home or ""

    return GraphTree(
        lines=top.children,
        left_out=top.left_out,
        counts=counts,
        num_shown=lines_of_level.total() - len(top.children),
        open_levels=_count_open_levels(lines_of_level),
    )


def _lines_below(predicted: Mapping[Edge, float], reference: Set[Edge] | None) -> LinesBelow:
    """Make a line of each edge of two graphs; the lines of a parent are in the tree's order."""
    below: LinesBelow = {}
    for (parent, child), weight in predicted.items():
        if reference is None:
            kind = UNJUDGED
        elif (parent, child) in reference:
            kind = RIGHT
        else:
            kind = WRONG
        below.setdefault(parent, []).append(TreeLine(child, kind, weight))
    for parent, child in reference or ():
        if (parent, child) not in predicted:
            below.setdefault(parent, []).append(TreeLine(child, MISSING))

    for lines in below.values():
        lines.sort(key=lambda line: (line.kind == MISSING, -line.weight, line.title))
    return below


def _find_homes(below: LinesBelow, root: str | None) -> dict[str, str | None]:
    """Choose the line below which the children of each node are listed.

    It is the line of the edge that ranks first among those that lead there from the nodes reached
    already: right ones, then wrong ones, then missing ones, the heaviest of each kind first.

    Returns:
        The parent of this line by the node's title, None for a line at the top. At the top are the
        root, the nodes without a parent, and one node of each cycle that none of them leads to.
    """
    with_parent = {line.title for lines in below.values() for line in lines}
    total_weights = {parent: sum(line.weight for line in below[parent]) for parent in below}

    def order(title: str) -> tuple:
        return title != root, title in with_parent, -total_weights[title], title

    homes: dict[str, str | None] = {}
    for start in sorted(below, key=order):
        if start in homes:
            continue
        # a heap of the edges (rank, child, parent) out of the nodes that are reached
        candidates: list[tuple] = [((0, 0), start, None)]
        while candidates:
            _, title, parent = heappop(candidates)
            if title in homes:
                continue
            homes[title] = parent
            for line in below.get(title, []):
                rank = (PREFERENCE[line.kind], -line.weight)
                heappush(candidates, (rank, line.title, title))
    return homes


def _is_above(title: str, line_title: str, homes: Mapping[str, str | None]) -> bool:
    """Return whether a node is the one of a line, or of the lines above that line."""
    above: str | None = line_title
    while above is not None and above != title:
        above = homes[above]
    return above == title


def _count_open_levels(lines_of_level: Mapping[int, int]) -> int:
    """Return how many levels are open: at least one, and about MAX_OPEN_LINES lines visible."""
    num_visible = 0
    for level in sorted(lines_of_level):
        num_visible += lines_of_level[level]
        if num_visible > MAX_OPEN_LINES:
            return max(1, level - 1)
    return len(lines_of_level)
