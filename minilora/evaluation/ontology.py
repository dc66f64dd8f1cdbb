"""Metrics of ontology learning (OLLM, arXiv 2410.23584): two graphs of categories compared.

    python -m minilora.evaluation.ontology PREDICTED.json REFERENCE.json

compares two files of node-link JSON by the five metrics of the paper. All but the last have a
precision (the share of the predicted graph that is right), a recall (the share of the reference
that was found) and an F1:

- literal: edges that have the same two titles. A category by another name counts as wrong, so a
  graph of new categories scores low however sensible it is.
- fuzzy: edges whose titles are similar at both ends; one edge may match many.
- continuous: how similar edges are, each assigned to at most one other.
- graph: how similar nodes are, each assigned to at most one other; a node is described by its
  title and those of the nodes above it.
- motif: how far apart the shapes of the graphs are, whatever the titles (motifs.py); 0 is best.

Similarity is the cosine of the titles' sentence embeddings (embedder.py, soft_metrics.py).
"""

import dataclasses
import importlib.util
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from minilora import distributed
from minilora.errors import UserError, require
from minilora.evaluation import assignment, soft_metrics
from minilora.evaluation.category_graph import DiGraph, read_graph, root_title, title_of
from minilora.evaluation.embedder import DEFAULT_EMBEDDER, TitleEmbedder, load_embedder
from minilora.evaluation.motifs import motif_distance
from minilora.evaluation.pruning import PRESETS, Thresholds, prune
from minilora.evaluation.soft_metrics import PrecisionRecall
from minilora.exit_codes import run_script

Metric = Literal["literal", "fuzzy", "continuous", "graph", "motif"]
METRICS: tuple[Metric, ...] = ("literal", "fuzzy", "continuous", "graph", "motif")

COMMAND = "python -m minilora.evaluation.ontology"

EMBEDDING_METRICS = ("fuzzy", "continuous", "graph")
"""The metrics that compare embeddings of titles."""

OptionalFigures = dict[str, float | None]
"""The value of each figure by its key; None if it was left out for its cost."""


def compare_graphs(
    predicted: DiGraph,
    reference: DiGraph,
    embedder: TitleEmbedder | None,
    metrics: Collection[str] = METRICS,
    *,
    log_costs: bool = True,
) -> OptionalFigures:
    """Compute the paper's metrics for two graphs.

    Weights do not matter. Nodes of equal titles are different nodes, except to literal. If one of
    the graphs is empty, F1, precision and recall are 0.

    Args:
        predicted: the learnt graph.
        reference: the true graph.
        embedder: of titles; may be None if none of EMBEDDING_METRICS is computed.
        metrics: which of METRICS to compute.
        log_costs: log the `cost_notes` first.

    Returns:
        For each metric METRIC_f1, METRIC_precision and METRIC_recall; for motif "motif_distance".
        Figures are None if they would cost too much (assignment.py).
    """
    unknown = set(metrics) - set(METRICS)
    if unknown:
        raise ValueError(f"unknown metrics: {sorted(unknown)}")
    if log_costs:
        for note in cost_notes(predicted, reference, metrics):
            distributed.log(note)

    figures: OptionalFigures = {}
    if "literal" in metrics:
        figures |= _figures("literal", _literal(predicted, reference))
    if needs_embedder(metrics):
        if embedder is None:
            raise ValueError(f"one of {sorted(metrics)} needs an embedder")
        figures |= _soft_figures(predicted, reference, embedder, metrics)
    if "motif" in metrics:
        figures["motif_distance"] = motif_distance(predicted, reference)
    return figures


def cost_notes(
    predicted: DiGraph, reference: DiGraph, metrics: Collection[str] = METRICS
) -> list[str]:
    """Say which of the metrics `compare_graphs` leaves out for their cost, and which take long."""
    nodes = len(predicted), len(reference)
    edges = len(predicted.edges), len(reference.edges)
    notes = []
    for metric, items, shape in (("continuous", "edges", edges), ("graph", "nodes", nodes)):
        note = assignment.cost_note(metric, items, shape)
        if metric in metrics and note is not None:
            notes.append(note)
    return notes


