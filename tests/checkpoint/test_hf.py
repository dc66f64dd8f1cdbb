"""Models in Hugging Face layout against transformers: weights that are read, damaged files."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import minilora
from helpers import tiny_tokenizers
from helpers.tiny_models import VOCAB, config_json, from_config_json, random_tokens, tiny
from minilora.build import build_for_inference
from minilora.checkpoint import hf_writer
from minilora.checkpoint.hf import INDEX_FILE, draw_weights, load_weights, weight_map
from minilora.checkpoint.hf_writer import save_config, save_weights
from minilora.errors import UserError
from minilora.files import read_json
from minilora.model.hf_config import DecoderConfig
from minilora.model.transformer import CausalLM

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SHARD = "20KB"  # transformers then writes the tiny models in several files
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def directory(hf_llama: PreTrainedModel, tmp_path: Path) -> Path:
    """A tiny Llama in one file."""
    return saved(hf_llama, tmp_path / "model")


@pytest.fixture
def shards(hf_llama: PreTrainedModel, tmp_path: Path) -> Path:
    """The same in several files."""
    return saved(hf_llama, tmp_path / "shards", SHARD)


def saved(hf: PreTrainedModel, directory: Path, max_shard_size: str = "1GB") -> Path:
    hf.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def loaded(directory: Path) -> CausalLM:
    return build_for_inference(directory, CPU).model


def change_tensors(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite a safetensors file with other tensors in it."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@torch.no_grad()
def assert_same_logits(model: CausalLM, hf: PreTrainedModel) -> None:
    tokens = random_tokens(24)
    expected = hf(tokens.unsqueeze(0)).logits.squeeze(0)
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-4)


MODELS: dict[str, dict] = {
    "llama3": {},
    "mistral_v1": {"sliding_window": 8},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("max_shard_size", ["1GB", SHARD])
def test_loading_gives_the_logits_of_transformers(family: str, max_shard_size: str, tmp_path: Path):
    hf = tiny(family, **MODELS[family])
    saved(hf, tmp_path, max_shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or max_shard_size != SHARD
    assert_same_logits(loaded(tmp_path), hf)


def test_loading_casts_to_the_dtype_asked_for(directory: Path, hf_llama: PreTrainedModel):
    model = build_for_inference(directory, CPU, "bfloat16").model
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, hf_llama.state_dict()[name].to(torch.bfloat16)), name


def test_loaded_weights_do_not_depend_on_the_file(directory: Path, hf_llama: PreTrainedModel):
    """A checkpoint may be overwritten or removed while its model is in use."""
    model = loaded(directory)
    file = directory / "model.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    assert_same_logits(model, hf_llama)


PEAK_OF_LOADING = """
import sys
from pathlib import Path
import torch
from minilora.build import build_for_inference

def peak():
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

