"""Settings, draws and definitions for the tests of sampling."""

import numpy as np
import torch
from torch import Tensor

FILTERS = [  # temperature, top_k, top_p, repetition penalty
    (1.0, 0, 1.0, 1.0),
    (0.6, 0, 1.0, 1.3),
    (1.7, 0, 0.9, 1.0),
    (1.0, 0, 0.99, 0.7),
    (0.2, 0, 0.5, 1.0),
    (1.0, 0, 0.01, 1.2),
    (1.0, 1, 1.0, 1.0),
    (1.3, 7, 1.0, 1.1),
    (0.9, 40, 0.8, 1.0),
    (2.0, 400, 0.95, 1.5),
    (1.0, 10**6, 0.9, 1.0),
]


def uniform_draws(count: int) -> Tensor:
    """Draw numbers as generation does."""
    return torch.from_numpy(np.random.default_rng(0).random(count, dtype=np.float32))


def occurrences(seen: list[list[int]], vocabulary: int) -> Tensor:
    """Return which tokens occur in each list, bool [lists, vocabulary]."""
    mask = torch.zeros(len(seen), vocabulary, dtype=torch.bool)
    for row, ids in zip(mask, seen, strict=True):
        row[ids] = True
    return mask


def nucleus(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Return probabilities in float64 of the most probable tokens, the others' being zero.

    The tokens go up to and include the one with which their probability reaches top_p.
    """
    probabilities = (logits.double() / temperature).softmax(0)
    kept, total = torch.zeros_like(probabilities), 0.0
    for i in probabilities.argsort(descending=True, stable=True).tolist():
        kept[i] = probabilities[i]
        total += probabilities[i].item()
        if total >= top_p:
            break
    return kept / kept.sum()
