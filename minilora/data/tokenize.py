"""Turn data files into tokenized documents with their masks, in worker processes.

Path of one row: a `Line` of a file -> examples (`formats.py`) -> token ids, shortened if they are
too many -> masks per token (`mark_tokens`). Each row ends in a `RowResult`: its documents, or why
it was dropped, so that every line of the files is accounted for.

Shapes:
    t: tokens of one document
"""

import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import tqdm

from minilora import distributed
from minilora.config import DataConfig
from minilora.data.dataset import NO_EDGE, Counts, Documents
from minilora.data.dataset_files import SETTING_NAMES
from minilora.data.example import Edge, Example, RowError, Span
from minilora.data.formats import build_examples, parse_row
from minilora.data.sources import FilesByName, Line, first_rows, read_lines
from minilora.data.tokenizer import Encoding, Tokenizer
from minilora.errors import UserError

CHUNK_LINES = 256  # lines that a worker process takes at a time
MIN_CHUNKS = 8  # with fewer, starting worker processes costs more than it saves
MESSAGES_SHOWN = 3  # of each reason for dropping


@dataclass(slots=True)
class TokenizedExample:
    """The token ids of one example, and what is known of each token.

    Attributes:
        ids: int32 [t].
        supervised: whether a token is part of a response, bool [t].
        edge_index: int32 [t], see `Documents`.
        truncated: whether the prompt was shortened.
        straddling: number of tokens that cover the end of a prompt and the start of its response.
            They are not supervised.
    """

    ids: np.ndarray
    supervised: np.ndarray
    edge_index: np.ndarray
    truncated: bool
    straddling: int


@dataclass(slots=True)
class RowResult:
    """What became of one row; a worker process sends it to the main process.

    Attributes:
        row_index: the row's place in the files, counted from 0 through all of them.
        documents: the row's documents; none if it was dropped.
        edges: the edge of every occurrence in the row; none if it was dropped.
        dropped_because: the reason under which a dropped row is counted.
        message: `file:line: what is wrong` of a dropped row.
    """

    row_index: int
    documents: list[TokenizedExample] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)
    dropped_because: str = ""
    message: str = ""


class Chunk(NamedTuple):
    """Consecutive lines of one file: what a worker process takes at a time."""

    name: str
    """The name of the setting that stands for the file; it tells the format of the rows."""
    file_name: str
    """The file's name in messages."""
    first_row: int
    """row_index of the first line."""
    lines: list[Line]


class TokenMarks(NamedTuple):
    """Masks over the tokens of an example; see `TokenizedExample`."""

    supervised: np.ndarray
    edge_index: np.ndarray
    straddling: int


# ---- all rows


def tokenize_files(
    files: FilesByName,
    data: DataConfig,
    tokenizer: Tokenizer,
    setting: str,
    limit: int | None = None,
) -> Documents:
    """Tokenize every usable row of some files, and count what became of the others.

    Args:
        files: the files, by the names that the setting holds; see `sources.data_files`.
        data: settings of the format, of the files that have another one, of the longest document,
            and the number of worker processes.
        tokenizer: the tokenizer, with its chat template.
        setting: "train_file", "eval_file" or "input", for the progress bar.
        limit: read only the lines through the first N that are not blank; None: all.

    Raises:
        UserError: a file cannot be read, or a row is too long with data.too_long="error".
    """
    counts = Counts(", ".join(files))
    chunks = _read_chunks(files, counts, limit)
    bar = tqdm.tqdm(
        total=counts.read,
        desc=f"tokenizing {SETTING_NAMES[setting]}",
        unit=" lines",
        disable=distributed.rank() > 0,
        leave=False,
    )

    kept: list[RowResult] = []
    edge_ids: list[np.ndarray] = []  # of each kept row
    id_of_edge: dict[Edge, int] = {}
    results_of_chunks = _tokenize_chunks(chunks, data, tokenizer)
    for chunk, results in zip(chunks, results_of_chunks, strict=True):
        bar.update(len(results))
        for result in results:
            _count_row(result, chunk.name, counts)
            if result.documents:
                kept.append(result)
                edge_ids.append(_number_edges(result.edges, id_of_edge))
                result.edges.clear()  # so that memory holds the names of each edge only once
    bar.close()

    too_long = counts.dropped.get(_too_long_reason(data))
    if too_long and data.too_long == "error":
        raise UserError(f"data.too_long=error: {too_long[0]}")
    return _to_documents(kept, edge_ids, list(id_of_edge), counts)


