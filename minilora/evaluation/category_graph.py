"""Category paths as a weighted graph (OLLM, arXiv 2410.23584).

A text has one path per line, "A -> B -> C". All paths of all answers form a directed graph; the
weight of an edge u -> v is the number of texts that hold it. Graphs are kept in node-link JSON.
"""

import gzip
import json
import math
import zlib
from collections import Counter
from collections.abc import Hashable, Iterable, Set
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from minilora.data.paths import ARROW
from minilora.errors import UserError, require
from minilora.files import replace_file

DiGraph = Any
"""A networkx.DiGraph. networkx is an optional dependency, and has no type hints."""

Figures = dict[str, float | int]
"""The value of each figure by its key."""


class ParsedText(NamedTuple):
    """The category paths of a text."""

    paths: list[list[str]]
    """The names of each well-formed line, without whitespace around them."""
    num_lines: int
    """Number of lines that are not blank, well formed or not."""


def parse_paths(text: str, roots: Set[str] = frozenset()) -> ParsedText:
    """Read the paths of a text, one per line.

    A line is well formed if it has two names or more, none of them is blank, and the first one is a
    root.

    Args:
        text: lines such as "A -> B -> C".
        roots: the names that a path may begin with; empty: any.
    """
    paths = []
    num_lines = 0
    for line in text.split("\n"):
        if not line.strip():
            continue
        num_lines += 1
        names = names_of_line(line)
        begins_well = not roots or names[0] in roots
        if begins_well and len(names) > 1 and all(names):
            paths.append(names)
    return ParsedText(paths, num_lines)


def names_of_line(line: str) -> list[str]:
    """Split a line "A -> B -> C" into its names, without whitespace around them."""
    return [name.strip() for name in line.split(ARROW)]


def build_graph(texts: Iterable[str], root: str | None = None) -> DiGraph:
    """Build the graph of all paths of all texts.

    Args:
        texts: lines such as "A -> B -> C".
        root: only lines that begin with this name count; None: all paths of two names or more.

    Returns:
        See `graph_of_paths`.
    """
    roots = frozenset() if root is None else {root}
    return graph_of_paths((parse_paths(text, roots).paths for text in texts), root)


def graph_of_paths(paths_of_texts: Iterable[list[list[str]]], root: str | None) -> DiGraph:
    """Build the graph of the paths of several texts.

    Args:
        paths_of_texts: the paths of each text.
        root: the name that all paths begin with, if it is known.

    Returns:
        A networkx.DiGraph whose nodes are the names of edges; a path of one name adds nothing. An
        edge's "weight" is the number of texts that hold it, however often each does. A node's
        "title" is its name. The graph attribute "root" is the root if it was given, also where no
        text has a path.
    """
    import networkx

    num_texts: Counter[tuple[str, str]] = Counter()
    for paths in paths_of_texts:
        edges = [edge for path in paths for edge in pairwise(path)]
        num_texts.update(dict.fromkeys(edges).keys())  # each once, in their order

    graph = networkx.DiGraph()
    if root is not None:
        graph.graph["root"] = root
    for (u, v), weight in num_texts.items():
        graph.add_node(u, title=u)
        graph.add_node(v, title=v)
        graph.add_edge(u, v, weight=weight)
    return graph


def title_of(graph: DiGraph, node: Hashable) -> str:
    """Return a node's attribute "title"; if it has none or is not in the graph, its id as text."""
    attributes = graph.nodes[node] if node in graph else {}
    return attributes.get("title", str(node))


def root_title(graph: DiGraph) -> str:
    """Return the title of the node that the graph attribute "root" names."""
    return title_of(graph, graph.graph["root"])


def write_graph(graph: DiGraph, path: str | Path) -> None:
    """Write a graph as node-link JSON. If that fails, an older file stays as it was."""
    import networkx

    links = networkx.node_link_data(graph, edges="links")
    replace_file(Path(path), json.dumps(links, ensure_ascii=False))


