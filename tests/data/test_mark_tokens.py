"""Which tokens are supervised, and which are part of a node, held against the text itself."""

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers

from helpers import tiny_tokenizers
from helpers.category_paths import (
    NAMES,
    node_characters,
    node_of_token,
    paths_row,
    random_paths,
    response_to,
    written_response,
)
from helpers.data_rows import EVERY_TOKENIZER, build_example, load_rows, tokenizer
from minilora.config import DataConfig
from minilora.data.dataset import IGNORE_INDEX, LabelDraw
from minilora.data.tokenize import format_counts, mark_tokens
from minilora.data.tokenizer import Tokenizer


@EVERY_TOKENIZER
@pytest.mark.parametrize("chat", [True, False])
def test_marks_agree_with_a_reference_by_characters(name, chat):
    rng = random.Random(2)
    of, data = tokenizer(name), DataConfig(chat=chat)
    for _ in range(150):
        paths = random_paths(rng)
        abstract = " -> ".join(rng.choices(NAMES, k=3))
        example = build_example(paths_row(paths, rng.choice(NAMES), abstract), data, of)
        text = example.text
        ids, spans = of.encode(text)
        marks = mark_tokens(text, spans, example.supervised, example.nodes)

        response = written_response(paths, text)
        begin = text.rindex(response)
        end = text.index(of.eos_token, begin + len(response)) + len(of.eos_token)
        assert marks.supervised.tolist() == [begin <= start < end for start, _ in spans], text
        assert marks.straddling == sum(start < begin < stop for start, stop in spans)

        owner = node_characters(text, paths)
        assert marks.edge_index.tolist() == [node_of_token(owner, *span) for span in spans], text
        occurrences = set(marks.edge_index.tolist()) - {-1}
        assert occurrences == set(range(len(example.edges))), "each has tokens to drop"
        assert example.edges == [
            (path[i], path[i + 1]) for path in paths for i in range(len(path) - 1)
        ]

        last = np.flatnonzero(marks.supervised)[-1]
        assert ids[last] == of.eos_id
        assert marks.edge_index[last] == -1


def test_marks_of_any_cut_into_tokens_agree_with_the_reference():
    """Whatever a vocabulary merges: tokens of up to four characters, across every border."""
    rng = random.Random(9)
    for _ in range(200):
        paths = random_paths(rng)
        prompt, text = "Q: x\n", f"Q: x\n{response_to(paths)}$"
        example = build_example(paths_row(paths), DataConfig(chat=False), tokenizer("mistral"))
        shift = len(prompt) - example.supervised[0][0]
        nodes = [(begin + shift, end + shift) for begin, end in example.nodes]
        cuts = [0]
        while cuts[-1] < len(text):
            cuts.append(min(cuts[-1] + rng.randint(1, 4), len(text)))
        spans = list(pairwise(cuts))

        marks = mark_tokens(text, spans, [(len(prompt), len(text))], nodes)
        assert marks.supervised.tolist() == [start >= len(prompt) for start, _ in spans]
        owner = node_characters(text, paths)
        assert marks.edge_index.tolist() == [
            node_of_token(owner, start, end) if start >= len(prompt) else -1 for start, end in spans
        ]
        assert marks.straddling == (len(prompt) not in cuts)


def test_marks_leave_a_token_of_the_prompt_out_of_every_node():
    """Also one that reaches over the border into a node: it has no label that could be dropped."""
    marks = mark_tokens("pa -> b\n", [(0, 7), (7, 8)], [(1, 8)], [(6, 7)])
    assert marks.supervised.tolist() == [False, True]
    assert marks.edge_index.tolist() == [-1, -1]
    assert marks.straddling == 1


@pytest.mark.parametrize("name", ["mistral", "llama2"])
def test_marks_of_a_node_include_its_space_and_its_bytes(name):
    paths = [["a", "𐌰b", "물리학", "é"]]
    example = build_example(paths_row(paths), DataConfig(), tokenizer(name))
    _, spans = tokenizer(name).encode(example.text)
    marks = mark_tokens(example.text, spans, example.supervised, example.nodes)
    texts = [example.text[start:end] for start, end in spans]
    of_occurrence: dict[int, list[str]] = {0: [], 1: [], 2: []}
    for text, occurrence in zip(texts, marks.edge_index.tolist(), strict=True):
        of_occurrence.setdefault(occurrence, []).append(text)
    for occurrence, expected in enumerate([" 𐌰b", " 물리학", " é"]):
        assert "".join(dict.fromkeys(of_occurrence[occurrence])) == expected
    assert of_occurrence[0][:5] == [" ", "𐌰", "𐌰", "𐌰", "𐌰"]


