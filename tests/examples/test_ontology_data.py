"""examples/ontology/prepare.py: sources, splits, paths and their limits, and what it refuses."""

import functools
import gzip
import importlib
import itertools
import json
import random
import re
import runpy
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import networkx
import pytest

from helpers.hub_server import running_hub
from minilora.data.paths import paths_of
from minilora.errors import UserError
from minilora.evaluation.category_graph import read_graph

FOLDER = Path(__file__).resolve().parents[2] / "examples/ontology"
SPLITS = ("train", "eval", "test")


@pytest.fixture
def ontology(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules of examples/ontology by name; they import each other as scripts do."""
    monkeypatch.syspath_prepend(FOLDER)
    names = ("graph_files", "linearize", "prepare", "wordnet")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def page(key: str) -> dict[str, str]:
    return {"id": key, "title": f"Page {key}", "abstract": f"About {key}."}


def page_graph(edges: list[tuple], pages: dict[Any, list[str]], root: Any = 0) -> networkx.DiGraph:
    """Return a graph of categories; `pages` has the ids of the pages of a category."""
    graph = networkx.DiGraph(edges, root=root)
    for node in graph:
        graph.nodes[node]["title"] = f"Category {node}"
        graph.nodes[node]["pages"] = [page(key) for key in pages.get(node, [])]
    return graph


def write_graph(graph: networkx.DiGraph, path: Path, edges: str = "links") -> Path:
    content = json.dumps(networkx.node_link_data(graph, edges=edges)).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def three_tops(first: int = 100) -> networkx.DiGraph:
    """Return a root with three categories below it, each with five more, and a page in each.

    Ids fall in the order of the graph, which is thus not the order of a set of them.
    """
    ids = itertools.count(first, -1)
    root = next(ids)
    edges = []
    for _ in range(3):
        top = next(ids)
        edges += [(root, top), *((top, next(ids)) for _ in range(5))]
    nodes = [child for _, child in edges]
    return page_graph(edges, {node: [f"p{node}"] for node in nodes}, root)


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prepared(ontology: SimpleNamespace, source: object, out: Path, **flags) -> dict[str, list]:
    """Run the command; return the rows of each split."""
    args = ontology.prepare.Args(str(source), out, **{"shares": (1, 1, 1), **flags})
    assert ontology.prepare.main(args) == 0
    return {name: read_rows(out / f"{name}.jsonl") for name in SPLITS}


# --- splits


def test_splits_have_tops_of_their_own_and_all_below_them(ontology, tmp_path):
    source = three_tops()
    source.add_edge(98, 96)  # within a split
    rows = prepared(ontology, write_graph(source, tmp_path / "graph.json"), tmp_path / "out")
    tops = []
    for name in SPLITS:
        graph = read_graph(tmp_path / f"out/{name}_graph.json")
        assert graph.graph["root"] == 100
        (top,) = graph.successors(100)
        tops.append(top)
        below = {100, top, *networkx.descendants(source, top)}
        assert set(graph.edges) == set(source.subgraph(below).edges)
        assert {row["id"] for row in rows[name]} == {f"p{node}" for node in below - {100}}
        titles = {f"Category {node}" for node in below}
        assert all(titles.issuperset(itertools.chain(*row["paths"])) for row in rows[name])
        paths = [paths_of(row) for row in rows[name]]  # valid rows of the format
        counts = Counter(
            edge for row in paths for edge in {e for p in row for e in itertools.pairwise(p)}
        )
        weights = {(u, v): graph.edges[u, v]["weight"] for u, v in graph.edges}
        assert {(f"Category {u}", f"Category {v}"): n for (u, v), n in weights.items()} == counts
    assert sorted(tops) == sorted(source.successors(100))


def test_files_do_not_depend_on_the_order_of_sets(ontology, tmp_path):
    """A set of these ids rises, and the graph's own order falls."""
    prepared(ontology, write_graph(three_tops(), tmp_path / "graph.json"), tmp_path / "out")
    for name in SPLITS:
        nodes = list(read_graph(tmp_path / f"out/{name}_graph.json"))
        assert len(nodes) == 7
        assert nodes == sorted(nodes, reverse=True) != list(set(nodes))


def test_drawn_rows_are_some_of_all_and_cut_the_graph(ontology, tmp_path):
    source = write_graph(three_tops(), tmp_path / "graph.json.gz")
    whole = prepared(ontology, source, tmp_path / "whole")
    drawn = prepared(ontology, source, tmp_path / "drawn", train_rows=2, test_rows=50)
    assert drawn["train"] == whole["train"][:2]
    assert (drawn["eval"], drawn["test"]) == (whole["eval"], whole["test"])
    graph = read_graph(tmp_path / "drawn/train_graph.json")
    edges = {edge for row in drawn["train"] for p in row["paths"] for edge in itertools.pairwise(p)}
    assert {(f"Category {u}", f"Category {v}") for u, v in graph.edges} == edges

    other = prepared(ontology, source, tmp_path / "other", seed=1)
    assert [row["id"] for row in other["train"]] != [row["id"] for row in whole["train"]]


# --- paths


@pytest.mark.parametrize("cutoff", [2, 3, 5])
def test_paths_are_all_simple_paths_of_a_random_graph(ontology, cutoff):
    draw = random.Random(cutoff)
    num_rows = 0
    for _ in range(40):
        edges = {(draw.randrange(7), draw.randrange(7)) for _ in range(draw.randrange(5, 22))}
        pages = {node: draw.sample("abcd", 2) * 2 for node in range(7)}  # each listed twice
        graph = page_graph([(0, 1), *edges], pages)
        limits = ontology.linearize.Limits(cutoff, 10**6, 10**6)
        rows = ontology.linearize.Linearizer(graph, limits).rows("0", shuffle_paths=False)

        expected = {}
        for key in "abcd":
            targets = [node for node in graph if node != 0 and key in pages[node]]
            find = functools.partial(networkx.all_simple_paths, graph, 0, cutoff=cutoff - 1)
            paths = [[f"Category {node}" for node in p] for t in targets for p in find(t)]
            if paths:
                expected[key] = sorted(paths)
        found = {row.values["id"]: sorted(row.values["paths"]) for row in rows}
        assert found == expected
        num_rows += len(found)
    assert num_rows > 50


def complete_graph(ontology) -> networkx.DiGraph:
    return page_graph(list(itertools.permutations(range(60), 2)), {59: ["p"]})


def test_a_complete_graph_of_60_nodes_is_cut_in_bounded_time_and_memory(ontology):
    graph = complete_graph(ontology)
    distances = dict.fromkeys(graph, 1) | {0: 0}
    find = functools.partial(ontology.linearize.find_paths, graph, [59], distances)
    start = time.process_time()
    few = find(ontology.linearize.Limits(8, 100, 10**6))
    assert (len(few.paths), few.cut_by) == (100, "max_paths")
    tracemalloc.start()
    many = find(ontology.linearize.Limits(8, 10**9, 20_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert many.cut_by == "max_steps"
    assert 300 < len(set(many.paths)) == len(many.paths) <= 20_000
    assert peak < 10_000_000
    whole = find(ontology.linearize.Limits(3, 59, 10**6))  # 58 by another node, and 1 straight
    assert (len(whole.paths), whole.cut_by) == (59, None)
    assert time.process_time() - start < 5


def test_cut_rows_and_pages_left_out_are_counted(ontology, tmp_path, capsys):
    source = three_tops()
    (top, *others) = source.successors(100)
    category = "c"
    # upwards from c, six ways lead nowhere, before the one to the root
    source.add_edges_from((f"dead end {i}", category) for i in range(6))
    source.add_edges_from((category, f"dead end {i}") for i in range(6))
    source.add_edges_from((node, category) for node in (top, *source.successors(others[0])))
    source.add_edge(others[0], category)
    for node in source:
        source.nodes[node].setdefault("title", f"Category {node}")
    source.nodes[category]["pages"] = [page("c")]
    file = write_graph(source, tmp_path / "graph.json")

    flags = {"train_rows": None, "seed": 0}
    prepared(ontology, file, tmp_path / "all", **flags)
    assert "cut" not in capsys.readouterr().out
    rows = prepared(ontology, file, tmp_path / "few", max_paths=1, **flags)
    printed = capsys.readouterr().out
    assert "  1 of these rows lack paths: cut at --max_paths 1\n" in printed
    assert all(len(row["paths"]) == 1 for name in SPLITS for row in rows[name])
    rows = prepared(ontology, file, tmp_path / "none", max_steps=6, **flags)
    assert "1 pages were left out: no path was found in --max_steps 6" in capsys.readouterr().out
    assert all(row["id"] != "c" for name in SPLITS for row in rows[name])


def test_pages_too_deep_or_in_the_root_alone_are_counted(ontology, tmp_path, capsys):
    source = three_tops()
    below = [node for node in source if source.out_degree(node) == 0]
    source.nodes[100]["pages"] = [page("root alone"), page(f"p{below[0]}")]
    file = write_graph(source, tmp_path / "graph.json")
    prepared(ontology, file, tmp_path / "all")
    printed = capsys.readouterr().out
    assert "further than" not in printed
    left_out = re.findall(r"(\d) pages of the root were left out: no category has them", printed)
    assert sorted(left_out) == ["1", "2", "2"]  # the second page is in a category of one split
    rows = prepared(ontology, file, tmp_path / "flat", cutoff=2)
    printed = capsys.readouterr().out
    assert printed.count("5 pages were left out: further than --cutoff 2 edges from the root") == 3
    assert all(len(rows[name]) == 1 for name in SPLITS)


def test_paths_of_a_row_are_shuffled_on_request(ontology):
    graph = page_graph([(0, i) for i in range(1, 9)], {i: ["p", "q"] for i in range(1, 9)})
    linearizer = ontology.linearize.Linearizer(graph, ontology.linearize.Limits(5, 100, 1000))
    read = [
        {row.values["id"]: row.values["paths"] for row in linearizer.rows(seed, shuffle)}
        for seed, shuffle in (("0", False), ("0", True), ("0", True), ("1", True))
    ]
    assert read[1] == read[2] != read[3]
    assert read[1]["p"] != read[0]["p"] != read[1]["q"] != read[1]["p"]
    assert sorted(read[1]["p"]) == read[0]["p"] == read[0]["q"]


# --- sources


def test_the_graphs_of_a_hub_dataset_are_the_splits(ontology, tmp_path, monkeypatch):
    graphs = [page_graph([(0, i), (i, i + 3)], {i + 3: [f"p{i}"]}) for i in (1, 2, 3)]
    names = ontology.graph_files.SPLIT_FILES
    contents = [
        write_graph(graph, tmp_path / "graph.json", edges).read_bytes()
        for graph, edges in zip(graphs, ("links", "edges", "links"), strict=True)
    ]
    one = write_graph(three_tops(), tmp_path / "one.json").read_bytes()
    with running_hub(monkeypatch, tmp_path / "hf") as hub:
        files = dict(zip(names, contents, strict=True))
        hub.add("datasets/owner/some-ol", files, tags=["v2"])
        hub.add("datasets/owner/some-ol", {**files, names[0]: b"{}", "full/one.json": one})
        rows = prepared(ontology, "owner/some-ol@v2", tmp_path / "three")
        assert [[row["id"] for row in rows[name]] for name in SPLITS] == [["p1"], ["p2"], ["p3"]]
        assert rows["eval"][0]["paths"] == [["Category 0", "Category 2", "Category 5"]]

        rows = prepared(ontology, "owner/some-ol:full/one.json", tmp_path / "one")
        assert sum(len(rows[name]) for name in SPLITS) == 18
        for source, message in {
            "owner/some-ol:other.json": "owner/some-ol has no other.json",
            "owner/some-ol": "some-ol/train_eval_split/train_graph.json: ",
            "owner/no-ol": "could not be fetched from the hub",
        }.items():
            with pytest.raises(UserError, match=message):
                prepared(ontology, source, tmp_path / "never")

    for name, content in files.items():  # the same on disk
        (tmp_path / "disk" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "disk" / name).write_bytes(content)
    assert prepared(ontology, tmp_path / "disk", tmp_path / "again")["test"][0]["id"] == "p3"


NOUNS = """\
  1 This software and database is being provided to you, the LICENSEE, by
00000001 03 n 01 entity 0 000 | that which exists
00000010 18 n 02 human_being 0 person 1 001 @ 00000001 n 0000 | someone who lives and acts; "hi"
00000011 18 n 01 baker 0 001 @ 00000010 n 0000 | someone who bakes bread and cakes
00000012 18 n 01 Einstein 0 001 @i 00000010 n 0000 | a physicist who found relativity
00000020 20 n 01 tree 0 001 @ 00000001 n 0000 | a tall plant that is made of wood
00000021 20 n 01 oak 0 002 @ 00000020 n 0000 #p 00000010 n 0000 | a tree that has acorns on it
00000030 13 n 01 bread 0 001 @ 00000020 n 0000 | food that is made of flour and water
00000031 13 n 01 rye 0 001 @ 00000030 n 0000 | short
00000032 13 n 01 bun 0 001 @ 00000030 n 0000 | a small round bread of white flour
"""


def test_nouns_become_a_graph_of_their_domains(ontology, tmp_path):
    file = tmp_path / "data.noun"
    file.write_text(NOUNS, encoding="utf-8")
    rows = prepared(ontology, "wordnet", tmp_path / "out", wordnet=file)
    assert sorted(row["title"] for name in SPLITS for row in rows[name]) == sorted(
        ["human being", "baker", "tree", "oak", "bread", "bun"]
    )
    found = {row["title"]: row for name in SPLITS for row in rows[name]}
    assert found["baker"]["paths"] == [["Things", "person", "human being"]]
    assert found["human being"]["abstract"] == "Someone who lives and acts."
    assert found["bread"]["paths"] == [["Things", "food"]]  # a hypernym of another domain


# --- what is refused


def changed(**changes) -> dict:
    """Return the node-link data of a good graph with other values at its top."""
    return {**networkx.node_link_data(three_tops(), edges="links"), **changes}


def changed_node(**changes) -> dict:
    """The same with other attributes of the first node below the root."""
    links = changed()
    (node,) = [node for node in links["nodes"] if node["id"] == 99]
    node.update(changes)
    return links


def without_pages() -> dict:
    links = changed()
    for node in links["nodes"]:
        del node["pages"]
    return links


BAD_GRAPHS = {
    "no root": (changed(graph={}), "there is no root"),
    "another root": (changed(graph={"root": "x"}), "the root 'x' is not the id"),
    "a leaf as root": (changed(graph={"root": 98}), "there is nothing below the root 98"),
    "undirected": (changed(directed=False), "undirected"),
    "parallel edges": (changed(multigraph=True), "parallel edges"),
    "no edges": ({"nodes": []}, "expected a directed graph as node-link JSON"),
    "a list": ([], "expected a directed graph as node-link JSON"),
    "no title": (changed_node(title=" "), 'node 99 has no "title"'),
    "an arrow": (changed_node(title="a -> b"), "node 99: the title 'a -> b'"),
    "no pages": (without_pages(), "there are no pages"),
    "a page as text": (changed_node(pages=["p"]), r'node 99, "pages"\[0\]: expected an object'),
    "no id": (changed_node(pages=[{"title": "x", "abstract": "y"}]), '"id" is missing'),
    "no abstract": (changed_node(pages=[{"id": 1, "title": "x"}]), '"abstract" is missing'),
}


def test_titles_lose_the_space_around_them_and_the_roots_title_is_noted(ontology, tmp_path, capsys):
    graph = page_graph([(0, i) for i in (1, 2, 3)], {i: [f"p{i}"] for i in (1, 2, 3)})
    graph.nodes[1]["title"] = " spaced "
    graph.nodes[2]["title"] = graph.nodes[0]["title"]
    rows = prepared(ontology, write_graph(graph, tmp_path / "graph.json"), tmp_path / "out")
    paths = [row["paths"][0][-1] for name in SPLITS for row in rows[name]]
    assert sorted(paths) == ["Category 0", "Category 3", "spaced"]
    assert "1 categories have the root's title, 'Category 0'" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "message"), BAD_GRAPHS.values(), ids=BAD_GRAPHS)
def test_bad_graphs_are_refused(content, message, ontology, tmp_path):
    file = tmp_path / "graph.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        prepared(ontology, file, tmp_path / "out")
    assert str(caught.value).startswith(f"{file}: ")
    assert not (tmp_path / "out").exists()


def test_bad_flags_are_refused(ontology, tmp_path):
    file = write_graph(three_tops(), tmp_path / "graph.json")
    for source, flags, message in (
        (tmp_path / "none.json", {}, "neither 'wordnet', nor a file"),
        (tmp_path, {}, "has no train_eval_split/train_graph.json"),
        ("wordnet", {"wordnet": tmp_path / "data.noun"}, "apt install wordnet-base"),
        ("wordnet", {"wordnet": file}, r"graph.json:1: not a noun"),
        (file, {"shares": (7, 3, 10)}, "root has 3 categories below it.*none for eval"),
        (file, {"shares": (1, 0, 1)}, "--shares: each must be"),
        (file, {"cutoff": 1}, "--cutoff must be at least 2"),
        (file, {"max_steps": 0}, "--max_steps must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            prepared(ontology, source, tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()


def test_an_error_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", ["prepare.py", str(tmp_path / "x.json"), str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / "prepare.py"), run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: SOURCE: ")
