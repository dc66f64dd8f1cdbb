"""Generation against transformers' `generate`, softmax itself and brute force; and a model that has learnt to stop."""

import functools
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import merge
import minilora
import tiny_tokenizers
import train
from minilora.build import build_model
from minilora.checkpoint import save_adapter
from minilora.config import Config, DataConfig, EvalConfig, LogConfig, LoraConfig, ModelConfig, TrainConfig, UserError
from minilora.generate import Answer, generate_ids, sample
from minilora.lora import lora_layers
from minilora.model import CausalLM
from minilora.tokenizer import Tokenizer
from tiny_models import VOCAB, WINDOW, config_json, ours, tiny

NEW_TOKENS = 16
FAMILIES = ["llama3", "mistral_v1", "qwen2", "qwen3"]  # of mistral_v1, the window is shorter than most prompts
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
ENDS = range(8)  # stop ids: about one token in ten
CPU = torch.device("cpu")


@functools.cache
def hf_model(family: str) -> PreTrainedModel:
    return tiny(family)


@functools.cache
def model_of(family: str) -> CausalLM:
    return ours(hf_model(family))


@functools.cache
def tokenizer() -> Tokenizer:
    """Its ids reach beyond the tiny models' vocabulary, and its EOS is one of those."""
    return Tokenizer(tiny_tokenizers.llama3())


@functools.cache
def prompts() -> list[list[int]]:
    """Ids of 20 prompts of 1 to 24 tokens, not sorted by length."""
    rng = random.Random(0)
    return [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 3 * WINDOW))] for _ in range(20)]


def ids_of(model: CausalLM, given: Sequence[Sequence[int]], **options) -> list[list[int]]:
    return [answer.ids for answer in generate_ids(model, given, tokenizer(), **{"max_new_tokens": NEW_TOKENS, **options})]


def theirs(hf: PreTrainedModel, prompt: Sequence[int], ends: Sequence[int], max_new_tokens: int = NEW_TOKENS) -> list[int]:
    """The ids with which transformers continues a prompt, alone and greedily."""
    out = hf.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=max_new_tokens,
        eos_token_id=list(ends), pad_token_id=0,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


# --- which tokens ---


@EVERY_FAMILY
def test_greedy_ids_are_those_of_transformers(family: str):
    expected = [theirs(hf_model(family), prompt, ENDS) for prompt in prompts()]
    lengths = {len(ids) for ids in expected}
    assert NEW_TOKENS in lengths and len(lengths) > 3  # some ran on, others ended at various places
    assert ids_of(model_of(family), prompts(), stop_ids=ENDS) == expected


@EVERY_FAMILY
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_p": 0.8, "seed": 3}], ids=["greedy", "sampled"])
def test_the_batch_does_not_change_an_answer(family: str, sampling: dict):
    model = model_of(family)
    alone = ids_of(model, prompts(), stop_ids=ENDS, batch_size=1, **sampling)
    assert len({tuple(ids) for ids in alone}) > 15
    for batch_size in (3, 16, 50):
        assert ids_of(model, prompts(), stop_ids=ENDS, batch_size=batch_size, **sampling) == alone
    assert ids_of(model, prompts()[7:], stop_ids=ENDS, first_index=7, **sampling) == alone[7:]


@EVERY_FAMILY
@torch.no_grad()
def test_cached_equals_recomputed(family: str):
    model = model_of(family)
    for prompt, ids in zip(prompts(), ids_of(model, prompts()), strict=True):
        whole = list(prompt)
        for _ in range(NEW_TOKENS):
            whole.append(int(model(torch.tensor(whole))[-1].argmax()))
        assert whole == prompt + ids


def test_the_model_is_left_as_it_was():
    model = build_with_adapter(ours(hf_model("llama3")), dropout=0.5)
    expected = ids_of(model.eval(), prompts())
    assert not model.training
    state = torch.random.get_rng_state()
    assert ids_of(model.train(), prompts()) == expected  # without dropout
    assert model.training and torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def build_with_adapter(model: CausalLM, dropout: float = 0.0, rank: int = 4) -> CausalLM:
    """Random adapters in a model, B included."""
    from minilora.lora import init_adapters, inject

    inject(model, LoraConfig(rank=rank, dropout=dropout))
    init_adapters(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1, generator=generator)
    return model


@pytest.mark.parametrize("max_new_tokens", [1, 2, 7])
def test_max_new_tokens(max_new_tokens: int):
    longer = ids_of(model_of("llama3"), prompts())
    assert ids_of(model_of("llama3"), prompts(), max_new_tokens=max_new_tokens) == [ids[:max_new_tokens] for ids in longer]


def test_no_prompts_no_answers():
    assert generate_ids(model_of("llama3"), [], tokenizer(), 5) == []
    assert minilora.generate(model_of("llama3"), tokenizer(), []) == []


