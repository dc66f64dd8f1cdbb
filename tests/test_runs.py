"""Whole runs: what they leave behind, and that nothing but the configuration changes their numbers."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

import train
from minilora import dist
from minilora.config import Config, RunError, UserError
from minilora.tracking import Tracker
from tiny_runs import base_model, config, losses, metrics, poison_loss

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return base_model(tmp_path_factory.mktemp("base") / "model")


class Crash(Exception):
    pass


def crash_after(monkeypatch, steps: int) -> None:
    """Make the process fall over after so many optimizer steps, between a checkpoint and the next."""
    taken = iter(range(steps - 1))

    def step(tracker: Tracker) -> None:
        if next(taken, None) is None:
            raise Crash

    monkeypatch.setattr(Tracker, "step", step)


def contents(directory: Path) -> dict[str, str]:
    """{relative path: hash} of all files."""
    files = [p for p in sorted(directory.rglob("*")) if p.is_file()]
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def weights(config: Config) -> bytes:
    name = "adapter_model.safetensors" if config.method == "lora" else "model.safetensors"
    return (Path(config.output_dir) / "checkpoint-final" / name).read_bytes()


def test_what_a_run_leaves(tmp_path, base):
    c = config(tmp_path, base, eval__eval_steps=10, log__tensorboard=True, train__logging_steps=5)
    assert train.main(c) == 0
    out = Path(c.output_dir)
    steps = 21  # 26 documents at 4 a step are 7 steps, the last of 2 documents, for three epochs
    assert {p.name for p in out.iterdir()} == {
        "config.json", "metrics.jsonl", "samples.jsonl", "report.html", "runs",
        "checkpoint-10", "checkpoint-20", "checkpoint-final",
    }  # fmt: skip
    assert {p.name for p in (out / "checkpoint-10").iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "generation_config.json", "trainer_state.json", "training_state.safetensors", "manifest.json",
    }  # fmt: skip
    logs = metrics(c)
    assert [row["step"] for row in logs] == [5, 10, 15, 20, 21]
    assert set(logs[0]) == {
        "step", "epoch", "loss", "grad_norm", "lr", "tokens", "supervised_tokens", "tokens_per_second",
    }  # fmt: skip
    assert logs[-1]["epoch"] == 3.0 and logs[-1]["tokens"] > logs[-1]["supervised_tokens"] > 0
    assert [row["step"] for row in metrics(c, "eval/in_domain/loss")] == [10, 20, steps]
    assert [row["step"] for row in metrics(c, "eval/out_of_domain/ppl")] == [10, 20, steps]
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [s["step"] for s in samples] == [10, 20, steps] and set(samples[0]) >= {"prompt", "target", "generated"}
    assert samples[0]["target"].startswith("Main -> ")
    assert json.loads((out / "config.json").read_text())["train"]["learning_rate"] == 1e-2
    assert list((out / "runs").iterdir())


VARIANTS = {
    "lora": {"lora__dropout": 0.1, "train__grad_acc_steps": 2, "train__batch_size": 2},
    "full": {"method": "full"},
    "full in bfloat16": {"method": "full", "model__dtype": "bfloat16"},
    "checkpointing": {"train__gradient_checkpointing": True, "lora__dropout": 0.1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_is_uninterrupted(tmp_path, base, variant, monkeypatch):
    """A crash mid-epoch, after a checkpoint and some steps that are lost: the end is the same to the bit (row 11)."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = config(tmp_path / "a", base, train__save_steps=5, **VARIANTS[variant])
    assert train.main(whole) == 0
    broken = config(tmp_path / "b", base, train__save_steps=5, **VARIANTS[variant])
    with monkeypatch.context() as patch:
        crash_after(patch, 13)
        with pytest.raises(Crash):
            train.main(broken)
    assert len(metrics(broken)) == 12
    torch.manual_seed(12345)  # whatever state the new process starts in
    assert train.main(broken) == 0
    assert weights(broken) == weights(whole)
    drop = ("tokens_per_second",)
    rows = [[{k: v for k, v in row.items() if k not in drop} for row in metrics(c)] for c in (whole, broken)]
    assert rows[0] == rows[1]


def test_full_training_saves_a_model_of_its_dtype(tmp_path, base):
    c = config(tmp_path, base, method="full", model__dtype="bfloat16", train__max_steps=3, model__init="random")
    assert train.main(c) == 0
    tensors = safetensors.torch.load(weights(c))
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    state = safetensors.torch.load_file(Path(c.output_dir) / "checkpoint-final" / "training_state.safetensors")
    masters = {k.removeprefix("master."): v for k, v in state.items() if k.startswith("master.")}
    assert masters.keys() == tensors.keys()
    assert all(torch.equal(masters[k].bfloat16(), tensors[k]) for k in tensors)


