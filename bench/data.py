"""Time to tokenize and label 100,000 rows, beside datasets.map: python bench/data.py

Rows of {"question", "answer"} become "### Question: ... ### Answer: ..." with the answer and the
end token supervised. minilora reads them with `tokenize_files`, as a run does without a cache. The
peer is what fine-tuning scripts of Hugging Face do: `datasets.load_dataset`, then `Dataset.map` in
batches with a fast tokenizer of transformers, whose offsets tell what belongs to the answer. Both
use as many worker processes as there are cores. Each side runs in a process of its own, the two in
turn; imports are not timed. Both must find the same numbers of tokens and of supervised tokens.
"""

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from step import describe

ROOT = Path(__file__).resolve().parent.parent
PROMPT, RESPONSE = "### Question: {question}\n\n### Answer:", " {answer}"
MAX_TOKENS = 2048


@dataclass
class Args:
    """Options of the benchmark."""

    rows: int = 100_000
    """Rows of the file, of about 90 words each."""
    rounds: int = 3
    """How often the two sides run in turn."""
    workers: int = os.cpu_count() or 1
    """Worker processes of each side."""
    tokenizer: str = str(ROOT / "examples/tiny-mistral")
    """A directory with a tokenizer that both sides can read."""
    file: str | None = None
    """The rows, for one side alone."""
    side: Literal["both", "minilora", "datasets"] = "both"
    """Measure one side only and print its figures as JSON."""


def write_rows(file: Path, number: int) -> None:
    """Write random questions and answers."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyzéäß"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(5000)]
    with file.open("w", encoding="utf-8") as out:
        for _ in range(number):
            question = " ".join(rng.choices(words, k=rng.randint(10, 90)))
            answer = " ".join(rng.choices(words, k=rng.randint(5, 75)))
            row = {"question": question, "answer": answer}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def run_minilora(args: Args) -> tuple[float, int, int]:
    """Tokenize with minilora. Returns (seconds, tokens, supervised tokens)."""
    sys.path.insert(0, str(ROOT))
    from minilora.config import DataConfig
    from minilora.data.sources import data_files
    from minilora.data.tokenize import tokenize_files
    from minilora.data.tokenizer import Tokenizer

    data = DataConfig(
        format="prompt",
        chat=False,
        prompt_template=PROMPT,
        response_template=RESPONSE,
        max_seq_length=MAX_TOKENS,
        num_workers=args.workers,
    )
    tokenizer = Tokenizer(args.tokenizer)
    start = time.perf_counter()
    files = {"rows": data_files(args.file or "", "train_file")}
    documents = tokenize_files(files, data, tokenizer, "train_file")
    seconds = time.perf_counter() - start
    return seconds, len(documents.tokens), int(documents.supervised.sum())


def run_datasets(args: Args) -> tuple[float, int, int]:
    """Tokenize with datasets.map. Returns (seconds, tokens, supervised tokens)."""
    import datasets
    import numpy as np
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer)

    def to_ids(batch: dict[str, list[str]]) -> dict[str, list]:
        pairs = zip(batch["question"], batch["answer"], strict=True)
        prompts = [PROMPT.format(question=question) for question in batch["question"]]
        texts = [PROMPT.format(question=q) + RESPONSE.format(answer=a) for q, a in pairs]
        encoded = tokenizer(
            texts, truncation=True, max_length=MAX_TOKENS - 1, return_offsets_mapping=True
        )
        all_ids, all_labels = [], []
        for prompt, ids, offsets in zip(
            prompts, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            ends = [end for _, end in offsets]
            labels = [
                token if end > len(prompt) else -100 for token, end in zip(ids, ends, strict=True)
            ]
            all_ids.append([*ids, tokenizer.eos_token_id])
            all_labels.append([*labels, tokenizer.eos_token_id])
        return {"input_ids": all_ids, "labels": all_labels}

    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        rows = datasets.load_dataset("json", data_files=args.file, split="train", cache_dir=cache)
        columns = rows.column_names
        rows = rows.map(to_ids, batched=True, num_proc=args.workers, remove_columns=columns)
        seconds = time.perf_counter() - start
        labels = np.concatenate([np.asarray(row) for row in rows["labels"]])
    return seconds, len(labels), int((labels != -100).sum())


def measure(args: Args) -> dict[str, float]:
    """Time one side in this process and its workers."""
    run = run_minilora if args.side == "minilora" else run_datasets
    seconds, tokens, supervised = run(args)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = time.process_time() + children.ru_utime + children.ru_stime
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "tokens": tokens,
        "supervised": supervised,
    }


def main(args: Args) -> None:
    """Run both sides in turn and print the figures."""
    if args.side != "both":
        print(json.dumps(measure(args)))
        return

    figures: dict[str, list[dict]] = {"minilora": [], "datasets": []}
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "rows.jsonl"
        write_rows(file, args.rows)
        flags = ["--file", str(file), "--workers", str(args.workers)]
        flags += ["--tokenizer", args.tokenizer]
        for _ in range(args.rounds):
            for side, rows in figures.items():
                command = [sys.executable, __file__, "--side", side, *flags]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode != 0:
                    raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
                rows.append(json.loads(done.stdout.splitlines()[-1]))

    for side, rows in figures.items():
        speeds = [args.rows / row["seconds"] for row in rows]
        tokens = f"{rows[0]['tokens']:,} tokens, {rows[0]['supervised']:,} supervised"
        cpu = describe([row["cpu_seconds"] for row in rows])
        print(f"{side:8} rows/s {describe(speeds)}   CPU seconds with imports {cpu}   {tokens}")
    ours, theirs = figures["minilora"], figures["datasets"]
    for figure in ("seconds", "cpu_seconds"):
        ratios = [b[figure] / a[figure] for a, b in zip(ours, theirs, strict=True)]
        print(f"{figure}: datasets / minilora {describe(ratios)}")
    if any(ours[0][name] != theirs[0][name] for name in ("tokens", "supervised")):
        raise SystemExit("the two sides did not find the same tokens")


if __name__ == "__main__":
    main(tyro.cli(Args))
