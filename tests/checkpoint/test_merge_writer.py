"""Merging piece by piece; tests/system/test_merge.py and test_qlora_merge.py have the numbers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.checkpoints import random_adapter
from minilora.build import quantize_base
from minilora.checkpoint import tensor_files
from minilora.checkpoint.merge_writer import MergedWeights, write_merged_weights
from minilora.checkpoint.peft import PEFT_PREFIX, read_adapter
from minilora.config import LoraConfig
from minilora.files import read_json
from minilora.model.hf_config import DecoderConfig
from minilora.model.lora import lora_scaling, merged_weight
from minilora.model.transformer import CausalLM


@pytest.mark.parametrize("bits", [4, 8])
def test_memory_holds_the_weights_of_one_quantized_layer(bits: int, base: Path, tmp_path: Path):
    """Also while the caller keeps the layers."""
    adapter = random_adapter(base, tmp_path / "adapter", LoraConfig(rank=2))
    hf_config = read_json(base / "config.json")
    with torch.device("meta"):
        model = CausalLM(DecoderConfig.from_hf(hf_config))
    layers = quantize_base(model, hf_config, base, bits, double_quant=True)
    weights = MergedWeights(base, read_adapter(adapter), layers, torch.float32)

    for path, layer in layers.items():
        (merged,) = weights.pieces(f"{path}.weight")
        assert merged.shape == (layer.out_features, layer.in_features)
        (again,) = weights.pieces(f"{path}.weight")
        assert torch.equal(merged, again)
        held = [*layer.parameters(), *layer.buffers()]
        assert held and all(tensor.is_meta for tensor in held)


def test_pieces_of_a_few_rows_are_the_whole_tensors(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """No piece is larger than the limit: memory and time do not grow with the largest matrix."""
    limit = 200
    monkeypatch.setattr(tensor_files, "PIECE_ELEMENTS", limit)
    adapter = read_adapter(random_adapter(base, tmp_path / "adapter", LoraConfig(rank=2)))
    weights = MergedWeights(base, adapter, {}, torch.float32)
    write_merged_weights(weights, torch.float32, tmp_path)

    written = load_file(tmp_path / "model.safetensors")
    original = load_file(base / "model.safetensors")
    assert written.keys() == original.keys()
    for name, tensor in original.items():
        pieces = list(weights.pieces(name))
        assert max(piece.numel() for piece in pieces) <= limit
        assert len(pieces) > 1 or tensor.numel() <= limit
        assert torch.equal(torch.cat(pieces).float(), written[name])

        path = name.removesuffix(".weight")
        if path not in weights.adapted_paths:
            assert torch.equal(written[name], tensor.float())
            continue
        A = adapter.tensors[f"{PEFT_PREFIX}{path}.lora_A.weight"]
        B = adapter.tensors[f"{PEFT_PREFIX}{path}.lora_B.weight"]
        whole = merged_weight(tensor, A, B, lora_scaling(adapter.lora))
        torch.testing.assert_close(written[name], whole, rtol=1e-6, atol=1e-8)
