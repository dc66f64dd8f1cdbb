"""Answers on a GPU: those of a CPU, alone and in a batch."""

import copy

import pytest
import torch

from helpers.decoding import ENDS, EVERY_FAMILY, decode, model_of, prompts, sampling
from minilora.generation.sampling import SamplingParams, sample_tokens

SAMPLED = {"temperature": 0.9, "top_p": 0.8, "seed": 3}


@EVERY_FAMILY
@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_answers_are_those_of_a_cpu(family, settings, gpu, exact_products):
    on_cpu = model_of(family)
    on_gpu = copy.deepcopy(on_cpu).to(gpu)
    params = sampling(ends=ENDS, **settings)
    expected = decode(on_cpu, prompts(), params, batch_size=16)
    for batch_size in (1, 3, 16, 50):
        assert decode(on_gpu, prompts(), params, batch_size=batch_size) == expected, batch_size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_answers_in_16_bits_begin_alike_alone_and_together(dtype, gpu):
    """Rounding may part two answers where tokens are nearly as likely, so not all are equal."""
    model = copy.deepcopy(model_of("llama3")).to(gpu, dtype)
    alone = decode(model, prompts(), batch_size=1)
    together = decode(model, prompts(), batch_size=16)
    same = sum(a == b for a, b in zip(alone, together, strict=True))
    assert same >= 0.7 * len(alone)


def test_repetition_penalty_is_that_of_a_cpu(gpu, exact_products):
    params = sampling(repetition_penalty=1.3)
    on_gpu = copy.deepcopy(model_of("llama3")).to(gpu)
    assert decode(on_gpu, prompts(), params) == decode(model_of("llama3"), prompts(), params)


def test_sampling_is_deterministic(gpu):
    logits = torch.randn(4, 512, generator=torch.Generator().manual_seed(0)).to(gpu)
    draws = torch.rand(4, generator=torch.Generator().manual_seed(1)).to(gpu)
    params = SamplingParams(temperature=0.7, top_p=0.9)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (sample_tokens(logits, params, draws) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second)
