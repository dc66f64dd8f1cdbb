"""Data files -> tokenised documents with their masks, in worker processes, and what became of every line."""

import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import tqdm

from minilora import dist
from minilora.config import DataConfig, UserError
from minilora.data import Counts, Documents
from minilora.labels import Edge, keep_probabilities, mark_tokens
from minilora.running.examples import Example, RowError, build, parse
from minilora.running.sources import LABELS, Files, Line, lines_of
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
    notes = {
        "kept with a shortened prompt": counts.truncated,
        "tokens straddle prompt and response: not supervised": counts.straddling,
        "more documents than rows: one a turn, whose template rewrites earlier turns": counts.split,
    }
    return "\n".join([*lines, *(f"  {count:>6} {note}" for note, count in notes.items() if count)])


def tokenise(files: Files, data: DataConfig, tokenizer: Tokenizer, what: str) -> Documents:
    """Every usable row of some files (see sources.py) as a document, and what became of the others. n(u, v) of an edge is
    counted over all of them. Raises UserError (a file that is none, data.too_long)."""
    counts = Counts(", ".join(files))
    chunks: list[tuple[int, str, list[Line]]] = []
    for name, found in files.items():
        before = counts.read
        for shown, path in found:
            lines = lines_of(shown, path)
            chunks += [(counts.read + at, shown, lines[at : at + CHUNK_LINES]) for at in range(0, len(lines), CHUNK_LINES)]
            counts.read += len(lines)
        counts.files[name] = counts.read - before
    bar = tqdm.tqdm(total=counts.read, desc=f"tokenising {LABELS[what]}", unit=" lines", disable=dist.rank() > 0, leave=False)
    rows: list[tuple] = []
    edges: list[list[Edge]] = []
    counter: Counter[Edge] = Counter()
    for results in _map_chunks(chunks, data, tokenizer):
        bar.update(len(results))
        for line, found, row_edges, note in results:
            counter.update(row_edges)
            if isinstance(found, str):
                counts.dropped.setdefault(found, []).append(note)
                continue
            rows += [(line, *document) for document in found]
            edges += [row_edges] * len(found)
            counts.kept += 1
            counts.split += len(found) - 1
            counts.truncated += note[0]
            counts.straddling += note[1]
    bar.close()
    if data.too_long == "error" and (long := counts.dropped.get(TOO_LONG.format(data.max_seq_length))):
        raise UserError(f"data.too_long=error: {long[0]}")
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
    fork = sys.platform == "linux"  # forked workers inherit the tokenizer; elsewhere they import and receive it
    start = () if fork else (_start_worker, (data, str(tokenizer.directory), tokenizer.chat_template))
    with ProcessPoolExecutor(data.num_workers, multiprocessing.get_context("fork" if fork else "spawn"), *start) as pool:
        yield from pool.map(_tokenise_chunk, chunks)


_worker: dict = {}


def _start_worker(data: DataConfig, tokenizer: "Tokenizer | str", chat_template: str | None = None) -> None:
    _worker["data"] = data
    _worker["tokenizer"] = Tokenizer(tokenizer, chat_template) if isinstance(tokenizer, str) else tokenizer


def _tokenise_chunk(chunk: tuple[int, str, list[Line]]) -> list[tuple]:
    """Per line: (line, [(ids, supervised, node), ...], edges, (truncated, straddling)), or (line, reason, edges, message)."""
    data, tokenizer = _worker["data"], _worker["tokenizer"]
    results: list[tuple] = []
    for line, (number, raw) in enumerate(chunk[2], start=chunk[0]):
        edges: list[Edge] = []
        try:
            if not raw.strip():
                raise RowError("blank line", "blank")
            examples = build(parse(raw), data, tokenizer)
            edges = examples[0].edges  # counted even if the row turns out too long: n(u, v) is of the whole file
            documents, notes = zip(*(_tokenise_example(example, data, tokenizer) for example in examples), strict=True)
            results.append((line, documents, edges, (any(n[0] for n in notes), sum(n[1] for n in notes))))
        except RowError as error:
            results.append((line, error.reason, edges, f"{chunk[1]}:{number}: {error}"))
    return results


def _tokenise_example(example: Example, data: DataConfig, tokenizer: Tokenizer) -> tuple[tuple, tuple]:
    """(ids, supervised, node), (truncated, straddling) of an example no longer than max_seq_length.

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
    return (np.array(ids, dtype=np.int32), supervised, node), (truncated, straddling)
