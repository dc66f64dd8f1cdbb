"""The graph of category paths against loops over plain dicts, and its file against networkx."""

import json
import random
from collections import Counter
from fractions import Fraction

import networkx  # type: ignore[import-untyped]
import numpy as np
import pytest

from minilora.errors import UserError
from minilora.evaluation.ontology import (
    Thresholds,
    build_graph,
    literal_figures,
    parse_paths,
    prune,
    read_graph,
    score,
    search_thresholds,
    write_graph,
)

Edges = dict[tuple[str, str], int]
"""Weights of edges (u, v)."""

REMOVE_NOTHING = Thresholds(remove_self_loops=False, remove_inverse_edges=False)
FIGURES = [
    "edge_precision",
    "edge_recall",
    "edge_f1",
    "node_precision",
    "node_recall",
    "node_f1",
]


def graph_of(edges: Edges) -> networkx.DiGraph:
    graph = networkx.DiGraph()
    for (u, v), weight in edges.items():
        graph.add_edge(u, v, weight=weight)
    return graph


def edges_of(graph: networkx.DiGraph) -> Edges:
    return {(u, v): data["weight"] for u, v, data in graph.edges(data=True)}


def draw_edges(rng: random.Random, nodes: int = 9, edges: int = 30, heaviest: int = 6) -> Edges:
    """Draw weights with many ties, self loops and inverse edges."""
    drawn = {}
    for _ in range(edges):
        edge = str(rng.randrange(nodes)), str(rng.randrange(nodes))
        drawn[edge] = rng.randint(1, heaviest)
    return drawn


# --- lines


@pytest.mark.parametrize(
    ("text", "paths", "num_lines"),
    [
        ("", [], 0),
        ("\n  \n\t\n", [], 0),
        ("A -> B\n\nA -> B -> C\n", [["A", "B"], ["A", "B", "C"]], 2),
        ("  A  ->  B \r\n", [["A", "B"]], 1),
        ("root\nother", [["root"]], 2),
        (" root \n", [["root"]], 1),
        ("A -> \nA ->  -> B\n -> B\n -> \nroot -> ", [], 5),
        ("A->B\nA ->B\nA-> B", [], 3),
        ("A -> A", [["A", "A"]], 1),
        ("物理学 -> 물리학 -> e\u0301 😀", [["物理学", "물리학", "e\u0301 😀"]], 1),
        (
            "line\u2028separator -> nul\x00 -> x\x0by -> a\x85b",
            [["line\u2028separator", "nul\x00", "x\x0by", "a\x85b"]],
            1,
        ),
        ("-> -> B", [["->", "B"]], 1),
    ],
)
def test_parse_paths(text, paths, num_lines):
    assert parse_paths(text, {"root"}) == (paths, num_lines)


def test_parse_paths_takes_a_single_name_only_if_it_is_a_root():
    assert parse_paths("root") == ([], 1)


def test_weights_count_occurrences():
    texts = ["A -> B -> C\nA -> B\nbad\n", "A -> B -> A\nA", "X", "C -> "]
    graph = build_graph(texts, {"A"})
    assert edges_of(graph) == {("A", "B"): 3, ("B", "C"): 1, ("B", "A"): 1}
    assert set(graph) == {"A", "B", "C"}
    assert set(build_graph(["root\nA -> B"], {"root"})) == {"root", "A", "B"}
    assert type(build_graph([])) is networkx.DiGraph


# --- the file


def test_a_graph_survives_being_written_and_read(tmp_path):
    texts = ["物理学 -> 물리학 -> café 😀", "root", 'q"uote -> back\\slash', "1 -> 2\n1 -> 2"]
    graph = build_graph(texts, {"root"})
    path = tmp_path / "graph.json"
    path.write_text("old")
    write_graph(graph, path)
    assert [p.name for p in tmp_path.iterdir()] == ["graph.json"]  # nothing temporary stays

    again = read_graph(path)
    assert edges_of(again) == edges_of(graph)
    assert list(again) == list(graph) and "root" in again
    data = json.loads(path.read_bytes().decode("utf-8"))
    theirs = networkx.node_link_graph(data, edges="links")
    assert type(theirs) is networkx.DiGraph
    assert edges_of(theirs) == edges_of(graph) and set(theirs) == set(graph)
    assert "物理学" in path.read_text(encoding="utf-8")
    assert {link["weight"] for link in data["links"]} == {1, 2}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "graph.json"
    write_graph(build_graph(["A -> B"]), path)
    broken = build_graph(["A -> B"])
    broken.add_edge("A", "C", weight=object())
    with pytest.raises(TypeError):
        write_graph(broken, str(path))
    assert edges_of(read_graph(str(path))) == {("A", "B"): 1}


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{",
        "[]",
        "3",
        "{}",
        '{"nodes": []}',
        '{"nodes": [{}], "links": [{"source": 1}]}',
        '{"nodes": 3, "links": []}',
        '{"directed": false, "nodes": [], "links": []}',
        '{"directed": true, "multigraph": true, "nodes": [], "links": []}',
    ],
)
def test_a_broken_file_is_named(tmp_path, text):
    path = tmp_path / "graph.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"graph\.json.*"):
        read_graph(path)


