"""Fill a model with the weights of a directory in Hugging Face layout, or draw new ones.

The names of the tensors in such a directory are the names of the model's parameters. Weights are
read tensor by tensor, so memory holds the model plus one tensor. As a rule each process reads only
the rows that it holds; layers that are quantized in the files, and matrices that get new rows, are
read whole. `hf_writer` writes such directories.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from minilora.checkpoint.tensor_files import DTYPE_OF_CODE, open_safetensors, read_tensor
from minilora.distributed import REPLICATED, Layout
from minilora.errors import UserError
from minilora.files import read_json
from minilora.model.quantized_linear import QuantizedLinear

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
VOCABULARY_MATRICES = ("embed_tokens.weight", "lm_head.weight")
"""Endings of the names of the matrices that have one row per token of the vocabulary."""
IGNORED_TENSORS = ("rotary_emb.inv_freq",)
"""Endings of the names of buffers in old checkpoints that are computed here."""
NO_LAYERS: Mapping[str, QuantizedLinear] = MappingProxyType({})
"""An empty mapping as a default: nothing is quantized."""


def weight_map(directory: Path) -> dict[str, Path]:
    """Return {tensor name: file} of a model in one file or in shards with an index.

    Of a directory with both, the single file is read, as transformers does.

    Raises:
        UserError: a file is missing or not readable.
    """
    single = directory / WEIGHTS_FILE
    index = directory / INDEX_FILE
    if index.is_file() and not single.is_file():
        return _map_of_index(index)
    if not single.is_file():
        pickles = [file.name for file in [*directory.glob("*.bin"), *directory.glob("*.pt*")]]
        hint = ""
        if pickles:
            hint = f"; {pickles[0]} is a pickle, which is never loaded: convert it to safetensors"
        raise UserError(f"{directory} has no {WEIGHTS_FILE}{hint}")
    with open_safetensors(single) as file:
        return dict.fromkeys(file.keys(), single)


def _map_of_index(index: Path) -> dict[str, Path]:
    """Return {tensor name: file} of a model's shards. Raises UserError."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise UserError(f"{index}: has no weight_map")
    files = {name: index.parent / file for name, file in names.items()}
    for file in set(files.values()):
        if not file.is_file():
            message = f"{file} is missing, but {index.name} names it: the download is incomplete"
            raise UserError(message)
    return files


def checkpoint_bits(raw: dict, where: str) -> int:
    """Return how many bits a checkpoint's linear layers have: 16, or 8 or 4 of bitsandbytes.

    Args:
        raw: its config.json.
        where: that file's path, for messages.

    Raises:
        UserError: a form of quantization that is not supported.
    """
    quantization = raw.get("quantization_config") or {}
    if quantization.get("load_in_8bit"):
        threshold = quantization.get("llm_int8_threshold", 6.0)
        if threshold != 6.0:
            field = f"quantization_config.llm_int8_threshold = {threshold!r}"
            raise UserError(f"{where}: {field} is not supported, only 6.0")
        return 8
    if quantization.get("load_in_4bit"):
        kind = quantization.get("bnb_4bit_quant_type", "fp4")
        if kind != "nf4":
            field = f"quantization_config.bnb_4bit_quant_type = {kind!r}"
            raise UserError(f"{where}: {field} is not supported, only 'nf4'")
        return 4
    return 16


def name_in_file(parameter: str) -> str:
    """Return the name that a parameter of the base has in files: without an adapter's wrapper."""
    return parameter.replace(".base_layer.", ".")


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (path in the module tree, parameter) of all that is not an adapter's."""
    for path, parameter in model.named_parameters():
        if ".lora_" not in path:
            yield path, parameter


def materialize_parameter(model: nn.Module, path: str, rows: Tensor, layout: Layout) -> None:
    """Give the parameter at `path`, so far on the meta device, this process's rows."""
    parent, _, name = path.rpartition(".")
    layout.materialize(model.get_submodule(parent), name, rows)


def load_quantized_layer(
    layer: QuantizedLinear,
    files: dict[str, Path],
    device: torch.device,
    dtype: torch.dtype,
    layout: Layout,
) -> None:
    """Give a quantized layer its weight from files; see `QuantizedLinear.load`.

    Args:
        layer: has no values yet.
        files: the files by the names of the tensors in them, see `weight_map`.
        device: where the weight goes.
        dtype: what a 16-bit weight is rounded to before it is quantized.
        layout: which rows this process holds.
    """

    def read(name: str, rows: slice) -> Tensor:
        full_name = f"{layer.path}.{name}"
        return read_tensor(files[full_name], full_name, rows)

    layer.load(read, device, dtype, layout)


