"""Graphs of categories with pages: find their files, read and check them, split them at the top.

A file holds node-link JSON (its edges under "links" or "edges"), maybe gzipped. The graph attribute
"root" is the id of a node; each node has a "title" and may have "pages", a list of {"id", "title",
"abstract"}.
"""

import random
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path

import networkx

from minilora.data.dataset_files import parse_dataset_name
from minilora.data.paths import ARROW
from minilora.data.sources import DataFile
from minilora.distributed import log
from minilora.errors import UserError, require
from minilora.evaluation.category_graph import DiGraph, read_rooted_graph
from minilora.hub import fetch

SPLITS = ("train", "eval", "test")
SPLIT_FILES = (
    "train_eval_split/train_graph.json",
    "train_eval_split/test_graph.json",
    "train_test_split/test_graph.json",
)
"""Where the datasets andylolu24/wiki-ol and arxiv-ol have the graph of each split."""


# ---- finding files


def find_graph_files(source: str) -> list[DataFile]:
    """Find the graph that a name stands for, or the graphs of its three splits.

    Args:
        source: a file; a directory with SPLIT_FILES; a dataset of the hub that has them,
            `owner/name[@revision]`; or one file of a dataset, `owner/name[@revision]:FILE`.

    Returns:
        One file, or one for each of SPLITS.

    Raises:
        UserError: there are no such files.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return [DataFile(source, path)]
    if path.is_dir():
        return _files_in(path, SPLIT_FILES, source)

    dataset = parse_dataset_name(source)
    if dataset is None:
        raise UserError(
            f"SOURCE: {source!r} is neither 'wordnet', nor a file or directory, nor a dataset of "
            "the hub (owner/name)"
        )
    names = SPLIT_FILES if dataset.files is None else (dataset.files,)
    what = f"SOURCE: {source!r} is neither a file nor a directory"
    directory = fetch(dataset.repository, dataset.revision, list(names), what, kind="dataset")
    return _files_in(directory, names, dataset.repository)


def _files_in(directory: Path, names: Iterable[str], shown: str) -> list[DataFile]:
    """Return the named files of a directory. Raises UserError if one is missing."""
    files = []
    for name in names:
        if not (directory / name).is_file():
            raise UserError(
                f"SOURCE: {shown} has no {name}. A dataset or directory holds the graph of each "
                f"split ({', '.join(SPLIT_FILES)}); to split one graph, name its file: "
                "OWNER/NAME:FILE.json, or DIRECTORY/FILE.json"
            )
        files.append(DataFile(f"{shown}/{name}", directory / name))
    return files


# ---- reading and checking


def read_page_graph(file: DataFile) -> DiGraph:
    """Read a graph of categories with pages.

    Raises:
        UserError: the file is not such a graph; the message names what is wrong and where.
    """
    graph = read_rooted_graph(file.path, file.shown)
    root = graph.graph["root"]
    require(graph.out_degree(root) > 0, f"{file.shown}: there is nothing below the root {root!r}")
    _check_nodes(graph, file.shown)
    _note_other_roots(graph, file.shown)
    return graph


def _note_other_roots(graph: DiGraph, shown: str) -> None:
    """Log a note if other nodes have the root's title: in answers they are the root itself."""
    root_title = graph.nodes[graph.graph["root"]]["title"]
    titles = Counter(title for _, title in graph.nodes(data="title"))
    if titles[root_title] > 1:
        log(
            f"note: {shown}: {titles[root_title] - 1} categories have the root's title, "
            f"{root_title!r}: in the graph of answers they and the root are one"
        )


def _check_nodes(graph: DiGraph, shown: str) -> None:
    """Check nodes and pages; take white space off around titles.

    Raises:
        UserError: a node or page has another form, or there are no pages.
    """
    num_pages = 0
    for node, attributes in graph.nodes(data=True):
        # answers are read without white space around a name, so no other title could be learnt
        title = attributes.get("title", "").strip()
        require(title, f'{shown}: node {node!r} has no "title"')
        attributes["title"] = title
        require(
            "\n" not in title and ARROW not in title,
            f"{shown}: node {node!r}: the title {title!r} has a newline or {ARROW!r} in it, so "
            "that no path with it can be written: rename it",
        )
        pages = attributes.setdefault("pages", [])
        require(isinstance(pages, list), f'{shown}: node {node!r}: "pages" is not a list')
        for i, page in enumerate(pages):
            _check_page(page, f'{shown}: node {node!r}, "pages"[{i}]')
        num_pages += len(pages)
    require(
        num_pages > 0,
        f'{shown}: there are no pages: nodes need "pages", a list of {{"id", "title", "abstract"}}',
    )


def _check_page(page: object, place: str) -> None:
    """Raise UserError unless a page has an id, a title and an abstract."""
    if not isinstance(page, dict):
        raise UserError(f"{place}: expected an object, got {type(page).__name__}")
    require(
        isinstance(page.get("id"), str | int), f'{place}: "id" is missing, or not text or number'
    )
    for name in ("title", "abstract"):
        require(isinstance(page.get(name), str), f'{place}: "{name}" is missing, or not a string')


# ---- splitting


def split_at_depth_1(
    graph: DiGraph, shares: tuple[int, int, int], seed: int
) -> Iterator[tuple[str, DiGraph]]:
    """Divide the categories of depth 1 at random, and take what is below them.

    Args:
        graph: with the attribute "root".
        shares: how many categories of depth 1 each split gets, relative to the others.
        seed: of the draw.

    Yields:
        The name and the graph of each split: the root, the split's categories of depth 1, what is
        below them, and every edge between two of these. In a graph that is not a tree, what lies
        below categories of several splits is in each of them (as in OLLM).

    Raises:
        UserError: a split would have no category of depth 1.
    """
    root = graph.graph["root"]
    tops = [node for node in graph.successors(root) if node != root]
    random.Random(seed).shuffle(tops)
    ends = [len(tops) * sum(shares[: i + 1]) // sum(shares) for i in range(len(shares))]
    begins = [0, *ends[:-1]]
    for name, begin, end in zip(SPLITS, begins, ends, strict=True):
        require(
            begin < end,
            f"the root has {len(tops)} categories below it, of which --shares "
            f"{' '.join(map(str, shares))} leave none for {name}: choose other shares",
        )

    # OLLM goes no further down than the deepest category is from the root
    depth = max(distances_from(graph, root, len(graph)).values())
    for name, begin, end in zip(SPLITS, begins, ends, strict=True):
        nodes = {root}
        for top in tops[begin:end]:
            nodes |= distances_from(graph, top, depth - 1).keys()
        yield name, _subgraph(graph, nodes)


def _subgraph(graph: DiGraph, nodes: set[Hashable]) -> DiGraph:
    """Return the nodes and the edges between them, in the order in which the graph has them.

    networkx's own `subgraph` may give them in the order of the set, which differs between two runs.
    """
    subgraph = networkx.DiGraph(**graph.graph)
    subgraph.add_nodes_from((node, graph.nodes[node]) for node in graph if node in nodes)
    subgraph.add_edges_from((u, v) for u, v in graph.edges if u in nodes and v in nodes)
    return subgraph


def distances_from(graph: DiGraph, source: Hashable, cutoff: int) -> dict[Hashable, int]:
    """Return the number of edges of the shortest path to each node within `cutoff` edges."""
    return networkx.single_source_shortest_path_length(graph, source, cutoff)
