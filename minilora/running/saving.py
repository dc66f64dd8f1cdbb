"""What others read: safetensors, adapters in PEFT's layout, models and tokenizers in Hugging Face layout."""

import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from minilora import dist
from minilora.config import Config, LoraConfig, RunError
from minilora.dist import WHOLE, Whole
from minilora.lora import EMBEDDING, HEAD, to_peft_config
from minilora.tokenizer import Tokenizer, read_object
from minilora.weights import DTYPE_CODES, base_parameters, checkpoint_name

SHARD_BYTES = 5_000_000_000  # of a model.safetensors shard
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def write_safetensors(
    path: Path, layout: dict[str, tuple[torch.dtype, tuple[int, ...]]], tensor_of: Callable[[str], Tensor]
) -> None:
    """Write a safetensors file one tensor at a time (the library's own writer wants all of them in memory).

    The format: 8 bytes of header length, a JSON header of dtype, shape and byte range per name, the tensors' bytes.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in layout.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_CODES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file, ThreadPoolExecutor(1) as writer:  # one tensor is written while the next is made
        writing = writer.submit(file.write, struct.pack("<Q", len(raw)) + raw)
        for name, (dtype, shape) in layout.items():
            tensor = tensor_of(name).detach().to("cpu", dtype).contiguous()
            assert tensor.shape == torch.Size(shape), name
            writing.result()
            writing = writer.submit(file.write, tensor.view(-1).view(torch.uint8).numpy().data)
        writing.result()
        file.flush()
        os.fsync(file.fileno())


def save_weights(model: nn.Module, directory: Path, dtype: torch.dtype, place: Whole = WHOLE) -> None:
    """A model's base parameters as HF safetensors, in one file or in shards with an index.

    Where rows are spread over processes all must call, the first writes, and no more than a tensor is ever whole.
    """
    parameters = {checkpoint_name(path): p for path, p in base_parameters(model)}
    shards: list[dict] = [{}]
    held = 0
    for name, p in parameters.items():
        size = p.numel() * dtype.itemsize
        if held and held + size > SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1][name] = (dtype, tuple(p.shape))
        held += size
    numbered = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = numbered if len(shards) > 1 else ["model.safetensors"]

    def whole(name: str) -> Tensor:
        return place.gather(place.local(parameters[name].detach()), parameters[name])

    for file, layout in zip(names, shards, strict=True):
        if dist.rank() == 0:
            write_safetensors(directory / file, layout, whole)
        else:
            for name in layout:
                whole(name)
    if len(shards) > 1 and dist.rank() == 0:
        total = sum(p.numel() for p in parameters.values()) * dtype.itemsize
        files = {name: file for file, layout in zip(names, shards, strict=True) for name in layout}
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def save_adapter(directory: Path, state: dict[str, Tensor], lora: LoraConfig, config: Config) -> None:
    """adapter_model.safetensors and adapter_config.json as PEFT reads them; state: see `adapter_state`."""
    name, revision = config.model.name, config.model.revision
    if Path(name).expanduser().is_dir():
        name = str(Path(name).expanduser().resolve())  # found again from any working directory
    elif "@" in name:
        name, _, at = name.partition("@")
        revision = revision or at
    peft = to_peft_config(lora, name, revision, state)
    (directory / "adapter_config.json").write_text(json.dumps(peft, indent=2), encoding="utf-8")
    state = {name: tensor.contiguous().cpu() for name, tensor in state.items()}
    if EMBEDDING in state and HEAD not in state:  # a tied model's one matrix: PEFT wants it under both names
        state[HEAD] = state[EMBEDDING].clone()
    safetensors.torch.save_file(state, str(directory / "adapter_model.safetensors"), metadata={"format": "pt"})


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Copy the tokenizer files, and write out the template in use, so that servers render the same prompts. Raises RunError."""
    if not list(tokenizer.directory.glob("tokenizer.[jm]*")):
        raise RunError(f"{tokenizer.directory} is gone: the same command makes it anew, and continues")
    for name in TOKENIZER_FILES:
        if (tokenizer.directory / name).is_file():
            shutil.copyfile(tokenizer.directory / name, directory / name)
    (directory / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    generation = read_object(tokenizer.directory / "generation_config.json")
    generation |= {"eos_token_id": sorted(ends)} if (ends := tokenizer.stop_ids()) else {}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2), encoding="utf-8")
