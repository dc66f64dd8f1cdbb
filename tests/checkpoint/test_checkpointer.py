"""Checkpoints in a run's directory: their files, which is the newest, and a full disk."""

import dataclasses
import errno
import json
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import minilora
import train
from helpers import tiny_tokenizers
from helpers.checkpoints import DAMAGES, contents, names, short_run, written
from helpers.tiny_models import random_tokens
from minilora.build import build_for_training
from minilora.checkpoint.checkpointer import (
    Checkpointer,
    delete_old,
    demote_final,
    latest_checkpoint,
    start_directory,
    step_checkpoints,
)
from minilora.checkpoint.resume import read_state
from minilora.checkpoint.trainer_state import TrainerState
from minilora.config import Config
from minilora.data.tokenizer import Tokenizer
from minilora.errors import RunError, UserError
from minilora.files import is_complete
from minilora.training.optimizer import trainable_parameters

CPU = torch.device("cpu")


# --- which one ---


def test_start_directory_removes_what_a_killed_run_left(tmp_path: Path):
    written(tmp_path / "checkpoint-2")
    (tmp_path / ".tmp-checkpoint-3").mkdir()
    (tmp_path / ".tmp-metrics.jsonl").touch()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    config = Config(seed=7)
    start_directory(tmp_path, config)
    assert names(tmp_path) == ["checkpoint-2", "config.json"]
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved == json.loads(json.dumps(dataclasses.asdict(config)))


@pytest.mark.parametrize("damage", DAMAGES)
def test_incomplete_checkpoint_is_passed_over(damage: str, tmp_path: Path):
    good, bad = written(tmp_path / "checkpoint-5"), written(tmp_path / "checkpoint-10")
    assert latest_checkpoint(tmp_path) == bad
    DAMAGES[damage](bad)
    assert step_checkpoints(tmp_path) == [good]
    assert latest_checkpoint(tmp_path) == good
    with pytest.raises(UserError, match=re.escape(str(bad))):
        read_state(bad)


def test_checkpoints_are_ordered_by_number(tmp_path: Path):
    steps = [1000, 999, 20, 100, 3]
    for step in steps:
        written(tmp_path / f"checkpoint-{step}")
    for other in ("checkpoint-x", "checkpoint-7-old", "my-checkpoint-8", ".tmp-checkpoint-2000"):
        written(tmp_path / other)
    (tmp_path / "checkpoint-4000").mkdir()
    found = [path.name for path in step_checkpoints(tmp_path)]
    assert found == [f"checkpoint-{step}" for step in sorted(steps)]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1000"
    written(tmp_path / "checkpoint-final")
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-final"
    assert latest_checkpoint(tmp_path / "absent") is None


def test_delete_old_keeps_the_newest(tmp_path: Path):
    for step in (8, 9, 10, 11):
        written(tmp_path / f"checkpoint-{step}")
    written(tmp_path / "checkpoint-final")
    (tmp_path / "checkpoint-7").mkdir()  # incomplete: neither counted nor touched
    everything = names(tmp_path)
    for limit in (None, 4, 9):
        delete_old(tmp_path, limit)
        assert names(tmp_path) == everything
    delete_old(tmp_path, 2)
    remaining = ["checkpoint-10", "checkpoint-11", "checkpoint-7", "checkpoint-final"]
    assert names(tmp_path) == remaining
    delete_old(tmp_path, 1)
    assert step_checkpoints(tmp_path) == [tmp_path / "checkpoint-11"]
    assert all(is_complete(tmp_path / f"checkpoint-{name}") for name in ("11", "final"))


def test_demote_final_renames_the_runs_own_final_checkpoint(tmp_path: Path):
    final = written(tmp_path / "checkpoint-final", "trained for long")
    written(final / "merged")
    before = contents(final)
    demote_final(final, tmp_path / "another run", 40)
    demote_final(None, tmp_path, 0)
    assert contents(final) == before, "another run's checkpoint is only read"
    demote_final(final, tmp_path, 40)
    moved = tmp_path / "checkpoint-40"
    assert contents(moved) == before and is_complete(moved)
    assert names(tmp_path) == ["checkpoint-40"]
    demote_final(moved, tmp_path, 40)
    assert contents(moved) == before


# --- what is in it ---

TOKENIZER = {
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
}
RECORD = {"minilora.json"}
RESUMING = {"trainer_state.json", "training_state.safetensors", "manifest.json"}
WEIGHTS = {
    "lora": {"adapter_model.safetensors", "adapter_config.json"},
    "full": {"model.safetensors", "config.json"},
}


