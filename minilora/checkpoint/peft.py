"""Adapters in PEFT's files: adapter_model.safetensors and adapter_config.json, read and written.

PEFT names the tensors of an adapter after the module that it changes:
`base_model.model.<path>.lora_A.weight` [R, in] and `.lora_B.weight` [out, R]. With
lora.train_embeddings an adapter also has the whole embedding and head [V, D]. A model that ties
the two has one such matrix, which PEFT stores under both names.

Shapes: R rank, V vocabulary, D hidden size.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from minilora.checkpoint.hf import VOCABULARY_MATRICES
from minilora.checkpoint.tensor_files import open_safetensors
from minilora.config import LoraConfig, ModelConfig
from minilora.distributed import REPLICATED, Layout
from minilora.errors import UserError
from minilora.files import read_json
from minilora.model.lora import EMBEDDING_MODULES

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
EMBEDDING = f"{PEFT_PREFIX}model.embed_tokens.weight"
HEAD = f"{PEFT_PREFIX}lm_head.weight"

UNSUPPORTED_FIELDS = (
    "bias",
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "exclude_modules",
    "alora_invocation_tokens",
    "megatron_config",
    "kasa_config",
    "arrow_config",
    "monteclora_config",
)
"""Fields of adapter_config.json that must be empty, false or absent: they are not implemented."""

PLAIN_INITIALIZATIONS = ("gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base weights as they are; other names change them."""

SECOND_COPIES = (".original_module.", ".modules_to_save.")
"""Parts of the names under which PEFT stores second copies of an embedding or head."""


class Adapter(NamedTuple):
    """A PEFT adapter as read from its directory."""

    lora: LoraConfig
    tensors: dict[str, Tensor]
    """By PEFT's names."""
    raw: dict
    """adapter_config.json."""
    directory: Path


