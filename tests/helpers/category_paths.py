"""Rows of category paths, and references for their labels, written from the contract.

The references go loop by loop and character by character, and share no code with minilora.
"""

import random
from collections import Counter

from minilora.data.example import Edge

NAMES = [
    "Main topic classifications", "Physics", "1984 births", "3", "20th-century – people",
    "People—places", "Rock 'n' roll", "O’Brien", "Café society", "Dvořák", "物理学", "물리학",
    "日本の 都市", "Cities in New York (state)", "Washington, D.C.", "...And Justice for All",
    "$9.99 games", "a->b", "->", "x ->y", "-", "C++", "50% & more", "[INST]", "</", "<0x41>",
    "\\n", "double  space", " space first", "space last ", "\ttab first", "tab\tinside", "nul\x00",
    "\x07bell", "e\u0301te\u0301", "\u1112\u1161\u11ab\u1100\u116e\u11a8", "🤖 robots", "👩‍🔬",
    "𐌰𐌱", "\u200bzero width", "nbsp\xa0", "▁lower one eighth", "ﬁne", "line\u2028separator",
    "carriage\rreturn",
]  # fmt: skip


def paths_row(paths: list[list[str]], title: str = "T", abstract: str = "A") -> dict:
    """Return a row of format paths."""
    return {"title": title, "abstract": abstract, "paths": paths}


def random_paths(rng: random.Random) -> list[list[str]]:
    """Return one to five paths of one to five names each."""
    return [rng.choices(NAMES, k=rng.randint(1, 5)) for _ in range(rng.randint(1, 5))]


def response_to(paths: list[list[str]]) -> str:
    """Return the response that a model is to write."""
    return "".join(" -> ".join(path) + "\n" for path in paths)


def written_response(paths: list[list[str]], text: str) -> str:
    """Return the response as it is written in a text: a chat template may have trimmed it."""
    response = response_to(paths)
    return response if response in text else response.strip()


def node_characters(text: str, paths: list[list[str]]) -> list[int]:
    """Return for each character of a text the edge occurrence that it belongs to, or -1.

    The characters of an occurrence u -> v are those of v and the one space before it.
    """
    response = response_to(paths)
    written = written_response(paths, text)
    at = text.rindex(written)
    end = at + len(written)
    if written != response:
        at -= len(response) - len(response.lstrip())

    owner = [-1] * len(text)
    occurrence = 0
    for path in paths:
        for depth, node in enumerate(path):
            if depth > 0:
                at += len(" -> ")
                for i in range(at - 1, min(at + len(node), end)):
                    owner[i] = occurrence
                occurrence += 1
            at += len(node)
        at += len("\n")
    return owner


def node_of_token(owner: list[int], start: int, end: int) -> int:
    """Return the edge occurrence that a token belongs to: that of any of its characters."""
    touched = {owner[i] for i in range(start, end)} - {-1}
    assert len(touched) < 2, "an arrow or a newline lies between any two nodes"
    return touched.pop() if touched else -1


def edge_counts(all_paths: list[list[list[str]]]) -> Counter[Edge]:
    """Return how often each edge occurs in the paths of all rows."""
    counts: Counter[Edge] = Counter()
    for paths in all_paths:
        for path in paths:
            for i in range(1, len(path)):
                counts[path[i - 1], path[i]] += 1
    return counts


def expected_rate(counts: Counter[Edge], edge: Edge) -> float:
    """Return the probability that an occurrence of an edge keeps its labels: min(1, M / n)."""
    mean = sum(counts.values()) / len(counts)
    return 1.0 if counts[edge] <= mean else mean / counts[edge]
