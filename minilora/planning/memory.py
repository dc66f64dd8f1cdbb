"""The memory of each process of a run, by part.

Some parts are held all the time: weights, optimizer states. Others are held at some moments: the
activations that blocks keep grow in the forward pass and shrink in the backward pass, while the
gradients grow. So the parts are added up at each moment that may need the most memory, and the
largest sum is what the run needs.

Shapes: T tokens of a micro-batch, N supervised ones, D model, E head size, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from minilora.config import Config
from minilora.model.activation_offload import OFFLOAD_BUFFERS
from minilora.model.block_execution import recomputed_at_first
from minilora.model.loss import BLOCK_ELEMENTS, CHUNK_ELEMENTS, TILE_ELEMENTS
from minilora.planning.block_memory import BlockMemory
from minilora.planning.model_size import ModelSize
from minilora.planning.workload import Workload

Parts = dict[str, int]
"""Bytes by the name of what takes them."""

CONTEXT_BYTES = {"cuda": 700 * 2**20, "cpu": 550 * 2**20}
"""What a process takes beside its tensors: on a GPU CUDA's context with the kernels and the work
space of cuBLAS; on a CPU Python and torch's libraries (350 MiB), and, as measured in two steps of a
135M, the work space of oneDNN and what malloc keeps (200 MiB)."""

STATE_BYTES = {
    "adamw": 8.0,
    "adamw8bit": 2 * (1 + 4 / 256),
    "paged_adamw": 0.0,
    "paged_adamw8bit": 0.0,
}
"""By optimizer, bytes of its two states for each trained element: fp32, or 8 bits with an fp32
number for every 256. Paged states give their place on the GPU to whatever else needs it."""

SPARE_ROOM = 1.5
"""The cache of keys and values grows to half as much again as it needs, so that it grows rarely."""


@dataclass(frozen=True)
class Job:
    """All that the memory of a process depends on."""

    config: Config
    size: ModelSize
    workload: Workload
    device_type: str
    """"cuda" or "cpu"."""
    processes: int = 1
    strategy: str = "ddp"
    """ddp, fsdp or hsdp: how the processes share the model; with one process it has no effect."""
    remeasure: Callable[[Config], ModelSize] | None = None
    """Measures the model of other settings on the same kind of device."""

    @property
    def shards(self) -> int:
        """How many processes hold one copy of the model between them."""
        if self.strategy == "ddp":
            return 1
        return self.config.parallel.shard_size or self.processes

    @property
    def is_offloaded(self) -> bool:
        """Whether the shards are kept in host memory."""
        return self.config.parallel.cpu_offload and self.shards > 1

    @property
    def recomputed(self) -> int:
        """How many blocks run again in the backward pass; with "auto" all, as in its first step."""
        return recomputed_at_first(self.config.train.gradient_checkpointing, self.num_layers)

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return self.size.decoder.num_hidden_layers

    def block(self, recompute: bool, num_tokens: int) -> BlockMemory:
        """Count the memory of a block for a batch of that many tokens."""
        return self.size.blocks.count(num_tokens, recompute, self.config.train.mlp_tile_tokens)


@dataclass(frozen=True)
class Memory:
    """The memory of a process."""

    fixed: Parts
    """What is held all the time."""
    moments: dict[str, Parts]
    """By moment, what is held in addition."""
    host: Parts
    """What is held in the memory of the machine instead of the GPU's."""

    @property
    def peak_moment(self) -> str:
        """The moment that needs the most."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> Parts:
        """All parts at the moment that needs the most."""
        return self.fixed | self.moments[self.peak_moment]

    @property
    def peak(self) -> int:
        """The most bytes that are held at any moment."""
        return sum(self.parts.values())

    def total_at(self, moment: str) -> int:
        """Return the bytes held at a moment."""
        return sum(self.fixed.values()) + sum(self.moments[moment].values())


def plan_memory(job: Job) -> Memory:
    """Compute the memory of each process of a run."""
    size, train = job.size, job.config.train
    trained = math.ceil(size.trained / job.shards)
    fixed: Parts = {
        "base weights": size.frozen_bytes // job.shards,
        "trained weights, fp32": 4 * trained,
        "optimizer states": int(STATE_BYTES[train.optimizer] * trained),
    }
    if train.ema_decay is not None:
        fixed["moving average"] = 4 * trained

    gradients = 4 * trained
    moments = {
        "the loss": _at_loss(job, gradients),
        "the backward pass of the last block": _at_last_block(job, gradients),
        "the backward pass of the first block": _at_first_block(job, gradients),
        "the update of the weights": _at_update(job, gradients),
    }
    if not job.config.eval.is_off:
        moments["an evaluation"] = _at_evaluation(job)

    host: Parts = {}
    if job.is_offloaded:
        host = fixed | {"gradients": gradients}
        fixed = {}
        for parts in moments.values():
            parts.pop("gradients", None)
    if train.activation_offload and job.device_type == "cuda":
        kept = job.block(True, job.workload.batch_tokens).kept
        host["activations"] = kept * job.recomputed
    fixed["context"] = CONTEXT_BYTES[job.device_type]
    return Memory(fixed, moments, host)


# ---- the moments of a step


def _at_loss(job: Job, gradients: int) -> Parts:
    """Return what is held while the loss is computed, between forward and backward pass."""
    parts = _activations(job, job.num_layers)
    if job.config.train.grad_acc_steps > 1:
        parts["gradients"] = gradients  # those of the micro-batches before
    itemsize = job.size.precision.compute.itemsize
    hidden_size, tokens = job.size.decoder.hidden_size, job.workload.batch_tokens
    normed = tokens * hidden_size * itemsize  # the final norm's output
    parts["loss"] = normed + loss_bytes(job, job.workload.batch_supervised, with_gradients=True)
    return parts | _gathered(job, backward=False) | _cast_weights(job, job.num_layers)


def loss_bytes(job: Job, rows: int, with_gradients: bool) -> int:
    """Return what the loss of N rows allocates, at most (see loss.py).

    Args:
        job: has the vocabulary and the device.
        rows: N.
        with_gradients: whether gradients are computed, as in training.
    """
    decoder, precision = job.size.decoder, job.size.precision
    vocab_size, hidden_size = decoder.vocab_size, decoder.hidden_size
    itemsize = precision.compute.itemsize
    chunk_rows = min(rows, max(1, CHUNK_ELEMENTS[job.device_type] // vocab_size))
    block_rows = min(rows, max(1, BLOCK_ELEMENTS[job.device_type] // vocab_size))
    logits = chunk_rows * vocab_size * itemsize
    # the logits of a block in fp32, their exponentials, and the logits of the block before; a chunk
    # in fp32 has the logits in it
    blocks = (1 if itemsize == 4 else 3) * block_rows * vocab_size * 4
    copies = 2 if with_gradients else 1  # the rows' hidden states, and their gradient
    hidden_rows = copies * rows * hidden_size * itemsize

    head = vocab_size * hidden_size
    of_head = 0
    if job.size.trained_in_vocabulary:
        if itemsize < 4:
            of_head += head * itemsize  # the weight in the dtype of the arithmetic
        if with_gradients:
            of_head += 4 * head
            blocks = max(blocks, head * itemsize)  # a chunk's share of that is added after them
    elif precision.weights != precision.compute:
        of_head = 4 * min(head, TILE_ELEMENTS)
    return logits + blocks + hidden_rows + of_head


def _at_last_block(job: Job, gradients: int) -> Parts:
    """Return what is held when the backward pass begins: all activations, few gradients."""
    parts = _activations(job, job.num_layers)
    parts |= _one_block(job, is_recomputed=job.recomputed == job.num_layers)
    if job.config.train.grad_acc_steps == 1:
        gradients = _block_gradients(job) + 4 * _trained_in_head(job)
    return parts | {"gradients": gradients} | _gathered(job, backward=True)


def _at_first_block(job: Job, gradients: int) -> Parts:
    """Return what is held when the backward pass ends: few activations, all gradients."""
    parts = _activations(job, 1)
    parts |= _one_block(job, is_recomputed=job.recomputed > 0)
    return parts | {"gradients": gradients} | _gathered(job, backward=True)


def _at_update(job: Job, gradients: int) -> Parts:
    """Return what is held when gradients are summed over processes, and weights are updated."""
    if job.processes > 1 and job.shards == 1:
        return {"gradients": gradients, "gradients joined for their sum": gradients}
    return {"gradients": gradients}


def _at_evaluation(job: Job) -> Parts:
    """Return what is held while the loss of an evaluation set is computed, or answers generated."""
    evaluation, size = job.config.eval, job.size
    longest, itemsize = job.workload.longest, size.precision.compute.itemsize
    tokens = min(evaluation.batch_size * longest, max(evaluation.max_batch_tokens, longest))
    hidden = tokens * size.decoder.hidden_size * itemsize
    of_losses = {
        "activations": hidden,
        "one block": job.block(False, tokens).evaluation,
        "loss": loss_bytes(job, tokens, with_gradients=False),
    }
    answers = math.ceil(evaluation.num_generate_samples / job.processes)
    places = answers * (longest + evaluation.max_new_tokens)
    of_answers = {"keys and values": int(SPARE_ROOM * places) * cache_bytes_per_token(size)}
    larger = max(of_losses, of_answers, key=lambda parts: sum(parts.values()))
    return larger | _gathered(job, backward=False)


def cache_bytes_per_token(size: ModelSize) -> int:
    """Return the bytes of a token's keys and values in all blocks, while answers are generated."""
    decoder = size.decoder
    elements = 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_dim
    return elements * size.precision.compute.itemsize