# --- literal figures


def literal_by_loops(predicted: networkx.DiGraph, reference: networkx.DiGraph) -> dict[str, float]:
    figures: dict[str, float] = {}
    for what, ours, theirs in (
        ("edge", list(predicted.edges), list(reference.edges)),
        ("node", list(predicted), list(reference)),
    ):
        hits = 0
        for item in ours:
            for other in theirs:
                hits += item == other
        precision = hits / len(ours) if ours else 0.0
        recall = hits / len(theirs) if theirs else 0.0
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        if not ours and not theirs:
            precision = recall = f1 = 1.0
        figures |= {f"{what}_precision": precision, f"{what}_recall": recall, f"{what}_f1": f1}
    return figures


@pytest.mark.parametrize("seed", range(60))
def test_literal_figures_are_those_of_loops(seed):
    rng = random.Random(seed)
    predicted = graph_of(draw_edges(rng, edges=rng.randrange(30)))
    reference = graph_of(draw_edges(rng, nodes=12, edges=rng.randrange(30)))
    if seed % 3 == 0:
        reference.add_nodes_from("alone")
    figures = literal_figures(predicted, reference)
    assert figures == pytest.approx(literal_by_loops(predicted, reference))
    assert list(figures) == FIGURES
    mirrored = literal_figures(reference, predicted)
    assert mirrored["edge_f1"] == figures["edge_f1"]
    assert mirrored["node_precision"] == figures["node_recall"]


def test_literal_figures_of_empty_graphs():
    nothing, something = networkx.DiGraph(), graph_of({("A", "B"): 1})
    worst, best = dict.fromkeys(FIGURES, 0), dict.fromkeys(FIGURES, 1)
    assert literal_figures(nothing, something) == literal_figures(something, nothing) == worst
    assert literal_figures(nothing, nothing) == literal_figures(something, something) == best


def test_literal_figures_see_the_direction_of_an_edge():
    figures = literal_figures(graph_of({("B", "A"): 1}), graph_of({("A", "B"): 1}))
    assert figures["edge_f1"] == 0


# --- pruning


def prune_by_loops(edges: Edges, thresholds: Thresholds) -> Edges:
    kept = {}
    quantile = float(np.quantile(list(edges.values()), thresholds.absolute)) if edges else 0
    for (u, v), weight in edges.items():
        outgoing = [w for (a, _), w in edges.items() if a == u]
        cumulative = Fraction(sum(w for w in outgoing if w <= weight), sum(outgoing))
        if thresholds.remove_self_loops and u == v:
            continue
        if thresholds.remove_inverse_edges and edges.get((v, u), 0) > weight:
            continue
        if weight < quantile or cumulative <= thresholds.relative:
            continue
        kept[u, v] = weight
    return kept


@pytest.mark.parametrize("seed", range(150))
def test_prune_is_that_of_loops(seed):
    rng = random.Random(seed)
    edges = draw_edges(rng, edges=rng.randrange(1, 40), heaviest=rng.choice([1, 3, 100]))
    thresholds = Thresholds(
        absolute=rng.choice([0, 1, rng.random()]),
        relative=rng.choice([0, 0.5, rng.random()]),
        remove_self_loops=rng.random() < 0.5,
        remove_inverse_edges=rng.random() < 0.5,
    )
    graph = graph_of(edges)
    graph.add_node("alone")
    pruned = prune(graph, thresholds)
    expected = prune_by_loops(edges, thresholds)
    assert edges_of(pruned) == expected
    assert set(pruned) == {node for edge in expected for node in edge}
    assert type(pruned) is networkx.DiGraph
    assert edges_of(graph) == edges and "alone" in graph  # the given graph stays as it is
    reversed_graph = graph_of(dict(reversed(list(edges.items()))))
    assert edges_of(prune(reversed_graph, thresholds)) == expected


