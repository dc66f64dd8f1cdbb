"""The mean loss of a model on documents, with no label dropped, and its perplexity (exp of it)."""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from minilora.build import autocast_to
from minilora.data.dataset import Documents
from minilora.model.transformer import CausalLM


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
            sums[0] += model(batch.tokens.to(device), batch.lengths, labels=batch.labels)
        sums[1] += batch.num_supervised
    return sums


def loss_and_ppl(sums: Tensor) -> dict[str, float]:
    """Return {"loss": mean loss of a token, "ppl": its exponential} for the sums of `loss_sums`."""
    total, supervised = sums.tolist()
    loss = total / supervised
    return {"loss": loss, "ppl": math.exp(min(loss, 700.0))}  # exp(710) is beyond float64
