"""The best checkpoint, early stopping and metrics in training evaluations: against metrics.jsonl read back by hand."""

import json
from pathlib import Path

import pytest

import tiny_runs
import train
from minilora.config import UserError
from minilora.evaluation import metrics
from minilora.running.directory import TrainerState, newest, read_state, step_checkpoints
from minilora.running.settings import validate


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.base_model(tmp_path_factory.mktemp("base") / "base")


def events(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def series(out: Path, key: str) -> dict[int, float]:
    """step -> value"""
    return {event["step"]: event[key] for event in events(out) if key in event}


def run(tmp_path: Path, base: Path, **overrides) -> Path:
    config = tiny_runs.config(tmp_path, base, **{"eval__eval_steps": 2, "train__save_steps": 100, **overrides})
    validate(config)
    assert train.main(config) == 0
    return Path(config.output_dir)


# a rate at which the loss on unseen rows falls, then rises
TURNING = {"train__learning_rate": 0.1, "train__epochs": 6.0, "data__edge_dropping": False}


@pytest.mark.parametrize("patience", [1, 2])
def test_a_run_stops_when_its_loss_no_longer_falls(patience: int, base: Path, tmp_path: Path, capsys):
    out = run(tmp_path, base, train__early_stopping_patience=patience, **TURNING)
    losses = series(out, "eval/out_of_domain/loss")
    best = min(losses, key=losses.__getitem__)
    after = [step for step in losses if step > best]
    assert len(after) == patience, "this many evaluations without a better one, and no more"
    last = max(losses)
    state, _ = read_state(newest(out))
    assert newest(out).name == "checkpoint-final" and state.finished and state.step == last < 42
    assert state.best == {"step": best, "metric": "eval/out_of_domain/loss", "value": losses[best]}
    assert f"best: checkpoint-{best}" in capsys.readouterr().err
    kept, _ = read_state(out / f"checkpoint-{best}")  # saved although no save was due
    assert kept.step == kept.best["step"] == best and not kept.finished

    before = sorted(p.name for p in out.iterdir())  # the same command again: it is finished
    run(tmp_path, base, train__early_stopping_patience=patience, **TURNING)
    assert "stopped early" in capsys.readouterr().err and sorted(p.name for p in out.iterdir()) == before
    assert max(series(out, "eval/out_of_domain/loss")) == last

    run(tmp_path, base, train__early_stopping_patience=patience + 1, **TURNING)  # more patience: it goes on
    assert max(series(out, "eval/out_of_domain/loss")) > last


def test_every_best_is_saved_and_the_last_of_them_kept(base: Path, tmp_path: Path):
    out = run(
        tmp_path, base, train__metric_for_best_model="in_domain/loss", train__save_total_limit=1, train__save_steps=4, **TURNING
    )
    losses = series(out, "eval/in_domain/loss")
    best = min(losses, key=losses.__getitem__)
    state, _ = read_state(out / "checkpoint-final")
    assert state.best["step"] == best and state.best["metric"] == "eval/in_domain/loss"
    records = [step for step, loss in losses.items() if loss == min(v for s, v in losses.items() if s <= step)]
    saved = {event["step"] for event in events(out) if "checkpoint" in event}
    assert saved == {*records, *range(4, 43, 4), 42}
    names = {p.name for p in step_checkpoints(out)}
    newest_step = max(saved - {42})
    assert names == ({f"checkpoint-{best}"} if best < 42 else set()) | {f"checkpoint-{newest_step}"}


def test_a_stopped_run_counts_on_where_it_was(base: Path, tmp_path: Path):
    """In parts, a run stops where it does in one go."""
    settings = {"train__early_stopping_patience": 2, **TURNING}
    whole = run(tmp_path / "whole", base, **settings) if (tmp_path / "whole").mkdir() is None else None
    (tmp_path / "parts").mkdir()
    for steps in (4, 8, 12, None):
        parts = run(tmp_path / "parts", base, **settings, train__max_steps=steps or 42)
    assert whole is not None
    one, two = read_state(whole / "checkpoint-final")[0], read_state(parts / "checkpoint-final")[0]
    assert (one.step, one.best, one.worse) == (two.step, two.best, two.worse)


def test_metrics_of_the_answers_are_those_of_the_samples(base: Path, tmp_path: Path):
    names = ("exact_match", "bleu", "chrf", "rouge", "meteor", "edit_distance", "graph")
    out = run(
        tmp_path, base, eval__metrics=names, eval__num_generate_samples=4, eval__max_new_tokens=30, train__max_steps=4,
        train__metric_for_best_model="rougeL",
    )  # fmt: skip
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    for step in (2, 4):
        rows = [row for row in samples if row["step"] == step]
        expected = metrics.score(names, [r["generated"] for r in rows], [r["target"] for r in rows])
        (event,) = [e for e in events(out) if e["step"] == step and "eval/out_of_domain/bleu" in e]
        assert {k.removeprefix("eval/out_of_domain/"): v for k, v in event.items() if "eval/" in k} == pytest.approx(expected)
    assert read_state(newest(out))[0].best["metric"] == "eval/out_of_domain/rougeL"


def test_a_target_that_a_metric_cannot_read_is_named_before_training(base: Path, tmp_path: Path):
    config = tiny_runs.config(tmp_path, base, eval__metrics=("numeric",))
    eval_file = Path(config.data.eval_file)
    eval_file.write_text("".join(line for line in eval_file.read_text().splitlines(True)).replace("20th-century art", "Art"))
    with pytest.raises(UserError, match="numeric: reference 1 of 1"):
        train.main(config)
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval__metrics": ("blue",)}, "eval.metrics: no metric 'blue'; did you mean 'bleu'"),
        ({"eval__metrics": ("bleu",), "eval__num_generate_samples": 0}, "eval.num_generate_samples"),
        ({"train__metric_for_best_model": "bleu"}, "train.metric_for_best_model: 'bleu'"),
        ({"train__early_stopping_patience": 0}, "train.early_stopping_patience"),
    ],
)
def test_contradictions_are_refused(changes: dict, message: str, base: Path, tmp_path: Path):
    config = tiny_runs.config(tmp_path, base, **changes)
    with pytest.raises(UserError, match=message):
        validate(config)


