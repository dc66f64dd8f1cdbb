"""Linear layers for a few bfloat16 rows on a CPU: exactness, and the switch."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from helpers.tiny_models import random_tokens
from minilora.config import LoraConfig
from minilora.model.lora import init_adapters, inject, lora_layers
from minilora.model.small_batch import (
    SMALL_BATCH,
    SMALL_BATCH_FLOAT32,
    small_batch_linear,
    use_cast_adapters,
    use_small_batch_matmul,
)
from minilora.model.transformer import CausalLM

HALF_UNIT = 2**-8 * 1.02  # relative error of one rounding to bfloat16, which has 8 bits


def layer_and_rows(rows: int, bias: bool) -> tuple[nn.Linear, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    layer = nn.Linear(192, 80, bias=bias, dtype=torch.bfloat16)
    for p in layer.parameters():
        p.normal_(generator=generator)
    return layer, torch.randn(rows, 192, generator=generator).bfloat16()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 17, SMALL_BATCH, SMALL_BATCH + 1])
@torch.no_grad()
def test_few_rows_are_as_exact_as_many(rows: int, bias: bool):
    """Within one bfloat16 rounding of the product and, where there is a bias, one of the sum."""
    layer, x = layer_and_rows(rows, bias)
    product = x.double() @ layer.weight.double().t()
    magnitude = x.double().abs() @ layer.weight.double().abs().t()
    exact, bound = product, HALF_UNIT * product.abs() + 2**-18 * magnitude  # 2^-18: sums in fp32
    assert ((small_batch_linear(x, layer.weight).double() - product).abs() <= bound).all()
    if bias:
        exact = product + layer.bias.double()
        bound = bound + HALF_UNIT * exact.abs()

    plain = layer(x)
    with use_small_batch_matmul(layer):
        out = layer(x)
    assert out.shape == plain.shape and out.dtype == plain.dtype
    assert ((out.double() - exact).abs() <= bound).all()
    assert ((plain.double() - exact).abs() <= bound).all()


@torch.no_grad()
def test_the_switch_is_undone(llama: CausalLM):
    llama.to(torch.bfloat16)
    layer = llama.model.layers[0].self_attn.q_proj
    tokens = random_tokens(3)
    plain = llama(tokens)
    with pytest.raises(RuntimeError), use_small_batch_matmul(llama):
        assert "forward" in vars(layer)
        with use_small_batch_matmul(llama):  # another decoding of the same model
            assert "forward" in vars(layer)
        assert "forward" in vars(layer)  # the inner block has not undone the outer one's switch
        assert "forward" not in vars(llama.lm_head)
        raise RuntimeError
    assert "forward" not in vars(layer)
    assert torch.equal(llama(tokens), plain)


@pytest.mark.parametrize("rows", [7, 8, 32, 33])
@torch.no_grad()
def test_some_float32_rows_are_transposed(rows: int):
    """Equal to float32 rounding; the transposed product shows in the strides."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, 32, generator=generator), torch.randn(48, 32, generator=generator)
    out = small_batch_linear(x, weight)
    torch.testing.assert_close(out, F.linear(x, weight))
    assert out.is_contiguous() == (rows not in SMALL_BATCH_FLOAT32)


@torch.no_grad()
def test_adapters_are_cast_once(llama: CausalLM):
    """Not in each pass, and the answers are to the bit those of casting in each pass."""
    inject(llama.to(torch.bfloat16), LoraConfig(rank=4, alpha=4))
    init_adapters(llama, seed=0)
    for _, layer in lora_layers(llama):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    llama.eval()
    tokens, layer = random_tokens(3), llama.model.layers[0].mlp.up_proj
    expected = llama(tokens)

    def casts() -> int:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            assert torch.equal(llama(tokens), expected)
        return sum(event.name == "aten::_to_copy" for event in profiler.events())

    before = casts()
    with use_cast_adapters(llama, torch.bfloat16):
        inside = casts()
        with use_cast_adapters(llama, torch.bfloat16):  # another decoding of the same model
            assert casts() == inside
        assert "forward" in vars(layer)
    assert casts() == before
    assert before - inside == 2 * len(list(lora_layers(llama)))
    with use_cast_adapters(llama, torch.float32):
        assert "forward" not in vars(layer)  # there is nothing to cast


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_multiply_as_always(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 32, generator=generator).to(dtype)
    weight = torch.randn(16, 32, generator=generator).to(dtype)
    assert torch.equal(small_batch_linear(x, weight), F.linear(x, weight))
