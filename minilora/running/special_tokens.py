"""Tokens that a base model has not learnt: added to its tokenizer on request, and warned about where they are used."""

import hashlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch

from minilora import dist
from minilora.config import UserError
from minilora.data import Documents
from minilora.running.cache import cache_directory
from minilora.running.saving import TOKENIZER_FILES
from minilora.tokenizer import Tokenizer
from minilora.weights import read_tensor, weight_map

SAMPLED_ROWS = 1000  # of the embedding, to know how long a learnt row is
SHORT = 0.05  # of that length: not learnt


def with_added_tokens(base: Path, tokens: tuple[str, ...]) -> Path:
    """A directory (kept in the cache) with the tokenizer files of `base` and these special tokens in addition.

    Both kinds of files are written as transformers writes and reads them. Raises UserError for a token that is there.
    """
    own = Tokenizer(base)
    if known := [token for token in tokens if own.backend.token_to_id(token) is not None]:
        raise UserError(f"data.add_tokens: {known[0]!r} is in the vocabulary already: use it as it is, and leave it out here")
    ids = {token: own.vocab_size + i for i, token in enumerate(tokens)}
    files = {name: (base / name).read_bytes() for name in TOKENIZER_FILES if (base / name).is_file()}
    entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    if "tokenizer.json" in files:
        read = json.loads(files["tokenizer.json"])
        read["added_tokens"] = [*read.get("added_tokens", []), *({"id": i, "content": t, **entry} for t, i in ids.items())]
        files["tokenizer.json"] = json.dumps(read, ensure_ascii=False).encode()
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    decoder = config.setdefault("added_tokens_decoder", {})
    decoder |= {str(i): {"content": token, **entry} for token, i in ids.items()}
    files["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False).encode()
    digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:32]
    directory = cache_directory() / f"tokenizer-{digest}"
    if not directory.is_dir():
        with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:  # several processes may be at it
            made = Path(temporary) / "made"
            made.mkdir()
            for name, content in files.items():
                (made / name).write_bytes(content)
            try:
                os.rename(made, directory)
            except OSError:
                if not directory.is_dir():
                    raise
    return directory


def warn_of_unlearnt(documents: Documents, tokenizer: Tokenizer, base: Path) -> None:
    """Say which special tokens of the training rows the base has never learnt: their rows in embedding or head are zero, far
    shorter than others, or equal to each other. Such an end of a turn (<|eot_id|> of a base model) would end no answer."""
    if dist.rank() > 0:
        return
    specials = {i: token for token, i in tokenizer.specials.items()}
    used = {int(i) for i in np.unique(documents.tokens)}
    asked_for = {int(i) for i in np.unique(documents.tokens[documents.supervised])}  # of others the head needs to know nothing
    files = weight_map(base)
    unlearnt: set[int] = set()
    for name, ids in (("model.embed_tokens.weight", used), ("lm_head.weight", asked_for)):
        if name not in files:
            continue
        rows = {i: read_tensor(files[name], name, slice(i, i + 1)).float().squeeze(0) for i in specials}
        rows = {i: row for i, row in rows.items() if len(row)}  # an added token has none
        learnt = read_tensor(files[name], name, slice(0, SAMPLED_ROWS)).float().norm(dim=1).median()
        for i in ids & rows.keys():
            if rows[i].norm() < SHORT * learnt or any(j != i and torch.equal(rows[i], row) for j, row in rows.items()):
                unlearnt.add(i)
    if unlearnt:
        names = ", ".join(specials[i] for i in sorted(unlearnt))
        dist.log(
            f"warning: the base model has never learnt {names}, which the training rows use: "
            "with adapters alone it will not; --lora.train_embeddings True trains embedding and head too"
        )
