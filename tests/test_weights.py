"""Hugging Face directories against transformers and safetensors themselves: weights in and out, broken files, the hub."""

import http.server
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import minilora
import tiny_tokenizers
from minilora import weights
from minilora.build import build_model
from minilora.config import UserError
from minilora.model import CausalLM, DecoderConfig
from minilora.running import saving
from minilora.running.directory import save_config
from minilora.running.saving import save_weights, write_safetensors
from minilora.weights import (
    draw_weights,
    load_weights,
    read_json,
    resolve,
    weight_map,
)
from tiny_models import VOCAB, config_json, from_config_json, ours, random_tokens, tiny

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SHARD = "20KB"  # the tiny models make several of them
INDEX = "model.safetensors.index.json"
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
    return build_model(directory, CPU).model.eval()


def change_tensors(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite a safetensors file with other tensors in it."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@torch.no_grad()
def assert_same_logits(model: CausalLM, hf: PreTrainedModel) -> None:
    tokens = random_tokens(24)
    torch.testing.assert_close(model(tokens), hf(tokens.unsqueeze(0)).logits.squeeze(0), rtol=0, atol=1e-4)


MODELS = {
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
    model = build_model(directory, CPU, "bfloat16").model
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, hf_llama.state_dict()[name].to(torch.bfloat16)), name


def test_loaded_weights_do_not_hang_on_the_file(directory: Path, hf_llama: PreTrainedModel):
    """A checkpoint may be overwritten or removed while its model is in use."""
    model = loaded(directory)
    file = directory / "model.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    assert_same_logits(model, hf_llama)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000], ids=["single", "sharded"])
def test_what_is_written_is_read_by_transformers(
    tied: bool, dtype: torch.dtype, shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(saving, "SHARD_BYTES", shard_bytes)
    hf = tiny("qwen2", tie_word_embeddings=tied)
    save_weights(ours(hf), tmp_path, dtype)
    save_config(tmp_path, json.loads(hf.config.to_json_string()), dtype)
    expected = {name: tensor.to(dtype) for name, tensor in hf.state_dict().items()}

    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    state = reloaded.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)

    if tied:
        del expected["lm_head.weight"]  # one matrix, stored once
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes < 10**9)
    held: dict[str, Tensor] = {}
    for file in files:
        tensors = load_file(file)
        assert not held.keys() & tensors.keys()
        assert sum(t.nbytes for t in tensors.values()) <= shard_bytes or len(tensors) == 1
        held |= tensors
    assert held.keys() == expected.keys() and all(torch.equal(held[name], expected[name]) for name in held)
    if len(files) > 1:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in held.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_written_file_is_read_by_safetensors(dtype: torch.dtype, tmp_path: Path):
    tensors = {"größe": torch.randn(6, 4).t(), "row": torch.randn(3), "odd": torch.randn(1, 7, 1)}  # the first not contiguous
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.empty(0, 4)}
    layout = {name: (dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    file = tmp_path / "file.safetensors"
    write_safetensors(file, layout, tensors.__getitem__)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    read = load_file(file)
    assert read.keys() == tensors.keys()
    for name, tensor in read.items():
        assert tensor.dtype == dtype and torch.equal(tensor, tensors[name].to(dtype)), name


def test_no_more_than_a_few_tensors_are_held_while_writing(tmp_path: Path):
    made: list[weakref.ref] = []

    def tensor_of(name: str) -> Tensor:
        memory = np.zeros(5, np.float32)
        made.append(weakref.ref(memory))
        # this one, the one being written meanwhile, and one that the writing thread is about to let go
        assert sum(each() is not None for each in made) <= 3
        return torch.from_numpy(memory)

    write_safetensors(tmp_path / "file", {f"t{i}": (torch.float32, (5,)) for i in range(20)}, tensor_of)
    assert len(load_file(tmp_path / "file")) == len(made) == 20


PEAK_OF_LOADING = """
import sys
from pathlib import Path
import torch
from minilora.build import build_model
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
small, large = map(Path, sys.argv[1:])
build_model(small, torch.device("cpu"))  # whatever is loaded or allocated once
before = peak()
model = build_model(large, torch.device("cpu")).model
print(peak() - before, sum(p.nbytes for p in model.parameters()))
"""


def test_loading_needs_no_more_memory_than_the_model(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    large = tmp_path / "large"
    large.mkdir()
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 6, "vocab_size": 8000}
    raw = config_json("llama2", **sizes, torch_dtype="bfloat16")
    monkeypatch.setattr(saving, "SHARD_BYTES", 50_000_000)
    with torch.device("meta"):
        model = CausalLM(DecoderConfig.from_hf(raw))
    save_weights(model.to_empty(device="cpu"), large, torch.bfloat16)
    save_config(large, raw, torch.bfloat16)
    command = [sys.executable, "-c", PEAK_OF_LOADING, str(shards), str(large)]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}  # so that glibc keeps no freed tensors for later
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    growth, size = map(int, run.stdout.split())
    largest = 8000 * 1024 * 2
    assert size > 9 * largest
    assert growth < size + 2 * largest, f"{growth:,} bytes for a model of {size:,}"


# --- what is wrong with a checkpoint is named ---


def remove_tensor(directory: Path) -> None:
    change_tensors(directory / "model.safetensors", lambda tensors: tensors.pop(Q_PROJ))


def add_tensor(directory: Path) -> None:
    change_tensors(directory / "model.safetensors", lambda tensors: tensors.update({"model.layers.2.x.weight": torch.zeros(2)}))


def change_shape(directory: Path) -> None:
    change_tensors(directory / "model.safetensors", lambda tensors: tensors.update({Q_PROJ: torch.zeros(32, 31)}))


def tear(directory: Path) -> None:
    file = directory / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)


