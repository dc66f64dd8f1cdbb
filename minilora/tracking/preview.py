"""`--preview N`: the first N tokenised examples with their masks, to look at before training, and preview.jsonl."""

import json
import sys
from itertools import groupby
from pathlib import Path

from minilora import dist
from minilora.data import Documents
from minilora.labels import IGNORE
from minilora.running.directory import make_directory
from minilora.tokenizer import Tokenizer

# how a stretch of tokens is shown: (on a terminal, elsewhere), each (before, after)
STYLES = {
    "prompt": (("", ""), ("", "")),
    "trained": (("\x1b[32m", "\x1b[0m"), ("⟦", "⟧")),
    "dropped": (("\x1b[9;31m", "\x1b[0m"), ("⟨", "⟩")),
}


def preview(documents: Documents, tokenizer: Tokenizer, count: int, seed: int, out: Path) -> None:
    """Print the first `count` examples in file order, as epoch 0 trains them, and write OUT/preview.jsonl."""
    if dist.rank() > 0:
        return
    colour = sys.stdout.isatty()
    legend = (f"{before}{name}{after}" for name, styles in STYLES.items() for before, after in [styles[not colour]])
    print("legend:", ", ".join(legend), "(supervised, but its label is dropped in epoch 0)\n")
    rows = []
    for i in range(min(count, len(documents))):
        ids, labels, train_labels = documents.ids(i), documents.labels(i), documents.labels(i, (seed, 0))
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        rows.append(
            {"index": int(documents.index[i]), "input_ids": ids.tolist(), "labels": labels.tolist(),
             "train_labels": train_labels.tolist(), "text": text}
        )  # fmt: skip
        trained, supervised = int((train_labels != IGNORE).sum()), int((labels != IGNORE).sum())
        print(
            f"--- example {rows[-1]['index']}: {len(ids)} tokens, {supervised} supervised, {trained} of them trained in epoch 0"
        )
        for kind, shown in pieces(documents, tokenizer, i, seed):
            before, after = STYLES[kind][not colour]
            print(f"{before}{shown}{after}", end="")
        print("\n")
    make_directory(out)
    with open(out / "preview.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"written to {out / 'preview.jsonl'}")


def pieces(documents: Documents, tokenizer: Tokenizer, i: int, seed: int) -> list[tuple[str, str]]:
    """Document i, as epoch 0 trains it, in stretches of (kind, text); the kinds are those of STYLES."""
    labels, train_labels = documents.labels(i), documents.labels(i, (seed, 0))
    kinds = [
        "prompt" if e == IGNORE else "trained" if t != IGNORE else "dropped" for e, t in zip(labels, train_labels, strict=True)
    ]
    done: list[int] = []
    found, before = [], ""
    for kind, run in groupby(zip(kinds, documents.ids(i).tolist(), strict=True), key=lambda pair: pair[0]):
        done += [token for _, token in run]
        text = tokenizer.decode(done, False)
        found.append((kind, text[len(before) :]))
        before = text
    return found