def read_graph(path: str | Path, shown: str | None = None) -> DiGraph:
    """Read a directed graph from node-link JSON, with its edges under "links" or "edges".

    An edge without "weight" weighs 1. A node without "title" is called by its id. If the graph
    attribute "root" is not an id but the title of one node, it becomes the id of that node; in a
    graph without nodes it stays as it is.

    Args:
        path: of the file, which is compressed if its name ends in ".gz".
        shown: its name in messages (default: the path).

    Raises:
        UserError: the file cannot be read, holds something other than a directed graph, has an edge
            to a node that is not there, a title that is not a text or a weight that is not a
            number, or the root is neither the id nor the title of one node.
    """
    shown = shown or str(path)
    graph = _parse_graph(path, shown)
    _check_attributes(graph, shown)
    _settle_root(graph, shown)
    return graph


def _parse_graph(path: str | Path, shown: str) -> DiGraph:
    """Read node-link JSON, and check that it is a directed graph of the nodes that it lists."""
    import networkx

    broken_file = (OSError, EOFError, zlib.error)
    # networkx raises any of these for JSON of another structure
    other_content = (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        networkx.NetworkXError,
    )
    try:
        content = Path(path).read_bytes()
        if Path(path).suffix == ".gz":
            content = gzip.decompress(content)
        links = json.loads(content)
        edges = "links" if "links" in links else "edges"
        graph = networkx.node_link_graph(links, edges=edges)
        listed_nodes = networkx.node_link_graph({**links, edges: []}, edges=edges)
    except (*broken_file, *other_content) as error:
        message = f"{shown}: expected a directed graph as node-link JSON: {error!r}"
        raise UserError(message) from error

    require(graph.is_directed(), f'{shown}: the graph is undirected: "directed" must be true')
    require(
        not graph.is_multigraph(),
        f'{shown}: the graph has parallel edges: "multigraph" must be false',
    )
    has_attributes = isinstance(graph.graph, dict)
    require(has_attributes, f'{shown}: "graph", the attributes of the graph, is not an object')
    for node in graph:  # networkx adds the nodes that only an edge names
        is_listed = node in listed_nodes
        require(is_listed, f'{shown}: an edge names the node {node!r}, which is not under "nodes"')
    return graph


def _check_attributes(graph: DiGraph, shown: str) -> None:
    """Raise UserError for a title that is not a text or a weight that is not a number."""
    for node, title in graph.nodes(data="title", default=""):
        is_text = isinstance(title, str)
        require(is_text, f"{shown}: node {node!r}: the title {title!r} is not a text")
        try:
            json.dumps([node, title], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{shown}: node {node!r}: the title {title!r} or the id is not text: it has half "
                "of a surrogate pair"
            ) from error
    for u, v, weight in graph.edges(data="weight", default=1):
        edge = f"{shown}: edge {u!r} -> {v!r}"
        value = repr(weight)[:50]
        require(_is_weight(weight), f"{edge}: the weight {value} is not a number from 0 to 1e308")


def _is_weight(value: object) -> bool:
    """Return whether a value is a number from 0 that is finite as a float."""
    try:
        return isinstance(value, int | float) and 0 <= float(value) < math.inf
    except OverflowError:  # an integer beyond the range of a float
        return False


def _settle_root(graph: DiGraph, shown: str) -> None:
    """Let the graph attribute "root" be the id of a node, if there is a root; see `read_graph`."""
    given = graph.graph.get("root")
    if given is None or len(graph) == 0:
        return
    root = tuple(given) if isinstance(given, list) else given  # JSON has no tuples
    if root not in graph:
        found = [node for node in graph if title_of(graph, node) == given]
        require(found, f"{shown}: the root {given!r} is not the id of a node, nor a title")
        require(
            len(found) == 1,
            f"{shown}: the root {given!r} is the title of {len(found)} nodes: give the id of one",
        )
        root = found[0]
    graph.graph["root"] = root


def read_rooted_graph(path: str | Path, shown: str | None = None) -> DiGraph:
    """Read a graph that has nodes and a root; see `read_graph`.

    Raises:
        UserError: see `read_graph`; or there is no root, or no node.
    """
    graph = read_graph(path, shown)
    shown = shown or str(path)
    require(
        graph.graph.get("root") is not None,
        f'{shown}: there is no root: the graph attribute "root" must be the id of a node',
    )
    require(len(graph) > 0, f"{shown}: there is no root: the graph has no nodes")
    return graph
