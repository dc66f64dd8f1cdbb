"""The tree of two graphs: every edge has one line of its kind, also where there are cycles."""

import random
from collections import Counter
from collections.abc import Iterator

from minilora.tracking.graph_tree import GraphTree, TreeLine, answers_tree, make_tree

Edge = tuple[str, str]


def walk(lines: list[TreeLine], above: tuple[str, ...] = ()) -> Iterator[tuple]:
    """Yield (titles of the lines above, line) from top to bottom."""
    for line in lines:
        assert line.level == len(above)
        yield above, line
        yield from walk(line.children, (*above, line.title))


def drawn(tree: GraphTree) -> list[str]:
    """Return the tree as indented text."""
    marks = {"right": "+ ", "wrong": "- ", "missing": "? ", "unjudged": ". ", "start": ""}
    texts = []
    for above, line in walk(tree.lines):
        text = "  " * len(above) + marks[line.kind] + line.title
        text += f" {line.weight}" if line.weight else ""
        text += " (cycle)" if line.is_cycle else ""
        text += f" (see {line.listed_below})" if line.listed_below is not None else ""
        texts.append(text)
    return texts


def test_a_small_tree_reads_as_expected():
    answers = [
        "Root -> Science -> Optics\nRoot -> Science -> Optics",  # an edge counts once in an answer
        "Root -> Science -> Optics -> Lenses\nRoot -> Art",
        "Root -> Art -> Optics\nScience -> Optics",  # the last line does not begin with the root
        "Root -> Science -> Root -> Science\nRoot\nRoot ->  -> Art",
    ]
    targets = ["Root -> Science -> Optics\nRoot -> Science -> Logic -> Sets", "Root -> Sport\n"]
    found = answers_tree(answers, targets)
    assert found is not None
    assert drawn(found.tree) == [
        "Root",
        "  + Science 3",
        "    + Optics 2",
        "      - Lenses 1",
        "    - Root 1 (cycle)",
        "    ? Logic",
        "      ? Sets",
        "  - Art 2",
        "    - Optics 1 (see Science)",
        "  ? Sport",
    ]
    assert found.tree.counts == {"right": 2, "wrong": 4, "missing": 3}
    assert found.tree.num_shown == 9 and found.tree.open_levels == 4
    assert (found.num_answers, found.num_lines, found.num_malformed) == (4, 9, 3)


def test_answers_without_any_path_are_all_missing():
    found = answers_tree(["I do not know.", ""], ["Root -> A -> B"])
    assert found is not None
    assert drawn(found.tree) == ["Root", "  ? A", "    ? B"]
    assert (found.num_lines, found.num_malformed) == (1, 1)
    assert answers_tree(["Root -> A"], ["no path"]) is None and answers_tree([], []) is None


def random_edges(rng: random.Random) -> set[Edge]:
    names = "ABCDEFGH"[: rng.randint(1, 8)]
    return {(rng.choice(names), rng.choice(names)) for _ in range(rng.randint(0, 14))}


def test_every_edge_of_random_graphs_has_one_line_and_every_list_one_place():
    rng = random.Random(0)
    for _ in range(300):
        predicted = {edge: rng.randint(1, 5) for edge in sorted(random_edges(rng))}
        reference = random_edges(rng) if rng.random() < 0.8 else None
        root = rng.choice("ABZ")
        tree = make_tree(predicted, reference, root)

        expected = {}
        for edge in predicted.keys() | (reference or set()):
            if reference is None:
                kind = "unjudged"
            elif edge in reference:
                kind = "right" if edge in predicted else "missing"
            else:
                kind = "wrong"
            expected[edge] = (kind, predicted.get(edge, 0))
        parents = {parent for parent, _ in expected}

        shown, listed_at, notes = {}, {}, []
        for above, line in walk(tree.lines):
            if above:
                edge = (above[-1], line.title)
                assert edge not in shown
                shown[edge] = (line.kind, line.weight)
            assert line.is_cycle is (line.title in above)
            if line.children:
                assert line.title not in listed_at
                listed_at[line.title] = above[-1] if above else ""
                order = [(child.kind == "missing", -child.weight) for child in line.children]
                assert order == sorted(order)
                assert not line.is_cycle and line.listed_below is None
            elif line.title in parents and not line.is_cycle:
                notes.append((line.title, line.listed_below))
        assert shown == expected and tree.num_shown == len(expected)
        assert tree.counts == Counter(kind for kind, _ in expected.values())
        assert listed_at.keys() == parents
        assert all(listed_at[title] == place for title, place in notes)
        if root in parents:
            assert tree.lines[0].title == root


def test_children_stand_below_the_strongest_edge():
    """Whatever is higher up: a right edge before a wrong one, before a missing one."""
    edges = {("R", "A"): 9, ("A", "B"): 2, ("B", "C"): 1, ("R", "B"): 5}
    tree = make_tree(edges, {("R", "A"), ("A", "B"), ("B", "C")}, "R")
    assert drawn(tree) == ["R", "  + A 9", "    + B 2", "      + C 1", "  - B 5 (see A)"]
    tree = make_tree(edges, None, "R")
    assert drawn(tree) == ["R", "  . A 9", "    . B 2 (see R)", "  . B 5", "    . C 1"]
    tree = make_tree({("R", "A"): 1, ("A", "B"): 1, ("B", "C"): 1}, {("R", "B")}, "R")
    assert drawn(tree) == ["R", "  - A 1", "    - B 1", "      - C 1", "  ? B (see A)"]


def test_large_graphs_are_bounded_and_what_is_left_out_is_counted():
    rng = random.Random(0)
    predicted = {("R", f"hub {i}"): 20_000 - i for i in range(60)}
    for i in range(14_000):
        predicted[f"hub {rng.randrange(60)}", f"leaf {i}"] = rng.randint(1, 9)
    tree = make_tree(predicted, set(list(predicted)[::2]), "R")
    lines = [line for _, line in walk(tree.lines)]
    assert len(lines) <= 1500 and tree.num_shown == len(lines) - 1
    assert tree.counts.total() == 14_060

    (top,) = tree.lines
    assert [line.title for line in top.children] == [f"hub {i}" for i in range(40)]
    assert top.left_out == {"right": 10, "wrong": 10}
    hub = top.children[0]
    weights = sorted((predicted[edge] for edge in predicted if edge[0] == "hub 0"), reverse=True)
    assert [line.weight for line in hub.children] == weights[:40]
    assert hub.left_out.total() == len(weights) - 40
    for line in top.children:
        num_children = sum(1 for parent, _ in predicted if parent == line.title)
        assert len(line.children) + line.left_out.total() == num_children
    assert tree.open_levels == 1, "41 lines are visible; the next level would be too many"

    # a graph that fits has all its edges, however many there are in one list
    tree = make_tree({("R", f"leaf {i}"): 1 for i in range(1000)}, None, "R")
    assert tree.num_shown == 1000

    # deep chains, and very many lines at the top
    chain = {(f"n{i}", f"n{i + 1}"): 1 for i in range(500)}
    tree = make_tree(chain, None, "n0")
    assert tree.num_shown == 19 and tree.counts.total() == 500
    lines = [line for _, line in walk(tree.lines)]
    assert lines[-1].title == "n19" and lines[-1].left_out == {"unjudged": 1}
    tree = make_tree({(f"a{i}", f"b{i}"): 1 for i in range(3000)}, None, None)
    assert len(tree.lines) == 40 and tree.left_out == {"start": 2960}
