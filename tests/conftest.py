"""Settings and fixtures shared by all tests."""

import os
import signal

import pytest
import torch
from transformers import PreTrainedModel

from helpers.tiny_models import ours, tiny
from minilora.model.transformer import CausalLM

# A test run that a shell started in the background ignores Ctrl-C, and so would the processes that
# tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all of tests/system as `system`, and run it first.

    Its files take longest; at the end of a run one process would be left with one of them.
    """
    for item in items:
        if "system" in item.path.parts:
            item.add_marker("system")
    items.sort(key=lambda item: "system" not in item.path.parts)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests of tests/cuda were skipped, so that no one takes them for passed."""
    skipped = terminalreporter.stats.get("skipped", [])
    num_cuda = sum(report.nodeid.startswith("tests/cuda/") for report in skipped)
    if num_cuda:
        terminalreporter.write_line(f"{num_cuda} tests of tests/cuda skipped: there is no GPU here")


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory):
    """Put caches into a fresh directory: tests neither read the user's nor write to it."""
    torch.set_num_threads(1)  # tiny models gain nothing from more, and workers share the machine
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["XDG_CACHE_HOME"]
    if before is not None:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session")
def hf_llama() -> PreTrainedModel:
    """Make a tiny random Llama of transformers; it is shared, so it must not be changed."""
    return tiny("llama3")


@pytest.fixture
def llama(hf_llama: PreTrainedModel) -> CausalLM:
    """Make a new minilora model with the weights of `hf_llama`."""
    return ours(hf_llama)