def load_weights(
    model: nn.Module,
    directory: Path,
    device: torch.device,
    dtype: torch.dtype,
    quantized: Mapping[str, QuantizedLinear] = NO_LAYERS,
    layout: Layout = REPLICATED,
    new_tokens: int = 0,
) -> None:
    """Fill a model on the meta device from a checkpoint; each parameter keeps its dtype.

    Args:
        model: built on the meta device; parameters of adapters are left as they are.
        directory: has the safetensors files.
        device: where the weights go.
        dtype: what 16-bit weights are rounded to before they are quantized.
        quantized: the model's quantized layers by their path in the checkpoint.
        layout: which rows of the parameters this process holds.
        new_tokens: rows that embedding and head have in addition to the checkpoint's.

    Raises:
        UserError: a tensor is missing, unexpected, or has another shape or dtype than it should.
    """
    files = weight_map(directory)
    path_of_name = _plain_parameters(model, quantized)
    _check_names(directory, files, path_of_name, quantized)
    _check_entries(files, _stored_shapes(model, path_of_name, quantized, new_tokens))

    for name, path in path_of_name.items():
        parameter = model.get_parameter(path)
        rows = layout.local_rows(parameter)
        if new_tokens and name.endswith(VOCABULARY_MATRICES):
            tensor = _read_with_new_rows(files[name], name, rows, parameter.shape[0])
        else:
            tensor = read_tensor(files[name], name, rows)
        tensor = tensor.to(device, parameter.dtype, copy=True)
        materialize_parameter(model, path, tensor, layout)

    for layer in quantized.values():
        load_quantized_layer(layer, files, device, dtype, layout)


def _plain_parameters(model: nn.Module, quantized: Mapping[str, QuantizedLinear]) -> dict[str, str]:
    """Return {name in the files: path in the module tree} of what is not quantized."""
    quantized_names: set[str] = set()
    for layer in quantized.values():
        quantized_names.update(f"{layer.path}.{name}" for name in layer.parameter_names)

    path_of_name = {name_in_file(path): path for path, _ in base_parameters(model)}
    return {name: path for name, path in path_of_name.items() if name not in quantized_names}


def _check_names(
    directory: Path,
    files: dict[str, Path],
    path_of_name: dict[str, str],
    quantized: Mapping[str, QuantizedLinear],
) -> None:
    """Raise UserError unless the checkpoint has exactly the tensors that the model needs."""
    needed = set(path_of_name)
    for layer in quantized.values():
        needed.update(f"{layer.path}.{name}" for name in layer.tensor_names)

    ignored = {name for name in files if name.endswith(IGNORED_TENSORS)}
    if "lm_head.weight" not in path_of_name:
        ignored.add("lm_head.weight")  # a tied model's second copy of the embedding
    missing = sorted(needed - files.keys())
    unexpected = sorted(files.keys() - needed - ignored)

    counts = f"({len(missing)} missing, {len(unexpected)} unexpected)"
    if missing:
        raise UserError(f"{directory}: the checkpoint lacks {missing[0]} {counts}")
    if unexpected:
        message = f"has {unexpected[0]}, which is not part of the architecture in config.json"
        raise UserError(f"{directory}: the checkpoint {message} {counts}")


def _stored_shapes(
    model: nn.Module,
    path_of_name: dict[str, str],
    quantized: Mapping[str, QuantizedLinear],
    new_tokens: int,
) -> dict[str, list[int]]:
    """Return the shapes that 16- and 32-bit tensors must have in the checkpoint, by name."""
    shapes: dict[str, list[int]] = {}
    for name, path in path_of_name.items():
        shapes[name] = list(model.get_parameter(path).shape)
        if name.endswith(VOCABULARY_MATRICES):
            shapes[name][0] -= new_tokens
    for path, layer in quantized.items():
        if not layer.is_prequantized:
            shapes[f"{path}.weight"] = [layer.out_features, layer.in_features]
    return shapes


def _check_entries(files: dict[str, Path], shapes: dict[str, list[int]]) -> None:
    """Raise UserError unless every tensor has its shape and a floating-point dtype."""
    codes = ("F64", *DTYPE_OF_CODE)  # float64 too: reading rounds it to the parameter's dtype
    for file in sorted(set(files.values())):
        with open_safetensors(file) as opened:
            for name in sorted(shapes.keys() & opened.keys()):
                entry = opened.get_slice(name)
                found, code = entry.get_shape(), entry.get_dtype()
                if found != shapes[name]:
                    message = f"{name} has shape {found}, config.json says {shapes[name]}"
                    raise UserError(f"{file}: {message}")
                if code not in codes:
                    message = (
                        f"{name} holds {code}: neither 16- or 32-bit floating-point weights "
                        "nor weights that bitsandbytes has quantized"
                    )
                    raise UserError(f"{file}: {message}")


def _read_with_new_rows(file: Path, name: str, rows: slice, total: int) -> Tensor:
    """Read rows of a matrix that has grown to `total` rows.

    Rows that the file does not have are the mean of those that it has.
    """
    full = read_tensor(file, name)
    start, stop, _ = rows.indices(total)
    old = full[start:stop]
    mean = full.float().mean(0, keepdim=True).to(full.dtype)
    new = mean.expand(stop - start - len(old), -1)
    return torch.cat([old, new])


def draw_weights(
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype | None,
    std: float,
    seed: int,
    layout: Layout = REPLICATED,
) -> None:
    """Give a model on the meta device new weights, which depend on the seed alone.

    Matrices are normal with standard deviation `std`, norms are one, biases are zero.

    Args:
        model: built on the meta device; parameters of adapters are left as they are.
        device: where the weights go.
        dtype: of the weights; None: each parameter keeps its own.
        std: standard deviation of the matrices.
        seed: the weights depend on it alone.
        layout: which rows of the parameters this process holds.
    """
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in list(base_parameters(model)):
        tensor = torch.empty(parameter.shape)
        if parameter.ndim > 1:
            tensor.normal_(0.0, std, generator=generator)
        else:
            tensor.fill_(1.0 if "norm" in path else 0.0)
        rows = tensor[layout.local_rows(parameter)].to(device, dtype or parameter.dtype)
        materialize_parameter(model, path, rows, layout)
