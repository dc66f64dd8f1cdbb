"""Speed beside the machine's peak, and memory: the figures of a log entry."""

import resource
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers.tiny_runs import base_model
from minilora import distributed
from minilora.build import build_for_training
from minilora.config import Config
from minilora.model.flops import training_flops
from minilora.training import throughput
from minilora.training.batches import MicroBatch
from minilora.training.throughput import Throughput, matrix_peak, peak_memory

CPU = torch.device("cpu")
LENGTHS, SUPERVISED = [30, 50], 40


def micro_batch(num_tokens: int = sum(LENGTHS)) -> MicroBatch:
    tokens = torch.zeros(sum(LENGTHS), dtype=torch.int64)
    return MicroBatch(tokens, LENGTHS, tokens, SUPERVISED, num_tokens, is_last=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return base_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "matrix_peak", lambda device, dtype: 1e12)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_share_of_peak_is_of_the_operations_since_the_last_entry(
    method: str, base: Path, known_peak: None
):
    """Placeholders count nothing, and recomputing blocks does not count as work."""
    config = Config(method=method)  # type: ignore[arg-type]
    config.train.gradient_checkpointing = True
    loaded = build_for_training(config, base, CPU)
    counted = Throughput(loaded, CPU)
    trained = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
    flops = training_flops(
        loaded.model.config,
        LENGTHS,
        SUPERVISED,
        trained=method,  # type: ignore[arg-type]
        adapter_parameters=trained if method == "lora" else 0,
    )
    for num_batches in (1, 3):
        for _ in range(num_batches):
            counted.add(micro_batch())
        counted.add(micro_batch(num_tokens=0))
        share = counted.figures(seconds=2.0)["share_of_peak"]
        assert share == pytest.approx(num_batches * flops / 2.0 / 1e12, rel=1e-2)
    assert counted.figures(seconds=2.0)["share_of_peak"] == 0


def test_operations_and_peaks_are_summed_over_processes(
    base: Path, known_peak: None, monkeypatch: pytest.MonkeyPatch
):
    """A second process, whose numbers are equal, doubles both: the share stays as it is."""
    loaded = build_for_training(Config(), base, CPU)
    alone = Throughput(loaded, CPU)
    alone.add(micro_batch())
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda tensor: tensor.mul_(2))
    of_two = Throughput(loaded, CPU)
    of_two.add(micro_batch())
    assert of_two.peak == 2 * alone.peak == 2e12
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda tensor: tensor)
    share = alone.figures(1.0)["share_of_peak"]
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda tensor: tensor.mul_(2))
    assert of_two.figures(1.0)["share_of_peak"] == share > 0


@pytest.mark.parametrize("full_product", [0.002, 0.08, 0.4, 20.0])
def test_the_peak_is_measured_in_little_time(full_product: float, monkeypatch: pytest.MonkeyPatch):
    """Whatever seconds a product of the whole matrix takes; random numbers of a run do not move."""
    state = torch.get_rng_state()
    now = 0.0
    rows = []

    def product_seconds(x: torch.Tensor, matrix: torch.Tensor) -> float:
        nonlocal now
        seconds = len(x) / len(matrix) * full_product
        now += seconds
        rows.append(len(x))
        return seconds

    matrix_peak.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(throughput, "_product_seconds", product_seconds)
        patch.setattr(throughput.time, "perf_counter", lambda: now)
        peak = matrix_peak(CPU, torch.bfloat16)
        assert matrix_peak(CPU, torch.bfloat16) == peak  # measured once in a process
    matrix_peak.cache_clear()

    assert peak == pytest.approx(2 * 2048**3 / full_product)
    first = full_product / 32  # the products before the clock runs, and before one is predicted
    assert now < 0.2 + 2 * first
    assert rows[:2] == [64, 64] and rows == sorted(rows)
    assert (max(rows) == 2048) is (full_product < 0.1)
    assert rows.count(2048) <= 4
    assert torch.equal(torch.get_rng_state(), state)


def test_the_peak_is_about_what_a_product_takes():
    a = torch.randn(512, 2048)
    w = torch.randn(2048, 2048)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ w.t()
        best = min(best, time.perf_counter() - start)
    rate = 2 * 512 * 2048**2 / best
    assert rate / 4 < matrix_peak(CPU, torch.float32) < 4 * rate


def test_peak_memory_is_of_this_process_alone(monkeypatch: pytest.MonkeyPatch):
    """The counter of getrusage begins with the memory of the process that started this one."""
    before = peak_memory(CPU)
    held = bytearray(b"x" * 2**26)
    peak = peak_memory(CPU)
    assert peak >= max(before, len(held)) and peak < 2**36

    of_the_parent = resource.struct_rusage([0, 0, 2**30, *[0] * 13])  # a peak of 1 TiB
    monkeypatch.setattr(resource, "getrusage", lambda who: of_the_parent)
    assert peak_memory(CPU) == peak


def test_peak_memory_without_linux(monkeypatch: pytest.MonkeyPatch):
    """macOS has no /proc, and counts in bytes."""
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    in_kib = peak_memory(CPU)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert in_kib == 1024 * peak_memory(CPU) > 2**20


def test_peak_memory_of_a_gpu_is_what_torch_has_allocated(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 12345)
    assert peak_memory(torch.device("cuda", 0)) == 12345


def test_a_run_faster_than_the_measured_peak_is_the_peak(
    base: Path, monkeypatch: pytest.MonkeyPatch
):
    """The machine was busy while the peak was measured."""
    monkeypatch.setattr(throughput, "matrix_peak", lambda device, dtype: 1.0)
    counted = Throughput(build_for_training(Config(), base, CPU), CPU)
    counted.add(micro_batch())
    assert counted.figures(1.0)["share_of_peak"] == 1
    counted.add(micro_batch())
    assert counted.figures(2.0)["share_of_peak"] == 0.5
