"""A clean stop on SIGTERM and SIGINT: the step is finished and a checkpoint is saved."""

import os
import signal
import time

import torch

from minilora import distributed

SAME_SIGNAL_SECONDS = 5
"""Seconds after a signal within which another one counts as the same."""

GPU_STEPS_BETWEEN_CHECKS = 10
"""On several GPUs, processes ask each other this often, because reading the answer waits."""

SIGNAL_NUMBERS = 65
"""Signals of Linux are numbered from 1 to 64."""


class StopSignal:
    """Inside the `with` block, SIGTERM and SIGINT request a stop; a second one ends the process.

    A second signal within SAME_SIGNAL_SECONDS is ignored: a scheduler may send its signal to all
    processes while torchrun passes the same signal on to them.
    """

    def __init__(self) -> None:
        self.number = 0
        """The signal that requested the stop; 0 if there was none."""
        self.received_at = 0.0
        self.agreed = False
        """Whether all processes stop after this step. The same on all of them, unlike `number`."""

    def __enter__(self) -> "StopSignal":
        signals = (signal.SIGTERM, signal.SIGINT)
        self.previous = {number: signal.signal(number, self.request) for number in signals}
        return self

    def request(self, number: int, frame: object) -> None:
        """Request a stop after the current step; a second signal ends the process at once."""
        if self.number and time.monotonic() < self.received_at + SAME_SIGNAL_SECONDS:
            return
        if self.number:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.number = number
        self.received_at = time.monotonic()
        distributed.log(
            f"signal {number}: stopping soon, with a checkpoint "
            f"(a second signal after {SAME_SIGNAL_SECONDS} s stops at once)"
        )

    def agree(self, step: int, device: torch.device) -> None:
        """Find out whether any process was asked to stop; all processes call this together.

        On several GPUs it takes effect only in every tenth step (GPU_STEPS_BETWEEN_CHECKS).
        """
        if distributed.world_size() == 1:
            self.agreed = self.number != 0
        elif device.type == "cpu" or step % GPU_STEPS_BETWEEN_CHECKS == 0:
            # votes[n] counts the processes that received signal n, votes[0] those without a signal
            votes = torch.zeros(SIGNAL_NUMBERS, device=device)
            votes[self.number] = 1
            received = distributed.all_reduce_sum(votes).nonzero().flatten().tolist()
            self.number = max(received)
            self.agreed = self.number > 0

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
