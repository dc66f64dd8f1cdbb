"""The chunked loss against float64 cross-entropy over all logits at once."""

import math
import random

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.tiny_models import VOCAB
from minilora.model import loss as loss_module
from minilora.model.loss import cross_entropy_sum

D = 16


def example(rows: int, supervised: float = 0.7) -> tuple[Tensor, Tensor, Tensor]:
    """Draw hidden states [rows, D], a weight [VOCAB, D] and labels [rows].

    A share of the labels is supervised, the first never.
    """
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, D, generator=generator)
    weight = torch.randn(VOCAB, D, generator=generator)
    labels = torch.randint(VOCAB, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) >= supervised] = -100
    labels[0] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def expected(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute loss, gradient of hidden and gradient of weight in float64."""
    h = hidden.detach().double().requires_grad_()
    w = weight.detach().double().requires_grad_()
    loss = F.cross_entropy((h @ w.t())[:-1], labels[1:], reduction="sum", ignore_index=-100)
    return loss.detach(), *torch.autograd.grad(loss, (h, w))


def assert_equals_float64(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    loss = cross_entropy_sum(hidden, weight, labels)
    assert loss.dtype == torch.float32 and loss.shape == ()
    actual = (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))
    for ours, reference in zip(actual, expected(hidden, weight, labels), strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=1e-5)


class Allocations(TorchDispatchMode):
    """Records the shapes of all tensors for which an operation allocates memory.

    Views and results of in-place operations are none of them.
    """

    def __init__(self):
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        addresses = {x.untyped_storage().data_ptr() for x in given}
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in addresses:
                self.shapes.append(tuple(x.shape))
        return result

    def largest(self) -> int:
        return max(math.prod(shape) for shape in self.shapes)


@pytest.fixture
def chunk_rows(monkeypatch: pytest.MonkeyPatch):
    """Return a function that sets the number of rows whose logits are computed at a time."""
    return lambda rows: monkeypatch.setitem(loss_module.CHUNK_ELEMENTS, "cpu", rows * VOCAB)


# 39 rows are supervised; 0: less than one row
@pytest.mark.parametrize("chunk", [0, 1, 5, 7, 8, 20, 39, 40, 1000])
def test_equals_float64_in_any_chunks(chunk: int, chunk_rows):
    chunk_rows(chunk)
    assert_equals_float64(*example(40, supervised=1.0))


@pytest.mark.parametrize("seed", range(5))
def test_equals_float64_at_any_supervision(seed: int, chunk_rows):
    draw = random.Random(seed)
    chunk_rows(draw.randint(1, 12))
    assert_equals_float64(*example(draw.randint(2, 60), supervised=draw.random()))


@pytest.mark.parametrize("position", [1, 20, 39])
def test_one_supervised_token(position: int):
    hidden, weight, labels = example(40)
    labels[labels != -100] = -100
    labels[position] = 5
    assert_equals_float64(hidden, weight, labels)
    (grad,) = torch.autograd.grad(cross_entropy_sum(hidden, weight, labels), hidden)
    rows_with_gradient = grad.any(dim=1).nonzero().flatten().tolist()
    assert rows_with_gradient == [position - 1]  # the token before predicts it


@pytest.mark.parametrize("rows", [1, 40])
def test_no_supervised_token(rows: int):
    hidden, weight, labels = example(rows, supervised=0.0)
    loss = cross_entropy_sum(hidden, weight, labels)
    assert loss.item() == 0
    grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight))
    assert grad_hidden.shape == hidden.shape and not grad_hidden.any()
    assert grad_weight.shape == weight.shape and not grad_weight.any()


def test_large_logits_are_finite():
    hidden, weight, labels = example(20)
    with torch.no_grad():
        hidden.mul_(1e4)
    assert_equals_float64(hidden, weight, labels)


def test_the_gradient_is_scaled_by_what_follows():
    hidden, weight, labels = example(30)
    grads = torch.autograd.grad(cross_entropy_sum(hidden, weight, labels) / 7, (hidden, weight))
    for grad, reference in zip(grads, expected(hidden, weight, labels)[1:], strict=True):
        torch.testing.assert_close(grad.double(), reference / 7, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
# float32: a head that is trained
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_hidden(weight_dtype: torch.dtype, chunk: int, chunk_rows):
    """Products are rounded to bfloat16; losses, softmax and the sums over chunks are not."""
    chunk_rows(chunk)
    hidden, weight, labels = example(60)
    hidden = hidden.detach().to(torch.bfloat16).requires_grad_()
    weight = (0.3 * weight.detach()).to(torch.bfloat16).to(weight_dtype).requires_grad_()
    loss = cross_entropy_sum(hidden, weight, labels)
    logits = (hidden.detach() @ weight.detach().to(torch.bfloat16).t()).double()
    torch.testing.assert_close(
        loss.double(), F.cross_entropy(logits[:-1], labels[1:], reduction="sum"), rtol=1e-4, atol=0
    )
    for of, reference in zip((hidden, weight), expected(hidden, weight, labels)[1:], strict=True):
        (grad,) = torch.autograd.grad(loss, of, retain_graph=True)
        assert grad.dtype == of.dtype
        assert (grad.double() - reference).norm() < 3.5e-3 * reference.norm()


def test_bfloat16_gradients_have_no_bias_from_the_division():
    """1/3 rounded to bfloat16 is 0.2% too large, which would hold for all gradients of a step."""
    hidden, weight, labels = example(60)
    hidden = hidden.detach().to(torch.bfloat16).requires_grad_()
    loss = cross_entropy_sum(hidden, weight, labels)
    (whole,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (third,) = torch.autograd.grad(loss / 3, hidden)
    whole, third = whole.double(), third.double()
    assert abs(3 * (third * whole).sum() / whole.square().sum() - 1) < 5e-4


def test_no_tensor_is_as_large_as_the_logits(chunk_rows):
    chunk_rows(4)
    hidden, weight, labels = example(200, supervised=0.5)
    with Allocations() as chunked:
        cross_entropy_sum(hidden, weight, labels).backward()
    assert chunked.largest() <= max(hidden.numel(), weight.numel(), 4 * VOCAB)
    with Allocations() as full:
        F.cross_entropy((hidden @ weight.t())[:-1], labels[1:], reduction="sum").backward()
    assert full.largest() == 200 * VOCAB  # where logits are made, the measure sees them


def test_logits_are_computed_for_supervised_rows_only():
    hidden, weight, labels = example(200, supervised=0.1)
    with Allocations() as made:
        cross_entropy_sum(hidden, weight, labels)
    supervised = int((labels != -100).sum())
    assert 0 < supervised < 40
    assert {shape for shape in made.shapes if shape[-1:] == (VOCAB,)} == {(supervised, VOCAB)}


def test_a_frozen_weight_costs_no_gradient():
    hidden, weight, labels = example(40)
    weight.requires_grad_(False)
    with Allocations() as made:
        cross_entropy_sum(hidden, weight, labels).backward()
    assert (VOCAB, D) not in made.shapes
    torch.testing.assert_close(
        hidden.grad.double(), expected(hidden, weight, labels)[1], rtol=1e-5, atol=1e-5
    )


def test_an_evaluation_makes_no_gradient():
    """Under no_grad with trainable weights, as in the evaluations of full fine-tuning."""
    hidden, weight, labels = example(40)
    with torch.no_grad(), Allocations() as made:
        loss = cross_entropy_sum(hidden, weight, labels)
    assert (VOCAB, D) not in made.shapes and not loss.requires_grad
    torch.testing.assert_close(
        loss.double(), expected(hidden, weight, labels)[0], rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("seed", range(3))
def test_documents_add_up(seed: int):
    lengths = [1, *random.Random(seed).choices(range(1, 15), k=6), 1]
    hidden, weight, labels = example(sum(lengths))
    for document in labels.split(lengths):
        document[0] = -100
    whole = cross_entropy_sum(hidden, weight, labels)
    documents = zip(hidden.split(lengths), labels.split(lengths), strict=True)
    alone = torch.stack([cross_entropy_sum(h, weight, y) for h, y in documents]).sum()
    torch.testing.assert_close(whole, alone)
    packed_grads = torch.autograd.grad(whole, (hidden, weight))
    summed_grads = torch.autograd.grad(alone, (hidden, weight))
    for packed, summed in zip(packed_grads, summed_grads, strict=True):
        torch.testing.assert_close(packed, summed, rtol=1e-5, atol=1e-5)


def test_autocast_changes_nothing():
    """The training loop's autocast region must not turn the sums into bfloat16."""
    hidden, weight, labels = example(40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equals_float64(hidden, weight, labels)


# ---- blocks, tiles, devices


def loss_and_gradients(hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    loss = cross_entropy_sum(hidden, weight, labels)
    trained = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, trained)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_change_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    hidden, weight, labels = example(90)
    hidden = hidden.detach().to(dtype).requires_grad_()
    results, num_blocks = [], []
    for rows in (1000, 7, 1):
        monkeypatch.setitem(loss_module.BLOCK_ELEMENTS, "cpu", rows * VOCAB)
        with Allocations() as made:
            results.append(loss_and_gradients(hidden, weight, labels))
        num_blocks.append(sum(shape == (rows, 1) for shape in made.shapes))
    for result in results[1:]:
        for value, reference in zip(result, results[0], strict=True):
            assert torch.equal(value, reference)
    assert num_blocks[0] == 0 and num_blocks[1] >= 8  # 8 whole blocks of 7 rows


def test_a_weight_of_16_bits_is_cast_in_tiles(monkeypatch: pytest.MonkeyPatch):
    """As on a CPU that has no bfloat16 and computes in fp32."""
    hidden, weight, labels = example(90)
    stored = weight.detach().to(torch.bfloat16)
    reference = loss_and_gradients(hidden, stored.float(), labels)
    one_tile = loss_and_gradients(hidden, stored, labels)
    assert all(map(torch.equal, one_tile, reference))

    tile_rows = VOCAB // 3 + 1
    monkeypatch.setattr(loss_module, "TILE_ELEMENTS", tile_rows * D)
    with Allocations() as made:
        tiled = loss_and_gradients(hidden, stored, labels)
    assert (VOCAB, D) not in made.shapes and (tile_rows, D) in made.shapes
    for value, expected_value in zip(tiled, reference, strict=True):
        torch.testing.assert_close(value, expected_value, rtol=1e-5, atol=1e-5)


def test_a_gpu_computes_more_rows_at_a_time():
    rows = {
        device: loss_module._max_rows(loss_module.CHUNK_ELEMENTS, 128256, torch.device(device))
        for device in ("cpu", "cuda")
    }
    assert rows == {"cpu": 130, "cuda": 1046}
