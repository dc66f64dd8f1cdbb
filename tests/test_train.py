"""train.main: what a run writes and when, and that only its configuration changes its numbers."""

import json
import math
import os
import random
import re
import signal
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import train
from helpers import tiny_runs
from helpers.averaged_runs import loss_by_hand
from helpers.tiny_runs import losses, metrics, poison_loss
from minilora import distributed
from minilora.config import Config
from minilora.errors import RunError, UserError
from minilora.training import evaluate

STEPS = 21  # 26 documents at 4 a step are 7 steps, the last of 2 documents, for three epochs


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.base_model(tmp_path_factory.mktemp("base") / "base")


def rows_of(config: Config, file: str) -> list[dict]:
    """Return all rows of a JSON lines file of a run."""
    lines = (Path(config.output_dir) / file).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def steps_with(config: Config, key: str) -> list[int]:
    """Return the steps of the events that have a key."""
    return [row["step"] for row in metrics(config, key)]


def final_weights(config: Config) -> dict[str, torch.Tensor]:
    """Return the weights of the last checkpoint."""
    (file,) = (Path(config.output_dir) / "checkpoint-final").glob("*model.safetensors")
    return safetensors.torch.load_file(file)


# ---- what a run writes


def test_files_of_a_run(base: Path, tmp_path: Path):
    config = tiny_runs.run(
        tmp_path,
        base,
        eval__eval_steps=10,
        eval__num_generate_samples=1,
        log__tensorboard=True,
        train__logging_steps=5,
    )
    out = Path(config.output_dir)
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "samples.jsonl",
        "report.html",
        "runs",
        "checkpoint-10",
        "checkpoint-20",
        "checkpoint-final",
    }
    assert {path.name for path in (out / "checkpoint-10").iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "minilora.json",
        "chat_template.jinja",
        "generation_config.json",
        "trainer_state.json",
        "training_state.safetensors",
        "manifest.json",
    }
    assert json.loads((out / "config.json").read_text())["train"]["learning_rate"] == 1e-2
    assert list((out / "runs").iterdir())

    logs = metrics(config)
    assert [row["step"] for row in logs] == [5, 10, 15, 20, STEPS]
    assert set(logs[0]) == {
        "step",
        "epoch",
        "loss",
        "grad_norm",
        "lr",
        "tokens",
        "supervised_tokens",
        "tokens_per_second",
        "share_of_peak",
        "peak_memory",
    }
    assert logs[-1]["epoch"] == 3.0
    assert all(0 < row["share_of_peak"] < 1 for row in logs)
    assert all(2**25 < row["peak_memory"] < 2**35 for row in logs)
    assert logs[-1]["tokens"] > logs[-1]["supervised_tokens"] > 0
    assert steps_with(config, "eval/in_domain/loss") == [10, 20, STEPS]
    assert steps_with(config, "eval/out_of_domain/ppl") == [10, 20, STEPS]

    samples = rows_of(config, "samples.jsonl")
    assert [row["step"] for row in samples] == [10, 20, STEPS]
    assert set(samples[0]) >= {"prompt", "target", "generated"}
    assert samples[0]["target"].startswith("Main -> ")


def test_full_training_saves_a_model_of_its_dtype(base: Path, tmp_path: Path):
    changes = {"method": "full", "model__dtype": "bfloat16", "model__init": "random"}
    config = tiny_runs.run(tmp_path, base, train__max_steps=3, **changes)
    tensors = final_weights(config)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}

    checkpoint = Path(config.output_dir) / "checkpoint-final"
    state = safetensors.torch.load_file(checkpoint / "training_state.safetensors")
    masters = {
        name.removeprefix("master."): tensor
        for name, tensor in state.items()
        if name.startswith("master.")
    }
    assert masters.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(masters[name].bfloat16(), tensor), name


