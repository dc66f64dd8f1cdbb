"""Tokenised files are kept: the same file, tokenizer and settings are tokenised once."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import filelock
import numpy as np
import safetensors
import safetensors.numpy

import minilora.tokenizer
from minilora import dist, labels
from minilora.config import DataConfig, UserError
from minilora.data import Counts, Documents
from minilora.running import examples, reading, sources
from minilora.tokenizer import Tokenizer

# settings that choose among tokenised rows, or only say how to work
UNRELATED = (
    "train_file", "train_weights", "eval_file", "train_size", "eval_size", "eval_first", "shuffle", "strict", "num_workers",
)  # fmt: skip


def load_documents(names: str | Sequence[str], data: DataConfig, tokenizer: Tokenizer, what: str) -> Documents:
    """Tokenise the files of a setting (see sources.py), or take them from the cache; says what became of every line.

    The cache's key is everything the result depends on: the files, the tokenizer files, the settings, this code. Among
    several processes of one machine the first does the work. Raises UserError if nothing is left to train on, or with
    data.strict for the first row that would be dropped.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    files = {name: sources.data_files(name, what) for name in names}  # once: a dataset's place is asked of the hub
    cached = cache_directory() / f"{_cache_key(files, data, tokenizer)}.safetensors"
    with filelock.FileLock(f"{cached}.lock"):
        documents = _from_cache(cached)
        if documents is None:
            documents = reading.tokenise(files, data, tokenizer, what)
            _to_cache(documents, cached)
    dist.log(reading.table(documents.counts))
    if data.strict and documents.counts.dropped:
        raise UserError("data.strict: " + next(iter(documents.counts.dropped.values()))[0])
    if not len(documents):
        first = next(iter(documents.counts.dropped.values()), [f"{names[0]} is empty"])[0]
        raise UserError(f"data.{what}: no row of {', '.join(names)} can be used, e.g. {first}")
    return documents


def cache_directory() -> Path:
    """Where tokenised files are kept, made if it is not there. Raises UserError."""
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minilora"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK):
            return directory
        why = "it cannot be written"
    except OSError as error:
        why = str(error)
    raise UserError(f"the cache {directory} cannot be used ({why}): set XDG_CACHE_HOME to a directory that can be written")


def _cache_key(files: sources.Files, data: DataConfig, tokenizer: Tokenizer) -> str:
    settings = {k: v for k, v in asdict(data).items() if k not in UNRELATED}
    digest = hashlib.sha256(json.dumps([settings, list(files), tokenizer.chat_template], sort_keys=True).encode())
    code = [Path(module.__file__ or "") for module in (reading, examples, sources, labels, minilora.tokenizer)]
    rows = [path for found in files.values() for _, path in found]
    for file in [*rows, *code, *sorted(p for p in tokenizer.directory.glob("*token*") if p.is_file())]:
        with open(file, "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()[:32]


def _to_cache(documents: Documents, path: Path) -> None:
    arrays = {k: v for k, v in vars(documents).items() if isinstance(v, np.ndarray)}
    temporary = path.with_suffix(".tmp")  # one writer at a time: the caller holds the lock
    safetensors.numpy.save_file(arrays, temporary, metadata={"counts": json.dumps(asdict(documents.counts))})
    os.replace(temporary, path)


def _from_cache(path: Path) -> Documents | None:
    """The cached documents; None, and the file is made again, if there are none or they cannot be read."""
    try:
        with safetensors.safe_open(str(path), "np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}
            return Documents(**arrays, counts=Counts(**json.loads(file.metadata()["counts"])))
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
        return None
