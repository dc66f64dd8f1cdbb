"""infer.py over quantized models, compared with transformers + bitsandbytes + peft."""

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import minilora
from helpers.processes import ROOT
from helpers.qlora import (
    LINEARS,
    SIZES,
    logits_of,
    reference_model,
    store_with_bitsandbytes,
    trained,
)
from helpers.tiny_runs import base_model
from minilora.data.tokenizer import Tokenizer

Script = Callable[..., tuple[object, str, str]]
TEXT, NEW_TOKENS = "Title: old works of Korea", 16


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_model(tmp_path_factory.mktemp("base") / "model", "mistral_v1", **SIZES)


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """infer.py MODEL with the text as its prompt, and more arguments: exit code, stdout, stderr."""

    def run(model: Path, *args: object) -> tuple[object, str, str]:
        prompt = ["--raw", "--prompt", TEXT, "--max_new_tokens", str(NEW_TOKENS)]
        monkeypatch.setattr(sys, "argv", ["infer.py", str(model), *prompt, *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "infer.py"), run_name="__main__")
        printed = capsys.readouterr()
        return stop.value.code, printed.out, printed.err

    return run


def greedy(model: nn.Module, directory: Path) -> str:
    """transformers' greedy answer to the plain text."""
    tokenizer = Tokenizer(directory)
    ids = tokenizer.encode(TEXT).ids
    given = torch.tensor([ids])
    output = model.generate(
        input_ids=given,
        attention_mask=torch.ones_like(given),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
    )
    new = output[0, len(ids) :].tolist()
    assert len(new) == NEW_TOKENS
    return tokenizer.decode_after(ids, new)


def quantized_layers(stderr: str) -> list[tuple[str, str]]:
    """(layers, bits) that infer.py prints for a quantized model."""
    return re.findall(r"(\d+) linear layers in (\d+) bits", stderr)


@pytest.mark.parametrize("bits", [4, 8])
def test_qlora_checkpoint_is_asked_in_any_width(tmp_path: Path, base: Path, bits: int, ask: Script):
    checkpoint = trained(tmp_path / "run", base, model__bits=bits)
    expected = {
        width: greedy(reference_model(base, width, checkpoint), base) for width in (4, 8, 16)
    }
    assert expected[4] != expected[16], "the width shows"
    code, out, err = ask(checkpoint)
    assert (code, out) == (0, expected[bits] + "\n")
    assert quantized_layers(err) == [(str(LINEARS), str(bits))]

    for width in (4, 8, 16):  # the base has 16 bits, so any width can be asked for
        code, out, err = ask(checkpoint, "--bits", width)
        assert (code, out) == (0, expected[width] + "\n")
        assert quantized_layers(err) == ([(str(LINEARS), str(width))] if width < 16 else [])
        model, tokenizer = minilora.load(str(checkpoint), bits=width)
        answers = minilora.generate(model, tokenizer, [TEXT], max_new_tokens=NEW_TOKENS)
        assert answers == [expected[width]]


def test_loading_in_4_bits_gives_the_logits_of_training(tmp_path: Path, base: Path):
    checkpoint = trained(tmp_path / "run", base)
    tokens = torch.randint(200, (40,), generator=torch.Generator().manual_seed(1))
    expected = logits_of(reference_model(base, 4, checkpoint), tokens)
    for bits in ({"bits": 4}, {}):
        model, _ = minilora.load(str(checkpoint), **bits)  # the default is as it was trained
        torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-3)
    in_16_bits, _ = minilora.load(str(checkpoint), bits=16)
    assert (in_16_bits(tokens) - expected).abs().max() > 0.1


def test_plain_model_is_asked_in_4_bits(base: Path, ask: Script):
    code, out, err = ask(base, "--bits", 4)
    assert (code, out) == (0, greedy(reference_model(base, 4), base) + "\n")
    assert quantized_layers(err) == [(str(LINEARS), "4")]


@pytest.mark.parametrize(("bits", "others"), [(4, (8, 16)), (8, (4, 16))])
def test_model_that_is_stored_quantized_is_asked_in_its_own_width(
    tmp_path: Path, base: Path, bits: int, others: tuple[int, ...], ask: Script
):
    stored = store_with_bitsandbytes(base, tmp_path / "stored", bits)
    checkpoint = trained(tmp_path / "run", stored, model__bits=bits)
    for model, adapter in ((stored, None), (checkpoint, checkpoint)):
        code, out, err = ask(model, "--dtype", "float32")
        assert (code, out) == (0, greedy(reference_model(stored, bits, adapter), stored) + "\n")
        assert quantized_layers(err) == [(str(LINEARS), str(bits))]
        for other in others:
            code, out, err = ask(model, "--dtype", "float32", "--bits", other)
            assert (code, out) == (2, "")
            assert re.fullmatch(rf"error: .*quantized to {bits} bits.*--bits {bits}\b.*\n", err)
