"""An exponential moving average of the trained weights, which is what is evaluated and saved."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """The average of the weights over the steps (Polyak averaging).

    After optimizer step t, counted from 0:

        average <- d * average + (1 - d) * weight,   d = min(decay, (1 + t) / (10 + t))

    The smaller d of the first steps lets the average forget the weights that training began with.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float | None):
        """Start the average with the present weights.

        Args:
            parameters: the trained parameters by name; of a sharded model, this process's rows.
            decay: None keeps no average, and every method does nothing.
        """
        self.parameters = parameters
        self.decay = decay or 0.0
        self.shadow: dict[str, Tensor] = {}
        """A second copy of every trained weight, by name.

        Outside `applied` the model has the weights that are trained and `shadow` their average.
        Inside, the two have changed places: the model has the average, which is then evaluated and
        saved, and `shadow` the weights with which training goes on.
        """
        if decay is not None:
            self.shadow = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step`, counted from 0."""
        if self.shadow:
            decay = min(self.decay, (1 + step) / (10 + step))
            averages: list[Tensor] = list(self.shadow.values())
            weights: list[Tensor] = list(self.parameters.values())
            torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextmanager
    def applied(self, wanted: bool = True) -> Iterator[None]:
        """Give the model the average inside the `with` block.

        Args:
            wanted: False leaves the model as it is.
        """
        if not wanted:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange the model's weights and `shadow`, one tensor at a time to save memory."""
        for name, shadow in self.shadow.items():
            previous_shadow = shadow.clone()
            shadow.copy_(self.parameters[name])
            self.parameters[name].copy_(previous_shadow)
