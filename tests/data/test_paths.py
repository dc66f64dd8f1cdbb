"""Category paths as text, and the draws that drop labels of over-frequent edges."""

import random
from itertools import pairwise

import numpy as np
import pytest
import sentencepiece

from helpers import tiny_tokenizers
from helpers.category_paths import (
    NAMES,
    edge_counts,
    expected_rate,
    node_characters,
    node_of_token,
    paths_row,
    random_paths,
    written_response,
)
from helpers.data_rows import EVERY_TOKENIZER, build_example, load_rows, tokenizer
from minilora.config import DataConfig
from minilora.data.dataset import IGNORE_INDEX, Documents, LabelDraw
from minilora.data.paths import draw_kept, keep_probabilities, path_edges

# ---- the text


def test_text_has_the_papers_form(tmp_path):
    row = paths_row([["a", "b"], ["c", "d"]])
    example = build_example(row, DataConfig(), tokenizer("mistral"))
    assert example.text == "<s>[INST] Title: T\nA [/INST]a -> b\nc -> d\n</s>"
    assert example.edges == [("a", "b"), ("c", "d")]
    assert [example.text[begin:end] for begin, end in example.nodes] == ["b", "d"]

    documents = load_rows(tmp_path, [row])
    file = tiny_tokenizers.mistral() / "tokenizer.model"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ids = documents.ids(0).tolist()
    pieces = [processor.id_to_piece(i) for i in ids]
    response = ["a", "▁->", "▁b", "<0x0A>", "c", "▁->", "▁d", "<0x0A>", "</s>"]
    assert pieces[-13:] == ["▁[", "/", "INST", "]", *response]
    assert (ids[-8], ids[-2], ids[-1]) == (3193, 13, 2)
    before = len(ids) - len(response)
    assert documents.labels(0).tolist() == [IGNORE_INDEX] * before + ids[-9:]
    of_response = [-1, -1, 0, -1, -1, -1, 1, -1, -1]
    assert documents.edge_index.tolist() == [-1] * before + of_response


@EVERY_TOKENIZER
@pytest.mark.parametrize("chat", [True, False])
def test_targets_are_the_response_and_eos(name, chat, tmp_path):
    """Pitfall row 1: no name is lost, whatever the tokenizer makes of it."""
    of = tokenizer(name)
    all_paths = [
        [[other, name], [name, other, name]]
        for name in NAMES
        for other in ("Physics", "물리학", name)
    ]
    documents = load_rows(tmp_path, [paths_row(paths) for paths in all_paths], of, chat=chat)
    assert documents.counts.kept == len(all_paths)
    assert not documents.counts.dropped

    num_exact = 0
    for i, paths in enumerate(all_paths):
        text = build_example(paths_row(paths), DataConfig(chat=chat), of).text
        spans = of.encode(text).spans
        written = written_response(paths, text) + of.eos_token
        border = text.rindex(written)
        # a token across the border belongs to the prompt; Mistral has a piece "]$"
        straddling_ends = [end for start, end in spans if start < border < end]
        begin = max([border, *straddling_ends])

        supervised = np.flatnonzero(documents.labels(i) != IGNORE_INDEX)
        assert (np.diff(supervised) == 1).all(), "one stretch"
        assert spans[supervised[0]][0] == begin
        assert spans[supervised[-1]][1] == border + len(written)
        prompt, target = documents.prompt_and_target(i)
        assert target == documents.ids(i)[supervised].tolist()
        assert target[-1] == of.eos_id
        expected = written[begin - border : -len(of.eos_token)]
        num_exact += of.decode_after(prompt, target[:-1]) == expected

    decodes_otherwise = {
        "mistral": ["▁"],
        "llama2": ["▁"],
        "metaspace": ["▁"],
        "llama3": [],
        "qwen": ["e\u0301", "\u1112"],
    }[name]
    num_lossy = 0
    for paths in all_paths:
        nodes = [node for path in paths for node in path]
        num_lossy += any(mark in node for mark in decodes_otherwise for node in nodes)
    assert num_exact == len(all_paths) - num_lossy


# ---- draws


