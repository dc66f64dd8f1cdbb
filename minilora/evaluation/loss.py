"""Loss of documents under their full labels."""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from minilora.build import autocast_to
from minilora.data import Documents
from minilora.loss import cross_entropy_sum


@torch.no_grad()
def loss_sums(
    model: nn.Module, documents: Documents, batches: Iterable[np.ndarray], device: torch.device,
    autocast: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """[sum of token losses, supervised tokens] in float64 over batches of documents (their places), each one pass forward."""
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for which in batches:
        batch = documents.batch(which)
        with autocast_to(autocast, device):
            sums[0] += model(batch.tokens.to(device), batch.lengths, lambda h, w, y=batch.labels: cross_entropy_sum(h, w, y))
        sums[1] += batch.supervised
    return sums


def loss_and_ppl(sums: Tensor) -> dict[str, float]:
    """Mean loss of a token, and its exponential."""
    total, supervised = sums.tolist()
    return {"loss": total / supervised, "ppl": math.exp(min(total / supervised, 700.0))}
