"""The graph of an output's category paths: pruned, and compared with a reference graph.

This is what infer.py does for --metrics graph, which compares names (path_answers.py), and for
--metrics ontology, the figures of OLLM (ontology.py). `prepare_graph_scoring` reads and checks all
that the command names, before anything is answered.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from minilora import distributed
from minilora.config import DataConfig
from minilora.data.example import RowError, string_of
from minilora.data.prompts import references_of
from minilora.errors import UserError, require
from minilora.evaluation import ontology, path_answers, pruning
from minilora.evaluation.category_graph import (
    DiGraph,
    Figures,
    read_rooted_graph,
    root_title,
)
from minilora.evaluation.embedder import DEFAULT_EMBEDDER, TitleEmbedder, load_embedder
from minilora.evaluation.pruning import Thresholds, TooLargeError, prune
from minilora.generation.arguments import OntologyArgs
from minilora.generation.jobs import Row, read_rows

GRAPH_METRICS = ("graph", "ontology")
"""The metrics that are computed here."""


@dataclass(frozen=True)
class EvaluationGraphs:
    """What pruning thresholds are chosen on."""

    source: str
    """The file of the answers."""
    predicted: DiGraph
    reference: DiGraph


@dataclass(frozen=True)
class GraphScoring:
    """How the answers' graph is pruned and compared."""

    metrics: tuple[str, ...]
    """Those of GRAPH_METRICS that are wanted."""
    root: str | None
    """Only lines that begin with this name count; None: those that begin as a reference does."""
    reference: DiGraph | None
    """That of --reference_graph; None: the graph of the rows' own paths."""
    embedder: TitleEmbedder | None
    """Compares titles; None without --metrics ontology."""
    args: OntologyArgs
    evaluation: EvaluationGraphs | None
    """With --prune_on."""


@dataclass(frozen=True)
class GraphScores:
    """Figures of the answers' graph, and the graphs that they are of."""

    figures: Figures
    graph: DiGraph
    pruned: DiGraph | None
    """The same graph after pruning, if there are thresholds."""
    reference: DiGraph


# ---- before anything is answered


def metrics_of_references(metrics: Sequence[str], args: OntologyArgs) -> list[str]:
    """Return the metrics that need the rows' own references: ontology may have a graph instead."""
    return [name for name in metrics if name != "ontology" or args.reference_graph is None]


def prepare_graph_scoring(
    metrics: Sequence[str], args: OntologyArgs, source: str, rows: Sequence[Row], data: DataConfig
) -> GraphScoring | None:
    """Read and check what scoring the answers' graph needs.

    Args:
        metrics: all that are wanted.
        args: the flags.
        source: the input file's name, for messages.
        rows: its rows.
        data: the format of the rows.

    Returns:
        None if no metric is of the graph.

    Raises:
        UserError: a file cannot be read, roots differ, or the embedder cannot be loaded.
    """
    wanted = tuple(name for name in metrics if name in GRAPH_METRICS)
    if not wanted:
        return None
    root = reference = embedder = evaluation = None
    if args.reference_graph is not None:
        reference = read_rooted_graph(args.reference_graph)
    if "ontology" in wanted:
        rows_compared = _rows_compared(wanted, reference, rows, data)
        root = _find_root(args, reference, source, rows_compared, data)
        if "graph" in wanted:
            require(
                root in _roots_of_rows(source, rows, data),
                f"{source}: --metrics graph compares with the rows' own paths, and none begins "
                f"with the root, {root!r}: leave graph out",
            )
    if args.prune_on is not None:
        evaluation = _read_evaluation(args, root, data)
    if "ontology" in wanted:  # last, because it takes seconds
        embedder = load_embedder(args.embedder or DEFAULT_EMBEDDER)
    return GraphScoring(wanted, root, reference, embedder, args, evaluation)