@EVERY_TOKENIZER
def test_draw_drops_whole_nodes_and_nothing_else(name, tmp_path):
    """The prompt has no labels; arrows, newlines, first nodes and EOS keep theirs."""
    rng = random.Random(3)
    pools = [rng.sample(NAMES, 6) for _ in range(20)]
    all_paths = []
    for pool in pools:
        # four paths share their first two edges, which makes these frequent
        all_paths.append([[*pool[:3], rng.choice(pool)] for _ in range(4)])
    rows = [paths_row(paths, abstract="a -> b\nc") for paths in all_paths]
    documents = load_rows(tmp_path, rows, tokenizer(name))
    counts = edge_counts(all_paths)
    dropped_somewhere = set()
    for i, paths in enumerate(all_paths):
        example = build_example(rows[i], DataConfig(), tokenizer(name))
        owner = node_characters(example.text, paths)
        spans = tokenizer(name).encode(example.text).spans
        nodes = [node_of_token(owner, *span) for span in spans]
        every_label = documents.labels(i)
        for epoch in range(60):
            labels = documents.labels(i, draw=LabelDraw(7, epoch))
            before_after = list(zip(nodes, every_label, labels, strict=True))
            dropped = {node for node, before, after in before_after if before != after}
            assert -1 not in dropped
            for node, before, after in before_after:
                assert after == (IGNORE_INDEX if node in dropped else before)
            rates = [expected_rate(counts, example.edges[node]) for node in dropped]
            assert all(rate < 1 for rate in rates), "rare edges are never dropped"
            dropped_somewhere |= {(i, node) for node in dropped}
    assert len(dropped_somewhere) > 100, "many draws, but hardly any drops"


def test_draw_keeps_arrows_newlines_and_eos_of_mistral(tmp_path):
    arrow, newline, eos = 3193, 13, 2
    rng = random.Random(4)
    names = [name for name in NAMES if "->" not in name]
    all_paths = [[rng.choices(names, k=4) for _ in range(5)] for _ in range(10)]
    rows = [paths_row(paths, abstract="x -> y\nz") for paths in all_paths]
    documents = load_rows(tmp_path, rows)
    for i in range(len(documents)):
        assert (documents.ids(i) == arrow).sum() == 5 * 3 + 1, "the response's and the prompt's"
        for epoch in range(100):
            labels = documents.labels(i, draw=LabelDraw(0, epoch))
            assert (labels == arrow).sum() == 5 * 3
            assert (labels == newline).sum() == 5
            assert (labels == eos).sum() == 1
            assert labels[-1] == eos


