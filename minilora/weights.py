"""Hugging Face directories: where a model's files are, its config.json, and its safetensors (running/saving.py writes them).

Weights stream in tensor by tensor, so memory holds the model plus one tensor. Only safetensors are read: nothing is
unpickled, and no repository's code is run.
"""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import huggingface_hub
import safetensors
import torch
from torch import Tensor, nn

from minilora.config import UserError
from minilora.dist import WHOLE, Whole

if TYPE_CHECKING:  # bitsandbytes is imported by runs that quantise, and by no others
    from minilora.quant import QuantizedLinear

TIMEOUT = 60.0  # seconds without a byte from or to the hub after which a request has failed
HUB_FILES = ["*.json", "model*.safetensors", "adapter_model.safetensors", "tokenizer.model", "*.jinja"]
DTYPE_CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
ROWS_PER_TOKEN = ("embed_tokens.weight", "lm_head.weight")
HARMLESS_KEYS = ("rotary_emb.inv_freq",)  # buffers of old checkpoints, computed here


def resolve(name: str, revision: str | None = None) -> Path:
    """The directory of a model: `name` itself, or the hub's cached snapshot of `owner/name[@revision]`. Raises UserError."""
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    repository, _, at = name.partition("@")
    if path.is_absolute() or name.startswith((".", "~")) or repository.count("/") != 1:
        raise UserError(f"model {name!r}: no such directory, and not a hub id (owner/name)")
    return fetch(repository, revision or at or None, HUB_FILES, f"model {name!r} is no directory")


def fetch(repository: str, revision: str | None, patterns: list[str], what: str, kind: str = "model") -> Path:
    """The hub's snapshot of the files that match, through its cache. Raises UserError, which `what` begins."""
    limit_waiting()
    try:
        found = huggingface_hub.snapshot_download(repository, repo_type=kind, revision=revision, allow_patterns=patterns)
    except Exception as error:  # the client's many exceptions all mean: cannot be had
        first: BaseException = error  # the outermost may only say that a connection could be missing
        while first.__cause__ is not None:
            first = first.__cause__
        reason = (str(first).splitlines() or [type(first).__name__])[0]
        raise UserError(f"{what}, and {repository} could not be fetched from the hub: {reason}") from error
    return Path(found)


def limit_waiting() -> None:
    """Give every request of the hub's client a time limit: some have none."""
    client = huggingface_hub.get_session()
    if _limit not in client.event_hooks["request"]:
        hooks = {**client.event_hooks, "request": [*client.event_hooks["request"], _limit]}
        huggingface_hub.set_client_factory(lambda: type(client)(event_hooks=hooks, follow_redirects=True, timeout=None))


def _limit(request) -> None:
    given = request.extensions.get("timeout") or {}
    request.extensions["timeout"] = {key: given.get(key) or TIMEOUT for key in ("connect", "read", "write", "pool")}


def read_json(path: Path) -> dict:
    """A JSON object. Raises UserError naming the file."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    return raw


def weight_map(directory: Path) -> dict[str, Path]:
    """{tensor name: file} of a model in one file or in shards. Raises UserError if a file is missing."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if index.is_file() and not single.is_file():  # of both, transformers takes the single file
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict):
            raise UserError(f"{index}: has no weight_map")
        files = {name: directory / file for name, file in names.items()}
        for missing in {file for file in files.values() if not file.is_file()}:
            raise UserError(f"{missing} is missing, though {index.name} names it: the download is incomplete")
        return files
    if not single.is_file():
        pickled = [p.name for p in [*directory.glob("*.bin"), *directory.glob("*.pt*")]]
        hint = f"; {pickled[0]} is a pickle, which is never loaded: save it as safetensors first" if pickled else ""
        raise UserError(f"{directory} has no model.safetensors{hint}")
    with open_safetensors(single) as file:
        return dict.fromkeys(file.keys(), single)


def open_safetensors(path: Path):
    """safetensors.safe_open for torch, with a readable error for a torn or foreign file."""
    try:
        return safetensors.safe_open(str(path), "pt")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from error


def read_tensor(path: Path, name: str, rows: slice = slice(None)) -> Tensor:
    """One tensor, or rows of it. The file is closed at once, so that its pages do not count as our memory any longer."""
    with open_safetensors(path) as file:
        try:
            return file.get_tensor(name) if rows == slice(None) else file.get_slice(name)[rows]
        except safetensors.SafetensorError as error:
            raise UserError(f"{path}: {error} (or another split's index)") from error