def _find_root(
    args: OntologyArgs,
    reference: DiGraph | None,
    source: str,
    rows: Sequence[Row],
    data: DataConfig,
) -> str:
    """Return the name that all paths begin with: --root, or that of the references.

    Args:
        args: the flags.
        reference: the graph of --reference_graph.
        source: the input file's name, for messages.
        rows: those of `_rows_compared`.
        data: the format of the rows.

    Raises:
        UserError: there is none, or there are two.
    """
    place_of_rows = _roots_of_rows(source, rows, data)
    place_of = place_of_rows
    if reference is not None:
        place_of = {root_title(reference): f"--reference_graph {args.reference_graph}"}

    roots = list(place_of)
    require(roots, f"{source}: --metrics ontology needs rows with paths, or --reference_graph")
    if args.root is not None:
        found = ", ".join(repr(name) for name in roots[:3])
        require(
            args.root in roots, f"--root {args.root!r}: no reference has this root, but {found}"
        )
        return args.root

    place_of |= place_of_rows
    roots = list(place_of)
    if len(roots) > 1:
        first, second = roots[:2]
        raise UserError(
            f"{place_of[second]}: a path begins with {second!r}, and the root in {place_of[first]} "
            f"is {first!r}: name the one whose paths count with --root"
        )
    return roots[0]


def _rows_compared(
    wanted: Sequence[str], reference: DiGraph | None, rows: Sequence[Row], data: DataConfig
) -> list[Row]:
    """Return the rows whose own paths have to begin with the root.

    All of them do if they are compared with. If they are not, because there is a reference graph,
    rows of category paths still show how the model's paths begin.
    """
    if reference is None or "graph" in wanted:
        return list(rows)
    if data.format == "paths":
        return [row for row in rows if "paths" in row.values]
    return []


def _roots_of_rows(source: str, rows: Sequence[Row], data: DataConfig) -> dict[str, str]:
    """Return the names that the rows' own paths begin with, and the first place of each.

    Raises:
        UserError: a row has no reference; the message names file, line and field.
    """
    place_of: dict[str, str] = {}
    for row, text in zip(rows, references_of(source, rows, data), strict=True):
        for name in sorted(path_answers.roots_of_text(text)):
            place_of.setdefault(name, f"{source}:{row.number}")
    return place_of


def _read_evaluation(args: OntologyArgs, root: str | None, data: DataConfig) -> EvaluationGraphs:
    """Read the answers of --prune_on, and what they are compared with.

    Raises:
        UserError: a row has no answer or no reference (the message names file, line and column), or
            the reference has another root.
    """
    path = args.prune_on or ""
    rows = read_rows(path)
    documents = _read_documents(path, rows)
    if args.prune_reference is None:
        references = references_of(path, rows, data)
        roots = path_answers.roots_of(references) if root is None else {root}
        reference, _ = path_answers.read_answers(references, roots)
        require(
            root is None or root in reference,
            f"--prune_on {path}: no path of the rows begins with {root!r}, the root here",
        )
    else:
        reference = read_rooted_graph(args.prune_reference)
        roots = {root_title(reference)}
        require(
            roots == {root},
            f"--prune_reference {args.prune_reference}: its root is {root_title(reference)!r}, "
            f"and that of the other graphs is {root!r}",
        )
    predicted, _ = path_answers.read_answers(documents, roots)
    return EvaluationGraphs(path, predicted, reference)


def _read_documents(path: str, rows: Sequence[Row]) -> list[str]:
    """Return the documents of --prune_on's rows. Raises UserError for a row without an answer."""
    for number, row in rows:
        try:
            string_of(row, "generated")
        except RowError as error:
            raise UserError(
                f"{path}:{number}: --prune_on needs answers, an output of infer.py: {error}"
            ) from error
    return documents_of(row.values for row in rows)


def documents_of(rows: Iterable[dict]) -> list[str]:
    """Join the answers to the same question: together they are one document of the graph.

    Args:
        rows: those of an output. With --num_samples they have a column "sample", and all with the
            same id are answers to one row of the input.
    """
    answers_of: dict[str, list[str]] = {}
    for place, row in enumerate(rows):
        # without a column "sample" it is the only answer to its row, whatever its id is
        document = f"id {json.dumps(row.get('id'))}" if "sample" in row else f"place {place}"
        answers_of.setdefault(document, []).append(row["generated"])
    return ["\n".join(answers) for answers in answers_of.values()]


# ---- when all answers are there


