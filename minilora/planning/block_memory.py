"""The activations of one block, counted by running it on the meta device.

Tensors on the meta device have shapes but no memory. A block that computes with them allocates what
it would allocate for real, which is counted here; so the count follows the code of the model, with
its adapters, recomputation and tiles, and there is no second description of it to keep right.

Shapes: T tokens, D model, H query heads, E head size.
"""

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minilora.config import LoraConfig, TrainConfig
from minilora.model.block_execution import prepare_blocks
from minilora.model.hf_config import DecoderConfig
from minilora.model.lora import inject
from minilora.model.rope import rotary_cos_sin
from minilora.model.transformer import CausalLM


@dataclass(frozen=True)
class BlockMemory:
    """Bytes that one block takes for a batch."""

    kept: int
    """From its forward pass to its backward pass; its output among them, but not its input."""
    backward: int
    """More than that in its backward pass, at most; without the gradients of its weights."""
    evaluation: int
    """In a forward pass that no backward pass follows, at most."""


class LiveBytes(TorchDispatchMode):
    """Counts the memory of the tensors that are made while it is active, and are still in use."""

    def __init__(self, existing: Iterable[Tensor]) -> None:
        """Begin to count.

        Args:
            existing: tensors that are there already, and so are not counted, nor are their views.
        """
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known = {id(tensor.untyped_storage()) for tensor in existing}
        """The storages that need not be counted; a view has the storage of the tensor it shows."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed, unless it is counted already."""
        key = id(storage)
        if key in self._known:
            return
        self._known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, storage.nbytes()).atexit = False

    def _free(self, key: int, num_bytes: int) -> None:
        """Count a storage no longer."""
        self._known.discard(key)
        self.now -= num_bytes


class FusedAttention:
    """An attention context that allocates what a fused kernel does, and computes nothing.

    Such a kernel never has the scores of all pairs of tokens in memory: it keeps its inputs, its
    output, and a number for each token and head, and its backward pass makes three gradients.
    """

    def __init__(self, num_tokens: int):
        self.positions = torch.empty(num_tokens, dtype=torch.int64, device="meta")

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        return _FusedKernel.apply(q, k, v)


class _FusedKernel(torch.autograd.Function):
    """What `FusedAttention` allocates: q [T, H, E], k and v [T, K, E] -> [T, H, E]."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        logsumexp = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)  # [T, H]
        ctx.save_for_backward(q, k, v, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class BlockCounter:
    """Counts what a block of one model allocates; each count is made once."""

    def __init__(self, config: DecoderConfig, lora: LoraConfig | None, dtype: torch.dtype):
        """Describe the block.

        Args:
            config: the decoder.
            lora: the adapters; None: every weight is trained.
            dtype: of the arithmetic.
        """
        self.config = replace(config, num_hidden_layers=1, windows=config.windows[:1])
        self.lora = lora
        self.dtype = dtype
        self._counts: dict[tuple[int, bool, int | None], BlockMemory] = {}

    def count(self, num_tokens: int, recompute: bool, mlp_tile_tokens: int | None) -> BlockMemory:
        """Count the bytes for a batch.

        Args:
            num_tokens: T.
            recompute: whether the block runs again in the backward pass (gradient checkpointing).
            mlp_tile_tokens: see `TrainConfig`.
        """
        key = (num_tokens, recompute, mlp_tile_tokens)
        if key not in self._counts:
            self._counts[key] = self._run(num_tokens, recompute, mlp_tile_tokens)
        return self._counts[key]

    def _run(self, num_tokens: int, recompute: bool, mlp_tile_tokens: int | None) -> BlockMemory:
        """Run a new block forward and backward, then once more as in an evaluation."""
        model = self._make_model()
        settings = TrainConfig(gradient_checkpointing=recompute, mlp_tile_tokens=mlp_tile_tokens)
        prepare_blocks(model, settings)
        block = model.model.layers[0]

        config = self.config
        context = FusedAttention(num_tokens)
        cos, sin = rotary_cos_sin(context.positions, config.rope, config.head_dim, self.dtype)
        x = torch.empty(num_tokens, config.hidden_size, dtype=self.dtype, device="meta")
        x.requires_grad_()
        existing = [x, cos, sin, *model.parameters()]

        with LiveBytes(existing) as training:
            output = block(x, cos, sin, context)
            kept = training.now
            training.peak = kept
            output.backward(torch.empty_like(output))
        model.eval()
        with LiveBytes(existing) as evaluation, torch.no_grad():
            block(x, cos, sin, context)
        return BlockMemory(kept, training.peak - kept, evaluation.peak)

    def _make_model(self) -> CausalLM:
        """Make a model of one block on the meta device."""
        with torch.device("meta"):
            model = CausalLM(self.config)
        model.to(self.dtype)
        if self.lora is not None:
            targets = _block_targets(model, self.lora.target_modules)
            inject(model, replace(self.lora, target_modules=targets))
        _drop_gradients(model)
        return model


def _block_targets(model: CausalLM, targets: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the linear layers of the only block that an adapter's targets match.

    A target may name a layer of one block, such as layers.3.mlp.up_proj. It stands for that layer
    in this block too, so that the count is that of the largest block.
    """
    wanted = {target.split(".")[-1] for target in targets}
    names = [
        path.split(".")[-1]
        for path, module in model.named_modules()
        if type(module) is nn.Linear  # the head is an LMHead
    ]
    return tuple(name for name in names if name in wanted)


def _drop_gradients(model: nn.Module) -> None:
    """Free the gradient of each weight as soon as it is there: gradients are counted elsewhere."""

    def drop(p: Tensor) -> None:
        p.grad = None

    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(drop)