def read_named(files: dict[str, Path], path: str, name: str, rows: slice) -> Tensor:
    """Rows of the tensor `path.name` of a checkpoint."""
    return read_tensor(files[f"{path}.{name}"], f"{path}.{name}", rows)


def checkpoint_name(parameter: str) -> str:
    """The checkpoint key of a parameter: the adapter's wrapper has no place in it."""
    return parameter.replace(".base_layer.", ".")


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(path in the module tree, parameter) of everything a base checkpoint holds, adapters left out."""
    return ((path, p) for path, p in model.named_parameters() if ".lora_" not in path)


def assign(model: nn.Module, path: str, rows: Tensor, place: Whole) -> None:
    """Give the (meta) parameter at `path` its values."""
    parent, _, name = path.rpartition(".")
    place.put(model.get_submodule(parent), name, rows)


def read_grown(file: Path, name: str, rows: slice, total: int) -> Tensor:
    """Rows of a matrix that has grown to `total` rows: new ones are the mean of those in the file."""
    whole, (start, stop, _) = read_tensor(file, name), rows.indices(total)
    there = whole[start:stop]
    new = whole.float().mean(0, keepdim=True).to(whole.dtype).expand(stop - start - len(there), -1)
    return torch.cat([there, new])


def load_weights(
    model: nn.Module, directory: Path, device: torch.device, dtype: torch.dtype,
    quantized: "Mapping[str, QuantizedLinear]" = MappingProxyType({}), place: Whole = WHOLE, new_tokens: int = 0,
) -> None:  # fmt: skip
    """Fill a model built on the meta device, in its dtypes, from a checkpoint, tensor by tensor; each process reads its rows.

    quantized: the layers (path in the checkpoint -> layer) that fill themselves, from `dtype`, as their tensors are read;
    new_tokens: rows that embedding and head have in addition. Every parameter must be there with its shape, and every tensor
    must be wanted. Raises UserError otherwise.
    """
    files = weight_map(directory)
    wanted = {checkpoint_name(path): (path, p.shape) for path, p in base_parameters(model)}
    own = {f"{path}.{name}" for path, layer in quantized.items() for name in layer.holds}
    wanted = {name: target for name, target in wanted.items() if name not in own}
    shapes = {name: tuple(shape) for name, (_, shape) in wanted.items()}
    shapes |= {f"{path}.weight": (q.out_features, q.in_features) for path, q in quantized.items() if not q.is_stored}
    needed = wanted.keys() | {f"{path}.{name}" for path, layer in quantized.items() for name in layer.names}
    optional = () if "lm_head.weight" in wanted else ("lm_head.weight",)  # a tied model's second copy
    missing = sorted(needed - files.keys())
    extra = sorted(n for n in files.keys() - needed if n not in optional and not n.endswith(HARMLESS_KEYS))
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]}, for which config.json's architecture has no place"
        raise UserError(f"{directory}: the checkpoint {what} ({len(missing)} missing, {len(extra)} unexpected)")
    for file in sorted(set(files.values())):
        with open_safetensors(file) as opened:
            for name in sorted(shapes.keys() & opened.keys()):
                entry, shape = opened.get_slice(name), list(shapes[name])
                shape[0] -= new_tokens * name.endswith(ROWS_PER_TOKEN)
                if entry.get_shape() != shape:
                    raise UserError(f"{file}: {name} has shape {entry.get_shape()}, config.json says {shape}")
                if entry.get_dtype() not in ("F64", *DTYPE_CODES.values()):
                    raise UserError(f"{file}: {name} holds {entry.get_dtype()}: neither 16-bit weights nor bitsandbytes' form")
    for name, (path, _) in wanted.items():
        p = model.get_parameter(path)
        if new_tokens and name.endswith(ROWS_PER_TOKEN):
            rows = read_grown(files[name], name, place.rows(p), p.shape[0])
        else:
            rows = read_tensor(files[name], name, place.rows(p))
        assign(model, path, rows.to(device, p.dtype, copy=True), place)
    for path, layer in quantized.items():
        layer.fill(partial(read_named, files, path), device, dtype, place)


def draw_weights(model: nn.Module, device: torch.device, dtype: torch.dtype, std: float, seed: int, place: Whole = WHOLE) -> None:
    """Fresh weights for a model on the meta device: matrices normal with `std`, norms one, biases zero."""
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in list(base_parameters(model)):
        tensor = torch.empty(parameter.shape)
        if parameter.ndim > 1:
            tensor.normal_(0.0, std, generator=generator)
        else:
            tensor.fill_(1.0 if "norm" in path else 0.0)
        assign(model, path, tensor[place.rows(parameter)].to(device, dtype), place)
