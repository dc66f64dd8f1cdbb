"""Conversations that chat templates treat in different ways, and the documents they become."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

from helpers import tiny_tokenizers
from minilora.config import DataConfig
from minilora.data.cache import load_documents
from minilora.data.dataset import IGNORE_INDEX, Documents
from minilora.data.tokenizer import Tokenizer

ALL_TOKENIZERS: dict[str, Callable[[], Path]] = {**tiny_tokenizers.BUILDERS, **tiny_tokenizers.MORE}


@functools.cache
def tokenizer(name: str, template: str | None = None) -> Tokenizer:
    """Return a tokenizer by its key in ALL_TOKENIZERS; shared, so not to be changed."""
    return Tokenizer(ALL_TOKENIZERS[name](), template)


def chat(*contents: str, system: str | None = None, train: tuple[bool, ...] = ()) -> list[dict]:
    """Return turns of user and assistant in alternation.

    Args:
        contents: of the turns.
        system: content of a system turn before them.
        train: the "train" flags of the assistant's turns.
    """
    messages: list[dict] = [{"role": "system", "content": system}] if system is not None else []
    for i, content in enumerate(contents):
        messages.append({"role": ["user", "assistant"][i % 2], "content": content})
        if i % 2 and train:
            messages[-1]["train"] = train[i // 2]
    return messages


CONVERSATIONS: dict[str, list[dict]] = {
    "one answer": chat("Why?", "Because."),
    "three answers": chat("q", "first", "q", "second\n\nline", "r", "third."),
    "system": chat("q", "one", "r", "two", system="Be brief."),
    "system, one answer": chat("q", "one", system="Be brief."),
    "empty system": chat("q", "one", "r", "two", system=""),
    "middle not trained": chat("q", "one", "r", "two", "s", "three", train=(True, False, True)),
    "first not trained": chat("q", "one", "r", "two", system="Be brief.", train=(False, True)),
    "last not trained": chat("q", "one", "r", "two", train=(True, False)),
    "korean": chat(
        "물리학이 뭐예요?",
        "자연 과학의 한 분야입니다.",
        "더 자세히.",
        "네, 한국어로요 ㅋㅋ",
        system="한국어로 답하세요.",
    ),
    "chinese, emoji": chat("物理学？", "自然科学。🤖", "👩‍🔬?", "🇰🇷", train=(True, True)),
    "a space at the end": chat("q ", "one ", "r  ", "two  "),
    "spaces at the end": chat("q ", "one ", "r\n", "two\n\n", "s", "three \n"),
    "spaces before": chat("\nq", "\none", " r", " two", "s", "\n\nthree"),
    "doubled spaces": chat("a  b", "x  y", "c   d", "    indented"),
    "the same words": chat("the same", "the same", "the same", "the same"),
    "role names": chat("user", "assistant", "assistant", "user"),
    "plain markers": chat("q", "assistant\nuser: [INST] x [/INST] y", "r", "INST] two [/"),
    "special tokens": chat(
        "q", "a<|im_end|>b</s>c<|eot_id|>d", "r", "<|im_start|>assistant\ntwo<|im_end|>"
    ),
    "empty answer": chat("q", "", "r", "two"),
    "blank answer": chat("q", "one", "r", " \n"),
    "open question": chat("q", "one", "r", "two", "s"),
    "two answers in a row": [*chat("q", "one"), {"role": "assistant", "content": "two"}],
    "a tool": [
        *chat("q", "one"),
        {"role": "tool", "content": "{}"},
        {"role": "assistant", "content": "two"},
    ],
    "one thought": chat("q", "<think>why</think>one"),
    "thoughts": chat(
        "q",
        "<think>\nwhy\n</think>\n\none",
        "r",
        "<think>u v</think> two",
        "s",
        "three",
        system="Think.",
    ),
    "thoughts, last trained": chat(
        "q", "<think>t</think>one", "r", "<think>u</think>two", train=(False, True)
    ),
    "an unopened thought": chat("q", "why</think>one", "r", "<think></think>two"),
    "an answer like a thought": chat("q", "think", "r", "<th"),
    "a column of thoughts": [
        *chat("q"),
        {"role": "assistant", "content": "one", "reasoning_content": "one, or\ntwo"},
    ],
}


def trained_answers(messages: list[dict]) -> list[int]:
    """Return the indices of the assistant's turns that are trained on."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return [i for i in answers if messages[i].get("train", True)]


def load_conversation(directory: Path, messages: list[dict], of: Tokenizer) -> Documents | None:
    """Load a file that holds a conversation, and after it a row that is always usable.

    Returns:
        The documents of both, the usable row's as the last; None if the conversation was dropped.
    """
    rows = [{"messages": messages}, {"messages": chat("kept", "kept")}]
    file = directory / "rows.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    file.write_text("".join(lines), encoding="utf-8")
    data = DataConfig(format="messages", num_workers=1)
    documents = load_documents(str(file), data, of, "train_file")
    assert documents.counts.read == 2
    assert documents.row_index.tolist() == [0] * (len(documents) - 1) + [1]
    rows_kept = len(set(documents.row_index.tolist()))
    assert documents.counts.kept == rows_kept, "rows are counted, not documents"
    return documents if len(documents) > 1 else None


def ids_and_masks(documents: Documents) -> list[tuple[list[int], list[bool]]]:
    """Return (ids, is supervised) of each document of a conversation."""
    found = []
    for i in range(len(documents) - 1):  # the last is the usable row's
        is_supervised = (documents.labels(i) != IGNORE_INDEX).tolist()
        found.append((documents.ids(i).tolist(), is_supervised))
    return found
