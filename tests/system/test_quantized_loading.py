"""Quantized models in a process of their own: memory while loading, and what is imported when."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers.quantized import BOTH_WIDTHS, SIZES, normal
from helpers.tiny_models import config_json, tiny
from minilora.model.hf_config import DecoderConfig
from minilora.model.transformer import CausalLM

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parents[2]
MB = 1_000_000
NOISE = 12 * MB  # the allocator rounds up, and keeps some of what is freed
VOCAB_SIZE = 15000


def run_python(code: str, *arguments: str) -> tuple[str, str]:
    """Run `code` in a new interpreter; return its stdout and stderr."""
    command = [sys.executable, "-c", code, *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout, run.stderr


# ---- memory

LOAD = """
import sys
from pathlib import Path
import torch
from minilora.build import build_for_inference
import minilora.model.quantization

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

torch.set_num_threads(1)
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
loaded = build_for_inference(Path(sys.argv[1]), torch.device("cpu"), bits=int(sys.argv[2]))
tensors = [*loaded.model.parameters(), *loaded.model.buffers()]
print(sum(t.numel() * t.itemsize for t in tensors), memory("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a random bfloat16 checkpoint of 300 MB, nearly all of it in linear layers.

    They must not pile up while they are read. As in real models, the embedding is the largest
    tensor.
    """
    directory = tmp_path_factory.mktemp("large")
    raw = config_json(
        "llama3",
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=VOCAB_SIZE,
        tie_word_embeddings=True,
        torch_dtype="bfloat16",
    )
    (directory / "config.json").write_text(json.dumps(raw))
    with torch.device("meta"):
        model = CausalLM(DecoderConfig.from_hf(raw))
    noise = normal(VOCAB_SIZE, 1024).mul_(0.02).to(torch.bfloat16).flatten()
    tensors = {
        name: noise[: p.numel()].view(p.shape).clone() for name, p in model.named_parameters()
    }
    save_file(tensors, directory / "model.safetensors")
    return directory


@BOTH_WIDTHS
def test_loading_takes_the_quantized_model_and_a_few_tensors(large, bits):
    held, peak = map(int, run_python(LOAD, str(large), str(bits))[0].split())
    largest, total = VOCAB_SIZE * 1024 * 2, (large / "model.safetensors").stat().st_size
    allowed = held + 3 * largest + NOISE
    assert allowed < total  # so that a model held in 16 bits on the way would not pass
    assert peak <= allowed, (
        f"{peak / MB:.0f} MB for a model of {held / MB:.0f} MB and tensors of {largest / MB:.0f} MB"
    )


# ---- imports

BUILD = """
import sys
from pathlib import Path
import torch, minilora
from minilora.build import build_for_inference
assert "bitsandbytes" not in sys.modules
for bits in (16, 8):
    build_for_inference(Path(sys.argv[1]), torch.device("cpu"), bits=bits)
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


def test_bitsandbytes_is_imported_by_quantized_models_only_and_prints_nothing(tmp_path):
    tiny("qwen2", **SIZES).save_pretrained(tmp_path)
    assert run_python(BUILD, str(tmp_path)) == ("", "14 linear layers in 8 bits\n")


def test_help_does_not_import_bitsandbytes():
    assert run_python(HELP)[0].count("--help") >= 3
