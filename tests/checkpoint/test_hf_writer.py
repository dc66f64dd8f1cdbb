"""Models that minilora writes, read by transformers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.tiny_models import config_json, ours, tiny
from minilora.checkpoint import hf_writer
from minilora.checkpoint.hf import INDEX_FILE
from minilora.checkpoint.hf_writer import save_config, save_weights


@pytest.mark.parametrize(
    ("tied", "dtype", "shard_bytes"),
    [
        (False, torch.float32, 10**9),
        (True, torch.bfloat16, 10**9),
        (False, torch.bfloat16, 20_000),
        (True, torch.float32, 20_000),
    ],
    ids=["untied-fp32-single", "tied-bf16-single", "untied-bf16-sharded", "tied-fp32-sharded"],
)
def test_save_weights_is_read_by_transformers(
    tied: bool,
    dtype: torch.dtype,
    shard_bytes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(hf_writer, "SHARD_BYTES", shard_bytes)
    hf = tiny("qwen2", tie_word_embeddings=tied)
    save_weights(ours(hf), tmp_path, dtype)
    save_config(tmp_path, json.loads(hf.config.to_json_string()), dtype)
    expected = {name: tensor.to(dtype) for name, tensor in hf.state_dict().items()}

    reloaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype="auto", output_loading_info=True
    )
    assert not any(info.values()), info
    assert_equal_tensors(reloaded.state_dict(), expected)

    if tied:
        del expected["lm_head.weight"]  # one matrix, stored once
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes < 10**9)
    stored: dict[str, Tensor] = {}
    for file in files:
        tensors = load_file(file)
        assert not stored.keys() & tensors.keys()
        assert sum(t.nbytes for t in tensors.values()) <= shard_bytes or len(tensors) == 1
        stored |= tensors
    assert_equal_tensors(stored, expected)

    if len(files) > 1:
        index = json.loads((tmp_path / INDEX_FILE).read_text())
        file_names = {name: file.name for file in files for name in load_file(file)}
        assert index["weight_map"] == file_names
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())


def assert_equal_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, dtypes and values."""
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]), name


def test_save_weights_names_and_fills_shards_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A file is closed when the next tensor would make it larger than the limit."""
    monkeypatch.setattr(hf_writer, "SHARD_BYTES", 20_000)
    model = ours(tiny("llama3"))
    save_weights(model, tmp_path, torch.float32)

    shards: list[list[str]] = [[]]
    size = 0
    for name, p in model.named_parameters():
        if shards[-1] and size + p.nbytes > 20_000:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += p.nbytes
    files = sorted(tmp_path.glob("*.safetensors"))
    count = len(shards)
    assert count > 2
    assert [file.name for file in files] == [
        f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)
    ]
    assert [set(load_file(file)) for file in files] == [set(names) for names in shards]


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_save_config_changes_the_dtype_alone(key: str, tmp_path: Path):
    raw = {**config_json("llama3", torch_dtype=...), key: "float16", "own key": ["ü"]}
    save_config(tmp_path, raw, torch.bfloat16)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert written == {**raw, key: "bfloat16"}
