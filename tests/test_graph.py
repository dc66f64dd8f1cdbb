"""The graph of category paths beside loops over plain dicts, and its file beside networkx."""

import json
import random
from collections import Counter
from fractions import Fraction

import networkx  # type: ignore[import-untyped]
import numpy as np
import pytest

from minilora.config import UserError
from minilora.evaluation import graph
from minilora.evaluation.graph import Thresholds, build, literal, parse, prune, read, score, search

Edges = dict[tuple[str, str], int]
OFF = Thresholds(remove_self_loops=False, remove_inverse_edges=False)
FIGURES = [f"{what}_{figure}" for what in ("edge", "node") for figure in ("precision", "recall", "f1")]


def graph_of(edges: Edges) -> networkx.DiGraph:
    result = networkx.DiGraph()
    for (u, v), weight in edges.items():
        result.add_edge(u, v, weight=weight)
    return result


def edges_of(result: networkx.DiGraph) -> Edges:
    return {(u, v): data["weight"] for u, v, data in result.edges(data=True)}


def draw(r: random.Random, nodes: int = 9, edges: int = 30, heaviest: int = 6) -> Edges:
    """Random weights with many ties, self loops and inverse edges."""
    return {(str(r.randrange(nodes)), str(r.randrange(nodes))): r.randint(1, heaviest) for _ in range(edges)}


# ---- lines


@pytest.mark.parametrize(
    ("text", "paths", "lines"),
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
        ("line\u2028separator -> nul\x00 -> x\x0by -> a\x85b", [["line\u2028separator", "nul\x00", "x\x0by", "a\x85b"]], 1),
        ("-> -> B", [["->", "B"]], 1),
    ],
)
def test_lines(text, paths, lines):
    assert parse(text, {"root"}) == (paths, lines, len(paths))


def test_a_single_name_needs_a_root():
    assert parse("root") == ([], 1, 0)


def test_weights_count_occurrences():
    built = build(["A -> B -> C\nA -> B\nbad\n", "A -> B -> A\nA", "X", "C -> "], {"A"})
    assert edges_of(built) == {("A", "B"): 3, ("B", "C"): 1, ("B", "A"): 1}
    assert set(built) == {"A", "B", "C"}
    assert set(build(["root\nA -> B"], {"root"})) == {"root", "A", "B"}
    assert type(build([])) is networkx.DiGraph


# ---- file


def test_a_file_round_trip(tmp_path):
    built = build(["物理学 -> 물리학 -> café 😀", "root", 'q"uote -> back\\slash', "1 -> 2\n1 -> 2"], {"root"})
    path = tmp_path / "graph.json"
    path.write_text("old")
    graph.write(built, path)
    assert [p.name for p in tmp_path.iterdir()] == ["graph.json"]  # nothing temporary stays
    again = read(path)
    assert edges_of(again) == edges_of(built) and list(again) == list(built) and "root" in again
    data = json.loads(path.read_bytes().decode("utf-8"))
    theirs = networkx.node_link_graph(data, edges="links")
    assert type(theirs) is networkx.DiGraph and edges_of(theirs) == edges_of(built) and set(theirs) == set(built)
    assert "物理学" in path.read_text(encoding="utf-8")
    assert {link["weight"] for link in data["links"]} == {1, 2}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "graph.json"
    graph.write(build(["A -> B"]), path)
    broken = build(["A -> B"])
    broken.add_edge("A", "C", weight=object())
    with pytest.raises(TypeError):
        graph.write(broken, str(path))
    assert edges_of(read(str(path))) == {("A", "B"): 1}


@pytest.mark.parametrize(
    "text",
    [None, "", "{", "[]", "3", "{}", '{"nodes": []}', '{"nodes": [{}], "links": [{"source": 1}]}', '{"nodes": 3, "links": []}',
     '{"directed": false, "nodes": [], "links": []}', '{"directed": true, "multigraph": true, "nodes": [], "links": []}'],
)  # fmt: skip
def test_a_broken_file_is_named(tmp_path, text):
    path = tmp_path / "graph.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"graph\.json.*"):
        read(path)


# ---- literal figures


def brute_literal(predicted: networkx.DiGraph, reference: networkx.DiGraph) -> dict[str, float]:
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
def test_literal_figures(seed):
    r = random.Random(seed)
    predicted, reference = graph_of(draw(r, edges=r.randrange(30))), graph_of(draw(r, 12, edges=r.randrange(30)))
    if seed % 3 == 0:
        reference.add_nodes_from("alone")
    figures = literal(predicted, reference)
    assert figures == pytest.approx(brute_literal(predicted, reference)) and list(figures) == FIGURES
    mirrored = literal(reference, predicted)
    assert mirrored["edge_f1"] == figures["edge_f1"] and mirrored["node_precision"] == figures["node_recall"]


def test_literal_figures_of_nothing():
    nothing, something = networkx.DiGraph(), graph_of({("A", "B"): 1})
    assert literal(nothing, something) == literal(something, nothing) == dict.fromkeys(FIGURES, 0)
    assert literal(nothing, nothing) == literal(something, something) == dict.fromkeys(FIGURES, 1)
    assert literal(graph_of({("B", "A"): 1}), something)["edge_f1"] == 0  # a direction matters


