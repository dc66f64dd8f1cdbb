"""The metrics of two graphs against loops, against cases done by hand, and against OLLM's code."""

import itertools
import json
import math
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import networkx
import numpy as np
import pytest

from helpers.embedding import LetterEmbedder
from minilora.errors import UserError
from minilora.evaluation import assignment, ontology, soft_metrics
from minilora.evaluation.assignment import best_assignment
from minilora.evaluation.category_graph import read_graph, write_graph
from minilora.evaluation.motifs import count_motifs, motif_distance
from minilora.evaluation.ontology import METRICS, Args, compare_graphs

HERE = Path(__file__).parent
WORDNET, ARXIV = HERE / "sciences_wordnet.json", HERE / "sciences_arxiv.json"

SOFT = ("fuzzy", "continuous", "graph")
FIGURES = [
    f"{metric}_{kind}" for metric in ("literal", *SOFT) for kind in ("f1", "precision", "recall")
] + ["motif_distance"]
TITLES = [
    "Physics",
    "Optics",
    "Physique",
    "物理学",
    "물리학",
    "e\u0301 😀",
    "",
    "Photography",
    "Art",
]


class GivenVectors:
    """An embedder that looks titles up in a table."""

    def __init__(self, vectors: dict[str, list[float]]) -> None:
        self.vectors = vectors

    def embed(self, titles):
        return np.array([self.vectors[title] for title in titles], dtype=np.float32)


def graph_of(*edges: tuple[str, str]) -> networkx.DiGraph:
    """Return a graph whose nodes are called by their ids."""
    return networkx.DiGraph(list(edges))


def draw_graph(rng: random.Random, nodes: int, edges: int) -> networkx.DiGraph:
    """Draw a graph with equal titles, self-loops, cycles and nodes without edges."""
    graph = networkx.DiGraph()
    for node in range(nodes):
        graph.add_node(node, title=rng.choice(TITLES))
    for _ in range(edges if nodes else 0):
        graph.add_edge(rng.randrange(nodes), rng.randrange(nodes), weight=rng.randint(1, 9))
    return graph


# --- the same by loops


def cosine(a, b) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def best_by_permutations(similarities: list[list[float]]) -> float:
    """Try every assignment of the rows of a matrix to its columns, or the other way round."""
    if len(similarities) > len(similarities[0]):
        similarities = [list(column) for column in zip(*similarities, strict=True)]
    best = -math.inf
    for columns in itertools.permutations(range(len(similarities[0])), len(similarities)):
        total = sum(row[column] for row, column in zip(similarities, columns, strict=True))
        best = max(best, total)
    return best


def propagated_by_loops(graph: networkx.DiGraph, vectors: dict) -> dict:
    for _ in range(2):
        passed = {}
        for v in graph:
            parents = {u for u in graph if graph.has_edge(u, v)} | {v}
            total = [0.0] * 16
            for u in parents:
                terms = len({w for w in graph if graph.has_edge(w, u)} | {u})
                scale = 1 / math.sqrt(terms * len(parents))
                total = [t + scale * x for t, x in zip(total, vectors[u], strict=True)]
            passed[v] = total
        vectors = passed
    return vectors


def figures_by_loops(predicted: networkx.DiGraph, reference: networkx.DiGraph) -> dict:
    """Compute all but motif_distance, in float64 and pair by pair."""
    ours, theirs = list(predicted.edges), list(reference.edges)
    titles = [dict(graph.nodes(data="title")) for graph in (predicted, reference)]
    vectors = []
    for names in titles:
        vectors.append({n: LetterEmbedder().embed([t])[0].tolist() for n, t in names.items()})

    our_titles = {(titles[0][u], titles[0][v]) for u, v in ours}
    their_titles = {(titles[1][u], titles[1][v]) for u, v in theirs}
    hits = sum(edge in their_titles for edge in our_titles)
    found = {"literal": (hits / max(len(our_titles), 1), hits / max(len(their_titles), 1))}

    similarity = [
        [
            min(cosine(vectors[0][u], vectors[1][a]), cosine(vectors[0][v], vectors[1][b]))
            for a, b in theirs
        ]
        for u, v in ours
    ]
    found["fuzzy"] = found["continuous"] = (0.0, 0.0)
    if ours and theirs:
        right = sum(any(s >= 0.436 for s in row) for row in similarity)
        matched = sum(any(s >= 0.436 for s in column) for column in zip(*similarity, strict=True))
        found["fuzzy"] = (right / len(ours), matched / len(theirs))
        total = best_by_permutations(similarity)
        found["continuous"] = (total / len(ours), total / len(theirs))

    found["graph"] = (0.0, 0.0)
    if len(predicted) and len(reference):
        a = propagated_by_loops(predicted, vectors[0])
        b = propagated_by_loops(reference, vectors[1])
        total = best_by_permutations([[cosine(a[n], b[m]) for m in reference] for n in predicted])
        found["graph"] = (total / len(predicted), total / len(reference))

    figures = {}
    for metric, (precision, recall) in found.items():
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        figures |= {f"{metric}_f1": f1, f"{metric}_precision": precision}
        figures[f"{metric}_recall"] = recall
    return figures


