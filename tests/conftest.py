"""Settings and fixtures shared by all tests."""

import os

import pytest
import torch
from transformers import PreTrainedModel

from minilora.model import CausalLM
from tiny_models import ours, tiny


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory):
    """Caches go to a fresh directory: tests neither read the user's nor litter it."""
    torch.set_num_threads(1)  # tiny models gain nothing from more, and workers share the machine
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["XDG_CACHE_HOME"]
    if before is not None:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session")
def hf_llama() -> PreTrainedModel:
    """A tiny random Llama of transformers; shared, so it must not be changed."""
    return tiny("llama3")


@pytest.fixture
def llama(hf_llama: PreTrainedModel) -> CausalLM:
    """A fresh minilora model with the weights of `hf_llama`."""
    return ours(hf_llama)