def test_no_figure_is_no_improvement():
    config = tiny_runs.Config().train
    config.metric_for_best_model, config.early_stopping_patience = "numeric/mae", 2
    state = TrainerState(step=1)
    assert not state.note_evaluation({"eval/a/loss": 1.0}, config) and state.worse == 1
    assert state.note_evaluation({"eval/a/numeric/mae": 9.0}, config) and state.worse == 0
    assert not state.note_evaluation({"eval/a/numeric/mae": float("nan")}, config)
    assert not state.out_of_patience(config)
    assert not state.note_evaluation({"eval/a/numeric/mae": 9.0}, config) and state.out_of_patience(config)
    assert state.note_evaluation({"eval/a/numeric/mae": 8.0}, config) and not state.out_of_patience(config)
    config.metric_for_best_model = "rougeL"
    state = TrainerState(best={"step": 1, "metric": "eval/a/rougeL", "value": 0.5})
    assert not state.note_evaluation({"eval/a/rougeL": 0.4}, config) and state.note_evaluation({"eval/a/rougeL": 0.6}, config)


def test_another_figure_begins_anew():
    config = tiny_runs.Config().train
    config.metric_for_best_model = "loss"
    state = TrainerState(step=3, best={"step": 2, "metric": "eval/a/rougeL", "value": 0.5})
    assert state.note_evaluation({"eval/a/loss": 9.0}, config)
    assert state.best == {"step": 3, "metric": "eval/a/loss", "value": 9.0}
    assert "checkpoint-final, eval/a/loss 9" in state.best_text()
    state.step = 4
    assert not state.note_evaluation({"eval/a/loss": 9.5}, config) and "checkpoint-3" in state.best_text()


@pytest.mark.parametrize("name", ["rouge", "lossy", "validation/domain/loss"])
def test_a_figure_that_is_never_logged_is_refused_before_anything_is_written(name: str, base: Path, tmp_path: Path):
    c = tiny_runs.config(tmp_path, base, train__metric_for_best_model=name, eval__metrics=("rouge",))
    with pytest.raises(UserError, match=r"train.metric_for_best_model: .*in_domain/loss.*rougeL"):
        train.main(c)
    assert not Path(c.output_dir).exists()