@pytest.mark.parametrize("seed", range(60))
def test_the_figures_are_those_of_loops(seed):
    rng = random.Random(seed)
    predicted = draw_graph(rng, rng.randrange(6), rng.randrange(6))
    reference = draw_graph(rng, rng.randrange(7), rng.randrange(7))
    figures = compare_graphs(predicted, reference, LetterEmbedder())
    assert list(figures) == FIGURES
    distance = figures.pop("motif_distance")
    assert figures == pytest.approx(figures_by_loops(predicted, reference), abs=1e-5)
    assert distance == pytest.approx(distance_by_loops(predicted, reference))
    assert all(type(figure) is float for figure in [distance, *figures.values()])


@pytest.mark.parametrize("seed", range(5))
def test_swapping_the_graphs_swaps_precision_and_recall(seed):
    rng = random.Random(seed)
    graphs = draw_graph(rng, 40, 60), draw_graph(rng, 30, 25)
    figures = compare_graphs(*graphs, LetterEmbedder())
    swapped = compare_graphs(*reversed(graphs), LetterEmbedder())
    for metric in ("literal", *SOFT):
        assert swapped[f"{metric}_precision"] == pytest.approx(figures[f"{metric}_recall"])
        assert swapped[f"{metric}_recall"] == pytest.approx(figures[f"{metric}_precision"])
        assert swapped[f"{metric}_f1"] == pytest.approx(figures[f"{metric}_f1"])
    assert swapped["motif_distance"] == pytest.approx(figures["motif_distance"])


def test_a_graph_is_like_itself():
    """Also if its nodes come in another order, and with other ids."""
    rng = random.Random(0)
    graph = draw_graph(rng, 30, 50)
    again = networkx.DiGraph()
    for node in sorted(graph, key=lambda _: rng.random()):
        again.add_node(f"id {node}", title=graph.nodes[node]["title"])
    again.add_edges_from((f"id {u}", f"id {v}") for u, v in graph.edges)
    best = dict.fromkeys(FIGURES, 1.0) | {"motif_distance": 0.0}
    assert compare_graphs(graph, again, LetterEmbedder()) == pytest.approx(best, abs=1e-5)


def test_an_empty_graph_has_no_good_figure():
    nothing, something = networkx.DiGraph(), graph_of(("A", "B"), ("B", "C"))
    nodes_alone = networkx.DiGraph()
    nodes_alone.add_nodes_from("AB")
    worst = dict.fromkeys(FIGURES, 0.0) | {"motif_distance": 1.0}
    assert compare_graphs(nothing, something, LetterEmbedder()) == worst
    assert compare_graphs(something, nothing, LetterEmbedder()) == worst
    assert compare_graphs(nothing, nothing, LetterEmbedder()) == dict.fromkeys(FIGURES, 0.0)
    figures = compare_graphs(nodes_alone, something, LetterEmbedder())
    assert figures["graph_precision"] > 0  # it compares nodes
    assert {figures[f"{metric}_f1"] for metric in ("literal", "fuzzy", "continuous")} == {0}


# --- by hand


def test_literal_goes_by_titles_and_direction():
    predicted = graph_of((1, 2), (1, 3), (4, 2), (2, 1))
    reference = graph_of(("x", "y"), ("x", "z"), ("y", "z"))
    for graph, titles in (
        (predicted, {1: "A", 2: "B", 3: "C", 4: "A"}),
        (reference, {"x": "A", "y": "B", "z": "D"}),
    ):
        networkx.set_node_attributes(graph, titles, "title")
    # A -> B (twice: one pair of titles), A -> C, B -> A; A -> B, A -> D, B -> D
    figures = compare_graphs(predicted, reference, None, ("literal",))
    assert figures == {"literal_f1": 1 / 3, "literal_precision": 1 / 3, "literal_recall": 1 / 3}