# ---- pruning


def brute_prune(edges: Edges, t: Thresholds) -> Edges:
    kept = {}
    quantile = float(np.quantile(list(edges.values()), t.absolute)) if edges else 0
    for (u, v), weight in edges.items():
        out = [w for (a, _), w in edges.items() if a == u]
        cumulative = Fraction(sum(w for w in out if w <= weight), sum(out))
        if t.remove_self_loops and u == v:
            continue
        if t.remove_inverse_edges and edges.get((v, u), 0) > weight:
            continue
        if weight < quantile or cumulative <= t.relative:
            continue
        kept[u, v] = weight
    return kept


@pytest.mark.parametrize("seed", range(150))
def test_pruning(seed):
    r = random.Random(seed)
    edges = draw(r, edges=r.randrange(1, 40), heaviest=r.choice([1, 3, 100]))
    t = Thresholds(r.choice([0, 1, r.random()]), r.choice([0, 0.5, r.random()]), r.random() < 0.5, r.random() < 0.5)
    before = graph_of(edges)
    before.add_node("alone")
    pruned = prune(before, t)
    expected = brute_prune(edges, t)
    assert edges_of(pruned) == expected
    assert set(pruned) == {node for edge in expected for node in edge}
    assert type(pruned) is networkx.DiGraph and edges_of(before) == edges and "alone" in before  # the given graph stays
    backwards = graph_of(dict(reversed(list(edges.items()))))
    assert edges_of(prune(backwards, t)) == expected


def test_each_threshold_by_hand():
    edges = {("A", "A"): 9, ("A", "B"): 2, ("B", "A"): 3, ("A", "C"): 1, ("C", "A"): 1, ("A", "D"): 8, ("D", "E"): 1}

    def gone(**changes):
        return set(edges) - set(prune(graph_of(edges), Thresholds(**{**vars(OFF), **changes})).edges)

    assert gone() == set()
    assert gone(remove_self_loops=True) == {("A", "A")}
    assert gone(remove_inverse_edges=True) == {("A", "B")}  # A -> C and C -> A weigh the same
    assert gone(absolute=0.5) == {("A", "C"), ("C", "A"), ("D", "E")}  # the median, 2, stays
    assert gone(absolute=1) == set(edges) - {("A", "A")}
    assert gone(relative=0.05) == {("A", "C")}  # 1 of 20, just so
    assert gone(relative=0.15) == {("A", "C"), ("A", "B")}
    assert gone(relative=0.54) == {("A", "C"), ("A", "B")}
    assert gone(relative=0.55) == {("A", "C"), ("A", "B"), ("A", "D")}
    assert gone(relative=0.99) == {("A", "C"), ("A", "B"), ("A", "D")}  # the heaviest of each node stays


def test_equal_weights_share_one_fate():
    star = graph_of({("A", str(i)): 2 for i in range(5)})
    assert len(prune(star, Thresholds(relative=0.9)).edges) == 5
    star.add_edge("A", "heavy", weight=10)
    assert len(prune(star, Thresholds(relative=0.49)).edges) == 6
    assert set(prune(star, Thresholds(relative=0.5))) == {"A", "heavy"}


def test_all_is_decided_on_the_graph_as_it_came():
    # the self loop is the heaviest edge: with it gone first, A -> B would be A's heaviest, and the quantile lower
    edges = {("A", "A"): 10, ("A", "B"): 1, ("C", "D"): 5}
    assert set(prune(graph_of(edges), Thresholds(relative=0.2)).edges) == {("C", "D")}
    assert set(prune(graph_of(edges), Thresholds(absolute=0.9)).edges) == set()


def test_an_edge_without_weight_weighs_one():
    plain = networkx.DiGraph([("A", "B"), ("B", "A"), ("C", "D", {"weight": 3})])
    assert set(prune(plain, Thresholds(absolute=0.9)).edges) == {("C", "D")}
    assert len(prune(plain, Thresholds()).edges) == 3


def test_nothing_to_prune():
    alone = networkx.DiGraph()
    alone.add_node("A")
    assert len(prune(alone, Thresholds(0.5, 0.5))) == len(prune(networkx.DiGraph(), Thresholds())) == 0


# ---- search


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("metric", ["edge_f1", "node_precision"])
def test_search_is_the_whole_grid(seed, metric):
    r = random.Random(seed)
    edges = draw(r, edges=25, heaviest=40)
    reference = graph_of(dict.fromkeys(draw(r, edges=20), 1) | {e: 1 for e, w in edges.items() if w > 15})
    predicted = graph_of(edges)
    best: tuple = (-1.0,)
    for absolute in 1 - np.geomspace(1 / len(edges), 1, 21):
        for relative in np.geomspace(0.1, 1, 21) - 0.1:
            kept = brute_prune(edges, Thresholds(absolute, relative))
            best = max(best, (brute_literal(graph_of(kept), reference)[metric], len(kept), -absolute, -relative))
    thresholds, figure = search(predicted, reference, metric)
    assert figure == pytest.approx(best[0])
    assert (thresholds.absolute, thresholds.relative) == (-best[2], -best[3])
    assert (thresholds.remove_self_loops, thresholds.remove_inverse_edges) == (True, True)
    assert literal(prune(predicted, thresholds), reference)[metric] == figure