small, large = map(Path, sys.argv[1:])
build_for_inference(small, torch.device("cpu"))  # whatever is loaded or allocated once
before = peak()
model = build_for_inference(large, torch.device("cpu")).model
print(peak() - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.system
def test_loading_needs_no_more_memory_than_the_model(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    large = tmp_path / "large"
    large.mkdir()
    raw = config_json(
        "llama2",
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=6,
        vocab_size=8000,
        torch_dtype="bfloat16",
    )
    monkeypatch.setattr(hf_writer, "SHARD_BYTES", 50_000_000)
    with torch.device("meta"):
        model = CausalLM(DecoderConfig.from_hf(raw))
    save_weights(model.to_empty(device="cpu"), large, torch.bfloat16)
    save_config(large, raw, torch.bfloat16)

    command = [sys.executable, "-c", PEAK_OF_LOADING, str(shards), str(large)]
    # so that glibc does not keep freed tensors for later
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    growth, size = map(int, run.stdout.split())
    largest_tensor = 8000 * 1024 * 2
    assert size > 9 * largest_tensor
    assert growth < size + 2 * largest_tensor, f"{growth:,} bytes for a model of {size:,}"


# --- what is wrong with a checkpoint is named ---


def remove_tensor(directory: Path) -> None:
    change_tensors(directory / "model.safetensors", lambda tensors: tensors.pop(Q_PROJ))


def add_tensor(directory: Path) -> None:
    new = {"model.layers.2.x.weight": torch.zeros(2)}
    change_tensors(directory / "model.safetensors", lambda tensors: tensors.update(new))


def change_shape(directory: Path) -> None:
    new = {Q_PROJ: torch.zeros(32, 31)}
    change_tensors(directory / "model.safetensors", lambda tensors: tensors.update(new))


def change_to_integers(directory: Path) -> None:
    new = {Q_PROJ: torch.zeros(32, 32, dtype=torch.int8)}
    change_tensors(directory / "model.safetensors", lambda tensors: tensors.update(new))


def truncate(directory: Path) -> None:
    file = directory / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)


def truncate_header(directory: Path) -> None:
    os.truncate(directory / "model.safetensors", 100)


def empty(directory: Path) -> None:
    os.truncate(directory / "model.safetensors", 0)


def replace_by_html(directory: Path) -> None:
    page = "<!DOCTYPE html><html>a login page, downloaded in place of the file</html>"
    (directory / "model.safetensors").write_text(page)


def remove_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def break_config(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "llama",')


def remove_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def make_config_a_list(directory: Path) -> None:
    (directory / "config.json").write_text("[]")


DAMAGES = {
    remove_tensor: [Q_PROJ, "1 missing, 0 unexpected"],
    add_tensor: ["model.layers.2.x.weight", "0 missing, 1 unexpected"],
    change_shape: ["model.safetensors", Q_PROJ, "[32, 31]", "[32, 32]"],
    change_to_integers: ["model.safetensors", Q_PROJ, "I8"],
    truncate: ["model.safetensors"],
    truncate_header: ["model.safetensors"],
    empty: ["model.safetensors"],
    replace_by_html: ["model.safetensors"],
    remove_weights: ["model.safetensors"],
    break_config: ["config.json"],
    remove_config: ["config.json", "does not exist"],
    make_config_a_list: ["config.json", "list"],
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_model_is_refused_by_name(damage: Callable[[Path], None], directory: Path):
    damage(directory)
    with pytest.raises(UserError) as error:
        loaded(directory)
    for word in [str(directory), *DAMAGES[damage]]:
        assert word in str(error.value)


def third_shard(directory: Path) -> Path:
    return sorted(directory.glob("*.safetensors"))[2]


def remove_shard(directory: Path) -> str:
    shard = third_shard(directory)
    shard.unlink()
    return shard.name


def truncate_shard(directory: Path) -> str:
    shard = third_shard(directory)
    os.truncate(shard, shard.stat().st_size // 2)
    return shard.name


def truncate_index(directory: Path) -> str:
    file = directory / INDEX_FILE
    os.truncate(file, file.stat().st_size // 2)
    return INDEX_FILE


def index_without_map(directory: Path) -> str:
    (directory / INDEX_FILE).write_text('{"metadata": {}}')
    return INDEX_FILE


def index_of_other_shards(directory: Path) -> str:
    index = read_json(directory / INDEX_FILE)
    names = sorted(set(index["weight_map"].values()))
    index["weight_map"] = dict.fromkeys(index["weight_map"], names[0])
    (directory / INDEX_FILE).write_text(json.dumps(index))
    return names[0]


@pytest.mark.parametrize(
    "damage",
    [remove_shard, truncate_shard, truncate_index, index_without_map, index_of_other_shards],
    ids=lambda damage: damage.__name__,
)
def test_damaged_shard_or_index_is_refused_by_name(damage: Callable[[Path], str], shards: Path):
    named = damage(shards)
    with pytest.raises(UserError, match=re.escape(str(shards / named))):
        loaded(shards)


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_never_loaded(name: str, directory: Path, tmp_path: Path):
    (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(pickle.dumps(Bomb(tmp_path / "unpickled")))
    with pytest.raises(UserError, match=f"{re.escape(str(directory))}.*{name}.*pickle"):
        loaded(directory)
    assert not (tmp_path / "unpickled").exists()
    pickle.loads((directory / name).read_bytes())
    assert (tmp_path / "unpickled").exists()  # the test would have seen it


def test_second_copy_of_a_tied_matrix_is_ignored(tmp_path: Path):
    hf = tiny("qwen2", tie_word_embeddings=True)
    saved(hf, tmp_path)
    copy = {"lm_head.weight": hf.model.embed_tokens.weight.detach().clone()}
    change_tensors(tmp_path / "model.safetensors", lambda tensors: tensors.update(copy))
    assert_same_logits(loaded(tmp_path), hf)


def test_old_rotary_buffers_are_ignored(directory: Path, hf_llama: PreTrainedModel):
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    change_tensors(directory / "model.safetensors", lambda tensors: tensors.update(old))
    assert_same_logits(loaded(directory), hf_llama)


def test_untied_model_needs_its_head(directory: Path):
    change_tensors(directory / "model.safetensors", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(UserError, match=r"lacks lm_head\.weight"):
        loaded(directory)


def test_weight_map_names_every_tensor_and_its_file(shards: Path, directory: Path):
    for model in (shards, directory):
        files = model.glob("*.safetensors")
        assert weight_map(model) == {name: file for file in files for name in load_file(file)}


# --- config.json of both major versions of transformers ---


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_forms_of_config_json_are_read(family: str, dtype: str, tmp_path: Path):
    raw = config_json(family, **MODELS[family], vocab_size=VOCAB, torch_dtype=dtype)
    new = shutil.copytree(tiny_tokenizers.llama3(), tmp_path / "transformers 5")
    saved(from_config_json(raw), new)
    new_raw = read_json(new / "config.json")
    assert "rope_parameters" in new_raw and "torch_dtype" not in new_raw
    old = shutil.copytree(new, tmp_path / "transformers 4")
    (old / "config.json").write_text(json.dumps(raw))

    tokens = random_tokens(24)
    logits = [minilora.load(str(each), device="cpu")[0](tokens) for each in (old, new)]
    assert torch.equal(*logits)
    assert logits[0].dtype == getattr(torch, dtype)
    assert logits[0].isfinite().all()


# --- weights drawn from a seed ---


def drawn(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    raw = config_json("qwen2", hidden_size=64, intermediate_size=96)
    with torch.device("meta"):
        model = CausalLM(DecoderConfig.from_hf(raw))
    torch.manual_seed(torch.initial_seed() + 1)  # the global generator must not matter
    draw_weights(model, CPU, dtype, 0.02, seed)
    return model.state_dict()


def test_drawn_weights_are_a_function_of_the_seed():
    first, again, other = drawn(3), drawn(3), drawn(4)
    rounded = drawn(3, torch.bfloat16)
    beginnings = set()
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert torch.equal(tensor.to(torch.bfloat16), rounded[name])
        if tensor.ndim == 1:
            assert (tensor == (1.0 if "norm" in name else 0.0)).all()
            continue
        assert not torch.equal(tensor, other[name])
        # of the standard deviation of a normal sample
        standard_error = 0.02 / (2 * tensor.numel()) ** 0.5
        assert abs(tensor.std().item() - 0.02) < 5 * standard_error
        assert abs(tensor.mean().item()) < 5 * 0.02 / tensor.numel() ** 0.5
        beginnings.add(tuple(tensor.flatten()[:4].tolist()))
    assert len(beginnings) == sum(tensor.ndim > 1 for tensor in first.values())  # no two alike


def test_loading_keeps_what_is_trained_and_what_is_frozen(directory: Path):
    with torch.device("meta"):
        model = CausalLM(DecoderConfig.from_hf(read_json(directory / "config.json")))
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    load_weights(model, directory, CPU, torch.float32)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["model.norm.weight"]