def test_fuzzy_needs_both_ends_and_continuous_takes_an_edge_once():
    angles = {"a": 0, "a near": 60, "a far": 70, "b": 0, "b near": 30}
    vectors = {}
    for title, angle in angles.items():
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        vectors[title] = [cos, sin, 0, 0] if title[0] == "a" else [0, 0, 5 * cos, 5 * sin]
    predicted = graph_of(("a", "b"), ("a near", "b"), ("a far", "b"))
    reference = graph_of(("a", "b near"))
    figures = compare_graphs(predicted, reference, GivenVectors(vectors), SOFT[:2])
    # min(cos 0°, cos 30°), min(cos 60°, cos 30°) = 0.5 >= 0.436, min(cos 70°, ...) = 0.34
    precision = math.cos(math.radians(30)) / 3
    assert figures == pytest.approx(
        {
            "fuzzy_f1": 2 * (2 / 3) / (2 / 3 + 1),
            "fuzzy_precision": 2 / 3,
            "fuzzy_recall": 1.0,
            "continuous_f1": 2 * precision * 3 * precision / (4 * precision),
            "continuous_precision": precision,
            "continuous_recall": 3 * precision,
        }
    )


def test_graph_propagates_twice_and_from_parents_only():
    """A -> B -> C with unit vectors: sums by hand, with d = 1, 2, 2."""
    graph = graph_of(("A", "B"), ("B", "C"))
    once_b = np.array([1 / math.sqrt(2), 1 / 2, 0])
    once_c = np.array([0, 1 / 2, 1 / 2])
    twice_b = np.array([1 / math.sqrt(2), 0, 0]) + once_b / 2
    twice_c = once_b / 2 + once_c / 2
    expected = [[1, 0, 0], twice_b / np.linalg.norm(twice_b), twice_c / np.linalg.norm(twice_c)]
    passed = soft_metrics.propagate(graph, np.eye(3, dtype=np.float32))
    np.testing.assert_allclose(passed, expected, atol=1e-6)

    looped = graph_of(("A", "A"), ("A", "B"), ("B", "C"))
    np.testing.assert_array_equal(passed, soft_metrics.propagate(looped, np.eye(3)))


def test_vectors_that_cancel_out_are_like_nothing():
    vectors = GivenVectors({"A": [1.0, 0.0], "B": [0.0, 0.0]})
    figures = compare_graphs(graph_of(("A", "B")), graph_of(("A", "B")), vectors, SOFT)
    # node A is like itself, and so is B, which has got A's vector; the edge's B has none
    assert figures["graph_f1"] == pytest.approx(1) and figures["continuous_f1"] == 0


# --- against OLLM's code


def test_the_figures_are_those_of_ollms_code():
    """Its functions ran on these files once, with these vectors (sciences_figures.json)."""
    theirs = json.loads((HERE / "sciences_figures.json").read_text(encoding="utf-8"))
    embedder = GivenVectors(theirs["vectors"])
    predicted, reference = read_graph(WORDNET), read_graph(ARXIV)
    titles = [title for _, title in predicted.nodes(data="title")]
    assert titles.count("Physics") == 2  # WordNet has two categories of this name
    figures = compare_graphs(predicted, reference, embedder, ("literal", *SOFT))
    assert figures == pytest.approx(theirs["figures"], abs=1e-6)
    distance = motif_distance(predicted, reference)
    assert distance == pytest.approx(distance_by_loops(predicted, reference))


# --- assignment


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (5, 3), (4, 4), (1, 6)])
@pytest.mark.parametrize("block_rows", [1, 2, 100])
def test_assignment_is_the_best_of_all_whatever_the_blocks(shape, block_rows, monkeypatch):
    monkeypatch.setattr(assignment, "BLOCK_ROWS", block_rows)
    matrix = np.random.default_rng(sum(shape)).uniform(-1, 1, shape).astype(np.float32)
    asked = []

    def rows_of(rows: slice) -> np.ndarray:
        asked.append(len(matrix[rows]))
        return matrix[rows]

    best = best_assignment(rows_of, shape)
    assert best == pytest.approx(best_by_permutations(matrix.tolist()))
    assert sum(asked) == shape[0] and max(asked) <= block_rows


