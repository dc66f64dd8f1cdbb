"""merge.py against PEFT's merge_and_unload and transformers: weights, logits, files, prompts, and what it refuses."""

import copy
import dataclasses
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import merge
import minilora
import tiny_tokenizers
from minilora.build import build_model
from minilora.config import Config, DataConfig, LoraConfig, ModelConfig, UserError
from minilora.lora import lora_layers
from minilora.running.directory import TrainerState, save
from minilora.running.saving import save_tokenizer, save_weights
from minilora.tokenizer import MISTRAL_TEMPLATE, Tokenizer
from tiny_models import config_json, in_bfloat16, random_tokens, tiny

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
LORA = LoraConfig(rank=4, alpha=6, rslora=True)
INDEX = "model.safetensors.index.json"
TOKENS = random_tokens(40)


def base_of(hf: PreTrainedModel, directory: Path, max_shard_size: str = "1GB", tokenizer: str = "llama3") -> Path:
    """A model and a tokenizer as a directory in HF layout."""
    shutil.copytree(tiny_tokenizers.BUILDERS[tokenizer](), directory)
    hf.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def adapter_of(base: Path, directory: Path, lora: LoraConfig = LORA, data: DataConfig | None = None) -> Path:
    """A checkpoint of ours with a random adapter, B included."""
    model = build_model(base, CPU, lora=lora).model
    generator = torch.Generator().manual_seed(1)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1, generator=generator)
    config = Config(model=ModelConfig(name=str(base)), data=data or DataConfig())
    save(directory, model, Tokenizer(base), config, lora, TrainerState(), {"x": torch.zeros(1)}, base, torch.float32)
    return directory