# ---- the parts that moments share


def _activations(job: Job, num_blocks: int) -> Parts:
    """Return what the first blocks keep for the backward pass, with what all blocks share."""
    decoder, itemsize = job.size.decoder, job.size.precision.compute.itemsize
    tokens, train = job.workload.batch_tokens, job.config.train
    recomputed = min(job.recomputed, num_blocks)
    kept_again = job.block(True, tokens).kept  # of a block that is recomputed
    kept_whole = job.block(False, tokens).kept if recomputed < num_blocks else 0
    if train.activation_offload and job.device_type == "cuda":
        on_device = min(recomputed, OFFLOAD_BUFFERS)
    else:
        on_device = recomputed

    embedded = tokens * decoder.hidden_size * itemsize
    cos_and_sin = 2 * tokens * decoder.head_dim * itemsize
    ids = 3 * 8 * tokens  # tokens, labels and positions are int64
    kept = on_device * kept_again + (num_blocks - recomputed) * kept_whole
    return {"activations": kept + embedded + cos_and_sin + ids}


def _one_block(job: Job, is_recomputed: bool) -> Parts:
    """Return what the backward pass of a block takes while it runs."""
    parts = {"one block": job.block(is_recomputed, job.workload.batch_tokens).backward}
    if job.size.converted_bytes:
        parts["one weight, dequantized or cast"] = job.size.converted_bytes
    return parts | _cast_weights(job, 1 + (0 if is_recomputed else job.num_layers - job.recomputed))