def test_identical_items_are_not_always_assigned_to_each_other():
    def direction(degrees: float) -> list[float]:
        return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]

    ours = np.array([direction(0), direction(30)])
    theirs = np.array([direction(0), direction(-30)])
    best = best_assignment(lambda rows: ours[rows] @ theirs.T, (2, 2))
    assert best == pytest.approx(2 * math.cos(math.radians(30)))


def test_what_costs_too_much_is_left_out_and_said(monkeypatch, capsys):
    edges = [("A", "B"), ("A", "C"), ("B", "D")]
    predicted, reference = graph_of(*edges, ("C", "E")), graph_of(*edges)
    monkeypatch.setattr(assignment, "MAX_COST", 3 * 3 * 4)  # n^2 m of the edges
    figures = compare_graphs(predicted, reference, LetterEmbedder())
    assert {key for key, figure in figures.items() if figure is None} == {
        "graph_f1",
        "graph_precision",
        "graph_recall",
    }
    message = capsys.readouterr().err
    assert message.startswith("graph is left out: to assign 5 to 4 nodes") and "80" in message

    monkeypatch.setattr(assignment, "MAX_COST", 3 * 3 * 4 - 1)
    figures = compare_graphs(predicted, reference, LetterEmbedder())
    assert figures["continuous_f1"] is None and figures["fuzzy_f1"] is not None
    assert "continuous is left out: to assign 4 to 3 edges" in capsys.readouterr().err
    assert ontology.figures_table(figures).splitlines()[3].split() == ["continuous", *"---"]


def test_the_limit_is_ollms():
    assert assignment.is_affordable((20_000, 20_000))
    assert not assignment.is_affordable((20_001, 20_000))


def test_an_assignment_that_takes_long_or_much_memory_is_said_before(monkeypatch, capsys):
    assert assignment.cost_note("graph", "nodes", (4_000, 4_000)) is None
    note = assignment.cost_note("graph", "nodes", (5_000, 4_700))
    assert note is not None and "5,000 to 4,700 nodes may take minutes" in note
    assert assignment.is_affordable((5_000, 4_700))

    wide = (1_100, 2**20)  # few steps, but a large matrix
    assert assignment.is_affordable((1_000, 2**20)) and not assignment.is_affordable(wide)
    note = assignment.cost_note("graph", "nodes", wide)
    assert note is not None and "takes 8.6 GiB of memory, and the limit is 8.0 GiB" in note

    # before the work, and not only where it is watched on a terminal
    monkeypatch.setattr(assignment, "SLOW_COST", 7)
    graph = graph_of(("A", "B"), ("B", "C"))

    class Stop(Exception):
        pass

    def embed(titles):
        raise Stop

    embedder = LetterEmbedder()
    monkeypatch.setattr(embedder, "embed", embed)
    with pytest.raises(Stop):
        compare_graphs(graph, graph, embedder, ["continuous", "literal"])
    message = capsys.readouterr().err
    assert message == "continuous: to assign 2 to 2 edges may take minutes (n²m = 8 steps)\n"


# --- motifs


def motifs_by_loops(graph: networkx.DiGraph) -> Counter:
    """Look at every three nodes; a shape is the least of its six adjacency matrices."""
    motifs: Counter = Counter()
    for nodes in itertools.combinations(graph, 3):
        links = {(u, v) for u in nodes for v in nodes if u != v and graph.has_edge(u, v)}
        if len({frozenset(link) for link in links}) < 2:
            continue  # not connected
        shapes = []
        for order in itertools.permutations(nodes):
            shapes.append(tuple((u, v) in links for u in order for v in order))
        motifs[min(shapes)] += 1
    return motifs


def distance_by_loops(predicted: networkx.DiGraph, reference: networkx.DiGraph) -> float:
    ours, theirs = motifs_by_loops(predicted), motifs_by_loops(reference)
    if not ours or not theirs:
        return float(bool(ours) != bool(theirs))
    shares = []
    for motif in {*ours, *theirs}:
        shares.append(abs(ours[motif] / sum(ours.values()) - theirs[motif] / sum(theirs.values())))
    return sum(shares) / 2


