"""The labels, held against the text itself: which tokens are supervised, and which of them a draw may drop.

The references are written here from the contract, loop by loop and character by character.
"""

import functools
import json
import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers

import tiny_tokenizers
from minilora.config import DataConfig
from minilora.data import Documents
from minilora.labels import IGNORE, Edge, draw_kept, keep_probabilities, mark_tokens, path_edges
from minilora.running import examples
from minilora.running.cache import load_documents
from minilora.running.examples import Example
from minilora.running.reading import table
from minilora.tokenizer import Tokenizer

EVERY = pytest.mark.parametrize("name", tiny_tokenizers.BUILDERS)

NAMES = [
    "Main topic classifications", "Physics", "1984 births", "3", "20th-century – people",
    "People—places", "Rock 'n' roll", "O’Brien", "Café society", "Dvořák", "物理学", "물리학", "日本の 都市",
    "Cities in New York (state)", "Washington, D.C.", "...And Justice for All", "$9.99 games", "a->b",
    "->", "x ->y", "-", "C++", "50% & more", "[INST]", "</", "<0x41>", "\\n", "double  space",
    " space first", "space last ", "\ttab first", "tab\tinside", "nul\x00", "\x07bell",
    "e\u0301te\u0301", "\u1112\u1161\u11ab\u1100\u116e\u11a8", "🤖 robots", "👩‍🔬", "𐌰𐌱",
    "\u200bzero width", "nbsp\xa0", "▁lower one eighth", "ﬁne", "line\u2028separator",
    "carriage\rreturn",
]  # fmt: skip


def build(row: dict, data: DataConfig, of: Tokenizer) -> Example:
    (example,) = examples.build(row, data, of)
    return example


@functools.cache
def tokenizer(name: str) -> Tokenizer:
    return Tokenizer(tiny_tokenizers.BUILDERS[name]())


def row(paths: list[list[str]], title: str = "T", abstract: str = "A") -> dict:
    return {"title": title, "abstract": abstract, "paths": paths}


def load(tmp_path: Path, rows: Sequence[object], of: Tokenizer | None = None, **settings) -> Documents:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return load_documents(str(file), DataConfig(num_workers=1, **settings), of or tokenizer("mistral"), "train_file")


def random_paths(rng: random.Random) -> list[list[str]]:
    return [rng.choices(NAMES, k=rng.randint(1, 5)) for _ in range(rng.randint(1, 5))]


# ---- the references


def response_of(paths: list[list[str]]) -> str:
    return "".join(" -> ".join(path) + "\n" for path in paths)


def node_characters(text: str, paths: list[list[str]]) -> list[int]:
    """Per character of the text: the occurrence whose node, or the one space before it, it is part of; -1 for none."""
    response = response_of(paths)
    trimmed = response not in text  # by the chat template
    at = text.rindex(response.strip() if trimmed else response)
    end = at + len(response.strip() if trimmed else response)
    at -= len(response) - len(response.lstrip()) if trimmed else 0
    owner = [-1] * len(text)
    occurrence = 0
    for path in paths:
        for depth, node in enumerate(path):
            if depth:
                at += len(" -> ")
                for i in range(at - 1, min(at + len(node), end)):
                    owner[i] = occurrence
                occurrence += 1
            at += len(node)
        at += len("\n")
    return owner


def node_of_token(owner: list[int], start: int, end: int) -> int:
    """A node's tokens are those that touch its text or the one space before it."""
    touched = {owner[i] for i in range(start, end)} - {-1}
    assert len(touched) < 2, "no token is part of two nodes: an arrow or a newline lies between them"
    return touched.pop() if touched else -1


def edge_counts(all_paths: list[list[list[str]]]) -> Counter[Edge]:
    counts: Counter[Edge] = Counter()
    for paths in all_paths:
        for path in paths:
            for i in range(1, len(path)):
                edge = (path[i - 1], path[i])
                counts[edge] += 1
    return counts


def expected_rate(counts: Counter[Edge], edge: Edge) -> float:
    mean = sum(counts.values()) / len(counts)
    return 1.0 if counts[edge] <= mean else mean / counts[edge]


