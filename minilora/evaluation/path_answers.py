"""Answers that are category paths: their graph, and the light metric `graph`.

The metric is that of infer.py and of training. It compares names literally and needs no embedder;
ontology.py has the metrics of OLLM.
"""

from collections.abc import Iterable, Sequence, Set

from minilora.errors import UserError
from minilora.evaluation.category_graph import (
    DiGraph,
    Figures,
    graph_of_paths,
    names_of_line,
    parse_paths,
)


def score(answers: Sequence[str], references: Sequence[str]) -> Figures:
    """Compare the graph of the answers' paths with the graph of the references' paths.

    Args:
        answers: generated texts, one path per line. A line counts if it begins as some path of some
            reference does.
        references: the reference of each answer.

    Returns:
        The figures of `read_answers` and of `compare_literally`.

    Raises:
        UserError: a reference has a line that is not a path.
    """
    roots = roots_of(references)
    graph, counts = read_answers(answers, roots)
    reference, _ = read_answers(references, roots)
    return counts | compare_literally(graph, reference)


def roots_of(references: Sequence[str]) -> set[str]:
    """Return the names that the references' paths begin with.

    A line of a reference, unlike one of an answer, may be the root alone.

    Raises:
        UserError: a line has a blank name.
    """
    roots = set()
    for row, text in enumerate(references, start=1):
        for names in _lines_of_names(text):
            if not all(names):
                place = f"reference {row} of {len(references)}"
                raise UserError(f"graph: {place}: a name is blank in a line of {text[:200]!r}")
            roots.add(names[0])
    return roots


def roots_of_text(text: str) -> set[str]:
    """Return the first name of each line that is not blank."""
    return {names[0] for names in _lines_of_names(text)}


def _lines_of_names(text: str) -> list[list[str]]:
    """Return the names of each line that is not blank, well formed or not."""
    return [names_of_line(line) for line in text.split("\n") if line.strip()]


def only_root(roots: Iterable[str]) -> str | None:
    """Return the root if there is just one, else None."""
    found = list(roots)
    return found[0] if len(found) == 1 else None


def read_answers(answers: Sequence[str], roots: Set[str]) -> tuple[DiGraph, Figures]:
    """Build the graph of the answers' paths, and count their lines.

    Args:
        answers: texts, one path per line.
        roots: the names that a path may begin with.

    Returns:
        The graph (see `graph_of_paths`), and the figures "lines" (number of lines of all answers
        that are not blank) and "well_formed" (the share of them that are paths of two names or
        more from a root, 0 .. 1).
    """
    parsed = [parse_paths(text, roots) for text in answers]
    graph = graph_of_paths([text.paths for text in parsed], only_root(roots))
    num_lines = sum(text.num_lines for text in parsed)
    num_paths = sum(len(text.paths) for text in parsed)
    return graph, {"lines": num_lines, "well_formed": num_paths / max(num_lines, 1)}


def compare_literally(graph: DiGraph, reference: DiGraph) -> Figures:
    """Count a graph's nodes and edges ("nodes", "edges"), and add those of `literal_figures`."""
    return {**count_graph(graph), **literal_figures(graph, reference)}


def literal_figures(predicted: DiGraph, reference: DiGraph) -> Figures:
    """Compute precision, recall and F1 of edges and of nodes, matched by exact names, 0 .. 1.

    The F1 of edges is OLLM's Literal F1. If only one of the graphs has edges, the figures of edges
    are 0; if neither has any, they are 1. The same holds for nodes.
    """
    return {
        **_overlap("edge", predicted.edges, reference.edges),
        **_overlap("node", predicted.nodes, reference.nodes),
    }


def _overlap(what: str, predicted: Set, reference: Set) -> Figures:
    """Compute precision, recall and F1 of two sets; `what` begins the keys of the figures."""
    if predicted or reference:
        common = sum(1 for item in predicted if item in reference)
        precision = common / max(len(predicted), 1)
        recall = common / max(len(reference), 1)
        f1 = 2 * common / (len(predicted) + len(reference))
    else:
        precision = recall = f1 = 1.0
    return {f"{what}_precision": precision, f"{what}_recall": recall, f"{what}_f1": f1}


def count_graph(graph: DiGraph) -> Figures:
    """Return a graph's size: "nodes" and "edges"."""
    return {"nodes": len(graph), "edges": len(graph.edges)}
