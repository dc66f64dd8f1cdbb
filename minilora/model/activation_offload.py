"""The inputs of recomputed blocks, kept in host memory between forward and backward pass.

What a recomputed block keeps on a GPU is its input [T, D]. With a long document these inputs, one
for each block, take more memory than anything else. Copies run on a stream of their own, beside the
computation: the input of a block is copied to the host while the block computes, and back while the
block after it computes its gradients. On a CPU the same code copies within host memory.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OFFLOAD_BUFFERS = 2
"""Inputs that are on the device at a time: a block's, and that of its neighbour."""


@dataclass
class _KeptInput:
    """A block's input in host memory; and on the device, while it is needed or copied there."""

    on_host: Tensor
    on_device: Tensor | None
    copied: Any
    """The event after the last copy."""
    previous: "_KeptInput | None"
    """The input of the block before it, which is the next one that the backward pass needs."""


class ActivationOffload:
    """The inputs of a model's recomputed blocks, kept on the host."""

    def __init__(self) -> None:
        self.device: torch.device | None = None
        self.streams: Any = None  # torch.cuda or torch.cpu; the streams of the latter do nothing
        self.copy_stream: Any = None
        self.last: _KeptInput | None = None
        self.on_device: deque[_KeptInput] = deque()

    def hooks(self, x: Tensor, is_first: bool) -> torch.autograd.graph.saved_tensors_hooks:
        """Return a context in which a block's input x [T, D] is kept on the host.

        Args:
            x: what the block is given.
            is_first: whether it is the first block of a forward pass.
        """
        if self.copy_stream is None:
            self.device = x.device
            self.streams = torch.get_device_module(x.device)
            self.copy_stream = self.streams.Stream()
        if is_first:
            self.last = None

        def keep(tensor: Tensor) -> Tensor | _KeptInput:
            # the cosines and sines are the same for all blocks, and stay where they are
            return self._keep(tensor) if tensor.data_ptr() == x.data_ptr() else tensor

        def bring_back(kept: Tensor | _KeptInput) -> Tensor:
            return kept if isinstance(kept, Tensor) else self._bring_back(kept)

        return torch.autograd.graph.saved_tensors_hooks(keep, bring_back)

    def _keep(self, x: Tensor) -> _KeptInput:
        """Start to copy an input to the host."""
        on_host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        self.last = _KeptInput(on_host, x, self._copy(x, on_host), self.last)

        # Memory on the device is used again by what the computation allocates next, so it has to
        # wait until what was in there is copied.
        self.on_device.append(self.last)
        if len(self.on_device) > OFFLOAD_BUFFERS:
            oldest = self.on_device.popleft()
            self.streams.current_stream().wait_event(oldest.copied)
            oldest.on_device = None
        return self.last

    def _bring_back(self, kept: _KeptInput) -> Tensor:
        """Return an input on the device, and start to copy that of the block before it."""
        for needed in (kept, kept.previous):
            if needed is not None and needed.on_device is None:
                needed.on_device = torch.empty_like(needed.on_host, device=self.device)
                needed.copied = self._copy(needed.on_host, needed.on_device)
        self.streams.current_stream().wait_event(kept.copied)
        x, kept.on_device = kept.on_device, None
        assert x is not None
        return x

    def _copy(self, source: Tensor, target: Tensor) -> Any:
        """Copy beside the computation, once that is done with both. Returns the event after it."""
        self.copy_stream.wait_stream(self.streams.current_stream())
        with self.streams.stream(self.copy_stream):
            target.copy_(source, non_blocking=True)
        return self.copy_stream.record_event()