# ---- which tokens are supervised


def test_the_papers_form(tmp_path):
    example = build(row([["a", "b"], ["c", "d"]]), DataConfig(), tokenizer("mistral"))
    assert example.text == "<s>[INST] Title: T\nA [/INST]a -> b\nc -> d\n</s>"
    assert example.edges == [("a", "b"), ("c", "d")]
    assert [example.text[slice(*span)] for span in example.nodes] == ["b", "d"]

    documents = load(tmp_path, [row([["a", "b"], ["c", "d"]])])
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tiny_tokenizers.mistral() / "tokenizer.model"))
    pieces = [sp.id_to_piece(int(i)) for i in documents.ids(0)]
    assert pieces[-13:] == ["▁[", "/", "INST", "]", "a", "▁->", "▁b", "<0x0A>", "c", "▁->", "▁d", "<0x0A>", "</s>"]
    assert (documents.ids(0)[-8], documents.ids(0)[-2], documents.ids(0)[-1]) == (3193, 13, 2)
    assert documents.labels(0).tolist() == [IGNORE] * (len(pieces) - 9) + documents.ids(0)[-9:].tolist()
    assert documents.node.tolist() == [-1] * (len(pieces) - 9) + [-1, -1, 0, -1, -1, -1, 1, -1, -1]


@EVERY
@pytest.mark.parametrize("chat", [True, False])
def test_the_targets_are_the_response_and_eos(name, chat, tmp_path):
    """Pitfall row 1: no name is lost, whatever the tokenizer makes of it."""
    of = tokenizer(name)
    all_paths = [[[other, name], [name, other, name]] for name in NAMES for other in ("Physics", "물리학", name)]
    documents = load(tmp_path, [row(paths) for paths in all_paths], of, chat=chat)
    assert documents.counts.kept == len(all_paths) and not documents.counts.dropped
    exact = 0
    for i, paths in enumerate(all_paths):
        example = build(row(paths), DataConfig(chat=chat), of)
        spans = of.encode(example.text).spans
        response = response_of(paths) if response_of(paths) in example.text else response_of(paths).strip()
        supervised = np.flatnonzero(documents.labels(i) != IGNORE)
        assert (np.diff(supervised) == 1).all(), "one stretch"
        border = example.text.rindex(response + of.eos_token)
        begin = max([border, *(end for start, end in spans if start < border < end)])  # Mistral has a piece "]$"
        assert (spans[supervised[0]][0], spans[supervised[-1]][1]) == (begin, border + len(response + of.eos_token))
        prompt, target = documents.prompt_and_target(i)
        assert target == documents.ids(i)[supervised].tolist() and target[-1] == of.eos_id
        exact += of.decode_after(prompt, target[:-1]) == (response + of.eos_token)[begin - border : -len(of.eos_token)]
    lossy = {"mistral": ["▁"], "llama2": ["▁"], "metaspace": ["▁"], "llama3": [], "qwen": ["e\u0301", "\u1112"]}[
        name
    ]  # what decodes to something else
    lost = sum(any(mark in node for mark in lossy for path in paths for node in path) for paths in all_paths)
    assert exact == len(all_paths) - lost


@EVERY
@pytest.mark.parametrize("chat", [True, False])
def test_marks_agree_with_a_character_by_character_reference(name, chat):
    rng = random.Random(2)
    of, data = tokenizer(name), DataConfig(chat=chat)
    for _ in range(150):
        paths = random_paths(rng)
        example = build(row(paths, title=rng.choice(NAMES), abstract=" -> ".join(rng.choices(NAMES, k=3))), data, of)
        ids, spans = of.encode(example.text)
        supervised, node, straddling = mark_tokens(example.text, spans, example.supervised, example.nodes)

        owner = node_characters(example.text, paths)
        response = response_of(paths) if response_of(paths) in example.text else response_of(paths).strip()
        begin = example.text.rindex(response)
        end = example.text.index(of.eos_token, begin + len(response)) + len(of.eos_token)
        assert supervised.tolist() == [begin <= start < end for start, _ in spans], example.text
        assert node.tolist() == [node_of_token(owner, *span) for span in spans], example.text
        assert straddling == sum(start < begin < stop for start, stop in spans)
        assert set(node.tolist()) - {-1} == set(range(len(example.edges))), "every occurrence has tokens to drop"
        assert example.edges == [(path[i], path[i + 1]) for path in paths for i in range(len(path) - 1)]
        assert ids[np.flatnonzero(supervised)[-1]] == of.eos_id and node[np.flatnonzero(supervised)[-1]] == -1


