"""Checkpoints: complete or absent whatever happens, readable by PEFT and transformers, and enough to continue from."""

import copy
import dataclasses
import errno
import json
import multiprocessing
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import minilora
import tiny_tokenizers
import train
from minilora.build import build_model
from minilora.checkpoint import read_adapter
from minilora.config import Config, DataConfig, EvalConfig, LogConfig, LoraConfig, ModelConfig, RunError, TrainConfig, UserError
from minilora.running.directory import (
    TrainerState,
    changed_fields,
    is_complete,
    newest,
    prune,
    read_state,
    save,
    set_aside,
    start_directory,
    step_checkpoints,
    write_atomically,
)
from minilora.running.training_state import TENSORS, load_training_tensors, training_tensors
from minilora.tokenizer import Tokenizer
from tiny_models import random_tokens, tiny

CPU = torch.device("cpu")
MESSAGE = {"prompt": "history of the art", "completion": "museums in France"}


def written(directory: Path, content: str = "content") -> Path:
    """A complete checkpoint of two small files."""
    write_atomically(directory, lambda target: write_two(target, content))
    return directory


def write_two(target: Path, content: str) -> None:
    (target / "weights").write_text(content)
    (target / "sub").mkdir()
    (target / "sub" / "state").write_text(content)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


# --- whole, or not there ---


def test_a_directory_appears_whole(tmp_path: Path):
    """Nothing is to be seen of it while it is written, and its manifest lists every file."""
    out = tmp_path / "run" / "checkpoint-1"  # OUT is made too

    def write(target: Path) -> None:
        write_two(target, "content")
        assert not out.exists() and target.parent == out.parent  # the same file system, so that it can be renamed

    write_atomically(out, write)
    assert is_complete(out) and names([*out.parent.iterdir()]) == ["checkpoint-1"]
    assert json.loads((out / "manifest.json").read_text()) == {"weights": 7, "sub/state": 7}
    assert contents(out).keys() == {"weights", "sub/state", "manifest.json"}


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_an_exception_leaves_nothing(error: type[BaseException], tmp_path: Path):
    before = contents(written(tmp_path / "checkpoint-1"))

    def write(target: Path) -> None:
        write_two(target, "content")
        raise error

    with pytest.raises(RunError if error is OSError else error):
        write_atomically(tmp_path / "checkpoint-2", write)
    assert names([*tmp_path.iterdir()]) == ["checkpoint-1"] and contents(tmp_path / "checkpoint-1") == before


def die(target: Path) -> None:
    write_two(target, "half")
    os._exit(9)


def test_a_crash_leaves_only_what_the_next_start_removes(tmp_path: Path):
    crash = multiprocessing.get_context("fork").Process(target=write_atomically, args=(tmp_path / "checkpoint-2", die))
    crash.start()
    crash.join()
    assert crash.exitcode == 9
    assert names([*tmp_path.iterdir()]) == [".tmp-checkpoint-2"]
    assert newest(tmp_path) is None

    written(tmp_path / "checkpoint-2", "whole")  # what was left there does not get into it
    assert contents(tmp_path / "checkpoint-2")["weights"] == b"whole" and names([*tmp_path.iterdir()]) == ["checkpoint-2"]

    (tmp_path / ".tmp-checkpoint-3").mkdir()
    (tmp_path / ".tmp-metrics.jsonl").touch()
    config = Config(seed=7)
    start_directory(tmp_path, config)
    assert sorted(names([*tmp_path.iterdir()])) == ["checkpoint-2", "config.json"]
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(json.dumps(dataclasses.asdict(config)))


def test_everything_is_on_disk_before_it_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, synced = tmp_path / "checkpoint-1", []
    real = os.fsync

    def fsync(handle: int) -> None:
        synced.append((os.fstat(handle).st_ino, out.exists()))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    written(out)
    for path in (out, *(file for file in out.rglob("*") if file.is_file())):
        assert (path.stat().st_ino, False) in synced, path
    assert synced[-1] == (tmp_path.stat().st_ino, True)  # and then the rename itself


