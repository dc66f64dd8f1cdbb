"""Masks of formats text, prompt and paths against the offsets of transformers' tokenizers.

The rule, written out here: a token is supervised if its first character lies in the response or in
EOS. One that begins before belongs to the prompt.
"""

import functools
import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import transformers

from helpers import tiny_tokenizers
from minilora.config import DataConfig
from minilora.data.cache import load_documents
from minilora.data.dataset import IGNORE_INDEX, Documents
from minilora.data.tokenizer import Tokenizer

ALL: dict[str, Callable[[], Path]] = {**tiny_tokenizers.BUILDERS, **tiny_tokenizers.MORE}
EVERY_TOKENIZER = pytest.mark.parametrize("name", ALL)

# prompts and responses; without runs of spaces, where transformers and sentencepiece differ
PAIRS = [
    ("Q: q\nA:", " a"),
    ("Q: q\nA: ", "a"),
    ("Q: q\nA:", "a"),
    ("Why?\n", "Because. "),
    ("물리학이 뭐예요? ", "자연 과학의 한 분야입니다. ㅋㅋ\n"),
    ("物理学：", "自然科学。🤖👩‍🔬 \n"),
    ("", "all of it"),
    ("Physics", "ists"),
    ("x <", "x> a -> b\nc -> d\n"),
    ("In brackets]", "<think>yes"),
    ("blank line\n", "\nthe answer\n\n"),
    ("naïve café 1984", "1985 é"),
    ("the same", "the same"),
    ("A: A: ", "A: A:"),
]


@functools.cache
def ours(name: str) -> Tokenizer:
    return Tokenizer(ALL[name]())


@functools.cache
def theirs(name: str):
    return transformers.AutoTokenizer.from_pretrained(ALL[name]())


def eos_of(name: str) -> str:
    """Return the EOS token, on which both tokenizers agree."""
    token = theirs(name).eos_token
    assert isinstance(token, str)
    assert token == ours(name).eos_token
    return token


def load(directory: Path, rows: Sequence[dict], of: Tokenizer, **settings) -> Documents:
    """Write rows to a file and load it; every row must become one document."""
    file = directory / "rows.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    file.write_text("".join(lines), encoding="utf-8")
    data = DataConfig(**{"num_workers": 1, "strict": True, **settings})
    documents = load_documents(str(file), data, of, "train_file")
    assert len(documents) == documents.counts.kept == len(rows)
    return documents


def offsets_of(name: str, text: str, **settings) -> tuple[list[int], list[tuple[int, int]]]:
    """Return transformers' ids and the characters of each token.

    Where a file's offsets leave spaces out, a token begins where the one before it ends.
    """
    encoded = theirs(name)(text, return_offsets_mapping=True, **settings)
    spans: list[tuple[int, int]] = []
    end = 0
    for start, stop in encoded["offset_mapping"]:
        spans.append((min(start, end), stop))
        end = stop
    return encoded["input_ids"], spans


def ids_and_mask(documents: Documents, i: int) -> tuple[list[int], list[bool]]:
    """Return the ids of a document, and for each whether it is supervised."""
    labels = documents.labels(i).tolist()
    ids = documents.ids(i).tolist()
    assert all(label in (IGNORE_INDEX, token) for label, token in zip(labels, ids, strict=True))
    return ids, [label != IGNORE_INDEX for label in labels]


def decoded_tail(name: str, ids: list[int], mask: list[bool]) -> str:
    """Return what a supervised tail adds to the text before it, by transformers' decoder."""
    at = mask.index(True)
    assert all(mask[at:]), "nothing after the response's first token is left out"
    head, whole = theirs(name).decode(ids[:at]), theirs(name).decode(ids)
    assert whole.startswith(head)
    return whole[len(head) :]


