"""Category paths, one a line ("A -> B -> C"), as a graph: how often each edge occurs, pruned, beside another graph."""

import json
from collections import Counter
from collections.abc import Iterable, Set
from dataclasses import dataclass
from itertools import accumulate, compress, pairwise, product
from pathlib import Path
from typing import Any

import numpy as np

from minilora.config import UserError
from minilora.running.examples import ARROW

DiGraph = Any  # networkx.DiGraph: networkx is optional, and has no types
Figures = dict[str, float | int]
Measured = tuple[list[tuple], np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Thresholds:
    absolute: float = 0.0
    relative: float = 0.0
    remove_self_loops: bool = True
    remove_inverse_edges: bool = True


def parse(text: str, roots: Set[str] = frozenset()) -> tuple[list[list[str]], int, int]:
    """The paths of a text, the count of its lines that are not blank, and of those that are well formed and so yield a path:
    two names or more, or one out of `roots`, none blank. Names lose the space around them."""
    lines = [[name.strip() for name in line.split(ARROW)] for line in text.split("\n") if line.strip()]
    paths = [names for names in lines if all(names) and (len(names) > 1 or names[0] in roots)]
    return paths, len(lines), len(paths)


def build(texts: Iterable[str], roots: Set[str] = frozenset()) -> DiGraph:
    """The graph of all paths of all texts; an edge's "weight" is how often it occurs in them."""
    import networkx  # type: ignore[import-untyped]

    paths = [path for text in texts for path in parse(text, roots)[0]]
    graph = networkx.DiGraph()
    graph.add_nodes_from(node for path in paths for node in path)
    graph.add_weighted_edges_from((*edge, n) for edge, n in Counter(edge for path in paths for edge in pairwise(path)).items())
    return graph


def write(graph: DiGraph, path: str | Path) -> None:
    """Node-link JSON, all of it or nothing."""
    import networkx

    temporary = Path(path).with_name(f".tmp-{Path(path).name}")
    temporary.write_text(json.dumps(networkx.node_link_data(graph, edges="links"), ensure_ascii=False), encoding="utf-8")
    temporary.replace(path)


def read(path: str | Path) -> DiGraph:
    """What `write` wrote. Raises UserError naming the file."""
    import networkx

    try:
        graph = networkx.node_link_graph(json.loads(Path(path).read_text(encoding="utf-8")), edges="links")
        if type(graph) is not networkx.DiGraph:
            raise TypeError("it is undirected or has parallel edges")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, networkx.NetworkXError) as error:
        raise UserError(f"{path}: expected a directed graph as node-link JSON: {error!r}") from error
    return graph


def literal(predicted: DiGraph, reference: DiGraph) -> Figures:
    """Precision, recall and F1 of edges and of nodes by exact names, 0 .. 1 (OLLM's Literal F1, arXiv 2410.23584). If one
    side is empty they are 0; if both are, the graphs are equal, and they are 1."""
    figures: Figures = {}
    for what, ours, theirs in (("edge", predicted.edges, reference.edges), ("node", predicted.nodes, reference.nodes)):
        common, n, m = (sum(x in theirs for x in ours), len(ours), len(theirs)) if ours or theirs else (1, 1, 1)
        precision, recall, f1 = common / max(n, 1), common / max(m, 1), 2 * common / (n + m)
        figures |= {f"{what}_precision": precision, f"{what}_recall": recall, f"{what}_f1": f1}
    return figures


def prune(graph: DiGraph, thresholds: Thresholds, measured: Measured | None = None) -> DiGraph:
    """Without unlikely edges and the nodes they leave bare: OLLM's post-processing (arXiv 2410.23584), in this reading.
    remove_self_loops: u -> u goes. remove_inverse_edges: of u -> v and v -> u the lighter goes, neither if both weigh the same.
    absolute: edges lighter than this quantile of all weights go. relative: let C be the cumulative share of u's outgoing
    weight, in ascending order of weight; edges with C <= relative go. Edges of equal weight share the C of the last of
    them, so order does not matter; below 1, a node's heaviest edge stays. All is decided on the graph as it came. OLLM's code
    is stricter than this: it also drops the edge at which C passes relative."""
    edges, weights, shares = measured or _measure(graph, thresholds)
    lightest = np.quantile(weights if edges else 0, thresholds.absolute)
    return type(graph)(compress(edges, (weights >= lightest) & (shares > thresholds.relative)))


def _measure(graph: DiGraph, thresholds: Thresholds) -> Measured:
    """The edges, their weights, and their C, or -1 for loops and inverses that go."""
    weight = {(u, v): w for u, v, w in graph.edges(data="weight", default=1)}
    share: dict[tuple[str, str], float] = {}
    for u in graph:
        out = sorted(weight[u, v] for v in graph[u])
        cumulative = dict(zip(out, accumulate(out), strict=True))  # of equal weights the last sum stays
        share |= {(u, v): cumulative[weight[u, v]] / cumulative[out[-1]] for v in graph[u]}
    loops, inverses = thresholds.remove_self_loops, thresholds.remove_inverse_edges
    goes = [(loops and u == v) or (inverses and weight.get((v, u), 0) > w) for (u, v), w in weight.items()]
    shares = np.where(np.array(goes, bool), -1, [share[edge] for edge in weight])
    return list(graph.edges(data=True)), np.array([*weight.values()]), shares


def search(predicted: DiGraph, reference: DiGraph, metric: str = "edge_f1") -> tuple[Thresholds, float]:
    """The thresholds with the best figure `metric` of `literal` for the pruned graph, and that figure; of equally good ones
    those that prune least. The grid is that of OLLM's code, 21 x 21, denser towards absolute = 1 and relative = 0."""
    measured = _measure(predicted, Thresholds())
    absolutes, relatives = 1 - np.geomspace(1 / max(len(predicted.edges), 1), 1, 21), np.geomspace(0.1, 1, 21) - 0.1
    candidates = []
    for absolute, relative in product(absolutes.tolist(), relatives.tolist()):
        pruned = prune(predicted, Thresholds(absolute, relative), measured)
        candidates.append((literal(pruned, reference)[metric], len(pruned.edges), -absolute, -relative))
    figure, _, absolute, relative = max(candidates)
    return Thresholds(-absolute, -relative), figure


def score(answers: list[str], references: list[str], thresholds: Thresholds | None = None) -> tuple[Figures, DiGraph]:
    """Figures of the answers' graph beside the references', and the answers' graph, pruned if thresholds are given: its lines
    that are not blank, the share of them well_formed (one name alone must begin a reference's path), its nodes and edges, and
    those of `literal`; for the pruned graph too, with "_pruned". Raises UserError for a line of a reference that is no path."""
    roots = {line.split(ARROW)[0].strip() for text in references for line in text.split("\n")}
    for row, text in enumerate(references, start=1):
        if parse(text, roots)[1] > parse(text, roots)[2]:
            raise UserError(f"graph: reference {row} of {len(references)}: a name is blank in a line of {text[:200]!r}")
    _, lines, well_formed = parse("\n".join(answers), roots)
    figures: Figures = {"lines": lines, "well_formed": well_formed / max(lines, 1)}
    graph, reference = build(answers, roots), build(references, roots)
    for end in ("", "_pruned") if thresholds else ("",):
        graph = prune(graph, thresholds) if end and thresholds else graph
        found = {"nodes": len(graph), "edges": len(graph.edges), **literal(graph, reference)}
        figures |= {key + end: value for key, value in found.items()}
    return figures, graph
