"""merge.py over quantized bases, compared with transformers + bitsandbytes + peft."""

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import merge
from helpers.checkpoints import contents, names
from helpers.processes import ROOT
from helpers.qlora import (
    SIZES,
    base_in_shards,
    dequantized,
    logits_of,
    reference_model,
    store_with_bitsandbytes,
    tensors_of,
    trained,
    with_update,
)
from helpers.tiny_runs import base_model
from minilora.checkpoint.hf import INDEX_FILE

Script = Callable[..., tuple[object, str, str]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_model(tmp_path_factory.mktemp("base") / "model", "mistral_v1", **SIZES)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """merge.py as from the command line: arguments -> exit code, stdout, stderr."""

    def run(*args: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["merge.py", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "merge.py"), run_name="__main__")
        printed = capsys.readouterr()
        return stop.value.code, printed.out, printed.err

    return run


def assert_cast_once(actual: Tensor, exact: Tensor, name: str) -> None:
    """`actual` is `exact` after sums in fp32 and one rounding to its own dtype."""
    bound = torch.finfo(actual.dtype).eps / 2 * exact.double().abs() * (1 + 1e-3) + 2e-6
    assert ((actual.double() - exact.double()).abs() <= bound).all(), name


def assert_loads(out: Path) -> nn.Module:
    """transformers reads the merged model as an ordinary one, complete."""
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    if (out / INDEX_FILE).is_file():
        index = json.loads((out / INDEX_FILE).read_text())
        files = {name: file.name for file in out.glob("*.safetensors") for name in load_file(file)}
        assert index["weight_map"] == files
        assert len(set(files.values())) > 1
        size = sum(tensor.nbytes for tensor in tensors_of(out).values())
        assert index["metadata"]["total_size"] == size
    return model


BASES: dict[str, dict] = {
    "float32": {"family": "mistral_v1"},
    "bfloat16": {"family": "qwen2", "torch_dtype": "bfloat16", "shard_size": "20KB"},
    "tied": {"family": "qwen3", "torch_dtype": "bfloat16", "tie_word_embeddings": True},
}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("float32", {"bits": 4}),
        ("float32", {"bits": 8}),
        ("bfloat16", {"bits": 4}),
        ("tied", {"bits": 8}),
        ("float32", {"bits": 4, "dtype": "bfloat16"}),  # rounded before it is quantized
        ("float32", {"bits": 4, "double_quant": False}),
    ],
    ids=str,
)
def test_merging_into_either_base(tmp_path: Path, kind: str, settings: dict):
    """The original weights by default, or those that the adapter was trained over.

    Sums are in fp32 and cast once.
    """
    base = base_in_shards(tmp_path / "base", **BASES[kind])
    run_settings = {f"model__{name}": value for name, value in settings.items()}
    adapter = trained(tmp_path / "run", base, **run_settings)
    originals = tensors_of(base)
    in_training = {**originals, **dequantized(base, **settings)}
    for from_quantized, weights in ((False, originals), (True, in_training)):
        out = tmp_path / f"merged {from_quantized}"
        args = merge.Args(str(adapter), out=str(out), from_quantized=from_quantized)
        assert merge.main(args) == 0
        tensors, exact = tensors_of(out), with_update(weights, adapter)
        assert tensors.keys() == originals.keys()
        for name, tensor in tensors.items():
            assert tensor.dtype == originals[name].dtype
            if exact[name] is originals[name]:
                assert torch.equal(tensor, originals[name]), name
            else:
                assert_cast_once(tensor, exact[name], name)

        model = assert_loads(out)
        assert (out / INDEX_FILE).is_file() == ("shard_size" in BASES[kind])
        is_tied = "tie_word_embeddings" in BASES[kind]
        head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
        assert (head.data_ptr() == embedding.data_ptr()) == is_tied
        assert ("lm_head.weight" in tensors) != is_tied


PRINTED = re.compile(r"merged into the (original|dequantized) base\s+(\S+)(.*)")


