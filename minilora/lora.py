"""LoRA (Hu et al., arXiv 2106.09685): y = W x + scaling * B A x, with W frozen and A [R, in], B [out, R] trained.

An adapter wraps a linear layer that already exists; there is no second architecture. Adapters are fp32 masters whatever
the base's dtype; the product is computed in the dtype of the activations. Names and defaults are PEFT's.

Shapes: T tokens, R rank.
"""

import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.config import LoraConfig, UserError, nearest
from minilora.dist import WHOLE, Whole

PEFT_PREFIX = "base_model.model."  # what PEFT puts before a module's path in adapter_model.safetensors

# adapter_config.json fields of PEFT whose effect is not built here: refused unless empty, false or absent
UNSUPPORTED = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern",
    "layers_to_transform", "layer_replication", "trainable_token_indices", "target_parameters", "exclude_modules",
    "alora_invocation_tokens", "megatron_config", "kasa_config", "arrow_config", "monteclora_config",
)  # fmt: skip


EMBEDDINGS = ("embed_tokens", "lm_head")  # what lora.train_embeddings trains whole; a tied model has the first alone
EMBEDDING, HEAD = f"{PEFT_PREFIX}model.embed_tokens.weight", f"{PEFT_PREFIX}lm_head.weight"


class LoRALinear(nn.Module):
    """A frozen linear layer of any kind with a low-rank update beside it."""

    def __init__(self, base_layer: nn.Linear, rank: int, scaling: float, dropout: float):
        super().__init__()
        self.base_layer = base_layer
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)
        self.train(base_layer.training)
        device = base_layer.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base_layer.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.empty(base_layer.out_features, rank, dtype=torch.float32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(self.dropout(x), self.lora_A.to(x.dtype))  # [T, in] -> [T, R]
        # added in place: the base's output is needed by nobody else, and a copy of it is the layer's largest tensor
        return self.base_layer(x).addmm_(h, self.lora_B.to(x.dtype).t(), alpha=self.scaling)  # [T, out]


def scaling_of(lora: LoraConfig) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732)."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)


def inject(model: nn.Module, lora: LoraConfig) -> None:
    """Freeze `model` and wrap every linear layer that `lora.target_modules` names.

    A target matches a module whose path is the target or ends with ".target" (PEFT's rule). The new parameters are not
    initialised: see `init_adapters`. Raises UserError if a target matches nothing or something that is not a linear layer.
    """
    model.requires_grad_(False)
    modules = dict(model.named_modules())
    for target in lora.target_modules:
        paths = [path for path in modules if path == target or path.endswith("." + target)]
        if not paths:
            known = sorted({path.split(".")[-1] for path, m in modules.items() if isinstance(m, nn.Linear)})
            hint = nearest(target, known) or f"; the model's linear layers are {', '.join(known)}"
            raise UserError(f"lora.target_modules: {target!r} matches no module{hint}")
        for path in paths:
            parent, _, name = path.rpartition(".")
            base = model.get_submodule(path)
            if isinstance(base, LoRALinear):
                continue  # named by two targets, e.g. q_proj and self_attn.q_proj
            if not isinstance(base, nn.Linear) or path == "lm_head":
                raise UserError(f"lora.target_modules: {path!r} cannot take an adapter: only linear layers of the blocks can")
            wrapped = LoRALinear(base, lora.rank, scaling_of(lora), lora.dropout)
            setattr(model.get_submodule(parent), name, wrapped)
    if lora.train_embeddings:
        for path, p in model.named_parameters():
            p.requires_grad_(p.requires_grad or path.split(".")[-2] in EMBEDDINGS)


def saved_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """What an adapter consists of, under PEFT's names: `base_model.model.<path>.lora_A.weight` [R, in] and `.lora_B.weight`
    [out, R], and embedding and head [V, D] where they are trained."""
    names = {}
    for path, p in model.named_parameters():
        if ".lora_" in path:
            names[f"{PEFT_PREFIX}{path}.weight"] = p
        elif p.requires_grad:
            names[PEFT_PREFIX + path] = p
    return names


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """(path in the Hugging Face model, layer) of every adapter."""
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield path, module


def init_adapters(model: nn.Module, seed: int, device: torch.device | None = None, place: Whole = WHOLE) -> None:
    """A uniform in +-1/sqrt(in) (nn.Linear's Kaiming form, as PEFT), B zero: the model starts out as its base."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in lora_layers(model):
        bound = 1 / math.sqrt(layer.base_layer.in_features)
        A = torch.empty(layer.lora_A.shape).uniform_(-bound, bound, generator=generator)
        where = device or layer.lora_A.device
        place.put(layer, "lora_A", A[place.rows(layer.lora_A)].to(where))
        place.put(layer, "lora_B", torch.zeros(layer.lora_B.shape)[place.rows(layer.lora_B)].to(where))


def adapter_state(model: nn.Module, place: Whole = WHOLE) -> dict[str, Tensor]:
    """The adapter's values (see `saved_names`), whole; all processes must ask."""
    return {name: place.gather(place.local(p.detach()), p) for name, p in saved_names(model).items()}


