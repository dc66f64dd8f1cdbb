"""Where answers end: stop strings and end tokens, for models that say what the test wants."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

import minilora
from helpers import tiny_tokenizers
from helpers.decoding import QUESTION, model_over, sampling, script, tokenizer_named
from minilora.data.tokenizer import Tokenizer
from minilora.generation.engine import Answer, generate_ids
from minilora.generation.stopping import StopCriteria

SAID = " Science -> Art\n서울 🤖🤖🤖 物理学史の博物館と大学、(x) end 1984"
EVERY_TOKENIZER = pytest.mark.parametrize("name", tiny_tokenizers.BUILDERS)

Ended = tuple[list[int], str, str]  # ids, text and finish reason of an answer


def said_ids(tokens: Tokenizer) -> list[int]:
    """Return the ids of SAID as an answer to QUESTION."""
    question, both = tokens.encode(QUESTION).ids, tokens.encode(QUESTION + SAID).ids
    assert both[: len(question)] == question
    return both[len(question) :]


def scripted_answer(
    monkeypatch: pytest.MonkeyPatch, tokens: Tokenizer, ids: Sequence[int], stop: Sequence[str] = ()
) -> Answer:
    """Return the answer to QUESTION of a model that says `ids`."""
    script(monkeypatch, ids)
    model, question = model_over(tokens.vocab_size), tokens.encode(QUESTION).ids
    (answer,) = generate_ids(model, [question], tokens, sampling(len(ids), stop=stop))
    return answer


# --- stop strings ---


@EVERY_TOKENIZER
def test_answers_end_before_a_stop_string(name: str, monkeypatch: pytest.MonkeyPatch):
    """Inside a token, across several, across the bytes of characters; nothing comes after it."""
    tokens, rng = tokenizer_named(name), random.Random(0)
    question, ids = tokens.encode(QUESTION).ids, said_ids(tokens)
    cuts = [sorted(rng.sample(range(len(SAID) + 1), 2)) for _ in range(25)]
    for begin, end in [*cuts, (SAID.index("物"), SAID.index("、"))]:
        stop = SAID[begin:end]
        answer = scripted_answer(monkeypatch, tokens, ids, stop=("not there", stop))
        assert answer.text == SAID[: SAID.index(stop)], repr(stop)

        needed = 1
        while stop not in tokens.decode_after(question, ids[:needed]):
            needed += 1
        assert answer.ids == ids[:needed] and answer.finish_reason == "stop", repr(stop)


@pytest.mark.parametrize("stop", [("end", "rt", "Ar"), ("Art\n", "Ar", "rt")])
def test_the_first_of_several_stop_strings_counts(
    stop: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    """The first in the text; two of them are complete with the same token."""
    tokens = tokenizer_named("qwen")
    answer = scripted_answer(monkeypatch, tokens, said_ids(tokens), stop=stop)
    assert answer.text == " Science -> "


@EVERY_TOKENIZER
def test_a_stop_string_in_the_prompt_stops_nothing(name: str, monkeypatch: pytest.MonkeyPatch):
    tokens = tokenizer_named(name)
    stop = ("Why", "? ->", "-> Sci")
    assert scripted_answer(monkeypatch, tokens, said_ids(tokens), stop=stop).text == SAID


STOPS = [
    " ",
    "\n",
    "한",
    "物",
    "🤖",
    "物理",
    "は🤖",
    "e ",
    ". ",
    "(x",
    "Art\n",
    "t",
    " -> ",
    "->",
    "1984",
    "あ",
    "\n\n",
    "한국",
]
PIECES = [
    " Science",
    " -> Art\n",
    "서울 ",
    "한국어",
    "🤖🤖",
    " 物理学史の博物館",
    "、(x) ",
    "end. ",
    "1984\n\n",
    " the",
    "é",
]


def random_answer(rng: random.Random, name: str, length: int) -> list[int]:
    """Draw ids of words, of fragments of words (so of characters), and of any other tokens."""
    tokens = tokenizer_named(name)
    plain = sorted(set(range(tokens.vocab_size)) - set(tokens.specials.values()))
    ids: list[int] = []
    while len(ids) < length:
        piece = [i for i in tokens.encode(rng.choice(PIECES)).ids if i != tokens.bos_id]
        begin, end = 0, len(piece)
        if rng.random() < 0.5:
            begin, end = sorted(rng.choices(range(len(piece) + 1), k=2))
        if rng.random() < 0.8:
            ids += piece[begin:end]
        else:
            ids += rng.choices(plain, k=rng.randint(1, 3))
    return ids[:length]


def end_by_criteria(
    name: str, answers: Sequence[tuple[list[int], list[int]]], stop: Sequence[str]
) -> list[Ended]:
    """Return how each of several answers ends, by one StopCriteria that is asked token by token.

    Args:
        name: of the tokenizer.
        answers: (prompt, what the model says) of each.
        stop: stop strings.
    """
    params = sampling(max(len(ids) for _, ids in answers), stop=stop)
    criteria = StopCriteria(tokenizer_named(name), params)
    ended: list[Ended] = []
    for prompt, ids in answers:
        n = 1
        while criteria.finish_reason(prompt, ids[:n]) is None:
            n += 1
        reason = criteria.finish_reason(prompt, ids[:n])
        assert reason is not None
        ended.append((ids[:n], criteria.text(prompt, ids[:n]), reason))
    return ended


def end_by_brute_force(name: str, prompt: list[int], ids: list[int], stop: Sequence[str]) -> Ended:
    """Return how an answer ends, by decoding all of it after each token."""
    for n in range(1, len(ids) + 1):
        text = tokenizer_named(name).decode_after(prompt, ids[:n])
        found = [text.index(string) for string in stop if string in text]
        if found:
            return ids[:n], text[: min(found)], "stop"
    return ids, text, "length"


@pytest.mark.parametrize("prompt", ["in words", "after a special token", "out of nothing"])
@EVERY_TOKENIZER
def test_no_stop_string_is_missed(name: str, prompt: str):
    tokens, rng = tokenizer_named(name), random.Random(0)
    question = tokens.encode(QUESTION).ids
    ordinary = (tokens.bos_id, tokens.eos_id)
    special = next(i for i in tokens.specials.values() if i not in ordinary)
    prompt_ids = {
        "in words": question,
        "after a special token": [*question, special],
        "out of nothing": [special if tokens.bos_id is None else tokens.bos_id],
    }[prompt]

    reasons = []
    for _ in range(12):
        stop = rng.sample(STOPS, rng.choice([1, 1, 2, 4]))
        answers = [(prompt_ids, random_answer(rng, name, 20)) for _ in range(5)]
        expected = [end_by_brute_force(name, *answer, stop) for answer in answers]
        assert end_by_criteria(name, answers, stop) == expected, stop
        reasons += [reason for _, _, reason in expected]
    assert 10 < reasons.count("stop") < 58


# characters of one to four bytes, for most of which no tokenizer has a token
BYTES = " 👩‍👩‍👧‍👦🤖ᚠᚠ👨‍👩‍👧é🤖ꙮ🤖\n"


@EVERY_TOKENIZER
def test_stop_strings_in_long_runs_of_bytes(name: str):
    tokens, rng = tokenizer_named(name), random.Random(0)
    prompt = tokens.encode(QUESTION).ids
    ids = tokens.encode(QUESTION + BYTES).ids[len(prompt) :]
    for _ in range(30):
        begin = rng.randrange(len(BYTES))
        stop = [BYTES[begin : begin + rng.randint(1, 4)]]
        expected = end_by_brute_force(name, prompt, ids, stop)
        assert expected[1:] == (BYTES[: BYTES.index(stop[0])], "stop")
        assert end_by_criteria(name, [(prompt, ids)], stop) == [expected], stop


# --- end tokens and the longest length ---


@EVERY_TOKENIZER
def test_eos_ends_an_answer_and_is_not_in_its_text(name: str, monkeypatch: pytest.MonkeyPatch):
    tokens = tokenizer_named(name)
    assert tokens.eos_id is not None
    ids = [*said_ids(tokens), tokens.eos_id]
    answer = scripted_answer(monkeypatch, tokens, [*ids, *ids])
    assert (answer.text, answer.ids, answer.finish_reason) == (SAID, ids, "stop")


def test_an_answer_that_does_not_end(monkeypatch: pytest.MonkeyPatch):
    tokens = tokenizer_named("qwen")
    answer = scripted_answer(monkeypatch, tokens, said_ids(tokens)[:5])
    assert len(answer.ids) == 5 and answer.finish_reason == "length"
    assert answer.text and SAID.startswith(answer.text)


def test_end_tokens_of_generation_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """generation_config.json may list several; one of them may otherwise be plain text."""
    directory = tiny_tokenizers.copy(tiny_tokenizers.llama3(), tmp_path / "tokenizer")
    tokens = Tokenizer(directory)
    plain, ids = tokens.encode("Q").ids[-1], said_ids(tokens)
    ends = [tokens.specials["<|end_of_text|>"], plain]
    model = model_over(tokens.vocab_size)
    for listed in (ends, ends[0]):
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
        tokens = Tokenizer(directory)
        for end in (tokens.eos_id, *ends):
            script(monkeypatch, [*ids, end, *ids, tokens.eos_id])
            is_end = end != plain or listed == ends
            expected = SAID if is_end else f"{SAID}Q{SAID}"
            assert minilora.generate(model, tokens, [QUESTION]) == [expected]
