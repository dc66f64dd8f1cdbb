"""Quantised linear layers: what they hold, give and keep, which checkpoints are refused, and what loading costs.

The bytes themselves are compared with transformers' in parity/test_quant.py.
"""

import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import minilora
import train
from minilora.build import Built, build_model, recompute_blocks
from minilora.config import LoraConfig, UserError
from minilora.lora import lora_layers
from minilora.model import CausalLM, DecoderConfig
from minilora.quant import Int8Linear, NF4Linear, QuantizedLinear, quantize_linears
from minilora.weights import load_weights
from tiny_models import config_json, random_tokens, tiny
from tiny_runs import base_model, config

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
TOKENS = random_tokens(24)
SIZES = {"hidden_size": 128, "intermediate_size": 192}  # rows of whole blocks of 64; more than one nested block of 256
K_PROJ = "model.layers.1.self_attn.k_proj"
FLOATS = [torch.float32, torch.bfloat16, torch.float16]

# QLoRA (arXiv 2305.14314), appendix E
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip

KINDS = {"nf4 double": (4, True), "nf4": (4, False), "int8": (8, True)}  # bits, double_quant
EVERY_KIND = pytest.mark.parametrize(("bits", "double_quant"), KINDS.values(), ids=KINDS)
BOTH_NF4 = pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
BOTH_WIDTHS = pytest.mark.parametrize("bits", [4, 8])
# out, in: whole blocks in each row, blocks that cross rows, a last block cut short; rows of 16s that start inside a block,
# which get the wrong absmax from bitsandbytes 0.50.2 on CPUs with AVX-512
SHAPES = pytest.mark.parametrize("shape", [(192, 128), (24, 40), (7, 50), (40, 48)], ids=["whole", "crossing", "cut", "sixteens"])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_of(weight: Tensor, bits: int, double_quant: bool = True, bias: Tensor | None = None) -> QuantizedLinear:
    """A quantised layer filled from a checkpoint that holds nothing else, as build_model does it."""
    base = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    model = nn.ModuleDict({"layer": base}).requires_grad_(False)
    layers = quantize_linears(model, bits, double_quant, ())
    with tempfile.TemporaryDirectory() as directory:
        tensors = {"layer.weight": weight.contiguous()} | ({} if bias is None else {"layer.bias": bias})
        save_file(tensors, Path(directory) / "model.safetensors")
        load_weights(model.to(weight.dtype), Path(directory), CPU, weight.dtype, layers)
    return layers["layer"]


def build(directory: Path, bits: int, double_quant: bool = True, **options) -> Built:
    return build_model(directory, CPU, bits=bits, double_quant=double_quant, **options)


