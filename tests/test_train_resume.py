"""train.main with checkpoints in its output directory: what it continues, and what it refuses."""

import hashlib
from pathlib import Path

import pytest
import torch

import train
from helpers import tiny_runs
from helpers.tiny_runs import losses, metrics
from minilora.config import Config
from minilora.errors import UserError
from minilora.tracking.tracker import Tracker


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.base_model(tmp_path_factory.mktemp("base") / "base")


class Crash(Exception):
    """What a run is made to fail with."""


def crash_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Let the process fail after this many optimizer steps, before anything of the last is kept."""
    taken = iter(range(steps - 1))

    def step(tracker: Tracker) -> None:
        if next(taken, None) is None:
            raise Crash

    monkeypatch.setattr(Tracker, "step", step)


def run_until_crash(config: Config, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        crash_after(patch, steps)
        with pytest.raises(Crash):
            train.main(config)


def contents(directory: Path) -> dict[str, str]:
    """Return {relative path: hash} of all files."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def final_weights(config: Config) -> bytes:
    """Return the bytes of the last checkpoint's weights."""
    (file,) = (Path(config.output_dir) / "checkpoint-final").glob("*model.safetensors")
    return file.read_bytes()


# ---- interrupted runs

VARIANTS = {
    "lora": {"lora__dropout": 0.1, "train__grad_acc_steps": 2, "train__batch_size": 2},
    "full": {"method": "full"},
    "full in bfloat16": {"method": "full", "model__dtype": "bfloat16"},
    "checkpointing": {"train__gradient_checkpointing": True, "lora__dropout": 0.1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_run_after_a_crash_ends_as_an_uninterrupted_one(
    variant: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It crashes within an epoch, after a checkpoint and some steps that are lost."""
    changes = {"train__save_steps": 5, **VARIANTS[variant]}
    whole = tiny_runs.run(tmp_path / "whole", base, **changes)
    broken = tiny_runs.quick_config(tmp_path / "broken", base, **changes)
    run_until_crash(broken, 13, monkeypatch)
    assert len(metrics(broken)) == 12

    torch.manual_seed(12345)  # whatever state the new process starts in
    assert train.main(broken) == 0
    assert final_weights(broken) == final_weights(whole)
    rows, expected = metrics(broken), metrics(whole)
    for row in (*rows, *expected):
        del row["tokens_per_second"]
    assert rows == expected


def test_damaged_checkpoint_is_passed_over(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    whole = tiny_runs.run(tmp_path / "whole", base, train__save_steps=3)
    broken = tiny_runs.quick_config(tmp_path / "broken", base, train__save_steps=3)
    run_until_crash(broken, 8, monkeypatch)
    damaged = Path(broken.output_dir) / "checkpoint-6" / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-10])

    capsys.readouterr()
    assert train.main(broken) == 0
    assert "checkpoint-3 at step 3" in capsys.readouterr().err
    assert final_weights(broken) == final_weights(whole)


# ---- finished runs


def test_finished_run_is_left_alone(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    config = tiny_runs.run(tmp_path, base, train__max_steps=4)
    before = contents(Path(config.output_dir))
    assert train.main(config) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert contents(Path(config.output_dir)) == before


def test_finished_run_goes_on_with_more_steps(base: Path, tmp_path: Path):
    whole = tiny_runs.run(tmp_path / "whole", base, train__max_steps=9)
    longer = tiny_runs.run(tmp_path / "longer", base, train__max_steps=4)
    longer.train.max_steps = 9
    assert train.main(longer) == 0
    assert final_weights(longer) == final_weights(whole)
    assert losses(longer) == losses(whole)
    assert (Path(longer.output_dir) / "checkpoint-4" / "adapter_model.safetensors").is_file()


def test_checkpoint_of_another_run_is_only_read(base: Path, tmp_path: Path):
    first = tiny_runs.run(tmp_path / "first", base, train__max_steps=2)
    before = contents(Path(first.output_dir))
    checkpoint = Path(first.output_dir) / "checkpoint-final"
    changes = {"train__max_steps": 4, "train__resume": str(checkpoint)}
    second = tiny_runs.run(tmp_path / "second", base, **changes)
    assert [row["step"] for row in metrics(second)] == [3, 4]
    assert contents(Path(first.output_dir)) == before


def test_save_total_limit_keeps_the_newest(base: Path, tmp_path: Path):
    config = tiny_runs.run(tmp_path, base, train__save_steps=4, train__save_total_limit=2)
    names = {path.name for path in Path(config.output_dir).glob("checkpoint-*")}
    assert names == {"checkpoint-16", "checkpoint-20", "checkpoint-final"}


# ---- refusals


def test_two_runs_are_never_mixed(base: Path, tmp_path: Path):
    config = tiny_runs.run(tmp_path, base, train__max_steps=4)
    before = contents(Path(config.output_dir))
    config.train.max_steps, config.train.learning_rate = 6, 2e-2
    with pytest.raises(UserError, match=r"learning_rate: 0.01 -> 0.02"):
        train.main(config)

    config.train.learning_rate = 1e-2
    train_file = Path(config.data.train_file)
    rows = train_file.read_text(encoding="utf-8").splitlines(keepends=True)
    train_file.write_text("".join(rows[:-1]), encoding="utf-8")
    with pytest.raises(UserError, match="training rows"):
        train.main(config)

    config.train.resume = "never"
    with pytest.raises(UserError, match=r"resume=never.*checkpoint-final"):
        train.main(config)
    assert contents(Path(config.output_dir)) == before

    # on purpose it goes on
    config.train.resume = str(Path(config.output_dir) / "checkpoint-final")
    assert train.main(config) == 0
    assert metrics(config)[-1]["step"] == 6


def test_refused_continuation_changes_nothing(base: Path, tmp_path: Path):
    """What cannot work is refused before the directory is touched, also if it was asked for."""
    config = tiny_runs.run(tmp_path, base, train__max_steps=2)
    before = contents(Path(config.output_dir))
    config.train.max_steps, config.lora.rank = 4, 8
    config.train.resume = str(Path(config.output_dir) / "checkpoint-final")
    with pytest.raises(UserError, match="shape"):
        train.main(config)
    assert contents(Path(config.output_dir)) == before


def test_going_back_to_an_earlier_checkpoint_is_refused(base: Path, tmp_path: Path):
    """Two branches in one directory would delete and continue each other's checkpoints."""
    config = tiny_runs.run(tmp_path, base, train__max_steps=6, train__save_steps=2)
    config.train.resume = str(Path(config.output_dir) / "checkpoint-2")
    with pytest.raises(UserError, match="has its own checkpoint-final"):
        train.main(config)


def test_another_number_of_documents_per_step_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An epoch's steps would begin elsewhere, e.g. on more processes."""
    config = tiny_runs.quick_config(tmp_path, base, train__save_steps=2)
    run_until_crash(config, 5, monkeypatch)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="documents per optimizer step: 4 -> 8"):
        train.main(config)
    monkeypatch.setenv("WORLD_SIZE", "1")
    config.train.max_steps = 3
    with pytest.raises(UserError, match="already past the 3 steps"):
        train.main(config)