def test_draw_keeps_every_edge_at_the_papers_rate(tmp_path):
    """10,000 draws, over seeds, epochs and indices, lie within three sigma of min(1, M / n)."""
    rng = random.Random(5)
    children = {"root": ["often", "seldom", "once"], "often": ["a", "b"], "seldom": ["c"]}
    all_paths = []
    for i in range(12):
        fields = rng.choices(["often", "seldom"], weights=[5, 1], k=4)
        paths = [["root", field, rng.choice(children[field])] for field in fields]
        paths.append(["root", "once"] if i == 0 else ["alone"])
        all_paths.append(paths)
    counts = edge_counts(all_paths)
    rates = {edge: expected_rate(counts, edge) for edge in counts}
    assert sum(rate < 1 for rate in rates.values()) >= 2
    assert sum(rate == 1 for rate in rates.values()) >= 2

    documents = load_rows(tmp_path, [paths_row(paths) for paths in all_paths])
    num_kept, num_drawn = dict.fromkeys(counts, 0), dict.fromkeys(counts, 0)
    for i, paths in enumerate(all_paths):
        edges = [edge for path in paths for edge in pairwise(path)]
        begin, end = documents.keep_offsets[i], documents.keep_offsets[i + 1]
        probabilities = documents.keep_probability[begin:end]
        assert probabilities.tolist() == pytest.approx([rates[edge] for edge in edges])
        kept = np.zeros(len(edges), dtype=int)
        for draw in range(10_000):
            kept += draw_kept(probabilities, draw % 10, draw // 10, i)
        for edge, times in zip(edges, kept.tolist(), strict=True):
            num_kept[edge] += times
            num_drawn[edge] += 10_000
    for edge, rate in rates.items():
        assert num_drawn[edge] == 10_000 * counts[edge]
        sigma = (rate * (1 - rate) * num_drawn[edge]) ** 0.5
        message = f"{edge}: {num_kept[edge] / num_drawn[edge]} for {rate}"
        assert abs(num_kept[edge] - rate * num_drawn[edge]) <= 3 * sigma, message


def test_draw_decides_the_training_labels(tmp_path):
    """At the line's number in the file, of which the first line is dropped here."""
    paths = [["r", "x", "y"], ["r", "x", "z"], ["r", "x"], ["r", "w"]]
    documents = load_rows(tmp_path, [{"title": 1}, paths_row(paths), paths_row([["r", "x"]])])
    assert documents.row_index.tolist() == [1, 2]
    edge_index = documents.edge_index[: documents.offsets[1]]
    counts = edge_counts([paths, [["r", "x"]]])
    edges = [edge for path in paths for edge in pairwise(path)]
    probabilities = np.array([expected_rate(counts, edge) for edge in edges])
    for seed, epoch in [(0, 0), (0, 1), (1, 0), (5, 17)]:
        labels = documents.labels(0, draw=LabelDraw(seed, epoch))
        for occurrence, is_kept in enumerate(draw_kept(probabilities, seed, epoch, 1)):
            has_label = labels[edge_index == occurrence] != IGNORE_INDEX
            assert (has_label == is_kept).all()


def test_draw_is_a_function_of_seed_epoch_and_index():
    probabilities = np.full(64, 0.5)
    np.random.seed(1)
    first = draw_kept(probabilities, 3, 4, 5)
    np.random.seed(2)
    draw_kept(probabilities, 0, 0, 0)
    assert (draw_kept(probabilities, 3, 4, 5) == first).all()
    ten = draw_kept(probabilities[:10], 3, 4, 5)
    assert (ten == first[:10]).all(), "later occurrences change nothing"
    for other in [(4, 3, 5), (3, 5, 4), (5, 4, 3), (3, 4, 6), (3, 5, 5), (4, 4, 5)]:
        num_different = (draw_kept(probabilities, *other) != first).sum()
        assert 10 < num_different < 54, f"{other} repeats {(3, 4, 5)}"


def test_draws_are_independent():
    """Both of two are kept in p squared of the draws, also two of one edge in one example."""
    rate, num_draws = 0.3, 10_000
    both = np.array([draw_kept(np.full(2, rate), 0, epoch, 0) for epoch in range(num_draws)])
    single = np.full(1, rate)
    rows = np.array([draw_kept(single, 0, 0, index)[0] for index in range(2 * num_draws)])
    epochs = np.array([draw_kept(single, 0, epoch, 0)[0] for epoch in range(2 * num_draws)])
    sigma = (rate**2 * (1 - rate**2) / num_draws) ** 0.5
    for pairs in (both.all(axis=1), rows[::2] & rows[1::2], epochs[::2] & epochs[1::2]):
        assert abs(pairs.mean() - rate**2) <= 3 * sigma


def test_draws_of_a_repeated_edge_differ(tmp_path):
    paths = [["r", "x"], ["r", "x"], ["r", "x"], ["r", "y"]]
    documents = load_rows(tmp_path, [paths_row(paths)])
    outcomes = set()
    for epoch in range(200):
        has_label = documents.labels(0, draw=LabelDraw(0, epoch)) != IGNORE_INDEX
        kept = [bool(has_label[documents.edge_index == edge].all()) for edge in range(3)]
        outcomes.add(tuple(kept))
    assert len(outcomes) == 8, "every combination of three kept or dropped"


def test_draw_keeps_everything_without_edge_dropping(tmp_path):
    rows = [paths_row([["r", "x"], ["r", "x"], ["r", "y"]])] * 3
    documents = load_rows(tmp_path, rows)
    assert documents.keep_probability.min() < 1
    documents.count_edges(np.arange(3), edge_dropping=False)
    assert documents.edge_counts.tolist() == [6, 3], "they are counted all the same"
    assert (documents.keep_probability == 1).all()
    assert len(documents.keep_probability) == 9
    for epoch in range(50):
        for i in range(3):
            assert (documents.labels(i, draw=LabelDraw(0, epoch)) == documents.labels(i)).all()


# ---- counts


def test_keep_probabilities_are_those_of_the_paper():
    paths = [["a", "b", "c"], ["a", "b"], ["d"], ["a", "a"]]
    assert path_edges(paths) == [("a", "b"), ("b", "c"), ("a", "b"), ("a", "a")]
    counts = edge_counts([paths])
    found = keep_probabilities(np.array([*counts.values()]))
    assert found.tolist() == [expected_rate(counts, edge) for edge in counts]
    assert keep_probabilities(np.empty(0, dtype=np.int64)).tolist() == []
    assert keep_probabilities(np.zeros(2, dtype=np.int64)).tolist() == [1, 1]
    assert keep_probabilities(np.array([0, 3, 0, 1])).tolist() == [1, 2 / 3, 1, 1], "M is 2, not 1"

    rng = random.Random(6)
    counts = edge_counts([random_paths(rng) for _ in range(300)])
    found = keep_probabilities(np.array([*counts.values()]))
    assert found.tolist() == [expected_rate(counts, edge) for edge in counts], "to the bit"
    assert found.min() < 0.5
    assert found.max() == 1


def test_edges_are_not_counted_in_rows_that_are_dropped(tmp_path):
    """Neither in those that are too long nor in those that cannot be read."""
    often = [["r", "x"]] * 3
    rows = [
        paths_row([["r", "x"], ["r", "y"]]),
        paths_row(often, abstract="long " * 200),
        paths_row([["r", "x"], ["q", 5]]),  # type: ignore[list-item]
        {"paths": often},
        paths_row([["r", "y"]]),
    ]
    documents = load_rows(tmp_path, rows, max_seq_length=100)
    assert documents.row_index.tolist() == [0, 4]
    assert sum(map(len, documents.counts.dropped.values())) == 3
    assert documents.edges == [("r", "x"), ("r", "y")]
    assert documents.edge_counts.tolist() == [1, 2]
    assert documents.edge_ids.tolist() == [0, 1, 1]
    assert documents.keep_probability.tolist() == [1, 3 / 4, 3 / 4]


@pytest.fixture(scope="module")
def forty(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[list[str]]], Documents]:
    """The paths of forty rows, and their documents."""
    rng = random.Random(7)
    all_paths = [random_paths(rng) for _ in range(40)]
    rows = [paths_row(paths) for paths in all_paths]
    return all_paths, load_rows(tmp_path_factory.mktemp("forty"), rows)


