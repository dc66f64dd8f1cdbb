"""The moving average of the weights against a loop in float64, and what depends on epochs: checkpoints, evaluations, warmup."""

import json
import math
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainingArguments, get_scheduler

import minilora
import ranks
import tiny_runs
import train
from minilora.config import Config, UserError
from minilora.lora import saved_names
from minilora.running.cache import load_documents
from minilora.tokenizer import Tokenizer
from tiny_runs import losses, metrics

DECAY = 0.7  # from step 13 on less than (1 + t) / (10 + t)
STEPS = 21
FULL = {"method": "full", "train__learning_rate": 1e-3}
BF16 = {**FULL, "model__dtype": "bfloat16"}
KINDS = {"lora": {}, "full": FULL, "full bfloat16": BF16}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.base_model(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def setting(home: Path, base: Path, name: str, **changes) -> Config:
    """A run of three epochs of seven steps; the schedule does not look at the end."""
    (home / name).mkdir(exist_ok=True)
    return tiny_runs.config(home / name, base, **{"train__ema_decay": DECAY, "eval__num_generate_samples": 0, **changes})


def run(home: Path, base: Path, name: str, **changes) -> Config:
    c = setting(home, base, name, **changes)
    assert train.main(c) == 0
    return c


def final(c: Config) -> Path:
    return Path(c.output_dir) / "checkpoint-final"


def saved(directory: Path) -> dict[str, Tensor]:
    (file,) = [f for f in directory.glob("*model.safetensors") if f.is_file()]
    return load_file(file)


def same_bytes(a: Path, b: Path) -> bool:
    """Weights, and what resuming needs."""
    files = [next(d.glob("*model.safetensors")) for d in (a, b)]
    states = [load_file(d / "training_state.safetensors") for d in (a, b)]
    equal = states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    return equal and files[0].read_bytes() == files[1].read_bytes()


def averages(weights: list[dict[str, Tensor]], decay: float, first: int = 0) -> list[dict[str, Tensor]]:
    """The average after each step, from the weights before the first and after each; first: the number of that step."""
    average = {name: w.double() for name, w in weights[0].items()}
    result = [average]
    for t, now in enumerate(weights[1:], start=first):
        d = min(decay, (1 + t) / (10 + t))
        average = {name: d * average[name] + (1 - d) * w.double() for name, w in now.items()}
        result.append(average)
    return result


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Weights under the names they are saved by: those that training starts with, and after each step of the optimizer."""
    weights: list[dict[str, Tensor]] = []
    real = train.adamw

    def adamw(built, parameters, *rest):
        optimizer = real(built, parameters, *rest)
        named = parameters if built.lora is None else saved_names(built.model)

        def note(*_) -> None:
            weights.append({name: p.detach().clone() for name, p in named.items()})

        optimizer.register_step_post_hook(note)
        note()
        return optimizer

    monkeypatch.setattr(train, "adamw", adamw)
    return weights


def assert_average(checkpoint: Path, expected: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    found = saved(checkpoint)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name].double(), tensor, rtol=tolerance, atol=tolerance), name


# ---- the average


@pytest.mark.parametrize(("kind", "decay"), [*((kind, DECAY) for kind in KINDS), ("lora", 0.0), ("lora", 0.9999)])
def test_what_is_saved_is_the_average(kind: str, decay: float, home: Path, base: Path, recorded: list):
    c = run(home, base, f"saved {kind} {decay}", train__ema_decay=decay, train__save_steps=5, **KINDS[kind])
    assert len(recorded) == STEPS + 1
    expected = averages(recorded, decay)
    for step in (5, 10, 15, 20, STEPS):
        directory = final(c) if step == STEPS else Path(c.output_dir) / f"checkpoint-{step}"
        assert_average(directory, expected[step], 1 / 256 if kind == "full bfloat16" else 2e-6)
        state = load_file(directory / "training_state.safetensors")
        if kind == "full bfloat16":  # what is not rounded
            for name, tensor in expected[step].items():
                torch.testing.assert_close(state[f"master.{name}"].double(), tensor, rtol=2e-6, atol=2e-6)
                assert torch.equal(state[f"raw.{name}"], recorded[step][name])
    gap = max(float((expected[-1][name] - w).abs().max()) for name, w in recorded[-1].items())
    assert gap == 0 if decay == 0 else gap > 1e-3, "an average that differs from the weights"


def loss_by_hand(directory: Path, c: Config, file) -> float:
    """Mean loss of a file's documents under a saved model, document by document in float64."""
    model, tokenizer = minilora.load(str(directory))
    documents = load_documents(file, c.data, Tokenizer(tokenizer.directory, tokenizer.chat_template), "eval_file")
    total, count = 0.0, 0
    with torch.no_grad():
        for i in range(len(documents)):
            logits = model(torch.tensor(documents.ids(i), dtype=torch.int64))
            labels = torch.tensor(documents.labels(i))[1:]
            total += float(F.cross_entropy(logits[:-1].double(), labels, ignore_index=-100, reduction="sum"))
            count += int((labels != -100).sum())
    return total / count


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_is_evaluated_is_what_is_saved(kind: str, home: Path, base: Path):
    c = run(home, base, f"evaluated {kind}", eval__eval_steps=7, **KINDS[kind])
    for step, name in ((7, "checkpoint-7"), (14, "checkpoint-14"), (STEPS, "checkpoint-final")):
        for domain, file in (("in_domain", c.data.train_file), ("out_of_domain", c.data.eval_file)):
            key = f"eval/{domain}/loss"
            (logged,) = [row[key] for row in metrics(c, key) if row["step"] == step]
            assert logged == pytest.approx(loss_by_hand(Path(c.output_dir) / name, c, file), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_training_itself_does_not_see_it(kind: str, home: Path, base: Path):
    """Evaluations and checkpoints come in between; the model holds the average then."""
    often = {"eval__eval_steps": 2, "train__save_steps": 3, **KINDS[kind]}
    averaged = run(home, base, f"with {kind}", **often)
    plain = run(home, base, f"without {kind}", train__ema_decay=None, **often)
    rows, bare = metrics(averaged, "loss"), metrics(plain, "loss")
    for key in ("loss", "grad_norm", "lr"):
        assert [row[key] for row in rows] == [row[key] for row in bare]
    assert metrics(averaged, "eval/in_domain/loss")[-1] != metrics(plain, "eval/in_domain/loss")[-1]
    raw = load_file(final(averaged) / "training_state.safetensors")
    state = load_file(final(plain) / "training_state.safetensors")
    assert {k for k in raw if not k.startswith("raw.")} == state.keys()
    assert all(torch.equal(raw[k], v) for k, v in state.items() if not k.startswith("master."))


@pytest.mark.parametrize("kind", KINDS)
def test_in_parts_it_is_the_same(kind: str, home: Path, base: Path):
    whole = run(home, base, f"whole {kind}", **KINDS[kind])
    for until in (4, 5, 13, STEPS):
        parts = run(home, base, f"parts {kind}", train__max_steps=until, **KINDS[kind])
    assert same_bytes(final(whole), final(parts)) and losses(whole) == losses(parts)


def test_switched_off_it_goes_on_with_the_weights(home: Path, base: Path, capsys: pytest.CaptureFixture):
    plain = run(home, base, "never on", train__ema_decay=None)
    run(home, base, "off", train__max_steps=6)
    with pytest.raises(UserError, match=r"train\.ema_decay: 0\.7 -> None"):
        run(home, base, "off", train__ema_decay=None)
    off = run(home, base, "off", train__ema_decay=None, train__resume=str(home / "off" / "out" / "checkpoint-final"))
    assert "train.ema_decay: 0.7 -> None" in capsys.readouterr().err
    assert same_bytes(final(off), final(plain)) and losses(off) == losses(plain)


def test_switched_on_it_starts_from_the_weights_there(home: Path, base: Path, recorded: list, capsys: pytest.CaptureFixture):
    run(home, base, "on", train__ema_decay=None, train__max_steps=6)
    recorded.clear()
    c = run(home, base, "on", train__resume=str(home / "on" / "out" / "checkpoint-final"))
    assert "train.ema_decay: None -> 0.7" in capsys.readouterr().err
    assert len(recorded) == STEPS - 6 + 1
    assert_average(final(c), averages(recorded, DECAY, first=6)[-1])


def test_another_decay_keeps_the_average_so_far(home: Path, base: Path, recorded: list):
    run(home, base, "changed", train__max_steps=6)
    average = averages(recorded, DECAY)[-1]
    recorded.clear()
    c = run(home, base, "changed", train__ema_decay=0.2, train__resume=str(home / "changed" / "out" / "checkpoint-final"))
    assert_average(final(c), averages([average, *recorded[1:]], 0.2, first=6)[-1])


# ---- two processes

SHARDED = {"train__batch_size": 2, "parallel__strategy": "fsdp"}
WEIGHTED = {"train__epochs": 2.0, "train__save_steps": "epoch", "eval__eval_steps": "epoch", "eval__eval_on_start": True}


def weighted(home: Path, base: Path, name: str, **changes) -> Config:
    """Two files of ten rows, 15 and 5 of them an epoch."""
    c = setting(home, base, name, train__ema_decay=None, data__train_weights=(1.5, 0.5), **WEIGHTED, **changes)
    second = tiny_runs.write_paths(home / name / "second.jsonl", 10, seed=5)
    c.data.train_file = (str(tiny_runs.write_paths(home / name / "first.jsonl", 10, seed=4)), str(second))
    return c


@pytest.fixture(scope="module")
def on_two(home: Path, base: Path) -> None:
    jobs: dict[str, ranks.Job] = {}
    for kind, changes in KINDS.items():
        jobs[f"whole {kind}"] = ranks.fit, (setting(home, base, f"two {kind}", eval__eval_steps=7, **SHARDED, **changes),)
        for until in (5, STEPS):
            part = setting(home, base, f"two parts {kind}", train__max_steps=until, eval__eval_steps=7, **SHARDED, **changes)
            jobs[f"parts {kind} {until}"] = ranks.fit, (part,)
    jobs["begun"] = ranks.fit, (setting(home, base, "begun on two", train__max_steps=5, **SHARDED),)
    ddp = {"parallel__strategy": "ddp", "train__batch_size": 1, "train__grad_acc_steps": 3}
    jobs["weighted"] = ranks.fit, (weighted(home, base, "weighted two", **ddp),)
    results = ranks.launch(home / "jobs", 2, jobs)
    for job in jobs:
        ranks.outcome(results, job)


@pytest.mark.parametrize("kind", KINDS)
def test_on_two_processes(kind: str, on_two, home: Path, base: Path):
    alone = run(home, base, f"one {kind}", eval__eval_steps=7, **KINDS[kind])
    two, parts = (setting(home, base, f"{name} {kind}") for name in ("two", "two parts"))
    tolerance = {"lora": 2e-4, "full": 2e-3, "full bfloat16": 4e-2}[kind]  # Adam turns rounding of small gradients into steps
    assert_average(final(two), {k: v.double() for k, v in saved(final(alone)).items()}, tolerance)
    for key in ("eval/in_domain/loss", "eval/out_of_domain/loss"):
        values = [[row[key] for row in metrics(c, key)] for c in (alone, two)]
        assert values[1] == pytest.approx(values[0], rel=tolerance)
    assert losses(two) == losses(parts)
    (a,), (b,) = (list(final(c).glob("*model.safetensors")) for c in (two, parts))
    assert a.read_bytes() == b.read_bytes(), "in parts it is the same to the bit"


def test_begun_on_two_processes_and_continued_on_one(on_two, home: Path, base: Path):
    c, whole = run(home, base, "begun on two"), run(home, base, "begun on one")
    assert_average(final(c), {k: v.double() for k, v in saved(final(whole)).items()}, 2e-4)


# ---- epochs


def events(c: Config) -> list[dict]:
    return [json.loads(line) for line in (Path(c.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_weighted_files_by_epoch_on_one_process_and_on_two(on_two, home: Path, base: Path):
    """20 documents at 6 a step: four steps an epoch, the last with two documents."""
    one, two = weighted(home, base, "weighted one", train__batch_size=6), weighted(home, base, "weighted two")
    assert train.main(one) == 0
    for c in (one, two):
        assert [row["step"] for row in metrics(c, "loss")] == [*range(1, 9)]
        assert [row["step"] for row in metrics(c, "eval/in_domain/loss")] == [0, 4, 8]
        saves = [(row["step"], row["epoch"], row["checkpoint"]) for row in metrics(c, "checkpoint")]
        assert saves == [(4, 1.0, "checkpoint-4"), (8, 2.0, "checkpoint-final")]
    for key in ("loss", "grad_norm", "eval/in_domain/loss", "eval/out_of_domain/loss"):
        a, b = ([row[key] for row in metrics(c, key)] for c in (one, two))
        assert a == pytest.approx(b, rel=2e-4)
    assert [row["tokens"] for row in metrics(one, "tokens")] == [row["tokens"] for row in metrics(two, "tokens")]
    documents = load_documents(one.data.train_file, one.data, Tokenizer(base, None), "train_file")
    assert len(documents) == 20


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
def test_at_the_end_of_each_epoch(changes: dict, steps: list[int], base: Path, tmp_path: Path):
    c = run(tmp_path, base, "x", eval__eval_steps="epoch", train__save_steps="epoch", train__ema_decay=None, **changes)
    assert [row["step"] for row in metrics(c, "checkpoint")] == steps
    assert [row["step"] for row in metrics(c, "eval/in_domain/loss")] == steps
    names = {p.name for p in Path(c.output_dir).glob("checkpoint-*")}
    assert names == {*(f"checkpoint-{step}" for step in steps[:-1]), "checkpoint-final"}


def test_checkpoints_follow_evaluations_unless_told(base: Path, tmp_path: Path):
    c = run(tmp_path, base, "x", eval__eval_steps="epoch", train__ema_decay=None)
    assert [row["step"] for row in metrics(c, "checkpoint")] == [7, 14, 21]
    c = run(tmp_path, base, "y", eval__eval_steps=10, train__save_steps="epoch", train__ema_decay=None)
    assert [row["step"] for row in metrics(c, "checkpoint")] == [7, 14, 21]
    assert [row["step"] for row in metrics(c, "eval/in_domain/loss")] == [10, 20, 21]


def test_an_evaluation_before_the_first_step(home: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    c = setting(tmp_path, base, "x", eval__eval_on_start=True, eval__num_generate_samples=2, train__max_steps=4)
    real, seconds = train.loss_sums, []

    def slow(*arguments):
        time.sleep(0.4)
        seconds.append(0.4)
        return real(*arguments)

    monkeypatch.setattr(train, "loss_sums", slow)
    assert train.main(c) == 0
    rows = events(c)
    assert [set(row) for row in rows[:2]] == [
        {"step", "epoch", f"eval/{d}/loss", f"eval/{d}/ppl"} for d in ("in_domain", "out_of_domain")
    ]
    assert [(row["step"], row["epoch"]) for row in rows[:3]] == [(0, 0.0), (0, 0.0), (1, 1 / 7)]
    for domain, file in (("in_domain", c.data.train_file), ("out_of_domain", c.data.eval_file)):
        (logged,) = [row[f"eval/{domain}/loss"] for row in rows if row["step"] == 0 and f"eval/{domain}/loss" in row]
        assert logged == pytest.approx(loss_by_hand(base, c, file), rel=1e-5), "of the base, whose adapters are zero"
    samples = [json.loads(line) for line in (Path(c.output_dir) / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in samples] == [0, 0, 4, 4]
    tokens = [0, *(row["tokens"] for row in rows if "loss" in row)]
    for (a, b), row in zip(pairwise(tokens), metrics(c), strict=True):
        assert (b - a) / row["tokens_per_second"] < 0.4, "an evaluation's time is not a step's"
    plain = setting(tmp_path, base, "y", train__max_steps=4)
    assert train.main(plain) == 0
    assert losses(plain) == losses(c)
    run(tmp_path, base, "x", eval__eval_on_start=True, eval__num_generate_samples=2, train__max_steps=6)
    assert [row["step"] for row in metrics(c, "eval/in_domain/loss")] == [0, 4, 6], "a resumed run does not begin"


# ---- warmup


@pytest.mark.parametrize("scheduler", ["constant_with_warmup", "cosine", "linear"])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 1.0])
def test_warmup_as_a_share_of_all_steps(scheduler: str, ratio: float, home: Path, base: Path, tmp_path: Path):
    """transformers' own: how many steps it makes of a share, and its schedule."""
    c = setting(tmp_path, base, "x", train__lr_scheduler=scheduler, train__warmup_ratio=ratio, train__warmup_steps=77)
    arguments = TrainingArguments(output_dir=str(tmp_path), warmup_steps=ratio if ratio < 1 else STEPS, report_to=[])
    warmup = arguments.get_warmup_steps(STEPS)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = get_scheduler(scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=STEPS)
    expected = []
    for _ in range(STEPS):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    assert [train.lr_factor(step, STEPS, c.train) for step in range(STEPS)] == pytest.approx(expected, abs=1e-12)


def test_warmup_of_a_run(base: Path, tmp_path: Path):
    c = run(tmp_path, base, "x", train__warmup_ratio=0.2, train__lr_scheduler="linear", train__ema_decay=None)
    rates = [row["lr"] for row in metrics(c, "lr")]
    warmup = math.ceil(0.2 * STEPS)
    expected = np.interp(range(STEPS), [0, warmup, STEPS], [0, c.train.learning_rate, 0])
    assert rates == pytest.approx(expected.tolist())