def quantised(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    return ((path, m) for path, m in model.named_modules() if isinstance(m, QuantizedLinear))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 (with biases) in 32 bits; not to be changed."""
    directory = tmp_path_factory.mktemp("plain")
    tiny("qwen2", **SIZES).save_pretrained(directory)
    return directory


def store_quantised(source: Path, directory: Path, bits: int, double_quant: bool = True, **settings) -> Path:
    """A checkpoint that transformers quantised and saved."""
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double_quant}
    quantization = BitsAndBytesConfig(**{**(nf4 if bits == 4 else {"load_in_8bit": True}), **settings})
    hf = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, quantization_config=quantization)
    hf.save_pretrained(directory)
    return directory


# ---- what a layer holds


def nibbles(layer: NF4Linear) -> list[int]:
    """The index of each weight, in row order; of the two in a byte, the upper half comes first."""
    return [nibble for byte in layer.weight.flatten().tolist() for nibble in (byte >> 4, byte & 15)]


def scales(layer: NF4Linear) -> list[float]:
    """The absmax of each block."""
    if not layer.double_quant:
        return layer.absmax.flatten().view(torch.float32).tolist()
    code, nested, offset = layer.nested_code.tolist(), layer.nested_absmax.tolist(), layer.offset.item()
    return [code[byte] * nested[block // 256] + offset for block, byte in enumerate(layer.absmax.flatten().tolist())]


@SHAPES
@BOTH_NF4
def test_nf4_is_what_the_paper_says(shape, double_quant):
    weight = normal(*shape)
    layer = layer_of(weight, 4, double_quant)
    absmax, blocks = scales(layer), weight.flatten().split(64)
    assert len(absmax) == len(blocks)
    by_hand = torch.tensor([NF4[nibble] * absmax[i // 64] for i, nibble in enumerate(nibbles(layer))]).view(shape)
    torch.testing.assert_close(layer.dequantize(torch.float32), by_hand, rtol=1e-6, atol=1e-7)
    for i, block in enumerate(blocks):
        largest = block.abs().max().item()
        # 8 bits keep the scales, less their mean, to about 1% of the largest
        assert absmax[i] == pytest.approx(largest, rel=0.03 if double_quant else 1e-7)
        chosen = torch.tensor(NF4)[nibbles(layer)[64 * i : 64 * i + len(block)]]
        distances = (block[:, None] / largest - torch.tensor(NF4)).abs()
        torch.testing.assert_close((block / largest - chosen).abs(), distances.min(dim=1).values, rtol=0, atol=1e-6)


@SHAPES
@BOTH_NF4
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nf4_is_dequantised_as_bitsandbytes_does(shape, double_quant, dtype):
    weight = normal(*shape).to(dtype)
    layer = layer_of(weight, 4, double_quant)
    one_row = weight.view(1, -1)  # so that it finds the right absmax for every shape, see SHAPES
    packed, state = bnb.quantize_4bit(one_row, blocksize=64, compress_statistics=double_quant, quant_type="nf4")
    theirs = bnb.dequantize_4bit(packed, state).view(shape)
    assert theirs.dtype == dtype
    assert torch.equal(layer.dequantize(dtype), theirs)
    rounded = layer.dequantize(torch.float32).to(dtype)
    torch.testing.assert_close(layer.dequantize(dtype), rounded)  # a layer dequantises to any dtype


@SHAPES
def test_int8_is_what_the_paper_says(shape):
    weight = normal(*shape)
    layer = layer_of(weight, 8)
    half = weight.half().float()  # LLM.int8 starts from 16 bits
    largest = half.abs().amax(dim=1)
    assert torch.equal(layer.SCB.view(torch.float32), largest)
    steps = half * 127 / largest[:, None]
    assert (layer.weight - steps).abs().max() <= 0.5 + 1e-4
    torch.testing.assert_close(layer.dequantize(torch.float32), layer.weight * largest[:, None] / 127)
    theirs = bnb.int8_vectorwise_dequant(layer.weight, layer.SCB.view(torch.float32))
    torch.testing.assert_close(layer.dequantize(torch.float32), theirs, rtol=1e-6, atol=0)


@EVERY_KIND
def test_parameters_are_frozen_integers(plain, bits, double_quant):
    built = build(plain, bits, double_quant, lora=LoraConfig(rank=4))
    assert {path.split(".")[-2] for path, _ in quantised(built.model)} == set(LoraConfig().target_modules)
    statistics = {"absmax": torch.uint8 if double_quant else torch.int32} if bits == 4 else {"SCB": torch.int32}
    expected = {"weight": torch.uint8 if bits == 4 else torch.int8, **statistics}
    for path, layer in quantised(built.model):
        parameters = {name: p for name, p in layer.named_parameters() if name != "bias"}
        assert {name: p.dtype for name, p in parameters.items()} == expected, path
        assert len(layer.weight) == len(parameters[next(iter(statistics))]) == layer.out_features, path  # to shard by rows
    for name, p in built.model.named_parameters():
        assert p.requires_grad == (".lora_" in name), name
        assert not p.is_meta, name
    assert built.parameters == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(plain).parameters())


@EVERY_KIND
@SHAPES
def test_casting_the_model_leaves_the_bits_alone(shape, bits, double_quant):
    layer = layer_of(normal(*shape), bits, double_quant)
    before = {name: p.clone() for name, p in layer.named_parameters()}
    nn.Sequential(layer).to(torch.bfloat16)
    assert {"weight", "absmax" if bits == 4 else "SCB"} == before.keys()
    for name, p in layer.named_parameters():
        assert p.dtype == before[name].dtype and torch.equal(p, before[name]), name


@pytest.mark.parametrize(("bits", "rows"), [(4, (64, 128)), (4, (1, 2)), (8, (64, 128)), (8, (1, 2))])
def test_rows_quantised_alone_are_rows_of_the_whole(bits, rows):
    """What sharding by rows relies on: a rank quantises its own."""
    weight = normal(192, 128)
    whole, part = layer_of(weight, bits, False), layer_of(weight[slice(*rows)], bits, False)
    for name in whole.holds:
        assert torch.equal(getattr(part, name), getattr(whole, name)[slice(*rows)]), name


# ---- what a layer gives, and what it keeps


@SHAPES
@EVERY_KIND
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_gradient_of_the_input_is_that_of_the_dequantised_product(shape, bits, double_quant, dtype, training):
    """In eval mode LLM.int8 rounds its input; the gradient passes straight through, as in bitsandbytes."""
    weight, bias = normal(*shape).to(dtype), normal(shape[0], seed=1).to(dtype)
    layer = layer_of(weight, bits, double_quant, bias).train(training)
    x = normal(9, shape[1], seed=2).to(dtype).requires_grad_()
    reference = x.detach().clone().requires_grad_()
    grad = normal(9, shape[0], seed=3).to(dtype)
    out, expected = layer(x), F.linear(reference, layer.dequantize(dtype), layer.bias)
    out.backward(grad)
    expected.backward(grad)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(x.grad, reference.grad, **tolerance)
    if training or bits == 4:
        torch.testing.assert_close(out, expected, **tolerance)
    else:
        assert (out - expected).norm() < 0.03 * expected.norm()
    torch.testing.assert_close(out.detach(), layer(x.detach()), **tolerance)  # the same with and without a graph


@EVERY_KIND
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_output_is_a_fresh_tensor(bits, double_quant, graph, training):
    """LoRA adds into it."""
    layer = layer_of(normal(192, 128), bits, double_quant, bias=normal(192, seed=1)).train(training)
    x = normal(9, 128, seed=2).requires_grad_(graph)
    first = layer(x)
    assert first.requires_grad == graph
    kept = first.detach().clone()
    first.add_(1.0)
    assert torch.equal(layer(x), kept)
    assert torch.equal(first, kept + 1.0)


def float_tensors(numel: int) -> int:
    """How many floating-point tensors of this size are alive, of those made since gc.freeze."""
    tensors = (t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter))
    return sum(t.is_floating_point() and t.numel() == numel for t in tensors)


@pytest.fixture
def frozen() -> Iterator[None]:
    """What is alive now is left out of gc.get_objects."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@EVERY_KIND
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_layer_keeps_no_dequantised_weight(bits, double_quant, training, frozen):
    layer = layer_of(normal(320, 192), bits, double_quant).train(training)
    size = layer.out_features * layer.in_features
    x = normal(9, 192, seed=1).requires_grad_()
    gc.collect()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = layer(x)
    assert [t.shape for t in saved if t.is_floating_point() and t.numel() >= size] == []
    assert float_tensors(size) == 0
    assert out.grad_fn is not None  # the graph is alive
    dequantised = layer.dequantize(torch.float32)
    assert float_tensors(size) > 0 and dequantised.shape == (320, 192)  # one would have been seen


def with_random_adapters(model: CausalLM) -> CausalLM:
    """B is not zero, so that every A has a gradient."""
    for i, (_, layer) in enumerate(lora_layers(model)):
        nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(i))
    return model


