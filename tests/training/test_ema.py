"""The moving average of the weights: the class alone, and in whole runs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import train
from helpers import tiny_runs
from helpers.averaged_runs import (
    DECAY,
    KINDS,
    STEPS,
    assert_weights,
    averages,
    final,
    loss_by_hand,
    run,
    weights_file,
)
from helpers.tiny_runs import losses, metrics
from minilora.checkpoint.peft import adapter_parameters
from minilora.config import Config
from minilora.errors import UserError
from minilora.training.ema import EMA


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.base_model(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The weights that training starts with, and those after each step, by their saved names."""
    weights: list[dict[str, Tensor]] = []
    real = train.set_up

    def recording_set_up(config: Config, inputs: train.Inputs) -> train.TrainingRun:
        training_run = real(config, inputs)
        named = training_run.parameters
        if training_run.loaded.lora is not None:
            named = adapter_parameters(training_run.loaded.model)

        def record(*_: object) -> None:
            weights.append({name: p.detach().clone() for name, p in named.items()})

        training_run.optimizer.register_step_post_hook(record)
        record()
        return training_run

    monkeypatch.setattr(train, "set_up", recording_set_up)
    return weights


# ---- the class


def test_applied_exchanges_weights_and_average():
    parameters = {"w": nn.Parameter(torch.zeros(3))}
    ema = EMA(parameters, decay=0.5)
    parameters["w"].data.fill_(1.0)
    ema.update(step=0)  # d = 1 / 10
    memory = parameters["w"].data_ptr()
    with ema.applied():
        assert torch.allclose(parameters["w"], torch.full((3,), 0.9))
        assert torch.equal(ema.shadow["w"], torch.ones(3))
    assert torch.equal(parameters["w"], torch.ones(3))
    assert parameters["w"].data_ptr() == memory


def test_applied_puts_the_weights_back_after_an_error():
    parameters = {"w": nn.Parameter(torch.zeros(3))}
    ema = EMA(parameters, decay=0.5)
    parameters["w"].data.fill_(1.0)
    with pytest.raises(KeyError), ema.applied():
        raise KeyError
    assert torch.equal(parameters["w"], torch.ones(3))


@pytest.mark.parametrize(("decay", "wanted"), [(0.5, False), (None, True)])
def test_applied_does_nothing_if_unwanted_or_without_a_decay(decay: float | None, wanted: bool):
    parameters = {"w": nn.Parameter(torch.zeros(3))}
    ema = EMA(parameters, decay)
    parameters["w"].data.fill_(1.0)
    ema.update(step=0)
    with ema.applied(wanted):
        assert torch.equal(parameters["w"], torch.ones(3))
    assert bool(ema.shadow) == (decay is not None)


# ---- what is saved and evaluated


@pytest.mark.parametrize(
    ("kind", "decay"), [*((kind, DECAY) for kind in KINDS), ("lora", 0.0), ("lora", 0.9999)]
)
def test_saved_weights_are_the_average(
    kind: str, decay: float, home: Path, base: Path, recorded: list
):
    name = f"saved {kind} {decay}"
    config = run(home, base, name, train__ema_decay=decay, train__save_steps=5, **KINDS[kind])
    assert len(recorded) == STEPS + 1
    expected = averages(recorded, decay)

    for step in (5, 10, 15, 20, STEPS):
        checkpoint = Path(config.output_dir) / f"checkpoint-{step}"
        if step == STEPS:
            checkpoint = final(config)
        is_rounded = kind == "full bfloat16"
        assert_weights(checkpoint, expected[step], 1 / 256 if is_rounded else 2e-6)
        if is_rounded:
            assert_masters(checkpoint, expected[step], recorded[step])

    gaps = [(expected[-1][name] - weight).abs().max() for name, weight in recorded[-1].items()]
    if decay == 0:
        assert max(gaps) == 0
    else:
        assert max(gaps) > 1e-3, "the average differs from the weights, or this would show nothing"