def tear_header(directory: Path) -> None:
    os.truncate(directory / "model.safetensors", 100)


def empty(directory: Path) -> None:
    os.truncate(directory / "model.safetensors", 0)


def page_of_html(directory: Path) -> None:
    (directory / "model.safetensors").write_text("<!DOCTYPE html><html>a login page, downloaded in place of the file</html>")


def no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def not_json(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "llama",')


def no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def config_a_list(directory: Path) -> None:
    (directory / "config.json").write_text("[]")


DAMAGES = {
    remove_tensor: [Q_PROJ, "1 missing, 0 unexpected"],
    add_tensor: ["model.layers.2.x.weight", "0 missing, 1 unexpected"],
    change_shape: ["model.safetensors", Q_PROJ, "[32, 31]", "[32, 32]"],
    tear: ["model.safetensors"],
    tear_header: ["model.safetensors"],
    empty: ["model.safetensors"],
    page_of_html: ["model.safetensors"],
    no_weights: ["model.safetensors"],
    not_json: ["config.json"],
    no_config: ["config.json", "does not exist"],
    config_a_list: ["config.json", "list"],
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_model_is_refused_by_name(damage: Callable[[Path], None], directory: Path):
    damage(directory)
    with pytest.raises(UserError) as error:
        loaded(directory)
    assert all(word in str(error.value) for word in [str(directory), *DAMAGES[damage]]), error.value


def remove_shard(directory: Path) -> str:
    shard = sorted(directory.glob("*.safetensors"))[2]
    shard.unlink()
    return shard.name


def tear_shard(directory: Path) -> str:
    shard = sorted(directory.glob("*.safetensors"))[2]
    os.truncate(shard, shard.stat().st_size // 2)
    return shard.name


def tear_index(directory: Path) -> str:
    file = directory / INDEX
    os.truncate(file, file.stat().st_size // 2)
    return INDEX


def index_without_map(directory: Path) -> str:
    (directory / INDEX).write_text('{"metadata": {}}')
    return INDEX


def index_of_another_split(directory: Path) -> str:
    index = read_json(directory / INDEX)
    names = sorted(set(index["weight_map"].values()))
    index["weight_map"] = dict.fromkeys(index["weight_map"], names[0])
    (directory / INDEX).write_text(json.dumps(index))
    return names[0]


@pytest.mark.parametrize(
    "damage", [remove_shard, tear_shard, tear_index, index_without_map, index_of_another_split], ids=lambda d: d.__name__
)
def test_a_damaged_shard_or_index_is_refused_by_name(damage: Callable[[Path], str], shards: Path):
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


def test_the_second_copy_of_a_tied_matrix_is_ignored(tmp_path: Path):
    hf = tiny("qwen2", tie_word_embeddings=True)
    saved(hf, tmp_path)
    copy = hf.model.embed_tokens.weight.detach().clone()
    change_tensors(tmp_path / "model.safetensors", lambda tensors: tensors.update({"lm_head.weight": copy}))
    assert_same_logits(loaded(tmp_path), hf)


def test_old_rotary_buffers_are_ignored(directory: Path, hf_llama: PreTrainedModel):
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    change_tensors(directory / "model.safetensors", lambda tensors: tensors.update(old))
    assert_same_logits(loaded(directory), hf_llama)


def test_an_untied_model_needs_its_head(directory: Path):
    change_tensors(directory / "model.safetensors", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(UserError, match=r"lacks lm_head\.weight"):
        loaded(directory)


def test_weight_map_names_every_tensor_and_its_file(shards: Path, directory: Path):
    for where in (shards, directory):
        found = weight_map(where)
        assert found == {name: file for file in where.glob("*.safetensors") for name in load_file(file)}


# --- config.json of both major versions of transformers ---


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_forms_of_config_json(family: str, dtype: str, tmp_path: Path):
    raw = config_json(family, **MODELS[family], vocab_size=VOCAB, torch_dtype=dtype)
    new = shutil.copytree(tiny_tokenizers.llama3(), tmp_path / "transformers 5")
    saved(from_config_json(raw), new)
    assert "rope_parameters" in read_json(new / "config.json") and "torch_dtype" not in read_json(new / "config.json")
    old = shutil.copytree(new, tmp_path / "transformers 4")
    (old / "config.json").write_text(json.dumps(raw))

    tokens = random_tokens(24)
    logits = [minilora.load(str(each), device="cpu")[0](tokens) for each in (old, new)]
    assert torch.equal(*logits) and logits[0].dtype == getattr(torch, dtype) and logits[0].isfinite().all()


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_save_config_changes_the_dtype_alone(key: str, tmp_path: Path):
    raw = {**config_json("llama3", torch_dtype=...), key: "float16", "own key": ["ü"]}
    save_config(tmp_path, raw, torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) == {**raw, key: "bfloat16"}


# --- weights drawn from a seed ---


def drawn(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = CausalLM(DecoderConfig.from_hf(config_json("qwen2", hidden_size=64, intermediate_size=96)))
    torch.manual_seed(torch.initial_seed() + 1)  # the global generator has no say
    draw_weights(model, CPU, dtype, 0.02, seed)
    return model.state_dict()


def test_drawn_weights_are_a_function_of_the_seed():
    first, again, other, rounded = drawn(3), drawn(3), drawn(4), drawn(3, torch.bfloat16)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert torch.equal(tensor.to(torch.bfloat16), rounded[name])
        if tensor.ndim == 1:
            assert (tensor == (1.0 if "norm" in name else 0.0)).all()
        else:
            assert not torch.equal(tensor, other[name])
            standard_error = 0.02 / (2 * tensor.numel()) ** 0.5  # of the standard deviation of a normal sample
            assert abs(tensor.std().item() - 0.02) < 5 * standard_error
            assert abs(tensor.mean().item()) < 5 * 0.02 / tensor.numel() ** 0.5
    matrices = {tuple(tensor.flatten()[:4].tolist()) for tensor in first.values() if tensor.ndim > 1}
    assert len(matrices) == sum(tensor.ndim > 1 for tensor in first.values())  # no two alike


def test_loading_keeps_what_is_trained_and_what_is_frozen(directory: Path):
    with torch.device("meta"):
        model = CausalLM(DecoderConfig.from_hf(read_json(directory / "config.json")))
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    load_weights(model, directory, CPU, torch.float32)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["model.norm.weight"]


# --- where a model is ---


def test_a_directory_is_itself(directory: Path, monkeypatch: pytest.MonkeyPatch):
    assert resolve(str(directory)) == directory
    monkeypatch.chdir(directory.parent.parent)
    assert resolve(f"{directory.parent.name}/{directory.name}").samefile(directory)  # though it looks like a hub id
    monkeypatch.setenv("HOME", str(directory.parent))
    assert resolve(f"~/{directory.name}").samefile(directory)


@pytest.mark.parametrize("name", ["{}/absent", "./absent", "../owner/absent", "~/absent", "absent", "a/b/c", ""])
def test_what_is_neither_a_directory_nor_a_hub_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fetch(*args, **options):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(weights.huggingface_hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(repr(name.format(tmp_path)))):
        resolve(name.format(tmp_path))


SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as its client needs to fetch `owner/name` at the revisions main and v2."""

    address: str
    files: dict[str, bytes]
    asked: list[str]

    def do_GET(self):
        path = self.path.split("?")[0]
        self.asked.append(path)
        name = path.split("/")[-1]
        if path in ("/api/models/owner/name/revision/main", "/api/models/owner/name", "/api/models/owner/name/revision/v2"):
            self.answer(json.dumps({"id": "owner/name", "sha": SHA, "siblings": [{"rfilename": f} for f in self.files]}).encode())
        elif path == f"/api/models/owner/name/tree/{SHA}":
            tree = [{"type": "file", "path": f, "size": len(self.files[f]), "oid": f"{i:040}"} for i, f in enumerate(self.files)]
            self.answer(json.dumps(tree).encode())
        elif path == f"/owner/name/resolve/{SHA}/{name}" and name in self.files:
            self.answer(self.files[name])
        else:
            code = "RevisionNotFound" if path.startswith("/api/models/owner/name/") else "RepoNotFound"
            self.answer(b"{}", 404, {"X-Error-Code": code, "X-Error-Message": "not there"})

    do_HEAD = do_GET

    def answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        etag = f'"{hash(body):x}"'
        for key, value in {"Content-Length": str(len(body)), "ETag": etag, "X-Repo-Commit": SHA, **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(directory: Path) -> Iterator[type[Hub]]:
    """A hub on the loopback interface with the tiny Llama, and things that nobody needs, as `owner/name`."""
    Hub.asked = []
    Hub.files = {file.name: file.read_bytes() for file in directory.iterdir()}
    Hub.files |= {"tokenizer.model": b"t", "chat_template.jinja": b"{{ x }}", "README.md": b"#", "pytorch_model.bin": b"pickle"}
    Hub.files |= {"modeling_custom.py": b"raise SystemExit", "model.onnx": b"x"}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Hub
    server.shutdown()
    thread.join()
    server.server_close()


ASK_THE_HUB = """
import sys
from minilora.config import UserError
from minilora.weights import resolve
for name, revision in [arg.split("@") for arg in sys.argv[1:]]:
    try:
        print("found", resolve(name, revision or None))
    except UserError as error:
        print("error", error)
"""


def ask_the_hub(endpoint: str, home: Path, *names: str) -> list[str]:
    """What `resolve` answers for each `name@revision`; in a process of its own, as the client reads HF_ENDPOINT on import."""
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", ASK_THE_HUB, *names]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_models_are_fetched_from_the_hub(hub: type[Hub], directory: Path, hf_llama: PreTrainedModel, tmp_path: Path):
    home = tmp_path / "home"
    names = ["owner/name@", "owner/name@v2", "owner/name@v3", "owner/absent@"]
    found, found_v2, no_revision, no_model = ask_the_hub(hub.address, home, *names)
    snapshot = Path(found.removeprefix("found "))
    assert found == found_v2 and snapshot.is_relative_to(home) and snapshot.name == SHA
    wanted = {file.name for file in directory.iterdir()} | {"tokenizer.model", "chat_template.jinja"}
    assert {file.name for file in snapshot.iterdir()} == wanted  # neither pickles, nor code, nor what other tools need
    assert not any(path.endswith((".bin", ".py", ".md", ".onnx")) for path in hub.asked)
    assert_same_logits(loaded(snapshot), hf_llama)
    assert no_revision.startswith("error model 'owner/name'") and no_model.startswith("error model 'owner/absent'")

    # nobody listens there: what has been fetched is found, everything else is one line for the user
    cached, *unknown = ask_the_hub("http://127.0.0.1:9", home, "owner/name@", "owner/other@", "owner/name@v4")
    assert cached == found
    assert len(unknown) == 2 and all(line.startswith("error model 'owner/") for line in unknown)