def test_each_threshold_by_hand():
    edges = {
        ("A", "A"): 9,
        ("A", "B"): 2,
        ("B", "A"): 3,
        ("A", "C"): 1,
        ("C", "A"): 1,
        ("A", "D"): 8,
        ("D", "E"): 1,
    }

    def removed(**changes):
        thresholds = Thresholds(**{**vars(REMOVE_NOTHING), **changes})
        return set(edges) - set(prune(graph_of(edges), thresholds).edges)

    assert removed() == set()
    assert removed(remove_self_loops=True) == {("A", "A")}
    assert removed(remove_inverse_edges=True) == {("A", "B")}  # A -> C, C -> A weigh the same
    assert removed(absolute=0.5) == {("A", "C"), ("C", "A"), ("D", "E")}  # the median, 2, stays
    assert removed(absolute=1) == set(edges) - {("A", "A")}
    assert removed(relative=0.05) == {("A", "C")}  # 1 of 20, just so
    assert removed(relative=0.15) == {("A", "C"), ("A", "B")}
    assert removed(relative=0.54) == {("A", "C"), ("A", "B")}
    assert removed(relative=0.55) == {("A", "C"), ("A", "B"), ("A", "D")}
    assert removed(relative=0.99) == {("A", "C"), ("A", "B"), ("A", "D")}  # the heaviest stay


def test_edges_of_equal_weight_are_kept_or_removed_together():
    star = graph_of({("A", str(i)): 2 for i in range(5)})
    assert len(prune(star, Thresholds(relative=0.9)).edges) == 5
    star.add_edge("A", "heavy", weight=10)
    assert len(prune(star, Thresholds(relative=0.49)).edges) == 6
    assert set(prune(star, Thresholds(relative=0.5))) == {"A", "heavy"}


def test_thresholds_apply_to_the_graph_as_given():
    # The self loop is the heaviest edge. If it were removed first, A -> B would be the heaviest
    # edge out of A, and the quantile would be lower.
    graph = graph_of({("A", "A"): 10, ("A", "B"): 1, ("C", "D"): 5})
    assert set(prune(graph, Thresholds(relative=0.2)).edges) == {("C", "D")}
    assert set(prune(graph, Thresholds(absolute=0.9)).edges) == set()


def test_an_edge_without_weight_weighs_one():
    graph = networkx.DiGraph([("A", "B"), ("B", "A"), ("C", "D", {"weight": 3})])
    assert set(prune(graph, Thresholds(absolute=0.9)).edges) == {("C", "D")}
    assert len(prune(graph, Thresholds()).edges) == 3


def test_prune_of_a_graph_without_edges():
    alone = networkx.DiGraph()
    alone.add_node("A")
    assert len(prune(alone, Thresholds(0.5, 0.5))) == 0
    assert len(prune(networkx.DiGraph(), Thresholds())) == 0


# --- the search for thresholds


@pytest.mark.parametrize(
    ("seed", "metric"),
    [(0, "edge_f1"), (1, "node_precision"), (2, "edge_f1"), (3, "node_precision")],
)
def test_search_finds_the_best_of_the_whole_grid(seed, metric):
    rng = random.Random(seed)
    edges = draw_edges(rng, edges=25, heaviest=40)
    wanted = dict.fromkeys(draw_edges(rng, edges=20), 1)
    wanted |= {edge: 1 for edge, weight in edges.items() if weight > 15}
    predicted, reference = graph_of(edges), graph_of(wanted)

    best: tuple = (-1.0,)
    for absolute in 1 - np.geomspace(1 / len(edges), 1, 21):
        for relative in np.geomspace(0.1, 1, 21) - 0.1:
            kept = prune_by_loops(edges, Thresholds(absolute, relative))
            figure = literal_by_loops(graph_of(kept), reference)[metric]
            best = max(best, (figure, len(kept), -absolute, -relative))

    thresholds, figure = search_thresholds(predicted, reference, metric)
    assert figure == pytest.approx(best[0])
    assert (thresholds.absolute, thresholds.relative) == (-best[2], -best[3])
    assert thresholds.remove_self_loops is True and thresholds.remove_inverse_edges is True
    pruned = prune(predicted, thresholds)
    assert literal_figures(pruned, reference)[metric] == figure


def test_search_finds_an_absolute_optimum():
    rng = random.Random(0)
    true = {(f"t{i}", f"c{j}"): 0 for i in range(20) for j in range(5)}
    edges = {edge: rng.randint(50, 60) for edge in true}
    edges |= {(f"t{i}", f"n{j}"): rng.randint(1, 5) for i in range(20) for j in range(15)}
    thresholds, figure = search_thresholds(graph_of(edges), graph_of(true))
    assert figure == 1 and (thresholds.absolute, thresholds.relative) != (0, 0)


