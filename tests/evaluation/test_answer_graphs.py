"""How the answers' graph is pruned and compared: what is checked before, and the figures after."""

import json
from pathlib import Path

import networkx
import pytest

from helpers.embedding import LetterEmbedder
from helpers.graphs import edges_of, graph_of
from minilora.config import DataConfig
from minilora.errors import UserError
from minilora.evaluation import answer_graphs
from minilora.evaluation.answer_graphs import (
    documents_of,
    find_thresholds,
    prepare_graph_scoring,
    score_graph,
)
from minilora.evaluation.category_graph import build_graph, write_graph
from minilora.evaluation.ontology import compare_graphs
from minilora.evaluation.path_answers import literal_figures
from minilora.evaluation.pruning import PRESETS, Thresholds, prune, search_thresholds
from minilora.generation.arguments import OntologyArgs
from minilora.generation.jobs import Row

PATHS = [[["R", "a"], ["R", "b", "c"]], [["R", "b", "d"]]]
REFERENCES = ["R -> a\nR -> b -> c\n", "R -> b -> d\n"]
ANSWERS = ["R -> b -> c\nR -> x\n", "R -> b -> d\nR -> b -> c\n", "R -> b -> y\nQ -> b -> d\n"]
EMBEDDER = LetterEmbedder()


