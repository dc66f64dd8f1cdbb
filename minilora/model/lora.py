"""LoRA (Hu et al., arXiv 2106.09685): adapters beside frozen linear layers.

    y = W x + scaling * B A dropout(x),   W frozen, A and B trained

An adapter wraps a linear layer that is already there, so the decoder needs no second version.
Adapters are fp32 whatever the base's dtype; their product is computed in the dtype of the
activations. Names, defaults and the rule for targets are PEFT's.

Shapes: T tokens, in and out features of a layer, R rank.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.config import LoraConfig
from minilora.distributed import REPLICATED, Layout
from minilora.errors import UserError, did_you_mean

EMBEDDING_MODULES = ("embed_tokens", "lm_head")
"""The modules that lora.train_embeddings trains as a whole; a model that ties them has only the
first."""


class LoRALinear(nn.Module):
    """A frozen linear layer, plain or quantized, with a trained low-rank update beside it."""

    def __init__(self, base_layer: nn.Linear, rank: int, scaling: float, dropout: float):
        super().__init__()
        self.base_layer = base_layer
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)
        self.train(base_layer.training)  # in a model in eval mode, a new layer must not drop out

        device = base_layer.weight.device
        A = torch.empty(rank, base_layer.in_features, dtype=torch.float32, device=device)
        B = torch.empty(base_layer.out_features, rank, dtype=torch.float32, device=device)
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.Parameter(B)

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(self.dropout(x), self.lora_A.to(x.dtype))  # [T, in] -> [T, R]
        # In place, which saves a second tensor of [T, out]; the base's output is used only here.
        return self.base_layer(x).addmm_(h, self.lora_B.to(x.dtype).t(), alpha=self.scaling)


def lora_scaling(lora: LoraConfig) -> float:
    """Return alpha / rank, or alpha / sqrt(rank) for rank-stabilized LoRA (arXiv 2312.03732)."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)


def inject(model: nn.Module, lora: LoraConfig) -> None:
    """Freeze a model and wrap every linear layer that `lora.target_modules` names.

    With lora.train_embeddings the embedding and the head stay trainable.

    A target matches the modules whose path is the target or ends with ".target". The adapters
    have no values yet: see `init_adapters`.

    Raises:
        UserError: a target matches nothing, or something other than a linear layer of the blocks.
    """
    model.requires_grad_(False)
    modules = dict(model.named_modules())
    for target in lora.target_modules:
        for path in _matching_paths(target, modules):
            base_layer = model.get_submodule(path)
            if isinstance(base_layer, LoRALinear):
                continue  # two targets match it, e.g. q_proj and self_attn.q_proj
            # the head is an nn.Linear too, but its loss is computed inside it, see LMHead
            if not isinstance(base_layer, nn.Linear) or path == "lm_head":
                raise UserError(
                    f"lora.target_modules: {path!r} cannot take an adapter: "
                    "only linear layers of the blocks can"
                )
            wrapped = LoRALinear(base_layer, lora.rank, lora_scaling(lora), lora.dropout)
            model.set_submodule(path, wrapped)

    if lora.train_embeddings:
        for path, p in model.named_parameters():
            *_, module_name, _ = path.split(".")  # e.g. model.embed_tokens.weight
            if module_name in EMBEDDING_MODULES:
                p.requires_grad_(True)


def _matching_paths(target: str, modules: dict[str, nn.Module]) -> list[str]:
    """Return the paths that a target matches. Raises UserError if there are none."""
    paths = [path for path in modules if path == target or path.endswith(f".{target}")]
    if not paths:
        linear_paths = [path for path, module in modules.items() if isinstance(module, nn.Linear)]
        names = sorted({path.split(".")[-1] for path in linear_paths})
        hint = did_you_mean(target, names) or f"; the model's linear layers are {', '.join(names)}"
        raise UserError(f"lora.target_modules: {target!r} matches no module{hint}")
    return paths


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Iterate over the adapters, as (path of the wrapped layer in the base model, adapter)."""
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield path, module


def init_adapters(
    model: nn.Module,
    seed: int,
    device: torch.device | None = None,
    layout: Layout = REPLICATED,
) -> None:
    """Give all adapters their initial values, with which the model computes what its base does.

    A is uniform in +-1/sqrt(in), which is nn.Linear's Kaiming initialization and PEFT's; B is 0.

    Args:
        model: the model with adapters.
        seed: the values depend on it alone.
        device: where to put them; default: where the adapters are, which must not be "meta".
        layout: how parameters are distributed over processes.
    """
    generator = torch.Generator().manual_seed(seed)
    for _, layer in lora_layers(model):
        target = device or layer.lora_A.device

        # every process draws all rows, so that the values do not depend on the layout
        bound = 1 / math.sqrt(layer.base_layer.in_features)
        A = torch.empty(layer.lora_A.shape).uniform_(-bound, bound, generator=generator)
        local_A = A[layout.local_rows(layer.lora_A)]
        layout.materialize(layer, "lora_A", local_A.to(target))

        B = torch.zeros(layer.lora_B.shape)
        local_B = B[layout.local_rows(layer.lora_B)]
        layout.materialize(layer, "lora_B", local_B.to(target))


def merged_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Compute W + scaling * B A in fp32, for the caller to round once.

    `merge_adapters` rounds it in memory, merge.py in `checkpoint.tensor_files.write_safetensors`.

    Args:
        weight: W [out, in].
        lora_A: A [R, in].
        lora_B: B [out, R].
        scaling: see `lora_scaling`.

    Returns:
        A new fp32 tensor [out, in].
    """
    merged = weight.to(torch.float32, copy=True)
    return merged.addmm_(lora_B.float(), lora_A.float(), alpha=scaling)


def merge_adapters(model: nn.Module) -> None:
    """Add every adapter to the weight that it wraps, and remove it.

    Decoding is then as fast as with the base alone. The sum is computed in fp32 and rounded once to
    the weight's dtype, as merge.py does. Adapters over quantized weights stay.
    """
    for path, layer in list(lora_layers(model)):
        weight = layer.base_layer.weight
        if not weight.is_floating_point():  # quantized
            continue
        merged = merged_weight(weight.data, layer.lora_A.data, layer.lora_B.data, layer.scaling)
        weight.data = merged.to(weight.dtype)
        model.set_submodule(path, layer.base_layer)
