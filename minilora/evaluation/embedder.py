"""Sentence embeddings of titles, by sentence-transformers.

OLLM compares titles by the mean-pooled embeddings of all-MiniLM-L6-v2. The library is an optional
dependency; it brings transformers along, which nothing else here needs to run, and is imported only
when a model is loaded.
"""

import functools
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from huggingface_hub.utils import disable_progress_bars

from minilora.errors import UserError, require
from minilora.hub import resolve

DEFAULT_EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"
"""The model that OLLM compares titles with."""

BATCH_SIZE = 256

EMBEDDER_FILES = ["*.json", "*.txt", "*.model", "model*.safetensors", "*/model.safetensors"]
"""What is fetched from the hub: settings, vocabularies and weights of all parts; no pickles."""

INSTALL = "pip install 'minilora[ontology]'"

REMEDY = "--embedder takes the directory or hub id of a sentence-transformers model"


class TitleEmbedder(Protocol):
    """Something that turns titles into vectors."""

    def embed(self, titles: Sequence[str]) -> np.ndarray:
        """Return a vector for each title: float32 [N, D]. It need not have unit length."""


class SentenceEmbedder:
    """Embed titles with a model of sentence-transformers, each different title once."""

    def __init__(self, model: Any) -> None:
        self.model = model
        """A SentenceTransformer."""
        self.vectors: dict[str, np.ndarray] = {}
        """The vector [D] of each title that was embedded."""

    def embed(self, titles: Sequence[str]) -> np.ndarray:
        """Return the pooled vector of each title: float32 [N, D].

        A progress bar is shown on a terminal.
        """
        new_titles = [title for title in dict.fromkeys(titles) if title not in self.vectors]
        if new_titles:
            rows = self.model.encode(
                new_titles,
                batch_size=BATCH_SIZE,
                show_progress_bar=sys.stderr.isatty(),
            )
            self.vectors.update(zip(new_titles, rows.astype(np.float32), strict=True))
        if not titles:
            return np.zeros((0, 0), np.float32)
        return np.stack([self.vectors[title] for title in titles])


@functools.cache
def load_embedder(name: str = DEFAULT_EMBEDDER) -> TitleEmbedder:
    """Load a model of sentence-transformers, once per process, onto a GPU if there is one.

    Args:
        name: its directory, or its hub id `owner/name`, optionally with `@revision`; the hub's
            cache is used where the hub cannot be reached.

    Raises:
        UserError: sentence-transformers is not installed, or the model cannot be found or loaded,
            or cannot embed a title.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        raise UserError(f"the embedder of titles needs sentence-transformers: {INSTALL}")
    try:
        directory = resolve(name, patterns=EMBEDDER_FILES)
    except UserError as error:
        raise UserError(f"embedder: {error} ({REMEDY})") from error
    is_sentence_model = (directory / "modules.json").is_file()
    require(
        is_sentence_model, f"embedder {name!r}: {directory} has no file modules.json ({REMEDY})"
    )
    return _load_model(name, directory)


def _load_model(name: str, directory: Path) -> SentenceEmbedder:
    """Load a SentenceTransformer and try it; `name` is for the message of the UserError.

    A last step that scales vectors to unit length is taken off: OLLM's graph metric adds up the
    vectors as they are pooled, and titles with longer vectors count for more in it.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()  # transformers, which shows them for weights, heeds this too
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.models import Normalize
    except Exception as error:  # of whatever kind, by one of the libraries that it needs
        raise UserError(
            f"sentence-transformers is installed, but cannot be imported: {_reason(error)}: "
            f"{INSTALL}"
        ) from error

    try:
        model = SentenceTransformer(
            str(directory), local_files_only=True, model_kwargs={"use_safetensors": True}
        )
        if isinstance(model[-1], Normalize):
            del model[-1]
        embedder = SentenceEmbedder(model)
        embedder.embed(["a title"])  # some mistakes show only now
    except Exception as error:  # the library raises many kinds: a file is missing or broken
        raise UserError(
            f"embedder {name!r}: {directory} cannot be loaded: {_reason(error)} ({REMEDY})"
        ) from error
    return embedder


def _reason(error: Exception) -> str:
    """Return the first line of an error's message; its kind if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
