"""Sharding: each process holds some rows of every parameter (FSDP2, torch's fully_shard).

It is attached to a model from outside. The rows of a block are gathered from all processes while
the block computes and dropped afterwards; embedding and head are gathered by themselves. `hsdp`
does this inside groups of `shard_size` processes; the groups are replicas of each other.

Gradients are summed over processes, not averaged: the training loop divides them by the number of
supervised tokens on all processes. `ddp`, where every process holds the whole model, needs nothing
from this module: its layout is `distributed.Replicated`.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed.fsdp as fsdp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from minilora import distributed
from minilora.config import Config
from minilora.distributed import Layout
from minilora.errors import UserError
from minilora.model.transformer import CausalLM

BYTES_PER_TRAINED_PARAMETER = {
    "adamw": 4 + 4 + 8,
    "adamw8bit": 4 + 4 + 2,
    "paged_adamw": 4 + 4,
    "paged_adamw8bit": 4 + 4,
}
"""By optimizer, the bytes that a trained parameter takes on a device: fp32 weight, fp32 gradient,
and the optimizer's two states, unless these are paged to the host."""
WEIGHTS_SHARE = 0.7
"""Share of a device's memory that weights and states may take; the rest is for activations."""
GATHERED_SHARE = 0.5
"""Share of the free memory that a whole gathered model may take while it generates; the rest is for
keys, values and logits."""


