"""The graph of category paths by hand and against loops, and its file against networkx."""

import gzip
import json
import math
import random
from collections import Counter

import networkx
import pytest

from helpers.graphs import edges_of
from minilora.errors import UserError
from minilora.evaluation.category_graph import (
    build_graph,
    parse_paths,
    read_graph,
    read_rooted_graph,
    root_title,
    title_of,
    write_graph,
)

# --- lines


@pytest.mark.parametrize(
    ("text", "paths", "num_lines"),
    [
        ("", [], 0),
        ("\n  \n\t\n", [], 0),
        ("A -> B\n\nA -> B -> C\n", [["A", "B"], ["A", "B", "C"]], 2),
        ("  A  ->  B \r\n", [["A", "B"]], 1),
        ("A\nother", [], 2),  # the root alone is not a path
        (" A \n", [], 1),
        ("A -> \nA ->  -> B\n -> B\n -> \nother -> ", [], 5),
        ("A->B\nA ->B\nA-> B", [], 3),
        ("A -> A", [["A", "A"]], 1),
        ("B -> A\n1. A -> B\na -> B\nAA -> B", [], 4),  # from another root
        ("A -> 物理学 -> 물리학 -> e\u0301 😀", [["A", "物理学", "물리학", "e\u0301 😀"]], 1),
        (
            "A -> line\u2028separator -> nul\x00 -> x\x0by -> a\x85b",
            [["A", "line\u2028separator", "nul\x00", "x\x0by", "a\x85b"]],
            1,
        ),
        ("A -> -> B", [["A", "-> B"]], 1),
    ],
)
def test_parse_paths_from_a_root(text, paths, num_lines):
    assert parse_paths(text, {"A", "unused"}) == (paths, num_lines)


def test_parse_paths_without_roots_takes_all_of_two_names():
    assert parse_paths("A\nB -> C\n -> D\n-> -> E") == ([["B", "C"], ["->", "E"]], 4)


def test_weights_count_texts():
    """An edge counts once in a text, however many of its lines hold it."""
    texts = ["A -> B -> C\nA -> B\nbad\n", "A -> B -> A -> B\nA", "X", "C -> ", "A -> B -> C"]
    graph = build_graph(texts, "A")
    assert edges_of(graph) == {("A", "B"): 3, ("B", "C"): 2, ("B", "A"): 1}
    assert set(graph) == {"A", "B", "C"}
    assert graph.graph["root"] == "A"
    assert type(build_graph([])) is networkx.DiGraph and "root" not in build_graph([]).graph


def test_only_lines_from_the_root_count():
    texts = ["A -> B\nB -> C\n  A -> D", "X -> A -> B", "A"]
    assert edges_of(build_graph(texts, "A")) == {("A", "B"): 1, ("A", "D"): 1}
    assert edges_of(build_graph(texts)) == {
        ("A", "B"): 2,
        ("B", "C"): 1,
        ("A", "D"): 1,
        ("X", "A"): 1,
    }
    assert len(build_graph(["A", "A\nB"], "A")) == 0
    nothing = build_graph(texts, "absent")
    assert len(nothing) == 0 and nothing.graph["root"] == "absent"


@pytest.mark.parametrize("seed", range(20))
def test_the_graph_is_that_of_loops(seed):
    """Random texts with cycles, self-loops, repeated lines and other roots."""
    rng = random.Random(seed)
    texts = []
    for _ in range(rng.randrange(12)):
        lines = [" -> ".join(rng.choices("RRRABC物é", k=rng.randint(1, 5))) for _ in range(4)]
        texts.append("\n".join(lines))

    weights: Counter = Counter()
    names = set()
    for text in texts:
        edges = set()
        for line in text.split("\n"):
            path = line.split(" -> ")
            if path[0] == "R":
                names |= set(path) if len(path) > 1 else set()
                edges |= {(path[i], path[i + 1]) for i in range(len(path) - 1)}
        for edge in edges:
            weights[edge] += 1
    graph = build_graph(texts, "R")
    assert edges_of(graph) == weights and set(graph) == names
    assert all(title_of(graph, name) == graph.nodes[name]["title"] == name for name in names)


def test_a_node_without_title_is_called_by_its_id():
    graph = networkx.DiGraph()
    graph.add_node(7)
    graph.add_node(8, title="eight")
    assert (title_of(graph, 7), title_of(graph, 8)) == ("7", "eight")
    assert title_of(graph, 9) == "9"  # it is not there
    graph.graph["root"] = 8
    assert root_title(graph) == "eight"


# --- the file