def assert_masters(
    checkpoint: Path, average: dict[str, Tensor], weights: dict[str, Tensor]
) -> None:
    """Assert that the fp32 average and the weights that training goes on with are saved too."""
    state = load_file(checkpoint / "training_state.safetensors")
    for name, tensor in average.items():
        master = state[f"master.{name}"].double()
        torch.testing.assert_close(master, tensor, rtol=2e-6, atol=2e-6)
        assert torch.equal(state[f"raw.{name}"], weights[name])


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_evaluation_is_of_what_is_saved(kind: str, home: Path, base: Path):
    config = run(home, base, f"evaluated {kind}", eval__eval_steps=7, **KINDS[kind])
    files = {"in_domain": config.data.train_file, "out_of_domain": config.data.eval_file}
    for step, name in ((7, "checkpoint-7"), (14, "checkpoint-14"), (STEPS, "checkpoint-final")):
        checkpoint = Path(config.output_dir) / name
        for domain, file in files.items():
            key = f"eval/{domain}/loss"
            (logged,) = [row[key] for row in metrics(config, key) if row["step"] == step]
            assert logged == pytest.approx(loss_by_hand(checkpoint, config, file), rel=1e-5)


# ---- training goes on with the weights themselves


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same_with_and_without_average(kind: str, home: Path, base: Path):
    """The model holds the average in the evaluations and checkpoints between the steps."""
    often = {"eval__eval_steps": 5, "train__save_steps": 7, **KINDS[kind]}
    averaged = run(home, base, f"with {kind}", **often)
    plain = run(home, base, f"without {kind}", train__ema_decay=None, **often)

    for key in ("loss", "grad_norm", "lr"):
        rows, plain_rows = metrics(averaged), metrics(plain)
        assert [row[key] for row in rows] == [row[key] for row in plain_rows]
    key = "eval/in_domain/loss"
    assert metrics(averaged, key)[-1] != metrics(plain, key)[-1]

    state = load_file(final(averaged) / "training_state.safetensors")
    plain_state = load_file(final(plain) / "training_state.safetensors")
    assert {name for name in state if not name.startswith("raw.")} == plain_state.keys()
    for name, tensor in plain_state.items():
        if not name.startswith("master."):
            assert torch.equal(state[name], tensor), name


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """Assert that weights and training state are the same to the bit."""
    assert weights_file(one).read_bytes() == weights_file(other).read_bytes()
    states = [load_file(path / "training_state.safetensors") for path in (one, other)]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_run_in_parts_is_the_same(kind: str, home: Path, base: Path):
    whole = run(home, base, f"whole {kind}", **KINDS[kind])
    for until in (5, 13, STEPS):
        parts = run(home, base, f"parts {kind}", train__max_steps=until, **KINDS[kind])
    assert_same_checkpoint(final(whole), final(parts))
    assert losses(whole) == losses(parts)


def test_switched_off_training_goes_on_with_the_weights(
    home: Path, base: Path, capsys: pytest.CaptureFixture
):
    plain = run(home, base, "never on", train__ema_decay=None)
    checkpoint = final(run(home, base, "off", train__max_steps=6))
    with pytest.raises(UserError, match=r"train\.ema_decay: 0\.7 -> None"):
        run(home, base, "off", train__ema_decay=None)

    off = run(home, base, "off", train__ema_decay=None, train__resume=str(checkpoint))
    assert "train.ema_decay: 0.7 -> None" in capsys.readouterr().err
    assert_same_checkpoint(final(off), final(plain))
    assert losses(off) == losses(plain)


def test_switched_on_the_average_starts_from_the_weights(
    home: Path, base: Path, recorded: list, capsys: pytest.CaptureFixture
):
    checkpoint = final(run(home, base, "on", train__ema_decay=None, train__max_steps=6))
    recorded.clear()
    config = run(home, base, "on", train__resume=str(checkpoint))
    assert "train.ema_decay: None -> 0.7" in capsys.readouterr().err
    assert len(recorded) == STEPS - 6 + 1
    assert_weights(final(config), averages(recorded, DECAY, first_step=6)[-1])


def test_another_decay_keeps_the_average_so_far(home: Path, base: Path, recorded: list):
    checkpoint = final(run(home, base, "changed", train__max_steps=6))
    average = averages(recorded, DECAY)[-1]
    recorded.clear()
    config = run(home, base, "changed", train__ema_decay=0.2, train__resume=str(checkpoint))
    expected = averages([average, *recorded[1:]], 0.2, first_step=6)[-1]
    assert_weights(final(config), expected)
