"""Checkpoints of quantized models: which are refused, and what `minilora.load` makes of one."""

import json
from collections.abc import Callable
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import minilora
import train
from helpers.quantized import (
    BOTH_NF4,
    BOTH_WIDTHS,
    EVERY_KIND,
    SIZES,
    build_training,
    copy_directory,
    normal,
    quantized_layers,
    store_quantized,
)
from helpers.tiny_models import random_tokens, tiny
from helpers.tiny_runs import base_model, config
from minilora.errors import UserError
from minilora.model.quantization import Int8Linear, NF4Linear

TOKENS = random_tokens(24)
K_PROJ = "model.layers.1.self_attn.k_proj"
K_PROJ_PATTERN = K_PROJ.replace(".", r"\.")
NF4_PARTS = ["weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"]
NESTED_PARTS = ["weight.nested_absmax", "weight.nested_quant_map"]
PARTS = {
    "nf4_single": NF4_PARTS,
    "nf4_double": [*NF4_PARTS, *NESTED_PARTS],
    "int8": ["weight", "SCB"],
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny Qwen2 (with biases) in 32 bits; not to be changed."""
    directory = tmp_path_factory.mktemp("plain")
    tiny("qwen2", **SIZES).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def stored(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int]]:
    """Save it quantized in each way: {kind: (directory, bits)}; not to be changed."""
    directory = tmp_path_factory.mktemp("stored")
    return {
        "nf4_single": (store_quantized(plain, directory / "nf4-single", 4, double_quant=False), 4),
        "nf4_double": (store_quantized(plain, directory / "nf4-double", 4), 4),
        "int8": (store_quantized(plain, directory / "int8", 8), 8),
    }


Tensors = dict[str, Tensor]


def with_other_tensors(source: Path, directory: Path, change: Callable[[Tensors], object]) -> Path:
    """Copy a checkpoint of one file, with changes to its tensors."""
    file = copy_directory(source, directory) / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, file, metadata={"format": "pt"})
    return directory


def with_other_config(source: Path, directory: Path, change: Callable[[dict], object]) -> Path:
    """Copy a checkpoint, with changes to its config.json."""
    file = copy_directory(source, directory) / "config.json"
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))
    return directory


# ---- config.json


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_other_quantizers_are_refused(plain, tmp_path, bits):
    gptq = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    directory = with_other_config(plain, tmp_path / "gptq", lambda raw: raw.update(gptq))
    with pytest.raises(UserError, match=r"config\.json: quantization_config of 'gptq'"):
        build_training(directory, bits)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_fp4_is_refused(plain, tmp_path, bits):
    directory = store_quantized(plain, tmp_path / "fp4", 4, bnb_4bit_quant_type="fp4")
    field = r"config\.json: quantization_config\.bnb_4bit_quant_type = 'fp4'"
    with pytest.raises(UserError, match=field):
        build_training(directory, bits)


@pytest.mark.parametrize(
    ("kind", "asked"), [("nf4_double", 16), ("nf4_double", 8), ("int8", 16), ("int8", 4)]
)
def test_other_bits_than_those_stored_are_refused(stored, kind, asked):
    directory, bits = stored[kind]
    message = rf"{directory.name}.* is quantized to {bits} bits already: set model\.bits={bits}"
    with pytest.raises(UserError, match=message):
        build_training(directory, asked)


def test_another_outlier_threshold_is_refused(stored, tmp_path):
    """Its layers would compute something else than they were saved for."""
    directory = with_other_config(
        stored["int8"][0],
        tmp_path / "threshold",
        lambda raw: raw["quantization_config"].update(llm_int8_threshold=3.0),
    )
    with pytest.raises(UserError, match=r"llm_int8_threshold = 3\.0"):
        build_training(directory, 8)


# ---- tensors that are missing or misshapen


@pytest.mark.parametrize(
    ("kind", "part"), [(kind, part) for kind, parts in PARTS.items() for part in parts]
)
def test_a_layer_that_lacks_a_tensor_is_refused(stored, tmp_path, kind, part):
    source, bits = stored[kind]
    directory = with_other_tensors(
        source, tmp_path / "broken", lambda tensors: tensors.pop(f"{K_PROJ}.{part}")
    )
    with pytest.raises(UserError, match=K_PROJ_PATTERN):
        build_training(directory, bits)


def test_nested_statistics_may_not_be_missing_together(stored, tmp_path):
    """Scales in 8 bits must not be taken for fp32 ones."""

    def strip(tensors: Tensors) -> None:
        for part in NESTED_PARTS:
            del tensors[f"{K_PROJ}.{part}"]

    directory = with_other_tensors(stored["nf4_double"][0], tmp_path / "broken", strip)
    with pytest.raises(UserError, match=K_PROJ_PATTERN):
        build_training(directory, 4)


@pytest.mark.parametrize("kind", PARTS)
def test_a_weight_without_anything_beside_it_is_refused(stored, tmp_path, kind):
    """It must not be taken for a layer that the checkpoint keeps in 16 bits."""
    source, bits = stored[kind]

    def strip(tensors: Tensors) -> None:
        for name in list(tensors):
            if name.startswith(K_PROJ) and not name.endswith((".weight", ".bias")):
                del tensors[name]

    directory = with_other_tensors(source, tmp_path / "broken", strip)
    with pytest.raises(UserError, match=K_PROJ_PATTERN):
        build_training(directory, bits)


MISSHAPEN = {
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


@pytest.mark.parametrize("case", MISSHAPEN)
def test_a_tensor_of_another_shape_is_refused(stored, tmp_path, case):
    kind, part = case.split()
    source, bits = stored[kind]
    name = f"{K_PROJ}.{part}"

    def change(tensors: Tensors) -> None:
        tensors[name] = MISSHAPEN[case](tensors[name])

    directory = with_other_tensors(source, tmp_path / "broken", change)
    with pytest.raises(UserError, match=K_PROJ_PATTERN):
        build_training(directory, bits)


# ---- quantized in another way


def replace_k_proj(tensors: Tensors, packed: Tensor, state: bnb.QuantState) -> None:
    """Give one layer of a checkpoint another quantized weight."""
    for name in list(tensors):
        if name.startswith(f"{K_PROJ}.weight"):
            del tensors[name]
    tensors[f"{K_PROJ}.weight"] = packed
    for name, tensor in state.as_dict(packed=True).items():
        tensors[f"{K_PROJ}.weight.{name}"] = tensor


@BOTH_NF4
@pytest.mark.parametrize("blocksize", [32, 128])
def test_other_block_sizes_are_refused(stored, tmp_path, double_quant, blocksize):
    packed, state = bnb.quantize_4bit(
        normal(64, 128), blocksize=blocksize, compress_statistics=double_quant, quant_type="nf4"
    )
    directory = with_other_tensors(
        stored["nf4_double"][0],
        tmp_path / "broken",
        lambda tensors: replace_k_proj(tensors, packed, state),
    )
    message = rf"k_proj is quantized in blocks of {blocksize} .*; only 64 .*is supported"
    with pytest.raises(UserError, match=message):
        build_training(directory, 4)


def test_other_nested_block_sizes_are_refused(stored, tmp_path):
    packed, state = bnb.quantize_4bit(
        normal(64, 128), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    absmax = bnb.dequantize_blockwise(state.absmax, state.state2)
    state.absmax, state.state2 = bnb.quantize_blockwise(absmax, blocksize=64)
    directory = with_other_tensors(
        stored["nf4_double"][0],
        tmp_path / "broken",
        lambda tensors: replace_k_proj(tensors, packed, state),
    )
    message = r"k_proj is quantized in blocks of 64 \(nested 64\); .*nested 256"
    with pytest.raises(UserError, match=message):
        build_training(directory, 4)


def test_a_weight_quantized_in_another_shape_is_refused(stored, tmp_path):
    """The transposed matrix has as many bytes."""
    packed, state = bnb.quantize_4bit(
        normal(128, 64), blocksize=64, compress_statistics=False, quant_type="nf4"
    )
    directory = with_other_tensors(
        stored["nf4_single"][0],
        tmp_path / "broken",
        lambda tensors: replace_k_proj(tensors, packed, state),
    )
    with pytest.raises(UserError, match=K_PROJ_PATTERN):
        build_training(directory, 4)


def test_a_quantized_head_is_refused(plain, tmp_path):
    # a list of one's own replaces the default, which has the head in it
    directory = store_quantized(plain, tmp_path / "head", 4, llm_int8_skip_modules=["v_proj"])
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        build_training(directory, 4)


def test_int8_in_the_order_of_one_kind_of_gpu_is_refused(stored, tmp_path):
    """bitsandbytes wrote it before 0.46 (2: col_turing); much older versions left rows unmarked."""
    name = f"{K_PROJ}.weight_format"

    def turing(tensors: Tensors) -> None:
        tensors[name] = torch.tensor(2, dtype=torch.uint8)

    source, _ = stored["int8"]
    directory = with_other_tensors(source, tmp_path / "turing", turing)
    with pytest.raises(UserError, match=r"k_proj .*weight_format.* save it again"):
        build_training(directory, 8)

    unmarked = with_other_tensors(source, tmp_path / "unmarked", lambda tensors: tensors.pop(name))
    expected = build_training(source, 8).model.state_dict()
    for key, tensor in build_training(unmarked, 8).model.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


# ---- checkpoints in 16 or 32 bits


def test_odd_rows_are_refused_in_4_bits_only(tmp_path):
    tiny("llama3", hidden_size=48, intermediate_size=51).save_pretrained(tmp_path)
    message = r"model\.layers\.0\.mlp\.down_proj has 51 input features.*use 8 or 16"
    with pytest.raises(UserError, match=message):
        build_training(tmp_path, 4)
    model = build_training(tmp_path, 8).model
    with torch.no_grad():
        for training in (True, False):
            assert torch.isfinite(model.train(training)(TOKENS)).all()


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_an_integer_weight_in_a_plain_checkpoint_is_refused(plain, tmp_path, bits):
    def change(tensors: Tensors) -> None:
        tensors[f"{K_PROJ}.weight"] = tensors[f"{K_PROJ}.weight"].to(torch.int8)

    directory = with_other_tensors(plain, tmp_path / "broken", change)
    with pytest.raises(UserError, match=K_PROJ_PATTERN):
        build_training(directory, bits)


@BOTH_WIDTHS
def test_a_plain_weight_of_another_shape_is_refused(plain, tmp_path, bits):
    def change(tensors: Tensors) -> None:
        tensors[f"{K_PROJ}.weight"] = tensors[f"{K_PROJ}.weight"].t()

    directory = with_other_tensors(plain, tmp_path / "broken", change)
    with pytest.raises(UserError, match=K_PROJ_PATTERN + r".*\[128, 64\]"):
        build_training(directory, bits)


# ---- minilora.load


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_model(tmp_path_factory.mktemp("base"), **SIZES)


@pytest.mark.parametrize("bits", [4, 8, None])
def test_load_gives_a_model_ready_to_use(with_tokenizer, bits):
    model, tokenizer = minilora.load(str(with_tokenizer), bits=bits)
    types = {type(layer) for _, layer in quantized_layers(model)}
    assert types == {4: {NF4Linear}, 8: {Int8Linear}, None: set()}[bits]
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    ids = torch.tensor(tokenizer.encode("Title: light").ids)
    with torch.no_grad():
        assert torch.isfinite(model(ids)).all()
    texts = minilora.generate(model, tokenizer, ["Title: light", "old"], max_new_tokens=5)
    assert len(texts) == 2 and all(isinstance(text, str) for text in texts)


@pytest.mark.parametrize(("bits", "layer_type"), [(4, NF4Linear), (8, Int8Linear)])
def test_load_takes_the_bits_a_checkpoint_is_stored_in(with_tokenizer, tmp_path, bits, layer_type):
    directory = copy_directory(with_tokenizer, tmp_path / "stored")
    store_quantized(with_tokenizer, directory, bits, double_quant=False)
    model, _ = minilora.load(str(directory), bits=None)
    layers = [layer for _, layer in quantized_layers(model)]
    assert len(layers) == 14 and {type(layer) for layer in layers} == {layer_type}


@EVERY_KIND
def test_load_takes_the_bits_an_adapter_was_trained_over(
    with_tokenizer, tmp_path, bits, double_quant
):
    run = config(
        tmp_path,
        with_tokenizer,
        rows=8,
        model__bits=bits,
        model__double_quant=double_quant,
        train__max_steps=1,
    )
    assert train.main(run) == 0
    model, _ = minilora.load(f"{run.output_dir}/checkpoint-final", bits=None)
    layers = [layer for _, layer in quantized_layers(model)]
    assert {type(layer) for layer in layers} == {NF4Linear if bits == 4 else Int8Linear}
    assert {getattr(layer, "double_quant", True) for layer in layers} == {double_quant}


def test_greedy_answers_in_4_bits_are_those_without_a_cache(with_tokenizer):
    model, tokenizer = minilora.load(str(with_tokenizer), bits=4)
    prompt = "Title: light of old music"
    ids = tokenizer.encode(prompt).ids
    answer: list[int] = []
    with torch.no_grad():
        for _ in range(8):
            logits = model(torch.tensor([*ids, *answer]))
            answer.append(int(logits[-1].argmax()))
    assert tokenizer.eos_id not in answer
    texts = minilora.generate(model, tokenizer, [prompt], max_new_tokens=8)
    assert texts == [tokenizer.decode_after(ids, answer)]
