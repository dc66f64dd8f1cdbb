"""Merging tensor by tensor; tests/system/test_merge.py and test_qlora_merge.py have the numbers."""

from pathlib import Path

import pytest
import torch

from helpers.checkpoints import random_adapter
from minilora.build import quantize_base
from minilora.checkpoint.merge_writer import MergedWeights
from minilora.checkpoint.peft import read_adapter
from minilora.config import LoraConfig
from minilora.files import read_json
from minilora.model.hf_config import DecoderConfig
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
        merged = weights.tensor(f"{path}.weight")
        assert merged.shape == (layer.out_features, layer.in_features)
        assert torch.equal(merged, weights.tensor(f"{path}.weight"))
        held = [*layer.parameters(), *layer.buffers()]
        assert held and all(tensor.is_meta for tensor in held)
