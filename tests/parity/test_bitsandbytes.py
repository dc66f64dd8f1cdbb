"""Quantised linear layers against transformers' BitsAndBytesConfig: bytes, logits, and checkpoints in both directions.

The 4-bit reference runs in train mode on embeddings that require a gradient (dropout is 0): in eval mode some CPUs take a
kernel that rounds to bfloat16, and that fails on shapes which are no multiple of its block.
"""

from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import minilora
from minilora.build import build_model
from minilora.config import LoraConfig
from minilora.model import CausalLM
from minilora.quant import Int8Linear, NF4Linear, QuantizedLinear
from minilora.weights import weight_map
from tiny_models import WINDOW, random_tokens, tiny
from tiny_runs import base_model

CPU = torch.device("cpu")
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
NAMES = {FLOAT32: "float32", BFLOAT16: "bfloat16"}
TOKENS = random_tokens(40)
assert len(TOKENS) > WINDOW  # Mistral's window hides something

FAMILIES = ["llama3", "mistral_v1", "qwen2", "qwen3"]
WHOLE = {"hidden_size": 128, "intermediate_size": 192}  # rows are whole blocks of 64; more than one nested block of 256
CROSSING = {"hidden_size": 40, "intermediate_size": 50}  # blocks cross rows, and down_proj's last one is cut short
SIXTEENS = {"hidden_size": 48, "intermediate_size": 80}  # the same, with rows that SIMD code finds tempting
SHAPES = pytest.mark.parametrize("sizes", [WHOLE, CROSSING], ids=["whole", "crossing"])
ALL_SHAPES = pytest.mark.parametrize("sizes", [WHOLE, CROSSING, SIXTEENS], ids=["whole", "crossing", "sixteens"])
KINDS = {"nf4 double": (4, True), "nf4": (4, False), "int8": (8, True)}  # bits, double_quant
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
EVERY_KIND = pytest.mark.parametrize(("bits", "double_quant"), KINDS.values(), ids=KINDS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """The directory of a tiny random model, each made once."""
    made: dict[str, Path] = {}

    def make(family: str, sizes: dict, dtype: torch.dtype = FLOAT32) -> Path:
        key = f"{family}-{sizes['hidden_size']}-{NAMES[dtype]}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp(key)
            tiny(family, torch_dtype=NAMES[dtype], **sizes).save_pretrained(made[key])
        return made[key]

    return make


def reference(directory: Path, bits: int, double_quant: bool, dtype: torch.dtype = FLOAT32, **settings) -> PreTrainedModel:
    """transformers' model, quantised while it is loaded."""
    settings |= (
        {
            "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double_quant,
            "bnb_4bit_compute_dtype": dtype,
        }
        if bits == 4
        else {"load_in_8bit": True}
    )  # fmt: skip
    config = BitsAndBytesConfig(**settings)
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, quantization_config=config, attn_implementation="eager"
    ).train()


def built(directory: Path, bits: int, double_quant: bool = True, dtype: str = "auto", **options) -> CausalLM:
    return build_model(directory, CPU, dtype, bits=bits, double_quant=double_quant, **options).model


def reference_logits(hf: nn.Module) -> Tensor:
    """Logits [T, V] of TOKENS, in train mode as said above, in eval mode without a gradient."""
    embeddings = hf.get_input_embeddings()(TOKENS.unsqueeze(0)).detach().requires_grad_(hf.training)
    with torch.set_grad_enabled(hf.training):
        return hf(inputs_embeds=embeddings, use_cache=False).logits.squeeze(0).detach()


