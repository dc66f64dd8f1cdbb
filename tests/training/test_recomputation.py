"""gradient_checkpointing = "auto": how many blocks are recomputed, by the memory there is."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from helpers import tiny_runs
from helpers.tiny_models import ours, random_tokens, tiny
from minilora import distributed
from minilora.config import TrainConfig
from minilora.model.block_execution import block_forwards, prepare_blocks
from minilora.model.transformer import CausalLM
from minilora.training import recomputation
from minilora.training.recomputation import FREE_SHARE, AutoRecomputation

CPU = torch.device("cpu")
BLOCKS = 4
LENGTHS = [3, 30, 20, 10]
BATCH_SIZE = 2
MOST_TOKENS = 50  # of two documents
FIRST_TOKENS = 25
"""Tokens of the first micro-batch of these tests: half of the largest one."""
STEP_BYTES = 10**6
"""More than all blocks keep in these tests."""


@pytest.fixture(scope="module")
def hf_four_blocks() -> PreTrainedModel:
    return tiny("llama3", num_hidden_layers=BLOCKS)


def after_first_step(
    hf: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, setting: bool | int | str = "auto"
) -> tuple[CausalLM, AutoRecomputation]:
    """Take a step of a model; in it STEP_BYTES more are allocated than before and after it."""
    monkeypatch.setattr(recomputation, "allocated_memory", lambda device: 5000)
    monkeypatch.setattr(recomputation, "peak_memory", lambda device: 5000 + STEP_BYTES)
    train = TrainConfig(gradient_checkpointing=setting, batch_size=BATCH_SIZE)
    model = ours(hf).train()
    prepare_blocks(model, train)
    documents = SimpleNamespace(lengths=np.array([99, *LENGTHS]))
    data = SimpleNamespace(documents=documents, train_indices=np.arange(1, 5))
    auto = AutoRecomputation(model, train, SimpleNamespace(data=data), CPU)
    model(random_tokens(FIRST_TOKENS)).sum().backward()
    return model, auto


def recomputed(model: CausalLM) -> list[bool]:
    return [forward.is_recomputed for forward in block_forwards(model)]


def free(monkeypatch: pytest.MonkeyPatch, num_bytes: float) -> None:
    monkeypatch.setattr(distributed, "free_bytes", lambda device: num_bytes)


@pytest.mark.parametrize(
    ("blocks_that_fit", "expected"),
    [
        (0, [True] * 4),
        (0.9, [True] * 4),
        (1.1, [True, True, True, False]),
        (3.1, [True, False, False, False]),
        (100, [False] * 4),
        (-5, [True] * 4),
    ],
)
def test_as_few_blocks_are_recomputed_as_fit(
    hf_four_blocks, monkeypatch, capsys, blocks_that_fit: float, expected: list[bool]
):
    """Both what a block keeps and what a step takes are scaled to the largest micro-batch."""
    model, auto = after_first_step(hf_four_blocks, monkeypatch)
    assert recomputed(model) == [True, True, True, False]  # the last one is measured
    assert auto.kept.num_tokens == FIRST_TOKENS
    block_bytes = auto.kept.per_token * MOST_TOKENS
    step_bytes = STEP_BYTES * MOST_TOKENS / FIRST_TOKENS
    free(monkeypatch, (step_bytes + blocks_that_fit * block_bytes) / (1 - FREE_SHARE))
    auto.decide()
    assert recomputed(model) == expected
    line = f"auto: {sum(expected)} of 4 blocks are recomputed"
    assert line in capsys.readouterr().err

    free(monkeypatch, 0)
    auto.decide()  # later calls do nothing
    assert recomputed(model) == expected and capsys.readouterr().err == ""
    assert block_forwards(model)[-1].kept_bytes is None


def test_what_a_block_keeps_is_all_that_autograd_saves(hf_four_blocks, monkeypatch):
    """Counted here by hand, from the shapes of a block's operations; fp32."""
    _, auto = after_first_step(hf_four_blocks, monkeypatch)
    hidden, inner, heads, head_size = 32, 48, 4, 8
    attention = 3 * heads * head_size  # q, k and v as SDPA keeps them, all with 4 heads
    at_least = 4 * (2 * hidden + attention + heads * head_size + 3 * inner)
    assert at_least <= auto.kept.per_token <= 2.5 * at_least


def test_processes_agree_on_the_most_careful_choice(hf_four_blocks, monkeypatch):
    model, auto = after_first_step(hf_four_blocks, monkeypatch)
    free(monkeypatch, 1e9)
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: [mine, [1]])
    auto.decide()
    assert recomputed(model) == [True, True, True, False]


@pytest.mark.parametrize("setting", [True, False, 2])
def test_other_settings_are_left_alone(hf_four_blocks, monkeypatch, capsys, setting):
    model, auto = after_first_step(hf_four_blocks, monkeypatch, setting)
    before = recomputed(model)
    free(monkeypatch, 1e9)
    auto.decide()
    assert recomputed(model) == before and capsys.readouterr().err == ""


def test_allocated_memory_is_that_of_this_process():
    before = recomputation.allocated_memory(CPU)
    block = torch.ones(2**24)  # 64 MiB
    grown = recomputation.allocated_memory(CPU) - before
    assert 0.9 * block.nbytes < grown < 1.5 * block.nbytes


def test_a_run_decides_and_computes_the_same_numbers(tmp_path: Path, capsys):
    """Dropout draws the same too; the run without recomputation is the reference."""
    base = tiny_runs.base_model(tmp_path / "base")
    adapters = []
    for setting in (False, "auto"):
        config = tiny_runs.run(
            tmp_path / str(setting),
            base,
            train__gradient_checkpointing=setting,
            train__max_steps=3,
            lora__dropout=0.2,
        )
        adapters.append(Path(config.output_dir) / "checkpoint-final/adapter_model.safetensors")
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert "auto: 0 of 2 blocks are recomputed" in capsys.readouterr().err
