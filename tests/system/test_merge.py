"""merge.py against PEFT's merge_and_unload: weights, logits, files, prompts, refusals."""

import copy
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import peft
import pytest
import torch
import tyro
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import merge
import minilora
from helpers import tiny_tokenizers
from helpers.build import CPU, build
from helpers.checkpoints import names, random_adapter
from helpers.tiny_models import config_json, in_bfloat16, random_tokens, tiny
from minilora.build import build_for_inference
from minilora.checkpoint import hf_writer
from minilora.checkpoint.hf import INDEX_FILE
from minilora.checkpoint.hf_writer import save_weights
from minilora.checkpoint.tokenizer_writer import plan_export, save_tokenizer
from minilora.config import DataConfig, LoraConfig
from minilora.data.added_tokens import tokenizer_with_added_tokens
from minilora.data.chat_template import MISTRAL_TEMPLATE
from minilora.data.tokenizer import Tokenizer
from minilora.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
LORA = LoraConfig(rank=4, alpha=6, rslora=True)
TOKENS = random_tokens(40)


def base_of(
    hf: PreTrainedModel, directory: Path, max_shard_size: str = "1GB", tokenizer: str = "llama3"
) -> Path:
    """Write a model and a tokenizer as a directory in Hugging Face layout."""
    shutil.copytree(tiny_tokenizers.BUILDERS[tokenizer](), directory)
    hf.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