def test_a_graph_survives_being_written_and_read(tmp_path):
    texts = ["1 -> 物理学 -> 물리학 -> café 😀", "1", '1 -> q"uote -> back\\slash']
    texts += ["1 -> 2\n1 -> 2", "1 -> 2"]
    graph = build_graph(texts, "1")
    path = tmp_path / "graph.json"
    path.write_text("old")
    write_graph(graph, path)
    assert [p.name for p in tmp_path.iterdir()] == ["graph.json"]  # nothing temporary stays

    again = read_graph(path)
    assert edges_of(again) == edges_of(graph)
    assert list(again) == list(graph) and again.graph == {"root": "1"}
    assert dict(again.nodes(data="title")) == {name: name for name in graph}
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
        '{"directed": true, "nodes": [{"id": 1, "title": 2}], "links": []}',
        "[" * 200_000,
    ],
)
def test_a_broken_file_is_named(tmp_path, text):
    path = tmp_path / "graph.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"graph\.json.*"):
        read_graph(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"links": [{"source": 0, "target": 99}]}, "node 99, which is not under"),
        ({"graph": [["root", 0]]}, '"graph".* is not an object'),
        ({"nodes": [{"id": 0, "title": "\ud800x"}, {"id": 1}]}, "node 0: the title .*not text"),
        ({"nodes": [{"id": "\udfff"}, {"id": 0}, {"id": 1}]}, "the id is not text"),
        ({"weight": 10**400}, "edge 0 -> 1: the weight 10+ is not a number"),
        ({"weight": "3"}, "the weight '3' is not"),
        ({"weight": -1}, "the weight -1 is not"),
        ({"weight": math.nan}, "the weight nan is not"),
        ({"weight": None}, "the weight None is not"),
    ],
)
def test_a_wrong_part_of_a_graph_is_named(tmp_path, changes, message):
    path = tmp_path / "graph.json"
    edge = {"source": 0, "target": 1, "weight": changes.pop("weight", 2)}
    links = {"directed": True, "multigraph": False, "graph": {}, "links": [edge]}
    links["nodes"] = [{"id": 0}, {"id": 1}]
    path.write_text(json.dumps(links | changes))
    with pytest.raises(UserError, match=rf"graph\.json: .*{message}"):
        read_graph(path)


@pytest.mark.parametrize("key", ["links", "edges"])
def test_either_key_of_node_link_json_is_read(tmp_path, key):
    path = tmp_path / "graph.json"
    graph = networkx.DiGraph([(1, 2), (2, 1)], root=1)
    graph.nodes[1]["title"] = "one"
    path.write_text(json.dumps(networkx.node_link_data(graph, edges=key)))
    found = read_rooted_graph(path)
    assert set(found.edges) == {(1, 2), (2, 1)} and title_of(found, found.graph["root"]) == "one"


def test_a_compressed_file_is_read_and_a_broken_one_is_named(tmp_path):
    plain, path = tmp_path / "graph.json", tmp_path / "graph.json.gz"
    write_graph(build_graph(["A -> B"]), plain)
    content = gzip.compress(plain.read_bytes())
    path.write_bytes(content)
    assert edges_of(read_graph(path)) == {("A", "B"): 1}
    for broken in (content[:-9], content[:20] + b"x" * 20, plain.read_bytes()):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"^my graph: expected a directed graph"):
            read_graph(path, shown="my graph")


def test_a_root_may_be_the_title_of_a_node(tmp_path):
    """Its id is found when the file is read, so all that follows knows ids only."""
    path = tmp_path / "graph.json"
    graph = networkx.DiGraph([(0, 1), (1, (2, 3)), (1, "Things of 1")], root="Things")
    for node, title in ((0, "Things"), (1, "animal"), ((2, 3), "animal")):
        graph.nodes[node]["title"] = title
    for root, expected in (
        ("Things", 0),
        ("Things of 1", "Things of 1"),
        (1, 1),
        ((2, 3), (2, 3)),  # written as a list
    ):
        graph.graph["root"] = root
        write_graph(graph, path)
        assert read_graph(path).graph["root"] == expected
        assert title_of(read_rooted_graph(path), expected) == title_of(graph, expected)
    for root, message in (
        ("animal", "title of 2 nodes"),
        ("thing", "not the id"),
        ([[0]], "nor a"),
    ):
        graph.graph["root"] = root
        write_graph(graph, path)
        with pytest.raises(UserError, match=rf"graph\.json: the root .*{message}"):
            read_graph(path)

    write_graph(build_graph([], "Things"), path)
    assert read_graph(path).graph == {"root": "Things"}
    with pytest.raises(UserError, match=r"graph\.json: there is no root: the graph has no nodes"):
        read_rooted_graph(path)


@pytest.mark.parametrize("root", [None, "absent", ["A"], {}])
def test_a_graph_without_root_is_named(tmp_path, root):
    path = tmp_path / "graph.json"
    graph = build_graph(["A -> B"])
    if root is not None:
        graph.graph["root"] = root
    write_graph(graph, path)
    with pytest.raises(UserError, match=r"graph\.json: .*root"):
        read_rooted_graph(path)
