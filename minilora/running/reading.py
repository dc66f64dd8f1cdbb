"""A JSONL file -> tokenised documents with their masks, in worker processes, and what became of every line."""

import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import tqdm

from minilora import dist
from minilora.config import DataConfig, UserError
from minilora.data import Counts, Documents
from minilora.labels import Edge, keep_probabilities, mark_tokens
from minilora.running.examples import RowError, build, parse
from minilora.tokenizer import Tokenizer

CHUNK_LINES = 256  # lines a worker takes at a time
LOCATIONS_SHOWN = 3  # of each reason for dropping
TOO_LONG = "longer than {} tokens"


def table(counts: Counts) -> str:
    """What became of a file's lines, for the terminal."""
    lines = [f"{counts.name}: {counts.read} lines read, {counts.kept} kept, {counts.read - counts.kept} dropped"]
    for reason, where in sorted(counts.dropped.items()):
        lines.append(f"  {len(where):>6} {reason}")
        lines += [f"         {w}" for w in where[:LOCATIONS_SHOWN]]
        lines += [f"         and {len(where) - LOCATIONS_SHOWN} more"] if len(where) > LOCATIONS_SHOWN else []
    lines += [f"  {counts.truncated:>6} kept with a shortened prompt"] if counts.truncated else []
    lines += [f"  {counts.straddling:>6} tokens straddle prompt and response: not supervised"] if counts.straddling else []
    return "\n".join(lines)


def tokenise_file(path: str, data: DataConfig, tokenizer: Tokenizer) -> Documents:
    """Every usable row of a JSONL file as a document, and what became of the others. Raises UserError (data.too_long)."""
    with open(path, "rb") as file:
        lines = file.read().splitlines()
    chunks = [(start, lines[start : start + CHUNK_LINES]) for start in range(0, len(lines), CHUNK_LINES)]
    bar = tqdm.tqdm(total=len(lines), desc=f"tokenising {Path(path).name}", unit=" lines", disable=dist.rank() > 0, leave=False)
    counts = Counts(path, read=len(lines))
    rows: list[tuple] = []
    edges: list[list[Edge]] = []
    counter: Counter[Edge] = Counter()
    for results in _map_chunks(chunks, data, tokenizer):
        bar.update(len(results))
        for line, row, row_edges, note in results:
            counter.update(row_edges or [])
            if isinstance(note, str):
                counts.dropped.setdefault(row, []).append(f"{path}:{line + 1}: {note}")
                continue
            rows.append((line, *row))
            edges.append(row_edges)
            counts.truncated += note[0]
            counts.straddling += note[1]
    bar.close()
    if data.too_long == "error" and (long := counts.dropped.get(TOO_LONG.format(data.max_seq_length))):
        raise UserError(f"data.too_long=error: {long[0]}")
    counts.kept = len(rows)
    probability = keep_probabilities(counter)
    keep = [probability[edge] if data.edge_dropping else 1.0 for row_edges in edges for edge in row_edges]
    line, ids, supervised, node = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [], [])
    return Documents(
        tokens=np.concatenate([*ids, np.empty(0, np.int32)]), supervised=np.concatenate([*supervised, np.empty(0, bool)]),
        node=np.concatenate([*node, np.empty(0, np.int32)]), offsets=np.cumsum([0, *map(len, ids)], dtype=np.int64),
        index=np.array(line, dtype=np.int64), keep=np.array(keep, dtype=np.float64),
        keep_offsets=np.cumsum([0, *map(len, edges)], dtype=np.int64), counts=counts,
    )  # fmt: skip


def _map_chunks(chunks: list, data: DataConfig, tokenizer: Tokenizer) -> Iterator[list[tuple]]:
    """`_tokenise_chunk` over all chunks, in order; in worker processes when there is enough to do."""
    _start_worker(data, tokenizer)
    if data.num_workers == 1 or len(chunks) < 8:
        yield from map(_tokenise_chunk, chunks)
        return
    # forked workers inherit the tokenizer; elsewhere they import and receive it
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(
        data.num_workers, context, _start_worker, (data, str(tokenizer.directory), tokenizer.chat_template)
    ) as pool:
        yield from pool.map(_tokenise_chunk, chunks)


_worker: dict = {}


def _start_worker(data: DataConfig, tokenizer: "Tokenizer | str", chat_template: str | None = None) -> None:
    _worker["data"] = data
    _worker["tokenizer"] = Tokenizer(tokenizer, chat_template) if isinstance(tokenizer, str) else tokenizer


def _tokenise_chunk(chunk: tuple[int, list[bytes]]) -> list[tuple]:
    """Per line: (line, (ids, supervised, node), edges, (truncated, straddling)), or (line, reason, edges, message)."""
    data, tokenizer = _worker["data"], _worker["tokenizer"]
    results: list[tuple] = []
    for line, raw in enumerate(chunk[1], start=chunk[0]):
        edges: list[Edge] = []
        try:
            if not raw.strip():
                raise RowError("blank line", "blank")
            example = build(parse(raw), data, tokenizer)
            edges = example.edges  # counted even if the row turns out too long: n(u, v) is of the whole file
            results.append((line, *_tokenise_row(example, data, tokenizer)))
        except RowError as error:
            results.append((line, error.reason, edges, str(error)))
    return results


def _tokenise_row(example, data: DataConfig, tokenizer: Tokenizer) -> tuple:
    """(ids, supervised, node), edges, (truncated, straddling) of an example no longer than max_seq_length.

    A prompt is shortened as text, from its end, and tokenised anew. Raises RowError.
    """
    ids, spans = tokenizer.encode(example.text)
    whole, length, cut, truncated = example, len(ids), len(example.prompt), False
    while len(ids) > data.max_seq_length:
        begin = example.text.find(whole.prompt[:cut].strip()) if cut else 0
        inside = [s for s, e in spans if begin <= s and e <= begin + cut and s < e]
        excess = len(ids) - data.max_seq_length
        if data.too_long != "truncate" or whole.shorten is None or begin < 0 or not inside:
            detail = "" if data.too_long != "truncate" else ", even without its prompt"
            raise RowError(TOO_LONG.format(data.max_seq_length), f"{length} tokens{detail} (data.max_seq_length, data.too_long)")
        cut, truncated = max(0, (inside[-excess] if excess <= len(inside) else begin) - begin), True
        example = whole.shorten(cut)
        ids, spans = tokenizer.encode(example.text)
    supervised, node, straddling = mark_tokens(example.text, spans, example.supervised, example.nodes)
    supervised[:1] = False  # nothing comes before the first token to predict it from
    if not supervised.any():
        raise RowError("no supervised token", "no token of the response is left to train on")
    row = (np.array(ids, dtype=np.int32), supervised, node)
    return row, example.edges, (int(truncated), straddling)