def start(config_file: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), str(config_file), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def config_file(c: Config, path: Path) -> Path:
    """The configuration as a file that train.py reads."""
    lines = ["from minilora.config import *", "", "config = Config()"]
    for name, value in train_leaves(c).items():
        lines.append(f"config.{name} = {value!r}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def train_leaves(c: Config) -> dict:
    from minilora.running.settings import leaves

    return leaves(c)


def wait_for_step(c: Config, step: int, process: subprocess.Popen) -> None:
    file = Path(c.output_dir) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if file.is_file() and any(row["step"] >= step for row in metrics(c)):
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    raise AssertionError(f"no step {step} within two minutes")


def test_sigkill_and_sigterm_then_resume(tmp_path, base):
    """Real processes: one killed, its continuation terminated, and the end equal to a run left alone."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    settings = {"lora__dropout": 0.1, "train__save_steps": 4, "train__epochs": 60.0, "rows": 10, "train__batch_size": 2}
    whole, broken = (config(tmp_path / name, base, **settings) for name in "ab")
    assert train.main(whole) == 0
    file = config_file(broken, tmp_path / "run.py")

    killed = start(file)
    wait_for_step(broken, 30, killed)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(60) == -signal.SIGKILL

    terminated = start(file)
    wait_for_step(broken, metrics(broken)[-1]["step"] + 20, terminated)
    terminated.send_signal(signal.SIGTERM)
    _, errors = terminated.communicate(timeout=60)
    assert terminated.returncode == 128 + signal.SIGTERM, errors
    assert "resumed from" in errors and "the same command continues" in errors
    last = metrics(broken)[-1]["step"]
    assert (Path(broken.output_dir) / f"checkpoint-{last}").is_dir()

    assert train.main(broken) == 0
    assert weights(broken) == weights(whole)
    assert losses(broken) == losses(whole)


def test_a_finished_run_is_left_alone(tmp_path, base, capsys):
    c = config(tmp_path, base, train__max_steps=4)
    assert train.main(c) == 0
    before = contents(Path(c.output_dir))
    assert train.main(c) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert contents(Path(c.output_dir)) == before


def test_a_finished_run_can_go_on(tmp_path, base):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    longer, whole = config(tmp_path / "a", base, train__max_steps=4), config(tmp_path / "b", base, train__max_steps=9)
    assert train.main(longer) == 0
    longer.train.max_steps = 9
    assert train.main(longer) == 0 and train.main(whole) == 0
    assert weights(longer) == weights(whole)
    assert (Path(longer.output_dir) / "checkpoint-4" / "adapter_model.safetensors").is_file()


def test_two_runs_are_never_mixed(tmp_path, base):
    c = config(tmp_path, base, train__max_steps=4)
    assert train.main(c) == 0
    before = contents(Path(c.output_dir))
    c.train.max_steps, c.train.learning_rate = 6, 2e-2
    with pytest.raises(UserError, match=r"learning_rate: 0.01 -> 0.02"):
        train.main(c)
    c.train.learning_rate = 1e-2
    rows = Path(c.data.train_file).read_text(encoding="utf-8").splitlines(keepends=True)
    Path(c.data.train_file).write_text("".join(rows[:-1]), encoding="utf-8")
    with pytest.raises(UserError, match="training rows"):
        train.main(c)
    c.train.resume = "never"
    with pytest.raises(UserError, match=r"resume=never.*checkpoint-final"):
        train.main(c)
    assert contents(Path(c.output_dir)) == before
    c.train.resume = str(Path(c.output_dir) / "checkpoint-final")
    assert train.main(c) == 0 and metrics(c)[-1]["step"] == 6, "on purpose it goes on"


def test_a_refused_continuation_changes_nothing(tmp_path, base):
    """Explicitly continuing with what cannot work is refused before the directory is touched."""
    c = config(tmp_path, base, train__max_steps=2)
    assert train.main(c) == 0
    before = contents(Path(c.output_dir))
    c.train.max_steps, c.lora.rank, c.train.resume = 4, 8, str(Path(c.output_dir) / "checkpoint-final")
    with pytest.raises(UserError, match="shape"):
        train.main(c)
    assert contents(Path(c.output_dir)) == before


def test_continuing_another_runs_checkpoint_only_reads_it(tmp_path, base):
    (tmp_path / "b").mkdir()
    first = config(tmp_path, base, train__max_steps=2)
    assert train.main(first) == 0
    before = contents(Path(first.output_dir))
    second = config(tmp_path / "b", base, train__max_steps=4, train__resume=str(Path(first.output_dir) / "checkpoint-final"))
    assert train.main(second) == 0 and [row["step"] for row in metrics(second)] == [3, 4]
    assert contents(Path(first.output_dir)) == before


def test_going_back_in_a_directory_with_later_checkpoints_is_refused(tmp_path, base):
    """Two branches in one directory would prune and resume each other's checkpoints."""
    c = config(tmp_path, base, train__max_steps=6, train__save_steps=2)
    assert train.main(c) == 0
    c.train.resume = str(Path(c.output_dir) / "checkpoint-2")
    with pytest.raises(UserError, match="holds the later checkpoint-final"):
        train.main(c)


def test_a_changed_step_size_is_refused(tmp_path, base, monkeypatch):
    """An epoch's steps begin elsewhere with another number of documents per step, e.g. on more processes."""
    c = config(tmp_path, base, train__save_steps=2)
    with monkeypatch.context() as patch:
        crash_after(patch, 5)
        with pytest.raises(Crash):
            train.main(c)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="documents per optimizer step: 4 -> 8"):
        train.main(c)
    monkeypatch.setenv("WORLD_SIZE", "1")
    c.train.max_steps = 3
    with pytest.raises(UserError, match="already past the 3 steps"):
        train.main(c)


