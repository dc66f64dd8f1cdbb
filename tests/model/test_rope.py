"""Rotary positions; tests/parity/test_model.py compares every scaling with transformers'."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from minilora.model import rope as rope_module
from minilora.model.rope import rope_frequencies, rotary_cos_sin, rotate

DEFAULT = {"rope_type": "default", "rope_theta": 100.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "max_position_embeddings": 128,
}
SIZE = 8


def test_frequencies_are_powers_of_theta():
    inv_freq, scaling = rope_frequencies(DEFAULT, SIZE)
    expected = torch.tensor([1.0, 100**-0.25, 100**-0.5, 100**-0.75])
    torch.testing.assert_close(inv_freq, expected)
    assert scaling == 1.0 and inv_freq.dtype == torch.float32


def test_yarn_scales_cos_and_sin():
    _, scaling = rope_frequencies(YARN, SIZE)
    cos, _ = rotary_cos_sin(torch.tensor([0]), YARN, SIZE, torch.float32)
    assert scaling > 1
    torch.testing.assert_close(cos, torch.full((1, 1, SIZE), scaling))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_angles_are_computed_in_fp32(dtype: torch.dtype):
    """In bfloat16 the position 1001 would be rounded to 1000."""
    positions = torch.tensor([0, 7, 1001])
    cos, sin = rotary_cos_sin(positions, DEFAULT, SIZE, dtype)
    assert cos.shape == sin.shape == (3, 1, SIZE) and cos.dtype == sin.dtype == dtype
    inv_freq, _ = rope_frequencies(DEFAULT, SIZE)
    angles = positions[:, None].double() * inv_freq.double().repeat(2)
    tolerance = 1e-4 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(cos[:, 0].double(), angles.cos(), rtol=0, atol=tolerance)
    torch.testing.assert_close(sin[:, 0].double(), angles.sin(), rtol=0, atol=tolerance)


def test_position_0_is_not_rotated():
    x = torch.randn(1, 2, SIZE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rotate(x, *rotary_cos_sin(torch.tensor([0]), DEFAULT, SIZE, x.dtype)), x)


def test_products_depend_on_the_distance_only():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 1, SIZE, generator=generator)
    k = torch.randn(1, 1, SIZE, generator=generator)

    def product(query_position: int, key_position: int) -> float:
        rotated = []
        for x, position in ((q, query_position), (k, key_position)):
            cos, sin = rotary_cos_sin(torch.tensor([position]), DEFAULT, SIZE, x.dtype)
            rotated.append(rotate(x, cos, sin))
        return (rotated[0] * rotated[1]).sum().item()

    assert product(9, 4) == pytest.approx(product(25, 20), abs=1e-5)
    assert product(9, 4) != pytest.approx(product(9, 5), abs=1e-2)


def test_frequencies_are_copied_to_a_device_once(monkeypatch: pytest.MonkeyPatch):
    """The meta device stands for a GPU, where each copy would let the host wait."""
    monkeypatch.setattr(rope_module, "_KNOWN_FREQUENCIES", {})
    computed = []

    def counted(rope: dict, head_dim: int):
        computed.append(rope)
        return rope_frequencies(rope, head_dim)

    monkeypatch.setattr(rope_module, "rope_frequencies", counted)
    for positions in (torch.arange(3, device="meta"), torch.arange(5, device="meta")):
        for rope in (DEFAULT, YARN):
            cos, sin = rotary_cos_sin(positions, dict(rope), SIZE, torch.bfloat16)
            assert cos.device.type == sin.device.type == "meta"
    assert computed == [DEFAULT, YARN]
    cos, _ = rotary_cos_sin(torch.arange(3), DEFAULT, SIZE, torch.bfloat16)
    assert cos.device.type == "cpu"  # each device has its own


def test_fake_tensors_are_not_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rope_module, "_KNOWN_FREQUENCIES", {})
    with FakeTensorMode():
        rotary_cos_sin(torch.arange(3), DEFAULT, SIZE, torch.float32)
    cos, _ = rotary_cos_sin(torch.arange(3), DEFAULT, SIZE, torch.float32)
    assert cos[0].tolist() == [[1.0] * SIZE]