def test_a_prompt_without_tokens_is_refused():
    """There is nothing to continue; and among others, it must not take over a neighbour's continuation."""
    with pytest.raises(UserError, match="empty"):
        generate_ids(model_of("llama3"), [[], *prompts()], tokenizer(), 5)


def test_seeds():
    def sampled(seed: int, given: list[list[int]]) -> list[list[int]]:
        return ids_of(model_of("llama3"), given, temperature=1.0, seed=seed)

    assert sampled(1, prompts()) == sampled(1, prompts())
    differ = [a != b for a, b in zip(sampled(1, prompts()), sampled(2, prompts()), strict=True)]
    assert sum(differ) >= 18
    same_prompt = sampled(1, [prompts()[0]] * 10)  # as for several samples of one prompt
    assert len({tuple(ids) for ids in same_prompt}) >= 9


# --- how a token is drawn ---


def uniform(count: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).random(count, dtype=np.float32))


def assert_frequencies(tokens: Tensor, probabilities: Tensor) -> None:
    """Each token as often as its probability says, within 4 standard errors."""
    n = len(tokens)
    counts = torch.bincount(tokens, minlength=len(probabilities))
    sigma = (n * probabilities * (1 - probabilities)).sqrt()
    assert ((counts - n * probabilities).abs() <= 4 * sigma + 1e-9).all(), (counts / n, probabilities)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_frequencies_are_those_of_softmax(temperature: float):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 2
    tokens = sample(logits.expand(20_000, -1), temperature, 1.0, uniform(20_000))
    assert_frequencies(tokens, (logits.double() / temperature).softmax(0))


