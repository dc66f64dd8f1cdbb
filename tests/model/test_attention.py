"""Packed attention: positions, masks, and the arguments of the variable-length kernel."""

import itertools
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from minilora.errors import UserError
from minilora.model import attention
from minilora.model.attention import PackedAttention, document_attention

CPU = torch.device("cpu")
LENGTHS = [3, 1, 9, 5]
HEADS, KV_HEADS, SIZE = 4, 2, 8


def random_qkv(length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(length, HEADS, SIZE, generator=generator, dtype=dtype)
    k = torch.randn(length, KV_HEADS, SIZE, generator=generator, dtype=dtype)
    v = torch.randn(length, KV_HEADS, SIZE, generator=generator, dtype=dtype)
    return q, k, v


def plain_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Attention of one document, written out row by row in float64."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for position, head in itertools.product(range(len(q)), range(HEADS)):
        first = 0 if window is None else max(0, position + 1 - window)
        kv_head = head * KV_HEADS // HEADS
        keys = k[first : position + 1, kv_head].double()  # [seen, E]
        values = v[first : position + 1, kv_head].double()
        weights = (keys @ q[position, head].double() / SIZE**0.5).softmax(dim=0)
        out[position, head] = weights @ values
    return out


@pytest.mark.parametrize("window", [None, 1, 4, 9, 20])
def test_document_attention_equals_the_formula(window: int | None):
    q, k, v = random_qkv(9)
    out = document_attention(q, k, v, window)
    torch.testing.assert_close(out.double(), plain_attention(q, k, v, window), rtol=0, atol=1e-6)


def test_positions_restart_in_each_document():
    packed = PackedAttention(LENGTHS, CPU)
    assert packed.positions.tolist() == [t for length in LENGTHS for t in range(length)]
    assert packed.cu_seqlens.tolist() == [0, 3, 4, 13, 18]
    assert packed.cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize("window", [None, 4])
def test_packed_attention_is_that_of_each_document(window: int | None):
    q, k, v = random_qkv(sum(LENGTHS))
    out = PackedAttention(LENGTHS, CPU)(0, q, k, v, window)
    documents = zip(q.split(LENGTHS), k.split(LENGTHS), v.split(LENGTHS), strict=True)
    expected = [document_attention(*document, window) for document in documents]
    assert torch.equal(out, torch.cat(expected))


def fake_varlen_module(has_window: bool) -> ModuleType:
    """Make a torch.nn.attention.varlen of torch 2.12 (has_window) or before, which needs no GPU."""

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None) -> Tensor:
        lengths = cu_seqlens.diff().tolist()
        documents = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        return torch.cat([document_attention(*document, window) for document in documents])

    def with_window(q, k, v, *bounds, window_size, enable_gqa):
        cu_q, cu_k, max_q, max_k = bounds
        assert cu_q is cu_k and max_q == max_k == max(LENGTHS)
        assert enable_gqa == (q.shape[1] != k.shape[1])
        before, after = window_size
        assert after == 0
        return attend(q, k, v, cu_q, None if before == -1 else before + 1)

    def without_window(q, k, v, *bounds, is_causal):
        cu_q, cu_k, max_q, max_k = bounds
        assert cu_q is cu_k and max_q == max_k == max(LENGTHS)
        assert is_causal and q.shape == k.shape  # it has no grouped queries either
        return attend(q, k, v, cu_q, None)

    module = ModuleType("varlen")
    module.varlen_attn = with_window if has_window else without_window  # type: ignore[attr-defined]
    return module


@pytest.fixture(params=[True, False], ids=["torch 2.12", "torch 2.11"])
def has_window(request, monkeypatch: pytest.MonkeyPatch):
    """Put the fake kernel in place of torch's, in both of its versions."""
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", fake_varlen_module(request.param))
    attention._varlen_attn_has_window.cache_clear()
    yield request.param
    attention._varlen_attn_has_window.cache_clear()


@pytest.mark.parametrize("window", [None, 4, 9])
def test_the_kernel_is_called_with_the_same_meaning(has_window: bool, window: int | None):
    q, k, v = random_qkv(sum(LENGTHS), torch.bfloat16)
    packed = PackedAttention(LENGTHS, CPU)
    expected = packed(0, q, k, v, window)
    packed.on_cuda = True
    if window == 4 and not has_window:
        with pytest.raises(UserError, match=r"9 tokens .*sliding window of 4.*torch >= 2\.12"):
            packed(0, q, k, v, window)
    else:
        torch.testing.assert_close(packed(0, q, k, v, window), expected)


def test_the_kernel_is_for_16_bits_only(has_window: bool):
    q, k, v = random_qkv(sum(LENGTHS))
    packed = PackedAttention(LENGTHS, CPU)
    packed.on_cuda = True
    packed.cu_seqlens = None  # type: ignore[assignment]  # the kernel could not do without it
    assert packed(0, q, k, v, None).isfinite().all()