def loss_of(model: CausalLM) -> Tensor:
    lengths = [10, len(TOKENS) - 10]
    return F.cross_entropy(model(TOKENS, lengths), TOKENS.roll(-1))


@EVERY_KIND
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "recomputed"])
def test_adapters_get_the_gradients_of_the_dequantised_base(plain, bits, double_quant, checkpointing):
    lora = LoraConfig(rank=4, alpha=8)
    model = with_random_adapters(build(plain, bits, double_quant, lora=lora, gradient_checkpointing=checkpointing).model)
    ordinary = with_random_adapters(build(plain, 16, lora=lora).model)
    for path, layer in quantised(model):
        ordinary.get_submodule(path).weight.data = layer.dequantize(torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = loss_of(model)
    shapes = {(layer.out_features, layer.in_features) for _, layer in quantised(model)}
    assert not [t for t in saved if t.is_floating_point() and ({tuple(t.shape), tuple(t.shape[::-1])} & shapes)]
    expected = loss_of(ordinary)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    theirs = {name: p.grad for name, p in ordinary.named_parameters() if p.requires_grad}
    ours = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys() and len(ours) == 2 * 7 * 2
    for name, grad in ours.items():
        assert theirs[name].abs().max() > 0, name
        torch.testing.assert_close(grad, theirs[name], rtol=1e-3, atol=1e-4 * theirs[name].abs().max().item(), msg=name)


@EVERY_KIND
def test_recomputing_the_blocks_changes_nothing(plain, bits, double_quant):
    gradients = []
    for checkpointing in (False, True):
        model = with_random_adapters(build(plain, bits, double_quant, lora=LoraConfig(rank=4)).model)
        recompute_blocks(model) if checkpointing else None
        loss_of(model).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for kept, recomputed in zip(*gradients, strict=True):
        assert torch.equal(kept, recomputed)


# ---- checkpoints that are refused


def copied(source: Path, directory: Path) -> Path:
    directory.mkdir()
    for file in source.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Rewrite a checkpoint of one file with other tensors in it."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, file, metadata={"format": "pt"})
    return directory


def change_config(directory: Path, change: Callable[[dict], object]) -> Path:
    raw = json.loads((directory / "config.json").read_text())
    change(raw)
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


@pytest.fixture(scope="module")
def nf4_double(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store_quantised(plain, tmp_path_factory.mktemp("nf4-double"), 4)


@pytest.fixture(scope="module")
def nf4_single(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store_quantised(plain, tmp_path_factory.mktemp("nf4-single"), 4, double_quant=False)


@pytest.fixture(scope="module")
def int8(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store_quantised(plain, tmp_path_factory.mktemp("int8"), 8)


def stored(request: pytest.FixtureRequest, kind: str) -> tuple[Path, int]:
    """(directory, bits) of a checkpoint that is quantised already."""
    return request.getfixturevalue(kind), 8 if kind == "int8" else 4


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_other_quantisers_are_refused(plain, tmp_path, bits):
    directory = copied(plain, tmp_path / "gptq")
    change_config(directory, lambda raw: raw.update(quantization_config={"quant_method": "gptq", "bits": 4}))
    with pytest.raises(UserError, match=r"config\.json: quantization_config of 'gptq'"):
        build(directory, bits)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_fp4_is_refused(plain, tmp_path, bits):
    directory = store_quantised(plain, tmp_path / "fp4", 4, bnb_4bit_quant_type="fp4")
    with pytest.raises(UserError, match=r"config\.json: quantization_config\.bnb_4bit_quant_type = 'fp4'"):
        build(directory, bits)


@pytest.mark.parametrize(("kind", "asked"), [("nf4_double", 16), ("nf4_double", 8), ("int8", 16), ("int8", 4)])
def test_other_bits_than_those_stored_are_refused(request, kind, asked):
    directory, bits = stored(request, kind)
    with pytest.raises(UserError, match=rf"{directory.name}.* is quantised to {bits} bits already: set model\.bits={bits}"):
        build(directory, asked)


NF4_PARTS = ["weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"]
NESTED_PARTS = ["weight.nested_absmax", "weight.nested_quant_map"]
PARTS = {"nf4_single": NF4_PARTS, "nf4_double": [*NF4_PARTS, *NESTED_PARTS], "int8": ["weight", "SCB"]}


@pytest.mark.parametrize(("kind", "part"), [(kind, part) for kind, parts in PARTS.items() for part in parts])
def test_a_layer_that_lacks_a_tensor_is_refused(request, tmp_path, kind, part):
    source, bits = stored(request, kind)
    directory = change_tensors(copied(source, tmp_path / "broken"), lambda tensors: tensors.pop(f"{K_PROJ}.{part}"))
    with pytest.raises(UserError, match=K_PROJ.replace(".", r"\.")):
        build(directory, bits)


def test_nested_statistics_may_not_lack_together(nf4_double, tmp_path):
    """Scales in 8 bits are not taken for fp32 ones."""

    def strip(tensors: dict[str, Tensor]) -> None:
        for part in NESTED_PARTS:
            del tensors[f"{K_PROJ}.{part}"]

    directory = change_tensors(copied(nf4_double, tmp_path / "broken"), strip)
    with pytest.raises(UserError, match=K_PROJ.replace(".", r"\.")):
        build(directory, 4)


@pytest.mark.parametrize("kind", PARTS)
def test_a_weight_without_anything_beside_it_is_refused(request, tmp_path, kind):
    """Not taken for a layer that the checkpoint keeps in 16 bits."""
    source, bits = stored(request, kind)

    def strip(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.startswith(K_PROJ) and not n.endswith((".weight", ".bias"))]:
            del tensors[name]

    directory = change_tensors(copied(source, tmp_path / "broken"), strip)
    with pytest.raises(UserError, match=K_PROJ.replace(".", r"\.")):
        build(directory, bits)


MISSHAPED = {
    "nf4_double weight": lambda t: t[:-64],
    "nf4_double weight.absmax": lambda t: t[:-2],
    "nf4_double weight.nested_absmax": lambda t: torch.cat((t, t)),
    "nf4_double weight.nested_quant_map": lambda t: t[:16],
    "nf4_single weight": lambda t: torch.cat((t, t)),
    "nf4_single weight.absmax": lambda t: torch.cat((t, t)),
    "int8 weight": lambda t: t.t(),
    "int8 SCB": lambda t: t[:-1],
    "int8 bias": lambda t: t[:-1],
}


@pytest.mark.parametrize("case", MISSHAPED)
def test_a_tensor_of_another_shape_is_refused(request, tmp_path, case):
    kind, part = case.split()
    source, bits = stored(request, kind)
    name, change = f"{K_PROJ}.{part}", MISSHAPED[case]
    directory = change_tensors(copied(source, tmp_path / "broken"), lambda tensors: tensors.update({name: change(tensors[name])}))
    with pytest.raises(UserError, match=K_PROJ.replace(".", r"\.")):
        build(directory, bits)


def put(tensors: dict[str, Tensor], packed: Tensor, state: bnb.QuantState) -> None:
    """Give one layer of a checkpoint another quantised weight."""
    for name in [n for n in tensors if n.startswith(f"{K_PROJ}.weight")]:
        del tensors[name]
    tensors[f"{K_PROJ}.weight"] = packed
    tensors |= {f"{K_PROJ}.weight.{name}": t for name, t in state.as_dict(packed=True).items()}


@BOTH_NF4
@pytest.mark.parametrize("blocksize", [32, 128])
def test_other_block_sizes_are_refused(nf4_double, tmp_path, double_quant, blocksize):
    other = bnb.quantize_4bit(normal(64, 128), blocksize=blocksize, compress_statistics=double_quant, quant_type="nf4")
    directory = change_tensors(copied(nf4_double, tmp_path / "broken"), lambda tensors: put(tensors, *other))
    with pytest.raises(UserError, match=rf"k_proj is quantised in blocks of {blocksize}; only 64"):
        build(directory, 4)


def test_other_nested_block_sizes_are_refused(nf4_double, tmp_path):
    packed, state = bnb.quantize_4bit(normal(64, 128), blocksize=64, compress_statistics=True, quant_type="nf4")
    absmax = bnb.dequantize_blockwise(state.absmax, state.state2)
    state.absmax, state.state2 = bnb.quantize_blockwise(absmax, blocksize=64)
    directory = change_tensors(copied(nf4_double, tmp_path / "broken"), lambda tensors: put(tensors, packed, state))
    with pytest.raises(UserError, match=r"k_proj is quantised in blocks of .*nested 256"):
        build(directory, 4)


def test_a_weight_quantised_in_another_shape_is_refused(nf4_single, tmp_path):
    """As many bytes, of the transposed matrix."""
    other = bnb.quantize_4bit(normal(128, 64), blocksize=64, compress_statistics=False, quant_type="nf4")
    directory = change_tensors(copied(nf4_single, tmp_path / "broken"), lambda tensors: put(tensors, *other))
    with pytest.raises(UserError, match=K_PROJ.replace(".", r"\.")):
        build(directory, 4)


def test_another_outlier_threshold_is_refused(int8, tmp_path):
    """Its layers would compute something else than they were saved for."""
    directory = copied(int8, tmp_path / "threshold")
    raw = json.loads((directory / "config.json").read_text())
    raw["quantization_config"]["llm_int8_threshold"] = 3.0
    (directory / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"llm_int8_threshold = 3\.0"):
        build(directory, 8)


def test_a_quantised_head_is_refused(plain, tmp_path):
    directory = store_quantised(plain, tmp_path / "head", 4, llm_int8_skip_modules=["v_proj"])  # which drops the default
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        build(directory, 4)


def test_int8_in_the_order_of_one_kind_of_gpu_is_refused(int8, tmp_path):
    """What bitsandbytes wrote before 0.46 (2: col_turing); without the mark, which is older still, rows are meant."""
    mark = f"{K_PROJ}.weight_format"

    def turing(tensors: dict[str, Tensor]) -> None:
        tensors[mark] = torch.tensor(2, dtype=torch.uint8)

    with pytest.raises(UserError, match=r"k_proj .*weight_format.* save it again"):
        build(change_tensors(copied(int8, tmp_path / "turing"), turing), 8)
    unmarked = change_tensors(copied(int8, tmp_path / "unmarked"), lambda tensors: tensors.pop(mark))
    expected = build(int8, 8).model.state_dict()
    for name, tensor in build(unmarked, 8).model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_odd_rows_are_refused_in_4_bits_only(tmp_path):
    tiny("llama3", hidden_size=48, intermediate_size=51).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.down_proj has 51 input features.*use 8 or 16"):
        build(tmp_path, 4)
    with torch.no_grad():
        for training in (True, False):
            assert torch.isfinite(build(tmp_path, 8).model.train(training)(TOKENS)).all()


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_an_integer_weight_in_a_plain_checkpoint_is_refused(plain, tmp_path, bits):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{K_PROJ}.weight"] = tensors[f"{K_PROJ}.weight"].to(torch.int8)

    directory = change_tensors(copied(plain, tmp_path / "broken"), change)
    with pytest.raises(UserError, match=K_PROJ.replace(".", r"\.")):
        build(directory, bits)


@BOTH_WIDTHS
def test_a_plain_weight_of_another_shape_is_refused(plain, tmp_path, bits):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{K_PROJ}.weight"] = tensors[f"{K_PROJ}.weight"].t()

    directory = change_tensors(copied(plain, tmp_path / "broken"), change)
    with pytest.raises(UserError, match=K_PROJ.replace(".", r"\.") + r".*\[128, 64\]"):
        build(directory, bits)


# ---- loading: memory, imports, use


def run_python(code: str, *arguments: str) -> tuple[str, str]:
    """(stdout, stderr) of `code` in a fresh interpreter."""
    command = [sys.executable, "-c", code, *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout, run.stderr


LOAD = """
import sys
from pathlib import Path
import torch
from minilora.build import build_model
import minilora.quant

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

torch.set_num_threads(1)
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
model = build_model(Path(sys.argv[1]), torch.device("cpu"), bits=int(sys.argv[2])).model
held = sum(t.numel() * t.itemsize for t in [*model.parameters(), *model.buffers()])
print(held, memory("VmHWM") - before)
"""
MB = 1_000_000
NOISE = 12 * MB  # what the allocator rounds up and keeps
ROWS = 15000  # of the embedding


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random bfloat16 checkpoint of 300 MB, nearly all in the linear layers: they are what must not pile up.

    As in real models, the embedding is the largest tensor.
    """
    directory = tmp_path_factory.mktemp("large")
    raw = config_json(
        "llama3", hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=ROWS, tie_word_embeddings=True, torch_dtype="bfloat16",
    )  # fmt: skip
    (directory / "config.json").write_text(json.dumps(raw))
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in CausalLM(DecoderConfig.from_hf(raw)).named_parameters()}
    noise = normal(ROWS, 1024).mul_(0.02).to(torch.bfloat16).flatten()
    save_file({name: noise[: s.numel()].view(s).clone() for name, s in shapes.items()}, directory / "model.safetensors")
    return directory


@BOTH_WIDTHS
def test_loading_holds_the_quantised_model_and_a_few_tensors(large, bits):
    held, peak = map(int, run_python(LOAD, str(large), str(bits))[0].split())
    largest, total = ROWS * 1024 * 2, (large / "model.safetensors").stat().st_size
    allowed = held + 3 * largest + NOISE
    assert allowed < total  # so a model held in 16 bits on the way would not pass
    assert peak <= allowed, f"{peak / MB:.0f} MB for a model of {held / MB:.0f} MB and tensors of {largest / MB:.0f} MB"


BUILD = """
import sys
from pathlib import Path
import torch, minilora
from minilora.build import build_model
assert "bitsandbytes" not in sys.modules
for bits in (16, 8):
    build_model(Path(sys.argv[1]), torch.device("cpu"), bits=bits)
    assert ("bitsandbytes" in sys.modules) == (bits == 8), bits
"""
HELP = """
import runpy, sys
for script in ("train.py", "merge.py", "infer.py"):
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, stop.code
    assert "bitsandbytes" not in sys.modules, script
"""


def test_bitsandbytes_is_imported_by_quantised_models_only(plain):
    run_python(BUILD, str(plain))


def test_help_does_not_import_bitsandbytes():
    assert run_python(HELP)[0].count("--help") >= 3


def test_importing_quant_prints_nothing():
    assert run_python("import minilora.quant") == ("", "")


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_model(tmp_path_factory.mktemp("base"), **SIZES)


@pytest.mark.parametrize("bits", [4, 8, None])
def test_load_gives_a_model_ready_to_use(with_tokenizer, bits):
    model, tokenizer = minilora.load(str(with_tokenizer), bits=bits)
    kinds = {type(layer) for _, layer in quantised(model)}
    assert kinds == {4: {NF4Linear}, 8: {Int8Linear}, None: set()}[bits]
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    ids = torch.tensor(tokenizer.encode("Title: light").ids)
    with torch.no_grad():
        assert torch.isfinite(model(ids)).all()
    texts = minilora.generate(model, tokenizer, ["Title: light", "old"], max_new_tokens=5)
    assert len(texts) == 2 and all(isinstance(text, str) for text in texts)


def test_load_takes_the_bits_a_checkpoint_is_stored_in(with_tokenizer, tmp_path):
    for bits, kind in ((4, NF4Linear), (8, Int8Linear)):
        directory = store_quantised(with_tokenizer, copied(with_tokenizer, tmp_path / str(bits)), bits, double_quant=False)
        model, _ = minilora.load(str(directory), bits=None)
        layers = [layer for _, layer in quantised(model)]
        assert len(layers) == 14 and {type(layer) for layer in layers} == {kind}


@EVERY_KIND
def test_load_takes_the_bits_an_adapter_was_trained_over(with_tokenizer, tmp_path, bits, double_quant):
    c = config(tmp_path, with_tokenizer, rows=8, model__bits=bits, model__double_quant=double_quant, train__max_steps=1)
    assert train.main(c) == 0
    model, _ = minilora.load(f"{c.output_dir}/checkpoint-final", bits=None)
    layers = [layer for _, layer in quantised(model)]
    assert {type(layer) for layer in layers} == {NF4Linear if bits == 4 else Int8Linear}
    assert {getattr(layer, "double_quant", True) for layer in layers} == {double_quant}


def test_greedy_answers_in_4_bits_are_those_without_a_cache(with_tokenizer):
    model, tokenizer = minilora.load(str(with_tokenizer), bits=4)
    prompt = "Title: light of old music"
    ids = tokenizer.encode(prompt).ids
    answer: list[int] = []
    with torch.no_grad():
        for _ in range(8):
            answer.append(int(model(torch.tensor([*ids, *answer]))[-1].argmax()))
    assert tokenizer.eos_id not in answer
    assert minilora.generate(model, tokenizer, [prompt], max_new_tokens=8) == [tokenizer.decode_after(ids, answer)]
