"""What resuming needs beside the weights, saved and restored."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from minilora.checkpoint.training_state import (
    TENSORS_FILE,
    load_training_tensors,
    training_tensors,
)
from minilora.errors import UserError


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 4)
        self.second = nn.Linear(4, 1)
        self.unused = nn.Linear(2, 2)


def take_steps(model: Model, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Take optimizer steps on data that depend on the step alone."""
    for step in steps:
        x = torch.randn(16, 5, generator=torch.Generator().manual_seed(step))
        model.second(model.first(x).tanh()).square().mean().backward()
        # as train.py gives gradients to parameters without one
        model.unused.weight.grad = torch.zeros(2, 2)
        model.unused.bias.grad = torch.zeros(2)
        optimizer.step()
        optimizer.zero_grad()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, fused=True)


@pytest.mark.parametrize("keep_masters", [True, False])
def test_optimizer_continues_where_it_was(keep_masters: bool, tmp_path: Path):
    whole, first, second = Model(), Model(), Model()
    take_steps(whole, adamw(whole), range(6))
    optimizer = adamw(first)
    take_steps(first, optimizer, range(3))
    tensors = training_tensors(optimizer, dict(first.named_parameters()), keep_masters)
    assert any(name.startswith("master.") for name in tensors) == keep_masters
    save_file(tensors, tmp_path / TENSORS_FILE)

    if not keep_masters:  # then the weights come from the adapter's own file
        at_three = Model()
        take_steps(at_three, adamw(at_three), range(3))
        second.load_state_dict(at_three.state_dict())
    optimizer = adamw(second)
    load_training_tensors(tmp_path, optimizer, dict(second.named_parameters()))
    assert {int(state["step"]) for state in optimizer.state.values()} == {3}
    take_steps(second, optimizer, range(3, 6))
    for name, weight in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], weight), name


def test_shadow_and_raw_weights_change_places(tmp_path: Path):
    """A checkpoint has the average as its weights, and the trained weights beside it."""
    model = Model()
    optimizer = adamw(model)
    take_steps(model, optimizer, range(1))
    parameters = dict(model.named_parameters())
    raw = {name: p.detach() + 1 for name, p in parameters.items()}
    save_file(training_tensors(optimizer, parameters, False, raw), tmp_path / TENSORS_FILE)

    average = {name: p.detach().clone() for name, p in parameters.items()}
    shadow = {name: torch.zeros_like(p) for name, p in parameters.items()}
    load_training_tensors(tmp_path, adamw(model), parameters, shadow)
    for name, p in parameters.items():
        assert torch.equal(shadow[name], average[name])
        assert torch.equal(p, raw[name])


def test_state_that_is_missing_is_named(tmp_path: Path):
    model = Model()
    optimizer = adamw(model)
    take_steps(model, optimizer, range(1))
    tensors = training_tensors(optimizer, dict(model.named_parameters()), False)
    missing = [name for name in tensors if name.startswith("optimizer.second.weight")]
    for name in missing:
        del tensors[name]
    save_file(tensors, tmp_path / TENSORS_FILE)
    message = rf"{re.escape(str(tmp_path / TENSORS_FILE))}.*second\.weight"
    with pytest.raises(UserError, match=message):
        load_training_tensors(tmp_path, adamw(model), dict(model.named_parameters()))
