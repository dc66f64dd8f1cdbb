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

MOST_SKIPPED_IN_A_ROW = 20
"""After this many skipped steps in a row a float16 run ends. One or two are harmless."""


class StepMetrics:
    """Losses and token counts since the last log.

    Reading a number from a GPU waits until all work before it is done. The sums therefore stay on
    the device and only `sync` reads them. Each is three float64 numbers: the sum of token losses,
    the number of supervised tokens, and the number of all tokens.

    In every step `add` is called for each micro-batch and then `end_step`, and in float16
    `leave_out_if`. Steps that log, evaluate or save call `sync` first, `row` for a log entry, and
    `restart_clock` at their end.
    """

    def __init__(self, device: torch.device):
        self.step_sums = torch.zeros(3, dtype=torch.float64, device=device)
        """Sums of the current step, on this process alone."""
        self.unread_sums = torch.zeros_like(self.step_sums)
        """Sums over all processes of the steps since the last `sync`."""
        self.sums_before_step = self.unread_sums
        """What `unread_sums` was before the last step."""
        self.read_sums = np.zeros(3)
        """What `sync` has read since the last `row`."""
        self.seconds = 0.0
        """Time of the steps in `read_sums`, without evaluations and saving."""
        self.clock = time.perf_counter()
        self.step_supervised = torch.zeros(())
        """Supervised tokens of the last step, on all processes; on the device."""
        self.grad_norm = torch.zeros(())
        self.lr = 0.0
        self.num_steps = 0
        """Steps since the last `row`."""
        self.skipped: Tensor | None = None
        """How many of them were skipped, on the device; None where no step can be (not float16)."""
        self.skipped_in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        """How many of the last steps were skipped, on the device."""
        self.last_finite_norm = self.grad_norm
        """Where steps can be skipped, the gradient norm of the last one that was not."""

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
        self.sums_before_step = self.unread_sums
        self.unread_sums = self.unread_sums + total
        self.step_sums.zero_()
        self.step_supervised = total[1]
        self.num_steps += 1
        return self.step_supervised

    def leave_out_if(self, overflowed: Tensor) -> None:
        """Count the step that has ended as skipped, and leave out its numbers, if it overflowed.

        Args:
            overflowed: a bool on the device, see `take_step`.
        """
        if self.skipped is None:
            self.skipped = torch.zeros((), dtype=torch.int64, device=overflowed.device)
        self.skipped += overflowed
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * overflowed
        self.unread_sums = torch.where(overflowed, self.sums_before_step, self.unread_sums)
        self.grad_norm = torch.where(overflowed, self.last_finite_norm, self.grad_norm)
        self.last_finite_norm = self.grad_norm

    def sync(self, state: TrainerState, out: Path) -> None:
        """Read the device's sums, and add the tokens to the state's counts.

        Raises:
            RunError: the sum of the losses, or the last step's gradient norm, is not finite; in
                float16 also if the last MOST_SKIPPED_IN_A_ROW steps were skipped.
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
        if int(self.skipped_in_a_row) >= MOST_SKIPPED_IN_A_ROW:
            kept = latest_checkpoint(out) or "nothing yet"
            raise RunError(
                f"the gradients of the last {int(self.skipped_in_a_row)} steps, up to step "
                f"{state.step}, overflowed float16: training cannot go on. Saved before it: {kept}."
                " --model.dtype bfloat16 or float32, or fewer documents in a step, may help"
            )

        self.read_sums += sums
        self.unread_sums.zero_()
        self.seconds += time.perf_counter() - self.clock
        state.supervised_tokens += int(sums[1])
        state.tokens += int(sums[2])

    @property
    def is_empty(self) -> bool:
        """Whether all steps since the last `row` were skipped, so that there is nothing to log."""
        return self.skipped is not None and int(self.skipped) == self.num_steps

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
        if self.skipped is not None:
            row["skipped_steps"] = self._say_skipped(state)
            self.skipped.zero_()
        self.num_steps = 0
        self.read_sums = np.zeros(3)
        self.seconds = 0.0
        return row

    def _say_skipped(self, state: TrainerState) -> int:
        """Return how many steps were skipped since the last `row`; print it if any was."""
        assert self.skipped is not None
        num_skipped = int(self.skipped)
        if num_skipped:
            distributed.log(
                f"{num_skipped} of the {self.num_steps} steps up to step {state.step} were skipped:"
                " their gradients overflowed float16"
            )
        return num_skipped

    def restart_clock(self) -> None:
        """Start timing the next steps: what came since the last `sync` was not training."""
        self.clock = time.perf_counter()
