"""Quantized linear layers: what they hold, what they compute, and what they keep.

Their bytes are compared with transformers' in parity/test_bitsandbytes.py.
"""

import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from helpers.quantized import (
    BOTH_NF4,
    EVERY_KIND,
    SIZES,
    build_training,
    normal,
    quantized_layers,
)
from helpers.tiny_models import random_tokens, tiny
from minilora.checkpoint.hf import load_weights
from minilora.config import LoraConfig
from minilora.distributed import Replicated
from minilora.errors import UserError
from minilora.model.block_execution import recompute_blocks
from minilora.model.lora import inject, lora_layers, merge_adapters
from minilora.model.quantization import NF4Linear, QuantizedLinear, quantize_linears
from minilora.model.transformer import CausalLM

CPU = torch.device("cpu")
TOKENS = random_tokens(24)
FLOATS = [torch.float32, torch.bfloat16, torch.float16]

# QLoRA (arXiv 2305.14314), appendix E
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip

# out and in features. Rows of 16s that start inside a block get the wrong absmax from bitsandbytes
# 0.50.2 on CPUs with AVX-512.
SHAPES = {
    "whole blocks in rows": (192, 128),
    "blocks across rows": (24, 40),
    "last block cut short": (7, 50),
    "rows of 16s": (40, 48),
}
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def layer_of(
    weight: Tensor, bits: int, double_quant: bool = True, bias: Tensor | None = None
) -> QuantizedLinear:
    """Load a quantized layer from a checkpoint of one layer, as a builder does."""
    base = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    model = nn.ModuleDict({"layer": base}).requires_grad_(False)
    layers = quantize_linears(model, bits, double_quant, ())
    tensors = {"layer.weight": weight.contiguous()}
    if bias is not None:
        tensors["layer.bias"] = bias
    with tempfile.TemporaryDirectory() as directory:
        save_file(tensors, Path(directory) / "model.safetensors")
        load_weights(model.to(weight.dtype), Path(directory), CPU, weight.dtype, layers)
    return layers["layer"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny Qwen2 (with biases) in 32 bits; not to be changed."""
    directory = tmp_path_factory.mktemp("plain")
    tiny("qwen2", **SIZES).save_pretrained(directory)
    return directory


# ---- what a layer holds


def indices_of(layer: NF4Linear) -> Tensor:
    """Return each weight's index in NF4, in row order; a byte's upper half comes first."""
    packed = layer.weight.flatten()
    return torch.stack((packed >> 4, packed & 15), dim=1).flatten().long()


def absmax_of(layer: NF4Linear) -> list[float]:
    """Return the absmax of each block."""
    absmax = layer.absmax.flatten()
    if not layer.double_quant:
        return absmax.view(torch.float32).tolist()
    code, nested, offset = layer.nested_code, layer.nested_absmax, layer.offset.item()
    return [
        code[byte].item() * nested[block // 256].item() + offset
        for block, byte in enumerate(absmax.tolist())
    ]


@EVERY_SHAPE
@BOTH_NF4
def test_nf4_is_what_the_paper_says(shape, double_quant):
    weight = normal(*shape)
    layer = layer_of(weight, 4, double_quant)
    quantiles = NF4[indices_of(layer)]
    absmax, blocks = absmax_of(layer), weight.flatten().split(64)
    assert len(absmax) == len(blocks)
    absmax_of_weight = torch.tensor(absmax).repeat_interleave(64)[: weight.numel()]
    by_hand = (quantiles * absmax_of_weight).view(shape)
    torch.testing.assert_close(layer.weight_in(torch.float32), by_hand, rtol=1e-6, atol=1e-7)

    for i, (block, rounded) in enumerate(zip(blocks, quantiles.split(64), strict=True)):
        largest = block.abs().max().item()
        # 8 bits keep the absmax values, less their mean, to about 1% of the largest
        assert absmax[i] == pytest.approx(largest, rel=0.03 if double_quant else 1e-7)
        distances = (block[:, None] / largest - NF4).abs()
        torch.testing.assert_close(
            (block / largest - rounded).abs(), distances.min(dim=1).values, rtol=0, atol=1e-6
        )


@EVERY_SHAPE
@BOTH_NF4
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nf4_is_dequantized_as_bitsandbytes_does(shape, double_quant, dtype):
    weight = normal(*shape).to(dtype)
    layer = layer_of(weight, 4, double_quant)
    one_row = weight.view(1, -1)  # as such it gets the right absmax in every shape, see SHAPES
    packed, state = bnb.quantize_4bit(
        one_row, blocksize=64, compress_statistics=double_quant, quant_type="nf4"
    )
    theirs = bnb.dequantize_4bit(packed, state).view(shape)
    assert theirs.dtype == dtype
    assert torch.equal(layer.weight_in(dtype), theirs)
    rounded = layer.weight_in(torch.float32).to(dtype)
    torch.testing.assert_close(layer.weight_in(dtype), rounded)  # a layer dequantizes to any dtype


@EVERY_SHAPE
def test_int8_is_what_the_paper_says(shape):
    weight = normal(*shape)
    layer = layer_of(weight, 8)
    half = weight.half().float()  # LLM.int8 starts from 16 bits
    largest = half.abs().amax(dim=1)
    scale = layer.SCB.view(torch.float32)
    assert torch.equal(scale, largest)

    steps = half * 127 / largest[:, None]
    assert (layer.weight - steps).abs().max() <= 0.5 + 1e-4
    dequantized = layer.weight_in(torch.float32)
    torch.testing.assert_close(dequantized, layer.weight * largest[:, None] / 127)
    theirs = bnb.int8_vectorwise_dequant(layer.weight, scale)
    torch.testing.assert_close(dequantized, theirs, rtol=1e-6, atol=0)


@EVERY_KIND
def test_parameters_are_frozen_integers(plain, bits, double_quant):
    loaded = build_training(plain, bits, double_quant, lora=LoraConfig(rank=4))
    layers = dict(quantized_layers(loaded.model))
    targets = {path.split(".")[-2] for path in layers}
    assert targets == set(LoraConfig().target_modules)

    if bits == 4:
        absmax_dtype = torch.uint8 if double_quant else torch.int32
        expected = {"weight": torch.uint8, "absmax": absmax_dtype}
    else:
        expected = {"weight": torch.int8, "SCB": torch.int32}
    for path, layer in layers.items():
        parameters = {name: p for name, p in layer.named_parameters() if name != "bias"}
        assert {name: p.dtype for name, p in parameters.items()} == expected, path
        assert set(layer.parameter_names) == expected.keys()
        for p in parameters.values():
            assert len(p) == layer.out_features, path  # so that sharding can split it by rows
    for name, p in loaded.model.named_parameters():
        assert p.requires_grad == (".lora_" in name), name
        assert not p.is_meta, name

    theirs = AutoModelForCausalLM.from_pretrained(plain)
    assert loaded.num_parameters == sum(p.numel() for p in theirs.parameters())


@EVERY_KIND
@EVERY_SHAPE
def test_casting_the_model_leaves_the_bits_alone(shape, bits, double_quant):
    layer = layer_of(normal(*shape), bits, double_quant)
    before = {name: p.clone() for name, p in layer.named_parameters()}
    nn.Sequential(layer).to(torch.bfloat16)
    assert before.keys() == {"weight", "absmax" if bits == 4 else "SCB"}
    for name, p in layer.named_parameters():
        assert p.dtype == before[name].dtype and torch.equal(p, before[name]), name


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [slice(64, 128), slice(1, 2)], ids=str)
def test_rows_quantized_alone_are_rows_of_the_whole(bits, rows):
    """Sharding by rows relies on it: a process quantizes its own."""
    weight = normal(192, 128)
    whole, part = layer_of(weight, bits, False), layer_of(weight[rows], bits, False)
    for name in whole.parameter_names:
        assert torch.equal(getattr(part, name), getattr(whole, name)[rows]), name


class SecondHalf(Replicated):
    """The layout of the second of two processes, as far as loading needs it."""

    shard_count = 2

    def __init__(self, whole: QuantizedLinear):
        self.whole = whole

    def local_rows(self, p: Tensor) -> slice:
        return slice(len(p) // 2, len(p))

    def full_tensor(self, rows: Tensor, like: Tensor) -> Tensor:
        # without double quantization absmax is held as it is
        first_half = self.whole.absmax.view(torch.float32)[: len(like) // 2]
        return torch.cat([first_half, rows])


@EVERY_KIND
@EVERY_SHAPE
def test_a_process_holds_its_rows_of_the_whole(shape, bits, double_quant):
    """Whether it quantizes them alone, or all rows because blocks span them."""
    shape = (2 * shape[0], shape[1])
    weight = normal(*shape)
    base = nn.Linear(shape[1], shape[0], bias=False, device="meta")
    model = nn.ModuleDict({"layer": base})
    half = quantize_linears(model, bits, double_quant, ())["layer"]
    layout = SecondHalf(layer_of(weight, bits, double_quant=False))
    reads = []

    def read(name: str, rows: slice) -> Tensor:
        reads.append((name, rows))
        return weight[rows]

    half.load(read, CPU, torch.float32, layout)
    own_rows = slice(shape[0] // 2, shape[0]) if half.rows_independent else slice(None)
    assert reads == [("weight", own_rows)]
    whole = layer_of(weight, bits, double_quant)
    for name in whole.parameter_names:
        rows = getattr(whole, name)
        assert torch.equal(getattr(half, name), rows[layout.local_rows(rows)]), name
    for name, buffer in whole.named_buffers():
        assert torch.equal(half.get_buffer(name), buffer), name


def test_odd_rows_are_refused_in_4_bits_only():
    model = nn.ModuleDict({"layer": nn.Linear(51, 8)})
    with pytest.raises(UserError, match=r"layer has 51 input features.*use 8 or 16"):
        quantize_linears(model, 4, True, ())
    assert quantize_linears(model, 8, True, ()).keys() == {"layer"}


# ---- what a layer computes


@EVERY_SHAPE
@EVERY_KIND
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_gradient_of_the_input_is_that_of_the_dequantized_product(
    shape, bits, double_quant, dtype, training
):
    """In eval mode LLM.int8 rounds its input; as in bitsandbytes, the gradient ignores that."""
    weight, bias = normal(*shape).to(dtype), normal(shape[0], seed=1).to(dtype)
    layer = layer_of(weight, bits, double_quant, bias).train(training)
    x = normal(9, shape[1], seed=2).to(dtype).requires_grad_()
    reference = x.detach().clone().requires_grad_()
    grad = normal(9, shape[0], seed=3).to(dtype)
    out, expected = layer(x), F.linear(reference, layer.weight_in(dtype), layer.bias)
    out.backward(grad)
    expected.backward(grad)

    error = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(x.grad, reference.grad, rtol=error, atol=error)
    if training or bits == 4:
        torch.testing.assert_close(out, expected, rtol=error, atol=error)
    else:
        assert (out - expected).norm() < 0.03 * expected.norm()
    without_graph = layer(x.detach())
    torch.testing.assert_close(out.detach(), without_graph, rtol=error, atol=error)


@EVERY_KIND
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_output_is_a_new_tensor(bits, double_quant, graph, training):
    """LoRA adds into it."""
    layer = layer_of(normal(192, 128), bits, double_quant, bias=normal(192, seed=1)).train(training)
    x = normal(9, 128, seed=2).requires_grad_(graph)
    first = layer(x)
    assert first.requires_grad == graph
    kept = first.detach().clone()
    first.add_(1.0)
    assert torch.equal(layer(x), kept)
    assert torch.equal(first, kept + 1.0)


def test_adapters_over_quantized_layers_are_not_merged(plain):
    model = build_training(plain, 4).model
    inject(model, LoraConfig(rank=4, target_modules=("q_proj",)))
    merge_adapters(model)
    assert len(list(lora_layers(model))) == 2


# ---- what a layer keeps


def num_float_tensors(numel: int) -> int:
    """Count the living floating-point tensors of this size that were made since gc.freeze."""
    tensors = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)]
    return sum(t.is_floating_point() and t.numel() == numel for t in tensors)


@pytest.fixture
def frozen_objects() -> Iterator[None]:
    """Leave what is alive now out of gc.get_objects."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@contextmanager
def recorded_saved_tensors() -> Iterator[list[Tensor]]:
    """Collect the tensors that autograd saves for the backward pass."""
    tensors: list[Tensor] = []

    def record(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        yield tensors


@EVERY_KIND
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_layer_keeps_no_dequantized_weight(bits, double_quant, training, frozen_objects):
    layer = layer_of(normal(320, 192), bits, double_quant).train(training)
    size = layer.out_features * layer.in_features
    x = normal(9, 192, seed=1).requires_grad_()
    gc.collect()
    with recorded_saved_tensors() as saved:
        out = layer(x)
    assert not [t for t in saved if t.is_floating_point() and t.numel() >= size]
    assert num_float_tensors(size) == 0
    assert out.grad_fn is not None  # the graph is alive
    dequantized = layer.weight_in(torch.float32)
    assert num_float_tensors(size) > 0  # the count would have seen one
    assert dequantized.shape == (320, 192)


def with_random_adapters(model: CausalLM) -> CausalLM:
    """Give B values, so that every A has a gradient."""
    for i, (_, layer) in enumerate(lora_layers(model)):
        nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(i))
    return model


def loss_of(model: CausalLM) -> Tensor:
    lengths = [10, len(TOKENS) - 10]
    return F.cross_entropy(model(TOKENS, lengths), TOKENS.roll(-1))


def trained_gradients(model: CausalLM) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@EVERY_KIND
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "recomputed"])
def test_adapters_get_the_gradients_of_the_dequantized_base(
    plain, bits, double_quant, checkpointing
):
    lora = LoraConfig(rank=4, alpha=8)
    loaded = build_training(
        plain, bits, double_quant, lora=lora, gradient_checkpointing=checkpointing
    )
    model = with_random_adapters(loaded.model)
    ordinary = with_random_adapters(build_training(plain, 16, lora=lora).model)
    layers = dict(quantized_layers(model))
    for path, layer in layers.items():
        ordinary.get_submodule(path).weight.data = layer.weight_in(torch.float32)

    with recorded_saved_tensors() as saved:
        loss = loss_of(model)
    shapes = {(layer.out_features, layer.in_features) for layer in layers.values()}
    transposed = {(columns, rows) for rows, columns in shapes}
    float_shapes = {tuple(t.shape) for t in saved if t.is_floating_point()}
    assert not float_shapes & (shapes | transposed)

    expected = loss_of(ordinary)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    ours, theirs = trained_gradients(model), trained_gradients(ordinary)
    assert ours.keys() == theirs.keys() and len(ours) == 2 * 7 * 2
    for name, grad in ours.items():
        largest = theirs[name].abs().max().item()
        assert largest > 0, name
        torch.testing.assert_close(grad, theirs[name], rtol=1e-3, atol=1e-4 * largest, msg=name)


@EVERY_KIND
def test_recomputing_the_blocks_changes_nothing(plain, bits, double_quant):
    gradients = []
    for checkpointing in (False, True):
        loaded = build_training(plain, bits, double_quant, lora=LoraConfig(rank=4))
        model = with_random_adapters(loaded.model)
        if checkpointing:
            recompute_blocks(model, len(model.model.layers))
        loss_of(model).backward()
        gradients.append(trained_gradients(model))
    kept, recomputed = gradients
    for name, grad in kept.items():
        assert torch.equal(grad, recomputed[name])
