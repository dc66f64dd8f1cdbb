"""Keep tokenized files on disk: the same files, tokenizer and settings are tokenized once."""

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

from minilora import distributed
from minilora.config import DataConfig
from minilora.data.dataset import Counts, Documents
from minilora.data.sources import FilesByName, data_files
from minilora.data.tokenize import format_counts, tokenize_files
from minilora.data.tokenizer import Tokenizer
from minilora.errors import UserError

# settings on which tokenized files do not depend: they pick among the tokenized rows, or say how to
# work. The names of the files are hashed apart, each with the settings that hold for it
SETTINGS_NOT_IN_KEY = (
    "train_file",
    "train_weights",
    "eval_file",
    "file_formats",
    "train_size",
    "eval_size",
    "eval_first",
    "edge_dropping",
    "edge_draw",
    "shuffle",
    "strict",
    "num_workers",
)

# the arrays of `Documents` that are kept; the others depend on which rows a run uses
CACHED_ARRAYS = (
    "tokens",
    "supervised",
    "edge_index",
    "offsets",
    "row_index",
    "edge_ids",
    "keep_offsets",
)


def load_documents(
    names: str | Sequence[str], data: DataConfig, tokenizer: Tokenizer, setting: str
) -> Documents:
    """Tokenize the files of a setting, or take them from the cache, and log what became of them.

    Of several processes on one machine, the one that is there first does the work, whatever its
    rank; the others wait and read it from the cache.

    Args:
        names: what the setting holds; see `sources.data_files`.
        data: settings of the rows.
        tokenizer: the tokenizer, with its chat template.
        setting: "train_file" or "eval_file".

    Raises:
        UserError: a file cannot be read or is named twice, no row is left to train on, or
            data.strict is set and a row would be dropped.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    # found once, for the key and for tokenizing: for a dataset this asks the hub
    files = {name: data_files(name, setting) for name in names}
    _leave_out_named_files(files, data)
    _refuse_shared_files(files, setting)
    cached = cache_directory() / f"{_cache_key(files, data, tokenizer)}.safetensors"
    with filelock.FileLock(f"{cached}.lock"):
        documents = _read_cached(cached)
        if documents is None:
            documents = tokenize_files(files, data, tokenizer, setting)
            _write_cached(documents, cached)

    distributed.log(format_counts(documents.counts))
    _check_usable(documents, names, data.strict, setting)
    return documents


def cache_directory() -> Path:
    """Return the directory that keeps tokenized files; make it if it does not exist.

    Raises:
        UserError: it cannot be made or written to.
    """
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minilora"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK):
            return directory
        reason = "it is not writable"
    except OSError as error:
        reason = str(error)
    raise UserError(
        f"the cache {directory} cannot be used ({reason}): "
        "set XDG_CACHE_HOME to a directory that can be written"
    )


def _leave_out_named_files(files: FilesByName, data: DataConfig) -> None:
    """Leave files that are named by themselves in data.file_formats out of directories and globs.

    Changes `files` in place.
    """
    groups: list[str] = []  # names that may stand for several files
    exceptions: set[Path] = set()
    for name in files:
        path = Path(name).expanduser()
        if not path.is_file():
            groups.append(name)
        elif name in data.file_formats:
            exceptions.add(path.resolve())
    for name in groups:
        files[name] = [file for file in files[name] if file.path.resolve() not in exceptions]


def _refuse_shared_files(files: FilesByName, setting: str) -> None:
    """Raise UserError if two names of a setting stand for the same file."""
    name_of: dict[Path, str] = {}
    for name, files_of_name in files.items():
        for file in files_of_name:
            other = name_of.setdefault(file.path.resolve(), name)
            if other != name:
                raise UserError(
                    f"data.{setting}: {file.shown} belongs to both {other!r} and {name!r}: "
                    "use data.train_weights to use a file more than once"
                )


def _check_usable(documents: Documents, names: tuple[str, ...], strict: bool, setting: str) -> None:
    """Raise UserError if no row can be used, or, with data.strict, if any row was dropped."""
    messages = [message for dropped in documents.counts.dropped.values() for message in dropped]
    if strict and messages:
        raise UserError(f"data.strict: {messages[0]}")
    if len(documents) == 0:
        example = messages[0] if messages else f"{names[0]} is empty"
        raise UserError(f"data.{setting}: no row of {', '.join(names)} can be used, e.g. {example}")


def _cache_key(files: FilesByName, data: DataConfig, tokenizer: Tokenizer) -> str:
    """Hash everything that the documents depend on.

    That is the settings, the files and their names (which are in the messages), the tokenizer's
    files, and the code of this folder.
    """
    settings = []
    for name in files:
        of_file = asdict(data.for_file(name))
        used = {key: value for key, value in of_file.items() if key not in SETTINGS_NOT_IN_KEY}
        settings.append([name, used])
    values = json.dumps([settings, tokenizer.chat_template], sort_keys=True)
    sha = hashlib.sha256(values.encode())

    paths = [file.path for files_of_name in files.values() for file in files_of_name]
    paths += sorted(Path(__file__).parent.glob("*.py"))
    # tokenizer.json or .model, tokenizer_config.json, special_tokens_map.json, added_tokens.json
    paths += sorted(path for path in tokenizer.directory.glob("*token*") if path.is_file())
    for path in paths:
        with open(path, "rb") as file:
            sha.update(hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()[:32]


def _write_cached(documents: Documents, path: Path) -> None:
    """Write documents to the cache. The caller holds the lock, so no other process writes them."""
    arrays = {name: getattr(documents, name) for name in CACHED_ARRAYS}
    # as an array, since the metadata of a safetensors file are limited to 100 MB
    arrays["edges"] = np.frombuffer(json.dumps(documents.edges).encode(), dtype=np.uint8)
    metadata = {"counts": json.dumps(asdict(documents.counts))}
    temporary = path.with_suffix(".tmp")
    safetensors.numpy.save_file(arrays, temporary, metadata=metadata)
    os.replace(temporary, path)


def _read_cached(path: Path) -> Documents | None:
    """Read documents from the cache; None if they are not there or cannot be read."""
    try:
        with safetensors.safe_open(str(path), "np") as file:
            arrays = {name: file.get_tensor(name) for name in CACHED_ARRAYS}
            edges = [(u, v) for u, v in json.loads(file.get_tensor("edges").tobytes())]
            counts = Counts(**json.loads(file.metadata()["counts"]))
            return Documents(**arrays, edges=edges, counts=counts)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
        return None