@pytest.mark.parametrize("name", ["checkpoint-3", "checkpoint-final"])
@pytest.mark.parametrize("method", WEIGHTS)
def test_files_of_a_checkpoint(method: str, name: str, runs: dict[str, Path]):
    """Exactly these, and every one readable without running code: JSON, safetensors or text."""
    directory = runs[method] / name
    files = {file.name: file for file in directory.iterdir()}
    assert files.keys() == WEIGHTS[method] | TOKENIZER | RECORD | RESUMING
    for file in files.values():
        if file.suffix == ".safetensors":
            assert load_file(file)
        elif file.suffix == ".json":
            assert isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
        else:
            assert file.suffix == ".jinja"
            assert file.read_text(encoding="utf-8") == tiny_tokenizers.LLAMA3_TEMPLATE
    assert is_complete(directory)
    manifest = json.loads(files["manifest.json"].read_text())
    assert set(manifest) == files.keys() - {"manifest.json"}
    assert step_checkpoints(runs[method]) == [runs[method] / "checkpoint-3"]


@torch.no_grad()
def test_full_weights_load_in_transformers(runs: dict[str, Path], hf: PreTrainedModel):
    directory = runs["full"] / "checkpoint-final"
    theirs, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    tokens = random_tokens(24)
    model, _ = minilora.load(str(directory), device="cpu")
    expected = theirs(tokens.unsqueeze(0)).logits[0]
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-4)
    for name, weight in theirs.state_dict().items():
        assert not torch.equal(weight, hf.state_dict()[name]), f"{name} has not been trained"


END = "<|end of turn|>"


@pytest.mark.parametrize("method", WEIGHTS)
def test_an_added_end_token_is_the_eos_of_a_checkpoint(
    method: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Of a full checkpoint in config.json too, and the user is told of it once."""
    config = short_run(method, base, tmp_path / "out")
    config.data.add_tokens = (END,)
    config.lora.train_embeddings = method == "lora"
    template = tmp_path / "turns.jinja"
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}" + END + "{% endfor %}"
    template.write_text(turns)
    config.data.chat_template = str(template)
    assert train.main(config) == 0

    printed = capsys.readouterr().err
    assert printed.count(f"eos_token is {END}") == 1
    assert printed.count("chat template writes <|begin_of_text|>") == 1
    end_id = Tokenizer(base).vocab_size
    eos_before = json.loads((base / "config.json").read_text())["eos_token_id"]
    for name in ("checkpoint-3", "checkpoint-final"):
        checkpoint = tmp_path / "out" / name
        assert Tokenizer(checkpoint).eos_id == end_id != eos_before
        assert AutoTokenizer.from_pretrained(checkpoint).eos_token == END
        if method == "full":
            assert json.loads((checkpoint / "config.json").read_text())["eos_token_id"] == end_id
            assert AutoModelForCausalLM.from_pretrained(checkpoint).config.eos_token_id == end_id


# --- a full disk ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[int], None]]]:
    """A directory, and a function after which no more than `room` bytes fit into it.

    A file system of its own where we may mount one; elsewhere the system's limit on the size of a
    file.
    """
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def leave(room: int) -> None:
        if mounted:
            filler = bytes(shutil.disk_usage(tmp_path).free - room)
            (tmp_path / "filler").write_bytes(filler)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))

    yield tmp_path, leave
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if mounted:
        subprocess.run(["umount", str(tmp_path)], check=True)


def save_into(out: Path, step: int, method: str, base: Path, state_size: int = 10) -> Path:
    """Save a checkpoint of an untrained model, with this many numbers of optimizer state."""
    config = short_run(method, base, out)
    loaded = build_for_training(config, base, CPU)
    parameters = trainable_parameters(loaded)
    optimizer = torch.optim.SGD(parameters.values())
    optimizer.state[next(iter(parameters.values()))]["x"] = torch.zeros(state_size)
    checkpointer = Checkpointer(config, loaded, parameters, Tokenizer(base), base, {})
    name = checkpointer.save(TrainerState(step=step), optimizer)
    return out / name


def assert_only(previous: Path, before: dict[str, bytes]) -> None:
    """The previous checkpoint is as it was, and nothing is left of the one that failed."""
    assert contents(previous) == before
    assert is_complete(previous)
    assert latest_checkpoint(previous.parent) == previous
    assert set(names(previous.parent)) <= {previous.name, "filler"}


@pytest.mark.parametrize(
    "room", [16_000, 1_000_000], ids=["no room for weights", "no room for the optimizer's state"]
)
@pytest.mark.parametrize("method", WEIGHTS)
def test_full_disk_leaves_the_previous_checkpoint(
    method: str, room: int, base: Path, small_disk: tuple[Path, Callable[[int], None]]
):
    out, leave = small_disk
    previous = save_into(out, 1, method, base)
    assert previous.name == "checkpoint-1"
    before = contents(previous)
    leave(room)
    message = rf"{re.escape(str(out / 'checkpoint-2'))} .*(No space left|too large)"
    with pytest.raises(RunError, match=message):
        save_into(out, 2, method, base, state_size=1_000_000)
    assert_only(previous, before)


@pytest.mark.parametrize("moment", range(3))
def test_full_disk_that_shows_on_sync_leaves_the_previous_checkpoint(
    moment: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
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
