"""Dtypes of models on CPUs with and without 16-bit arithmetic, and whole runs without it.

Which kind of CPU it is decides `has_fast_bfloat16`, which is replaced here; one subprocess asks
oneDNN, with its instructions limited.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import merge
import minilora
import train
from helpers.build import build
from helpers.tiny_models import random_tokens
from helpers.tiny_runs import base_model, losses, quick_config
from minilora.build import LoadedModel
from minilora.checkpoint.training_state import TENSORS_FILE
from minilora.config import LoraConfig
from minilora.model import precision
from minilora.model.frozen_linear import CastLinear
from minilora.model.precision import Precision, choose_precision, precision_note

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CAST_NOTE = (
    "this CPU has no fast 16-bit arithmetic: 16-bit weights stay bfloat16 in memory, "
    "and are cast to float32 to compute"
)
SLOW_WARNING = "warning: this CPU has no fast bfloat16 arithmetic: training may take 100 times"


@pytest.fixture
def slow_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this CPU have no 16-bit arithmetic."""
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda device: False)
    monkeypatch.setattr(precision, "has_fast_float16", lambda device: False)


# --- the choice


@pytest.mark.parametrize(
    ("wanted", "saved", "with_bfloat16", "without"),
    [
        ("auto", "bfloat16", (BF16, BF16), (FP32, BF16)),
        ("auto", "float16", (BF16, BF16), (FP32, FP16)),
        ("auto", "float32", (FP32, FP32), (FP32, FP32)),
        ("auto", "float64", (BF16, BF16), (FP32, BF16)),
        ("bfloat16", "bfloat16", (BF16, BF16), (BF16, BF16)),
        ("float16", "bfloat16", (FP16, FP16), (FP16, FP16)),
        ("float32", "bfloat16", (FP32, FP32), (FP32, FP32)),
    ],
)
@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_dtypes_on_a_cpu(wanted, saved, with_bfloat16, without, field, monkeypatch):
    for is_fast, expected in ((True, with_bfloat16), (False, without)):
        monkeypatch.setattr(precision, "has_fast_bfloat16", lambda device, fast=is_fast: fast)
        assert choose_precision(wanted, {field: saved}, CPU) == Precision(*expected)


def test_a_gpu_without_bfloat16_computes_in_float16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    device = torch.device("cuda")
    assert choose_precision("auto", {"dtype": "bfloat16"}, device) == Precision(FP16, FP16)
    assert precision_note(FP16, FP16, device) is None


@pytest.mark.parametrize("saved", ["bfloat16", "float16"])
def test_bytes_of_quantized_weights_do_not_depend_on_the_cpu(saved: str, monkeypatch):
    rounded = []
    for is_fast in (True, False):
        monkeypatch.setattr(precision, "has_fast_bfloat16", lambda device, fast=is_fast: fast)
        rounded.append(choose_precision("auto", {"dtype": saved}, CPU).before_quantization)
    assert rounded == [BF16, BF16]
    assert choose_precision("float16", {"dtype": saved}, CPU).before_quantization == FP16


@pytest.mark.parametrize(
    ("machine", "onednn", "in_onednn", "has_avx512_bf16", "has_amx", "expected"),
    [
        ("x86_64", True, True, True, False, True),
        ("x86_64", True, True, False, True, True),
        ("x86_64", True, True, False, False, False),  # AVX-512 alone: oneDNN emulates bfloat16
        ("x86_64", True, False, True, True, False),
        ("aarch64", True, True, False, False, True),
        ("arm64", False, True, False, False, False),
    ],
)
def test_fast_bfloat16_needs_the_instructions(
    machine, onednn, in_onednn, has_avx512_bf16, has_amx, expected, monkeypatch
):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: in_onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert precision.has_fast_bfloat16(CPU) is expected
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not precision.has_fast_bfloat16(CPU)  # torch's own kernels have none of it


def test_notes_name_the_cost(slow_cpu):
    assert precision_note(FP32, BF16, CPU) == CAST_NOTE
    assert precision_note(FP32, FP32, CPU) is None
    of_full_run = precision_note(FP32, BF16, CPU, trains_all=True)
    assert of_full_run is not None and "saved in bfloat16" in of_full_run
    for dtype in (BF16, FP16):
        note = precision_note(dtype, dtype, CPU)
        assert note is not None and "100 times" in note and str(dtype)[6:] in note