@pytest.fixture
def base(hf_llama: PreTrainedModel, tmp_path: Path) -> Path:
    return base_of(hf_llama, tmp_path / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """A checkpoint of a LoRA run."""
    return random_adapter(base, tmp_path / "run" / "checkpoint-final", LORA)


def merged(adapter: Path, **options) -> Path:
    """Run merge.py and return the directory that it has written."""
    assert merge.main(merge.Args(str(adapter), **options)) == 0
    return Path(options.get("out", adapter / "merged"))


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory's safetensors files."""
    found: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        assert not found.keys() & tensors.keys()
        found |= tensors
    return found


def update_of(adapter: Path, name: str) -> Tensor | None:
    """scaling * B @ A of a weight in float64; None if the adapter does not change it."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    path = f"base_model.model.{name.removesuffix('.weight')}"
    if f"{path}.lora_A.weight" not in tensors:
        return None
    a = tensors[f"{path}.lora_A.weight"].double()
    b = tensors[f"{path}.lora_B.weight"].double()
    return LORA.alpha / LORA.rank**0.5 * b @ a


@torch.no_grad()
def logits_of(model) -> Tensor:
    """Logits [T, V] of a model of ours, of peft or of transformers."""
    if isinstance(model, PreTrainedModel | PeftModel):
        return model(TOKENS.unsqueeze(0)).logits[0]
    return model(TOKENS)


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
    adapter = random_adapter(base, tmp_path / "adapter", LORA)
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
    assert {file.name for file in out.glob("*.safetensors*")} == files
    assert (len(files) > 1) == (max_shard_size != "1GB")
    for name in files - {INDEX_FILE}:  # each tensor stays in its file
        assert load_file(out / name).keys() == load_file(base / name).keys()
        with safe_open(out / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    if INDEX_FILE in files:
        before, after = (json.loads((d / INDEX_FILE).read_text()) for d in (base, out))
        assert after["weight_map"] == before["weight_map"]


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("down_proj",)], ids=str)
def test_other_weights_stay_as_they_are_to_the_bit(
    targets: tuple[str, ...], base: Path, tmp_path: Path
):
    lora = LoraConfig(rank=4, target_modules=targets)
    out = merged(random_adapter(base, tmp_path / "adapter", lora))
    before, after = tensors_of(base), tensors_of(out)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    adapted = {name for name in before if name.removesuffix(".weight").endswith(targets)}
    assert changed == adapted and changed


def test_tied_embeddings_stay_tied(tmp_path: Path):
    base = base_of(tiny("qwen3", tie_word_embeddings=True), tmp_path / "base")
    assert "lm_head.weight" not in tensors_of(base)
    adapter = random_adapter(base, tmp_path / "adapter", LORA)
    out = merged(adapter)
    assert "lm_head.weight" not in tensors_of(out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    reloaded = AutoModelForCausalLM.from_pretrained(out)
    assert reloaded.lm_head.weight.data_ptr() == reloaded.model.embed_tokens.weight.data_ptr()
    assert_same(logits_of(reloaded), logits_of(minilora.load(str(adapter), device="cpu")[0]))


def test_bfloat16_base_is_rounded_once(tmp_path: Path):
    """The sum is as exact as its result can be: no update is lost to an addition in 8 bits."""
    base = base_of(in_bfloat16("llama3")[0], tmp_path / "base")
    adapter = random_adapter(base, tmp_path / "adapter", LORA)
    out = merged(adapter)
    before, after = tensors_of(base), tensors_of(out)
    for name, weight in before.items():
        update = update_of(adapter, name)
        expected = weight
        if update is not None:
            expected = (weight.float() + update.float()).to(torch.bfloat16)
        assert after[name].dtype == torch.bfloat16
        # float32 sums in another order fall on the other side of a rounding border now and then
        assert (after[name] != expected).float().mean() < 1e-3, name
        torch.testing.assert_close(after[name], expected, rtol=2**-7, atol=0)
    assert AutoConfig.from_pretrained(out).dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "key"),
    [
        ("float32", "torch_dtype"),
        ("float16", "dtype"),
        ("bfloat16", "torch_dtype"),
        ("bfloat16", "dtype"),
    ],
)
def test_dtype_of_weights_and_config(dtype: str, key: str, tmp_path: Path):
    base = base_of(in_bfloat16("llama3")[0], tmp_path / "base")
    raw = config_json("llama3", torch_dtype=...)
    (base / "config.json").write_text(json.dumps({**raw, key: "bfloat16"}))
    adapter = random_adapter(base, tmp_path / "adapter", LORA)
    out = merged(adapter, dtype=dtype)
    before = tensors_of(base)
    for name, weight in tensors_of(out).items():
        update = update_of(adapter, name)
        exact = before[name].double() + (0 if update is None else update)
        assert weight.dtype == getattr(torch, dtype)
        rtol = 2 * torch.finfo(weight.dtype).eps
        torch.testing.assert_close(weight.double(), exact, rtol=rtol, atol=1e-6, msg=name)
    assert json.loads((out / "config.json").read_text()) == {**raw, key: dtype}
    reloaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert reloaded.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_index_has_the_size_of_the_tensors(dtype: str, hf_llama: PreTrainedModel, tmp_path: Path):
    """As transformers writes it: of the tensors, without the headers of their files."""
    base = base_of(hf_llama, tmp_path / "base", "20KB")
    out = merged(random_adapter(base, tmp_path / "adapter", LORA), dtype=dtype)
    for directory in (base, out):
        index = json.loads((directory / INDEX_FILE).read_text())
        size = sum(tensor.nbytes for tensor in tensors_of(directory).values())
        assert index["metadata"]["total_size"] == size


def test_auto_keeps_the_dtype_of_each_tensor(base: Path, tmp_path: Path):
    """Such as norms in float32 among matrices in bfloat16."""
    mixed = load_file(base / "model.safetensors")
    for name, tensor in mixed.items():
        if "norm" not in name:
            mixed[name] = tensor.to(torch.bfloat16)
    save_file(mixed, base / "model.safetensors", metadata={"format": "pt"})
    out = merged(random_adapter(base, tmp_path / "adapter", LORA))
    dtypes = {name: tensor.dtype for name, tensor in tensors_of(out).items()}
    assert dtypes == {name: tensor.dtype for name, tensor in mixed.items()}


# --- the files around them ---


def test_out_and_base_replace_the_default_places(base: Path, adapter: Path, tmp_path: Path):
    """The base has moved since training."""
    expected = tensors_of(merged(adapter))
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=rf"{re.escape(str(base))}.*--base"):
        merged(adapter, out=str(tmp_path / "first"))
    out = merged(adapter, base=str(moved), out=str(tmp_path / "new" / "place"))
    assert out == tmp_path / "new" / "place"
    assert not (tmp_path / "first").exists()
    found = tensors_of(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_files_of_a_merged_model(base: Path, adapter: Path):
    assert (base / "generation_config.json").is_file()
    out = merged(adapter)
    assert set(names(out)) == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "minilora.json",
        "manifest.json",
    }
    base_config = AutoConfig.from_pretrained(base).to_dict()
    assert AutoConfig.from_pretrained(out).to_dict() == {**base_config, "_name_or_path": str(out)}
    assert names(adapter.parent) == [adapter.name]


CHAT = [  # no two spaces in a row: there transformers 5 and sentencepiece disagree
    {"role": "user", "content": "Title: 物理学\nAn abstract."},
    {"role": "assistant", "content": "a -> b\nc -> d"},
    {"role": "user", "content": "Why?"},
]


def prompt_ids(tokenizer: Tokenizer, messages: list[dict]) -> list[int]:
    return tokenizer.encode(tokenizer.render(messages, add_generation_prompt=True)).ids


@pytest.mark.parametrize("template", [None, MISTRAL_TEMPLATE], ids=["own", "mistral"])
@pytest.mark.parametrize("name", tiny_tokenizers.BUILDERS)
def test_prompts_are_the_same_everywhere(name: str, template: str | None, tmp_path: Path):
    """In training, in infer.py, and in whatever serves the merged model with transformers."""
    plain = Tokenizer(tiny_tokenizers.BUILDERS[name]())
    hf = tiny("llama3", vocab_size=plain.vocab_size, eos_token_id=plain.eos_id)
    base = base_of(hf, tmp_path / "base", tokenizer=name)
    in_training = Tokenizer(base, template)
    adapter = random_adapter(base, tmp_path / "adapter", LORA)
    save_tokenizer(in_training, adapter, plan_export(in_training, DataConfig()))
    out = merged(adapter)

    ours, theirs = Tokenizer(out), AutoTokenizer.from_pretrained(out)
    for messages in (CHAT, CHAT[:1]):
        expected = prompt_ids(in_training, messages)
        assert prompt_ids(ours, messages) == expected
        found = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert found == expected
    assert theirs.eos_token_id == in_training.eos_id
    assert theirs.bos_token_id == in_training.bos_id
    assert ours.stop_ids() == in_training.stop_ids()


def test_data_settings_of_training_are_kept(base: Path, tmp_path: Path):
    """The merged model's record is the checkpoint's; its layers are now in 16 bits."""
    data = DataConfig(
        train_file="rows.jsonl", format="prompt", prompt_template="Q: {question}?", chat=False
    )
    adapter = random_adapter(base, tmp_path / "adapter", LORA, data)
    trained = json.loads((adapter / "minilora.json").read_text())
    assert trained["data"]["format"] == "prompt" and trained["data"]["chat"] is False
    assert trained["data"]["prompt_template"] == "Q: {question}?"
    saved = json.loads((merged(adapter) / "minilora.json").read_text())
    assert saved["data"] == trained["data"]
    assert saved["model"] == {**trained["model"], "bits": 16}


@pytest.mark.parametrize("version", ["this one", "an older one"])
def test_a_template_that_training_did_not_use_does_not_come_back(
    version: str, base: Path, tmp_path: Path
):
    """Neither from the base nor from a checkpoint of an older version, which had one always."""
    (base / "chat_template.jinja").write_text("{{ bos_token }}the base's")
    data = DataConfig(format="text")
    adapter = random_adapter(base, tmp_path / "adapter", LORA, data)
    assert not (adapter / "chat_template.jinja").exists()
    if version == "an older one":
        (adapter / "minilora.json").unlink()
        shutil.copyfile(base / "tokenizer_config.json", adapter / "tokenizer_config.json")
        shutil.copyfile(base / "chat_template.jinja", adapter / "chat_template.jinja")
    out = merged(adapter)
    assert not (out / "chat_template.jinja").exists()
    assert "chat_template" in json.loads((base / "tokenizer_config.json").read_text())
    assert AutoTokenizer.from_pretrained(out).chat_template is None
    assert not Tokenizer(out).has_template
    assert gguf.SpecialVocab(out).chat_template is None


@pytest.mark.parametrize("version", ["this one", "an older one"])
def test_an_older_checkpoint_is_merged_with_the_bos_of_its_training(
    version: str, base: Path, tmp_path: Path
):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    (base / "chat_template.jinja").write_text(template)
    adapter = random_adapter(base, tmp_path / "adapter", LORA, DataConfig(format="messages"))
    if version == "an older one":
        (adapter / "minilora.json").unlink()
        (adapter / "chat_template.jinja").write_text(template)
    theirs = AutoTokenizer.from_pretrained(merged(adapter))
    found = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert found == prompt_ids(Tokenizer(base), CHAT)
    assert found[0] == theirs.bos_token_id


@pytest.mark.parametrize("name", ["llama3", "mistral"])
def test_an_added_end_token_is_the_merged_models_eos(name: str, tmp_path: Path):
    """In config.json too: of a tokenizer.model, llama.cpp reads the ids there."""
    end = "<|end of turn|>"
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}" + end + "{% endfor %}"
    with_end = tokenizer_with_added_tokens(tiny_tokenizers.BUILDERS[name](), (end,))
    tokenizer = Tokenizer(with_end)
    end_id = tokenizer.specials[end]
    hf = tiny("llama3", vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id)
    base = base_of(hf, tmp_path / "base", tokenizer=name)
    data = DataConfig(format="messages", add_tokens=(end,))
    adapter = random_adapter(base, tmp_path / "adapter", LORA, data)
    in_training = Tokenizer(with_end, template)
    save_tokenizer(in_training, adapter, plan_export(in_training, data))

    out = merged(adapter)
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == end_id
    assert gguf.SpecialVocab(out).special_token_ids["eos"] == end_id
    assert AutoTokenizer.from_pretrained(out).eos_token_id == end_id
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == sorted([tokenizer.eos_id, end_id])
    assert json.loads((base / "config.json").read_text())["eos_token_id"] == tokenizer.eos_id


def test_adapter_saved_by_peft(base: Path, hf_llama: PreTrainedModel, tmp_path: Path):
    """Without tokenizer files or a record of training; the tokenizer is then the base's."""
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=r".*layers\.1\..*(q|v)_proj", init_lora_weights=False
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits_of(model)
    out = merged(tmp_path / "adapter")
    assert_same(logits_of(AutoModelForCausalLM.from_pretrained(out)), expected)
    assert (expected - logits_of(hf_llama)).abs().max() > 0.1
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert not (out / "minilora.json").exists()


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-4), ("bfloat16", 3.0)])
def test_verify_prints_the_gap(
    dtype: str, limit: float, base: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
):
    """None in float32; in bfloat16 what rounding costs, much for these large random weights."""
    out = merged(adapter, dtype=dtype, verify=True)
    printed = capsys.readouterr().out
    found = re.search(r"largest logit gap .* merged: ([^,\s]+)", printed)
    assert found and str(out) in printed
    gap = float(found[1])
    assert gap < limit
    assert (gap > 1e-3) == (dtype == "bfloat16")
    without, with_adapter = (
        logits_of(build_for_inference(directory, CPU, "float32").model) for directory in (base, out)
    )
    assert (without - with_adapter).abs().max() > 10 * gap  # the adapter itself changes much more


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