def without_copy(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """A tied model's adapter without the second copy of its matrix. Raises UserError if the two have parted."""
    if HEAD in tensors and not (EMBEDDING in tensors and torch.equal(tensors[HEAD], tensors[EMBEDDING])):
        raise UserError(f"{where}: lm_head is not embed_tokens, which the base ties: train it with PEFT's ensure_weight_tying")
    return {name: tensor for name, tensor in tensors.items() if name != HEAD}


def load_adapter_state(model: nn.Module, tensors: dict[str, Tensor], where: str, place: Whole = WHOLE) -> None:
    """Fill the adapters from tensors under PEFT's names; every name must match, in both directions. Raises UserError."""
    own = {name: p.detach() for name, p in saved_names(model).items()}
    if EMBEDDING in own and HEAD not in own:
        tensors = without_copy(tensors, where)
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        kind, name = ("lacks", missing[0]) if missing else ("has the unknown", extra[0])
        raise UserError(f"{where}: {kind} {name} ({len(missing)} missing, {len(extra)} unexpected): not this model's adapter")
    for name, target in own.items():
        if target.shape != tensors[name].shape:
            raise UserError(f"{where}: {name} has shape {list(tensors[name].shape)}, the model needs {list(target.shape)}")
        place.local(target).copy_(tensors[name][place.rows(target)])


def fold(model: nn.Module) -> None:
    """Add every adapter to the 16- or 32-bit weight under it, in fp32, rounded once, and take it away: decoding then costs
    what the base costs. Equals merge.py's weights. Adapters over quantised weights stay."""
    for path, layer in list(lora_layers(model)):
        weight = layer.base_layer.weight
        if not weight.is_floating_point():
            continue
        weight.data = merged_weight(weight.data, layer.lora_A.data, layer.lora_B.data, layer.scaling).to(weight.dtype)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer.base_layer)


def to_peft_config(lora: LoraConfig, base_name: str, revision: str | None, names: Iterable[str] = ()) -> dict:
    """adapter_config.json as PEFT writes it, for an adapter of tensors with these names."""
    whole = [module for module in EMBEDDINGS if any(name.endswith(f"{module}.weight") for name in names)]
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "revision": revision,
        "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "use_rslora": lora.rslora,
        "target_modules": list(lora.target_modules), "bias": "none", "fan_in_fan_out": False, "use_dora": False,
        "init_lora_weights": True, "inference_mode": True, "modules_to_save": whole or None,
        "ensure_weight_tying": whole == ["embed_tokens"], "rank_pattern": {}, "alpha_pattern": {},
        "layers_to_transform": None, "layers_pattern": None,
    }  # fmt: skip


def from_peft_config(raw: dict, names: list[str], where: str) -> LoraConfig:
    """A PEFT adapter's settings. Where `target_modules` is a pattern, the targets are read off the tensor names.

    Raises UserError for a PEFT feature whose arithmetic is not here.
    """
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type {raw.get('peft_type')!r} is not supported, only LORA")
    for key in ("bias", *UNSUPPORTED):
        if raw.get(key) and raw[key] != "none":
            raise UserError(f"{where}: {key} = {raw[key]!r} is not supported")
    if unknown := [name for name in raw.get("modules_to_save") or () if name.split(".")[-1] not in EMBEDDINGS]:
        raise UserError(f"{where}: modules_to_save: {unknown[0]!r} is not supported, only {' and '.join(EMBEDDINGS)}")
    init = raw.get("init_lora_weights", True)
    if isinstance(init, str) and init not in ("gaussian", "eva", "orthogonal"):  # the others change the base weights too
        raise UserError(f"{where}: init_lora_weights = {init!r} changes the base weights and is not supported")
    if missing := [key for key in ("r", "lora_alpha") if not isinstance(raw.get(key), int | float)]:
        raise UserError(f"{where}: {missing[0]} is missing or not a number")
    paths = {name.removeprefix(PEFT_PREFIX).rsplit(".lora_", 1)[0] for name in names if ".lora_" in name}
    listed = raw.get("target_modules")
    targets = sorted(listed if isinstance(listed, list) else paths)  # PEFT allows listed names that match nothing
    used = tuple(t for t in targets if any(p == t or p.endswith("." + t) for p in paths))
    return LoraConfig(
        rank=raw["r"], alpha=raw["lora_alpha"], dropout=raw.get("lora_dropout", 0.0), target_modules=used,
        rslora=raw.get("use_rslora", False), train_embeddings=bool(raw.get("modules_to_save")),
    )  # fmt: skip


def merged_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """W + scaling * B A in fp32 [out, in]; the caller casts once."""
    return weight.to(torch.float32, copy=True).addmm_(lora_B.float(), lora_A.float(), alpha=scaling)