def test_search_finds_a_planted_optimum():
    r = random.Random(0)
    true = {(f"t{i}", f"c{j}"): 0 for i in range(20) for j in range(5)}
    edges = {edge: r.randint(50, 60) for edge in true} | {
        (f"t{i}", f"n{j}"): r.randint(1, 5) for i in range(20) for j in range(15)
    }
    thresholds, figure = search(graph_of(edges), graph_of(true))
    assert figure == 1 and (thresholds.absolute, thresholds.relative) != (0, 0)
    # a node's faint edges among strong ones, where no global quantile tells right from wrong
    local = (
        {("big", f"y{i}"): 1000 for i in range(5)}
        | {("big", f"n{i}"): 10 for i in range(5)}
        | {("small", f"y{i}"): 2 for i in range(9)}
    )
    thresholds, figure = search(graph_of(local), graph_of({(u, v): 1 for u, v in local if v[0] == "y"}))
    assert figure == 1 and thresholds.absolute == 0 and 0.0099 < thresholds.relative < 0.2


def test_search_prunes_least():
    same = graph_of({("A", "B"): 3, ("A", "C"): 2, ("B", "D"): 1})
    assert search(same, same) == (Thresholds(), 1)
    assert search(same, graph_of({("X", "Y"): 1})) == (Thresholds(), 0)
    assert search(graph_of({("A", "B"): 1}), same)[0] == Thresholds()  # a single edge
    assert search(networkx.DiGraph(), same) == (Thresholds(), 0)
    assert search(networkx.DiGraph(), networkx.DiGraph()) == (Thresholds(), 1)


# ---- score

REFERENCES = ["Main -> Physics -> Optics\nMain -> Art\n", "Main -> Art\nTop\n"]
ANSWERS = ["Main -> Physics\nMain -> Art\nPhysics\n\n", "Main -> Art\nTop\nMain -> \nArt -> Main\nMain\n"]


def test_score_by_hand():
    figures, predicted = score(ANSWERS, REFERENCES)
    assert edges_of(predicted) == {("Main", "Physics"): 1, ("Main", "Art"): 2, ("Art", "Main"): 1}
    assert figures == {
        "lines": 8, "well_formed": 6 / 8, "nodes": 4, "edges": 3,  # "Physics" begins no reference, "Main" and "Top" do
        "edge_precision": 2 / 3, "edge_recall": 2 / 3, "edge_f1": pytest.approx(2 / 3),
        "node_precision": 1, "node_recall": 4 / 5, "node_f1": pytest.approx(8 / 9),
    }  # fmt: skip


def test_score_of_the_pruned_graph_too():
    raw, _ = score(ANSWERS, REFERENCES)
    figures, pruned = score(ANSWERS, REFERENCES, Thresholds())
    assert edges_of(pruned) == {("Main", "Physics"): 1, ("Main", "Art"): 2}
    assert figures == raw | {
        "nodes_pruned": 3, "edges_pruned": 2, "edge_precision_pruned": 1, "edge_recall_pruned": 2 / 3,
        "edge_f1_pruned": pytest.approx(4 / 5), "node_precision_pruned": 1, "node_recall_pruned": 3 / 5,
        "node_f1_pruned": pytest.approx(3 / 4),
    }  # fmt: skip


def test_score_of_random_paths_and_their_order():
    r = random.Random(3)
    texts = [
        ["".join(" -> ".join(r.choices("ABCDEFG物é", k=r.randint(2, 4))) + "\n" for _ in range(3)) for _ in range(40)]
        for _ in "ab"
    ]
    figures, predicted = score(texts[0], texts[1])
    counts: Counter = Counter()
    for line in "".join(texts[0]).splitlines():
        names = line.split(" -> ")
        for i in range(len(names) - 1):
            counts[names[i], names[i + 1]] += 1
    assert edges_of(predicted) == counts
    assert {key: figures[key] for key in FIGURES} == pytest.approx(brute_literal(predicted, build(texts[1])))
    order = r.sample(range(40), 40)
    assert score([texts[0][i] for i in order], [texts[1][i] for i in order])[0] == figures


def test_score_of_perfect_and_empty_answers():
    assert score(REFERENCES, REFERENCES)[0] == {"lines": 4, "well_formed": 1, "nodes": 5, "edges": 3, **dict.fromkeys(FIGURES, 1)}
    empty = {"lines": 0, "well_formed": 0, "nodes": 0, "edges": 0, **dict.fromkeys(FIGURES, 0)}
    assert score(["", " \n"], REFERENCES)[0] == empty
    assert score([""], REFERENCES, Thresholds(0.5, 0.5))[0]["edge_f1_pruned"] == 0


def test_a_reference_that_is_no_path_is_named():
    with pytest.raises(UserError, match=r"graph: reference 2 of 2.*'A -> '"):
        score(["A -> B", "A -> B"], ["A -> B", "A -> "])