def needs_embedder(metrics: Collection[str]) -> bool:
    """Return whether any of the metrics compares embeddings."""
    return not set(metrics).isdisjoint(EMBEDDING_METRICS)


def check_installed(metrics: Collection[str]) -> None:
    """Raise UserError if a library that the metrics need is missing."""
    is_missing = {"networkx": importlib.util.find_spec("networkx") is None}
    if needs_embedder(metrics):
        is_missing["scipy"] = importlib.util.find_spec("scipy") is None
        has_embedders = importlib.util.find_spec("sentence_transformers") is not None
        is_missing["sentence-transformers"] = not has_embedders
    names = ", ".join(name for name in is_missing if is_missing[name])
    if names:
        raise UserError(f"ontology metrics need {names}: pip install 'minilora[ontology]'")


def _figures(metric: str, scores: PrecisionRecall | None) -> OptionalFigures:
    """Return the three figures of a metric by their keys."""
    if scores is None:
        return dict.fromkeys((f"{metric}_f1", f"{metric}_precision", f"{metric}_recall"))
    return {
        f"{metric}_f1": scores.f1(),
        f"{metric}_precision": scores.precision,
        f"{metric}_recall": scores.recall,
    }


def _literal(predicted: DiGraph, reference: DiGraph) -> PrecisionRecall:
    """Compare the sets of the edges' titles."""
    ours, theirs = _titled_edges(predicted), _titled_edges(reference)
    num_common = len(ours & theirs)
    return PrecisionRecall(num_common / max(len(ours), 1), num_common / max(len(theirs), 1))


def _titled_edges(graph: DiGraph) -> set[tuple[str, str]]:
    """Return the titles of the two ends of each edge."""
    return {(title_of(graph, u), title_of(graph, v)) for u, v in graph.edges}


def _soft_figures(
    predicted: DiGraph, reference: DiGraph, embedder: TitleEmbedder, metrics: Collection[str]
) -> OptionalFigures:
    """Compute those of EMBEDDING_METRICS that are among the metrics."""
    our_nodes = soft_metrics.embed_nodes(predicted, embedder)
    their_nodes = soft_metrics.embed_nodes(reference, embedder)
    our_edges = soft_metrics.edge_vectors(predicted, our_nodes)
    their_edges = soft_metrics.edge_vectors(reference, their_nodes)

    figures: OptionalFigures = {}
    if "fuzzy" in metrics:
        figures |= _figures("fuzzy", soft_metrics.fuzzy_scores(our_edges, their_edges))
    if "continuous" in metrics:
        figures |= _figures("continuous", soft_metrics.continuous_scores(our_edges, their_edges))
    if "graph" in metrics:
        ours = soft_metrics.propagate(predicted, our_nodes)
        theirs = soft_metrics.propagate(reference, their_nodes)
        figures |= _figures("graph", soft_metrics.graph_scores(ours, theirs))
    return figures


# --- the command


@dataclass(frozen=True)
class Args:
    """Compare a learnt graph of categories with the true one (OLLM's metrics).

    Both are files of node-link JSON, as infer.py writes them and networkx reads them. Nothing is
    pruned unless a preset or a threshold is given.
    """

    predicted: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PREDICTED")]
    """The learnt graph."""
    reference: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="REFERENCE")]
    """The true graph."""
    metrics: tuple[Metric, ...] = METRICS
    """Which metrics to compute. literal and motif need no embedder."""
    embedder: str = DEFAULT_EMBEDDER
    """Model of sentence-transformers that embeds titles: a directory or a hub id."""
    prune: Literal["wikipedia", "arxiv"] | None = None
    """Prune the learnt graph first, with the thresholds that the paper found for this data."""
    absolute: float | None = None
    """Prune with this absolute threshold, 0 .. 1."""
    relative: float | None = None
    """Prune with this relative threshold, 0 .. 1."""
    prune_rule: Literal["paper", "code"] | None = None
    """Prune as the paper says (default), or as OLLM's code does."""
    json: bool = False
    """Write one JSON object instead of a table."""


