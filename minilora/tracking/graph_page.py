"""The page of a graph of categories: its edges as a tree, in one HTML file that loads nothing."""

from collections import Counter
from pathlib import Path

from minilora.data.example import Edge
from minilora.evaluation.category_graph import DiGraph, root_title, title_of
from minilora.files import replace_file
from minilora.tracking.graph_tree import make_tree
from minilora.tracking.html_pages import load_template, render_page


def write_graph_page(
    predicted: DiGraph, reference: DiGraph | None, path: str | Path, title: str
) -> None:
    """Write the page of a graph. If that fails, an older file stays as it was.

    Edges are compared by the titles of their nodes, so nodes of one title are one node.

    Args:
        predicted: the graph; an edge's "weight" is the number of texts that hold it.
        reference: the graph that is right; None if there is none.
        path: of the file.
        title: of the page.
    """
    weights = _weights_by_title(predicted)
    right_edges = None if reference is None else _weights_by_title(reference).keys()
    graphs = [graph for graph in (reference, predicted) if graph is not None]
    root = next((root_title(graph) for graph in graphs if "root" in graph.graph), None)
    tree = make_tree(weights, right_edges, root)
    template = load_template("graph_page.html.jinja")
    replace_file(Path(path), render_page(template, title=title, tree=tree))


def _weights_by_title(graph: DiGraph) -> Counter[Edge]:
    """Return the weight of each edge by the titles of its nodes."""
    weights: Counter[Edge] = Counter()
    for parent, child, weight in graph.edges(data="weight", default=1):
        weights[title_of(graph, parent), title_of(graph, child)] += weight
    return weights
