"""What only a GPU can tell. Without one every test here is skipped; `make gpu` runs them."""

import pytest
import torch

from helpers.tiny_models import config_json
from minilora.model.hf_config import DecoderConfig
from minilora.model.transformer import CausalLM


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of this folder, and skip them where there is no GPU."""
    for item in items:
        if "cuda" in item.path.parts:
            item.add_marker("cuda")
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture
def exact_products():
    """Multiply float32 matrices in float32, not in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def wide_model() -> CausalLM:
    """A model in float64 whose heads of 64 the GPU's attention kernels take.

    Its weights are as small as real ones. With those of the other tiny models, rounding to 16 bits
    in one block would change the next ones altogether.
    """
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "head_dim": 64}
    model = CausalLM(DecoderConfig.from_hf(config_json("llama3", **sizes))).double()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.04, generator=generator)
        else:
            torch.nn.init.ones_(p)
    return model
