"""Sharding, attached to a model from outside: each process holds some rows of every parameter (FSDP2, torch's fully_shard).

A block's rows are gathered while it computes and dropped afterwards; embedding and head are groups of their own. hsdp does
so inside groups of `shard_size` processes, and the groups are copies of each other. Gradients are summed, not averaged:
train.py divides by the supervised tokens of all. What is said of ddp elsewhere needs nothing from here.
"""

import os

import torch
import torch.distributed.fsdp as fsdp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from minilora import dist
from minilora.config import Config, UserError
from minilora.dist import Whole
from minilora.model import CausalLM

FULL_BYTES = {"adamw": 16, "paged_adamw": 8, "adamw8bit": 10, "paged_adamw8bit": 8}  # weight, gradient, states: per parameter
ROOM = 0.7  # share of a device that weights and states may take; the rest is for activations


class Shards(Whole):
    """Rows spread over the last axis of a mesh, in chunks of equal size as torch.chunk makes them."""

    def __init__(self, mesh: DeviceMesh):
        self.mesh = mesh
        self.placements = (Replicate(),) * (mesh.ndim - 1) + (Shard(0),)
        self.index, self.count = mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)

    def rows(self, p: Tensor) -> slice:
        size = -(-p.shape[0] // self.count)
        return slice(min(self.index * size, p.shape[0]), min((self.index + 1) * size, p.shape[0]))

    def put(self, module: nn.Module, name: str, rows: Tensor) -> None:
        self.local(getattr(module, name).detach()).copy_(rows)

    def local(self, p: Tensor) -> Tensor:
        assert isinstance(p, DTensor)
        return p.to_local()

    def spread(self, rows: Tensor, like: Tensor) -> DTensor:
        shape = torch.Size((like.shape[0], *rows.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(rows, self.mesh, self.placements, run_check=False, shape=shape, stride=stride)

    def gather(self, rows: Tensor, like: Tensor) -> Tensor:
        return self.spread(rows, like).full_tensor()

    def reduce(self, model: nn.Module, now: bool) -> None:
        if isinstance(model, fsdp.FSDPModule):
            model.set_requires_gradient_sync(now)

    def rest(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()

    def sum_gradients(self, model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
        """They are summed already: each process takes its rows."""
        for name, p in model.named_parameters():
            if p.grad is not None:
                parameters[name].grad, p.grad = self.local(p.grad), None

    def sum(self, value: Tensor) -> Tensor:
        torch.distributed.all_reduce(value, group=self.mesh.get_group(self.mesh.ndim - 1))
        return value


def choose(config: Config, model: CausalLM, device: torch.device) -> str:
    """The strategy of a run; for "auto" whether weights and states fit a device whole decides, and that is said.

    model: on the meta device, in its dtypes, quantised and with its adapters. Raises UserError for a mesh that cannot be.
    """
    wanted, world = config.parallel.strategy, dist.world_size()
    if wanted == "hsdp" and world > 1 and world % (config.parallel.shard_size or world):
        raise UserError(f"parallel.shard_size = {config.parallel.shard_size} does not divide the {world} processes")
    if world == 1 or wanted == "ddp":
        return "ddp"
    small_ints = any(p.dtype in (torch.uint8, torch.int8) for p in model.parameters())
    old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
    if small_ints and old:  # fully_shard refuses them there
        dist.log(f"parallel.strategy: torch {torch.__version__} cannot shard a quantised base (2.13 can): every process holds it")
        return "ddp"
    if wanted != "auto":
        return wanted
    per_trained = FULL_BYTES[config.train.optimizer]
    need = sum(p.numel() * (per_trained if p.requires_grad else p.itemsize) for p in model.parameters())
    have = device_bytes(device)
    chosen, relation = ("ddp", "fit") if need <= ROOM * have else ("fsdp", "do not fit")
    dist.log(
        f"parallel.strategy: {chosen}, because weights and optimizer states ({need / 2**30:.1f} GiB) {relation} in "
        f"{ROOM:.0%} of a process's {have / 2**30:.1f} GiB"
    )
    return chosen


def device_bytes(device: torch.device) -> int:
    """Memory of this process's device; on the CPU its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def shard(model: CausalLM, strategy: str, config: Config, compute: torch.dtype, device: torch.device) -> Shards:
    """Spread a model on the meta device over the processes; its memory is there afterwards, not yet its values.

    Full training gathers its fp32 masters in the dtype of the arithmetic and reduces gradients in fp32.
    """
    world, size = dist.world_size(), config.parallel.shard_size or dist.world_size()
    sizes, names = ((world // size, size), ("replicate", "shard")) if strategy == "hsdp" else ((world,), ("shard",))
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
    mixed = config.method == "full" and compute != torch.float32
    policy = fsdp.MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32) if mixed else fsdp.MixedPrecisionPolicy()
    offload = fsdp.CPUOffloadPolicy() if config.parallel.cpu_offload else fsdp.OffloadPolicy()

    def group(module: nn.Module, reshard: bool) -> None:
        group = fsdp.fully_shard(module, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy, offload_policy=offload)
        group.set_gradient_divide_factor(1.0)
        group.set_force_sum_reduction_for_comms(True)  # gloo knows no other

    for block in model.model.layers:
        group(block, reshard=True)
    if not model.config.tie_word_embeddings:  # a tied matrix is used at both ends: it stays with the root
        group(model.model.embed_tokens, reshard=True)
        group(model.lm_head, reshard=False)  # its backward follows at once
    group(model, reshard=False)
    model.to_empty(device="cpu" if config.parallel.cpu_offload else device)
    return Shards(mesh)