def test_marks_of_any_cut_into_tokens_agree_with_the_reference():
    """Whatever a vocabulary merges: tokens of up to four characters, across arrows, newlines and the border."""
    rng = random.Random(9)
    for _ in range(200):
        paths = random_paths(rng)
        prompt, text = "Q: x\n", f"Q: x\n{response_of(paths)}$"
        example = build(row(paths), DataConfig(chat=False), tokenizer("mistral"))
        shift = len(prompt) - example.supervised[0][0]
        nodes = [(begin + shift, end + shift) for begin, end in example.nodes]
        cuts = [0]
        while cuts[-1] < len(text):
            cuts.append(min(cuts[-1] + rng.randint(1, 4), len(text)))
        spans = list(pairwise(cuts))
        supervised, node, straddling = mark_tokens(text, spans, [(len(prompt), len(text))], nodes)
        owner = node_characters(text, paths)
        assert supervised.tolist() == [start >= len(prompt) for start, _ in spans]
        assert node.tolist() == [node_of_token(owner, *span) if span[0] >= len(prompt) else -1 for span in spans]
        assert straddling == (len(prompt) not in cuts)


def test_a_token_of_the_prompt_is_part_of_no_node():
    """Even one that reaches over the border into it: a draw must not count on labels that are not there."""
    supervised, node, straddling = mark_tokens("pa -> b\n", [(0, 7), (7, 8)], [(1, 8)], [(6, 7)])
    assert (supervised.tolist(), node.tolist(), straddling) == ([False, True], [-1, -1], 1)


@pytest.mark.parametrize("name", ["mistral", "llama2"])
def test_a_nodes_tokens_include_its_space_and_its_bytes(name):
    example = build(row([["a", "𐌰b", "물리학", "é"]]), DataConfig(), tokenizer(name))
    _, spans = tokenizer(name).encode(example.text)
    _, node, _ = mark_tokens(example.text, spans, example.supervised, example.nodes)
    for occurrence, text in enumerate([" 𐌰b", " 물리학", " é"]):
        of_node = [example.text[slice(*span)] for span, n in zip(spans, node, strict=True) if n == occurrence]
        assert "".join(dict.fromkeys(of_node)) == text
    assert [example.text[slice(*span)] for span, n in zip(spans, node, strict=True) if n == 0][:5] == [" ", "𐌰", "𐌰", "𐌰", "𐌰"]


def test_special_tokens_in_a_name_are_part_of_the_node(tmp_path):
    """They become their ids, as in transformers, but end neither the node nor the response."""
    paths = [["a", "x</s>日本", "b"], ["c", "<s>"]]
    documents = load(tmp_path, [row(paths)])
    assert documents.labels(0)[-1] == tokenizer("mistral").eos_id
    example = build(row(paths), DataConfig(), tokenizer("mistral"))
    _, spans = tokenizer("mistral").encode(example.text)
    assert documents.node.tolist() == [
        # the dummy space after </s> lies between two characters of the node
        0 if start == end == example.text.index("日本") else node_of_token(node_characters(example.text, paths), start, end)
        for start, end in spans
    ]


# ---- draws


