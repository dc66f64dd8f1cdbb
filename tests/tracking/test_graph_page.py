"""The page of a graph is complete, bounded and harmless."""

import random
import re
from pathlib import Path

import networkx

from helpers.graphs import graph_of
from helpers.html_page import Page
from minilora.tracking.graph_page import write_graph_page

NASTY = "</li><img src=x onerror=alert(1)> & \"quotes\" '{{ 7 * 7 }}' \x00 한국어"


def page_of(
    directory: Path,
    predicted: networkx.DiGraph,
    reference: networkx.DiGraph | None = None,
    title: str = "answers.jsonl",
) -> Page:
    """Write the page of a graph and read it."""
    write_graph_page(predicted, reference, directory / "graph.html", title)
    (file,) = directory.iterdir()
    return Page(file.read_text(encoding="utf-8"))


def edges_in(page: Page) -> dict[str, list[str]]:
    """Return the names that the page shows with each kind."""
    kinds: dict[str, list[str]] = {}
    for element in page.all("bdi"):
        line = page.elements[page.elements.index(element) - 1]
        if line["tag"] == "b":
            line = page.elements[page.elements.index(element) - 2]
        kinds.setdefault(line["cls"], []).append(element["text"])
    return kinds


def test_edges_are_compared_by_titles(tmp_path: Path):
    """The reference's nodes have ids, and two of them one title."""
    predicted = graph_of({("Main", "Art"): 3, ("Art", "Music"): 2, ("Main", "Sea"): 1})
    reference = networkx.DiGraph([(0, 1), (0, 2), (2, 3), (1, 4)], root=0)
    titles = {0: "Main", 1: "Art", 2: "Art", 3: "Music", 4: "Dance"}
    networkx.set_node_attributes(reference, titles, "title")
    page = page_of(tmp_path, predicted, reference)
    assert edges_in(page) == {
        "start": ["Main"],
        "right": ["Art", "Music"],
        "missing": ["Dance"],
        "wrong": ["Sea"],
    }
    marks = [element["text"] for element in page.all("b") if "title" in element]
    assert marks == ["✓", "✓", "○", "✗"]
    assert [element["text"] for element in page.all("small")] == ["3", "2", "1"]
    legend = [e["text"].replace("\n", " ") for e in page.all("li") if "summary" not in e["within"]]
    assert legend[:3] == [
        "✓2 right",
        "✗1 wrong: not in the reference",
        "○1 missing: only in the reference",
    ]
    assert "edges are shown" not in page.source


def test_a_graph_without_a_reference_or_without_edges(tmp_path: Path):
    graph = graph_of({("a", "b"): 1, ("b", "a"): 2})
    graph.graph["root"] = "b"
    page = page_of(tmp_path, graph)
    assert edges_in(page) == {"start": ["b"], "unjudged": ["a", "b"]}
    assert "2 edges,\nnot compared with a reference" in page.source
    assert "cycle" in page.all("small")[1]["text"] + page.all("small")[2]["text"]

    empty = networkx.DiGraph(root="R")  # as of answers without a path
    assert edges_in(page_of(tmp_path, empty)) == {}
    found = edges_in(page_of(tmp_path, empty, networkx.DiGraph([("R", "A")])))
    assert found == {"start": ["R"], "missing": ["A"]}


def test_titles_do_no_harm(tmp_path: Path):
    graph = graph_of({("Root", NASTY): 1, ("Root", "lone \ud800 half"): 1})
    page = page_of(tmp_path, graph, title=NASTY)
    shown = [element["text"] for element in page.all("bdi")]
    assert shown == ["Root", NASTY.replace("\x00", "\u2400"), "lone \ufffd half"]
    assert page.all("title")[0]["text"] == page.all("h1")[0]["text"] == shown[1]
    assert not page.all("img") and not page.all("script")
    assert not [e for e in page.elements if any(name.startswith("on") for name in e)]
    assert not [e for e in page.elements if {"src", "href", "data"} & e.keys()]
    (policy,) = [e["content"] for e in page.all("meta") if "http-equiv" in e]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    style = page.all("style")[0]["text"]
    for color in ("--right", "--wrong"):
        assert len(re.findall(rf"{color}: #", style)) == 2, "one color for light, one for dark"
    assert not re.search(r"https?:|url\(|@import", style)


def test_a_graph_of_14000_nodes_makes_a_small_page(tmp_path: Path):
    rng = random.Random(0)
    titles = [f"Категория «{i}» & {'x' * rng.randint(1, 120)}" for i in range(14_000)]
    graph = networkx.DiGraph(root=titles[0])
    for i in range(1, 14_000):
        for parent in rng.sample(range(i), min(i, 2)):
            graph.add_edge(titles[parent // 20], titles[i], weight=rng.randint(1, 50))
    reference = networkx.DiGraph([*list(graph.edges)[::2], ("Root", titles[5])])
    page = page_of(tmp_path, graph, reference)
    assert 100_000 < len(page.source.encode()) < 1_000_000
    num_edges = len(graph.edges) + 1
    shown = re.search(r"<b>([\d,]+) of ([\d,]+) edges are shown</b>", page.source)
    assert shown and shown[2] == f"{num_edges:,}"
    assert 1400 < int(shown[1].replace(",", "")) <= len(page.all("bdi"))
    assert max(len(element["text"]) for element in page.all("bdi")) == 80