def test_a_cpu_with_16_bit_arithmetic_needs_no_note(monkeypatch):
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda device: True)
    monkeypatch.setattr(precision, "has_fast_float16", lambda device: True)
    assert {precision_note(dtype, dtype, CPU) for dtype in (BF16, FP16, FP32)} == {None}


# --- models


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save a tiny Qwen2 (with biases) in each 16-bit dtype."""
    directory = tmp_path_factory.mktemp("bases")
    return {
        dtype: base_model(directory / dtype, "qwen2", "llama3", hidden_size=64, torch_dtype=dtype)
        for dtype in ("bfloat16", "float16")
    }


def step(loaded: LoadedModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of two documents, and all gradients by name."""
    tokens = random_tokens(80)
    labels = tokens.index_fill(0, torch.tensor([0, 40]), -100)
    generator = torch.Generator().manual_seed(0)
    for name, p in loaded.model.named_parameters():
        if "lora_B" in name:  # it is 0, and would keep A from having a gradient
            p.data.normal_(0, 0.1, generator=generator)
    loss = loaded.model(tokens, [40, 40], labels=labels)
    loss.backward()
    trained = {name: p for name, p in loaded.model.named_parameters() if p.requires_grad}
    return loss.detach(), {name: p.grad for name, p in trained.items()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("saved", ["bfloat16", "float16"])
def test_loss_and_gradients_are_those_of_float32_to_the_bit(saved, checkpointing, bases, slow_cpu):
    lora = LoraConfig(rank=4)
    cast = build(bases[saved], "auto", lora, gradient_checkpointing=checkpointing)
    plain = build(bases[saved], "float32", lora, gradient_checkpointing=checkpointing)
    assert (cast.dtype, cast.weight_dtype) == (FP32, getattr(torch, saved))
    for name, p in cast.model.named_parameters():
        is_matrix = p.ndim == 2 and "lora_" not in name
        assert p.dtype == (cast.weight_dtype if is_matrix else FP32), name

    cast_loss, cast_grads = step(cast)
    loss, grads = step(plain)
    assert torch.equal(cast_loss, loss)
    assert cast_grads.keys() == grads.keys()
    for name, grad in grads.items():
        assert torch.equal(cast_grads[name], grad), name


def test_a_full_run_trains_in_float32_and_is_saved_as_it_was(bases, slow_cpu):
    loaded = build(bases["bfloat16"], "auto", full=True)
    assert loaded.autocast is None
    assert (loaded.dtype, loaded.weight_dtype) == (FP32, BF16)
    assert {p.dtype for p in loaded.model.parameters()} == {FP32}
    assert not any(isinstance(module, CastLinear) for module in loaded.model.modules())


def test_drawn_weights_have_the_dtypes_of_read_ones(bases, slow_cpu):
    lora = LoraConfig(rank=4, train_embeddings=True)
    for random_weights in (False, True):
        model = build(bases["bfloat16"], "auto", lora, random_weights=random_weights).model
        assert model.model.norm.weight.dtype == model.model.embed_tokens.weight.dtype == FP32
        assert model.model.layers[0].mlp.up_proj.base_layer.weight.dtype == BF16


@pytest.mark.parametrize("saved", ["bfloat16", "float16"])
def test_an_nf4_base_is_the_same_with_float32_arithmetic(saved, bases, monkeypatch):
    models = []
    for is_fast in (True, False):
        monkeypatch.setattr(precision, "has_fast_bfloat16", lambda device, fast=is_fast: fast)
        models.append(build(bases[saved], bits=4, lora=LoraConfig(rank=4)))
    fast, slow = models
    assert (fast.dtype, slow.dtype) == (BF16, FP32)
    for name, p in fast.model.named_parameters():
        if p.dtype in (torch.uint8, torch.int32):
            assert torch.equal(p, slow.model.get_parameter(name)), name
    loss, grads = step(slow)
    assert loss.isfinite() and {grad.dtype for grad in grads.values()} == {FP32}


def test_answers_are_those_of_float32(bases, slow_cpu, capsys):
    answers = []
    for dtype in ("auto", "float32"):
        model, tokenizer = minilora.load(str(bases["bfloat16"]), dtype=dtype, device="cpu")
        prompts = ["light", "the old sound of new work", "work"]
        answers.append(minilora.generate(model, tokenizer, prompts, max_new_tokens=12))
    assert answers[0] == answers[1] and all(answers[0])
    assert capsys.readouterr().err.splitlines() == [CAST_NOTE]


# --- runs


def test_bfloat16_is_obeyed_with_a_warning(bases, slow_cpu, capsys):
    model, _ = minilora.load(str(bases["bfloat16"]), dtype="bfloat16", device="cpu")
    assert {p.dtype for p in model.parameters()} == {BF16}
    assert [SLOW_WARNING in line for line in capsys.readouterr().err.splitlines()] == [True]


def test_a_lora_run_is_one_in_float32_and_merges_into_16_bits(bases, slow_cpu, tmp_path, capsys):
    runs = {}
    for dtype in ("auto", "float32"):
        config = quick_config(tmp_path / dtype, bases["bfloat16"], model__dtype=dtype)
        config.train.max_steps = 3
        assert train.main(config) == 0
        runs[dtype] = config
    assert losses(runs["auto"]) == losses(runs["float32"])
    assert capsys.readouterr().err.count(CAST_NOTE) == 1

    checkpoint = Path(runs["auto"].output_dir, "checkpoint-final")
    assert merge.main(merge.Args(str(checkpoint), verify=True)) == 0
    captured = capsys.readouterr()
    assert captured.err.count(CAST_NOTE) == 0  # it compares in float32
    gap = float(captured.out.partition("merged: ")[2].partition(",")[0])
    assert 0 < gap < 0.5
    merged = checkpoint / "merged"
    assert {t.dtype for t in load_file(merged / "model.safetensors").values()} == {BF16}

    # in memory adapters are merged into the same 16-bit weights
    folded, _ = minilora.load(str(checkpoint), device="cpu")
    read, _ = minilora.load(str(merged), device="cpu")
    assert all(isinstance(module, CastLinear) for module in folded.model.layers[0].mlp.children())
    for name, p in read.named_parameters():
        assert p.dtype == folded.get_parameter(name).dtype
        torch.testing.assert_close(folded.get_parameter(name), p, rtol=2**-7, atol=1e-6)


def test_a_full_run_is_saved_in_16_bits_and_resumes(bases, slow_cpu, tmp_path):
    config = quick_config(tmp_path, bases["bfloat16"], method="full", model__dtype="auto")
    config.train.max_steps = 4
    config.train.save_steps = 2
    config.train.learning_rate = 1e-3
    assert train.main(config) == 0
    final = Path(config.output_dir) / "checkpoint-final"
    weights = load_file(final / "model.safetensors")
    assert {t.dtype for t in weights.values()} == {BF16}
    assert json.loads((final / "config.json").read_text())["dtype"] == "bfloat16"
    states = load_file(final / TENSORS_FILE)
    masters = {name: t for name, t in states.items() if name.startswith("master.")}
    assert masters.keys() == {f"master.{name}" for name in weights}
    assert {t.dtype for t in masters.values()} == {FP32}

    resumed = quick_config(tmp_path / "again", bases["bfloat16"], method="full")
    resumed.model.dtype = "auto"
    resumed.data, resumed.train = config.data, config.train
    Path(resumed.output_dir).mkdir()
    (Path(config.output_dir) / "checkpoint-2").rename(Path(resumed.output_dir) / "checkpoint-2")
    assert train.main(resumed) == 0
    again = load_file(Path(resumed.output_dir) / "checkpoint-final" / TENSORS_FILE)
    assert all(torch.equal(tensor, again[name]) for name, tensor in states.items())


PROBE = """
import sys, torch, minilora
from minilora.model import precision
assert not precision.has_fast_bfloat16(torch.device("cpu"))
assert not precision.has_fast_float16(torch.device("cpu"))
model, tokenizer = minilora.load(sys.argv[1])
print({str(p.dtype) for p in model.parameters() if p.ndim == 2})
print(minilora.generate(model, tokenizer, ["light"], max_new_tokens=4))
"""


@pytest.mark.system
@pytest.mark.skipif(platform.machine() != "x86_64", reason="limits the instructions of an x86 CPU")
def test_onednn_without_its_instructions_is_noticed(bases):
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROBE, str(bases["bfloat16"])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert CAST_NOTE in done.stderr
    assert done.stdout.splitlines()[0] == "{'torch.bfloat16'}"
