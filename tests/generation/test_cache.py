"""The cache of keys and values: slots that come and go, growth, and answers with and without it."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.build import build
from helpers.decoding import (
    EVERY_FAMILY,
    NEW_TOKENS,
    decode,
    decode_without_cache,
    model_of,
    prompts,
    random_prompts,
    randomize_adapters,
    sampling,
)
from helpers.tiny_models import WINDOW, tiny
from minilora.config import LoraConfig
from minilora.generation.cache import KVCache


def filled_cache(lengths: Sequence[int]) -> tuple[KVCache, list[list[Tensor]]]:
    """Make a cache of random numbers; also returns what each slot holds, layer by layer."""
    config = model_of("llama3").config
    cache = KVCache(config, len(lengths) + 1, torch.float32, torch.device("cpu"))
    cache.lengths = list(lengths)
    cache.reserve(max(lengths))
    for layer in cache.layers:
        layer.normal_(generator=torch.Generator().manual_seed(0))
    return cache, [content_of(cache, slot) for slot in range(len(lengths))]


def content_of(cache: KVCache, slot: int) -> list[Tensor]:
    """Copy what a slot holds: for each layer [2, K, length, E]."""
    return [layer[:, slot, :, : cache.lengths[slot]].clone() for layer in cache.layers]


def assert_content(cache: KVCache, expected: list[list[Tensor]]) -> None:
    """Check what each slot in use holds."""
    assert cache.lengths == [layers[0].shape[2] for layers in expected]
    for slot, layers in enumerate(expected):
        for actual, wanted in zip(content_of(cache, slot), layers, strict=True):
            assert torch.equal(actual, wanted), slot


@pytest.mark.parametrize("slot", range(4))
@pytest.mark.parametrize("lengths", [[5, 3, 9, 7], [5, 9, 3, 1], [4, 4, 4, 4]], ids=str)
def test_giving_up_a_slot_keeps_the_others(lengths: list[int], slot: int):
    """The last one moves, whether it is longer or shorter than what it replaces."""
    cache, before = filled_cache(lengths)
    cache.free(slot)
    before[slot] = before[-1]
    assert_content(cache, before[:-1])
    cache.reserve(100)
    assert_content(cache, before[:-1])
    assert cache.layers[0].shape[3] >= 100
    while cache.lengths:
        cache.free(0)
    assert cache.lengths == []


@EVERY_FAMILY
def test_answers_are_those_without_a_cache(family: str):
    model = model_of(family)
    expected = [decode_without_cache(model, prompt, NEW_TOKENS) for prompt in prompts()]
    assert decode(model, prompts()) == expected


@EVERY_FAMILY
def test_the_cache_grows_while_answers_do(family: str):
    """From a capacity of 1 token, several times; a prompt comes in while others are under way."""
    model = model_of(family)
    given = [[7], [7, 8], [9]]
    expected = [decode_without_cache(model, prompt, 90) for prompt in given]
    assert decode(model, given, sampling(90), batch_size=2) == expected


@pytest.mark.parametrize("bits, adapters", [(8, False), (8, True), (4, False), (4, True)])
def test_a_quantized_base_decodes_as_without_a_cache(bits: int, adapters: bool, tmp_path: Path):
    """In 8 bits without outliers: all tokens of a pass decide which features stay in 16 bits."""
    base = tmp_path / "base"
    hf = tiny("mistral_v1", hidden_size=64, intermediate_size=128)
    for p in hf.parameters():
        if p.dim() > 1:
            p.data *= 0.4
    hf.save_pretrained(base)

    lora = LoraConfig(rank=4) if adapters else None
    model = build(base, lora=lora, bits=bits).model.eval()
    randomize_adapters(model)
    given = random_prompts(6, 3 * WINDOW, seed=6)
    expected = [decode_without_cache(model, prompt, NEW_TOKENS) for prompt in given]
    for batch_size in (1, 4):
        assert decode(model, given, batch_size=batch_size) == expected
