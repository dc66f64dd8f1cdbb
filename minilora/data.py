"""JSONL files -> tokenised documents -> packed batches, and the order in which training meets them.

All that depends on the epoch (order, label draws) is a pure function of (seed, epoch, index), so it is the same for any
number of workers and ranks and after a resume.

Shapes: T tokens of a batch or file, all documents laid end to end.
"""

import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import tqdm
from torch import Tensor

from minilora import dist
from minilora.config import DataConfig, UserError
from minilora.examples import RowError, build, parse
from minilora.labels import IGNORE, Edge, draw_kept, keep_probabilities, mark_tokens
from minilora.tokenizer import Tokenizer

CHUNK_LINES = 256  # lines a worker takes at a time
TOO_LONG = "longer than {} tokens"
LOCATIONS_SHOWN = 3  # of each reason for dropping, in the counts table


@dataclass
class Batch:
    """Documents laid end to end: tokens int64 [T], their lengths, labels int64 [T] (a token's own id, or -100)."""

    tokens: Tensor
    lengths: list[int]
    labels: Tensor

    def __post_init__(self) -> None:
        starts = [0, *np.cumsum(self.lengths)[:-1]]
        assert self.tokens.shape == self.labels.shape == (sum(self.lengths),)
        assert bool((self.labels[starts] == IGNORE).all()), "a document's first token has nothing to be predicted from"

    @property
    def supervised(self) -> int:
        return int((self.labels != IGNORE).sum())


@dataclass
class Counts:
    """What became of every line of a file."""

    name: str
    read: int = 0
    kept: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)  # reason -> file:line: message, one per row
    truncated: int = 0
    straddling: int = 0  # tokens across the border of prompt and response, counted as prompt

    def table(self) -> str:
        lines = [f"{self.name}: {self.read} lines read, {self.kept} kept, {self.read - self.kept} dropped"]
        for reason, where in sorted(self.dropped.items()):
            lines.append(f"  {len(where):>6} {reason}")
            lines += [f"         {w}" for w in where[:LOCATIONS_SHOWN]]
            lines += [f"         and {len(where) - LOCATIONS_SHOWN} more"] if len(where) > LOCATIONS_SHOWN else []
        lines += [f"  {self.truncated:>6} kept with a shortened prompt"] if self.truncated else []
        lines += [f"  {self.straddling:>6} tokens straddle prompt and response: not supervised"] if self.straddling else []
        return "\n".join(lines)


@dataclass
class Documents:
    """A tokenised file as flat arrays; document i is tokens[offsets[i]:offsets[i + 1]]."""

    tokens: np.ndarray  # int32 [T]
    supervised: np.ndarray  # bool [T]
    node: np.ndarray  # int32 [T]: occurrence of an edge within the document whose node this token is part of, or -1
    offsets: np.ndarray  # int64 [documents + 1]
    index: np.ndarray  # int64 [documents]: line in the file, from 0; the example's identity in every draw
    keep: np.ndarray  # float64 [occurrences]: probability that an occurrence keeps its labels
    keep_offsets: np.ndarray  # int64 [documents + 1]
    counts: Counts

    def __len__(self) -> int:
        return len(self.index)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def ids(self, i: int) -> np.ndarray:
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    def labels(self, i: int, draw: tuple[int, int] | None = None) -> np.ndarray:
        """Labels int64 [t] of document i: its evaluation labels, or with draw = (seed, epoch) its training labels."""
        here = slice(self.offsets[i], self.offsets[i + 1])
        wanted, node = self.supervised[here], self.node[here]
        if draw is not None:
            keep = self.keep[self.keep_offsets[i] : self.keep_offsets[i + 1]]
            kept = draw_kept(keep, *draw, int(self.index[i]))
            wanted = wanted & np.append(kept, True)[node]  # node -1, no node, reads the True at the end
        return np.where(wanted, self.tokens[here], IGNORE).astype(np.int64)

    def batch(self, which: Sequence[int] | np.ndarray, draw: tuple[int, int] | None = None) -> Batch:
        """The documents of `which` as one packed batch; draw as for `labels`."""
        ids = [self.ids(i) for i in which]
        tokens, labels = np.concatenate(ids).astype(np.int64), np.concatenate([self.labels(i, draw) for i in which])
        return Batch(torch.from_numpy(tokens), [len(x) for x in ids], torch.from_numpy(labels))

    def prompt_and_target(self, i: int) -> tuple[list[int], list[int]]:
        """Ids up to the last supervised stretch of document i, and that stretch: what to ask, and what to expect."""
        wanted = np.append(self.supervised[self.offsets[i] : self.offsets[i + 1]], False)
        edges = np.flatnonzero(wanted[1:] != wanted[:-1]) + 1
        begin, end = (edges[-2], edges[-1]) if len(edges) > 1 else (0, edges[-1])
        ids = self.ids(i).tolist()
        return ids[:begin], ids[begin:end]

    def sample(self, size: int | None, seed: int) -> np.ndarray:
        """`size` documents drawn without replacement, in file order (all, if size is None or too large)."""
        if size is None or size >= len(self):
            return np.arange(len(self))
        return np.sort(np.random.default_rng(seed).permutation(len(self))[:size])


def step_order(lengths: np.ndarray, docs_per_step: int, seed: int, epoch: int, shuffle: bool, group: bool) -> np.ndarray:
    """Order of one epoch's documents; optimizer step s takes [s * docs_per_step : (s + 1) * docs_per_step].

    group: among 50 steps' worth of shuffled documents, those of similar length share a step (transformers'
    group_by_length), the steps themselves stay shuffled, and epoch 0 begins with the largest, so that running out of
    memory happens at once or never. It depends on documents per step only, not on how ranks and micro-steps divide them.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths)) if shuffle else np.arange(len(lengths))
    if not (group and shuffle):
        return order
    full = len(order) // docs_per_step * docs_per_step  # the last, partial step keeps its place
    steps: list[np.ndarray] = []
    for start in range(0, full, 50 * docs_per_step):
        mega = order[start : min(start + 50 * docs_per_step, full)]
        mega = mega[np.argsort(-lengths[mega], kind="stable")].reshape(-1, docs_per_step)
        steps += list(mega[rng.permutation(len(mega))])
    if epoch == 0 and steps:
        largest = int(np.argmax([lengths[s].sum() for s in steps]))
        steps[0], steps[largest] = steps[largest], steps[0]
    return np.concatenate([*steps, order[full:]])


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