class Sharded(Layout):
    """The layout in which each process holds some rows of every parameter.

    Rows are split over the last axis of a mesh of processes, in chunks of equal size, as
    torch.chunk makes them: the last processes may have fewer rows, or none.
    """

    def __init__(self, mesh: DeviceMesh, host_mesh: DeviceMesh | None = None):
        """Describe a model that `shard_model` has sharded.

        Args:
            mesh: processes with one axis (shards) or two (replicas, shards), and the type of device
                on which they compute.
            host_mesh: the same processes and axes for tensors on the CPU. It is needed if the
                parameters are there (parallel.cpu_offload), but `mesh` is of GPUs.
        """
        self.mesh = mesh
        self.host_mesh = host_mesh
        self.placements: tuple[Placement, ...] = (Shard(0),)
        if mesh.ndim == 2:
            self.placements = (Replicate(), Shard(0))

        shard_axis = mesh.ndim - 1
        self.shard_index = mesh.get_local_rank(shard_axis)
        self.shard_count = mesh.size(shard_axis)
        self.shard_group = mesh.get_group(shard_axis)

    def local_rows(self, p: Tensor) -> slice:
        """Return this process's chunk of the rows."""
        total = p.shape[0]
        chunk = math.ceil(total / self.shard_count)
        first = min(self.shard_index * chunk, total)
        return slice(first, min(first + chunk, total))

    def materialize(self, module: nn.Module, name: str, rows: Tensor) -> None:
        """Copy the rows into the memory that `shard_model` has allocated for them."""
        p = getattr(module, name).detach()
        self.to_local(p).copy_(rows)

    def to_local(self, p: Tensor) -> Tensor:
        """Return this process's part of a DTensor."""
        assert isinstance(p, DTensor)
        return p.to_local()

    def to_dtensor(self, rows: Tensor, like: Tensor) -> DTensor:
        """Return a DTensor over the rows, with as many rows in all as `like` has.

        DTensor would copy rows that are not on the mesh's type of device.
        """
        mesh = self.mesh
        if self.host_mesh is not None and rows.device.type == "cpu":
            mesh = self.host_mesh
        shape = torch.Size((like.shape[0], *rows.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()  # of a contiguous tensor
        return DTensor.from_local(
            rows, mesh, self.placements, run_check=False, shape=shape, stride=stride
        )

    def full_tensor(self, rows: Tensor, like: Tensor) -> Tensor:
        """All-gather the rows, on the device that computes: gathering on the CPU is slow."""
        rows = rows.to(self.mesh.device_type)
        return self.to_dtensor(rows, like).full_tensor()

    def set_gradient_sync(self, model: nn.Module, enabled: bool) -> None:
        """Let the next backward pass reduce-scatter gradients, or keep them whole for later."""
        if isinstance(model, fsdp.FSDPModule):
            model.set_requires_gradient_sync(enabled)

    def reshard(self, model: nn.Module) -> None:
        """Free the gathered rows of other processes in all modules."""
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()

    @contextmanager
    def keep_gathered(self, model: nn.Module) -> Iterator[None]:
        """Let blocks and embedding stay gathered, if that takes GATHERED_SHARE of what is free."""
        assert isinstance(model, CausalLM)
        device = distributed.default_device()
        gathered_bytes = sum(p.numel() * p.itemsize for p in model.parameters())
        fits = gathered_bytes <= GATHERED_SHARE * distributed.free_bytes(device)
        if not distributed.all_agree(fits, device):  # gathering is done by all or by none
            yield
            return

        # these free their rows after each forward pass; `shard_model` lets head and root keep them
        modules = [*model.model.layers, model.model.embed_tokens]
        resharding = [module for module in modules if isinstance(module, fsdp.FSDPModule)]
        for module in resharding:
            module.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for module in resharding:
                module.set_reshard_after_forward(True, recurse=False)
            self.reshard(model)

    def sum_gradients(self, model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
        """Move the gradients to `parameters`; the last backward pass has summed them already."""
        for name, p in model.named_parameters():
            if p.grad is not None:
                parameters[name].grad = self.to_local(p.grad)
                p.grad = None

    def sum_over_shards(self, value: Tensor) -> Tensor:
        """All-reduce over the processes that share this process's copy of the model."""
        torch.distributed.all_reduce(value, group=self.shard_group)
        return value


def choose_strategy(config: Config, model: CausalLM, device: torch.device) -> str:
    """Decide how the processes share a model: "ddp", "fsdp" or "hsdp".

    For "auto" it is "ddp" if weights and optimizer states fit a single device, and a message says
    so.

    Args:
        config: the run's settings.
        model: on the meta device, in its dtypes, quantized and with its adapters.
        device: this process's device.

    Raises:
        UserError: parallel.shard_size does not divide the number of processes.
    """
    wanted, world_size = config.parallel.strategy, distributed.world_size()
    shard_size = config.parallel.shard_size or world_size
    if wanted == "hsdp" and world_size > 1 and world_size % shard_size:
        raise UserError(
            f"parallel.shard_size = {shard_size} does not divide the {world_size} processes"
        )
    if world_size == 1 or wanted == "ddp":
        return "ddp"

    is_quantized = any(p.dtype in (torch.uint8, torch.int8) for p in model.parameters())
    if is_quantized and _torch_version() < (2, 13):
        distributed.log(
            f"parallel.strategy: torch {torch.__version__} cannot shard a quantized base "
            "(2.13 can): every process holds it"
        )
        return "ddp"
    if wanted != "auto":
        return wanted

    bytes_per_trained = BYTES_PER_TRAINED_PARAMETER[config.train.optimizer]
    needed = sum(
        p.numel() * (bytes_per_trained if p.requires_grad else p.itemsize)
        for p in model.parameters()
    )
    available = device_bytes(device)
    if needed <= WEIGHTS_SHARE * available:
        strategy, relation = "ddp", "fit"
    else:
        strategy, relation = "fsdp", "do not fit"
    distributed.log(
        f"parallel.strategy: {strategy}, because weights and optimizer states "
        f"({needed / 2**30:.1f} GiB) {relation} in {WEIGHTS_SHARE:.0%} of a process's "
        f"{available / 2**30:.1f} GiB"
    )
    return strategy


def _torch_version() -> tuple[int, int]:
    """Return torch's major and minor version."""
    major, minor, *_ = torch.__version__.split(".")
    return int(major), int(minor)


def device_bytes(device: torch.device) -> int:
    """Return the memory of this process's device; on a CPU its share of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return distributed.machine_bytes() // distributed.processes_of_machine()


def shard_model(
    model: CausalLM, strategy: str, config: Config, compute_dtype: torch.dtype, device: torch.device
) -> Sharded:
    """Split a model on the meta device over the processes, and allocate its memory.

    The parameters have no values yet: `Sharded.materialize` sets them.

    Args:
        model: in its dtypes, quantized and with its adapters; changed in place.
        strategy: "fsdp" or "hsdp".
        config: the run's settings.
        compute_dtype: of the arithmetic. Where fp32 weights are trained in 16-bit arithmetic, they
            are gathered in this dtype, and gradients are summed in fp32.
        device: this process's device.
    """
    offload_to_host = config.parallel.cpu_offload
    mesh = _make_mesh(device.type, strategy, config)
    host_mesh = None
    if offload_to_host and device.type != "cpu":
        host_mesh = _make_mesh("cpu", strategy, config)

    policy = fsdp.MixedPrecisionPolicy()
    if config.method == "full" and compute_dtype != torch.float32:
        policy = fsdp.MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    offload = fsdp.CPUOffloadPolicy() if offload_to_host else fsdp.OffloadPolicy()

    def shard_module(module: nn.Module, reshard_after_forward: bool) -> None:
        """Shard the module's parameters; FSDP all-gathers them together before its forward."""
        sharded = fsdp.fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=reshard_after_forward,
            mp_policy=policy,
            offload_policy=offload,
        )
        # sums, not means: the training loop divides by the supervised tokens of all processes
        sharded.set_gradient_divide_factor(1.0)
        # gloo has none of the reductions that scale or average; a plain sum works everywhere
        sharded.set_force_sum_reduction_for_comms(True)

    for block in model.model.layers:
        shard_module(block, reshard_after_forward=True)
    # A tied matrix is used first and last. It stays with the root module, and so is gathered during
    # the whole of its forward.
    if not model.config.tie_word_embeddings:
        shard_module(model.model.embed_tokens, reshard_after_forward=True)
        shard_module(model.lm_head, reshard_after_forward=False)  # its backward pass comes next
    shard_module(model, reshard_after_forward=False)
    keep_labels_on_host(model)

    model.to_empty(device="cpu" if offload_to_host else device)
    return Sharded(mesh, host_mesh)


def _make_mesh(device_type: str, strategy: str, config: Config) -> DeviceMesh:
    """Arrange all processes: on one axis (fsdp), or on two, replicas and shards (hsdp)."""
    world_size = distributed.world_size()
    if strategy == "hsdp":
        shard_size = config.parallel.shard_size or world_size
        sizes = (world_size // shard_size, shard_size)
        return init_device_mesh(device_type, sizes, mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))


class _Hidden:
    """Holds an argument while fully_shard's hook looks through the arguments for tensors."""

    def __init__(self, value: Tensor | None):
        self.value = value


def keep_labels_on_host(model: nn.Module) -> None:
    """Keep fully_shard from moving the root module's argument `labels` to the GPU.

    It moves all tensors among the root's arguments, and waits for the copies. The loss would then
    wait for the GPU again, to count the supervised rows (see `cross_entropy_sum`).

    Args:
        model: the root module, after fully_shard.
    """

    def hide(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, {**kwargs, "labels": _Hidden(kwargs.get("labels"))}

    def reveal(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, {**kwargs, "labels": kwargs["labels"].value}

    # the first to run, before fully_shard's hook, and the last, after it
    model.register_forward_pre_hook(hide, prepend=True, with_kwargs=True)
    model.register_forward_pre_hook(reveal, with_kwargs=True)
