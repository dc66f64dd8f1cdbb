"""Write a model's weights and config.json in Hugging Face layout, which any tool can load."""

import json
from pathlib import Path

import huggingface_hub
import torch
from torch import Tensor, nn

from minilora import distributed
from minilora.checkpoint.hf import INDEX_FILE, base_parameters, name_in_file
from minilora.checkpoint.tensor_files import TensorEntry, write_safetensors
from minilora.distributed import REPLICATED, Layout
from minilora.files import write_json
from minilora.model.precision import dtype_name

SHARD_BYTES = 5_000_000_000
"""Largest size of a model's file; a larger model is written in several."""


def save_weights(
    model: nn.Module, directory: Path, dtype: torch.dtype, layout: Layout = REPLICATED
) -> None:
    """Write all weights except adapters to one safetensors file, or to shards with an index.

    All processes call this together. The first one writes, and of a sharded model it holds one
    gathered tensor at a time.

    Args:
        model: the model.
        directory: where the files go.
        dtype: what the weights are rounded to.
        layout: which rows of the parameters this process holds.
    """
    parameters = {name_in_file(path): p for path, p in base_parameters(model)}
    split = huggingface_hub.split_state_dict_into_shards_factory(
        parameters,
        get_storage_size=lambda p: p.numel() * dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )

    def full_tensor(name: str) -> Tensor:
        p = parameters[name]
        return layout.full_tensor(layout.to_local(p.detach()), p)

    for file, names in split.filename_to_tensors.items():
        if distributed.rank() == 0:
            entries = {name: TensorEntry(dtype, tuple(parameters[name].shape)) for name in names}
            write_safetensors(directory / file, entries, lambda name: [full_tensor(name)])
        else:
            for name in names:
                full_tensor(name)  # gathering needs every process, in the same order

    if split.is_sharded and distributed.rank() == 0:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")


def save_config(directory: Path, raw: dict, dtype: torch.dtype) -> None:
    """Write config.json with the dtype that the weights beside it have.

    The field is `dtype` where `raw` has that one, and else `torch_dtype`, its older name.
    """
    field = "dtype" if "dtype" in raw else "torch_dtype"
    config = {**raw, field: dtype_name(dtype)}
    write_json(directory / "config.json", config)
