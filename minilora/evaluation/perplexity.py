"""The mean loss of a model on documents, with no label dropped, and its perplexity (exp of it)."""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from minilora import distributed
from minilora.build import autocast_to
from minilora.data.dataset import Documents
from minilora.model.transformer import CausalLM


def batches_by_length(
    documents: Documents, indices: np.ndarray, max_docs: int, max_tokens: int
) -> list[np.ndarray]:
    """Divide documents into batches of similar length, from the shortest to the longest.

    Args:
        documents: the documents that `indices` name.
        indices: which of them to use.
        max_docs: the most documents of a batch.
        max_tokens: the most tokens of a batch; a longer document is a batch of its own.

    Returns:
        The indices of each batch.
    """
    order = np.argsort(documents.lengths[indices], kind="stable")
    by_length = indices[order]
    lengths = documents.lengths[by_length].tolist()

    batches: list[np.ndarray] = []
    start, num_tokens = 0, 0  # where the batch begins, and its tokens so far
    for i, length in enumerate(lengths):
        is_full = i - start == max_docs or num_tokens + length > max_tokens
        if is_full and i > start:
            batches.append(by_length[start:i])
            start, num_tokens = i, 0
        num_tokens += length
    if start < len(by_length):
        batches.append(by_length[start:])
    return batches


@torch.no_grad()
def loss_sums(
    model: CausalLM,
    documents: Documents,
    batches: Iterable[np.ndarray],
    device: torch.device,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """Sum the token losses of documents.

    Args:
        model: in evaluation mode.
        documents: the documents that `batches` index.
        batches: indices of the documents of each forward pass.
        device: where the model computes.
        autocast: dtype of the arithmetic; None: that of the weights.

    Returns:
        [sum of token losses, number of supervised tokens], float64, on the device.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for indices in batches:
        batch = documents.batch(indices)
        with autocast_to(autocast, device):
            tokens = distributed.to_device(batch.tokens, device)
            sums[0] += model(tokens, batch.lengths, labels=batch.labels)
        sums[1] += batch.num_supervised
    return sums


def loss_and_ppl(sums: Tensor) -> dict[str, float]:
    """Return {"loss": mean loss of a token, "ppl": its exponential} for the sums of `loss_sums`."""
    total, supervised = sums.tolist()
    loss = total / supervised
    return {"loss": loss, "ppl": math.exp(min(loss, 700.0))}  # exp(710) is beyond float64