@EVERY
def test_a_draw_drops_whole_nodes_and_nothing_else(name, tmp_path):
    """Arrows, newlines, first nodes and EOS keep their labels, the prompt has none, a node keeps all of its own or none."""
    rng = random.Random(3)
    pools = [rng.sample(NAMES, 6) for _ in range(20)]
    all_paths = [[[*pool[:3], rng.choice(pool)] for _ in range(4)] for pool in pools]  # the first two edges are frequent
    documents = load(tmp_path, [row(paths, abstract="a -> b\nc") for paths in all_paths], tokenizer(name))
    counts, seen = edge_counts(all_paths), set()
    for i, paths in enumerate(all_paths):
        example = build(row(paths, abstract="a -> b\nc"), DataConfig(), tokenizer(name))
        spans = tokenizer(name).encode(example.text).spans
        owner = node_characters(example.text, paths)
        nodes = [node_of_token(owner, *span) for span in spans]
        everything = documents.labels(i)
        for epoch in range(60):
            labels = documents.labels(i, draw=(7, epoch))
            dropped = {n for n, before, after in zip(nodes, everything, labels, strict=True) if before != after}
            assert -1 not in dropped
            for n, before, after in zip(nodes, everything, labels, strict=True):
                assert after == (IGNORE if n in dropped else before)
            assert all(expected_rate(counts, example.edges[n]) < 1 for n in dropped), "rare edges are never dropped"
            seen |= {(i, n) for n in dropped}
    assert len(seen) > 100, "many draws, but hardly any drops"


def test_arrows_newlines_and_eos_are_always_supervised_with_mistral(tmp_path):
    rng = random.Random(4)
    names = [name for name in NAMES if "->" not in name]
    all_paths = [[rng.choices(names, k=4) for _ in range(5)] for _ in range(10)]
    documents = load(tmp_path, [row(paths, abstract="x -> y\nz") for paths in all_paths])
    for i in range(len(documents)):
        assert (documents.ids(i) == 3193).sum() == 5 * 3 + 1, "the arrows and the prompt's"
        for epoch in range(100):
            labels = documents.labels(i, draw=(0, epoch))
            assert (labels == 3193).sum() == 5 * 3
            assert (labels == 13).sum() == 5
            assert (labels == 2).sum() == 1 and labels[-1] == 2