def _cast_weights(job: Job, num_blocks: int) -> Parts:
    """Return the 16-bit copies of fp32 weights that autocast makes, and keeps, in full training."""
    size = job.size
    is_full = size.lora is None
    if not is_full or job.shards > 1 or size.precision.compute.itemsize == 4:
        return {}
    copies = num_blocks * size.trained_in_block * size.precision.compute.itemsize
    return {"weights in 16 bits": copies}


def _gathered(job: Job, backward: bool) -> Parts:
    """Return the weights of other processes that are here while a block computes.

    They are those of the block, of the next one, whose weights are on their way, and of the head.
    In the backward pass of full training a block's gradients are here whole, until they are summed.
    """
    if job.shards == 1:
        return {}
    size, itemsize = job.size, job.size.precision.compute.itemsize
    trained_itemsize = itemsize if size.lora is None else 4
    block = size.frozen_block_bytes + size.trained_in_block * trained_itemsize
    head = size.decoder.vocab_size * size.decoder.hidden_size * itemsize
    parts = {"gathered blocks and head": 2 * block + head}
    if backward:
        parts["gradients of a whole block"] = size.trained_in_block * (trained_itemsize + 4)
    return parts


def _block_gradients(job: Job) -> int:
    """Return the bytes of one block's gradients, as the process holds them."""
    return 4 * math.ceil(job.size.trained_in_block / job.shards)


def _trained_in_head(job: Job) -> int:
    """Return the trained elements of the head, as the process holds them."""
    size = job.size
    matrices = 1 if size.decoder.tie_word_embeddings else 2
    return math.ceil(size.trained_in_vocabulary / matrices / job.shards)


def with_settings(job: Job, **changes: object) -> Job:
    """Return the job with other settings, named section__field; sizes and data stay as they are."""
    config = job.config
    for name, value in changes.items():
        section, _, field = name.partition("__")
        changed = replace(getattr(config, section), **{field: value})
        config = replace(config, **{section: changed})
    return replace(job, config=config)