@pytest.mark.parametrize("seed", range(20))
def test_motifs_are_those_of_loops(seed):
    rng = random.Random(seed)
    graph = draw_graph(rng, 12, rng.choice([5, 12, 25, 60, 120]))
    assert sorted(count_motifs(graph).values()) == sorted(motifs_by_loops(graph).values())
    other = draw_graph(rng, 10, 20)
    assert motif_distance(graph, other) == pytest.approx(distance_by_loops(graph, other))


def test_there_are_thirteen_motifs():
    pairs = list(itertools.permutations("ABC", 2))
    shapes = {}
    for size in range(7):
        for edges in itertools.combinations(pairs, size):
            found = count_motifs(graph_of(*edges))
            by_loops = motifs_by_loops(graph_of(*edges))
            assert len(found) == len(by_loops)
            if found:
                shapes[next(iter(by_loops))] = next(iter(found))
    assert len(shapes) == len(set(shapes.values())) == 13


def test_motifs_agree_with_a_triad_census():
    """networkx names triads; its counts of the 13 connected ones, on graphs with hubs."""
    rng = random.Random(3)
    graph = networkx.DiGraph()
    for node in range(1, 300):
        graph.add_edge(rng.randrange(1 + node // 10), node)
    graph.add_edges_from((rng.randrange(40), rng.randrange(40)) for _ in range(300))
    graph.remove_edges_from(list(networkx.selfloop_edges(graph)))
    census = networkx.triadic_census(graph)
    connected = [count for name, count in census.items() if name not in ("003", "012", "102")]
    assert sorted(count_motifs(graph).values()) == sorted(count for count in connected if count)


def test_a_hub_costs_its_edges_and_not_its_pairs():
    star = networkx.DiGraph((0, child) for child in range(1, 20_001))
    assert list(count_motifs(star).values()) == [20_000 * 19_999 // 2]


def test_motif_distance_by_hand():
    chain = graph_of(("A", "B"), ("B", "C"))  # one chain
    fork = graph_of(("A", "B"), ("A", "C"))  # one fork
    tree = graph_of(("A", "B"), ("B", "C"), ("B", "D"))  # two chains and a fork
    assert motif_distance(chain, fork) == 1
    assert motif_distance(tree, chain) == pytest.approx(1 / 3)
    assert motif_distance(chain, graph_of(*chain.edges, ("B", "B"))) == 0  # a self-loop
    assert motif_distance(chain, graph_of(*chain.edges, ("A", "C"))) == 1  # induced: no chain


# --- which metrics


def test_only_what_is_asked_is_computed():
    embedder = LetterEmbedder()
    figures = compare_graphs(graph_of(("A", "B")), graph_of(("A", "B")), embedder, ["motif"])
    assert figures == {"motif_distance": 0.0} and embedder.asked == []
    with pytest.raises(ValueError, match="embedder"):
        compare_graphs(graph_of(("A", "B")), graph_of(("A", "B")), None, ["fuzzy"])
    with pytest.raises(ValueError, match="exact"):
        compare_graphs(graph_of(("A", "B")), graph_of(("A", "B")), None, ["exact"])


# --- the command


@pytest.fixture
def letters(monkeypatch) -> list[str]:
    """Let the command embed by letters; returns the names of the models that it asks for."""
    names: list[str] = []

    def load(name: str) -> LetterEmbedder:
        names.append(name)
        return LetterEmbedder()

    monkeypatch.setattr(ontology, "load_embedder", load)
    return names


def test_the_command_prints_a_table_or_one_object(letters, capsys):
    ontology.main(Args(str(WORDNET), str(ARXIV), json=True))
    figures = json.loads(capsys.readouterr().out)
    assert list(figures) == FIGURES
    expected = compare_graphs(read_graph(WORDNET), read_graph(ARXIV), LetterEmbedder())
    assert figures == pytest.approx(expected)
    assert letters == ["sentence-transformers/all-MiniLM-L6-v2"]

    ontology.main(Args(str(WORDNET), str(ARXIV)))
    sizes, heading, *lines, motif = capsys.readouterr().out.splitlines()
    assert sizes == "predicted: 90 nodes, 90 edges; reference: 44 nodes, 45 edges"
    assert heading.split() == ["F1", "precision", "recall"]
    for metric, line in zip(METRICS, lines, strict=False):
        values = [f"{figures[f'{metric}_{kind}']:.3f}" for kind in ("f1", "precision", "recall")]
        assert line.split() == [metric, *values]
    assert motif.split() == ["motif", "distance", f"{figures['motif_distance']:.3f}"]


def test_the_command_prunes_only_if_asked(letters, tmp_path, capsys):
    graph = graph_of(("R", "A"), ("R", "B"), ("A", "C"))
    networkx.set_edge_attributes(graph, dict(zip(graph.edges, (9, 1, 4), strict=True)), "weight")
    graph.graph["root"] = "R"
    path = str(tmp_path / "graph.json")
    write_graph(graph, path)

    def recall(**flags) -> float:
        ontology.main(Args(path, path, metrics=("literal",), json=True, **flags))
        return json.loads(capsys.readouterr().out)["literal_recall"]

    assert recall() == 1
    assert recall(absolute=0.5) == pytest.approx(2 / 3)
    assert recall(relative=0.1) == pytest.approx(2 / 3)
    # the code's rule also takes a node's only edge: A -> C
    assert recall(relative=0.1, prune_rule="code") < 2 / 3
    assert recall(prune="arxiv") == pytest.approx(1 / 3)
    assert letters == []  # literal needs no embedder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"prune": "arxiv", "relative": 0.1}, "--prune brings its own thresholds"),
        ({"prune_rule": "code"}, "--prune_rule needs"),
        ({"prune_rule": "paper"}, "--prune_rule needs"),
        ({"absolute": 1.5}, "--absolute 1.5: expected a number from 0 to 1"),
        ({"relative": math.nan}, "--relative nan"),
        ({"metrics": ()}, "--metrics"),
        ({"predicted": "nowhere.json"}, "nowhere.json"),
    ],
)
def test_bad_arguments_are_named(flags, message, letters):
    arguments = {"predicted": str(WORDNET), "reference": str(ARXIV)} | flags
    with pytest.raises(UserError, match=message):
        ontology.main(Args(**arguments))
    assert letters == []  # nothing slow has begun


def test_a_root_given_as_title_adds_no_edges(letters, tmp_path, capsys):
    """Pruned by nothing, a graph is itself."""
    graph = networkx.DiGraph([(0, 1), (1, 2)], root="Things")
    for node, title in enumerate(["Things", "animal", "dog"]):
        graph.nodes[node]["title"] = title
    path = str(tmp_path / "graph.json")
    write_graph(graph, path)
    ontology.main(Args(path, path, absolute=0.0, metrics=("literal",), json=True))
    printed = capsys.readouterr()
    assert json.loads(printed.out)["literal_f1"] == 1
    assert "2 of 2 edges are left" in printed.err


def test_graphs_of_different_roots_are_refused(letters, tmp_path):
    other = read_graph(ARXIV)
    other.nodes["arXiv"]["title"] = "Things"
    write_graph(other, tmp_path / "other.json")
    with pytest.raises(UserError, match="root 'Science' and the reference 'Things'"):
        ontology.main(Args(str(WORDNET), str(tmp_path / "other.json")))
    del other.graph["root"]
    write_graph(other, tmp_path / "other.json")
    ontology.main(Args(str(WORDNET), str(tmp_path / "other.json"), metrics=("motif",)))


@pytest.mark.parametrize("library", ["networkx", "scipy", "sentence_transformers"])
def test_a_missing_library_is_named_with_its_remedy(library, monkeypatch):
    found = ontology.importlib.util.find_spec

    def find_spec(name: str, *arguments):
        return None if name == library else found(name, *arguments)

    monkeypatch.setattr(ontology.importlib.util, "find_spec", find_spec)
    with pytest.raises(UserError, match=r"pip install 'minilora\[ontology\]'") as error:
        ontology.main(Args(str(WORDNET), str(ARXIV)))
    assert library.replace("_", "-") in str(error.value)
    if library == "networkx":
        with pytest.raises(UserError, match="networkx"):
            ontology.check_installed(["literal"])
    else:
        ontology.check_installed(["literal", "motif"])


@pytest.mark.system
def test_the_command_as_a_process():
    command = [sys.executable, "-m", "minilora.evaluation.ontology", str(WORDNET), str(ARXIV)]
    command += ["--json", "--metrics", "literal", "motif"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["literal_precision"] == pytest.approx(5 / 89)

    command += ["graph", "--embedder", "./nowhere"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("error: embedder: model './nowhere': no such directory")
    assert run.stderr.count("\n") == 1
