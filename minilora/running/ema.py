"""An exponential moving average of the trained weights (Polyak averaging), evaluated and saved in their place."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """After step t (from 0): average <- d average + (1 - d) weight, with d = min(decay, (1 + t) / (10 + t)), so that the
    average does not hang on to the start. Without a decay it keeps nothing, and nothing happens.

    parameters: this process's rows of them. others: the average, or while it is applied the weights.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float | None):
        self.parameters, self.decay = parameters, decay or 0.0
        self.others: dict[str, Tensor] = {} if decay is None else {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step`, counted from 0."""
        if self.others:
            weight = 1 - min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(self.others.values()), list(self.parameters.values()), weight)

    @contextmanager
    def applied(self, wanted: bool = True) -> Iterator[None]:
        """Inside, if it is wanted, the model holds the average, and `others` the weights that training goes on with."""
        self._swap(wanted)
        try:
            yield
        finally:
            self._swap(wanted)

    @torch.no_grad()
    def _swap(self, wanted: bool) -> None:
        for name, other in self.others.items() if wanted else ():  # one at a time: memory holds no third copy
            held = other.clone()
            other.copy_(self.parameters[name])
            self.parameters[name].copy_(held)
