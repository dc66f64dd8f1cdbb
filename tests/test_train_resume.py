"""train.main with checkpoints in its output directory: what it continues, and what it refuses."""

import hashlib
from pathlib import Path

import pytest
import torch

import minilora
import train
from helpers import tiny_runs
from helpers.tiny_runs import losses, metrics
from minilora.checkpoint.checkpointer import FINAL
from minilora.checkpoint.resume import read_state
from minilora.checkpoint.trainer_state import TrainerState
from minilora.config import Config, TrainConfig
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
        for speed in ("tokens_per_second", "share_of_peak", "peak_memory"):
            del row[speed]
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


def test_run_whose_patience_is_new_is_finished_only_if_it_has_ended():
    """A run that was killed has no checkpoint-final yet, however many evaluations were worse."""
    patient = TrainConfig(early_stopping_patience=2)
    state = TrainerState(step=11, worse=3)
    assert not train.is_already_finished(Path("checkpoint-11"), state, 60, patient)
    state.finished = True
    assert train.is_already_finished(Path("checkpoint-final"), state, 60, patient)


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


# ---- going back to the best checkpoint

OVERSHOOTS = {
    "rows": 8,
    "train__learning_rate": 0.2,  # so large that step 2 is better than steps 3 and 4
    "train__warmup_steps": 1,
    "train__max_steps": 4,
    "train__metric_for_best_model": "loss",
    "eval__eval_steps": 1,
}


def figures(config: Config) -> list[dict]:
    """Return what a run has logged, without its speed, memory and the names of its checkpoints."""
    rows = [*metrics(config, "loss"), *metrics(config, "eval/out_of_domain/loss")]
    for row in rows:
        for speed in ("tokens_per_second", "share_of_peak", "peak_memory"):
            row.pop(speed, None)
    return rows


def test_best_is_as_if_the_run_had_stopped_there(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Also if the continuation is interrupted, and started again by the same command."""
    shorter = {**OVERSHOOTS, "train__max_steps": 2}
    stopped = tiny_runs.run(tmp_path / "stopped", base, **shorter)
    run = tiny_runs.run(tmp_path / "run", base, **OVERSHOOTS)
    out = Path(run.output_dir)
    newer = {name: contents(out / name) for name in ("checkpoint-3", "checkpoint-final")}
    for config, resume in ((stopped, "last"), (run, "best")):
        config.train.resume = resume
        config.train.learning_rate, config.train.max_steps = 1e-2, 6
    assert train.main(stopped) == 0

    capsys.readouterr()
    run_until_crash(run, 3, monkeypatch)
    printed = capsys.readouterr().err
    assert f"the best checkpoint is {out / 'checkpoint-2'} with eval/out_of_domain/loss" in printed
    assert "with a change: train.learning_rate: 0.2 -> 0.01" in printed
    for name, content in newer.items():
        assert f"{out / name} is newer than step 2: now superseded-{name}" in printed
        assert contents(out / f"superseded-{name}") == content

    assert train.main(run) == 0
    printed = capsys.readouterr().err
    assert f"resumed from {out / 'checkpoint-4'}" in printed and "best checkpoint is" not in printed
    assert figures(run) == figures(stopped)
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4, 5, 6]
    assert final_weights(run) == final_weights(stopped)
    final, expected = (read_state(Path(c.output_dir) / FINAL)[0] for c in (run, stopped))
    assert final == expected
    names = {path.name for path in out.glob("checkpoint-*")}
    assert names == {f"checkpoint-{step}" for step in (1, 2, 3, 4, 5)} | {FINAL}

    # a superseded checkpoint is one like any other
    for name in newer:
        model, tokenizer = minilora.load(str(out / f"superseded-{name}"), device="cpu")
        assert isinstance(minilora.generate(model, tokenizer, ["a"], max_new_tokens=1)[0], str)


def test_the_best_checkpoint_may_be_the_newest(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    config = tiny_runs.run(tmp_path, base, **{**OVERSHOOTS, "train__max_steps": 2})
    config.train.resume = "best"
    assert train.main(config) == 0
    assert "nothing to do" in capsys.readouterr().err
    config.train.max_steps = 3
    assert train.main(config) == 0
    assert "resumed from" in capsys.readouterr().err
    assert [row["step"] for row in metrics(config)] == [1, 2, 3]
    assert not list(Path(config.output_dir).glob("superseded-*"))


# ---- refusals


@pytest.mark.parametrize("resume", ["last", "best"])
def test_there_must_be_a_checkpoint_to_go_back_to(resume: str, base: Path, tmp_path: Path):
    config = tiny_runs.quick_config(tmp_path, base, train__max_steps=2, train__resume=resume)
    with pytest.raises(UserError, match=rf"train.resume={resume}, but .*out has no complete"):
        train.main(config)
    assert not Path(config.output_dir).exists()


def test_best_needs_a_run_that_compared_its_evaluations(base: Path, tmp_path: Path):
    config = tiny_runs.run(tmp_path, base, train__max_steps=2)
    before = contents(Path(config.output_dir))
    config.train.resume, config.train.max_steps = "best", 4
    with pytest.raises(UserError, match=r"train.resume=best, .*no train.metric_for_best_model"):
        train.main(config)
    assert contents(Path(config.output_dir)) == before


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