@EVERY_TOKENIZER
def test_mask_of_prompt_and_response_end_to_end(name, tmp_path):
    """Pitfall rows 1, 2, 3 and 12."""
    of, eos = ours(name), eos_of(name)
    rows = [{"prompt": prompt, "completion": response} for prompt, response in PAIRS]
    documents = load(tmp_path, rows, of, format="prompt", chat=False)
    num_straddling = 0
    for i, (prompt, response) in enumerate(PAIRS):
        ids, spans = offsets_of(name, prompt + response + eos)
        mask = [start >= len(prompt) for start, _ in spans]
        mask[0] = False  # nothing predicts the first token
        assert ids_and_mask(documents, i) == (ids, mask), (prompt, response)

        straddling = [(start, stop) for start, stop in spans if start < len(prompt) < stop]
        num_straddling += len(straddling)
        if prompt and not straddling:
            assert decoded_tail(name, ids, mask) == response + eos
        assert mask[-1]
        assert ids[-1] == of.eos_id
        assert ids.count(of.eos_id) == 1
        bos_id = theirs(name).bos_token_id
        assert ids.count(bos_id) == (ids[0] == bos_id) == of.adds_bos
    assert documents.counts.straddling == num_straddling
    if name in ("merging", "mistral", "mistral_v3", "tekken"):
        assert num_straddling > 0, "real vocabularies merge across the border"


@EVERY_TOKENIZER
@pytest.mark.parametrize("marker", ["A:", "A: ", None])
def test_mask_of_text_after_its_last_marker(marker, name, tmp_path):
    """Pitfall rows 1 and 2."""
    of = ours(name)
    texts = [
        "Q: q\nA: a",
        "A: one\nQ: 한국어\nA: 과학 🤖 ",
        "A: A: a",
        "Q: 物理学\nA: 自然科学\n\n",
        "no question A: a\n",
    ]
    rows = [{"text": text} for text in texts]
    documents = load(tmp_path, rows, of, format="text", response_marker=marker)
    num_straddling = 0
    for i, text in enumerate(texts):
        border = 0
        if marker:
            places = [at for at in range(len(text)) if text[at:].startswith(marker)]
            border = max(places) + len(marker)
        ids, spans = offsets_of(name, text + eos_of(name))
        mask = [start >= border for start, _ in spans]
        mask[0] = False  # nothing predicts the first token
        assert ids_and_mask(documents, i) == (ids, mask), text
        num_straddling += sum(start < border < stop for start, stop in spans)
        assert mask[-1]
        assert ids[-1] == of.eos_id
    assert documents.counts.straddling == num_straddling
    if marker == "A: " and name not in ("metaspace", "llama2"):
        assert num_straddling > 0, "the marker's space is part of the next word's token"


def test_straddling_token_belongs_to_the_prompt(tmp_path):
    """Pitfall row 2, with the one token spelled out."""
    of = ours("merging")
    assert ": a" in [of.decode([i]) for i in of.encode("B: a").ids]
    rows = [{"prompt": "B: ", "completion": "a."}]
    documents = load(tmp_path, rows, of, format="prompt", chat=False)
    ids, mask = ids_and_mask(documents, 0)
    supervised = [token for token, is_supervised in zip(ids, mask, strict=True) if is_supervised]
    assert theirs("merging").decode(supervised) == ".<|im_end|>"
    assert theirs("merging").decode(ids) == "B: a.<|im_end|>"
    assert documents.counts.straddling == 1


@EVERY_TOKENIZER
def test_bos_in_the_text_is_not_doubled(name, tmp_path):
    """Pitfall row 12."""
    of = ours(name)
    if of.bos_token is None:
        assert theirs(name).bos_token is None
        return
    prompts = [of.bos_token + "Why?\n", "Why?\n"]
    rows = [{"prompt": prompt, "completion": "because"} for prompt in prompts]
    documents = load(tmp_path, rows, of, format="prompt", chat=False)
    for i, prompt in enumerate(prompts):
        ids, mask = ids_and_mask(documents, i)
        text = prompt + "because" + eos_of(name)
        has_bos = text.startswith(of.bos_token)
        assert ids == theirs(name)(text, add_special_tokens=not has_bos)["input_ids"]
        assert ids.count(theirs(name).bos_token_id) == 1
        assert not mask[0]
        assert decoded_tail(name, ids, mask).strip() == "because" + eos_of(name)


