"""From a graph of categories with pages to rows of the format paths, and to a reference graph."""

import random
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import networkx
from graph_files import distances_from

from minilora.evaluation.category_graph import DiGraph

Path = tuple[Hashable, ...]
"""Nodes from the root to a category."""
PageId = str | int


@dataclass(frozen=True)
class Limits:
    """Which paths of a page are found, and when the search for them ends."""

    cutoff: int
    """Edges of the longest paths, counted from the root to the page."""
    max_paths: int
    """Paths of one page."""
    max_steps: int
    """Edges that are followed upwards in search of the paths of one page."""


class PagePaths(NamedTuple):
    """The paths to the categories of a page."""

    paths: list[Path]
    cut_by: Literal["max_paths", "max_steps"] | None
    """The limit that ended the search before all paths were found."""


class PageRow(NamedTuple):
    """A page as a row of the format paths."""

    values: dict[str, Any]
    """id, title, abstract, paths (the titles of each)."""
    edges: set[tuple[Hashable, Hashable]]
    """The edges of its paths."""
    cut_by: Literal["max_paths", "max_steps"] | None
    """As in `PagePaths`."""


class Linearizer:
    """Writes the pages of a graph as rows, one at a time.

    It holds the graph, and a list of the categories of each page.
    """

    def __init__(self, graph: DiGraph, limits: Limits):
        """Collect the pages that a path within the limits leads to, and count the others."""
        self.graph = graph
        self.limits = limits
        root = graph.graph["root"]
        self.distances = distances_from(graph, root, limits.cutoff - 1)
        self.pages: dict[PageId, dict[str, Any]] = {}
        self.categories: dict[PageId, list[Hashable]] = {}
        pages_of_root: set[PageId] = set()
        pages_too_deep: set[PageId] = set()
        for node in graph:
            # a page that a category lists twice is in it once
            pages_of_node = {page["id"]: page for page in graph.nodes[node]["pages"]}
            if node == root:
                pages_of_root |= pages_of_node.keys()
                continue
            if node not in self.distances:
                pages_too_deep |= pages_of_node.keys()
                continue
            for key, page in pages_of_node.items():
                self.pages[key] = page
                self.categories.setdefault(key, []).append(node)
        self.num_too_deep = len(pages_too_deep - self.pages.keys())
        """Pages whose categories are all too far from the root."""
        self.num_in_root_alone = len(pages_of_root - pages_too_deep - self.pages.keys())
        """Pages that are in no category below the root, so that no path can be written."""

    def rows(self, seed: str, shuffle_paths: bool) -> Iterator[PageRow]:
        """Yield a row of each page in random order.

        It has no path if the search ended by `max_steps` before it found one.

        Args:
            seed: of the order of the rows, and of the paths within each.
            shuffle_paths: whether the paths of a row are in random order. Otherwise they are in the
                order in which they are found: category by category.
        """
        keys = list(self.pages)
        random.Random(seed).shuffle(keys)
        for key in keys:
            paths, cut_by = find_paths(
                self.graph, self.categories[key], self.distances, self.limits
            )
            if shuffle_paths:
                random.Random(f"{seed} {key}").shuffle(paths)
            titles = [[self.graph.nodes[node]["title"] for node in path] for path in paths]
            page = {name: self.pages[key][name] for name in ("id", "title", "abstract")}
            edges = {edge for path in paths for edge in pairwise(path)}
            yield PageRow({**page, "paths": titles}, edges, cut_by)


def find_paths(
    graph: DiGraph,
    categories: Sequence[Hashable],
    distances: dict[Hashable, int],
    limits: Limits,
) -> PagePaths:
    """Find all simple paths from the root to the categories of a page.

    The search goes from a category upwards, and only by nodes that are near enough to the root: so
    few steps are wasted, and memory is small, also in a dense graph.

    Args:
        graph: with the attribute "root".
        categories: other nodes than the root, within `distances`.
        distances: of the root to each node within `limits.cutoff - 1` edges.
        limits: of the search.
    """
    root = graph.graph["root"]
    paths: list[Path] = []
    num_steps = 0
    for category in categories:
        stack: list[Path] = [(category,)]  # ends of paths, which lack the way to the root
        while stack:
            path = stack.pop()
            edges_left = limits.cutoff - len(path)  # one of them is that to the page
            for parent in graph.predecessors(path[0]):
                if num_steps == limits.max_steps:
                    return PagePaths(paths, "max_steps")
                num_steps += 1
                if parent == root:
                    if len(paths) == limits.max_paths:
                        return PagePaths(paths, "max_paths")
                    paths.append((root, *path))
                elif parent not in path and distances.get(parent, edges_left) < edges_left:
                    stack.append((parent, *path))
    return PagePaths(paths, None)


def reference_graph(
    graph: DiGraph, weights: Counter[tuple[Hashable, Hashable]], is_whole: bool
) -> DiGraph:
    """Make the graph that answers to rows are compared with.

    Args:
        graph: of categories with pages.
        weights: the number of rows that have an edge.
        is_whole: whether they are all rows. Otherwise the graph is cut down to the edges of their
            paths, since answers to these rows cannot have the others.

    Returns:
        A graph of titles, without pages, with `weights` as "weight" of its edges.
    """
    root = graph.graph["root"]
    edges = [edge for edge in graph.edges if is_whole or edge in weights]
    reference = networkx.DiGraph(root=root)
    for node in dict.fromkeys([root, *(node for edge in edges for node in edge)]):
        reference.add_node(node, title=graph.nodes[node]["title"])
    for u, v in edges:
        reference.add_edge(u, v, weight=weights[u, v])
    return reference
