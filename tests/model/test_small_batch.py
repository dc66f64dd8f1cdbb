"""Linear layers for a few bfloat16 rows on a CPU: exactness, and the switch."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.tiny_models import random_tokens
from minilora.model.small_batch import SMALL_BATCH, small_batch_linear, use_small_batch_matmul
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_multiply_as_always(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 32, generator=generator).to(dtype)
    weight = torch.randn(16, 32, generator=generator).to(dtype)
    assert torch.equal(small_batch_linear(x, weight), F.linear(x, weight))