@EVERY_TOKENIZER
@pytest.mark.parametrize("format", ["prompt", "text", "messages", "paths"])
def test_eos_is_supervised_where_it_is_also_the_padding(format, name, tmp_path):
    """Pitfall row 3, in a batch of documents of several lengths."""
    of = ours(name)
    if name != "tekken":  # too large to copy
        source = ALL[name]()
        of = Tokenizer(tiny_tokenizers.copy(source, tmp_path / "t", pad_token=eos_of(name)))
    rows: list[dict] = []
    for length in (1, 5, 20):
        question = "q " * length
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "a"}]
        row = {
            "prompt": {"prompt": question, "completion": "a"},
            "text": {"text": question},
            "messages": {"messages": turns},
            "paths": {"title": question, "abstract": "q", "paths": [["a", "b"]]},
        }[format]
        rows.append(row)
    batch = load(tmp_path, rows, of, format=format).batch([2, 0, 1])

    ends = [end for end, label in enumerate(batch.labels.tolist()) if label == of.eos_id]
    borders = [0, batch.lengths[0], sum(batch.lengths[:2]), sum(batch.lengths)]
    for start, stop in pairwise(borders):
        assert any(start < end < stop for end in ends), "each answer learns to stop"
    assert len(ends) == 3


@EVERY_TOKENIZER
@pytest.mark.parametrize("chat", [True, False])
def test_nodes_of_paths_are_the_tokens_that_touch_them(chat, name, tmp_path):
    """By brute force over characters: a node's are its own and the one space before it."""
    of = ours(name)
    paths = [["a", "b c", "d"], ["a", "과학 🤖", "b c", "物理学"], ["b c", "a"]]
    row = {"title": "물리학", "abstract": "A b c -> d.", "paths": paths}
    documents = load(tmp_path, [row], of, chat=chat)

    question = "Title: 물리학\nA b c -> d."
    answer = "a -> b c -> d\na -> 과학 🤖 -> b c -> 物理学\nb c -> a\n"
    if chat:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        text = of.render(turns)
        border = len(of.render(turns[:1], add_generation_prompt=True))
    else:
        text = f"{question}\n{answer}{eos_of(name)}"
        border = len(question) + 1

    at = text.index("a -> b c -> d\n", border)
    owner = [-1] * len(text)
    num_occurrences = 0
    for path in paths:
        for depth, node in enumerate(path):
            assert text[at : at + len(node)] == node
            if depth > 0:
                for character in range(at - 1, at + len(node)):
                    owner[character] = num_occurrences
                num_occurrences += 1
            is_last = depth + 1 == len(path)
            at += len(node) + (1 if is_last else len(" -> "))

    has_bos = of.bos_token is not None and text.startswith(of.bos_token)
    expected_ids, spans = offsets_of(name, text, add_special_tokens=not has_bos)
    ids, mask = ids_and_mask(documents, 0)
    assert ids == expected_ids
    edge_index = documents.edge_index.tolist()
    for (start, stop), is_supervised, found in zip(spans, mask, edge_index, strict=True):
        touched = {owner[character] for character in range(start, stop)} - {-1}
        expected = max(touched) if touched and is_supervised else -1
        assert found == expected, text[start:stop]
    assert set(edge_index) == {-1, *range(num_occurrences)}
    assert len(documents.keep_probability) == num_occurrences == 6


def test_several_files_are_one_after_the_other(tmp_path):
    """data.train_file may be a list: each file's messages have its own line numbers."""
    rows = [{"prompt": f"q{i} ", "completion": "a" * (i + 1)} for i in range(5)]
    names = []
    for name, part in {"one": rows[:2], "two": rows[2:3], "three": rows[3:]}.items():
        file = tmp_path / f"{name}.jsonl"
        lines = [json.dumps(row) + "\n" for row in part]
        file.write_text("".join(lines) + "{\n", encoding="utf-8")
        names.append(str(file))
    data = DataConfig(format="prompt", chat=False, num_workers=1)
    several = load_documents(names, data, ours("qwen"), "train_file")
    single = load(tmp_path, rows, ours("qwen"), format="prompt", chat=False)
    for i in range(5):
        assert ids_and_mask(several, i) == ids_and_mask(single, i)
    assert several.row_index.tolist() == [0, 1, 3, 5, 6], "lines of all files, broken ones too"
    assert (several.counts.read, several.counts.kept) == (8, 5)
    broken = [message.split(": ")[0] for message in several.counts.dropped["malformed"]]
    assert broken == [f"{names[0]}:3", f"{names[1]}:2", f"{names[2]}:3"]