def test_an_incomplete_directory_is_replaced(tmp_path: Path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "other").touch()
    written(tmp_path / "checkpoint-1")
    assert contents(tmp_path / "checkpoint-1").keys() == {"weights", "sub/state", "manifest.json"}


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a file is missing": lambda out: (out / "weights").unlink(),
    "a file is short": lambda out: os.truncate(out / "sub" / "state", 3),
    "a file is empty": lambda out: os.truncate(out / "weights", 0),
    "no manifest": lambda out: (out / "manifest.json").unlink(),
    "a torn manifest": lambda out: os.truncate(out / "manifest.json", 10),
    "no directory": lambda out: shutil.rmtree(out),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_incomplete_checkpoint_is_seen(damage: str, tmp_path: Path):
    good, bad = written(tmp_path / "checkpoint-5"), written(tmp_path / "checkpoint-10")
    (bad / "more").touch()  # what others add to it does no harm
    assert is_complete(bad) and newest(tmp_path) == bad
    DAMAGES[damage](bad)
    assert not is_complete(bad) and is_complete(good)
    assert step_checkpoints(tmp_path) == [good] and newest(tmp_path) == good
    with pytest.raises(UserError, match=re.escape(str(bad))):
        read_state(bad)


# --- which one ---


def test_checkpoints_are_ordered_by_number(tmp_path: Path):
    steps = [1000, 999, 20, 100, 3]
    for step in steps:
        written(tmp_path / f"checkpoint-{step}")
    for other in ("checkpoint-x", "checkpoint-7-old", "my-checkpoint-8", ".tmp-checkpoint-2000"):
        written(tmp_path / other)
    (tmp_path / "checkpoint-4000").mkdir()
    assert names(step_checkpoints(tmp_path)) == [f"checkpoint-{step}" for step in sorted(steps)]
    assert newest(tmp_path) == tmp_path / "checkpoint-1000"
    written(tmp_path / "checkpoint-final")
    assert newest(tmp_path) == tmp_path / "checkpoint-final"
    assert newest(tmp_path / "absent") is None


def test_prune_keeps_the_newest(tmp_path: Path):
    for step in (8, 9, 10, 11):
        written(tmp_path / f"checkpoint-{step}")
    written(tmp_path / "checkpoint-final")
    (tmp_path / "checkpoint-7").mkdir()  # incomplete: neither counted nor touched
    everything = sorted(names([*tmp_path.iterdir()]))
    for limit in (None, 4, 9):
        prune(tmp_path, limit)
        assert sorted(names([*tmp_path.iterdir()])) == everything
    prune(tmp_path, 2)
    assert sorted(names([*tmp_path.iterdir()])) == ["checkpoint-10", "checkpoint-11", "checkpoint-7", "checkpoint-final"]
    prune(tmp_path, 1)
    assert names(step_checkpoints(tmp_path)) == ["checkpoint-11"]
    assert all(is_complete(tmp_path / f"checkpoint-{name}") for name in ("11", "final"))


def test_a_final_checkpoint_is_set_aside(tmp_path: Path):
    final = written(tmp_path / "checkpoint-final", "trained for long")
    written(final / "merged")
    before = contents(final)
    set_aside(final, tmp_path / "another run", 40)
    set_aside(None, tmp_path, 0)
    assert contents(final) == before, "another run's checkpoint is only read"
    set_aside(final, tmp_path, 40)
    moved = tmp_path / "checkpoint-40"
    assert contents(moved) == before and is_complete(moved)
    assert names([*tmp_path.iterdir()]) == ["checkpoint-40"]
    set_aside(moved, tmp_path, 40)
    assert contents(moved) == before


# --- what is in it ---


@pytest.fixture(scope="module")
def hf() -> PreTrainedModel:
    return tiny("llama3", vocab_size=Tokenizer(tiny_tokenizers.llama3()).vocab_size)