def find_thresholds(scoring: GraphScoring) -> Thresholds | None:
    """Return the thresholds of --prune, or those that are best on --prune_on.

    Returns:
        None without both; and, which is logged, if none can be found: there is no path in the
        answers of --prune_on, or their graph is too large for the figure.
    """
    args, evaluation = scoring.args, scoring.evaluation
    rule = args.prune_rule or "paper"
    if args.prune is not None:
        return dataclasses.replace(pruning.PRESETS[args.prune], rule=rule)
    if evaluation is None:
        return None

    predicted, reference, source = evaluation.predicted, evaluation.reference, evaluation.source
    if len(predicted.edges) == 0:
        distributed.log(f"pruning: no answer in {source} has a valid path: nothing is pruned")
        return None
    name = "edge_f1"
    if "ontology" in scoring.metrics:
        name = args.prune_for or "continuous_f1"
    metric = name.removesuffix("_f1")
    for note in ontology.cost_notes(predicted, reference, [metric]):
        num_graphs = pruning.GRID_POINTS**2
        distributed.log(
            f"pruning on {source} compares up to {num_graphs} graphs; of the largest one: {note}"
        )

    def figure(pruned: DiGraph) -> float | None:
        if name == "edge_f1":
            return path_answers.literal_figures(pruned, reference)[name]
        figures = ontology.compare_graphs(
            pruned, reference, scoring.embedder, [metric], log_costs=False
        )
        return figures[name]

    try:
        thresholds, best = pruning.search_thresholds(
            predicted, figure, rule, predicted.graph.get("root")
        )
    except TooLargeError as error:
        distributed.log(f"{error} ({name}, {source}): nothing is pruned")
        return None
    distributed.log(
        f"pruning: absolute {thresholds.absolute:.6g}, relative {thresholds.relative:.6g}, "
        f"{name} {best:.4f} on {source}"
    )
    return thresholds


def score_graph(
    scoring: GraphScoring,
    documents: Sequence[str],
    references: Sequence[str],
    thresholds: Thresholds | None,
) -> GraphScores:
    """Compare the graph of the answers with the reference graph.

    Args:
        scoring: how.
        documents: the generated texts, see `documents_of`.
        references: what the answers should be; not read if all that is wanted is ontology with a
            reference graph.
        thresholds: prune with these and compare the pruned graph, too; None: do not prune.

    Returns:
        The figures are "graph/KEY" and "ontology/KEY": "lines" and "well_formed" of
        `path_answers.read_answers`, "nodes", "edges", and those of the comparison. Those of the
        pruned graph have keys that end in "_pruned". A figure that would cost too much is left out,
        which is logged.
    """
    roots = path_answers.roots_of(references) if scoring.root is None else {scoring.root}
    graph, counts = path_answers.read_answers(documents, roots)
    rows_graph, _ = path_answers.read_answers(references, roots)
    reference = rows_graph if scoring.reference is None else scoring.reference
    if len(graph.edges) == 0:
        begins = " or ".join(map(repr, sorted(roots)))
        distributed.log(f"no answer has a path that begins with {begins}: its graph is empty")

    pruned = None
    if thresholds is not None:
        pruned = prune(graph, thresholds, path_answers.only_root(roots))

    comparisons: dict[str, Callable[[DiGraph], Figures]] = {
        "graph": partial(path_answers.compare_literally, reference=rows_graph),
        "ontology": partial(_compare, reference=reference, embedder=scoring.embedder),
    }
    figures: Figures = {}
    for metric in scoring.metrics:
        compare = comparisons[metric]
        found = counts | compare(graph)
        if pruned is not None:
            found |= {f"{key}_pruned": value for key, value in compare(pruned).items()}
        figures |= {f"{metric}/{key}": value for key, value in found.items()}
    return GraphScores(figures, graph, pruned, reference)


def _compare(graph: DiGraph, reference: DiGraph, embedder: TitleEmbedder | None) -> Figures:
    """Count a graph's nodes and edges, and compare it by OLLM's metrics."""
    found = ontology.compare_graphs(graph, reference, embedder)
    affordable = {name: value for name, value in found.items() if value is not None}
    return path_answers.count_graph(graph) | affordable
