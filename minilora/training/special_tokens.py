"""Warn about special tokens that the training rows use and the base model has never learnt."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minilora import distributed
from minilora.checkpoint.hf import weight_map
from minilora.checkpoint.tensor_files import read_tensor
from minilora.data.dataset import Documents
from minilora.data.tokenizer import Tokenizer

SAMPLED_ROWS = 1000  # of a matrix, whose median norm is the usual norm of a learnt row
SHORT_SHARE = 0.05  # a row whose norm is below this share of the usual one has not been learnt


def warn_about_unlearnt_tokens(documents: Documents, tokenizer: Tokenizer, base: Path) -> None:
    """Log which special tokens of the training rows the base has never learnt, if any.

    Adapters alone cannot teach them. If such a token ends the turns (<|eot_id|> of a base model
    that was not tuned for chats), the model could then never learn to stop.

    Args:
        documents: the tokenized training files.
        tokenizer: the tokenizer; only its special tokens are looked at.
        base: directory of the base model, whose embedding and head are read.
    """
    if distributed.rank() > 0:
        return
    used = {int(i) for i in np.unique(documents.tokens)}
    # the head's rows matter only for tokens that have a label
    predicted = {int(i) for i in np.unique(documents.tokens[documents.supervised])}

    token_of_id = {i: token for token, i in tokenizer.specials.items()}
    files = weight_map(base)
    unlearnt: set[int] = set()
    for name, wanted in (("model.embed_tokens.weight", used), ("lm_head.weight", predicted)):
        if name in files:  # a tied model has no head of its own
            unlearnt |= wanted & _unlearnt_rows(files[name], name, list(token_of_id))

    if unlearnt:
        names = ", ".join(token_of_id[i] for i in sorted(unlearnt))
        distributed.log(
            f"warning: the base model has never learnt {names}, which the training rows use: "
            "with adapters alone it will not; --lora.train_embeddings True trains embedding and "
            "head too"
        )


def _unlearnt_rows(path: Path, name: str, indices: list[int]) -> set[int]:
    """Return which rows of a matrix look as if no training had changed them.

    Such rows are zero or far shorter than others, or equal to each other.

    Args:
        path: the safetensors file with the matrix.
        name: the matrix.
        indices: rows to look at. Those beyond the matrix, of tokens that were added to the
            tokenizer alone, are left out.
    """
    sampled = read_tensor(path, name, slice(0, SAMPLED_ROWS)).float()
    usual_norm = sampled.norm(dim=1).median()

    rows: dict[int, Tensor] = {}
    for i in indices:
        row = read_tensor(path, name, slice(i, i + 1)).float()
        if len(row) == 1:
            rows[i] = row.squeeze(0)

    unlearnt = set()
    for i, row in rows.items():
        is_short = bool(row.norm() < SHORT_SHARE * usual_norm)
        if is_short or any(j != i and torch.equal(other, row) for j, other in rows.items()):
            unlearnt.add(i)
    return unlearnt