@torch.no_grad()
def logits(model: CausalLM) -> Tensor:
    return model(TOKENS)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def assert_same_bits(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Equal to the bit, whatever dtype the bits are called."""
    ours, theirs = (t.detach().contiguous().flatten() for t in (ours, theirs))
    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), what


def quantised(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    return ((path, m) for path, m in model.named_modules() if isinstance(m, QuantizedLinear))


def assert_holds_the_same(model: CausalLM, hf: PreTrainedModel) -> None:
    """Every linear layer of the blocks holds, to the bit, what the reference's does; all other tensors are equal too."""
    layers = dict(quantised(model))
    assert len(layers) == 7 * len(model.model.layers)
    for path, layer in layers.items():
        theirs = hf.get_submodule(path).weight
        assert_same_bits(layer.weight, theirs, path)
        if isinstance(layer, Int8Linear):
            assert layer.weight.dtype == torch.int8
            assert_same_bits(layer.SCB, theirs.SCB, path)
            continue
        state = theirs.quant_state
        assert isinstance(layer, NF4Linear) and layer.double_quant == state.nested
        assert_same_bits(layer.absmax, state.absmax, path)
        if state.nested:
            assert_same_bits(layer.nested_absmax, state.state2.absmax, path)
            assert_same_bits(layer.nested_code, state.state2.code, path)
            assert_same_bits(layer.offset, state.offset, path)
    theirs = hf.state_dict()
    quantised_weights = {f"{path}.{name}" for path, layer in layers.items() for name in layer.holds}
    for name, p in model.named_parameters():
        if name not in quantised_weights:
            assert p.dtype == theirs[name].dtype and torch.equal(p, theirs[name]), name


# ---- what a layer holds


@EVERY_FAMILY
@ALL_SHAPES
@pytest.mark.parametrize("stored", [FLOAT32, BFLOAT16], ids=lambda dtype: f"stored {NAMES[dtype]}")
@pytest.mark.parametrize("run", [FLOAT32, BFLOAT16], ids=lambda dtype: f"run {NAMES[dtype]}")
@EVERY_KIND
def test_layers_hold_the_bits_of_transformers(checkpoint, family, sizes, stored, run, bits, double_quant):
    directory = checkpoint(family, sizes, stored)
    model = built(directory, bits, double_quant, NAMES[run])
    assert_holds_the_same(model, reference(directory, bits, double_quant, run))


def test_a_bfloat16_run_rounds_before_it_quantises(checkpoint):
    """Without this the case above, of an fp32 checkpoint in a bfloat16 run, could not tell the two orders apart."""
    directory = checkpoint("llama3", WHOLE)
    rounded, exact = (dict(quantised(built(directory, 4, dtype=dtype))) for dtype in ("bfloat16", "float32"))
    assert any(not torch.equal(layer.weight, exact[path].weight) for path, layer in rounded.items())


# ---- logits


@EVERY_FAMILY
@SHAPES
@EVERY_KIND
def test_logits_are_those_of_transformers(checkpoint, family, sizes, bits, double_quant):
    directory = checkpoint(family, sizes)
    ours, theirs = (
        logits(built(directory, bits, double_quant)),
        reference_logits(reference(directory, bits, double_quant)),
    )
    assert_close(ours, theirs)
    assert (ours - logits(built(directory, 16))).abs().max() > 0.1  # quantised at all


def by_hand(weight: Tensor, state: QuantState) -> Tensor:
    """What a packed weight stands for, in plain torch: bitsandbytes 0.50.2 takes the wrong absmax on CPUs with AVX-512 where
    rows of 16s start inside a block, so there its own product is no reference."""
    packed, absmax = weight.detach().flatten(), state.absmax
    if state.nested:
        absmax = state.state2.code[absmax.int()] * state.state2.absmax.repeat_interleave(256)[: len(absmax)] + state.offset
    values = state.code[torch.stack((packed >> 4, packed & 15), dim=1).flatten().int()]
    return (values * absmax.repeat_interleave(64)[: len(values)]).view(state.shape)


@EVERY_FAMILY
@ALL_SHAPES
@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
def test_nf4_logits_are_those_of_the_weights_that_the_bits_stand_for(checkpoint, family, sizes, double_quant):
    """transformers' unquantised model with its quantised model's weights, dequantised by hand."""
    directory = checkpoint(family, sizes)
    hf = AutoModelForCausalLM.from_pretrained(directory, dtype=FLOAT32, attn_implementation="eager")
    for path, module in reference(directory, 4, double_quant).named_modules():
        if isinstance(module, Linear4bit):
            hf.get_submodule(path).weight.data = by_hand(module.weight, module.weight.quant_state)
    model, theirs = built(directory, 4, double_quant), reference_logits(hf)
    assert_close(logits(model.train()), theirs)
    assert_close(logits(model.eval()), theirs)


@EVERY_FAMILY
@SHAPES
def test_nf4_logits_are_the_same_in_eval_mode(checkpoint, family, sizes):
    """Odd shapes included, on which bitsandbytes' own eval-mode kernel fails on some CPUs."""
    directory = checkpoint(family, sizes)
    assert_close(logits(built(directory, 4).eval()), reference_logits(reference(directory, 4, True)))


@EVERY_FAMILY
@SHAPES
def test_int8_logits_are_those_of_transformers_in_eval_mode(checkpoint, family, sizes):
    """LLM.int8: inputs in 8 bits too, and features that reach 6.0 apart; here layers with and without any occur."""
    directory = checkpoint(family, sizes)
    hf, model = reference(directory, 8, True).eval(), built(directory, 8).eval()
    largest: list[float] = []
    for _, layer in quantised(model):
        layer.register_forward_pre_hook(lambda _, inputs: largest.append(inputs[0].abs().max().item()))
    ours = logits(model)
    assert min(largest) < 6.0 < max(largest)
    assert_close(ours, reference_logits(hf))
    assert (ours - logits(model.train())).abs().max() > 0.1  # training on a CPU leaves the inputs as they are


@SHAPES
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=NAMES.values())
@pytest.mark.parametrize("outliers", [(), (3,), (0, 7, 30)], ids=["no outliers", "one", "three"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_int8_layers_equal_those_of_bitsandbytes(checkpoint, sizes, dtype, outliers, training):
    """Layer by layer on the same inputs, with a bias (Qwen2's q_proj) and without."""
    directory = checkpoint("qwen2", sizes, dtype)
    hf, model = reference(directory, 8, True, dtype).train(training), built(directory, 8).train(training)
    generator = torch.Generator().manual_seed(0)
    for path, layer in quantised(model):
        x = torch.rand(9, layer.in_features, generator=generator).mul_(11).sub_(5.5)  # below the threshold of 6.0
        for column in outliers:
            x[column % 9, column] = -20.0
        x = x.to(dtype)
        before = x.clone()
        with torch.no_grad():
            ours = layer(x)
        assert torch.equal(x, before), path  # quantising the inputs leaves the caller's alone
        theirs = hf.get_submodule(path)(x).detach()
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-5 if dtype == FLOAT32 else 1e-2, atol=1e-5)


@EVERY_FAMILY
@SHAPES
@EVERY_KIND
def test_bfloat16_is_as_exact_as_transformers(checkpoint, family, sizes, bits, double_quant):
    """Exact: the same quantised weights and rounded other ones, computed in fp32 without any quantised layer."""
    directory = checkpoint(family, sizes, BFLOAT16)
    model = built(directory, bits, double_quant)
    theirs = reference_logits(reference(directory, bits, double_quant, BFLOAT16)).float()
    exact_model = built(directory, 16, dtype="float32")
    for path, layer in quantised(model):
        exact_model.get_submodule(path).weight.data = layer.dequantize(FLOAT32)
    exact, ours = logits(exact_model), logits(model)
    assert ours.dtype == BFLOAT16
    assert (ours.float() - exact).norm() < 1.25 * (theirs - exact).norm()  # one draw of roundings each: 0.6 to 1.1
    assert (ours.float() - exact).norm() < 0.1 * exact.norm()


# ---- checkpoints that transformers has quantised


def assert_same_state(model: CausalLM, expected: CausalLM) -> None:
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and tensor.shape == theirs[name].shape, name
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("family", ["llama3", "qwen2"])
@SHAPES
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=NAMES.values())
@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"], ids=["one file", "shards"])
@EVERY_KIND
def test_a_checkpoint_of_transformers_equals_quantising_it_here(
    checkpoint, tmp_path, family, sizes, dtype, max_shard_size, bits, double_quant
):
    source = checkpoint(family, sizes, dtype)
    reference(source, bits, double_quant, dtype).save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(set(weight_map(tmp_path).values())) > 1) == (max_shard_size == "20KB")
    # what is stored decides, not the setting for what is quantised here
    model = built(tmp_path, bits, not double_quant)
    assert_same_state(model, built(source, bits, double_quant))
    if bits == 8:
        model.eval()
    assert torch.isfinite(logits(model)).all()


