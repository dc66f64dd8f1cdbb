"""Add special tokens to a model's tokenizer (data.add_tokens)."""

import hashlib
import json
import os
import tempfile
from pathlib import Path

from minilora.data.cache import cache_directory
from minilora.data.tokenizer import TOKENIZER_FILES, Tokenizer
from minilora.errors import UserError

# an added token's options, beside its text and id, in tokenizer.json and tokenizer_config.json
TOKEN_OPTIONS = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
}


def tokenizer_with_added_tokens(base: Path, tokens: tuple[str, ...]) -> Path:
    """Copy a tokenizer into the cache, with special tokens added to its vocabulary.

    Args:
        base: directory with the tokenizer files.
        tokens: the tokens; their ids follow the last one of the vocabulary.

    Returns:
        The directory of the copy.

    Raises:
        UserError: a token is in the vocabulary already.
    """
    tokenizer = Tokenizer(base)
    for token in tokens:
        if tokenizer.backend.token_to_id(token) is not None:
            raise UserError(
                f"data.add_tokens: {token!r} is in the vocabulary already: "
                "use it as it is, and leave it out here"
            )
    ids = {token: i for i, token in enumerate(tokens, start=tokenizer.vocab_size)}
    files = _files_with_added_tokens(base, ids)

    digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:32]
    directory = cache_directory() / f"tokenizer-{digest}"
    if not directory.is_dir():
        _write_files(files, directory)
    return directory


def _files_with_added_tokens(base: Path, ids: dict[str, int]) -> dict[str, bytes]:
    """Return the contents of a tokenizer's files by name, with the tokens {token: id} added."""
    paths = [base / name for name in TOKENIZER_FILES]
    files = {path.name: path.read_bytes() for path in paths if path.is_file()}

    if "tokenizer.json" in files:
        tokenizer = json.loads(files["tokenizer.json"])
        added = [{"id": i, "content": token, **TOKEN_OPTIONS} for token, i in ids.items()]
        tokenizer["added_tokens"] = [*tokenizer.get("added_tokens", []), *added]
        files["tokenizer.json"] = json.dumps(tokenizer, ensure_ascii=False).encode()

    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    decoder = config.setdefault("added_tokens_decoder", {})
    for token, i in ids.items():
        decoder[str(i)] = {"content": token, **TOKEN_OPTIONS}
    files["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False).encode()
    return files


def _write_files(files: dict[str, bytes], directory: Path) -> None:
    """Write files into a new directory; other processes may be writing the same one right now."""
    with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
        written = Path(temporary) / "written"
        written.mkdir()
        for name, content in files.items():
            (written / name).write_bytes(content)
        try:
            os.rename(written, directory)
        except OSError:
            another_was_first = directory.is_dir()
            if not another_was_first:
                raise
