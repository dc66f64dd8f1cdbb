"""Sums of a run between its logs, kept on the device while steps run."""

import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minilora import dist
from minilora.config import RunError
from minilora.running.directory import TrainerState, newest


class Window:
    """Sums since the last log: on the device while steps run, read only in `sync`."""

    def __init__(self, device: torch.device):
        self.step = torch.zeros(3, dtype=torch.float64, device=device)  # loss sum, supervised tokens, tokens of this step
        self.unread = torch.zeros_like(self.step)
        self.read = np.zeros(3)
        self.seconds, self.clock = 0.0, time.perf_counter()
        self.grad_norm = torch.zeros(())
        self.lr = 0.0

    def add(self, loss: Tensor, supervised: int, tokens: int) -> None:
        self.step[0] += loss
        self.step[1] += supervised
        self.step[2] += tokens

    def end_step(self) -> Tensor:
        """Sum the step over ranks; returns its supervised tokens, still on the device."""
        total = dist.all_reduce_sum(self.step).clone()
        self.unread += total
        self.step.zero_()
        return total[1]

    def sync(self, state: TrainerState, out: Path) -> None:
        """Read the device's sums. Raises RunError if a loss or gradient is not finite, before anything of it is saved."""
        sums = np.array(self.unread.tolist())  # a copy, also on the CPU
        if not (math.isfinite(sums[0]) and math.isfinite(float(self.grad_norm))):
            kept = newest(out)
            raise RunError(
                f"loss {sums[0] / max(sums[1], 1)}, gradient norm {float(self.grad_norm)} by step {state.step}: training "
                f"cannot go on. Saved before it: {kept or 'nothing yet'}. A lower learning rate or "
                "--model.dtype float32 may help; nothing of this step was saved"
            )
        self.read += sums
        self.unread.zero_()
        self.seconds += time.perf_counter() - self.clock
        state.supervised_tokens += int(sums[1])
        state.tokens += int(sums[2])

    def row(self, state: TrainerState) -> dict:
        """The log entry of the window, which begins anew."""
        loss, supervised, tokens = self.read
        row = {
            "loss": loss / max(supervised, 1), "grad_norm": float(self.grad_norm), "lr": self.lr, "tokens": state.tokens,
            "supervised_tokens": state.supervised_tokens, "tokens_per_second": round(tokens / max(self.seconds, 1e-9), 1),
        }  # fmt: skip
        self.read, self.seconds = np.zeros(3), 0.0
        return row

    def restart_clock(self) -> None:
        self.clock = time.perf_counter()