@pytest.mark.parametrize(
    ("kind", "bits", "ratio", "from_quantized"),
    [
        ("float32", 4, 100, False),
        ("float32", 8, 0, True),
        ("bfloat16", 4, 5, True),
        ("bfloat16", 4, 5, False),
    ],
)
def test_verify_prints_both_gaps(
    tmp_path: Path,
    kind: str,
    bits: int,
    ratio: int,
    from_quantized: bool,
    capsys: pytest.CaptureFixture[str],
):
    base = base_in_shards(tmp_path / "base", **BASES[kind])
    adapter = trained(tmp_path / "run", base, model__bits=bits)
    files = contents(adapter)
    live = reference_model(base, bits, adapter)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(live.config.vocab_size, (64,), generator=generator)
    expected = {}
    for way in ("original", "dequantized"):
        out = tmp_path / way
        args = merge.Args(str(adapter), out=str(out), from_quantized=way == "dequantized")
        assert merge.main(args) == 0
        difference = logits_of(live, tokens) - logits_of(reference_model(out), tokens)
        expected[way] = float(difference.abs().max())

    capsys.readouterr()
    assert merge.main(merge.Args(str(adapter), verify=True, from_quantized=from_quantized)) == 0
    printed = PRINTED.findall(capsys.readouterr().out)
    gaps = {way: float(gap) for way, gap, _ in printed}
    assert gaps == pytest.approx(expected, rel=6e-3, abs=2e-4)
    this_way = "dequantized" if from_quantized else "original"
    assert [way for way, _, mark in printed if mark == " (this one)"] == [this_way]
    assert gaps["original"] > max(ratio * gaps["dequantized"], 1e-2)
    assert set(names(adapter)) == {*files, "merged"}, "nothing is left beside the result"
    assert files.items() <= contents(adapter).items()


@pytest.mark.parametrize(("bits", "shard_size"), [(4, "20KB"), (8, "1GB")])
def test_base_that_bitsandbytes_has_quantized(
    tmp_path: Path, bits: int, shard_size: str, script: Script
):
    original = base_in_shards(tmp_path / "original", "mistral_v1", torch_dtype="bfloat16")
    base = store_with_bitsandbytes(original, tmp_path / "base", bits, shard_size)
    assert (base / INDEX_FILE).is_file() == (shard_size != "1GB")
    adapter = trained(tmp_path / "run", base, model__bits=bits)
    before = contents(adapter)
    code, out, err = script(adapter)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and len(err.splitlines()) == 1
    assert "--from_quantized" in err and "--base" in err and str(base) in err
    assert contents(adapter) == before and not (adapter / "merged").exists()

    code, printed, _ = script(adapter, "--from-quantized", "--verify")
    assert code == 0
    gaps = {way: gap for way, gap, _ in PRINTED.findall(printed)}
    assert gaps.keys() == {"original", "dequantized"}
    assert re.search(r"original base +the base is only quantized\n", printed)
    exact = with_update(dequantized(base, bits), adapter)
    tensors, stored = tensors_of(adapter / "merged"), tensors_of(base)
    assert tensors.keys() == tensors_of(original).keys()
    for name, tensor in tensors.items():
        if name in exact:
            assert tensor.dtype == torch.bfloat16
            assert_cast_once(tensor, exact[name], name)
        else:
            assert tensor.dtype == stored[name].dtype
            assert torch.equal(tensor, stored[name]), name
    assert_loads(adapter / "merged")

    code, _, err = script(adapter, "--base", original, "--out", tmp_path / "merged")
    assert code == 0, err
    exact = with_update(tensors_of(original), adapter)
    for name, tensor in tensors_of(tmp_path / "merged").items():
        assert_cast_once(tensor, exact[name], name)
    assert_loads(tmp_path / "merged")


def test_from_quantized_needs_a_quantized_base(tmp_path: Path, base: Path, script: Script):
    adapter = trained(tmp_path / "run", base, model__bits=16)
    before = contents(adapter)
    code, out, err = script(adapter, "--from-quantized")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: --from_quantized.*16-bit.*--bits 4.*\n", err)
    assert contents(adapter) == before


def test_qlora_adapter_of_another_trainer(tmp_path: Path, base: Path, script: Script):
    """It does not say how its base was held: --bits does."""
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights=False
    )
    adapter = tmp_path / "adapter"
    model = peft.get_peft_model(reference_model(base, 4), settings, autocast_adapter_dtype=False)
    model.save_pretrained(str(adapter))
    code, out, err = script(adapter, "--from_quantised", "--bits", 4, "--verify")
    assert code == 0, err
    exact = with_update({**tensors_of(base), **dequantized(base, 4)}, adapter)
    for name, tensor in tensors_of(adapter / "merged").items():
        assert_cast_once(tensor, exact[name], name)
    assert_loads(adapter / "merged")
    gaps = {way: float(gap) for way, gap, _ in PRINTED.findall(out)}
    assert gaps["original"] > 100 * gaps["dequantized"]