def test_every_edge_keeps_its_labels_at_the_papers_rate(tmp_path):
    """10,000 draws, over seeds, epochs and indices, lie within three sigma of min(1, M / n)."""
    rng = random.Random(5)
    tree = {"root": ["often", "seldom", "once"], "often": ["a", "b"], "seldom": ["c"]}
    all_paths = []
    for i in range(12):
        children = rng.choices(["often", "seldom"], weights=[5, 1], k=4)
        all_paths.append([["root", child, rng.choice(tree[child])] for child in children])
        all_paths[-1] += [["root", "once"]] if i == 0 else [["alone"]]
    counts = edge_counts(all_paths)
    rates = {edge: expected_rate(counts, edge) for edge in counts}
    assert sum(rate < 1 for rate in rates.values()) >= 2 and sum(rate == 1 for rate in rates.values()) >= 2

    documents = load(tmp_path, [row(paths) for paths in all_paths])
    kept, drawn = dict.fromkeys(counts, 0), dict.fromkeys(counts, 0)
    for i, paths in enumerate(all_paths):
        edges = [(path[d], path[d + 1]) for path in paths for d in range(len(path) - 1)]
        probabilities = documents.keep[documents.keep_offsets[i] : documents.keep_offsets[i + 1]]
        assert probabilities.tolist() == pytest.approx([rates[edge] for edge in edges])
        for draw in range(10_000):
            for edge, keeps in zip(edges, draw_kept(probabilities, draw % 10, draw // 10, i).tolist(), strict=True):
                kept[edge] += keeps
                drawn[edge] += 1
    for edge, rate in rates.items():
        assert drawn[edge] == 10_000 * counts[edge]
        sigma = (rate * (1 - rate) * drawn[edge]) ** 0.5
        assert abs(kept[edge] - rate * drawn[edge]) <= 3 * sigma, f"{edge}: {kept[edge] / drawn[edge]} for {rate}"


def test_training_labels_follow_the_draw(tmp_path):
    """What draw_kept says of an occurrence is what its tokens get, at the line's number in the file."""
    paths = [["r", "x", "y"], ["r", "x", "z"], ["r", "x"], ["r", "w"]]
    documents = load(tmp_path, [{"title": 1}, row(paths), row([["r", "x"]])])  # the first line is dropped
    assert documents.index.tolist() == [1, 2]
    node = documents.node[: documents.offsets[1]]
    counts = edge_counts([paths, [["r", "x"]]])
    probabilities = np.array([expected_rate(counts, edge) for path in paths for edge in pairwise(path)])
    for seed, epoch in [(0, 0), (0, 1), (1, 0), (5, 17)]:
        kept = draw_kept(probabilities, seed, epoch, 1)
        labels = documents.labels(0, draw=(seed, epoch))
        for occurrence, keeps in enumerate(kept):
            assert ((labels[node == occurrence] != IGNORE) == keeps).all()


def test_a_draw_is_a_function_of_seed_epoch_and_index_alone():
    probabilities = np.full(64, 0.5)
    np.random.seed(1)
    first = draw_kept(probabilities, 3, 4, 5)
    np.random.seed(2)
    draw_kept(probabilities, 0, 0, 0)
    assert (draw_kept(probabilities, 3, 4, 5) == first).all()
    assert (draw_kept(probabilities[:10], 3, 4, 5) == first[:10]).all(), "later occurrences change nothing"
    for other in [(4, 3, 5), (3, 5, 4), (5, 4, 3), (3, 4, 6), (3, 5, 5), (4, 4, 5)]:
        assert 10 < (draw_kept(probabilities, *other) != first).sum() < 54, f"{other} repeats {(3, 4, 5)}"


def test_occurrences_are_drawn_independently():
    """Also two of the same edge in one example: both are kept in p squared of the draws."""
    rate, draws = 0.3, 10_000
    both = np.array([draw_kept(np.full(2, rate), 0, epoch, 0) for epoch in range(draws)])
    rows = np.array([draw_kept(np.full(1, rate), 0, 0, index)[0] for index in range(2 * draws)])
    epochs = np.array([draw_kept(np.full(1, rate), 0, epoch, 0)[0] for epoch in range(2 * draws)])
    for together in (both.all(axis=1), rows[::2] & rows[1::2], epochs[::2] & epochs[1::2]):
        assert abs(together.mean() - rate**2) <= 3 * (rate**2 * (1 - rate**2) / draws) ** 0.5


def test_duplicates_of_an_edge_in_one_example_are_drawn_apart(tmp_path):
    documents = load(tmp_path, [row([["r", "x"], ["r", "x"], ["r", "x"], ["r", "y"]])])
    node = documents.node
    outcomes = set()
    for epoch in range(200):
        labels = documents.labels(0, draw=(0, epoch))
        outcomes.add(tuple(bool((labels[node == occurrence] != IGNORE).all()) for occurrence in range(3)))
    assert len(outcomes) == 8, "every combination of three kept or dropped"


def test_without_edge_dropping_everything_is_kept(tmp_path):
    rows = [row([["r", "x"], ["r", "x"], ["r", "y"]])] * 3
    documents = load(tmp_path, rows, edge_dropping=False)
    assert (documents.keep == 1).all() and len(documents.keep) == 9
    for epoch in range(50):
        for i in range(3):
            assert (documents.labels(i, draw=(0, epoch)) == documents.labels(i)).all()


# ---- counts


def test_edges_and_their_probabilities():
    paths = [["a", "b", "c"], ["a", "b"], ["d"], ["a", "a"]]
    assert path_edges(paths) == [("a", "b"), ("b", "c"), ("a", "b"), ("a", "a")]
    counts = edge_counts([paths])
    assert keep_probabilities(counts) == pytest.approx({edge: expected_rate(counts, edge) for edge in counts})
    assert keep_probabilities(Counter()) == {}
    rng = random.Random(6)
    many = edge_counts([random_paths(rng) for _ in range(300)])
    found = keep_probabilities(many)
    assert found == pytest.approx({edge: expected_rate(many, edge) for edge in many})
    assert min(found.values()) < 0.5 and max(found.values()) == 1


def test_edges_are_counted_over_the_whole_file(tmp_path):
    """In rows too long to train on too, but not in rows that cannot be read."""
    often = [["r", "x"]] * 3
    rows = [
        row([["r", "x"], ["r", "y"]]),
        row(often, abstract="long " * 200),
        row([["r", "x"], ["q", 5]]),
        {"paths": often},
        row([["r", "y"]]),
    ]
    documents = load(tmp_path, rows, max_seq_length=100)
    assert documents.index.tolist() == [0, 4] and sum(map(len, documents.counts.dropped.values())) == 3
    counts = edge_counts([rows[0]["paths"], rows[1]["paths"], rows[4]["paths"]])
    assert counts == {("r", "x"): 4, ("r", "y"): 2}
    assert (
        documents.keep.tolist()
        == pytest.approx([3 / 4, 1, 1])
        == [expected_rate(counts, e) for e in (("r", "x"), ("r", "y"), ("r", "y"))]
    )


# ---- borders


def merging(directory: Path) -> Tokenizer:
    """A tokenizer.json of single characters that merges "a" and "b" wherever they meet."""
    pieces = ["</s>", *"abxy", "ab"]
    raw = tokenizers.Tokenizer(tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, [("a", "b")]))
    raw.add_special_tokens(["</s>"])
    directory.mkdir()
    raw.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return Tokenizer(directory)


def test_a_token_across_the_border_belongs_to_the_prompt(tmp_path):
    """Pitfall row 2."""
    of = merging(tmp_path / "merging")
    rows = [{"prompt": "xa", "completion": "by"}, {"prompt": "xx", "completion": "ab"}, {"prompt": "a", "completion": "bab"}]
    documents = load(tmp_path, rows, of, format="prompt", chat=False)
    tokens = [[of.decode([i], skip_special_tokens=False) for i in documents.ids(d)] for d in range(3)]
    assert tokens == [["x", "ab", "y", "</s>"], ["x", "x", "ab", "</s>"], ["ab", "ab", "</s>"]]
    assert [(documents.labels(d) != IGNORE).tolist() for d in range(3)] == [
        [False, False, True, True], [False, False, True, True], [False, True, True],
    ]  # fmt: skip
    assert documents.counts.straddling == 2
    assert "2 tokens straddle prompt and response" in table(documents.counts)

    clean = load(tmp_path, rows[1:2], of, format="prompt", chat=False)
    assert clean.counts.straddling == 0 and "straddle" not in table(clean.counts)


def test_mistrals_own_tokens_across_the_border(tmp_path):
    """`]` of [/INST] and a response's first characters can be one piece."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tiny_tokenizers.mistral() / "tokenizer.model"))
    starts = [piece[1:] for piece in map(sp.id_to_piece, range(sp.vocab_size())) if len(piece) > 1 and piece[0] == "]"]
    starts = [start for start in starts if start.strip()]
    assert len(starts) > 5
    across = [any(len(p) > 1 and p[0] == "]" for p in sp.encode(f"[INST] x [/INST]{start} y", out_type=str)) for start in starts]
    assert sum(across) > 5
    documents = load(tmp_path, [{"prompt": "x", "completion": start + " y"} for start in starts], format="prompt")
    assert documents.counts.straddling == sum(across)


@pytest.mark.parametrize("name", ["mistral", "qwen", "llama3"])
def test_eos_is_supervised_even_where_it_is_the_pad_token(name, tmp_path):
    """Pitfall row 3."""
    source = tiny_tokenizers.BUILDERS[name]()
    of = Tokenizer(tiny_tokenizers.copy(source, tmp_path / "t", pad_token=tokenizer(name).eos_token))
    documents = load(tmp_path, [row([["r", "x"], ["r", "x"], ["r", "y"]])], of)
    assert [of.eos_id] == documents.prompt_and_target(0)[1][-1:]
    place = np.flatnonzero(documents.ids(0) == of.eos_id)[-1]
    for draw in [None, *((0, epoch) for epoch in range(50))]:
        assert documents.labels(0, draw)[place] == of.eos_id


def test_eos_is_no_part_of_a_last_name_whose_end_the_template_trims(tmp_path):
    """Llama 3's template trims contents: the name's last space is not in the text, and EOS stands in its place."""
    documents = load(tmp_path, [row([["r", "x "], ["r", "x "], ["r", "y"], ["r", "x "]])], tokenizer("llama3"))
    for epoch in range(50):
        assert documents.labels(0, draw=(0, epoch))[-1] == tokenizer("llama3").eos_id
