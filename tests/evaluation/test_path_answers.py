"""The light metric of category paths, by hand and against loops over plain dicts."""

import random
from collections import Counter
from itertools import pairwise

import networkx
import pytest

from helpers.graphs import draw_edges, edges_of, graph_of, literal_by_loops
from minilora.errors import UserError
from minilora.evaluation.category_graph import build_graph
from minilora.evaluation.path_answers import literal_figures, read_answers, roots_of, score

FIGURES = [
    "edge_precision",
    "edge_recall",
    "edge_f1",
    "node_precision",
    "node_recall",
    "node_f1",
]
REFERENCES = ["Main -> Physics -> Optics\nMain -> Art\n", "Main -> Art\nTop\n"]
ANSWERS = [
    "Main -> Physics\nMain -> Art\nPhysics\n\n",
    "Main -> Art\nTop\nMain -> \nArt -> Main\nMain\n",
]


def test_score_by_hand():
    graph, _ = read_answers(ANSWERS, {"Main", "Top"})
    assert edges_of(graph) == {("Main", "Physics"): 1, ("Main", "Art"): 2}
    assert "root" not in graph.graph  # there are two
    assert score(ANSWERS, REFERENCES) == {
        "lines": 8,
        "well_formed": 3 / 8,  # neither what begins with no root, nor a root alone
        "nodes": 3,
        "edges": 2,
        "edge_precision": 1,
        "edge_recall": 2 / 3,
        "edge_f1": pytest.approx(4 / 5),
        "node_precision": 1,
        "node_recall": 3 / 4,  # "Top" has no edge, and is in neither graph
        "node_f1": pytest.approx(6 / 7),
    }


def test_lines_from_another_root_are_malformed():
    references = ["Main -> A -> B", "Main -> C"]
    answers = ["Main -> A\nA -> B\nmain -> C\nThings -> Main -> C\n", "A -> B"]
    figures = score(answers, references)
    assert figures["lines"] == 5 and figures["well_formed"] == 1 / 5
    assert (figures["nodes"], figures["edges"]) == (2, 1)
    assert (figures["edge_precision"], figures["edge_recall"]) == (1, 1 / 3)
    graph, _ = read_answers(answers, roots_of(references))
    assert edges_of(graph) == {("Main", "A"): 1} and graph.graph["root"] == "Main"


def test_score_of_random_paths_in_any_order():
    rng = random.Random(3)

    def draw_text() -> str:
        lines = [" -> ".join(rng.choices("ABCDEFG物é", k=rng.randint(2, 4))) for _ in range(3)]
        return "".join(line + "\n" for line in lines)

    answers = [draw_text() for _ in range(40)]
    references = [draw_text() for _ in range(40)]
    roots = {line[0] for text in references for line in text.splitlines()}
    figures = score(answers, references)
    counts: Counter = Counter()
    for text in answers:
        paths = [line.split(" -> ") for line in text.splitlines() if line[0] in roots]
        counts.update({edge for path in paths for edge in pairwise(path)})
    graph, _ = read_answers(answers, roots)
    assert edges_of(graph) == counts
    literal = literal_by_loops(graph, build_graph(references))
    assert {key: figures[key] for key in FIGURES} == pytest.approx(literal)
    order = rng.sample(range(40), 40)
    assert score([answers[i] for i in order], [references[i] for i in order]) == figures


def test_score_of_perfect_and_empty_answers():
    perfect = {"lines": 3, "well_formed": 1, "nodes": 4, "edges": 3, **dict.fromkeys(FIGURES, 1)}
    answers = [text.removesuffix("Top\n") for text in REFERENCES]  # a root alone is not a path
    assert score(answers, REFERENCES) == perfect
    empty = {"lines": 0, "well_formed": 0, "nodes": 0, "edges": 0, **dict.fromkeys(FIGURES, 0)}
    assert score(["", " \n"], REFERENCES) == empty


def test_a_reference_that_is_not_a_path_is_named():
    with pytest.raises(UserError, match=r"graph: reference 2 of 2.*'A -> '"):
        score(["A -> B", "A -> B"], ["A -> B", "A -> "])


# --- the figures of exact names


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