def truncated_base(base: Path, adapter: Path) -> None:
    os.truncate(base / "model.safetensors", 20_000)


def truncated_adapter(base: Path, adapter: Path) -> None:
    os.truncate(adapter / "adapter_model.safetensors", 5000)


def no_base_config(base: Path, adapter: Path) -> None:
    (base / "config.json").unlink()


def integer_base(base: Path, adapter: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    integers = {name: tensor.to(torch.int8) for name, tensor in tensors.items()}
    save_file(integers, base / "model.safetensors")


def half_an_adapter(base: Path, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    save_file(tensors, file)


def set_base_name(adapter: Path, name: str | None) -> None:
    file = adapter / "adapter_config.json"
    raw = {**json.loads(file.read_text()), "base_model_name_or_path": name}
    file.write_text(json.dumps(raw))


def unnamed_base(base: Path, adapter: Path) -> None:
    set_base_name(adapter, None)  # what PEFT writes for a model made in memory


def empty_base_name(base: Path, adapter: Path) -> None:
    set_base_name(adapter, "")


REFUSED: dict[Callable[[Path, Path], None], str] = {
    no_adapter: r"checkpoint-final.* is not an adapter.*adapter_config\.json",
    no_directory: r"checkpoint-final",
    other_sizes: r"model\.layers\.\d\..*\[64, 48\].*\[32, 48\]",
    fewer_layers: r"base.*model\.layers\.1\..*\.weight",
    truncated_base: r"base/model\.safetensors",
    truncated_adapter: r"adapter_model\.safetensors",
    no_base_config: r"base/config\.json",
    integer_base: r"base/model\.safetensors.*I8",
    half_an_adapter: r"layers\.1\.mlp\.up_proj.*lora_B",
    unnamed_base: r"base.*--base",
    empty_base_name: r"base.*--base",
}


@pytest.mark.parametrize("damage", REFUSED, ids=lambda damage: damage.__name__)
def test_wrong_input_is_refused_and_nothing_written(
    damage: Callable[[Path, Path], None], base: Path, adapter: Path
):
    damage(base, adapter)
    before = sorted(base.parent.rglob("*"))
    with pytest.raises(UserError, match=REFUSED[damage]):
        merge.main(merge.Args(str(adapter)))
    assert sorted(base.parent.rglob("*")) == before


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_existing_out_is_never_touched(kind: str, adapter: Path, tmp_path: Path):
    out = tmp_path / "out"
    file = out
    if kind == "directory":
        out.mkdir()
        file = out / "precious"
    file.write_text("text")
    with pytest.raises(UserError, match=re.escape(str(out))):
        merge.main(merge.Args(str(adapter), out=str(out)))
    assert file.read_text() == "text"
    merged(adapter)
    with pytest.raises(UserError, match="merged"):
        merge.main(merge.Args(str(adapter)))


# --- the command ---


def test_exit_codes_and_messages_of_the_script(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def run(*args: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["merge.py", *args])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "merge.py"), run_name="__main__")
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    code, out, _ = run(str(adapter), "--dtype", "bfloat16", "--verify")
    assert code == 0
    assert str(adapter / "merged") in out and "largest logit gap" in out

    code, out, err = run(str(adapter))
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {adapter / 'merged'} exists")

    code, out, err = run(str(adapter.parent))
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and len(err.splitlines()) == 1

    code, _, _ = run(str(adapter), "--dtype", "int3")
    assert code == 2


@pytest.mark.parametrize("spelling", ["from_quantized", "from_quantised"])
def test_from_quantized_is_accepted_in_every_spelling(spelling: str):
    dashes = spelling.replace("_", "-")
    for flag, value in {
        f"--{spelling}": True,
        f"--{dashes}": True,
        f"--no_{spelling}": False,
        f"--no-{dashes}": False,
    }.items():
        args = tyro.cli(merge.Args, args=["checkpoint", flag], use_underscores=True)
        assert args == merge.Args("checkpoint", from_quantized=value), flag


PEAK_OF_MERGING = """
import sys
import merge

def peak():
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

small, large = sys.argv[1:]
merge.main(merge.Args(small))  # whatever is loaded or allocated once
before = peak()
merge.main(merge.Args(large))
print(peak() - before)
"""


@pytest.mark.system
def test_merging_needs_memory_for_a_few_tensors(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    raw = config_json(
        "llama2",
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=8,
        vocab_size=8000,
        torch_dtype="bfloat16",
    )
    base = shutil.copytree(tiny_tokenizers.llama3(), tmp_path / "large")
    (base / "config.json").write_text(json.dumps(raw))
    monkeypatch.setattr(hf_writer, "SHARD_BYTES", 50_000_000)
    model = build(base, random_weights=True).model
    save_weights(model, base, torch.bfloat16)
    size = sum(p.numel() * 2 for p in model.parameters())
    large = random_adapter(base, tmp_path / "run" / "large", LoraConfig(rank=4))

    command = [sys.executable, "-c", PEAK_OF_MERGING, str(adapter), str(large)]
    # so that glibc does not keep freed tensors for later
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    growth = int(run.stdout.split()[-1])
    largest_tensor = 8000 * 1024 * 2
    assert size > 12 * largest_tensor
    assert growth < 3 * largest_tensor, f"{growth:,} bytes for a model of {size:,}"