def test_an_output_directory_that_cannot_be_is_refused(tmp_path, base):
    (tmp_path / "file").write_text("")
    for preview in (0, 1):
        c = config(tmp_path, base, output_dir=str(tmp_path / "file" / "out"), preview=preview)
        with pytest.raises(UserError, match="cannot be made"):
            train.main(c)


def test_a_torn_checkpoint_is_passed_over(tmp_path, base, monkeypatch, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole, broken = (config(tmp_path / name, base, train__save_steps=3) for name in "ab")
    assert train.main(whole) == 0
    with monkeypatch.context() as patch:
        crash_after(patch, 8)
        with pytest.raises(Crash):
            train.main(broken)
    torn = Path(broken.output_dir) / "checkpoint-6" / "adapter_model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-10])
    capsys.readouterr()
    assert train.main(broken) == 0
    assert "checkpoint-3 at step 3" in capsys.readouterr().err
    assert weights(broken) == weights(whole)


def test_save_total_limit(tmp_path, base):
    c = config(tmp_path, base, train__save_steps=4, train__save_total_limit=2)
    assert train.main(c) == 0
    assert sorted(p.name for p in Path(c.output_dir).glob("checkpoint-*")) == [
        "checkpoint-16",
        "checkpoint-20",
        "checkpoint-final",
    ]


def test_accumulation_does_not_change_numbers(tmp_path, base):
    """8 x 1 = 1 x 8 = 2 x 4, with labels dropped and the last step partial (rows 5 and 26)."""
    runs = []
    for batch, accumulation in ((8, 1), (1, 8), (2, 4)):
        directory = tmp_path / f"{batch}x{accumulation}"
        directory.mkdir()
        c = config(
            directory, base, rows=29, train__batch_size=batch, train__grad_acc_steps=accumulation, train__max_grad_norm=0.0
        )
        assert train.main(c) == 0
        runs.append([(row["step"], row["loss"], row["grad_norm"]) for row in metrics(c)])
    for other in runs[1:]:
        assert [r[0] for r in other] == [r[0] for r in runs[0]]
        assert [r[1] for r in other] == pytest.approx([r[1] for r in runs[0]], abs=1e-5)
        assert [r[2] for r in other] == pytest.approx([r[2] for r in runs[0]], rel=1e-4)


def test_a_partial_accumulation_window_is_flushed(tmp_path, base):
    """7 micro-batches at 4 a step are 2 steps an epoch (row 26)."""
    c = config(tmp_path, base, rows=14, train__batch_size=2, train__grad_acc_steps=4, train__epochs=1.0)
    assert train.main(c) == 0
    assert [row["step"] for row in metrics(c)] == [1, 2]


def test_evaluation_does_not_depend_on_batch_size(tmp_path, base):
    values = []
    for size in (1, 8):
        (tmp_path / str(size)).mkdir()
        c = config(tmp_path / str(size), base, eval__batch_size=size, train__max_steps=3)
        assert train.main(c) == 0
        values.append([metrics(c, f"eval/{name}/loss")[-1][f"eval/{name}/loss"] for name in ("in_domain", "out_of_domain")])
    assert values[0] == pytest.approx(values[1], abs=1e-6)


def test_order_and_draws_differ_between_epochs_not_between_runs(tmp_path, base):
    """The losses of a frozen run show which rows and labels each step saw (row 27)."""
    runs = []
    for name in "ab":
        (tmp_path / name).mkdir()
        c = config(tmp_path / name, base, train__learning_rate=1e-30, train__epochs=2.0, rows=16)
        random.seed(name)
        torch.manual_seed(hash(name) % 1000)
        assert train.main(c) == 0
        runs.append(losses(c))
    assert runs[0] == runs[1]
    assert runs[0][:4] != runs[0][4:]
    (tmp_path / "c").mkdir()
    other = config(tmp_path / "c", base, train__learning_rate=1e-30, train__epochs=2.0, rows=16, seed=1)
    assert train.main(other) == 0 and losses(other) != runs[0]


def test_a_nan_stops_the_run_and_is_never_saved(tmp_path, base, monkeypatch):
    c = config(tmp_path, base, train__save_steps=2, train__logging_steps=3)
    poison_loss(monkeypatch, 6)
    with pytest.raises(RunError, match=r"loss nan.*by step 6.*checkpoint-4"):
        train.main(c)
    saved = list(Path(c.output_dir).glob("checkpoint-*/adapter_model.safetensors"))
    assert len(saved) == 2
    assert all(t.isfinite().all() for file in saved for t in safetensors.torch.load_file(file).values())


def test_preview_shows_and_writes_the_masks(tmp_path, base, capsys):
    c = config(tmp_path, base, preview=3)
    assert train.main(c) == 0
    rows = [json.loads(line) for line in (Path(c.output_dir) / "preview.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2] and list(Path(c.output_dir).iterdir()) == [
        Path(c.output_dir, "preview.jsonl")
    ]
    for row in rows:
        assert set(row) == {"index", "input_ids", "labels", "train_labels", "text"}
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["train_labels"])
        assert all(
            t in (e, -100) and e in (i, -100)
            for i, e, t in zip(row["input_ids"], row["labels"], row["train_labels"], strict=True)
        )
        assert row["text"].startswith("<s>[INST] Title: Topic")
    shown = capsys.readouterr().out
    assert "⟦Main ->" in shown and "\x1b[" not in shown, "plain where there is no terminal"


@pytest.mark.parametrize("change, message", [
    ({"model__name": "no/such/dir"}, "no such directory"),
    ({"data__train_file": "missing.jsonl"}, r"data.train_file.*missing.jsonl"),
    ({"lora__target_modules": ("q_proj", "v_pro")}, "v_pro.*did you mean 'v_proj'"),
    ({"data__chat_template": "missing.jinja"}, "data.chat_template"),
    ({"train__resume": "missing/checkpoint-3"}, "missing/checkpoint-3 does not exist"),
])  # fmt: skip
def test_errors_come_before_anything_is_written(tmp_path, base, change, message):
    c = config(tmp_path, base, **change)
    with pytest.raises(UserError, match=message):
        train.main(c)
    assert not Path(c.output_dir).exists() or not list(Path(c.output_dir).glob("*.jsonl"))


def test_two_processes_give_the_numbers_of_one(tmp_path, base):
    """torchrun with two ranks and half the batch each: the same losses, norms and evaluations as one process."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = config(tmp_path / "one", base, train__epochs=2.0)
    two = config(tmp_path / "two", base, train__epochs=2.0, train__batch_size=2)
    assert train.main(one) == 0
    file = config_file(two, tmp_path / "two.py")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        str(ROOT / "train.py"),
        str(file),
    ]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert run.returncode == 0, run.stderr
    for key in ("loss", "grad_norm", "eval/in_domain/loss", "eval/out_of_domain/loss"):
        values = [[row[key] for row in metrics(c, key)] for c in (one, two)]
        assert values[1] == pytest.approx(values[0], abs=1e-4 if key == "grad_norm" else 1e-5)
    assert [row["tokens"] for row in metrics(one)] == [row["tokens"] for row in metrics(two)]


def test_one_process_needs_no_group():
    assert dist.world_size() == 1 and dist.rank() == 0
    assert dist.all_reduce_sum(torch.ones(2)).tolist() == [1, 1]


def interrupted(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Ctrl-C comes while train's function `name` runs."""
    real = getattr(train, name)

    def during(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(train, name, during)


def test_ctrl_c_in_the_last_step_costs_no_evaluation(tmp_path, base, monkeypatch):
    c = config(tmp_path, base, train__max_steps=1)
    interrupted(monkeypatch, "finish_gradients")
    assert train.main(c) == 0
    assert [row["step"] for row in metrics(c, "eval/in_domain/loss")] == [1]


def test_ctrl_c_in_the_evaluation_before_training(tmp_path, base, monkeypatch):
    c = config(tmp_path, base, train__max_steps=4, eval__eval_on_start=True)
    interrupted(monkeypatch, "evaluate")
    assert train.main(c) == 130
    assert [row["step"] for row in metrics(c, "eval/in_domain/loss")] == [0]
    monkeypatch.undo()
    assert (Path(c.output_dir) / "checkpoint-1").is_dir() and train.main(c) == 0
    assert [row["step"] for row in metrics(c, "eval/in_domain/loss")] == [0, 4]
