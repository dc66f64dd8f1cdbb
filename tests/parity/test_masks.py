"""Masks of the formats text, prompt and paths against the offsets of transformers' tokenizers, by a rule written out here.

The rule: a token is supervised if its first character lies in the response or in EOS; one that begins before is the prompt's.
"""

import functools
import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import transformers

import tiny_tokenizers
from minilora.config import DataConfig
from minilora.data import Documents
from minilora.labels import IGNORE
from minilora.running.cache import load_documents
from minilora.tokenizer import Tokenizer

ALL: dict[str, Callable[[], Path]] = {**tiny_tokenizers.BUILDERS, **tiny_tokenizers.MORE}
EVERY = pytest.mark.parametrize("name", ALL)

# prompts and responses; without runs of spaces, which transformers cuts otherwise than sentencepiece in a tokenizer.model
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


def eos(name: str) -> str:
    token = theirs(name).eos_token
    assert isinstance(token, str) and token == ours(name).eos_token
    return token


def load(directory: Path, rows: Sequence[dict], of: Tokenizer, **settings) -> Documents:
    file = directory / "rows.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    documents = load_documents(str(file), DataConfig(**{"num_workers": 1, "strict": True, **settings}), of, "train_file")
    assert len(documents) == documents.counts.kept == len(rows)
    return documents


def expected(name: str, text: str, border: int) -> tuple[list[int], list[bool], list[tuple[int, int]]]:
    """(ids, is supervised, characters of each token) of a text whose response begins at a character."""
    out = theirs(name)(text, return_offsets_mapping=True)
    places: list[tuple[int, int]] = []
    for start, stop in out["offset_mapping"]:
        before = places[-1][1] if places else 0
        places.append((min(start, before), stop) if start > before else (start, stop))  # some files' offsets leave spaces out
    mask = [i > 0 and start >= border for i, (start, _) in enumerate(places)]  # nothing predicts the first token
    return out["input_ids"], mask, places


def got(documents: Documents, i: int) -> tuple[list[int], list[bool]]:
    labels = documents.labels(i).tolist()
    ids = documents.ids(i).tolist()
    assert all(label in (IGNORE, token) for label, token in zip(labels, ids, strict=True))
    return ids, [label != IGNORE for label in labels]


def said(name: str, ids: list[int], mask: list[bool]) -> str:
    """What a supervised tail adds to what comes before it, by transformers' decoder."""
    at = mask.index(True)
    assert all(mask[at:]), "nothing after the response's first token is left out"
    head, whole = theirs(name).decode(ids[:at]), theirs(name).decode(ids)
    assert whole.startswith(head)
    return whole[len(head) :]


@EVERY
def test_prompt_and_response_end_to_end(name, tmp_path):
    """Pitfall rows 1, 2, 3 and 12."""
    of = ours(name)
    documents = load(tmp_path, [{"prompt": p, "completion": c} for p, c in PAIRS], of, format="prompt", chat=False)
    straddling = 0
    for i, (prompt, response) in enumerate(PAIRS):
        ids, mask, places = expected(name, prompt + response + eos(name), len(prompt))
        assert got(documents, i) == (ids, mask), (prompt, response)
        across = [(start, stop) for start, stop in places if start < len(prompt) < stop]
        straddling += len(across)
        if not across and prompt:
            assert said(name, ids, mask) == response + eos(name)
        assert mask[-1] and ids[-1] == of.eos_id and ids.count(of.eos_id) == 1
        assert ids.count(theirs(name).bos_token_id) == (ids[0] == theirs(name).bos_token_id) == of.adds_bos
    assert documents.counts.straddling == straddling
    assert (straddling > 0) or name not in ("merging", "mistral", "mistral_v3", "tekken"), "real ones merge across it, too"


@EVERY
@pytest.mark.parametrize("marker", ["A:", "A: ", None])
def test_text_after_its_last_marker(marker, name, tmp_path):
    """Pitfall rows 1 and 2."""
    of = ours(name)
    texts = ["Q: q\nA: a", "A: one\nQ: 한국어\nA: 과학 🤖 ", "A: A: a", "Q: 物理学\nA: 自然科学\n\n", "no question A: a\n"]
    documents = load(tmp_path, [{"text": text} for text in texts], of, format="text", response_marker=marker)
    straddling = 0
    for i, text in enumerate(texts):
        border = max(at for at in range(len(text)) if text[at:].startswith(marker)) + len(marker) if marker else 0
        ids, mask, places = expected(name, text + eos(name), border)
        assert got(documents, i) == (ids, mask), text
        straddling += sum(start < border < stop for start, stop in places)
        assert mask[-1] and ids[-1] == of.eos_id
    assert documents.counts.straddling == straddling
    assert marker != "A: " or straddling > 0 or name in ("metaspace", "llama2"), "a space that belongs to the next word"


def test_a_token_across_the_border_is_the_prompts(tmp_path):
    """Pitfall row 2, with the one token spelt out."""
    of = ours("merging")
    assert ": a" in [of.decode([i]) for i in of.encode("B: a").ids]
    documents = load(tmp_path, [{"prompt": "B: ", "completion": "a."}], of, format="prompt", chat=False)
    ids, mask = got(documents, 0)
    supervised = theirs("merging").decode([token for token, is_supervised in zip(ids, mask, strict=True) if is_supervised])
    assert supervised == ".<|im_end|>" and theirs("merging").decode(ids) == "B: a.<|im_end|>"
    assert documents.counts.straddling == 1