def nucleus(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Probabilities in float64 of the most probable tokens, up to and including the one that reaches top_p."""
    probabilities = (logits.double() / temperature).softmax(0)
    kept, total = torch.zeros_like(probabilities), 0.0
    for i in sorted(range(len(logits)), key=lambda i: -probabilities[i].item()):
        kept[i] = probabilities[i]
        total += probabilities[i].item()
        if total >= top_p:
            break
    return kept / kept.sum()


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("seed", range(3))
def test_top_p_cuts_exactly_the_nucleus(top_p: float, seed: int):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(seed)) * 2
    expected = nucleus(logits, 0.8, top_p)
    tokens = sample(logits.expand(20_000, -1), 0.8, top_p, uniform(20_000))
    assert not (expected[tokens] == 0).any()
    assert_frequencies(tokens, expected)


def test_each_row_has_its_own_logits_and_draw():
    logits, draws = torch.randn(50, 12, generator=torch.Generator().manual_seed(0)), uniform(50)
    alone = [int(sample(row.unsqueeze(0), 0.7, 0.9, draw.unsqueeze(0))) for row, draw in zip(logits, draws, strict=True)]
    assert sample(logits, 0.7, 0.9, draws).tolist() == alone
    assert len(set(alone)) > 5


def test_temperature_zero_is_argmax():
    logits = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits, 0.0, 0.1, uniform(50)), logits.argmax(-1))


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 1.0])
def test_the_extreme_draws_stay_in_the_nucleus(top_p: float):
    """The smallest and the largest draws there are; rounding must not carry the largest past the last token."""
    first, last = torch.zeros(1), torch.nextafter(torch.ones(1), torch.zeros(1))
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        logits = torch.randn(50, generator=generator) * 4
        logits[:5] = -torch.inf
        allowed = nucleus(logits, 1.0, top_p)
        assert sample(logits.unsqueeze(0), 1.0, top_p, first) == logits.argmax()
        assert allowed[sample(logits.unsqueeze(0), 1.0, top_p, last)] > 0


def test_generation_draws_below_one(monkeypatch: pytest.MonkeyPatch):
    """The largest number a generator gives must not be rounded to 1, which would choose the least probable token."""

    class Largest:
        def __init__(self, seed: object):
            pass

        def random(self, size: object = None, dtype: type = np.float64):
            return np.nextafter(dtype(1), dtype(0))

    monkeypatch.setattr(np.random, "default_rng", Largest)
    model, prompt = model_of("llama3"), prompts()[0]
    (ids,) = ids_of(model, [prompt], temperature=0.5, top_p=0.5, max_new_tokens=1)
    with torch.no_grad():
        logits = model(torch.tensor(prompt))[-1]
    assert nucleus(logits, 0.5, 0.5)[ids[0]] > 0


# --- where an answer ends ---


def scripted(ids: Sequence[int], monkeypatch: pytest.MonkeyPatch, tokens: Tokenizer, **options) -> Answer:
    """The answer when the model says `ids`."""
    said = iter(ids)
    monkeypatch.setitem(generate_ids.__globals__, "sample", lambda logits, *_: torch.full((len(logits),), next(said) % VOCAB))
    monkeypatch.setitem(generate_ids.__globals__, "sample", lambda logits, *_: torch.tensor([next(said)]))
    (answer,) = generate_ids(big_model(tokens.vocab_size), [tokens.encode("Why? ->").ids], tokens, len(ids), **options)
    return answer


@functools.cache
def big_model(vocab_size: int) -> CausalLM:
    """One whose vocabulary is a tokenizer's; what it would say is of no interest."""
    return ours(tiny("llama3", vocab_size=vocab_size, num_hidden_layers=1))


@functools.cache
def tokenizer_named(name: str) -> Tokenizer:
    return Tokenizer(tiny_tokenizers.BUILDERS[name]())


SAID = "Science -> Art\n서울 🤖🤖🤖 物理学史の博物館と大学、(x) end 1984"
EVERY_TOKENIZER = pytest.mark.parametrize("name", tiny_tokenizers.BUILDERS)


def said_ids(tokens: Tokenizer) -> list[int]:
    return tokens.encode("Why? -> " + SAID).ids[len(tokens.encode("Why? ->").ids) :]


@EVERY_TOKENIZER
def test_answers_end_before_a_stop_string(name: str, monkeypatch: pytest.MonkeyPatch):
    """Wherever it lies: inside a token, across several, across the bytes of a character; and nothing is generated after it."""
    tokens, rng = tokenizer_named(name), random.Random(0)
    prompt, ids = tokens.encode("Why? ->").ids, said_ids(tokens)
    whole = scripted(ids, monkeypatch, tokens).text
    assert whole.lstrip() == SAID
    cuts = [sorted(rng.sample(range(len(SAID) + 1), 2)) for _ in range(25)]
    for begin, end in [*cuts, (SAID.index("物"), SAID.index("、"))]:
        stop = SAID[begin:end]
        answer = scripted(ids, monkeypatch, tokens, stop=("not there", stop))
        assert answer.text == whole[: whole.index(stop)], repr(stop)
        needed = next(n for n in range(1, len(ids) + 1) if stop in tokens.decode_after(prompt, ids[:n]))
        assert answer.ids == ids[:needed] and answer.finished, repr(stop)


def test_the_first_of_several_stop_strings_counts(monkeypatch: pytest.MonkeyPatch):
    tokens = tokenizer_named("qwen")
    answer = scripted(said_ids(tokens), monkeypatch, tokens, stop=("end", "Art\n", "rt", "1984"))
    assert answer.text.lstrip() == "Science -> A"


def test_a_stop_string_in_the_prompt_stops_nothing(monkeypatch: pytest.MonkeyPatch):
    for name in tiny_tokenizers.BUILDERS:
        tokens = tokenizer_named(name)
        assert scripted(said_ids(tokens), monkeypatch, tokens, stop=("Why",)).text.lstrip() == SAID


@EVERY_TOKENIZER
def test_eos_ends_an_answer_and_is_not_in_its_text(name: str, monkeypatch: pytest.MonkeyPatch):
    tokens = tokenizer_named(name)
    ids = [*said_ids(tokens), tokens.eos_id]
    answer = scripted([*ids, *ids], monkeypatch, tokens)
    assert (answer.text.lstrip(), answer.ids, answer.finished) == (SAID, ids, True)


def test_stop_ids_of_generation_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Llama 3's instruct models end a turn with another token than a document."""
    directory = tiny_tokenizers.copy(tiny_tokenizers.llama3(), tmp_path / "tokenizer", eos_token="<|end_of_text|>")
    tokens = Tokenizer(directory)
    turn, document = (tokens.specials[token] for token in ("<|eot_id|>", "<|end_of_text|>"))
    assert tokens.stop_ids() == {document}
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [document, turn]}))
    assert tokens.stop_ids() == {document, turn}
    ids = said_ids(tokens)
    monkeypatch.setitem(generate_ids.__globals__, "sample", iter_sample([*ids, turn, *ids]))
    assert minilora.generate(big_model(tokens.vocab_size), tokens, ["Why? ->"], 100)[0].lstrip() == SAID


def iter_sample(ids: Sequence[int]) -> Callable[..., Tensor]:
    said = iter(ids)
    return lambda *_: torch.tensor([next(said)])


def test_unfinished_answers(monkeypatch: pytest.MonkeyPatch):
    tokens = tokenizer_named("qwen")
    answer = scripted(said_ids(tokens)[:5], monkeypatch, tokens)
    assert not answer.finished and len(answer.ids) == 5 and answer.text and SAID.startswith(answer.text.lstrip())


# --- the whole way: text to text ---


@functools.cache
def base_of(name: str) -> Path:
    """A directory with a tiny random Llama over the vocabulary of a tokenizer."""
    directory = Path(tiny_tokenizers._HOME.name) / f"base of {name}"
    shutil.copytree(tiny_tokenizers.BUILDERS[name](), directory)
    tiny("llama3", vocab_size=Tokenizer(directory).vocab_size).save_pretrained(directory)
    return directory