def test_search_finds_a_relative_optimum():
    # light edges among heavy ones of the same node: no quantile of all weights separates them
    edges = {("big", f"y{i}"): 1000 for i in range(5)}
    edges |= {("big", f"n{i}"): 10 for i in range(5)}
    edges |= {("small", f"y{i}"): 2 for i in range(9)}
    true = {(u, v): 1 for u, v in edges if v[0] == "y"}
    thresholds, figure = search_thresholds(graph_of(edges), graph_of(true))
    assert figure == 1
    assert thresholds.absolute == 0 and 0.0099 < thresholds.relative < 0.2


def test_search_prunes_as_little_as_possible():
    same = graph_of({("A", "B"): 3, ("A", "C"): 2, ("B", "D"): 1})
    nothing = networkx.DiGraph()
    assert search_thresholds(same, same) == (Thresholds(), 1)
    assert search_thresholds(same, graph_of({("X", "Y"): 1})) == (Thresholds(), 0)
    assert search_thresholds(graph_of({("A", "B"): 1}), same)[0] == Thresholds()  # one edge
    assert search_thresholds(nothing, same) == (Thresholds(), 0)
    assert search_thresholds(nothing, nothing) == (Thresholds(), 1)


# --- score

REFERENCES = ["Main -> Physics -> Optics\nMain -> Art\n", "Main -> Art\nTop\n"]
ANSWERS = [
    "Main -> Physics\nMain -> Art\nPhysics\n\n",
    "Main -> Art\nTop\nMain -> \nArt -> Main\nMain\n",
]


def test_score_by_hand():
    figures, graph = score(ANSWERS, REFERENCES)
    assert edges_of(graph) == {("Main", "Physics"): 1, ("Main", "Art"): 2, ("Art", "Main"): 1}
    assert figures == {
        "lines": 8,
        "well_formed": 6 / 8,  # "Main" and "Top" begin a reference's path, "Physics" does not
        "nodes": 4,
        "edges": 3,
        "edge_precision": 2 / 3,
        "edge_recall": 2 / 3,
        "edge_f1": pytest.approx(2 / 3),
        "node_precision": 1,
        "node_recall": 4 / 5,
        "node_f1": pytest.approx(8 / 9),
    }


def test_score_with_thresholds_scores_the_pruned_graph_too():
    unpruned, _ = score(ANSWERS, REFERENCES)
    figures, graph = score(ANSWERS, REFERENCES, Thresholds())
    assert edges_of(graph) == {("Main", "Physics"): 1, ("Main", "Art"): 2}
    assert figures == unpruned | {
        "nodes_pruned": 3,
        "edges_pruned": 2,
        "edge_precision_pruned": 1,
        "edge_recall_pruned": 2 / 3,
        "edge_f1_pruned": pytest.approx(4 / 5),
        "node_precision_pruned": 1,
        "node_recall_pruned": 3 / 5,
        "node_f1_pruned": pytest.approx(3 / 4),
    }


def test_score_of_random_paths_in_any_order():
    rng = random.Random(3)

    def draw_text() -> str:
        lines = [" -> ".join(rng.choices("ABCDEFG物é", k=rng.randint(2, 4))) for _ in range(3)]
        return "".join(line + "\n" for line in lines)

    answers = [draw_text() for _ in range(40)]
    references = [draw_text() for _ in range(40)]
    figures, graph = score(answers, references)
    counts: Counter = Counter()
    for line in "".join(answers).splitlines():
        names = line.split(" -> ")
        for i in range(len(names) - 1):
            counts[names[i], names[i + 1]] += 1
    assert edges_of(graph) == counts
    literal = literal_by_loops(graph, build_graph(references))
    assert {key: figures[key] for key in FIGURES} == pytest.approx(literal)
    order = rng.sample(range(40), 40)
    shuffled, _ = score([answers[i] for i in order], [references[i] for i in order])
    assert shuffled == figures


def test_score_of_perfect_and_empty_answers():
    perfect = {"lines": 4, "well_formed": 1, "nodes": 5, "edges": 3, **dict.fromkeys(FIGURES, 1)}
    assert score(REFERENCES, REFERENCES)[0] == perfect
    empty = {"lines": 0, "well_formed": 0, "nodes": 0, "edges": 0, **dict.fromkeys(FIGURES, 0)}
    assert score(["", " \n"], REFERENCES)[0] == empty
    assert score([""], REFERENCES, Thresholds(0.5, 0.5))[0]["edge_f1_pruned"] == 0


def test_a_reference_that_is_not_a_path_is_named():
    with pytest.raises(UserError, match=r"graph: reference 2 of 2.*'A -> '"):
        score(["A -> B", "A -> B"], ["A -> B", "A -> "])