def test_preview_shows_and_writes_the_masks(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    config = tiny_runs.run(tmp_path, base, preview=3)
    assert [path.name for path in Path(config.output_dir).iterdir()] == ["preview.jsonl"]
    rows = rows_of(config, "preview.jsonl")
    assert [row["index"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert set(row) == {"index", "input_ids", "labels", "train_labels", "text"}
        columns = zip(row["input_ids"], row["labels"], row["train_labels"], strict=True)
        for token, label, train_label in columns:
            assert label in (token, -100) and train_label in (label, -100)
        assert row["text"].startswith("<s>[INST] Title: Topic")

    shown = capsys.readouterr().out
    assert "⟦Main ->" in shown
    assert "\x1b[" not in shown, "no colors where there is no terminal"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model__name": "no/such/dir"}, "no such directory"),
        ({"data__train_file": "missing.jsonl"}, r"data.train_file.*missing.jsonl"),
        ({"lora__target_modules": ("q_proj", "v_pro")}, "v_pro.*did you mean 'v_proj'"),
        ({"data__chat_template": "missing.jinja"}, "data.chat_template"),
        ({"train__resume": "missing/checkpoint-3"}, "missing/checkpoint-3 does not exist"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(
    base: Path, tmp_path: Path, change: dict, message: str
):
    config = tiny_runs.quick_config(tmp_path, base, **change)
    with pytest.raises(UserError, match=message):
        train.main(config)
    assert not list(Path(config.output_dir).glob("*.jsonl"))


def test_impossible_output_directory_is_refused(base: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    for preview in (0, 1):
        out = str(tmp_path / "file" / "out")
        config = tiny_runs.quick_config(tmp_path, base, output_dir=out, preview=preview)
        with pytest.raises(UserError, match="cannot be created"):
            train.main(config)


def test_nan_stops_the_run_and_is_never_saved(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny_runs.quick_config(tmp_path, base, train__save_steps=2, train__logging_steps=3)
    poison_loss(monkeypatch, 6)
    with pytest.raises(RunError, match=r"loss nan.*by step 6.*checkpoint-4"):
        train.main(config)
    saved = list(Path(config.output_dir).glob("checkpoint-*/adapter_model.safetensors"))
    assert len(saved) == 2
    for file in saved:
        assert all(t.isfinite().all() for t in safetensors.torch.load_file(file).values())


def test_float16_skips_a_step_that_overflows(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    changes = {"model__dtype": "float16", "train__logging_steps": 3, "train__max_steps": 9}
    config = tiny_runs.quick_config(tmp_path, base, **changes, train__ema_decay=0.5)
    poison_loss(monkeypatch, 5)
    assert train.main(config) == 0
    assert [row["skipped_steps"] for row in metrics(config)] == [0, 1, 0]
    assert all(math.isfinite(row["loss"] + row["grad_norm"]) for row in metrics(config))
    assert "1 of the 3 steps up to step 6 were skipped" in capsys.readouterr().err
    assert all(tensor.isfinite().all() for tensor in final_weights(config).values())


# ---- when it evaluates and saves


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"train__batch_size": 4}, [7, 14, 21]),  # 26 documents: the last step of an epoch has two
        ({"train__batch_size": 2, "train__grad_acc_steps": 5}, [3, 6, 9]),
        ({"train__batch_size": 13}, [2, 4, 6]),
        ({"train__batch_size": 100}, [1, 2, 3]),
        ({"train__batch_size": 4, "train__epochs": 1.5}, [7, 11]),
        ({"train__batch_size": 4, "train__max_steps": 9}, [7, 9]),
    ],
)
def test_evaluations_and_checkpoints_at_the_end_of_each_epoch(
    changes: dict, steps: list[int], base: Path, tmp_path: Path
):
    every_epoch = {"eval__eval_steps": "epoch", "train__save_steps": "epoch"}
    config = tiny_runs.run(tmp_path, base, **every_epoch, **changes)
    assert steps_with(config, "checkpoint") == steps
    assert steps_with(config, "eval/in_domain/loss") == steps
    names = {path.name for path in Path(config.output_dir).glob("checkpoint-*")}
    assert names == {*(f"checkpoint-{step}" for step in steps[:-1]), "checkpoint-final"}


def test_checkpoints_come_with_evaluations_by_default(base: Path, tmp_path: Path):
    config = tiny_runs.run(tmp_path, base, eval__eval_steps="epoch")
    assert steps_with(config, "checkpoint") == [7, 14, 21]


def test_checkpoints_come_apart_from_evaluations_if_configured(base: Path, tmp_path: Path):
    config = tiny_runs.run(tmp_path, base, eval__eval_steps=10, train__save_steps="epoch")
    assert steps_with(config, "checkpoint") == [7, 14, 21]
    assert steps_with(config, "eval/in_domain/loss") == [10, 20, 21]


def test_evaluations_several_times_an_epoch_and_one_checkpoint(base: Path, tmp_path: Path):
    """An epoch has 7 steps, so half of one is 3.5: it is due in steps 4, 7, 11, 14, 18 and 21."""
    settings = {"eval__eval_steps": 0.5, "train__save_steps": 0}
    config = tiny_runs.run(tmp_path, base, **settings)
    assert steps_with(config, "eval/in_domain/loss") == [4, 7, 11, 14, 18, 21]
    assert steps_with(config, "checkpoint") == [21]


# ---- without evaluations


@pytest.mark.parametrize(
    ("eval_steps", "save_steps", "saved"),
    [(0, None, [STEPS]), (None, 0.5, [4, 7, 11, 14, 18, STEPS])],
)
def test_a_run_without_evaluations(
    eval_steps: int | None,
    save_steps: float | None,
    saved: list[int],
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
):
    """It saves at its end or when told, reads no file for evaluations, and trains as ever."""
    settings = {"eval__eval_steps": eval_steps, "train__save_steps": save_steps}
    config = tiny_runs.quick_config(tmp_path, base, **settings)
    Path(config.data.eval_file).write_text("no row", encoding="utf-8")
    assert train.main(config) == 0
    out = Path(config.output_dir)
    assert "data.eval_file" in capsys.readouterr().err
    keys = {key for row in rows_of(config, "metrics.jsonl") for key in row}
    assert not any(key.startswith("eval/") for key in keys)
    assert steps_with(config, "checkpoint") == saved
    names = {path.name for path in out.iterdir()}
    checkpoints = {f"checkpoint-{step}" for step in saved[:-1]} | {"checkpoint-final"}
    assert names == {"config.json", "metrics.jsonl", "report.html", *checkpoints}
    assert "26 lines read" in (out / "report.html").read_text(encoding="utf-8")

    if saved == [STEPS]:
        assert losses(config) == losses(tiny_runs.run(tmp_path / "evaluated", base))


# ---- a time limit for answers


def test_answers_are_cut_off_after_their_time(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """What is there by then is kept, and scored."""
    settings = {
        "train__max_steps": 1,
        "eval__num_generate_samples": 3,
        "eval__max_new_tokens": 100_000,
        "eval__temperature": 0.0,
        "eval__metrics": ("exact_match",),
        "eval__max_time": 0.3,
    }
    config = tiny_runs.run(tmp_path, base, **settings)
    cut = re.findall(r"(\d) of 3 answers were cut off after 0.3 seconds", capsys.readouterr().err)
    samples = rows_of(config, "samples.jsonl")
    assert len(samples) == 3 and len(cut) == 1 and int(cut[0]) >= 1
    assert sum(bool(row["generated"]) for row in samples) >= int(cut[0])
    assert steps_with(config, "eval/out_of_domain/exact_match") == [1]


# ---- an evaluation before the first step

ON_START = {
    "eval__eval_on_start": True,
    "eval__num_generate_samples": 2,
    "train__ema_decay": 0.7,
}


def test_evaluation_on_start_is_of_the_base(base: Path, tmp_path: Path):
    config = tiny_runs.run(tmp_path, base, train__max_steps=4, **ON_START)
    rows = rows_of(config, "metrics.jsonl")
    for row, domain in zip(rows, ("in_domain", "out_of_domain"), strict=False):
        assert set(row) == {"step", "epoch", f"eval/{domain}/loss", f"eval/{domain}/ppl"}
    positions = [(row["step"], row["epoch"]) for row in rows[:3]]
    assert positions == [(0, 0.0), (0, 0.0), (1, 1 / 7)]

    # the adapters are still zero
    for row, file in zip(rows, (config.data.train_file, config.data.eval_file), strict=False):
        (logged,) = [value for key, value in row.items() if key.endswith("/loss")]
        assert logged == pytest.approx(loss_by_hand(base, config, file), rel=1e-5)
    assert [row["step"] for row in rows_of(config, "samples.jsonl")] == [0, 0, 4, 4]


def test_evaluation_on_start_changes_no_number_of_the_training(base: Path, tmp_path: Path):
    config = tiny_runs.run(tmp_path / "with", base, train__max_steps=4, **ON_START)
    plain = tiny_runs.run(tmp_path / "without", base, train__max_steps=4, train__ema_decay=0.7)
    assert losses(plain) == losses(config)


def test_evaluation_on_start_is_left_out_by_a_resumed_run(base: Path, tmp_path: Path):
    tiny_runs.run(tmp_path, base, train__max_steps=4, **ON_START)
    config = tiny_runs.run(tmp_path, base, train__max_steps=6, **ON_START)
    assert steps_with(config, "eval/in_domain/loss") == [0, 4, 6]


def test_time_of_evaluations_does_not_count(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real, delay = evaluate.loss_sums, 0.4

    def slow_loss_sums(*arguments):
        time.sleep(delay)
        return real(*arguments)

    monkeypatch.setattr(evaluate, "loss_sums", slow_loss_sums)
    changes = {"train__max_steps": 3, "eval__eval_steps": 2, "data__eval_file": None}
    rows = metrics(tiny_runs.run(tmp_path, base, **changes, **ON_START))
    tokens = [0, *(row["tokens"] for row in rows)]
    for (before, after), row in zip(pairwise(tokens), rows, strict=True):
        assert (after - before) / row["tokens_per_second"] < delay


# ---- the learning rate


def test_learning_rate_of_each_step_follows_the_schedule(base: Path, tmp_path: Path):
    schedule = {"train__warmup_ratio": 0.2, "train__lr_scheduler": "linear"}
    config = tiny_runs.run(tmp_path, base, **schedule)
    rates = [row["lr"] for row in metrics(config)]
    warmup, peak = math.ceil(0.2 * STEPS), config.train.learning_rate
    expected = np.interp(range(STEPS), [0, warmup, STEPS], [0, peak, 0])
    assert rates == pytest.approx(expected.tolist())


# ---- what does not change the numbers


def test_accumulation_does_not_change_numbers(base: Path, tmp_path: Path):
    """8 x 1 = 1 x 8 = 2 x 4, with labels dropped and the last step partial."""
    runs = []
    for batch_size, accumulation in ((8, 1), (1, 8), (2, 4)):
        config = tiny_runs.run(
            tmp_path / f"{batch_size}x{accumulation}",
            base,
            rows=29,
            train__batch_size=batch_size,
            train__grad_acc_steps=accumulation,
            train__max_grad_norm=0.0,
        )
        runs.append(metrics(config))
    for rows in runs[1:]:
        assert [row["step"] for row in rows] == [row["step"] for row in runs[0]]
        expected = [row["loss"] for row in runs[0]]
        assert [row["loss"] for row in rows] == pytest.approx(expected, abs=1e-5)
        expected = [row["grad_norm"] for row in runs[0]]
        assert [row["grad_norm"] for row in rows] == pytest.approx(expected, rel=1e-4)


def test_partial_last_step_of_an_epoch_is_taken(base: Path, tmp_path: Path):
    """7 micro-batches at 4 a step are 2 steps an epoch."""
    changes = {"train__batch_size": 2, "train__grad_acc_steps": 4, "train__epochs": 1.0}
    config = tiny_runs.run(tmp_path, base, rows=14, **changes)
    assert steps_with(config, "loss") == [1, 2]


def test_evaluation_does_not_depend_on_batch_size(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real, batch_tokens = evaluate.loss_sums, []

    def recording(model, documents, batches, *arguments):
        batch_tokens.extend(sum(documents.lengths[indices]) for indices in batches)
        return real(model, documents, batches, *arguments)

    monkeypatch.setattr(evaluate, "loss_sums", recording)
    values = []
    for docs, tokens in [(1, 10_000), (8, 10_000), (8, 300)]:
        batch_tokens.clear()
        changes = {"eval__batch_size": docs, "eval__max_batch_tokens": tokens}
        config = tiny_runs.run(tmp_path / f"{docs}-{tokens}", base, train__max_steps=3, **changes)
        keys = ("eval/in_domain/loss", "eval/out_of_domain/loss")
        values.append([metrics(config, key)[-1][key] for key in keys])
        if docs > 1:
            assert (max(batch_tokens) > 300) == (tokens > 300)
    assert values[0] == pytest.approx(values[1], abs=1e-6)
    assert values[0] == pytest.approx(values[2], abs=1e-6)


def test_order_and_draws_differ_between_epochs_but_not_between_runs(base: Path, tmp_path: Path):
    """With weights that do not change, the losses show which rows and labels each step saw."""
    frozen = {"train__learning_rate": 1e-30, "train__epochs": 2.0, "rows": 16}
    runs = []
    for name in ("a", "b"):
        random.seed(name)
        torch.manual_seed(ord(name))
        runs.append(losses(tiny_runs.run(tmp_path / name, base, **frozen)))
    assert runs[0] == runs[1]
    assert runs[0][:4] != runs[0][4:]
    assert losses(tiny_runs.run(tmp_path / "c", base, seed=1, **frozen)) != runs[0]


def test_single_process_needs_no_group():
    assert distributed.world_size() == 1 and distributed.rank() == 0
    assert distributed.all_reduce_sum(torch.ones(2)).tolist() == [1, 1]


# ---- Ctrl-C


def interrupt_during(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let Ctrl-C come while train's function `name` runs."""
    real = getattr(train, name)

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(train, name, interrupted)


def test_ctrl_c_in_the_last_step_costs_no_evaluation(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    interrupt_during(monkeypatch, "finish_gradients")
    config = tiny_runs.run(tmp_path, base, train__max_steps=1)
    assert steps_with(config, "eval/in_domain/loss") == [1]


def test_ctrl_c_in_the_evaluation_before_training(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny_runs.quick_config(tmp_path, base, train__max_steps=4, eval__eval_on_start=True)
    interrupt_during(monkeypatch, "evaluate")
    assert train.main(config) == 128 + signal.SIGINT
    assert steps_with(config, "eval/in_domain/loss") == [0]
    assert (Path(config.output_dir) / "checkpoint-1").is_dir()

    monkeypatch.undo()
    assert train.main(config) == 0
    assert steps_with(config, "eval/in_domain/loss") == [0, 4]


def test_ctrl_c_of_a_run_that_would_refuse_its_own_checkpoint(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """With train.resume=never the same command would not continue."""
    config = tiny_runs.quick_config(tmp_path, base, train__max_steps=2, train__resume="never")
    with monkeypatch.context() as patch:
        interrupt_during(patch, "finish_gradients")
        assert train.main(config) == 128 + signal.SIGINT
    printed = capsys.readouterr().err
    assert "saved; continue it with --train.resume auto" in printed
    assert "the same command" not in printed

    config.train.resume = "auto"
    assert train.main(config) == 0
