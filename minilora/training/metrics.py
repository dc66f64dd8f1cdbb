"""The numbers of a run between two logs, summed on the device while its steps run."""

import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minilora import distributed
from minilora.checkpoint.checkpointer import latest_checkpoint
from minilora.checkpoint.trainer_state import TrainerState
from minilora.errors import RunError


class StepMetrics:
    """Losses and token counts since the last log.

    Reading a number from a GPU waits until all work before it is done. The sums therefore stay on
    the device and only `sync` reads them. Each is three float64 numbers: the sum of token losses,
    the number of supervised tokens, and the number of all tokens.

    In every step `add` is called for each micro-batch and then `end_step`. Steps that log,
    evaluate or save call `sync` first, `row` for a log entry, and `restart_clock` at their end.
    """

    def __init__(self, device: torch.device):
        self.step_sums = torch.zeros(3, dtype=torch.float64, device=device)
        """Sums of the current step, on this process alone."""
        self.unread_sums = torch.zeros_like(self.step_sums)
        """Sums over all processes of the steps since the last `sync`."""
        self.read_sums = np.zeros(3)
        """What `sync` has read since the last `row`."""
        self.seconds = 0.0
        """Time of the steps in `read_sums`, without evaluations and saving."""
        self.clock = time.perf_counter()
        self.step_supervised = torch.zeros(())
        """Supervised tokens of the last step, on all processes; on the device."""
        self.grad_norm = torch.zeros(())
        self.lr = 0.0

    def add(self, loss: Tensor, num_supervised: int, num_tokens: int) -> None:
        """Add a micro-batch to the current step.

        Args:
            loss: the sum of its token losses, detached.
            num_supervised: how many tokens that loss is over.
            num_tokens: how many tokens it has.
        """
        self.step_sums[0] += loss
        self.step_sums[1] += num_supervised
        self.step_sums[2] += num_tokens

    def end_step(self) -> Tensor:
        """Sum the current step over all processes.

        Returns:
            The number of its supervised tokens, float64 and still on the device.
        """
        total = distributed.all_reduce_sum(self.step_sums).clone()  # step_sums is zeroed below
        self.unread_sums += total
        self.step_sums.zero_()
        self.step_supervised = total[1]
        return self.step_supervised

    def sync(self, state: TrainerState, out: Path) -> None:
        """Read the device's sums, and add the tokens to the state's counts.

        Raises:
            RunError: the sum of the losses, or the last step's gradient norm, is not finite.
        """
        sums = np.array(self.unread_sums.tolist())
        grad_norm = float(self.grad_norm)
        if not (math.isfinite(sums[0]) and math.isfinite(grad_norm)):
            loss = sums[0] / max(sums[1], 1)
            kept = latest_checkpoint(out) or "nothing yet"
            raise RunError(
                f"loss {loss}, gradient norm {grad_norm} by step {state.step}: training cannot go "
                f"on. Saved before it: {kept}. A lower learning rate or --model.dtype float32 may "
                "help; nothing of this step was saved"
            )

        self.read_sums += sums
        self.unread_sums.zero_()
        self.seconds += time.perf_counter() - self.clock
        state.supervised_tokens += int(sums[1])
        state.tokens += int(sums[2])

    def row(self, state: TrainerState) -> dict:
        """Return the log entry of what `sync` has read since the last one, and start again."""
        loss, supervised, tokens = self.read_sums
        row = {
            "loss": loss / max(supervised, 1),
            "grad_norm": float(self.grad_norm),
            "lr": self.lr,
            "tokens": state.tokens,
            "supervised_tokens": state.supervised_tokens,
            "tokens_per_second": round(tokens / max(self.seconds, 1e-9), 1),
        }
        self.read_sums = np.zeros(3)
        self.seconds = 0.0
        return row

    def restart_clock(self) -> None:
        """Start timing the next steps: what came since the last `sync` was not training."""
        self.clock = time.perf_counter()
