"""How the blocks of a model in training are run: recomputed in the backward pass, compiled, or not.

None of it changes what a block computes. `prepare_blocks` reads the settings and replaces the
`forward` of each block by a `BlockForward`.
"""

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from minilora import distributed
from minilora.config import TrainConfig
from minilora.model.activation_offload import ActivationOffload
from minilora.model.attention import AttentionContext, PackedAttention
from minilora.model.transformer import MLP, Block, CausalLM


def prepare_blocks(model: CausalLM, train: TrainConfig) -> None:
    """Make the blocks run as the settings say.

    Args:
        model: with its adapters; may be on the meta device. Changed in place, before sharding.
        train: gradient_checkpointing, compile, activation_offload and mlp_tile_tokens are used.
    """
    offload = ActivationOffload() if train.activation_offload else None
    for block in model.model.layers:
        assert isinstance(block, Block)
        if train.mlp_tile_tokens is not None:
            _compute_in_tiles(block.mlp, train.mlp_tile_tokens, train.compile)
        block.forward = BlockForward(block, train.compile, offload)  # type: ignore[method-assign]
    num_blocks = len(model.model.layers)
    recompute_blocks(model, recomputed_at_first(train.gradient_checkpointing, num_blocks))


def recomputed_at_first(setting: bool | int | str, num_blocks: int) -> int:
    """Return how many blocks train.gradient_checkpointing recomputes in the first step."""
    if setting is True or setting == "auto":
        return num_blocks
    return min(int(setting), num_blocks)


def recompute_blocks(model: CausalLM, number: int) -> None:
    """Recompute the first `number` blocks in the backward pass, and no others."""
    for index, forward in enumerate(block_forwards(model)):
        forward.is_recomputed = index < number


def block_forwards(model: CausalLM) -> list["BlockForward"]:
    """Return what runs the blocks, in their order, after `prepare_blocks`."""
    return [cast(BlockForward, block.forward) for block in model.model.layers]


class BlockForward:
    """Runs a block. An instance takes the place of the block's method `forward`."""

    def __init__(self, block: Block, compiles: bool, offload: ActivationOffload | None):
        """Wrap a block.

        Args:
            block: its `forward` is still its own.
            compiles: whether to compile it, at its first call.
            offload: keeps the block's input on the host if the block is recomputed.
        """
        self.block = block
        self.eager: Callable[..., Tensor] = block.forward
        self.compiled = torch.compile(block.forward) if compiles else None
        self.offload = offload
        self.is_recomputed = False
        """Whether only the block's input is kept, and the block runs again in the backward pass."""
        self.kept_bytes: KeptBytes | None = None
        """Counts what a block keeps that is not recomputed."""

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, context: AttentionContext) -> Tensor:
        """Transform the hidden states: x [T, D] -> [T, D]; cos and sin are [T, 1, E]."""
        if not torch.is_grad_enabled():  # evaluation and generation
            return self.eager(x, cos, sin, context)

        run_block = self._choose_form(x, cos, sin, context)
        with self._saved_tensors_hooks(x, cos, sin):
            if not self.is_recomputed:
                return run_block(x, cos, sin, context)
            # The non-reentrant form works although the first block's input comes from a frozen
            # embedding and needs no gradient. The compiled form is inside of it: a compiler that
            # met it inside of a block would not compile the block.
            return checkpoint(run_block, x, cos, sin, context, use_reentrant=False)

    def _choose_form(
        self, x: Tensor, cos: Tensor, sin: Tensor, context: AttentionContext
    ) -> Callable[..., Tensor]:
        """Return the compiled form of the block, where there is one for these inputs."""
        if self.compiled is None or not isinstance(context, PackedAttention):
            return self.eager
        if not context.can_be_compiled(x):
            _log_uncompiled()
            return self.eager
        # What differs between batches is a variable of the compiled code, not a constant. That
        # makes one form for all batches; another one for the first block of a frozen model, whose
        # input needs no gradient.
        for tensor in (x, cos, sin, context.cu_seqlens):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return self.compiled

    def _saved_tensors_hooks(
        self, x: Tensor, cos: Tensor, sin: Tensor
    ) -> AbstractContextManager[None]:
        """Return the context that treats what autograd keeps as the settings say."""
        if self.is_recomputed and self.offload is not None:
            is_first = self.block.self_attn.layer_index == 0
            return self.offload.hooks(x, is_first)
        if not self.is_recomputed and self.kept_bytes is not None:
            return self.kept_bytes.hooks(x, (cos, sin, *self.block.parameters()))
        return nullcontext()


@functools.cache
def _log_uncompiled() -> None:
    """Say, once, that blocks are not compiled."""
    distributed.log(
        "train.compile: the blocks are not compiled, because attention on this GPU and in this "
        "dtype is computed for each document apart (a GPU from Ampere on compiles in 16 bits)"
    )


class KeptBytes:
    """Counts the memory that a block keeps for its backward pass, beside its input."""

    def __init__(self) -> None:
        self.per_token = 0.0
        """Bytes; the most in any forward pass so far."""
        self.num_tokens = 0
        """Tokens of the largest forward pass so far."""

    def hooks(self, x: Tensor, others: Iterable[Tensor]) -> saved_tensors_hooks:
        """Return a context in which what is kept is counted.

        Args:
            x: the block's input [T, D].
            others: tensors that exist anyway, such as parameters; they are not counted.
        """
        seen = {tensor.untyped_storage().data_ptr() for tensor in (x, *others)}
        total = 0
        self.num_tokens = max(self.num_tokens, len(x))

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            storage = tensor.untyped_storage()  # several tensors may lie in one
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
                self.per_token = max(self.per_token, total / len(x))
            return tensor

        return saved_tensors_hooks(count, lambda tensor: tensor)


def _compute_in_tiles(mlp: MLP, tile_tokens: int, compiles: bool) -> None:
    """Make a feed-forward layer compute some tokens at a time, and recompute each part.

    Its inner activations [T, I] are the largest of a block; now they exist for one tile only.

    Args:
        mlp: changed in place.
        tile_tokens: tokens of a tile.
        compiles: whether blocks are compiled. Their number of tiles differs between batches, so
            then the loop over tiles stays outside of the compiled parts.
    """
    whole = mlp.forward

    def in_tiles(x: Tensor) -> Tensor:
        tiles = x.split(tile_tokens)
        return torch.cat([checkpoint(whole, tile, use_reentrant=False) for tile in tiles])

    mlp.forward = in_tiles  # type: ignore[method-assign]
    if compiles:
        mlp.forward = torch.compiler.disable(in_tiles)  # type: ignore[method-assign]