@pytest.fixture(scope="module")
def base(hf: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = shutil.copytree(tiny_tokenizers.llama3(), tmp_path_factory.mktemp("base") / "llama")
    hf.save_pretrained(directory)
    return directory


def config_of(method: str, base: Path, out: Path) -> Config:
    rows = base / "rows.jsonl"
    rows.write_text("".join(json.dumps({**MESSAGE, "prompt": f"prompt {i}"}) + "\n" for i in range(8)))
    return Config(
        output_dir=str(out), method=method, model=ModelConfig(name=str(base)),  # type: ignore[arg-type]
        lora=LoraConfig(rank=4, alpha=6, rslora=True, target_modules=("q_proj", "o_proj", "up_proj", "down_proj")),
        data=DataConfig(train_file=str(rows), format="prompt", eval_size=2),
        train=TrainConfig(max_steps=4, batch_size=4, learning_rate=1e-2, warmup_steps=0, gradient_checkpointing=False),
        eval=EvalConfig(eval_steps=3, num_generate_samples=0), log=LogConfig(tensorboard=False),
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Output directories of a short run with an adapter and one of all weights."""
    outs = {method: tmp_path_factory.mktemp("run") / method for method in ("lora", "full")}
    for method, out in outs.items():
        assert train.main(config_of(method, base, out)) == 0
    return outs


TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
RESUMING = {"trainer_state.json", "training_state.safetensors", "manifest.json"}
WEIGHTS = {"lora": {"adapter_model.safetensors", "adapter_config.json"}, "full": {"model.safetensors", "config.json"}}


@pytest.mark.parametrize("name", ["checkpoint-3", "checkpoint-final"])
@pytest.mark.parametrize("method", WEIGHTS)
def test_the_files_of_a_checkpoint(method: str, name: str, runs: dict[str, Path]):
    """Exactly these, and every one readable without running code: JSON, safetensors or text."""
    directory = runs[method] / name
    files = {file.name: file for file in directory.iterdir()}
    assert files.keys() == WEIGHTS[method] | TOKENIZER | RESUMING
    for file in files.values():
        if file.suffix == ".safetensors":
            assert load_file(file)
        elif file.suffix == ".json":
            assert isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
        else:
            assert file.suffix == ".jinja" and file.read_text(encoding="utf-8") == tiny_tokenizers.LLAMA3_TEMPLATE
    assert is_complete(directory) and set(json.loads(files["manifest.json"].read_text())) == files.keys() - {"manifest.json"}
    assert step_checkpoints(runs[method]) == [runs[method] / "checkpoint-3"]


def peft_of(config: LoraConfig, hf: PreTrainedModel) -> PeftModel:
    """PEFT's own model with the same settings."""
    settings = PeftLoraConfig(
        r=config.rank, lora_alpha=int(config.alpha), use_rslora=config.rslora, target_modules=list(config.target_modules),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(copy.deepcopy(hf), settings)


@torch.no_grad()
def test_an_adapter_is_whole_and_loads_in_peft(runs: dict[str, Path], base: Path, hf: PreTrainedModel):
    directory = runs["lora"] / "checkpoint-final"
    tensors = load_file(directory / "adapter_model.safetensors")
    expected = get_peft_model_state_dict(peft_of(config_of("lora", base, directory).lora, hf))
    assert {name: tensor.shape for name, tensor in tensors.items()} == {name: t.shape for name, t in expected.items()}
    assert all(tensor.isfinite().all() and tensor.any() and tensor.dtype == torch.float32 for tensor in tensors.values())

    plain = AutoModelForCausalLM.from_pretrained(base)
    theirs = PeftModel.from_pretrained(plain, directory)
    loaded = theirs.load_adapter(directory, "again")
    assert not loaded.missing_keys and not loaded.unexpected_keys
    tokens = random_tokens(24)
    model, _ = minilora.load(str(directory), device="cpu")
    torch.testing.assert_close(model(tokens), theirs(tokens.unsqueeze(0)).logits[0], rtol=0, atol=1e-4)
    assert (model(tokens) - hf(tokens.unsqueeze(0)).logits[0]).abs().max() > 0.01  # training did something


@torch.no_grad()
def test_full_weights_load_in_transformers(runs: dict[str, Path], hf: PreTrainedModel):
    directory = runs["full"] / "checkpoint-final"
    theirs, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    tokens = random_tokens(24)
    model, _ = minilora.load(str(directory), device="cpu")
    torch.testing.assert_close(model(tokens), theirs(tokens.unsqueeze(0)).logits[0], rtol=0, atol=1e-4)
    for name, weight in theirs.state_dict().items():
        assert not torch.equal(weight, hf.state_dict()[name]), f"{name} has not been trained"


@pytest.mark.parametrize("method", WEIGHTS)
def test_the_state_is_read_back(method: str, runs: dict[str, Path], base: Path):
    config = config_of(method, base, runs[method])
    lines = [json.loads(line) for line in (runs[method] / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "tokens" in line)
    state, saved = read_state(runs[method] / "checkpoint-final")
    assert (state.step, state.finished) == (4, True)
    assert (state.tokens, state.supervised_tokens) == (last["tokens"], last["supervised_tokens"])
    assert changed_fields(config, saved) == []
    earlier, _ = read_state(runs[method] / "checkpoint-3")
    assert (earlier.step, earlier.finished, earlier.data) == (3, False, state.data)


def test_a_broken_adapter_is_refused_by_name(runs: dict[str, Path], tmp_path: Path):
    def damaged(damage: Callable[[Path], object]) -> str:
        directory = tmp_path / str(len([*tmp_path.iterdir()]))
        shutil.copytree(runs["lora"] / "checkpoint-final", directory)
        damage(directory)
        with pytest.raises(UserError) as error:
            read_adapter(directory)
        assert str(directory) in str(error.value)
        return str(error.value)

    def not_finite(directory: Path) -> None:
        tensors = load_file(directory / "adapter_model.safetensors")
        name = sorted(tensors)[3]
        tensors[name].view(-1)[5] = torch.nan
        save_file(tensors, directory / "adapter_model.safetensors")

    assert "adapter_model.safetensors" in damaged(lambda d: os.truncate(d / "adapter_model.safetensors", 2000))
    assert "adapter_model.safetensors" in damaged(lambda d: (d / "adapter_model.safetensors").unlink())
    assert "adapter_config.json" in damaged(lambda d: (d / "adapter_config.json").unlink())
    assert "adapter_config.json" in damaged(lambda d: os.truncate(d / "adapter_config.json", 20))
    assert "not finite" in damaged(not_finite)


# --- what resuming needs ---


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.unused = nn.Linear(5, 4), nn.Linear(4, 1), nn.Linear(2, 2)


def stepped(model: Model, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Optimizer steps on data that depend on the step alone."""
    for step in steps:
        x = torch.randn(16, 5, generator=torch.Generator().manual_seed(step))
        model.second(model.first(x).tanh()).square().mean().backward()
        model.unused.weight.grad, model.unused.bias.grad = torch.zeros(2, 2), torch.zeros(2)  # as the loop gives it
        optimizer.step()
        optimizer.zero_grad()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, fused=True)


@pytest.mark.parametrize("keep_masters", [True, False])
def test_the_optimizer_continues_where_it_was(keep_masters: bool, tmp_path: Path):
    whole, first, second = Model(), Model(), Model()
    stepped(whole, adamw(whole), range(6))
    optimizer = adamw(first)
    stepped(first, optimizer, range(3))
    tensors = training_tensors(optimizer, dict(first.named_parameters()), keep_masters)
    assert any(name.startswith("master.") for name in tensors) == keep_masters
    save_file(tensors, tmp_path / TENSORS)

    if not keep_masters:  # then the weights come from the adapter's own file
        at_three = Model()
        stepped(at_three, adamw(at_three), range(3))
        second.load_state_dict(at_three.state_dict())
    optimizer = adamw(second)
    load_training_tensors(tmp_path, optimizer, dict(second.named_parameters()))
    assert {int(state["step"]) for state in optimizer.state.values()} == {3}
    stepped(second, optimizer, range(3, 6))
    for name, weight in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], weight), name


def test_state_that_is_not_there_is_named(tmp_path: Path):
    model = Model()
    optimizer = adamw(model)
    stepped(model, optimizer, range(1))
    tensors = training_tensors(optimizer, dict(model.named_parameters()), False)
    less = {name: tensor for name, tensor in tensors.items() if not name.startswith("optimizer.second.weight")}
    save_file(less, tmp_path / TENSORS)
    with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path / TENSORS))}.*second\.weight"):
        load_training_tensors(tmp_path, adamw(model), dict(model.named_parameters()))


BENDING = {
    "seed": 1, "method": "full", "model.name": "other", "model.revision": "v2", "model.dtype": "float32", "lora.rank": 5,
    "lora.alpha": 1.0, "lora.dropout": 0.1, "lora.target_modules": ("q_proj",), "lora.rslora": False, "lora.init_from": "other",
    "data.train_file": "other", "data.train_size": 3, "data.format": "text", "data.prompt_template": "{title}",
    "data.chat": False, "data.edge_dropping": False, "data.max_seq_length": 7, "data.too_long": "truncate",
    "data.shuffle": False, "train.learning_rate": 2e-2,
    "train.lr_scheduler": "cosine", "train.warmup_steps": 1, "train.warmup_ratio": 0.5, "train.weight_decay": 0.5,
    "train.max_grad_norm": 9.0, "train.optimizer": "adamw8bit", "train.group_by_length": False,
}  # fmt: skip
FREE = {
    "output_dir": "other", "preview": 1, "data.num_workers": 1, "data.strict": True, "data.eval_file": "other",
    "data.eval_size": 9, "train.epochs": 7.0, "train.max_steps": 9, "train.logging_steps": 1, "train.save_steps": 9,
    "train.save_total_limit": 1, "train.resume": "never", "train.gradient_checkpointing": True, "eval.eval_steps": 1,
    "eval.batch_size": 1, "eval.temperature": 0.9, "log.tensorboard": True, "log.wandb_notes": "x",
    "train.batch_size": 5, "train.grad_acc_steps": 2,  # what they come to together is compared as documents per step
}  # fmt: skip


@pytest.mark.parametrize("field", [*BENDING, *FREE])
def test_changed_settings_are_named(field: str, base: Path, tmp_path: Path):
    before = config_of("lora", base, tmp_path)
    saved = json.loads(json.dumps(dataclasses.asdict(before)))  # as trainer_state.json holds it
    config = copy.deepcopy(before)
    section, _, name = field.rpartition(".")
    owner, value = getattr(config, section) if section else config, {**BENDING, **FREE}[field]
    old = getattr(owner, name)
    assert old != value
    setattr(owner, name, value)
    changed = changed_fields(config, saved)
    if field in FREE:
        assert changed == []
    else:
        as_json = [list(each) if isinstance(each, tuple) else each for each in (old, value)]
        assert changed == [f"{field}: {as_json[0]!r} -> {as_json[1]!r}"]


# --- a full disk ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[int], None]]]:
    """A directory, and a function after which no more than `room` bytes fit into it.

    A file system of its own where we may mount one; elsewhere the system's limit on the size of a file.
    """
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def leave(room: int) -> None:
        if mounted:
            with open(tmp_path / "filler", "wb") as file:
                file.write(bytes(shutil.disk_usage(tmp_path).free - room))
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))

    yield tmp_path, leave
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if mounted:
        subprocess.run(["umount", str(tmp_path)], check=True)


def save_into(out: Path, step: int, method: str, base: Path, state_size: int = 10) -> Path:
    """A checkpoint of an untrained model with so many numbers of optimizer state."""
    config = config_of(method, base, out)
    lora = config.lora if method == "lora" else None
    model = build_model(base, CPU, lora=lora, full=lora is None).model
    tensors: dict[str, Tensor] = {"optimizer.x": torch.zeros(state_size)}
    state, tokenizer = TrainerState(step=step), Tokenizer(base)
    save(out / f"checkpoint-{step}", model, tokenizer, config, lora, state, tensors, base, torch.float32)
    return out / f"checkpoint-{step}"


def assert_only(previous: Path, before: dict[str, bytes]) -> None:
    """The previous checkpoint is as it was, and nothing is left of the one that failed."""
    assert contents(previous) == before and is_complete(previous) and newest(previous.parent) == previous
    assert not [path for path in previous.parent.iterdir() if path.name not in (previous.name, "filler")]


@pytest.mark.parametrize("room", [16_000, 1_000_000], ids=["no room for weights", "no room for the optimizer's state"])
@pytest.mark.parametrize("method", WEIGHTS)
def test_a_full_disk(method: str, room: int, base: Path, small_disk: tuple[Path, Callable[[int], None]]):
    out, leave = small_disk
    previous = save_into(out, 1, method, base)
    before = contents(previous)
    leave(room)
    with pytest.raises(RunError, match=rf"{re.escape(str(out / 'checkpoint-2'))} .*(No space left|too large)"):
        save_into(out, 2, method, base, state_size=1_000_000)
    assert_only(previous, before)


@pytest.mark.parametrize("moment", range(3))
def test_a_disk_that_is_full_on_sync(moment: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where blocks are allocated late, a full disk shows only then."""
    previous = save_into(tmp_path, 1, "lora", base)
    before, calls = contents(previous), iter(range(100))

    def fsync(handle: int) -> None:
        if next(calls) == 4 * moment:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RunError, match=re.escape(str(tmp_path / "checkpoint-2"))):
        save_into(tmp_path, 2, "lora", base)
    assert_only(previous, before)
