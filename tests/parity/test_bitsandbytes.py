"""Quantized linear layers against transformers' BitsAndBytesConfig.

Compared are bytes, logits, gradients, and the checkpoints that transformers writes. The 4-bit
reference runs in train mode on embeddings that require a gradient (dropout is 0): in eval mode some
CPUs take a kernel that rounds to bfloat16, and that fails on shapes that are not a multiple of its
block.
"""

import itertools
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
from helpers.quantized import (
    BOTH_NF4,
    BOTH_WIDTHS,
    EVERY_KIND,
    KINDS,
    SIZES,
    build_training,
    quantized_layers,
)
from helpers.tiny_models import WINDOW, random_tokens, tiny
from helpers.tiny_runs import base_model
from minilora.checkpoint.hf import weight_map
from minilora.config import LoraConfig
from minilora.model.quantization import Int8Linear, NF4Linear
from minilora.model.transformer import CausalLM

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
DTYPES = {"float32": FLOAT32, "bfloat16": BFLOAT16}
TOKENS = random_tokens(40)
assert len(TOKENS) > WINDOW  # Mistral's window hides something

FAMILIES = ["llama3", "mistral_v1", "qwen2", "qwen3"]
LAYER_SIZES = {
    "whole": SIZES,
    # blocks span rows, and the last block of down_proj is cut short
    "across": {"hidden_size": 40, "intermediate_size": 50},
    # blocks span rows of 16s, which take another path in vectorized code
    "sixteens": {"hidden_size": 48, "intermediate_size": 80},
}
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
EVERY_SIZE = pytest.mark.parametrize("sizes", LAYER_SIZES)
TWO_SIZES = pytest.mark.parametrize("sizes", ["whole", "across"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """Return a function that makes the directory of a tiny random model, each once."""
    made: dict[str, Path] = {}

    def make(family: str, sizes: str, dtype: torch.dtype = FLOAT32) -> Path:
        dtype_name = str(dtype).removeprefix("torch.")
        key = f"{family}-{sizes}-{dtype_name}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp(key)
            hf = tiny(family, torch_dtype=dtype_name, **LAYER_SIZES[sizes])
            hf.save_pretrained(made[key])
        return made[key]

    return make


def reference(
    directory: Path, bits: int, double_quant: bool, dtype: torch.dtype = FLOAT32, **settings
) -> PreTrainedModel:
    """Load transformers' model, quantized on the way."""
    if bits == 4:
        settings |= {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": double_quant,
            "bnb_4bit_compute_dtype": dtype,
        }
    else:
        settings |= {"load_in_8bit": True}
    config = BitsAndBytesConfig(**settings)
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, quantization_config=config, attn_implementation="eager"
    ).train()


def our_model(directory: Path, bits: int, double_quant: bool = True, **options) -> CausalLM:
    """Build minilora's model, in train mode like the reference."""
    return build_training(directory, bits, double_quant, **options).model


def reference_logits(hf: nn.Module) -> Tensor:
    """Compute logits [T, V] of TOKENS; in train mode with a gradient, see the top of this file."""
    embeddings = hf.get_input_embeddings()(TOKENS.unsqueeze(0)).detach().requires_grad_(hf.training)
    with torch.set_grad_enabled(hf.training):
        return hf(inputs_embeds=embeddings, use_cache=False).logits.squeeze(0).detach()


@torch.no_grad()
def logits(model: CausalLM) -> Tensor:
    return model(TOKENS)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def assert_same_bits(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Compare the bytes of two tensors, which may have different dtypes."""
    our_bytes = ours.detach().contiguous().flatten().view(torch.uint8)
    their_bytes = theirs.detach().contiguous().flatten().view(torch.uint8)
    assert torch.equal(our_bytes, their_bytes), what


def assert_holds_the_same(model: CausalLM, hf: PreTrainedModel) -> None:
    """Check that quantized layers hold the reference's bytes, and that other tensors are equal."""
    layers = dict(quantized_layers(model))
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
    their_state = hf.state_dict()
    for name, p in model.named_parameters():
        path, _, own_name = name.rpartition(".")
        if path not in layers or own_name == "bias":
            expected = their_state[name]
            assert p.dtype == expected.dtype and torch.equal(p, expected), name


# ---- what a layer holds


def bit_cases() -> Iterator[tuple[str, ...]]:
    """List all combinations of sizes, dtypes and kinds, with the four families in turn."""
    combinations = itertools.product(LAYER_SIZES, DTYPES, DTYPES, KINDS)
    for i, combination in enumerate(combinations):
        yield *combination, FAMILIES[i % 4]


@pytest.mark.parametrize(("sizes", "stored", "run", "kind", "family"), bit_cases())
def test_layers_hold_the_bits_of_transformers(checkpoint, sizes, stored, run, kind, family):
    """For any dtype of the checkpoint and of the run."""
    bits, double_quant = KINDS[kind]
    directory = checkpoint(family, sizes, DTYPES[stored])
    model = our_model(directory, bits, double_quant, dtype=run)
    assert_holds_the_same(model, reference(directory, bits, double_quant, DTYPES[run]))


def test_a_bfloat16_run_rounds_before_it_quantizes(checkpoint):
    """Else the test above, of an fp32 checkpoint in a bfloat16 run, could not tell the orders."""
    directory = checkpoint("llama3", "whole")
    rounded = dict(quantized_layers(our_model(directory, 4, dtype="bfloat16")))
    exact = dict(quantized_layers(our_model(directory, 4, dtype="float32")))
    assert any(not torch.equal(layer.weight, exact[path].weight) for path, layer in rounded.items())


# ---- logits


@EVERY_FAMILY
@TWO_SIZES
@EVERY_KIND
def test_logits_are_those_of_transformers(checkpoint, family, sizes, bits, double_quant):
    directory = checkpoint(family, sizes)
    ours = logits(our_model(directory, bits, double_quant))
    assert_close(ours, reference_logits(reference(directory, bits, double_quant)))
    assert (ours - logits(our_model(directory, 16))).abs().max() > 0.1  # quantized at all


def dequantized_by_hand(weight: Tensor, state: QuantState) -> Tensor:
    """Dequantize a packed weight in plain torch.

    bitsandbytes 0.50.2 takes the wrong absmax on CPUs with AVX-512 where rows of 16s start inside a
    block, so its own product is no reference there.
    """
    packed, absmax = weight.detach().flatten(), state.absmax
    if state.nested:
        nested_absmax = state.state2.absmax.repeat_interleave(256)[: len(absmax)]
        absmax = state.state2.code[absmax.int()] * nested_absmax + state.offset
    indices = torch.stack((packed >> 4, packed & 15), dim=1).flatten().int()
    values = state.code[indices]
    return (values * absmax.repeat_interleave(64)[: len(values)]).view(state.shape)


@EVERY_FAMILY
@EVERY_SIZE
@BOTH_NF4
def test_nf4_logits_are_those_of_the_dequantized_weights(checkpoint, family, sizes, double_quant):
    """Of transformers' plain model with its quantized model's weights, dequantized by hand."""
    directory = checkpoint(family, sizes)
    hf = AutoModelForCausalLM.from_pretrained(directory, dtype=FLOAT32, attn_implementation="eager")
    for path, module in reference(directory, 4, double_quant).named_modules():
        if isinstance(module, Linear4bit):
            weight = dequantized_by_hand(module.weight, module.weight.quant_state)
            hf.get_submodule(path).weight.data = weight
    model, theirs = our_model(directory, 4, double_quant), reference_logits(hf)
    assert_close(logits(model.train()), theirs)
    assert_close(logits(model.eval()), theirs)


@EVERY_FAMILY
@TWO_SIZES
def test_nf4_logits_are_the_same_in_eval_mode(checkpoint, family, sizes):
    """Odd shapes included, on which bitsandbytes' own eval-mode kernel fails on some CPUs."""
    directory = checkpoint(family, sizes)
    ours = logits(our_model(directory, 4).eval())
    assert_close(ours, reference_logits(reference(directory, 4, True)))


@EVERY_FAMILY
@TWO_SIZES
def test_int8_logits_are_those_of_transformers_in_eval_mode(checkpoint, family, sizes):
    """Inputs are in 8 bits too, except those that reach 6.0; some layers have such, some none."""
    directory = checkpoint(family, sizes)
    hf, model = reference(directory, 8, True).eval(), our_model(directory, 8).eval()
    largest: list[float] = []

    def record(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        largest.append(inputs[0].abs().max().item())

    for _, layer in quantized_layers(model):
        layer.register_forward_pre_hook(record)
    ours = logits(model)
    assert min(largest) < 6.0 < max(largest)
    assert_close(ours, reference_logits(hf))
    # training on a CPU does not round the inputs
    assert (ours - logits(model.train())).abs().max() > 0.1


@TWO_SIZES
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("outliers", [(), (3,), (0, 7, 30)], ids=["no outliers", "one", "three"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_int8_layers_equal_those_of_bitsandbytes(checkpoint, sizes, dtype, outliers, training):
    """Layer by layer on the same inputs, with a bias (Qwen2's q_proj) and without."""
    directory = checkpoint("qwen2", sizes, dtype)
    hf = reference(directory, 8, True, dtype).train(training)
    model = our_model(directory, 8).train(training)
    generator = torch.Generator().manual_seed(0)
    for path, layer in quantized_layers(model):
        x = torch.rand(9, layer.in_features, generator=generator)
        x.mul_(11).sub_(5.5)  # below the threshold of 6.0
        for column in outliers:
            x[column % 9, column] = -20.0
        x = x.to(dtype)
        before = x.clone()
        with torch.no_grad():
            ours = layer(x)
        assert torch.equal(x, before), path  # the caller's tensor is not changed
        theirs = hf.get_submodule(path)(x).detach()
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-5 if dtype == FLOAT32 else 1e-2, atol=1e-5)


@EVERY_FAMILY
@TWO_SIZES
@EVERY_KIND
def test_bfloat16_is_as_exact_as_transformers(checkpoint, family, sizes, bits, double_quant):
    """The exact result has the same weights, dequantized or rounded, and is computed in fp32."""
    directory = checkpoint(family, sizes, BFLOAT16)
    model = our_model(directory, bits, double_quant)
    theirs = reference_logits(reference(directory, bits, double_quant, BFLOAT16)).float()
    exact_model = our_model(directory, 16, dtype="float32")
    for path, layer in quantized_layers(model):
        exact_model.get_submodule(path).weight.data = layer.weight_in(FLOAT32)
    exact, ours = logits(exact_model), logits(model)
    assert ours.dtype == BFLOAT16
    our_error, their_error = (ours.float() - exact).norm(), (theirs - exact).norm()
    assert our_error < 1.25 * their_error  # each is one draw of roundings: 0.6 to 1.1
    assert our_error < 0.1 * exact.norm()


# ---- checkpoints that transformers has quantized


def assert_same_state(model: CausalLM, expected: CausalLM) -> None:
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and tensor.shape == theirs[name].shape, name
        assert torch.equal(tensor, theirs[name]), name


def stored_cases() -> Iterator[tuple[str, ...]]:
    """List all combinations of kinds, files and sizes, with two families and dtypes in turn."""
    for k, kind in enumerate(KINDS):
        for s, max_shard_size in enumerate(["1GB", "20KB"]):
            for z, sizes in enumerate(["whole", "across"]):
                family = ["llama3", "qwen2"][(s + k) % 2]
                dtype = ["float32", "bfloat16"][(z + k) % 2]
                yield kind, max_shard_size, sizes, family, dtype


@pytest.mark.parametrize(("kind", "max_shard_size", "sizes", "family", "dtype"), stored_cases())
def test_a_checkpoint_of_transformers_equals_quantizing_it_here(
    checkpoint, tmp_path, kind, max_shard_size, sizes, family, dtype
):
    bits, double_quant = KINDS[kind]
    source = checkpoint(family, sizes, DTYPES[dtype])
    hf = reference(source, bits, double_quant, DTYPES[dtype])
    hf.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    num_files = len(set(weight_map(tmp_path).values()))
    assert (num_files > 1) == (max_shard_size == "20KB")

    # the checkpoint decides about double quantization, not the setting
    model = our_model(tmp_path, bits, not double_quant)
    assert_same_state(model, our_model(source, bits, double_quant))
    if bits == 8:
        model.eval()
    assert torch.isfinite(logits(model)).all()


@TWO_SIZES
@BOTH_NF4
def test_packed_bytes_may_be_stored_as_another_dtype(checkpoint, tmp_path, sizes, double_quant):
    """bnb_4bit_quant_storage, which FSDP users of other trainers set to their compute dtype."""
    source = checkpoint("mistral_v1", sizes, BFLOAT16)
    hf = reference(source, 4, double_quant, BFLOAT16, bnb_4bit_quant_storage=BFLOAT16)
    hf.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["model.layers.0.mlp.down_proj.weight"].dtype == BFLOAT16
    assert_same_state(our_model(tmp_path, 4), our_model(source, 4, double_quant))


@BOTH_WIDTHS
def test_layers_kept_in_16_bits_stay_so(checkpoint, tmp_path, bits, capfd):
    source = checkpoint("qwen2", "whole")
    hf = reference(source, bits, True, llm_int8_skip_modules=["v_proj", "lm_head"])
    hf.save_pretrained(tmp_path)
    model = our_model(tmp_path, bits)
    message = f"12 linear layers in {bits} bits, 2 kept in 16 by the checkpoint"
    assert message in capfd.readouterr().err
    everywhere, plain = dict(quantized_layers(our_model(source, bits))), our_model(source, 16)
    for path, layer in quantized_layers(model):
        for name in layer.parameter_names:
            assert torch.equal(getattr(layer, name), getattr(everywhere[path], name)), path
    kept = everywhere.keys() - dict(quantized_layers(model)).keys()
    assert kept == {f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)}
    for path in kept:
        layer, original = model.get_submodule(path), plain.get_submodule(path)
        assert torch.equal(layer.weight, original.weight), path
        assert torch.equal(layer.bias, original.bias), path
    assert_close(logits(model), reference_logits(hf))


@EVERY_KIND
def test_a_tied_checkpoint_stays_tied(tmp_path, bits, double_quant):
    plain, stored = tmp_path / "plain", tmp_path / "stored"
    tiny("qwen2", tie_word_embeddings=True, **SIZES).save_pretrained(plain)
    hf = reference(plain, bits, double_quant)
    hf.save_pretrained(stored)
    for directory in (plain, stored):
        assert_holds_the_same(our_model(directory, bits, double_quant), hf)
    assert_close(logits(our_model(stored, bits)), reference_logits(hf))


@EVERY_KIND
def test_transformers_reads_its_checkpoint_as_we_do(checkpoint, tmp_path, bits, double_quant):
    source = checkpoint("qwen3", "whole")
    reference(source, bits, double_quant).save_pretrained(tmp_path)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=FLOAT32, attn_implementation="eager")
    hf.train()
    assert_close(logits(our_model(tmp_path, bits)), reference_logits(hf))


# ---- adapters over a quantized base


@pytest.fixture(scope="module", params=["llama3", "qwen2"])
def base_and_adapter(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Make a base with a tokenizer, and PEFT's adapter for all its linear layers, B included."""
    base = base_model(tmp_path_factory.mktemp("base"), request.param, **SIZES)
    hf = AutoModelForCausalLM.from_pretrained(base, dtype=FLOAT32)
    targets = list(LoraConfig().target_modules)
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False
    )
    adapter = tmp_path_factory.mktemp("adapter")
    peft.get_peft_model(hf, settings).save_pretrained(str(adapter))
    return base, adapter


@EVERY_KIND
def test_adapters_over_a_quantized_base_give_the_logits_of_peft(
    base_and_adapter, bits, double_quant
):
    base, adapter = base_and_adapter
    model = our_model(base, bits, double_quant, lora=LoraConfig(init_from=str(adapter)))
    hf = reference(base, bits, double_quant)
    bare = reference_logits(hf)
    theirs = reference_logits(peft.PeftModel.from_pretrained(hf, str(adapter)).train())
    assert_close(logits(model), theirs)
    assert (theirs - bare).abs().max() > 0.1


@BOTH_WIDTHS
def test_load_puts_an_adapter_on_a_quantized_base(base_and_adapter, bits):
    base, adapter = base_and_adapter
    model, _ = minilora.load(str(base), adapter=str(adapter), bits=bits)
    assert not model.training
    hf = peft.PeftModel.from_pretrained(reference(base, bits, True), str(adapter))
    hf.train(bits == 4)
    assert_close(logits(model), reference_logits(hf))


@BOTH_WIDTHS
def test_adapter_gradients_over_a_quantized_base_are_those_of_peft(base_and_adapter, bits):
    base, adapter = base_and_adapter
    model = our_model(base, bits, lora=LoraConfig(init_from=str(adapter)))
    plain_hf = reference(base, bits, True)
    hf = peft.PeftModel.from_pretrained(plain_hf, str(adapter), is_trainable=True).train()
    targets = TOKENS.roll(-1)
    nn.functional.cross_entropy(model(TOKENS), targets).backward()
    nn.functional.cross_entropy(hf(TOKENS.unsqueeze(0)).logits.squeeze(0), targets).backward()
    theirs = {name: p.grad for name, p in hf.named_parameters() if p.requires_grad}
    ours = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(ours) == len(theirs) == 2 * 7 * 2
    for name, grad in ours.items():
        expected = theirs[f"base_model.model.{name}.default.weight"]
        atol = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=atol, msg=name)