def format_counts(counts: Counts) -> str:
    """Format what became of the lines of some files, for the terminal."""
    dropped = counts.read - counts.kept
    lines = [f"{counts.name}: {counts.read} lines read, {counts.kept} kept, {dropped} dropped"]
    if len(counts.files) > 1:
        for name, read in counts.files.items():
            kept = counts.kept_of[name]
            lines.append(f"  {name}: {read} lines read, {kept} kept, {read - kept} dropped")
    for reason, messages in sorted(counts.dropped.items()):
        lines.append(f"  {len(messages):>6} {reason}")
        lines += [f"         {message}" for message in messages[:MESSAGES_SHOWN]]
        if len(messages) > MESSAGES_SHOWN:
            lines.append(f"         and {len(messages) - MESSAGES_SHOWN} more")

    notes = [
        (counts.truncated, "kept with a shortened prompt"),
        (counts.straddling, "tokens straddle prompt and response: not supervised"),
        (
            counts.split,
            "more documents than rows: one per turn, as the template rewrites earlier turns",
        ),
    ]
    lines += [f"  {count:>6} {note}" for count, note in notes if count]
    return "\n".join(lines)


def _read_chunks(files: FilesByName, counts: Counts, limit: int | None) -> list[Chunk]:
    """Read all lines, or the first ones, in chunks; write into `counts` how many each file has."""
    chunks = []
    rows_left = limit
    for name, files_of_name in files.items():
        read_before = counts.read
        for file in files_of_name:
            lines = read_lines(file.shown, file.path)
            if rows_left is not None:
                lines = first_rows(lines, rows_left)
                rows_left -= sum(not line.is_blank for line in lines)
            for start in range(0, len(lines), CHUNK_LINES):
                chunk_lines = lines[start : start + CHUNK_LINES]
                chunks.append(Chunk(name, file.shown, counts.read + start, chunk_lines))
            counts.read += len(lines)
        counts.files[name] = counts.read - read_before
        counts.kept_of[name] = 0
    return chunks


def _count_row(result: RowResult, name: str, counts: Counts) -> None:
    """Add one row, of the files that the setting has under a name, to the counts."""
    if result.dropped_because:
        counts.dropped.setdefault(result.dropped_because, []).append(result.message)
        return
    counts.kept += 1
    counts.kept_of[name] += 1
    counts.split += len(result.documents) - 1
    counts.straddling += sum(document.straddling for document in result.documents)
    if any(document.truncated for document in result.documents):
        counts.truncated += 1


def _number_edges(edges: list[Edge], id_of_edge: dict[Edge, int]) -> np.ndarray:
    """Return the id of each edge, int32; edges that are not in `id_of_edge` get the next ones."""
    ids = [id_of_edge.setdefault(edge, len(id_of_edge)) for edge in edges]
    return np.array(ids, dtype=np.int32)


def _to_documents(
    kept: list[RowResult], edge_ids: list[np.ndarray], edges: list[Edge], counts: Counts
) -> Documents:
    """Lay the documents of all rows end to end.

    Args:
        kept: the rows.
        edge_ids: of each row, int32: for each occurrence of an edge its place in `edges`.
        edges: the distinct edges.
        counts: what became of every line of the files.
    """
    documents: list[TokenizedExample] = []
    row_indices: list[int] = []
    ids_of_documents: list[np.ndarray] = []
    for result, ids_of_row in zip(kept, edge_ids, strict=True):
        for document in result.documents:
            documents.append(document)
            row_indices.append(result.row_index)
            ids_of_documents.append(ids_of_row)

    return Documents(
        tokens=_concatenate([d.ids for d in documents], np.int32),
        supervised=_concatenate([d.supervised for d in documents], np.bool_),
        edge_index=_concatenate([d.edge_index for d in documents], np.int32),
        offsets=_offsets([len(d.ids) for d in documents]),
        row_index=np.array(row_indices, dtype=np.int64),
        edges=edges,
        edge_ids=_concatenate(ids_of_documents, np.int32),
        keep_offsets=_offsets([len(ids) for ids in ids_of_documents]),
        counts=counts,
    )


