"""Signals that ask a run to end."""

import os
import signal
import time

import torch

from minilora import dist

SAME_SIGNAL = 5  # seconds


class StopSignal:
    """SIGTERM and SIGINT ask for a checkpoint and a clean end; a second one ends at once.

    Within a few seconds it counts as the same: torchrun hands on what a scheduler has sent to its processes already.
    """

    def __init__(self) -> None:
        self.number, self.since = 0, 0.0
        self.agreed = False

    def __enter__(self) -> "StopSignal":
        self.previous = {s: signal.signal(s, self.request) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def request(self, number: int, frame: object) -> None:
        if self.number and time.monotonic() < self.since + SAME_SIGNAL:
            return
        if self.number:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.number, self.since = number, time.monotonic()
        dist.log(f"signal {number}: stopping after this step, with a checkpoint (again in {SAME_SIGNAL} s to stop at once)")

    def agree(self, step: int, device: torch.device) -> None:
        """Learn whether any rank was asked to stop; with several GPUs only every ten steps, because looking waits."""
        if dist.world_size() == 1:
            self.agreed = self.number != 0
        elif device.type == "cpu" or step % 10 == 0:
            asked = torch.zeros(65, device=device)
            asked[self.number] = 1
            numbers = dist.all_reduce_sum(asked).nonzero().flatten().tolist()
            self.number, self.agreed = max(numbers), max(numbers) > 0

    def __exit__(self, *exception: object) -> None:
        for s, handler in self.previous.items():
            signal.signal(s, handler)
