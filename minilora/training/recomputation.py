"""train.gradient_checkpointing = "auto": recompute as few blocks as memory allows.

A block that is not recomputed saves time, and keeps its activations until the backward pass. How
much memory they take, and how much there is, is measured in the first step, in which all blocks but
the last are recomputed. No number that a run computes depends on the choice.
"""

import numpy as np
import torch

from minilora import distributed
from minilora.config import TrainConfig
from minilora.model.block_execution import KeptBytes, block_forwards, recompute_blocks
from minilora.model.transformer import CausalLM
from minilora.training.batches import TrainingBatches
from minilora.training.throughput import allocated_memory, peak_memory

FREE_SHARE = 0.1
"""Share of the free memory that is left free, for fragments and for other programs."""


class AutoRecomputation:
    """Decides after a run's first step which blocks are recomputed from then on."""

    def __init__(
        self, model: CausalLM, train: TrainConfig, batches: TrainingBatches, device: torch.device
    ):
        """Begin to measure, if the settings say "auto".

        Args:
            model: after `prepare_blocks`, with its weights.
            train: gradient_checkpointing and batch_size are used.
            batches: what the run trains on.
            device: where the model computes.
        """
        self.model = model
        self.device = device
        self.kept: KeptBytes | None = None
        if train.gradient_checkpointing != "auto":
            return
        # Epoch 0 begins with its largest step, but a resumed run does not, nor one that does not
        # group documents by length. This is a bound on the tokens of all micro-batches.
        lengths = batches.data.documents.lengths[batches.data.train_indices]
        self.most_tokens = int(np.sort(lengths)[-train.batch_size :].sum())
        self.allocated_before = allocated_memory(device)
        self.kept = KeptBytes()
        last = block_forwards(model)[-1]
        last.is_recomputed, last.kept_bytes = False, self.kept

    def decide(self) -> None:
        """Choose which blocks are recomputed, after the first step; later calls do nothing.

        All processes call this together.
        """
        if self.kept is None:
            return
        growth = self.most_tokens / self.kept.num_tokens  # of the largest micro-batch
        step_bytes = (peak_memory(self.device) - self.allocated_before) * max(1.0, growth)
        free_bytes = (1 - FREE_SHARE) * distributed.free_bytes(self.device) - step_bytes
        block_bytes = self.kept.per_token * self.most_tokens

        blocks = block_forwards(self.model)
        num_kept = min(len(blocks), max(0, int(free_bytes // block_bytes)))
        num_kept = min(min(counts) for counts in distributed.gather_objects([num_kept]))
        recompute_blocks(self.model, len(blocks) - num_kept)
        distributed.log(
            f"train.gradient_checkpointing auto: {len(blocks) - num_kept} of {len(blocks)} blocks "
            f"are recomputed; to keep one takes {_gib(block_bytes)} with {self.most_tokens:,} "
            f"tokens, and there are {_gib(max(0.0, free_bytes))}"
        )
        blocks[-1].kept_bytes = self.kept = None


def _gib(num_bytes: float) -> str:
    """Format a number of bytes."""
    return f"{num_bytes / 2**30:.3g} GiB"
