"""Write the files of a merged model: the base with an adapter added to its weights.

Files are written one by one, and tensors some rows at a time, so memory holds a few pieces of
tensors, not the model. Each tensor stays in the file that it has in the base. `lora.merged_weight`
computes each sum in float32, and `tensor_files.write_safetensors` rounds it once, by its cast to
the dtype of the file.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import tqdm
from torch import Tensor

from minilora.checkpoint.hf import INDEX_FILE, load_quantized_layer, weight_map
from minilora.checkpoint.hf_writer import save_config
from minilora.checkpoint.model_record import (
    RECORD_FILE,
    ModelRecord,
    find_model_record,
    write_model_record,
)
from minilora.checkpoint.peft import EMBEDDING, PEFT_PREFIX, Adapter, check_tied_head
from minilora.checkpoint.tensor_files import (
    DTYPE_OF_CODE,
    TensorEntry,
    open_safetensors,
    read_shape,
    read_tensor,
    row_pieces,
    write_safetensors,
)
from minilora.checkpoint.tokenizer_writer import plan_export, save_tokenizer
from minilora.checkpoint.trainer_state import TRAINER_STATE_FILE
from minilora.data.tokenizer import TOKENIZER_FILES, Tokenizer, has_tokenizer
from minilora.distributed import REPLICATED
from minilora.errors import UserError
from minilora.files import read_json
from minilora.model.lora import lora_scaling, merged_weight
from minilora.model.quantized_linear import QuantizedLinear

CPU = torch.device("cpu")
FileEntries = dict[Path, dict[str, TensorEntry]]
"""For each file of the base, the tensors that the merged file of this name holds."""


class MergedWeights:
    """The tensors of a merged model, computed some rows at a time."""

    def __init__(
        self,
        base: Path,
        adapter: Adapter,
        quantized: Mapping[str, QuantizedLinear],
        rounded_to: torch.dtype,
    ):
        """Check that the adapter belongs to the base.

        Args:
            base: the directory of the base model.
            adapter: the adapter to add to its weights.
            quantized: layers that are quantized and dequantized before the adapter is added, by
                path; empty to merge into the weights as they are stored.
            rounded_to: what the weights of such layers are rounded to before they are quantized,
                as in training; it is their dtype in the merged files.

        Raises:
            UserError: the adapter changes a layer that the base does not have.
        """
        self.files = weight_map(base)
        self.adapter = adapter
        self.quantized = quantized
        self.rounded_to = rounded_to
        self.is_tied = bool(read_json(base / "config.json").get("tie_word_embeddings"))
        if self.is_tied:
            check_tied_head(adapter.tensors, str(adapter.directory))

        suffix = ".lora_A.weight"
        self.adapted_paths = {
            name.removeprefix(PEFT_PREFIX).removesuffix(suffix)
            for name in adapter.tensors
            if name.endswith(suffix)
        }
        for path in sorted(self.adapted_paths):
            if f"{path}.weight" not in self.files:
                message = f"{base} has no {path}.weight, which the adapter changes"
                raise UserError(f"{message}: it is not the base of this adapter")

    def entries(self, dtype: torch.dtype | None) -> FileEntries:
        """Return the dtype and shape of each tensor of each merged file.

        Args:
            dtype: of all tensors in the files; None: each tensor keeps its own.
        """
        files = sorted(set(self.files.values()))
        return {file: self._entries_of(file, dtype) for file in files}

    def _entries_of(self, file: Path, dtype: torch.dtype | None) -> dict[str, TensorEntry]:
        """Return the tensors of one merged file; a quantized layer has one dequantized weight.

        Raises:
            UserError: `file` has a tensor that is neither floating-point nor of a quantized layer.
        """
        statistics: set[str] = set()  # of quantized layers; a dequantized weight has none
        for quantized in self.quantized.values():
            names = [name for name in quantized.tensor_names if name != "weight"]
            statistics.update(f"{quantized.path}.{name}" for name in names)

        entries: dict[str, TensorEntry] = {}
        with open_safetensors(file) as opened:
            for name in opened.keys():
                if name in statistics:
                    continue
                stored = opened.get_slice(name)
                layer = self._quantized_layer(name)
                if layer is not None and layer.is_prequantized:
                    shape = (layer.out_features, layer.in_features)
                    entries[name] = TensorEntry(dtype or self.rounded_to, shape)
                    continue
                code = stored.get_dtype()
                if code not in DTYPE_OF_CODE:
                    supported = "merging needs a base in float32, float16 or bfloat16"
                    raise UserError(f"{file}: has {code} tensors; {supported}")
                trained = self._trained_matrix(name)
                shape = tuple(stored.get_shape() if trained is None else trained.shape)
                entries[name] = TensorEntry(dtype or DTYPE_OF_CODE[code], shape)
        return entries

    def _quantized_layer(self, name: str) -> QuantizedLinear | None:
        """Return the quantized layer that a tensor is the weight of, if there is one."""
        if not name.endswith(".weight"):
            return None
        return self.quantized.get(name.removesuffix(".weight"))

    def _trained_matrix(self, name: str) -> Tensor | None:
        """Return the embedding or head that the adapter has instead of the base's, or None."""
        if self.is_tied and name == "lm_head.weight":
            return self.adapter.tensors.get(EMBEDDING)
        return self.adapter.tensors.get(PEFT_PREFIX + name)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Compute a tensor of the merged model, some rows after the others.

        Sums with the adapter are float32, not yet rounded.

        Raises:
            UserError: the base's tensor is damaged, or has another shape than the adapter's update.
        """
        trained = self._trained_matrix(name)
        if trained is not None:
            yield trained
            return

        path = name.removesuffix(".weight")
        if path not in self.adapted_paths:
            for _, piece in self._base_pieces(name):
                yield piece
            return
        A = self.adapter.tensors[f"{PEFT_PREFIX}{path}.lora_A.weight"]  # [R, in]
        B = self.adapter.tensors[f"{PEFT_PREFIX}{path}.lora_B.weight"]  # [out, R]
        self._check_update(path, (B.shape[0], A.shape[1]))
        scaling = lora_scaling(self.adapter.lora)
        for rows, piece in self._base_pieces(name):
            yield merged_weight(piece, A, B[rows], scaling)

    def _check_update(self, path: str, update: tuple[int, ...]) -> None:
        """Raise UserError if a weight of the base does not have the shape of the update to it."""
        name = f"{path}.weight"
        layer = self._quantized_layer(name)
        if layer is None:
            shape = read_shape(self.files[name], name)
        else:
            shape = (layer.out_features, layer.in_features)
        if shape != update:
            found = f"the base's weight is {list(shape)}, the adapter's update {list(update)}"
            raise UserError(f"{path}: {found}")

    def _base_pieces(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """Read a tensor of the base, as (rows, their values) after each other.

        A layer that was quantized in training is quantized and dequantized, as a whole.
        """
        layer = self._quantized_layer(name)
        if layer is None:
            file = self.files[name]
            for rows in row_pieces(read_shape(file, name)):
                yield rows, read_tensor(file, name, rows)
            return
        load_quantized_layer(layer, self.files, CPU, self.rounded_to, REPLICATED)
        weight = layer.weight_in(torch.float32)
        layer.to("meta")  # frees what was loaded: memory holds the weights of one layer
        for rows in row_pieces(tuple(weight.shape)):
            yield rows, weight[rows]


def write_merged_weights(
    weights: MergedWeights, dtype: torch.dtype | None, target: Path
) -> FileEntries:
    """Write the safetensors files of a merged model.

    Args:
        weights: the merged tensors.
        dtype: of all tensors in the files; None: each tensor keeps its own.
        target: the directory to write to.

    Returns:
        The dtype and shape of each tensor of each file.
    """
    entries = weights.entries(dtype)
    total = sum(len(file_entries) for file_entries in entries.values())
    with tqdm.tqdm(total=total, desc="merging", unit=" tensors") as bar:

        def pieces_of(name: str) -> Iterator[Tensor]:
            bar.update()
            return weights.pieces(name)

        for file, file_entries in entries.items():
            write_safetensors(target / file.name, file_entries, pieces_of)
    return entries


def write_other_files(base: Path, checkpoint: Path, target: Path, entries: FileEntries) -> None:
    """Write the other files of a merged model: config.json, index, tokenizer, minilora.json.

    Args:
        base: the directory of the base model.
        checkpoint: the directory of the adapter.
        target: the directory of the merged model.
        entries: the dtype and shape of each tensor of each of its safetensors files.
    """
    if (base / INDEX_FILE).is_file():
        index = _merged_index(read_json(base / INDEX_FILE), entries)
        (target / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")

    record = find_model_record(checkpoint, base)
    _write_tokenizer(base, checkpoint, target, record)
    if record is not None:
        write_model_record(target, record.merged())

    hf_config = read_json(base / "config.json")
    hf_config.pop("quantization_config", None)
    if record is not None and record.data.add_tokens:
        tokenizer = Tokenizer(target)
        if tokenizer.eos_token in record.data.add_tokens:
            hf_config["eos_token_id"] = tokenizer.eos_id
    embedding = EMBEDDING.removeprefix(PEFT_PREFIX)
    dtypes: set[torch.dtype] = set()
    for file_entries in entries.values():
        dtypes.update(entry.dtype for entry in file_entries.values())
        if embedding in file_entries:
            hf_config["vocab_size"] = file_entries[embedding].shape[0]
    # one dtype has to describe files of several: the widest of them, which loses nothing
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    save_config(target, hf_config, dtype)


def _write_tokenizer(
    base: Path, checkpoint: Path, target: Path, record: ModelRecord | None
) -> None:
    """Write the tokenizer's files: all of them the checkpoint's, or else all of them the base's.

    A file of the base beside the checkpoint's, such as a chat template, could contradict them.
    generation_config.json is the model's too: it is the base's if the checkpoint has none.
    """
    source = checkpoint if has_tokenizer(checkpoint) else base
    is_old = (
        not (checkpoint / RECORD_FILE).is_file() and (checkpoint / TRAINER_STATE_FILE).is_file()
    )
    if record is not None and is_old:  # its files may not say what training did
        tokenizer = Tokenizer(source)
        save_tokenizer(tokenizer, target, plan_export(tokenizer, record.data))
        return
    for name in TOKENIZER_FILES:
        file = source / name
        if name == "generation_config.json" and not file.is_file():
            file = base / name
        if file.is_file():
            shutil.copyfile(file, target / name)


def _merged_index(index: dict, entries: FileEntries) -> dict:
    """Return the base's index with the files and the size of the merged tensors."""
    total_size = 0
    file_names: dict[str, str] = {}
    for file, file_entries in entries.items():
        for name, entry in file_entries.items():
            total_size += math.prod(entry.shape) * entry.dtype.itemsize
            file_names[name] = file.name
    metadata = {**index.get("metadata", {}), "total_size": total_size}
    return {**index, "weight_map": file_names, "metadata": metadata}
