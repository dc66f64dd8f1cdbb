"""`--preview N`: print the first N tokenized examples with their masks, and write preview.jsonl."""

import json
import sys
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from minilora import distributed
from minilora.data.dataset import IGNORE_INDEX, Documents, LabelDraw
from minilora.data.tokenizer import Tokenizer
from minilora.files import make_directory

PROMPT, TRAINED, DROPPED = "prompt", "trained", "dropped"
"""The kinds of tokens: not supervised; supervised and trained; supervised, but with the label
dropped in the epoch that is shown (see data/paths.py)."""

TERMINAL_MARKS = {
    PROMPT: ("", ""),
    TRAINED: ("\x1b[32m", "\x1b[0m"),  # green
    DROPPED: ("\x1b[9;31m", "\x1b[0m"),  # red, struck through
}
"""The strings printed before and after tokens of a kind if the output is a terminal."""

PLAIN_MARKS = {PROMPT: ("", ""), TRAINED: ("⟦", "⟧"), DROPPED: ("⟨", "⟩")}
"""The same if the output is not a terminal."""


class Piece(NamedTuple):
    """Consecutive tokens of one kind, as text."""

    kind: str
    text: str


def preview(
    documents: Documents, tokenizer: Tokenizer, count: int, seed: int, directory: Path
) -> None:
    """Print the first examples with the masks of epoch 0, and write preview.jsonl, on rank 0 alone.

    Args:
        documents: the training documents, in file order.
        tokenizer: turns their ids back to text.
        count: how many examples to show.
        seed: the run's seed, from which dropped labels are drawn.
        directory: where to write preview.jsonl; made if it does not exist.
    """
    if distributed.rank() > 0:
        return
    marks = TERMINAL_MARKS if sys.stdout.isatty() else PLAIN_MARKS
    legend = ", ".join(f"{before}{kind}{after}" for kind, (before, after) in marks.items())
    print("legend:", legend, "(supervised, but its label is dropped in epoch 0)\n")

    rows = []
    for i in range(min(count, len(documents))):
        row = _preview_row(documents, tokenizer, i, seed)
        rows.append(row)
        supervised, trained = _count_labels(row["labels"]), _count_labels(row["train_labels"])
        print(
            f"--- example {row['index']}: {len(row['input_ids'])} tokens, {supervised} supervised,"
            f" {trained} of them trained in epoch 0"
        )
        for piece in labelled_pieces(documents, tokenizer, i, seed):
            before, after = marks[piece.kind]
            print(f"{before}{piece.text}{after}", end="")
        print("\n")

    make_directory(directory)
    with open(directory / "preview.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"written to {directory / 'preview.jsonl'}")


def _preview_row(documents: Documents, tokenizer: Tokenizer, i: int, seed: int) -> dict:
    """Return document i as a row of preview.jsonl, with its labels before and after dropping."""
    ids = documents.ids(i).tolist()
    return {
        "index": int(documents.row_index[i]),
        "input_ids": ids,
        "labels": documents.labels(i).tolist(),
        "train_labels": documents.labels(i, draw=LabelDraw(seed, epoch=0)).tolist(),
        "text": tokenizer.decode(ids, skip_special_tokens=False),
    }


def _count_labels(labels: list[int]) -> int:
    """Count the tokens that have a label."""
    return len(labels) - labels.count(IGNORE_INDEX)


def labelled_pieces(documents: Documents, tokenizer: Tokenizer, i: int, seed: int) -> list[Piece]:
    """Split the text of document i into pieces of one kind each, by the labels of epoch 0."""
    ids = documents.ids(i).tolist()
    labels, train_labels = documents.labels(i), documents.labels(i, draw=LabelDraw(seed, epoch=0))
    kinds = []
    for label, train_label in zip(labels, train_labels, strict=True):
        if label == IGNORE_INDEX:
            kinds.append(PROMPT)
        elif train_label == IGNORE_INDEX:
            kinds.append(DROPPED)
        else:
            kinds.append(TRAINED)

    # A piece's text is what its tokens add to the text so far: decoded alone, they could lose a
    # leading space, or be half of a character.
    pieces = []
    end = 0  # of the tokens so far
    text_before = ""
    for kind, tokens in groupby(kinds):
        end += len(list(tokens))
        text = tokenizer.decode(ids[:end], skip_special_tokens=False)
        pieces.append(Piece(kind, text[len(text_before) :]))
        text_before = text
    return pieces