def occurrences_of(documents: Documents, i: int, of_occurrences: np.ndarray) -> list:
    """Return what an array of length E holds for document i."""
    return of_occurrences[documents.keep_offsets[i] : documents.keep_offsets[i + 1]].tolist()


@pytest.mark.parametrize("seed", range(20))
def test_edges_are_counted_over_the_rows_trained_on(seed: int, forty):
    """As loops over the rows count them, with some rows left out and others used several times."""
    all_paths, documents = forty
    rng = np.random.default_rng(seed)
    indices = rng.integers(40, size=rng.integers(1, 120))
    counts = edge_counts([all_paths[i] for i in indices])

    documents.count_edges(indices)
    found = zip(documents.edges, documents.edge_counts.tolist(), strict=True)
    assert dict(found) == {edge: counts[edge] for edge in documents.edges}
    for i, paths in enumerate(all_paths):
        edges = [documents.edges[k] for k in occurrences_of(documents, i, documents.edge_ids)]
        assert edges == path_edges(paths)
        rates = occurrences_of(documents, i, documents.keep_probability)
        assert rates == [expected_rate(counts, edge) if counts[edge] else 1 for edge in edges]
        if i in indices:
            assert all(counts[edge] for edge in edges)


def test_counts_do_not_depend_on_the_order_of_the_rows(forty):
    _, documents = forty
    indices = np.array([5, 5, 0, 31, 8, 8, 8, 17])
    documents.count_edges(indices)
    counts, rates = documents.edge_counts.tolist(), documents.keep_probability.tolist()
    assert documents.edge_counts.dtype == np.int64 and min(rates) < 1
    documents.count_edges(indices[::-1])
    assert documents.edge_counts.tolist() == counts
    assert documents.keep_probability.tolist() == rates


def test_a_row_used_twice_counts_twice_and_changes_no_probability_if_all_are(forty):
    _, documents = forty
    once = np.arange(40)
    documents.count_edges(once)
    counts, rates = documents.edge_counts, documents.keep_probability.tolist()
    documents.count_edges(np.concatenate([once, once]))
    assert (documents.edge_counts == 2 * counts).all()
    assert documents.keep_probability.tolist() == rates, "to the bit"
