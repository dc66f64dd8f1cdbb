"""Tiny models that decode, beside transformers' `generate`; and models that say what a test wants.

Models, tokenizers and prompts are made once for each test process: they must not be changed.
"""

import functools
import random
from collections.abc import Sequence

import pytest
import torch
from transformers import PreTrainedModel

from helpers import tiny_tokenizers
from helpers.tiny_models import VOCAB, WINDOW, ours, tiny
from minilora.data.tokenizer import Tokenizer
from minilora.generation import passes
from minilora.generation.engine import generate_ids
from minilora.generation.sampling import SamplingParams
from minilora.model.lora import lora_layers
from minilora.model.transformer import CausalLM

NEW_TOKENS = 16
ENDS = range(8)  # tokens that end an answer: about one in ten
# the window reaches both layers of mistral_v1 and the second of qwen2; most prompts are longer
FAMILIES: dict[str, dict] = {
    "llama3": {},
    "mistral_v1": {},
    "qwen2": {"use_sliding_window": True},
    "qwen3": {},
}
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
QUESTION = "Why? ->"


@functools.cache
def hf_model(family: str) -> PreTrainedModel:
    """Return transformers' model of a family."""
    return tiny(family, **FAMILIES[family])


@functools.cache
def model_of(family: str) -> CausalLM:
    """Return minilora's model with the weights of `hf_model`."""
    return ours(hf_model(family))


@functools.cache
def tokenizer() -> Tokenizer:
    """Return a tokenizer whose EOS is beyond the tiny models' vocabulary: they never say it."""
    return Tokenizer(tiny_tokenizers.llama3())


@functools.cache
def tokenizer_named(name: str) -> Tokenizer:
    """Return one of the tiny tokenizers."""
    return Tokenizer(tiny_tokenizers.BUILDERS[name]())


@functools.cache
def model_over(vocab_size: int) -> CausalLM:
    """Return a model with a tokenizer's vocabulary, for tests that script what it says."""
    return ours(tiny("llama3", vocab_size=vocab_size, num_hidden_layers=1))


def random_prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Draw the ids of prompts of 1 to `longest` tokens, not sorted by length."""
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(rng.randint(1, longest))] for _ in range(count)]


@functools.cache
def prompts() -> list[list[int]]:
    """Return the ids of 20 prompts of 1 to 24 tokens."""
    return random_prompts(20, 3 * WINDOW)


def sampling(
    max_new_tokens: int = NEW_TOKENS, ends: Sequence[int] = (), **values
) -> SamplingParams:
    """Return sampling settings; `ends` are the tokens that end an answer, besides EOS."""
    return SamplingParams(max_new_tokens=max_new_tokens, stop_token_ids=ends, **values)


def decode(
    model: CausalLM,
    given: Sequence[Sequence[int]],
    params: SamplingParams | None = None,
    **options,
) -> list[list[int]]:
    """Return the ids of the answers to prompts; options are those of `generate_ids`."""
    answers = generate_ids(model, given, tokenizer(), params or sampling(), **options)
    return [answer.ids for answer in answers]


def decode_without_cache(model: CausalLM, prompt: Sequence[int], tokens: int) -> list[int]:
    """Return the greedy answer, for which each token is computed from the whole sequence anew."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(model(torch.tensor(ids))[-1].argmax()))
    return ids[len(prompt) :]


def transformers_ids(
    hf: PreTrainedModel,
    prompt: Sequence[int],
    ends: Sequence[int],
    max_new_tokens: int = NEW_TOKENS,
) -> list[int]:
    """Return the ids with which transformers continues a prompt, alone and greedily."""
    out = hf.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(ends),
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def randomize_adapters(model: CausalLM) -> None:
    """Give adapters an effect: their B is zero at first."""
    generator = torch.Generator().manual_seed(1)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1, generator=generator)


def script(monkeypatch: pytest.MonkeyPatch, ids: Sequence[int]) -> None:
    """Make models say these ids, one in each pass, whatever they are asked."""
    said = iter(ids)
    monkeypatch.setattr(passes, "sample_tokens", lambda *_: torch.tensor([next(said)]))
