"""The best checkpoint and early stopping: what update_best notes, and what whole runs do."""

import json
from pathlib import Path

import pytest

import train
from helpers import tiny_runs
from minilora.checkpoint.checkpointer import latest_checkpoint, step_checkpoints
from minilora.checkpoint.resume import read_state
from minilora.checkpoint.trainer_state import TrainerState
from minilora.cli import validate
from minilora.config import TrainConfig
from minilora.errors import UserError
from minilora.evaluation import text
from minilora.training.early_stopping import describe_best, out_of_patience, update_best

# a learning rate at which the loss on unseen rows falls at first, and then rises
TURNING = {"train__learning_rate": 0.1, "train__epochs": 6.0, "data__edge_dropping": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.base_model(tmp_path_factory.mktemp("base") / "base")


def events(out: Path) -> list[dict]:
    """Return all events of a run."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def series(out: Path, key: str) -> dict[int, float]:
    """Return {step: value} of the events that have a figure."""
    return {event["step"]: event[key] for event in events(out) if key in event}


def run(directory: Path, base: Path, **overrides) -> Path:
    """Train with an evaluation every two steps; returns the output directory."""
    directory.mkdir(exist_ok=True)
    settings = {"eval__eval_steps": 2, "train__save_steps": 100, **overrides}
    config = tiny_runs.config(directory, base, **settings)
    validate(config)
    assert train.main(config) == 0
    return Path(config.output_dir)


# ---- update_best


def test_update_best_counts_a_missing_figure_as_worse():
    settings = TrainConfig(metric_for_best_model="numeric/mae", early_stopping_patience=2)
    state = TrainerState(step=1)

    assert not update_best(state, {"eval/a/loss": 1.0}, settings)
    assert state.worse == 1
    assert update_best(state, {"eval/a/numeric/mae": 9.0}, settings)
    assert state.worse == 0
    assert not update_best(state, {"eval/a/numeric/mae": float("nan")}, settings)
    assert not out_of_patience(state, settings)
    assert not update_best(state, {"eval/a/numeric/mae": 9.0}, settings)
    assert out_of_patience(state, settings)
    assert update_best(state, {"eval/a/numeric/mae": 8.0}, settings)
    assert not out_of_patience(state, settings)


def test_update_best_where_higher_is_better():
    settings = TrainConfig(metric_for_best_model="rougeL")
    state = TrainerState(best={"step": 1, "metric": "eval/a/rougeL", "value": 0.5})
    assert not update_best(state, {"eval/a/rougeL": 0.4}, settings)
    assert update_best(state, {"eval/a/rougeL": 0.6}, settings)


def test_update_best_takes_the_last_set_with_the_figure():
    settings = TrainConfig(metric_for_best_model="loss")
    state = TrainerState(step=1)
    figures = {"eval/a/loss": 1.0, "eval/b/loss": 2.0, "eval/b/ppl": 7.4}
    assert update_best(state, figures, settings)
    assert state.best == {"step": 1, "metric": "eval/b/loss", "value": 2.0}


def test_update_best_without_a_figure_to_compare():
    state = TrainerState(step=1)
    assert not update_best(state, {"eval/a/loss": 1.0}, TrainConfig())
    assert state == TrainerState(step=1)


def test_update_best_of_another_figure_starts_again():
    settings = TrainConfig(metric_for_best_model="loss")
    state = TrainerState(step=3, best={"step": 2, "metric": "eval/a/rougeL", "value": 0.5})
    assert update_best(state, {"eval/a/loss": 9.0}, settings)
    assert state.best == {"step": 3, "metric": "eval/a/loss", "value": 9.0}
    assert describe_best(state) == "; best: checkpoint-final, eval/a/loss 9"

    state.step = 4
    assert not update_best(state, {"eval/a/loss": 9.5}, settings)
    assert describe_best(state) == "; best: checkpoint-3, eval/a/loss 9"
    assert describe_best(TrainerState()) == ""


# ---- whole runs


@pytest.mark.parametrize("patience", [1, 2])
def test_run_stops_when_its_loss_no_longer_falls(
    patience: int, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    out = run(tmp_path, base, train__early_stopping_patience=patience, **TURNING)
    losses = series(out, "eval/out_of_domain/loss")
    best, last = min(losses, key=losses.__getitem__), max(losses)
    assert len([step for step in losses if step > best]) == patience

    assert latest_checkpoint(out).name == "checkpoint-final"
    state, _ = read_state(latest_checkpoint(out))
    assert state.finished and state.step == last < 42
    assert state.best == {"step": best, "metric": "eval/out_of_domain/loss", "value": losses[best]}
    assert f"best: checkpoint-{best}" in capsys.readouterr().err
    kept, _ = read_state(out / f"checkpoint-{best}")  # saved although no save was due
    assert kept.step == kept.best["step"] == best and not kept.finished

    # the same command again has nothing to do
    before = sorted(path.name for path in out.iterdir())
    run(tmp_path, base, train__early_stopping_patience=patience, **TURNING)
    assert "stopped early" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == before
    assert max(series(out, "eval/out_of_domain/loss")) == last

    # with more patience the run goes on
    run(tmp_path, base, train__early_stopping_patience=patience + 1, **TURNING)
    assert max(series(out, "eval/out_of_domain/loss")) > last


def test_run_saves_every_best_and_keeps_the_last_of_them(base: Path, tmp_path: Path):
    out = run(
        tmp_path,
        base,
        train__metric_for_best_model="in_domain/loss",
        train__save_total_limit=1,
        train__save_steps=4,
        **TURNING,
    )
    losses = series(out, "eval/in_domain/loss")
    best = min(losses, key=losses.__getitem__)
    state, _ = read_state(out / "checkpoint-final")
    assert state.best["step"] == best and state.best["metric"] == "eval/in_domain/loss"

    records, lowest = [], float("inf")
    for step, loss in losses.items():
        if loss <= lowest:
            records.append(step)
            lowest = loss
    saved = {event["step"] for event in events(out) if "checkpoint" in event}
    assert saved == {*records, *range(4, 43, 4), 42}

    expected = {f"checkpoint-{max(saved - {42})}"}
    if best < 42:
        expected.add(f"checkpoint-{best}")
    assert {path.name for path in step_checkpoints(out)} == expected


def test_run_in_parts_stops_where_it_does_in_one_go(base: Path, tmp_path: Path):
    settings = {"train__early_stopping_patience": 2, **TURNING}
    whole = run(tmp_path / "whole", base, **settings)
    for steps in (4, 8, 12, 42):
        parts = run(tmp_path / "parts", base, **settings, train__max_steps=steps)

    one, _ = read_state(whole / "checkpoint-final")
    two, _ = read_state(parts / "checkpoint-final")
    assert (one.step, one.best, one.worse) == (two.step, two.best, two.worse)


def test_metrics_of_an_evaluation_are_those_of_its_samples(base: Path, tmp_path: Path):
    names = ("exact_match", "bleu", "chrf", "rouge", "meteor", "edit_distance", "graph")
    out = run(
        tmp_path,
        base,
        eval__metrics=names,
        eval__num_generate_samples=4,
        eval__max_new_tokens=30,
        train__max_steps=4,
        train__metric_for_best_model="rougeL",
    )
    lines = (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    prefix = "eval/out_of_domain/"
    for step in (2, 4):
        rows = [row for row in samples if row["step"] == step]
        answers = [row["generated"] for row in rows]
        expected = text.score(names, answers, [row["target"] for row in rows])
        scored = [event for event in events(out) if f"{prefix}bleu" in event]
        (event,) = [event for event in scored if event["step"] == step]
        logged = {key.removeprefix(prefix): value for key, value in event.items() if "eval/" in key}
        assert logged == pytest.approx(expected)
    assert read_state(latest_checkpoint(out))[0].best["metric"] == "eval/out_of_domain/rougeL"


# ---- refusals


def test_target_that_a_metric_cannot_read_is_refused_before_training(base: Path, tmp_path: Path):
    config = tiny_runs.config(tmp_path, base, eval__metrics=("numeric",))
    eval_file = Path(config.data.eval_file)
    text_without_numbers = eval_file.read_text().replace("20th-century art", "Art")
    eval_file.write_text(text_without_numbers)
    with pytest.raises(UserError, match="numeric: reference 1 of 1"):
        train.main(config)
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval__metrics": ("blue",)}, "eval.metrics: no metric 'blue'; did you mean 'bleu'"),
        (
            {"eval__metrics": ("bleu",), "eval__num_generate_samples": 0},
            "eval.num_generate_samples",
        ),
        ({"train__metric_for_best_model": "bleu"}, "train.metric_for_best_model: 'bleu'"),
        ({"train__early_stopping_patience": 0}, "train.early_stopping_patience"),
    ],
)
def test_contradicting_settings_are_refused(
    changes: dict, message: str, base: Path, tmp_path: Path
):
    config = tiny_runs.config(tmp_path, base, **changes)
    with pytest.raises(UserError, match=message):
        validate(config)


@pytest.mark.parametrize("name", ["rouge", "lossy", "validation/domain/loss"])
def test_figure_that_is_never_logged_is_refused_before_anything_is_written(
    name: str, base: Path, tmp_path: Path
):
    changes = {"train__metric_for_best_model": name, "eval__metrics": ("rouge",)}
    config = tiny_runs.config(tmp_path, base, **changes)
    with pytest.raises(UserError, match=r"train.metric_for_best_model: .*in_domain/loss.*rougeL"):
        train.main(config)
    assert not Path(config.output_dir).exists()
