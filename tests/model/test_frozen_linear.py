"""A weight in 16 bits whose product is float32: exactness, and what is kept of it."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.tiny_models import VOCAB, random_tokens
from minilora.config import LoraConfig
from minilora.model import frozen_linear
from minilora.model.frozen_linear import FEW_ROWS, CastLinear, cast_linear, hold_in_16_bits
from minilora.model.lora import inject
from minilora.model.transformer import CausalLM

IN, OUT = 48, 40
MANY_ROWS = FEW_ROWS + 8


def pair(dtype: torch.dtype, bias: bool) -> tuple[CastLinear, nn.Linear]:
    """Make a layer whose weight is in 16 bits, and a plain one in float32 of the same values."""
    plain = nn.Linear(IN, OUT, bias)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, IN, generator=generator).to(dtype)
    plain.weight = nn.Parameter(weight.float(), requires_grad=False)
    cast = CastLinear(plain)
    cast.weight = nn.Parameter(weight, requires_grad=False)
    if bias:
        cast.bias = nn.Parameter(plain.bias.detach(), requires_grad=False)
    return cast, plain


def rows_of(rows: int) -> Tensor:
    return torch.randn(rows, IN, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_product_and_gradient_are_those_of_float32_to_the_bit(dtype: torch.dtype, bias: bool):
    outs, grads = [], []
    for layer in pair(dtype, bias):
        x = rows_of(MANY_ROWS).requires_grad_()
        out = layer(x)
        (out * out).sum().backward()
        outs.append(out)
        grads.append(x.grad)
    assert outs[0].dtype == torch.float32
    assert torch.equal(*outs) and torch.equal(*grads)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS, FEW_ROWS + 1])
def test_tiles_of_a_weight_give_its_product(rows: int, bias: bool, monkeypatch):
    monkeypatch.setattr(frozen_linear, "CACHE_TILE", 7 * IN + 1)  # 7 does not divide OUT
    monkeypatch.setattr(frozen_linear, "MEMORY_TILE", 9 * IN)
    cast, plain = pair(torch.bfloat16, bias)
    out = cast(rows_of(rows))
    assert out.shape == (rows, OUT) and out.is_contiguous()
    torch.testing.assert_close(out, plain(rows_of(rows)), rtol=1e-5, atol=1e-5)


def test_weights_are_cast_in_the_same_memory_one_after_the_other(monkeypatch):
    """Threads have memory of their own, and what `weight_in` returns is nobody else's."""
    monkeypatch.setattr(frozen_linear, "_scratch", threading.local())
    (first, _), (second, plain) = pair(torch.bfloat16, False), pair(torch.bfloat16, False)
    second.weight.data = plain.weight.data = torch.full((OUT, IN), 0.5)
    second.weight.data = second.weight.data.bfloat16()
    kept = first.weight_in(torch.float32)
    before = kept.clone()
    with torch.inference_mode():
        first(rows_of(MANY_ROWS))
    memory = frozen_linear._scratch.memory

    x = rows_of(MANY_ROWS).requires_grad_()
    second(x).sum().backward()
    assert frozen_linear._scratch.memory is memory and memory.numel() == OUT * IN
    assert torch.equal(memory.view(OUT, IN), plain.weight)
    assert torch.equal(kept, before)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(first, rows_of(MANY_ROWS)).result()
    assert torch.equal(memory.view(OUT, IN), plain.weight)


def test_a_fake_weight_leaves_no_memory_behind(monkeypatch):
    monkeypatch.setattr(frozen_linear, "_scratch", threading.local())
    with FakeTensorMode():
        weight = torch.empty(OUT, IN, dtype=torch.bfloat16)
        assert cast_linear(torch.empty(MANY_ROWS, IN), weight).shape == (MANY_ROWS, OUT)
    assert not hasattr(frozen_linear._scratch, "memory")