def adapter_vocab_size(adapter: Adapter) -> int:
    """Return the vocabulary of the embedding that comes with an adapter, or 0 without one."""
    sizes = [len(t) for name, t in adapter.tensors.items() if name.endswith(VOCABULARY_MATRICES)]
    return max(sizes, default=0)


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that make up the model's adapter, by PEFT's names.

    These are all LoRA matrices, and of the other parameters the ones that are trained.
    """
    parameters = {}
    for path, p in model.named_parameters():
        if ".lora_" in path:
            # lora_A and lora_B are parameters here, and linear layers with a weight in PEFT
            parameters[f"{PEFT_PREFIX}{path}.weight"] = p
        elif p.requires_grad:
            parameters[PEFT_PREFIX + path] = p
    return parameters


def adapter_state(model: nn.Module, layout: Layout = REPLICATED) -> dict[str, Tensor]:
    """Return the adapter's values by PEFT's names, gathered from all processes.

    All processes must call this together.
    """
    parameters = adapter_parameters(model)
    return {
        name: layout.full_tensor(layout.to_local(p.detach()), p) for name, p in parameters.items()
    }


def load_adapter_state(
    model: nn.Module, tensors: dict[str, Tensor], where: str, layout: Layout = REPLICATED
) -> None:
    """Fill the model's adapters; each process copies the rows that it holds.

    Args:
        model: has adapters with the settings of the ones that `tensors` comes from.
        tensors: the values by PEFT's names.
        where: where they come from, for messages.
        layout: which rows of the parameters this process holds.

    Raises:
        UserError: a tensor is missing, unexpected, or has another shape.
    """
    targets = {name: p.detach() for name, p in adapter_parameters(model).items()}
    if EMBEDDING in targets and HEAD not in targets:
        check_tied_head(tensors, where)
        tensors = {name: tensor for name, tensor in tensors.items() if name != HEAD}

    missing = sorted(targets.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - targets.keys())
    if missing or unexpected:
        problem = f"lacks {missing[0]}" if missing else f"has the unknown {unexpected[0]}"
        counts = f"{len(missing)} missing, {len(unexpected)} unexpected"
        raise UserError(f"{where}: {problem} ({counts}): not an adapter of this model")

    for name, target in targets.items():
        if target.shape != tensors[name].shape:
            found, needed = list(tensors[name].shape), list(target.shape)
            raise UserError(f"{where}: {name} has shape {found}, the model needs {needed}")

    for name, target in targets.items():
        layout.to_local(target).copy_(tensors[name][layout.local_rows(target)])


def check_tied_head(tensors: dict[str, Tensor], where: str) -> None:
    """Check that an adapter has no head of its own, as a model that ties it to the embedding needs.

    Args:
        tensors: the adapter's, by PEFT's names. They may have the matrix twice, under both names.
        where: where they come from, for messages.

    Raises:
        UserError: the two copies differ, so no tied model can have both.
    """
    if HEAD not in tensors:
        return
    if EMBEDDING not in tensors or not torch.equal(tensors[HEAD], tensors[EMBEDDING]):
        raise UserError(
            f"{where}: lm_head differs from embed_tokens, but the base model ties them: "
            "train the adapter with PEFT's ensure_weight_tying"
        )


def read_adapter(directory: Path) -> Adapter:
    """Read an adapter and check that it is complete and of a kind that is supported.

    Raises:
        UserError: it is not.
    """
    raw = read_json(directory / CONFIG_FILE)
    path = directory / TENSOR_FILE
    if not path.is_file():
        hint = "adapters saved as .bin are pickles, which are never loaded"
        raise UserError(f"{path} does not exist ({hint})")
    with open_safetensors(path) as file:
        names = [name for name in file.keys() if not any(part in name for part in SECOND_COPIES)]
        tensors = {name: file.get_tensor(name) for name in names}

    trained_matrices = tensors.keys() & {EMBEDDING, HEAD}
    is_tied = bool(raw.get("ensure_weight_tying"))
    if len(trained_matrices) == 1 and not is_tied:
        only = trained_matrices.pop()
        needed = "embed_tokens.weight and lm_head.weight are supported only together"
        raise UserError(f"{path}: has {only} alone: {needed}")
    for name, tensor in tensors.items():
        if ".lora_A." in name and name.replace(".lora_A.", ".lora_B.") not in tensors:
            raise UserError(f"{path}: {name} has no lora_B beside it")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} is not finite")

    lora = from_peft_config(raw, list(tensors), str(directory / CONFIG_FILE))
    return Adapter(lora, tensors, raw, directory)


def save_adapter(
    directory: Path, state: dict[str, Tensor], lora: LoraConfig, base: ModelConfig
) -> None:
    """Write an adapter in PEFT's layout.

    Args:
        directory: where the two files go.
        state: see `adapter_state`.
        lora: the adapter's settings.
        base: the model that it was trained over.
    """
    name, revision = base.name, base.revision
    if Path(name).expanduser().is_dir():
        # the absolute path is found again from any working directory
        name = str(Path(name).expanduser().resolve())
    elif "@" in name:
        name, _, at_revision = name.partition("@")
        revision = revision or at_revision
    config = json.dumps(to_peft_config(lora, name, revision, state), indent=2)
    (directory / CONFIG_FILE).write_text(config, encoding="utf-8")

    state = {name: tensor.contiguous().cpu() for name, tensor in state.items()}
    if EMBEDDING in state and HEAD not in state:  # tied: PEFT wants the matrix under both names
        state[HEAD] = state[EMBEDDING].clone()
    safetensors.torch.save_file(state, str(directory / TENSOR_FILE), metadata={"format": "pt"})


def base_model_name(raw: dict, where: str) -> tuple[str, str | None]:
    """Return (name, revision) of the base model that an adapter_config.json names.

    The revision of a base that is a local directory is None, whatever the file says: a directory
    has no revisions, and files of other programs name one all the same.

    Raises:
        UserError: it names none.
    """
    name = raw.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}/{CONFIG_FILE}: base_model_name_or_path names no base model")
    if Path(name).expanduser().is_dir():
        return name, None
    return name, raw.get("revision")


def to_peft_config(
    lora: LoraConfig, base_name: str, revision: str | None, names: Iterable[str] = ()
) -> dict:
    """Return adapter_config.json as PEFT writes it.

    Args:
        lora: the adapter's settings.
        base_name: the base model.
        revision: the base model's revision on the hub.
        names: the names of the adapter's tensors.
    """
    names = list(names)
    saved_modules = [
        module
        for module in EMBEDDING_MODULES
        if any(name.endswith(f"{module}.weight") for name in names)
    ]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "target_modules": list(lora.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": saved_modules or None,
        "ensure_weight_tying": saved_modules == ["embed_tokens"],
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def from_peft_config(raw: dict, names: list[str], where: str) -> LoraConfig:
    """Return the settings of a PEFT adapter.

    PEFT's target_modules may be a pattern, or list modules that the model does not have; the
    targets returned are those that the adapter has tensors for.

    Args:
        raw: adapter_config.json.
        names: the names of the adapter's tensors.
        where: that file's path, for messages.

    Raises:
        UserError: a setting is missing, or its effect is not supported.
    """
    _check_supported(raw, where)
    for field in ("r", "lora_alpha"):
        if not isinstance(raw.get(field), int | float):
            raise UserError(f"{where}: {field} is missing or not a number")

    adapted = set()  # paths of the modules with an adapter
    for name in names:
        path, is_lora, _ = name.removeprefix(PEFT_PREFIX).rpartition(".lora_")
        if is_lora:
            adapted.add(path)
    listed = raw.get("target_modules")
    candidates = sorted(listed if isinstance(listed, list) else adapted)
    targets = [
        target
        for target in candidates
        if any(path == target or path.endswith("." + target) for path in adapted)
    ]
    return LoraConfig(
        rank=raw["r"],
        alpha=raw["lora_alpha"],
        dropout=raw.get("lora_dropout", 0.0),
        target_modules=tuple(targets),
        rslora=raw.get("use_rslora", False),
        train_embeddings=bool(raw.get("modules_to_save")),
    )


def _check_supported(raw: dict, where: str) -> None:
    """Raise UserError if an adapter_config.json asks for arithmetic that is not implemented."""
    if raw.get("peft_type") != "LORA":
        peft_type = raw.get("peft_type")
        raise UserError(f"{where}: peft_type {peft_type!r} is not supported, only LORA")
    for field in UNSUPPORTED_FIELDS:
        value = raw.get(field)
        if value and value != "none":
            raise UserError(f"{where}: {field} = {value!r} is not supported")
    for module in raw.get("modules_to_save") or ():
        if module.split(".")[-1] not in EMBEDDING_MODULES:
            supported = " and ".join(EMBEDDING_MODULES)
            message = f"modules_to_save: {module!r} is not supported, only {supported}"
            raise UserError(f"{where}: {message}")
    init = raw.get("init_lora_weights", True)
    if isinstance(init, str) and init not in PLAIN_INITIALIZATIONS:
        message = f"init_lora_weights = {init!r} changes the base weights and is not supported"
        raise UserError(f"{where}: {message}")
