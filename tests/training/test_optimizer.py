"""AdamW's groups, the learning-rate schedules, and gradients between backward pass and step."""

import tomllib

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from torch import nn

from helpers.documents import ROOT
from minilora.build import LoadedModel
from minilora.config import TrainConfig
from minilora.training.metrics import StepMetrics
from minilora.training.optimizer import (
    finish_gradients,
    learning_rate_factor,
    make_optimizer,
    set_learning_rate,
    take_step,
    trainable_parameters,
)

CPU = torch.device("cpu")


def reference_rates(name: str, total: int, warmup: int, peak: float = 1.0) -> list[float]:
    """Return the learning rate of each step by transformers' schedule."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    scheduler = transformers.get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=total
    )
    return rates_of(optimizer, scheduler, total)


def rates_of(optimizer, scheduler, total: int) -> list[float]:
    """Return the learning rate of each step of a scheduler."""
    rates = []
    for _ in range(total):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


# ---- schedules


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_schedule_is_that_of_transformers(name: str, warmup: int):
    total, peak = 57, 3e-4
    settings = TrainConfig(lr_scheduler=name, warmup_steps=warmup, learning_rate=peak)
    rates = [peak * learning_rate_factor(step, total, settings) for step in range(total)]
    expected = reference_rates(name, total, warmup, peak)
    assert rates == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("name", ["constant_with_warmup", "cosine", "linear"])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 1.0])
def test_warmup_as_a_share_of_all_steps_is_that_of_transformers(name: str, ratio: float, tmp_path):
    total = 21
    settings = TrainConfig(lr_scheduler=name, warmup_ratio=ratio, warmup_steps=77)
    rates = [learning_rate_factor(step, total, settings) for step in range(total)]

    # transformers takes a value below 1 as a share, and others as a number of steps
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), warmup_steps=ratio if ratio < 1 else total, report_to=[]
    )
    warmup = arguments.get_warmup_steps(total)
    assert rates == pytest.approx(reference_rates(name, total, warmup), abs=1e-12)


def test_cosine_to_a_minimum_is_that_of_transformers():
    total, warmup = 60, 6
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = transformers.get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, warmup, total, min_lr_rate=0.1
    )
    settings = TrainConfig(lr_scheduler="cosine", warmup_ratio=0.1, min_lr_ratio=0.1)
    rates = [learning_rate_factor(step, total, settings) for step in range(total)]
    assert rates == pytest.approx(rates_of(optimizer, scheduler, total), abs=1e-9)


def test_linear_ends_at_its_minimum():
    settings = TrainConfig(lr_scheduler="linear", warmup_steps=0, min_lr_ratio=0.25)
    assert learning_rate_factor(60, 60, settings) == pytest.approx(0.25)


# ---- the optimizer


def make_parameters() -> dict[str, nn.Parameter]:
    return {"matrix": nn.Parameter(torch.ones(2, 3)), "bias": nn.Parameter(torch.ones(2))}


def test_only_matrices_are_decayed():
    parameters = make_parameters()
    optimizer = make_optimizer(parameters, TrainConfig(weight_decay=0.5, learning_rate=0.1))
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.allclose(parameters["matrix"], torch.full((2, 3), 0.95))
    assert torch.equal(parameters["bias"], torch.ones(2))


def test_set_learning_rate_reaches_all_groups():
    optimizer = make_optimizer(make_parameters(), TrainConfig(learning_rate=0.1))
    set_learning_rate(optimizer, 0.02)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.02]


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_a_step_that_overflowed_in_float16_changes_nothing(name: str):
    """The other steps are the same with and without it, to the bit."""
    with_overflow, without = make_parameters(), make_parameters()
    train = TrainConfig(optimizer=name, learning_rate=0.1)
    optimizer, plain = make_optimizer(with_overflow, train), make_optimizer(without, train)
    for norm in (1.0, float("inf"), 2.0, float("nan"), 3.0):
        is_finite = norm < float("inf")
        for p in with_overflow.values():
            p.grad = torch.full_like(p, norm)
        skipped = take_step(optimizer, torch.tensor(norm), torch.float16)
        assert bool(skipped) != is_finite
        if is_finite:
            for p in without.values():
                p.grad = torch.full_like(p, norm)
            plain.step()
    for key, p in with_overflow.items():
        assert torch.equal(p, without[key])
        state, expected = optimizer.state[p], plain.state[without[key]]
        assert state.keys() == expected.keys()
        for entry, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(expected[entry])), entry


def test_bitsandbytes_is_new_enough():
    """Before 0.50 its layers took the transposed weight where that is square, on a GPU."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [Requirement(text) for text in project["dependencies"]]
    (found,) = [each for each in requirements if each.name == "bitsandbytes"]
    assert "0.50.2" in found.specifier and "0.49.2" not in found.specifier


def test_no_step_is_skipped_in_bfloat16():
    parameters = make_parameters()
    optimizer = make_optimizer(parameters, TrainConfig(learning_rate=0.1))
    for p in parameters.values():
        p.grad = torch.full_like(p, float("nan"))
    assert take_step(optimizer, torch.tensor(float("nan")), torch.bfloat16) is None
    assert parameters["bias"].isnan().all()  # and the run ends, see test_metrics.py


# ---- gradients


@pytest.mark.parametrize("max_norm", [0.0, 1.0, 100.0])
def test_finish_gradients_divides_by_supervised_tokens_and_clips(max_norm: float):
    model = nn.Linear(3, 2)
    loaded = LoadedModel(model, torch.float32, torch.float32, None, 8)
    parameters = trainable_parameters(loaded)
    gradients = {name: torch.full_like(p, 6.0) for name, p in parameters.items()}
    for name, p in parameters.items():
        p.grad = gradients[name].clone()
    metrics = StepMetrics(CPU)
    metrics.add(torch.tensor(1.0), num_supervised=1, num_tokens=5)
    metrics.add(torch.tensor(1.0), num_supervised=2, num_tokens=5)

    norm = finish_gradients(loaded, parameters, metrics.end_step(), max_norm)
    expected = 2.0 * 8**0.5  # 8 parameters, 6 / 3 each
    assert float(norm) == pytest.approx(expected)
    scale = max_norm / expected if 0 < max_norm < expected else 1.0
    for p in parameters.values():
        assert torch.allclose(p.grad, torch.full_like(p, 2.0 * scale), rtol=1e-5)


def test_trainable_parameters_leave_out_frozen_ones():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    loaded = LoadedModel(model, torch.float32, torch.float32, None, 8)
    parameters = trainable_parameters(loaded)
    assert list(parameters) == ["weight"] and parameters["weight"] is model.weight
