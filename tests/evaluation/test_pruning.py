"""Pruning against loops by the paper's wording and by the code's arithmetic; the search."""

import random

import networkx
import numpy as np
import pytest

from helpers.graphs import (
    draw_edges,
    edges_of,
    graph_of,
    is_inverse_or_loop,
    literal_by_loops,
    prune_by_code,
    prune_by_paper,
)
from minilora.errors import UserError
from minilora.evaluation.path_answers import literal_figures
from minilora.evaluation.pruning import (
    PRESETS,
    PruneRule,
    Thresholds,
    prune,
    search_thresholds,
)

REMOVE_NOTHING = Thresholds(remove_self_loops=False, remove_inverse_edges=False)
PRUNE_BY = {"paper": prune_by_paper, "code": prune_by_code}


# --- pruning


@pytest.mark.parametrize("rule", PRUNE_BY)
def test_prune_is_that_of_loops(rule):
    """By the wording of the paper, and by the arithmetic of the code."""
    for seed in range(300):
        check_against_loops(rule, seed)


def check_against_loops(rule: PruneRule, seed: int) -> None:
    """Prune a random graph with random thresholds."""
    rng = random.Random(seed)
    edges = draw_edges(rng, edges=rng.randrange(1, 40), heaviest=rng.choice([1, 3, 100]))
    thresholds = Thresholds(
        absolute=rng.choice([0, 1, rng.random()]),
        relative=rng.choice([0, 0.5, rng.random()]),
        remove_self_loops=rng.random() < 0.5,
        remove_inverse_edges=rng.random() < 0.5,
        rule=rule,
    )
    graph = graph_of(edges)
    graph.add_node("alone")
    pruned = prune(graph, thresholds)
    expected = {
        (u, v): weight
        for (u, v), weight in PRUNE_BY[rule](
            edges, thresholds.absolute, thresholds.relative
        ).items()
        if not (thresholds.remove_self_loops and u == v)
        and not (thresholds.remove_inverse_edges and edges.get((v, u), 0) > weight)
    }
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
    for rule in PRUNE_BY:  # nothing was there that a root could be put back into
        assert len(prune(networkx.DiGraph(root="R"), Thresholds(0.5, 0.5, rule=rule), "R")) == 0


@pytest.mark.parametrize("rule", PRUNE_BY)
def test_a_threshold_of_0_removes_nothing(rule):
    """Not even edges of weight 0; of equal edges out of a node none is likelier than another."""
    graph = graph_of({("A", "B"): 0, ("A", "C"): 0, ("D", "E"): 0, ("D", "F"): 3})
    assert edges_of(prune(graph, Thresholds(rule=rule))) == edges_of(graph)
    left = set(prune(graph, Thresholds(relative=0.5, rule=rule)).edges)
    assert left == ({("A", "B"), ("A", "C"), ("D", "F")} if rule == "paper" else set())


@pytest.mark.parametrize("rule", PRUNE_BY)
def test_a_weight_may_be_larger_than_64_bits(rule):
    graph = graph_of({("A", "B"): 10**30, ("A", "C"): 1})
    pruned = prune(graph, Thresholds(absolute=0.5, rule=rule))
    assert edges_of(pruned) == {("A", "B"): 10**30}


# --- the root


def test_the_root_is_put_back_where_it_is_missing():
    """As the parent of every node without one. A cycle has no such node."""
    graph = graph_of({("R", "A"): 1, ("A", "B"): 5, ("C", "B"): 5, ("D", "E"): 4, ("E", "D"): 4})
    graph.graph["root"] = "R"
    for node in graph:
        graph.nodes[node]["title"] = f"title of {node}"
    pruned = prune(graph, Thresholds(absolute=0.3), "R")
    assert edges_of(pruned) == {
        ("A", "B"): 5,
        ("C", "B"): 5,
        ("D", "E"): 4,
        ("E", "D"): 4,
        ("R", "A"): 1,
        ("R", "C"): 1,
    }
    assert dict(pruned.nodes(data="title")) == {node: f"title of {node}" for node in "RABCDE"}
    assert pruned.graph == {"root": "R"} == graph.graph
    assert "R" not in prune(graph, Thresholds(absolute=0.3))


def test_a_root_that_has_edges_left_gets_none_by_the_rule_of_the_paper():
    edges = {("R", "A"): 9, ("R", "B"): 1, ("B", "C"): 9, ("B", "D"): 9}
    graph = graph_of(edges)
    del edges["R", "B"]
    assert edges_of(prune(graph, Thresholds(relative=0.2), "R")) == edges
    by_code = prune(graph, Thresholds(absolute=0.25, rule="code"), "R")
    assert edges_of(by_code) == {**edges, ("R", "B"): 1}


def test_a_root_that_the_graph_never_had():
    graph = graph_of({("A", "B"): 1})
    pruned = prune(graph, Thresholds(), "R")
    assert edges_of(pruned) == {("A", "B"): 1, ("R", "A"): 1}
    assert pruned.nodes["R"]["title"] == "R" and pruned.graph["root"] == "R"


# --- the rule of OLLM's code


def test_the_rules_by_hand():
    star = {("A", "a"): 5, ("A", "b"): 3, ("A", "c"): 1, ("A", "d"): 1, ("B", "e"): 7}

    def removed(**changes):
        pruned = prune(graph_of(star), Thresholds(rule=rule, **changes))
        return {v for _, v in set(star) - set(pruned.edges)}

    rule = "paper"
    assert removed(absolute=0.5) == {"c", "d"}  # the median is 3
    assert removed(absolute=0.2) == set()  # the quantile is 1
    assert removed(relative=0.2) == {"c", "d"}
    assert removed(relative=0.49) == {"c", "d"}
    rule = "code"
    assert removed(absolute=0.5) == {"c", "d"}  # floor(2.5)
    assert removed(absolute=0.2) == {"c"}  # one of two equal edges
    assert removed(absolute=1) == set("abcde")
    assert removed(relative=0) == set()
    assert removed(relative=0.1) == {"c", "d", "e"}  # the only edge of B, too
    assert removed(relative=0.21) == {"b", "c", "d", "e"}
    assert removed(relative=0.6) == set("abcde")