@SHAPES
@pytest.mark.parametrize("double_quant", [True, False])
def test_packed_bytes_may_be_stored_as_another_dtype(checkpoint, tmp_path, sizes, double_quant):
    """bnb_4bit_quant_storage, which FSDP users of other trainers set to their compute dtype."""
    source = checkpoint("mistral_v1", sizes, BFLOAT16)
    reference(source, 4, double_quant, BFLOAT16, bnb_4bit_quant_storage=BFLOAT16).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["model.layers.0.mlp.down_proj.weight"].dtype == BFLOAT16
    assert_same_state(built(tmp_path, 4), built(source, 4, double_quant))


@pytest.mark.parametrize("bits", [4, 8])
def test_layers_kept_in_16_bits_stay_so(checkpoint, tmp_path, bits, capfd):
    source = checkpoint("qwen2", WHOLE)
    hf = reference(source, bits, True, llm_int8_skip_modules=["v_proj", "lm_head"])
    hf.save_pretrained(tmp_path)
    model = built(tmp_path, bits)
    assert f"12 linear layers in {bits} bits, 2 kept in 16 by the checkpoint" in capfd.readouterr().err
    everywhere, plain = dict(quantised(built(source, bits))), built(source, 16)
    for path, layer in quantised(model):
        for name in layer.holds:
            assert torch.equal(getattr(layer, name), getattr(everywhere[path], name)), path
    kept = everywhere.keys() - dict(quantised(model)).keys()
    assert kept == {f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)}
    for path in kept:
        layer, original = model.get_submodule(path), plain.get_submodule(path)
        assert torch.equal(layer.weight, original.weight) and torch.equal(layer.bias, original.bias), path
    assert_close(logits(model), reference_logits(hf))


