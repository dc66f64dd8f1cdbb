"""Counting the bytes of a block on the meta device."""

import torch

from helpers.tiny_models import config_json
from minilora.config import LoraConfig
from minilora.model.hf_config import DecoderConfig
from minilora.planning.block_memory import BlockCounter, LiveBytes

DECODER = DecoderConfig.from_hf(config_json("llama3", hidden_size=64, intermediate_size=256))
TOKENS = 1000


def test_views_are_not_counted_and_freed_tensors_no_longer():
    given = torch.empty(10)
    with LiveBytes([given]) as live:
        view = given.t()
        first = torch.empty(1000, dtype=torch.bfloat16)
        shown = first[5:]
        assert live.now == 2000
        second = first.float()
        assert live.now == 6000
        del first, second
        assert live.now == 2000  # `shown` still has the memory of `first`
        del shown
    assert (live.now, live.peak, len(view)) == (0, 6000, 10)


def test_a_recomputed_block_keeps_its_output_alone():
    counter = BlockCounter(DECODER, LoraConfig(rank=4), torch.bfloat16)
    recomputed = counter.count(TOKENS, recompute=True, mlp_tile_tokens=None)
    whole = counter.count(TOKENS, recompute=False, mlp_tile_tokens=None)
    assert recomputed.kept == TOKENS * DECODER.hidden_size * 2
    # gate, up, the activation and the product, [T, I] each, and [T, D] at least four times
    assert whole.kept > 2 * TOKENS * (4 * DECODER.intermediate_size + 4 * DECODER.hidden_size)
    assert recomputed.backward > whole.kept - recomputed.kept


def test_tiles_take_less():
    counter = BlockCounter(DECODER, LoraConfig(rank=4), torch.bfloat16)
    whole = counter.count(TOKENS, recompute=True, mlp_tile_tokens=None)
    in_tiles = counter.count(TOKENS, recompute=True, mlp_tile_tokens=250)
    assert in_tiles.kept == whole.kept
    assert in_tiles.backward < 0.7 * whole.backward


def test_an_adapter_of_one_block_stands_for_that_layer():
    kept = {}
    for target in ("layers.1.mlp.up_proj", "up_proj", "down_proj"):
        lora = LoraConfig(rank=4, target_modules=(target,))
        counter = BlockCounter(DECODER, lora, torch.float32)
        kept[target] = counter.count(TOKENS, recompute=False, mlp_tile_tokens=None)
    assert kept["layers.1.mlp.up_proj"] == kept["up_proj"] != kept["down_proj"]