def main(args: Args) -> None:
    """Compare two files and print the figures to stdout."""
    thresholds = _thresholds(args)
    require(args.metrics, "--metrics: name one at least")
    check_installed(args.metrics)
    predicted, reference = read_graph(args.predicted), read_graph(args.reference)
    _check_same_root(predicted, reference)
    embedder = load_embedder(args.embedder) if needs_embedder(args.metrics) else None

    if thresholds is not None:
        num_edges = len(predicted.edges)
        predicted = prune(predicted, thresholds, predicted.graph.get("root"))
        distributed.log(f"pruned: {len(predicted.edges):,} of {num_edges:,} edges are left")
    if not args.json:
        print(f"predicted: {_size(predicted)}; reference: {_size(reference)}", flush=True)
    figures = compare_graphs(predicted, reference, embedder, args.metrics)
    print(json.dumps(figures) if args.json else figures_table(figures))


def figures_table(figures: OptionalFigures) -> str:
    """Format the figures of `compare_graphs`, a line for each metric; "-" is one left out."""
    lines = [f"{'':14}{'F1':>10}{'precision':>11}{'recall':>10}"]
    for metric in METRICS:
        if f"{metric}_f1" in figures:
            f1 = _cell(figures[f"{metric}_f1"])
            precision = _cell(figures[f"{metric}_precision"])
            recall = _cell(figures[f"{metric}_recall"])
            lines.append(f"{metric:14}{f1:>10}{precision:>11}{recall:>10}")
    if "motif_distance" in figures:
        lines.append(f"{'motif distance':14}{_cell(figures['motif_distance']):>10}")
    return "\n".join(lines)


def _cell(figure: float | None) -> str:
    """Format a figure; "-" if it was left out."""
    return "-" if figure is None else f"{figure:.3f}"


def _size(graph: DiGraph) -> str:
    """Format the number of nodes and edges."""
    return f"{len(graph):,} nodes, {len(graph.edges):,} edges"


def _thresholds(args: Args) -> Thresholds | None:
    """Return the thresholds that the flags ask for, None for no pruning.

    Raises:
        UserError: the flags contradict each other, or a threshold is not between 0 and 1.
    """
    has_values = args.absolute is not None or args.relative is not None
    if args.prune is None and not has_values:
        require(args.prune_rule is None, "--prune_rule needs --prune, --absolute or --relative")
        return None
    require(
        args.prune is None or not has_values,
        "--prune brings its own thresholds: leave out --absolute and --relative, or --prune",
    )
    for flag, value in (("--absolute", args.absolute), ("--relative", args.relative)):
        is_share = value is None or 0 <= value <= 1
        require(is_share, f"{flag} {value}: expected a number from 0 to 1")
    if args.prune is not None:
        thresholds = PRESETS[args.prune]
    else:
        thresholds = Thresholds(args.absolute or 0.0, args.relative or 0.0)
    return dataclasses.replace(thresholds, rule=args.prune_rule or "paper")


def _check_same_root(predicted: DiGraph, reference: DiGraph) -> None:
    """Raise UserError if both graphs name their root, and the titles of the two differ."""
    if predicted.graph.get("root") is None or reference.graph.get("root") is None:
        return
    ours, theirs = root_title(predicted), root_title(reference)
    if ours != theirs:
        raise UserError(
            f"the learnt graph has the root {ours!r} and the reference {theirs!r}: "
            "compare graphs of the same data"
        )


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Args, prog=COMMAND, use_underscores=True)))