def _concatenate(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    """Concatenate arrays; without any, return an empty one of `dtype`."""
    return np.concatenate([*arrays, np.empty(0, dtype)])


def _offsets(lengths: list[int]) -> np.ndarray:
    """Return where each of some consecutive parts begins, and where the last ends, int64."""
    return np.cumsum([0, *lengths], dtype=np.int64)


# ---- worker processes


@dataclass
class _Worker:
    """What a process needs to tokenize chunks."""

    data: DataConfig
    tokenizer: Tokenizer


_worker: _Worker | None = None  # of this process, and of those that it forks


def _tokenize_chunks(
    chunks: list[Chunk], data: DataConfig, tokenizer: Tokenizer
) -> Iterator[list[RowResult]]:
    """Tokenize all chunks, in order, in worker processes if there are enough of them."""
    global _worker
    _worker = _Worker(data, tokenizer)
    if data.num_workers == 1 or len(chunks) < MIN_CHUNKS:
        yield from map(_tokenize_chunk, chunks)
        return

    if sys.platform == "linux":  # a forked process inherits _worker
        pool = ProcessPoolExecutor(data.num_workers, multiprocessing.get_context("fork"))
    else:  # a spawned process reads the tokenizer's files itself
        arguments = (data, str(tokenizer.directory), tokenizer.chat_template)
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(data.num_workers, context, _start_spawned_worker, arguments)
    with pool:
        yield from pool.map(_tokenize_chunk, chunks)


def _start_spawned_worker(data: DataConfig, directory: str, chat_template: str | None) -> None:
    """Load the tokenizer in a worker process that has inherited nothing."""
    global _worker
    _worker = _Worker(data, Tokenizer(directory, chat_template))


def _tokenize_chunk(chunk: Chunk) -> list[RowResult]:
    """Tokenize the rows of a chunk."""
    assert _worker is not None
    data, tokenizer = _worker.data.for_file(chunk.name), _worker.tokenizer
    return [
        tokenize_row(line, chunk.first_row + i, chunk.file_name, data, tokenizer)
        for i, line in enumerate(chunk.lines)
    ]


# ---- one row


def tokenize_row(
    line: Line, row_index: int, file_name: str, data: DataConfig, tokenizer: Tokenizer
) -> RowResult:
    """Tokenize one row.

    Args:
        line: the row.
        row_index: its place in the files, counted from 0 through all of them.
        file_name: the file's name, for the message of a row that is dropped.
        data: settings of the format and of the longest document.
        tokenizer: the tokenizer, with its chat template.
    """
    result = RowResult(row_index)
    try:
        if line.is_blank:
            raise RowError("blank line", "blank")
        examples = build_examples(parse_row(line), data, tokenizer)
        result.documents = [tokenize_example(example, data, tokenizer) for example in examples]
        result.edges = examples[0].edges
    except RowError as error:
        result.dropped_because = error.reason
        result.message = f"{file_name}:{line.number}: {error}"
    return result


def tokenize_example(example: Example, data: DataConfig, tokenizer: Tokenizer) -> TokenizedExample:
    """Tokenize one example and mark its tokens.

    Raises:
        RowError: it is too long and cannot be shortened, or has no supervised token.
    """
    encoding = tokenizer.encode(example.text)
    truncated = len(encoding.ids) > data.max_seq_length
    if truncated:
        example, encoding = _shorten_prompt(example, encoding, data, tokenizer)

    marks = mark_tokens(example.text, encoding.spans, example.supervised, example.nodes)
    # nothing comes before the first token to predict it from; a slice, as there may be no token
    marks.supervised[:1] = False
    if not marks.supervised.any():
        raise RowError("no supervised token", "no token of the response is left to train on")
    ids = np.array(encoding.ids, dtype=np.int32)
    return TokenizedExample(ids, marks.supervised, marks.edge_index, truncated, marks.straddling)


def _shorten_prompt(
    whole: Example, encoding: Encoding, data: DataConfig, tokenizer: Tokenizer
) -> tuple[Example, Encoding]:
    """Cut a too long example's prompt at its end until the example fits into max_seq_length.

    The prompt is cut as text, before the first of its last tokens that are too many, and the
    example is rendered and tokenized anew. If it still has too many tokens, this is repeated.

    Where to cut need not be exact, since the tokens are counted anew after each cut. It is not
    exact if the prompt has white space around it, which a template may strip, or if its text
    occurs earlier in the example: then `begin` and `end` enclose other characters than those of
    the prompt. Each cut is before `end`, so the prompt gets shorter every time, down to nothing.

    Args:
        whole: the example.
        encoding: its tokens.
        data: max_seq_length, and whether to shorten at all.
        tokenizer: the tokenizer.

    Returns:
        The shortened example and its tokens.

    Raises:
        RowError: prompts are not to be shortened, or there is no prompt left.
    """
    whole_length = len(encoding.ids)
    if data.too_long != "truncate":
        raise _too_long(whole_length, "", data)

    example = whole
    prompt_length = len(whole.prompt)  # characters of the prompt that are left
    while len(encoding.ids) > data.max_seq_length:
        excess = len(encoding.ids) - data.max_seq_length
        stripped_prompt = whole.prompt[:prompt_length].strip()
        begin = example.text.find(stripped_prompt)
        end = begin + prompt_length
        prompt_spans = [span for span in encoding.spans if _is_within(span, begin, end)]
        if whole.shorten is None or begin < 0 or not prompt_spans:
            raise _too_long(whole_length, ", even without its prompt", data)

        prompt_length = 0
        if excess <= len(prompt_spans):
            cut, _ = prompt_spans[-excess]
            prompt_length = cut - begin
        example = whole.shorten(prompt_length)
        encoding = tokenizer.encode(example.text)
    return example, encoding


def _is_within(span: Span, begin: int, end: int) -> bool:
    """Return whether a token covers characters, and all of them lie in [begin, end)."""
    token_start, token_end = span
    return begin <= token_start < token_end <= end


def _too_long(length: int, detail: str, data: DataConfig) -> RowError:
    """Return the error of an example that has too many tokens."""
    message = f"{length} tokens{detail} (data.max_seq_length, data.too_long)"
    return RowError(_too_long_reason(data), message)


def _too_long_reason(data: DataConfig) -> str:
    """Return the reason under which examples with too many tokens are counted."""
    return f"longer than {data.max_seq_length} tokens"


def mark_tokens(
    text: str, spans: Sequence[Span], supervised: Sequence[Span], nodes: Sequence[Span]
) -> TokenMarks:
    """Find which tokens are supervised, and which edge occurrence's node each is part of.

    A token is supervised if it begins inside a supervised span; one that begins in the prompt and
    ends in the response belongs to the prompt. A token belongs to a node if it covers any character
    of the node, or the space before it.

    Args:
        text: the example.
        spans: characters [start, end) of each token.
        supervised: characters of each response.
        nodes: characters of the node v of each edge occurrence u -> v.
    """
    starts = np.array([start for start, _ in spans], dtype=np.int64)
    ends = np.array([end for _, end in spans], dtype=np.int64)

    is_supervised = np.zeros(len(spans), dtype=bool)
    straddling = 0
    for begin, end in supervised:
        is_supervised |= (starts >= begin) & (starts < end)
        straddling += int(((starts < begin) & (ends > begin)).sum())

    edge_index = np.full(len(spans), NO_EDGE, dtype=np.int32)
    for occurrence, (begin, end) in enumerate(nodes):
        if begin > 0 and text[begin - 1] == " ":
            begin -= 1
        edge_index[(starts < end) & (ends > begin)] = occurrence
    edge_index[~is_supervised] = NO_EDGE
    return TokenMarks(is_supervised, edge_index, straddling)