def test_special_tokens_in_a_name_are_part_of_the_node(tmp_path):
    """They become their ids, as in transformers, but end neither the node nor the response."""
    paths = [["a", "x</s>日本", "b"], ["c", "<s>"]]
    documents = load_rows(tmp_path, [paths_row(paths)])
    assert documents.labels(0)[-1] == tokenizer("mistral").eos_id

    text = build_example(paths_row(paths), DataConfig(), tokenizer("mistral")).text
    owner = node_characters(text, paths)
    expected = []
    for start, end in tokenizer("mistral").encode(text).spans:
        # the dummy space after </s> covers nothing, between two characters of the node
        is_dummy_space = start == end == text.index("日本")
        expected.append(0 if is_dummy_space else node_of_token(owner, start, end))
    assert documents.edge_index.tolist() == expected


# ---- the border of prompt and response


def merging(directory: Path) -> Tokenizer:
    """Write a tokenizer.json of single characters that merges "a" and "b" wherever they meet."""
    pieces = ["</s>", *"abxy", "ab"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("a", "b")]))
    raw.add_special_tokens(["</s>"])
    directory.mkdir()
    raw.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return Tokenizer(directory)


def test_straddling_token_belongs_to_the_prompt(tmp_path):
    """Pitfall row 2."""
    of = merging(tmp_path / "merging")
    rows = [
        {"prompt": "xa", "completion": "by"},
        {"prompt": "xx", "completion": "ab"},
        {"prompt": "a", "completion": "bab"},
    ]
    documents = load_rows(tmp_path, rows, of, format="prompt", chat=False)
    tokens, is_supervised = [], []
    for i in range(3):
        tokens.append([of.decode([t], skip_special_tokens=False) for t in documents.ids(i)])
        is_supervised.append((documents.labels(i) != IGNORE_INDEX).tolist())
    assert tokens == [["x", "ab", "y", "</s>"], ["x", "x", "ab", "</s>"], ["ab", "ab", "</s>"]]
    assert is_supervised == [
        [False, False, True, True],
        [False, False, True, True],
        [False, True, True],
    ]
    assert documents.counts.straddling == 2
    assert "2 tokens straddle prompt and response" in format_counts(documents.counts)

    clean = load_rows(tmp_path, rows[1:2], of, format="prompt", chat=False)
    assert clean.counts.straddling == 0
    assert "straddle" not in format_counts(clean.counts)


def test_straddling_tokens_of_mistral_are_counted(tmp_path):
    """`]` of [/INST] and a response's first characters can be one piece."""
    file = tiny_tokenizers.mistral() / "tokenizer.model"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(file))

    def begins_with_bracket(piece: str) -> bool:
        return len(piece) > 1 and piece[0] == "]"

    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    starts = [piece[1:] for piece in pieces if begins_with_bracket(piece)]
    starts = [start for start in starts if start.strip()]
    assert len(starts) > 5
    num_straddling = 0
    for start in starts:
        written = processor.encode(f"[INST] x [/INST]{start} y", out_type=str)
        num_straddling += any(map(begins_with_bracket, written))
    assert num_straddling > 5

    rows = [{"prompt": "x", "completion": start + " y"} for start in starts]
    documents = load_rows(tmp_path, rows, format="prompt")
    assert documents.counts.straddling == num_straddling


# ---- the end of the response


@pytest.mark.parametrize("name", ["mistral", "qwen", "llama3"])
def test_eos_is_supervised_where_it_is_the_pad_token(name, tmp_path):
    """Pitfall row 3."""
    source, eos = tiny_tokenizers.BUILDERS[name](), tokenizer(name).eos_token
    of = Tokenizer(tiny_tokenizers.copy(source, tmp_path / "t", pad_token=eos))
    paths = [["r", "x"], ["r", "x"], ["r", "y"]]
    documents = load_rows(tmp_path, [paths_row(paths)], of)
    assert documents.prompt_and_target(0)[1][-1] == of.eos_id
    place = np.flatnonzero(documents.ids(0) == of.eos_id)[-1]
    for draw in [None, *(LabelDraw(0, epoch) for epoch in range(50))]:
        assert documents.labels(0, draw)[place] == of.eos_id


def test_eos_is_no_part_of_a_name_whose_end_the_template_trims(tmp_path):
    """Llama 3's template trims contents, so EOS is where the last name's last space would be."""
    paths = [["r", "x "], ["r", "x "], ["r", "y"], ["r", "x "]]
    documents = load_rows(tmp_path, [paths_row(paths)], tokenizer("llama3"))
    for epoch in range(50):
        assert documents.labels(0, draw=LabelDraw(0, epoch))[-1] == tokenizer("llama3").eos_id
