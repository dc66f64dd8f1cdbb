"""Packed attention: positions, masks, and the arguments of the variable-length kernel."""

import itertools
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from minilora.model import attention
from minilora.model.attention import PackedAttention, document_attention
from minilora.model.compiled_attention import compiled_attention

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


# ---- the variable-length kernel: the signatures of torch's versions, over attention on the CPU


def _attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window_size: tuple) -> Tensor:
    """Do what the kernel does, after checks of what all versions want."""
    assert q.dtype == torch.bfloat16 and cu_seqlens.dtype == torch.int32
    before, after = window_size
    assert after == 0
    lengths = cu_seqlens.diff().tolist()
    documents = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    window = None if before == -1 else before + 1
    return torch.cat([document_attention(*document, window) for document in documents])


def varlen_attn_of_2_11(  # noqa: PLR0913
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1),
):  # fmt: skip
    assert query.shape == key.shape  # it has no grouped queries
    assert cu_seq_q is cu_seq_k and max_q == max_k >= max(LENGTHS)
    return _attend(query, key, value, cu_seq_q, window_size)


def varlen_attn_of_2_12(  # noqa: PLR0913
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1), enable_gqa=False,
):  # fmt: skip
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert cu_seq_q is cu_seq_k and max_q == max_k >= max(LENGTHS)
    return _attend(query, key, value, cu_seq_q, window_size)


def varlen_attn_of_2_13(  # noqa: PLR0913
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert cu_seq_q is cu_seq_k and max_q == max_k >= max(LENGTHS)
    return _attend(query, key, value, cu_seq_q, window_size)


@pytest.fixture
def fresh_signature():
    attention._varlen_attn_takes_groups.cache_clear()
    yield
    attention._varlen_attn_takes_groups.cache_clear()


def packed_on_gpu(monkeypatch: pytest.MonkeyPatch) -> PackedAttention:
    """Make the attention of a batch that believes to have the kernel."""
    monkeypatch.setattr(attention, "has_variable_length_kernel", lambda device: True)
    return PackedAttention(LENGTHS, CPU)


@pytest.mark.parametrize("window", [None, 4, 9])
@pytest.mark.parametrize("kernel", [varlen_attn_of_2_11, varlen_attn_of_2_12, varlen_attn_of_2_13])
def test_the_kernel_is_called_with_the_same_meaning(
    monkeypatch, fresh_signature, kernel: Callable, window: int | None
):
    q, k, v = random_qkv(sum(LENGTHS), torch.bfloat16)
    expected = PackedAttention(LENGTHS, CPU)(0, q, k, v, window)
    module = ModuleType("varlen")
    module.varlen_attn = kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    out = packed_on_gpu(monkeypatch)(0, q, k, v, window)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("window", [None, 4])
def test_the_installed_kernel_takes_the_arguments(monkeypatch, fresh_signature, window):
    """torch's own function, up to the operator that needs a GPU: meta tensors stop there."""
    q, k, v = (t.to("meta") for t in random_qkv(sum(LENGTHS), torch.bfloat16))
    packed = packed_on_gpu(monkeypatch)
    packed.cu_seqlens = packed.cu_seqlens.to("meta")
    out = packed(0, q, k, v, window)
    assert out.shape == (sum(LENGTHS), HEADS, SIZE) and out.dtype == torch.bfloat16


def test_the_kernel_is_for_16_bits_only(monkeypatch):
    q, k, v = random_qkv(sum(LENGTHS))
    packed = packed_on_gpu(monkeypatch)
    packed.cu_seqlens = None  # type: ignore[assignment]  # the kernel could not do without it
    assert packed(0, q, k, v, None).isfinite().all()


@pytest.mark.parametrize(
    ("device", "capability", "has_kernel"),
    [
        ("cpu", None, False),
        ("cuda", (7, 0), False),  # V100
        ("cuda", (7, 5), False),  # T4
        ("cuda", (8, 0), True),  # A100
        ("cuda", (9, 0), True),  # H100
    ],
)
def test_the_kernel_is_for_gpus_from_ampere_on(monkeypatch, device, capability, has_kernel):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    attention.has_variable_length_kernel.cache_clear()
    assert attention.has_variable_length_kernel(torch.device(device)) is has_kernel
    attention.has_variable_length_kernel.cache_clear()


def test_the_bound_on_lengths_is_the_same_for_most_batches():
    """A block that is compiled for one bound is compiled anew for another one."""
    bounds = {n: PackedAttention([n, 1], CPU).longest for n in (1, 500, 2048, 2049, 5000, 8192)}
    assert bounds == {1: 2048, 500: 2048, 2048: 2048, 2049: 4096, 5000: 8192, 8192: 8192}


# ---- the operator that compiled blocks call on a CPU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 4])
def test_compiled_attention_is_that_of_each_document(dtype: torch.dtype, window: int | None):
    packed = PackedAttention(LENGTHS, CPU)
    results = []
    for attend in (
        lambda q, k, v: packed(0, q, k, v, window),
        lambda q, k, v: compiled_attention(q, k, v, packed.cu_seqlens, window),
    ):
        inputs = [t.requires_grad_() for t in random_qkv(sum(LENGTHS), dtype)]
        out = attend(*inputs)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        results.append([out, *torch.autograd.grad(out, inputs, grad)])
    (out, grad_q, *_), (expected, expected_grad_q, *_) = results
    assert torch.equal(out, expected) and torch.equal(grad_q, expected_grad_q)
    rtol, atol = (0, 1e-6) if dtype == torch.float32 else (1e-2, 1e-2)
    for actual, wanted in zip(*results, strict=True):  # sums over a group's heads round otherwise
        torch.testing.assert_close(actual, wanted, rtol=rtol, atol=atol)


def test_compiled_attention_tells_the_compiler_its_shapes():
    q, k, v = (t.requires_grad_() for t in random_qkv(sum(LENGTHS)))
    cu_seqlens = PackedAttention(LENGTHS, CPU).cu_seqlens
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
    torch.library.opcheck(
        torch.ops.minilora.attention.default,
        (q, k, v, cu_seqlens, 4),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