@EVERY_KIND
def test_a_tied_checkpoint_stays_tied(tmp_path, bits, double_quant):
    plain, stored = tmp_path / "plain", tmp_path / "stored"
    tiny("qwen2", tie_word_embeddings=True, **WHOLE).save_pretrained(plain)
    hf = reference(plain, bits, double_quant)
    hf.save_pretrained(stored)
    for directory in (plain, stored):
        assert_holds_the_same(built(directory, bits, double_quant), hf)
    assert_close(logits(built(stored, bits)), reference_logits(hf))


@EVERY_KIND
def test_transformers_reads_its_checkpoint_as_we_do(checkpoint, tmp_path, bits, double_quant):
    source = checkpoint("qwen3", WHOLE)
    reference(source, bits, double_quant).save_pretrained(tmp_path)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=FLOAT32, attn_implementation="eager").train()
    assert_close(logits(built(tmp_path, bits)), reference_logits(hf))


# ---- adapters over a quantised base


@pytest.fixture(scope="module", params=["llama3", "qwen2"])
def base_and_adapter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base with a tokenizer, and PEFT's adapter for all its linear layers, B included."""
    base = base_model(tmp_path_factory.mktemp("base"), request.param, **WHOLE)
    hf = AutoModelForCausalLM.from_pretrained(base, dtype=FLOAT32)
    targets = list(LoraConfig().target_modules)
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    adapter = tmp_path_factory.mktemp("adapter")
    peft.get_peft_model(hf, settings).save_pretrained(str(adapter))
    return base, adapter


@EVERY_KIND
def test_adapters_over_a_quantised_base_give_the_logits_of_peft(base_and_adapter, bits, double_quant):
    base, adapter = base_and_adapter
    model = built(base, bits, double_quant, lora=LoraConfig(init_from=str(adapter)))
    hf = reference(base, bits, double_quant)
    bare = reference_logits(hf)
    theirs = reference_logits(peft.PeftModel.from_pretrained(hf, str(adapter)).train())
    assert_close(logits(model), theirs)
    assert (theirs - bare).abs().max() > 0.1


@pytest.mark.parametrize("bits", [4, 8])
def test_load_puts_an_adapter_on_a_quantised_base(base_and_adapter, bits):
    base, adapter = base_and_adapter
    model, _ = minilora.load(str(base), adapter=str(adapter), bits=bits)
    assert not model.training
    hf = peft.PeftModel.from_pretrained(reference(base, bits, True), str(adapter))
    hf.train() if bits == 4 else hf.eval()
    assert_close(logits(model), reference_logits(hf))


@pytest.mark.parametrize("bits", [4, 8])
def test_adapter_gradients_over_a_quantised_base_are_those_of_peft(base_and_adapter, bits):
    base, adapter = base_and_adapter
    model = built(base, bits, lora=LoraConfig(init_from=str(adapter)))
    hf = peft.PeftModel.from_pretrained(reference(base, bits, True), str(adapter), is_trainable=True).train()
    targets = TOKENS.roll(-1)
    nn.functional.cross_entropy(model(TOKENS), targets).backward()
    nn.functional.cross_entropy(hf(TOKENS.unsqueeze(0)).logits.squeeze(0), targets).backward()
    theirs = {name: p.grad for name, p in hf.named_parameters() if p.requires_grad}
    ours = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(ours) == len(theirs) == 2 * 7 * 2
    for name, grad in ours.items():
        expected = theirs[f"base_model.model.{name}.default.weight"]
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item(), msg=name)