@pytest.fixture(autouse=True)
def letter_embedder(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the embedder by that of tests; returns the names that are asked for."""
    names: list[str] = []

    def load(name: str) -> LetterEmbedder:
        names.append(name)
        return EMBEDDER

    monkeypatch.setattr(answer_graphs, "load_embedder", load)
    return names


def rows_of(*paths: list[list[str]]) -> list[Row]:
    """Return rows of format paths."""
    return [Row(i, {"id": i, "paths": value}) for i, value in enumerate(paths, start=1)]


def write_jsonl(file: Path, rows: list[dict]) -> None:
    """Write rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def prepare(args: OntologyArgs, rows: list[Row] | None = None, data: DataConfig | None = None):
    """Prepare --metrics ontology for rows (those of PATHS) of in.jsonl."""
    rows = rows_of(*PATHS) if rows is None else rows
    return prepare_graph_scoring(["ontology"], args, "in.jsonl", rows, data or DataConfig())


def write_reference(tmp_path: Path, root_title: str = "R") -> str:
    """Write a graph whose nodes are numbers, with titles, as the paper's datasets have it."""
    graph = networkx.DiGraph([(0, 1), (0, 2), (2, 3), (2, 4)], root=0)
    for node, title in enumerate([root_title, "a", "b", "c", "d"]):
        graph.nodes[node]["title"] = title
    file = tmp_path / "reference.json"
    write_graph(graph, file)
    return str(file)


# --- roots


def test_the_root_is_that_of_the_rows_or_of_the_reference_graph(tmp_path: Path):
    assert prepare(OntologyArgs()).root == "R"
    file = write_reference(tmp_path)
    found = prepare(OntologyArgs(reference_graph=file))
    assert found.root == "R" and found.reference.graph["root"] == 0
    rows = [Row(1, {"prompt": "p"}), Row(2, {"prompt": "q", "completion": "Q -> a"})]
    prompts = DataConfig(format="prompt")
    assert prepare(OntologyArgs(reference_graph=file), rows, prompts).root == "R"
    completions = [Row(i, {"completion": text}) for i, text in enumerate(REFERENCES)]
    assert prepare(OntologyArgs(), completions, prompts).root == "R"


def test_references_of_two_roots_are_named(tmp_path: Path):
    rows = rows_of(*PATHS, [["R", "a"], ["Q", "b"]])
    with pytest.raises(UserError, match=r"^in\.jsonl:3: .*'Q'.* in in\.jsonl:1 is 'R'.*--root"):
        prepare(OntologyArgs(), rows)
    assert prepare(OntologyArgs(root="Q"), rows).root == "Q"
    with pytest.raises(UserError, match="--root 'x': no reference has this root, but 'R', 'Q'"):
        prepare(OntologyArgs(root="x"), rows)

    file = write_reference(tmp_path, root_title="Things")
    with pytest.raises(UserError, match=r"^in\.jsonl:1: .*'R'.*reference\.json is 'Things'"):
        prepare(OntologyArgs(reference_graph=file))
    with pytest.raises(UserError, match=r"--root 'R'.*'Things'"):
        prepare(OntologyArgs(reference_graph=file, root="R"))


def test_rows_of_another_root_than_the_reference_graph_are_named(tmp_path: Path):
    """Where --metrics graph compares with them; its figures would be 0 otherwise."""
    file = write_reference(tmp_path)
    rows = [Row(i, {"prompt": "p", "completion": "Q -> a"}) for i in (1, 2)]
    prompts = DataConfig(format="prompt")
    both = ["graph", "ontology"]

    args = OntologyArgs(reference_graph=file)
    assert prepare(args, rows, prompts).root == "R"  # they are not compared with
    with pytest.raises(UserError, match=r"^in\.jsonl:1: .*'Q'.*reference\.json is 'R'.*--root"):
        prepare_graph_scoring(both, args, "in.jsonl", rows, prompts)
    args.root = "R"
    with pytest.raises(UserError, match=r"^in\.jsonl: --metrics graph .*none begins with .*'R'"):
        prepare_graph_scoring(both, args, "in.jsonl", rows, prompts)
    rows.append(Row(3, {"prompt": "p", "completion": "R -> a"}))
    scoring = prepare_graph_scoring(both, args, "in.jsonl", rows, prompts)
    assert scoring is not None and scoring.root == "R"


def test_bad_files_are_named_before_the_embedder_is_loaded(tmp_path: Path, letter_embedder):
    graph, answers = tmp_path / "graph.json", tmp_path / "eval.jsonl"
    graph.write_text("{")
    write_jsonl(answers, [{"paths": PATHS[0]}])
    for args, message in (
        (OntologyArgs(reference_graph=str(graph)), r"graph\.json: expected"),
        (OntologyArgs(prune_on=str(answers)), r'eval\.jsonl:1: --prune_on .*"generated"'),
    ):
        with pytest.raises(UserError, match=message):
            prepare(args)
    write_graph(build_graph(["R -> a"]), graph)
    with pytest.raises(UserError, match=r"graph\.json: there is no root"):
        prepare(OntologyArgs(reference_graph=str(graph)))

    write_jsonl(answers, [{"paths": [["Q", "a"]], "generated": "R -> a"}])
    with pytest.raises(UserError, match=r"--prune_on .*eval\.jsonl: no path .*'R'"):
        prepare(OntologyArgs(prune_on=str(answers)))
    args = OntologyArgs(prune_on=str(answers), prune_reference=write_reference(tmp_path, "Q"))
    with pytest.raises(UserError, match=r"--prune_reference .*'Q'.*'R'"):
        prepare(args)
    assert letter_embedder == []
    prepare(OntologyArgs(embedder="some/model"))
    prepare(OntologyArgs())
    assert letter_embedder == ["some/model", "sentence-transformers/all-MiniLM-L6-v2"]


# --- thresholds


def test_thresholds_are_those_of_a_preset():
    assert find_thresholds(prepare(OntologyArgs())) is None
    arxiv = PRESETS["arxiv"]
    assert find_thresholds(prepare(OntologyArgs(prune="arxiv"))) == arxiv
    found = find_thresholds(prepare(OntologyArgs(prune="arxiv", prune_rule="code")))
    assert found == Thresholds(arxiv.absolute, arxiv.relative, rule="code")


@pytest.mark.parametrize("prune_for", [None, "literal_f1", "graph_f1"])
@pytest.mark.parametrize("rule", ["paper", "code"])
def test_thresholds_are_searched_on_the_evaluation_answers(
    tmp_path: Path, rule, prune_for, capsys: pytest.CaptureFixture[str]
):
    """Against the file of --prune_reference, or without it against the rows' paths."""
    answers = [f"R -> a\nR -> b -> {name}\n" for name in ("c", "d", "c", "d", "e", "f", "g")]
    file = tmp_path / "eval.jsonl"
    write_jsonl(
        file, [{"paths": PATHS[i % 2], "generated": text} for i, text in enumerate(answers)]
    )
    args = OntologyArgs(prune_on=str(file), prune_rule=rule, prune_for=prune_for)
    found = find_thresholds(prepare(args))

    name = prune_for or "continuous_f1"
    reference = build_graph(REFERENCES, "R")
    predicted = build_graph(answers, "R")
    expected, best = search_thresholds(
        predicted, lambda pruned: compare_graphs(pruned, reference, EMBEDDER)[name], rule, "R"
    )
    assert found == expected and found.rule == rule
    assert found != Thresholds(rule=rule) and best > 0.95
    chosen = f"absolute {found.absolute:.6g}, relative {found.relative:.6g}"
    assert f"pruning: {chosen}, {name} {best:.4f} on {file}\n" in capsys.readouterr().err
    args.prune_reference = write_reference(tmp_path)
    assert find_thresholds(prepare(args)) == expected


@pytest.mark.parametrize("metric", ["graph", "ontology"])
def test_nothing_is_pruned_if_no_evaluation_answer_has_a_path(
    tmp_path: Path, metric: str, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "eval.jsonl"
    write_jsonl(file, [{"paths": PATHS[0], "generated": text} for text in ("I don't know.", "R")])
    args = OntologyArgs(prune_on=str(file))
    scoring = prepare_graph_scoring([metric], args, "in.jsonl", rows_of(*PATHS), DataConfig())
    assert scoring is not None and find_thresholds(scoring) is None
    assert f"no answer in {file} has a valid path: nothing is pruned" in capsys.readouterr().err


def test_nothing_is_pruned_if_the_figure_costs_too_much_with_any_thresholds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """It is said once, not for each of the thresholds that are tried."""
    file = tmp_path / "eval.jsonl"
    answers = [f"R -> a\nR -> b -> {name}\n" for name in "ccddefg"]
    write_jsonl(file, [{"paths": PATHS[0], "generated": text} for text in answers])
    scoring = prepare(OntologyArgs(prune_on=str(file)))
    monkeypatch.setattr(answer_graphs.ontology.assignment, "MAX_COST", 0)
    assert find_thresholds(scoring) is None
    first, second = capsys.readouterr().err.splitlines()
    assert "to assign 7 to 3 edges" in first and str(file) in first
    assert "continuous_f1" in second and "nothing is pruned" in second
    figures = score_graph(scoring, ANSWERS, REFERENCES, None).figures
    assert figures["ontology/edges"] == 5 and "ontology/edges_pruned" not in figures


# --- figures


def test_the_answers_to_one_row_are_one_document(tmp_path: Path):
    """Of the output and of --prune_on; a number of answers is no number of documents."""
    samples = [
        {"id": 1, "sample": 0, "generated": "R -> a\nR -> b"},
        {"id": 1, "sample": 1, "generated": "R -> a"},
        {"id": "1", "sample": 0, "generated": "R -> a"},
    ]
    single = [{"id": 1, "generated": "R -> a"}, {"id": 1, "generated": "R -> a"}]
    assert documents_of(samples) == ["R -> a\nR -> b\nR -> a", "R -> a"]
    assert len(documents_of(single)) == 2  # of two outputs that were put into one file

    scores = score_graph(prepare(OntologyArgs()), documents_of(samples), REFERENCES, None)
    assert edges_of(scores.graph) == {("R", "a"): 2, ("R", "b"): 1}
    assert scores.figures["ontology/lines"] == 4
    file = tmp_path / "eval.jsonl"
    write_jsonl(file, [{**row, "paths": PATHS[0]} for row in samples])
    evaluation = prepare(OntologyArgs(prune_on=str(file))).evaluation
    assert edges_of(evaluation.predicted) == edges_of(scores.graph)


def test_figures_of_the_graph_and_of_the_pruned_one(tmp_path: Path):
    """Against the reference graph; the light metric compares with the rows' paths."""
    args = OntologyArgs(reference_graph=write_reference(tmp_path))
    rows = rows_of(*PATHS)
    scoring = prepare_graph_scoring(["graph", "bleu", "ontology"], args, "", rows, DataConfig())
    assert scoring is not None and scoring.metrics == ("graph", "ontology")
    thresholds = Thresholds(absolute=0.7)
    scores = score_graph(scoring, ANSWERS, REFERENCES, thresholds)

    graph = graph_of({("R", "b"): 3, ("b", "c"): 2, ("b", "d"): 1, ("R", "x"): 1, ("b", "y"): 1})
    pruned = prune(graph, thresholds, "R")
    assert edges_of(scores.graph) == edges_of(graph)
    assert edges_of(scores.pruned) == edges_of(pruned) and len(pruned.edges) == 2
    assert scores.reference is scoring.reference
    assert (scores.figures["graph/lines"], scores.figures["graph/well_formed"]) == (6, 5 / 6)
    rows_graph = build_graph(REFERENCES, "R")
    for suffix, compared in (("", graph), ("_pruned", pruned)):
        literal = literal_figures(compared, rows_graph)
        found = compare_graphs(compared, scoring.reference, EMBEDDER)
        assert scores.figures[f"ontology/edges{suffix}"] == len(compared.edges)
        assert {name: scores.figures[f"graph/{name}{suffix}"] for name in literal} == literal
        assert {name: scores.figures[f"ontology/{name}{suffix}"] for name in found} == found


def test_a_figure_that_costs_too_much_is_left_out(monkeypatch: pytest.MonkeyPatch):
    scoring = prepare(OntologyArgs())
    refused = {"continuous_f1": None, "literal_f1": 0.5}
    monkeypatch.setattr(answer_graphs.ontology, "compare_graphs", lambda *args: refused)
    figures = score_graph(scoring, ANSWERS, REFERENCES, None).figures
    assert "ontology/continuous_f1" not in figures and figures["ontology/literal_f1"] == 0.5


def test_the_light_metric_alone_takes_rows_of_several_roots():
    rows = rows_of([["R", "a"]], [["Q", "b"]])
    scoring = prepare_graph_scoring(["graph"], OntologyArgs(), "", rows, DataConfig())
    assert scoring is not None and scoring.embedder is None
    scores = score_graph(scoring, ["Q -> b\nx -> y", "R -> c"], ["R -> a", "Q -> b"], None)
    assert edges_of(scores.graph) == {("Q", "b"): 1, ("R", "c"): 1}
    assert scores.figures["graph/edge_f1"] == 0.5
    assert prepare_graph_scoring(["bleu"], OntologyArgs(), "", rows, DataConfig()) is None