@pytest.fixture
def base(hf_llama: PreTrainedModel, tmp_path: Path) -> Path:
    return base_of(hf_llama, tmp_path / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return adapter_of(base, tmp_path / "run" / "checkpoint-final")


def merged(adapter: Path, **options) -> Path:
    """Run merge.py; the directory it wrote."""
    assert merge.main(merge.Args(str(adapter), **options)) == 0
    return Path(options.get("out", adapter / "merged"))


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory's safetensors files."""
    held: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        assert not held.keys() & tensors.keys()
        held |= tensors
    return held


def update_of(adapter: Path, name: str) -> Tensor | None:
    """scaling * B @ A of a weight in float64, from the adapter's file; None if the adapter leaves the weight alone."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    path = f"base_model.model.{name.removesuffix('.weight')}"
    if f"{path}.lora_A.weight" not in tensors:
        return None
    a, b = (tensors[f"{path}.lora_{part}.weight"].double() for part in "AB")
    return LORA.alpha / LORA.rank**0.5 * b @ a


@torch.no_grad()
def logits_of(model) -> Tensor:
    return model(TOKENS) if not isinstance(model, PreTrainedModel | PeftModel) else model(TOKENS.unsqueeze(0)).logits[0]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


# --- the weights ---

MODELS: dict[str, dict] = {
    "llama3": {},
    "mistral_v1": {},
    "qwen2": {},  # has biases
    "qwen3": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"], ids=["single", "sharded"])
def test_merging_equals_peft(family: str, max_shard_size: str, tmp_path: Path):
    hf = tiny(family, **MODELS[family])
    base = base_of(hf, tmp_path / "base", max_shard_size)
    adapter = adapter_of(base, tmp_path / "adapter")
    live, _ = minilora.load(str(adapter), device="cpu")
    out = merged(adapter)

    theirs = PeftModel.from_pretrained(copy.deepcopy(hf), adapter).merge_and_unload()
    reloaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    expected, state = theirs.state_dict(), reloaded.state_dict()
    assert state.keys() == expected.keys()
    for name, weight in state.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-6, msg=name)
    for model in (live, reloaded, minilora.load(str(out), device="cpu")[0]):
        assert_same(logits_of(model), logits_of(theirs))
    assert (logits_of(live) - logits_of(hf)).abs().max() > 0.1  # the adapter does something

    files = {file.name for file in base.glob("*.safetensors*")}
    assert {file.name for file in out.glob("*.safetensors*")} == files and (len(files) > 1) == (max_shard_size != "1GB")
    for name in files - {INDEX}:  # each tensor stays in its file
        assert load_file(out / name).keys() == load_file(base / name).keys()
        with safe_open(out / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    if INDEX in files:
        assert json.loads((out / INDEX).read_text())["weight_map"] == json.loads((base / INDEX).read_text())["weight_map"]


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("down_proj",)], ids=str)
def test_what_the_adapter_leaves_alone_stays_bit_for_bit(targets: tuple[str, ...], base: Path, tmp_path: Path):
    out = merged(adapter_of(base, tmp_path / "adapter", LoraConfig(rank=4, target_modules=targets)))
    before, after = tensors_of(base), tensors_of(out)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.removesuffix(".weight").endswith(targets)} and changed


def test_a_tie_is_kept(tmp_path: Path):
    base = base_of(tiny("qwen3", tie_word_embeddings=True), tmp_path / "base")
    assert "lm_head.weight" not in tensors_of(base)
    adapter = adapter_of(base, tmp_path / "adapter")
    out = merged(adapter)
    assert "lm_head.weight" not in tensors_of(out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    reloaded = AutoModelForCausalLM.from_pretrained(out)
    assert reloaded.lm_head.weight.data_ptr() == reloaded.model.embed_tokens.weight.data_ptr()
    assert_same(logits_of(reloaded), logits_of(minilora.load(str(adapter), device="cpu")[0]))


def test_a_bfloat16_base_is_rounded_once(tmp_path: Path):
    """The sum is as exact as its result can be: no update is lost to an addition in 8 bits."""
    base = base_of(in_bfloat16("llama3")[0], tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter")
    out = merged(adapter)
    before, after = tensors_of(base), tensors_of(out)
    for name, weight in before.items():
        update = update_of(adapter, name)
        expected = weight if update is None else (weight.float() + update.float()).to(torch.bfloat16)
        assert after[name].dtype == torch.bfloat16
        # float32 sums in another order may fall on the other side of a rounding border, one in 2**16 times
        assert (after[name] != expected).float().mean() < 1e-3, name
        torch.testing.assert_close(after[name], expected, rtol=2**-7, atol=0)
    assert AutoConfig.from_pretrained(out).dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_dtype(dtype: str, key: str, tmp_path: Path):
    base = base_of(in_bfloat16("llama3")[0], tmp_path / "base")
    raw = config_json("llama3", torch_dtype=...)
    (base / "config.json").write_text(json.dumps({**raw, key: "bfloat16"}))
    adapter = adapter_of(base, tmp_path / "adapter")
    out = merged(adapter, dtype=dtype)
    for name, weight in tensors_of(out).items():
        update = update_of(adapter, name)
        exact = tensors_of(base)[name].double() + (0 if update is None else update)
        assert weight.dtype == getattr(torch, dtype)
        torch.testing.assert_close(weight.double(), exact, rtol=2 * torch.finfo(weight.dtype).eps, atol=1e-6, msg=name)
    assert json.loads((out / "config.json").read_text()) == {**raw, key: dtype}
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == getattr(torch, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_index_tells_the_size_of_the_tensors(dtype: str, hf_llama: PreTrainedModel, tmp_path: Path):
    """As transformers writes it: of the tensors, without the headers of their files."""
    base = base_of(hf_llama, tmp_path / "base", "20KB")
    assert json.loads((base / INDEX).read_text())["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(base).values())
    out = merged(adapter_of(base, tmp_path / "adapter"), dtype=dtype)
    assert json.loads((out / INDEX).read_text())["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(out).values())


def test_auto_keeps_the_dtype_of_each_tensor(base: Path, tmp_path: Path):
    """Such as norms in float32 among matrices in bfloat16."""
    mixed = {n: t if "norm" in n else t.to(torch.bfloat16) for n, t in load_file(base / "model.safetensors").items()}
    save_file(mixed, base / "model.safetensors", metadata={"format": "pt"})
    out = merged(adapter_of(base, tmp_path / "adapter"))
    assert {name: tensor.dtype for name, tensor in tensors_of(out).items()} == {name: t.dtype for name, t in mixed.items()}


# --- the files around them ---


def test_out_and_base(base: Path, adapter: Path, tmp_path: Path):
    """The base has moved since training."""
    expected = tensors_of(merged(adapter))
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=rf"{re.escape(str(base))}.*--base"):
        merged(adapter, out=str(tmp_path / "first"))
    out = merged(adapter, base=str(moved), out=str(tmp_path / "new" / "place"))
    assert out == tmp_path / "new" / "place" and not (tmp_path / "first").exists()
    assert tensors_of(out).keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors_of(out).items())


def test_the_files_of_a_merged_model(base: Path, adapter: Path):
    assert (base / "generation_config.json").is_file()
    out = merged(adapter)
    assert {file.name for file in out.iterdir()} == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "minilora.json", "manifest.json",
    }  # fmt: skip
    assert AutoConfig.from_pretrained(out).to_dict() == {**AutoConfig.from_pretrained(base).to_dict(), "_name_or_path": str(out)}
    assert [path.name for path in adapter.parent.iterdir()] == [adapter.name]


CHAT = [  # no two spaces in a row: there transformers 5 and sentencepiece disagree
    {"role": "user", "content": "Title: 物理学\nAn abstract."},
    {"role": "assistant", "content": "a -> b\nc -> d"},
    {"role": "user", "content": "Why?"},
]


@pytest.mark.parametrize("template", [None, "mistral"])
@pytest.mark.parametrize("name", tiny_tokenizers.BUILDERS)
def test_prompts_are_the_same_everywhere(name: str, template: str | None, tmp_path: Path):
    """In training, in infer.py, and in whatever serves the merged model with transformers' tokenizer."""
    plain = Tokenizer(tiny_tokenizers.BUILDERS[name]())
    base = base_of(tiny("llama3", vocab_size=plain.vocab_size, eos_token_id=plain.eos_id), tmp_path / "base", tokenizer=name)
    tokens = Tokenizer(base, MISTRAL_TEMPLATE if template else None)
    adapter = adapter_of(base, tmp_path / "adapter")
    save_tokenizer(tokens, adapter)
    out = merged(adapter)
    ours_again, theirs = Tokenizer(out), AutoTokenizer.from_pretrained(out)
    for messages in (CHAT, CHAT[:1]):
        expected = tokens.encode(tokens.render(messages, add_generation_prompt=True)).ids
        assert ours_again.encode(ours_again.render(messages, add_generation_prompt=True)).ids == expected
        assert theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == expected
    assert (theirs.eos_token_id, theirs.bos_token_id) == (tokens.eos_id, tokens.bos_id)
    assert ours_again.stop_ids() == tokens.stop_ids()


def test_the_training_form_goes_along(base: Path, tmp_path: Path):
    data = DataConfig(train_file="rows.jsonl", format="prompt", prompt_template="Q: {question}?", chat=False)
    out = merged(adapter_of(base, tmp_path / "adapter", data=data))
    assert json.loads((out / "minilora.json").read_text())["data"] == json.loads(json.dumps(dataclasses.asdict(data)))


def test_an_adapter_saved_by_peft(base: Path, hf_llama: PreTrainedModel, tmp_path: Path):
    """Without tokenizer files or a record of ours; the tokenizer is then the base's."""
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=r".*layers\.1\..*(q|v)_proj", init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits_of(model)
    out = merged(tmp_path / "adapter")
    assert_same(logits_of(AutoModelForCausalLM.from_pretrained(out)), expected)
    assert (expected - logits_of(hf_llama)).abs().max() > 0.1
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert not (out / "minilora.json").exists()


@pytest.mark.parametrize("dtype, largest", [("float32", 1e-4), ("bfloat16", 3.0)])
def test_verify_prints_the_gap(dtype: str, largest: float, adapter: Path, capsys: pytest.CaptureFixture[str]):
    """None in fp32; in bfloat16 what the rounding costs, which for these large random weights is much."""
    out = merged(adapter, dtype=dtype, verify=True)
    printed = capsys.readouterr().out
    found = re.search(r"largest logit gap .* merged: ([^,\s]+)", printed)
    assert found and str(out) in printed
    gap = float(found[1])
    without, folded = (build_model(where, CPU, "float32").model.eval() for where in (adapter_base(adapter), out))
    assert gap < largest
    assert (gap > 1e-3) == (dtype == "bfloat16")
    assert (logits_of(without) - logits_of(folded)).abs().max() > 10 * gap  # the adapter itself is no small change


def adapter_base(adapter: Path) -> Path:
    return Path(json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"])


# --- what it refuses ---


def no_adapter(base: Path, adapter: Path) -> None:
    (adapter / "adapter_config.json").unlink()


def no_directory(base: Path, adapter: Path) -> None:
    shutil.rmtree(adapter)


def other_sizes(base: Path, adapter: Path) -> None:
    shutil.rmtree(base)
    base_of(tiny("llama3", hidden_size=64), base)


def fewer_layers(base: Path, adapter: Path) -> None:
    shutil.rmtree(base)
    base_of(tiny("llama3", num_hidden_layers=1), base)


def torn_base(base: Path, adapter: Path) -> None:
    with open(base / "model.safetensors", "r+b") as file:
        file.truncate(20_000)


def torn_adapter(base: Path, adapter: Path) -> None:
    with open(adapter / "adapter_model.safetensors", "r+b") as file:
        file.truncate(5000)


def no_base_config(base: Path, adapter: Path) -> None:
    (base / "config.json").unlink()


def quantised_base(base: Path, adapter: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, base / "model.safetensors")


def half_an_adapter(base: Path, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: t for name, t in tensors.items() if not name.endswith("layers.1.mlp.up_proj.lora_B.weight")}, file)


def set_base_name(name: str | None) -> Callable[[Path, Path], None]:
    def change(base: Path, adapter: Path) -> None:
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": name}))

    return change


REFUSED: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "not an adapter": (no_adapter, r"checkpoint-final.* is not an adapter.*adapter_config\.json"),
    "not there": (no_directory, r"checkpoint-final"),
    "a base of other sizes": (other_sizes, r"model\.layers\.\d\..*\[64, 48\].*\[32, 48\]"),
    "a base with fewer layers": (fewer_layers, r"base.*model\.layers\.1\..*\.weight"),
    "a torn base": (torn_base, r"base/model\.safetensors"),
    "a torn adapter": (torn_adapter, r"adapter_model\.safetensors"),
    "a base without config": (no_base_config, r"base/config\.json"),
    "a quantised base": (quantised_base, r"base/model\.safetensors.*I8"),
    "half an adapter": (half_an_adapter, r"layers\.1\.mlp\.up_proj.*lora_B"),
    "an adapter of an unnamed base": (set_base_name(None), r"base.*--base"),  # PEFT writes null for a model made in memory
    "an adapter of an empty name": (set_base_name(""), r"base.*--base"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, base: Path, adapter: Path):
    damage, message = REFUSED[case]
    damage(base, adapter)
    before = sorted(path for path in base.parent.rglob("*"))
    with pytest.raises(UserError, match=message):
        merge.main(merge.Args(str(adapter)))
    assert sorted(path for path in base.parent.rglob("*")) == before  # nothing is written


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_an_existing_out_is_never_touched(kind: str, adapter: Path, tmp_path: Path):
    out = tmp_path / "out"
    if kind == "directory":
        out.mkdir()
    inside = out / "precious" if kind == "directory" else out
    inside.write_text("text")
    with pytest.raises(UserError, match=re.escape(str(out))):
        merge.main(merge.Args(str(adapter), out=str(out)))
    assert inside.read_text() == "text"
    merged(adapter)
    with pytest.raises(UserError, match="merged"):
        merge.main(merge.Args(str(adapter)))


def test_the_command_line(adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Exit codes and messages of the script itself."""

    def run(*args: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["merge.py", *args])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "merge.py"), run_name="__main__")
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    code, out, _ = run(str(adapter), "--dtype", "bfloat16", "--verify")
    assert code == 0 and str(adapter / "merged") in out and "largest logit gap" in out
    code, out, err = run(str(adapter))
    assert (code, out) == (2, "") and err.startswith(f"error: {adapter / 'merged'} exists")
    code, out, err = run(str(adapter.parent))
    assert (code, out) == (2, "") and err.startswith("error: ") and len(err.splitlines()) == 1
    assert run(str(adapter), "--dtype", "int3")[0] == 2


PEAK_OF_MERGING = """
import sys
import merge
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
small, large = sys.argv[1:]
merge.main(merge.Args(small))  # whatever is loaded or allocated once
before = peak()
merge.main(merge.Args(large))
print(peak() - before)
"""


def test_merging_needs_memory_for_a_few_tensors(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 8000}
    raw = config_json("llama2", **sizes, torch_dtype="bfloat16")
    base = shutil.copytree(tiny_tokenizers.llama3(), tmp_path / "large")
    (base / "config.json").write_text(json.dumps(raw))
    monkeypatch.setattr("minilora.running.saving.SHARD_BYTES", 50_000_000)
    model = build_model(base, CPU, random_weights=True).model
    save_weights(model, base, torch.bfloat16)
    size = sum(p.numel() * 2 for p in model.parameters())
    large = adapter_of(base, tmp_path / "run" / "large", LoraConfig(rank=4))
    command = [sys.executable, "-c", PEAK_OF_MERGING, str(adapter), str(large)]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}  # so that glibc keeps no freed tensors for later
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    growth, largest = int(run.stdout.split()[-1]), 8000 * 1024 * 2
    assert size > 12 * largest
    assert growth < 3 * largest, f"{growth:,} bytes for a model of {size:,}"