@EVERY
def test_a_written_bos_is_not_doubled(name, tmp_path):
    """Pitfall row 12."""
    of = ours(name)
    if of.bos_token is None:
        assert theirs(name).bos_token is None
        return
    rows = [{"prompt": of.bos_token + "Why?\n", "completion": "because"}, {"prompt": "Why?\n", "completion": "because"}]
    documents = load(tmp_path, rows, of, format="prompt", chat=False)
    for i, row in enumerate(rows):
        ids, mask = got(documents, i)
        text = row["prompt"] + "because" + eos(name)
        given = theirs(name)(text, add_special_tokens=not text.startswith(of.bos_token))["input_ids"]
        assert ids == given and ids.count(theirs(name).bos_token_id) == 1 and not mask[0]
        assert said(name, ids, mask).strip() == "because" + eos(name)


@EVERY
@pytest.mark.parametrize("format", ["prompt", "text", "messages", "paths"])
def test_eos_is_supervised_where_it_is_also_the_padding(format, name, tmp_path):
    """Pitfall row 3, in a batch of documents of several lengths."""
    of = ours(name)
    if name != "tekken":  # too large to copy
        of = Tokenizer(tiny_tokenizers.copy(ALL[name](), tmp_path / "t", pad_token=eos(name)))
    rows = [
        {
            "prompt": "q " * n, "completion": "a", "text": "q " * n, "title": "t " * n, "abstract": "q", "paths": [["a", "b"]],
            "messages": [{"role": "user", "content": "q " * n}, {"role": "assistant", "content": "a"}],
        }
        for n in (1, 5, 20)
    ]  # fmt: skip
    documents = load(tmp_path, rows, of, format=format)
    batch = documents.batch([2, 0, 1])
    ends = [end for end, label in enumerate(batch.labels.tolist()) if label == of.eos_id]
    starts = [0, batch.lengths[0], sum(batch.lengths[:2]), sum(batch.lengths)]
    for start, stop in pairwise(starts):
        assert any(start < end < stop for end in ends), "each answer learns to stop"
    assert len(ends) == 3


@EVERY
@pytest.mark.parametrize("chat", [True, False])
def test_nodes_of_paths_are_the_tokens_that_touch_them(chat, name, tmp_path):
    """By brute force over characters: a node's are its own and the one space before it."""
    of = ours(name)
    row = {
        "title": "물리학",
        "abstract": "A b c -> d.",
        "paths": [["a", "b c", "d"], ["a", "과학 🤖", "b c", "物理学"], ["b c", "a"]],
    }
    documents = load(tmp_path, [row], of, chat=chat)
    question, answer = "Title: 물리학\nA b c -> d.", "a -> b c -> d\na -> 과학 🤖 -> b c -> 物理学\nb c -> a\n"
    if chat:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        text = of.render(turns)
        border = len(of.render(turns[:1], add_generation_prompt=True))
    else:
        text, border = f"{question}\n{answer}{eos(name)}", len(question) + 1
    at = text.index("a -> b c -> d\n", border)
    owner = [-1] * len(text)
    occurrence = 0
    for path in row["paths"]:
        for depth, node in enumerate(path):
            assert text[at : at + len(node)] == node
            if depth:
                for character in range(at - 1, at + len(node)):
                    owner[character] = occurrence
                occurrence += 1
            at += len(node) + (len(" -> ") if node is not path[-1] else 1)
    out = theirs(name)(text, add_special_tokens=not (of.bos_token and text.startswith(of.bos_token)), return_offsets_mapping=True)
    ids, mask = got(documents, 0)
    assert ids == out["input_ids"]
    found = documents.node.tolist()
    end = 0
    for start, stop, is_supervised, node in zip(*zip(*out["offset_mapping"], strict=True), mask, found, strict=True):
        start = min(start, end) if start > end else start
        end = stop
        touched = {owner[character] for character in range(start, stop)} - {-1}
        assert node == (max(touched) if touched and is_supervised else -1), text[start:stop]
    assert set(found) == {-1, *range(occurrence)} and len(documents.keep) == occurrence == 6


def test_several_files_are_one_after_the_other(tmp_path):
    """data.train_file may be a list: the documents of the files laid end to end, each file with its own lines in messages."""
    rows = [{"prompt": f"q{i} ", "completion": "a" * (i + 1)} for i in range(5)]
    names = []
    for name, part in {"one": rows[:2], "two": rows[2:3], "three": rows[3:]}.items():
        names.append(str(tmp_path / f"{name}.jsonl"))
        Path(names[-1]).write_text("".join(json.dumps(row) + "\n" for row in part) + "{\n", encoding="utf-8")
    data = DataConfig(format="prompt", chat=False, num_workers=1)
    several = load_documents(names, data, ours("qwen"), "train_file")
    single = load(tmp_path, rows, ours("qwen"), format="prompt", chat=False)
    assert [got(several, i) for i in range(5)] == [got(single, i) for i in range(5)]
    assert several.index.tolist() == [0, 1, 3, 5, 6], "lines of the files together, the broken ones counted"
    assert (several.counts.read, several.counts.kept) == (8, 5)
    broken = several.counts.dropped["malformed"]
    assert [message.split(": ")[0] for message in broken] == [f"{names[0]}:3", f"{names[1]}:2", f"{names[2]}:3"]