def test_a_weight_of_the_same_dtype_is_multiplied_as_it_is():
    weight, x = torch.randn(OUT, IN), rows_of(3)
    assert torch.equal(cast_linear(x, weight), F.linear(x, weight))


class Shapes(TorchDispatchMode):
    """Records the shapes of all float32 matrices that operations return."""

    def __init__(self):
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float32:
            self.seen.add(tuple(out.shape))
        return out


@torch.no_grad()
@pytest.mark.parametrize("rows", [3, MANY_ROWS])
def test_no_whole_head_is_cast_for_logits(llama: CausalLM, rows: int, monkeypatch):
    """Neither for a few positions, as in decoding, nor for all."""
    monkeypatch.setattr(frozen_linear, "CACHE_TILE", 8 * 32)
    monkeypatch.setattr(frozen_linear, "MEMORY_TILE", 16 * 32)
    tokens = random_tokens(MANY_ROWS)
    at = torch.arange(rows)
    weight = llama.lm_head.weight
    weight.data = weight.data.bfloat16().float()
    expected = llama(tokens, logits_at=at)
    weight.data = weight.data.bfloat16()
    with Shapes() as shapes:
        logits = llama(tokens, logits_at=at)
        everywhere = llama(tokens)
    assert (VOCAB, 32) not in shapes.seen and (32, VOCAB) not in shapes.seen
    assert (8, 32) in shapes.seen or rows > FEW_ROWS
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(everywhere[:rows], expected, rtol=1e-5, atol=1e-5)


def float32_tensors() -> dict[int, tuple[int, ...]]:
    """Return {id: shape} of the float32 tensors that Python knows."""
    found = [thing for thing in gc.get_objects() if type(thing) is Tensor]
    return {id(t): tuple(t.shape) for t in found if t.dtype == torch.float32}


def kept_of_weights(model: CausalLM) -> tuple[set[tuple[int, ...]], Tensor]:
    """Take a step forward and back, and see what of the blocks' weights is kept between the two.

    Returns:
        The shapes of kept float32 tensors that a weight of the blocks has too, and the loss.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    weights = {tuple(layer.weight.shape) for layer in layers}
    kept: set[tuple[int, ...]] = set()

    def keep(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.float32:
            kept.update({tuple(tensor.shape), tuple(reversed(tensor.shape))})
        return tensor

    tokens = random_tokens(MANY_ROWS)
    labels = tokens.index_fill(0, torch.tensor([0]), -100)
    before = float32_tensors()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens, labels=labels)
    for place, shape in float32_tensors().items():
        if place not in before:
            kept.add(shape)
    loss.backward()
    return kept & weights, loss.detach()


def test_nothing_of_a_cast_weight_is_kept(llama: CausalLM):
    lora = LoraConfig(rank=2, target_modules=("q_proj", "down_proj"))
    for p in llama.parameters():
        p.data = p.data.bfloat16().float()
    inject(llama, lora)
    for name, p in llama.named_parameters():
        if "lora_" in name:
            nn.init.constant_(p, 0.01)
    of_float32, expected = kept_of_weights(llama)
    assert of_float32  # autograd keeps the weights, which are there anyway

    gradients = {name: p.grad for name, p in llama.named_parameters() if p.requires_grad}
    hold_in_16_bits_after_the_fact(llama)
    of_cast, loss = kept_of_weights(llama)
    assert of_cast == set()
    assert torch.equal(loss, expected)
    for name, p in llama.named_parameters():
        if p.requires_grad:
            assert torch.equal(p.grad, gradients[name]), name


def hold_in_16_bits_after_the_fact(model: CausalLM) -> None:
    """Do what the builders do, of a model that has its values already."""
    weights = {path: m.weight for path, m in model.named_modules() if type(m) is nn.Linear}
    hold_in_16_bits(model)
    for path, weight in weights.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, CastLinear)
        layer.weight = nn.Parameter(weight.data.bfloat16(), requires_grad=False)
    model.zero_grad()