def test_published_thresholds_are_points_of_the_grid():
    relatives = np.geomspace(0.1, 1, 21) - 0.1
    assert PRESETS["wikipedia"].relative == pytest.approx(relatives[2], abs=5e-7)
    assert PRESETS["arxiv"].relative == pytest.approx(relatives[7], abs=5e-7)
    # as what is kept, they are no points of the code's own grid
    for preset in PRESETS.values():
        assert np.abs(1.1 - np.geomspace(0.1, 1, 21) - preset.relative).min() > 0.01
        assert 0.9 < preset.absolute < 1 and preset.rule == "paper"


# --- the search for thresholds


def search(predicted, reference, metric="edge_f1", rule="paper"):
    def figure(pruned):
        return literal_figures(pruned, reference)[metric]

    return search_thresholds(predicted, figure, rule)


def test_equal_pruned_graphs_are_computed_once():
    edges = {("A", str(i)): 1 for i in range(30)} | {("B", str(i)): 9 for i in range(3)}
    seen = []

    def figure(pruned):
        seen.append(frozenset(pruned.edges))
        return len(pruned.edges)

    thresholds, best = search_thresholds(graph_of(edges), figure, "paper", "root")
    assert (thresholds, best) == (Thresholds(), 33 + 2)  # with the edges of the root
    assert len(seen) == len(set(seen)) == 2


def test_graphs_whose_figure_costs_too_much_are_not_chosen():
    graph = graph_of({("A", str(i)): i for i in range(1, 9)})

    def figure(pruned):
        return None if len(pruned.edges) > 3 else len(pruned.edges)

    thresholds, best = search_thresholds(graph, figure)
    assert best == 3 and len(prune(graph, thresholds).edges) == 3
    with pytest.raises(UserError, match="too large"):
        search_thresholds(graph, lambda pruned: None)


@pytest.mark.parametrize(
    ("seed", "metric", "rule"),
    [
        (0, "edge_f1", "paper"),
        (1, "node_precision", "paper"),
        (2, "edge_f1", "paper"),
        (3, "node_precision", "paper"),
        (4, "edge_f1", "code"),
        (5, "node_precision", "code"),
    ],
)
def test_search_finds_the_best_of_the_whole_grid(seed, metric, rule):
    rng = random.Random(seed)
    edges = draw_edges(rng, edges=25, heaviest=40)
    wanted = dict.fromkeys(draw_edges(rng, edges=20), 1)
    wanted |= {edge: 1 for edge, weight in edges.items() if weight > 15}
    predicted, reference = graph_of(edges), graph_of(wanted)

    best: tuple = (-1.0,)
    for absolute in 1 - np.geomspace(1 / len(edges), 1, 21):
        for relative in np.geomspace(0.1, 1, 21) - 0.1:
            left = PRUNE_BY[rule](edges, absolute, relative)
            kept = {e: w for e, w in left.items() if not is_inverse_or_loop(edges, *e)}
            figure = literal_by_loops(graph_of(kept), reference)[metric]
            best = max(best, (figure, len(kept), -absolute, -relative))

    thresholds, figure = search(predicted, reference, metric, rule)
    assert figure == pytest.approx(best[0])
    assert (thresholds.absolute, thresholds.relative) == (-best[2], -best[3])
    assert thresholds.remove_self_loops is True and thresholds.remove_inverse_edges is True
    assert thresholds.rule == rule
    pruned = prune(predicted, thresholds)
    assert literal_figures(pruned, reference)[metric] == figure


def test_search_finds_an_absolute_optimum():
    rng = random.Random(0)
    true = {(f"t{i}", f"c{j}"): 0 for i in range(20) for j in range(5)}
    edges = {edge: rng.randint(50, 60) for edge in true}
    edges |= {(f"t{i}", f"n{j}"): rng.randint(1, 5) for i in range(20) for j in range(15)}
    thresholds, figure = search(graph_of(edges), graph_of(true))
    assert figure == 1 and (thresholds.absolute, thresholds.relative) != (0, 0)


def test_search_finds_a_relative_optimum():
    # light edges among heavy ones of the same node: no quantile of all weights separates them
    edges = {("big", f"y{i}"): 1000 for i in range(5)}
    edges |= {("big", f"n{i}"): 10 for i in range(5)}
    edges |= {("small", f"y{i}"): 2 for i in range(9)}
    true = {(u, v): 1 for u, v in edges if v[0] == "y"}
    thresholds, figure = search(graph_of(edges), graph_of(true))
    assert figure == 1
    assert thresholds.absolute == 0 and 0.0099 < thresholds.relative < 0.2


def test_search_prunes_as_little_as_possible():
    same = graph_of({("A", "B"): 3, ("A", "C"): 2, ("B", "D"): 1})
    nothing = networkx.DiGraph()
    assert search(same, same) == (Thresholds(), 1)
    assert search(same, graph_of({("X", "Y"): 1})) == (Thresholds(), 0)
    assert search(graph_of({("A", "B"): 1}), same)[0] == Thresholds()  # one edge
    assert search(nothing, same) == (Thresholds(), 0)
    assert search(nothing, nothing) == (Thresholds(), 1)
