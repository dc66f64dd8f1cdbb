"""Which token is drawn: against softmax, the nucleus by its definition, and single rows."""

import pytest
import torch
import transformers
from torch import Tensor

from helpers.sampling import FILTERS, nucleus, uniform_draws
from minilora.errors import UserError
from minilora.generation.sampling import SamplingParams, sample_tokens


def assert_frequencies(tokens: Tensor, probabilities: Tensor) -> None:
    """Check that each token is as frequent as its probability says.

    Within 4 standard errors; the rarest may turn up once.
    """
    n = len(tokens)
    counts = torch.bincount(tokens, minlength=len(probabilities))
    sigma = (n * probabilities * (1 - probabilities)).sqrt()
    is_close = (counts - n * probabilities).abs() <= 4 * sigma + 1
    assert is_close.all(), (counts / n, probabilities)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_frequencies_are_those_of_softmax(temperature: float):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 2
    params = SamplingParams(temperature=temperature)
    tokens = sample_tokens(logits.expand(20_000, -1), params, uniform_draws(20_000))
    assert_frequencies(tokens, (logits.double() / temperature).softmax(0))


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("seed", range(3))
def test_top_p_cuts_exactly_the_nucleus(top_p: float, seed: int):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(seed)) * 2
    expected = nucleus(logits, 0.8, top_p)
    params = SamplingParams(temperature=0.8, top_p=top_p)
    tokens = sample_tokens(logits.expand(20_000, -1), params, uniform_draws(20_000))
    assert not (expected[tokens] == 0).any()
    assert_frequencies(tokens, expected)


def test_top_p_that_is_reached_exactly_keeps_no_further_token():
    """Four tokens of probability 1/4, which floating point holds exactly; so does transformers."""
    logits = torch.zeros(1000, 4)
    warped = transformers.TopPLogitsWarper(0.5)(torch.empty(1, 0), logits[:1].clone())
    assert warped.isfinite().sum() == 2
    tokens = sample_tokens(logits, SamplingParams(temperature=1.0, top_p=0.5), uniform_draws(1000))
    assert len(set(tokens.tolist())) == 2


def test_each_row_has_its_own_logits_and_draw():
    logits = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    draws = uniform_draws(50)
    params = SamplingParams(temperature=0.7, top_p=0.9)
    alone = []
    for row, draw in zip(logits, draws, strict=True):
        alone.append(int(sample_tokens(row.unsqueeze(0), params, draw.unsqueeze(0))))
    assert sample_tokens(logits, params, draws).tolist() == alone
    assert len(set(alone)) > 5


@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_no_row_depends_on_its_neighbors(settings: tuple):
    """Rows whose nucleus is small beside rows for which the whole vocabulary is sorted."""
    temperature, top_k, top_p, _ = settings
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.01, 1.0, 9.0]).repeat(8)[:, None]  # [24, 1]
    logits = torch.randn(24, 5000, generator=generator) * spread
    draws = torch.rand(24, generator=generator)

    alone = [int(sample_tokens(logits[i : i + 1], params, draws[i : i + 1])) for i in range(24)]
    assert sample_tokens(logits, params, draws).tolist() == alone
    order = torch.randperm(24, generator=generator)
    shuffled = sample_tokens(logits[order], params, draws[order])
    assert shuffled.tolist() == [alone[i] for i in order]


def test_temperature_zero_is_argmax():
    logits = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(temperature=0.0, top_p=0.1)
    assert torch.equal(sample_tokens(logits, params, uniform_draws(50)), logits.argmax(-1))


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 1.0])
def test_extreme_draws_stay_in_the_nucleus(top_p: float):
    """Rounding must not carry the largest draw past the last token."""
    first, last = torch.zeros(1), torch.nextafter(torch.ones(1), torch.zeros(1))
    params = SamplingParams(temperature=1.0, top_p=top_p)
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        logits = torch.randn(50, generator=generator) * 4
        logits[:5] = -torch.inf
        allowed = nucleus(logits, 1.0, top_p)
        assert sample_tokens(logits.unsqueeze(0), params, first) == logits.argmax()
        assert allowed[sample_tokens(logits.unsqueeze(0), params, last)] > 0


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_new_tokens", [0, -1]),
        ("temperature", [-0.1, float("nan")]),
        ("top_p", [0.0, 1.1, float("nan")]),
        ("top_k", [-1]),
        ("repetition_penalty", [0.0, -1.0, float("nan"), float("inf")]),
        ("stop", ["", ("x", "")]),
        ("seed", [-1]),
        ("max_time", [0.0, -1.0, float("nan")]),
    ],
)
def test_values_out_of_range_are_refused(field: str, values: list):
    for value in values:
        with pytest.raises(UserError, match=f"^{field}"):
            SamplingParams(**{field: value})


def test_a_single_stop_string_is_not_taken_for_its_characters():
    assert SamplingParams(stop="end").stop_strings == ("end",)
    assert SamplingParams(stop=["end", "x"]).stop_strings == ("end", "x")
