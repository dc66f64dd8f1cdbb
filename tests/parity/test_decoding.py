"""Decoding against transformers: tokens, sampling, adapters; and whatever must not change an answer, by property."""

import functools
import random
import types
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation.logits_process import (
    LogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import minilora
from minilora import dist
from minilora.build import build_model
from minilora.config import LoraConfig
from minilora.generate import FEW_ROWS, NUCLEUS, KVCache, _linear, few_rows, generate_ids, penalise, sample, stream
from minilora.lora import fold, init_adapters, inject
from minilora.model import CausalLM
from test_generate import model_over, randomise, script, theirs, tokenizer, tokenizer_named
from test_merge import adapter_of, base_of, merged, tensors_of, update_of
from tiny_models import VOCAB, WINDOW, in_bfloat16, ours, tiny
from tiny_tokenizers import BUILDERS

CPU = torch.device("cpu")
ENDS = range(8)  # stop ids: about one token in ten
NEW_TOKENS = 16
# the window reaches both layers of mistral_v1 and the second of qwen2; most prompts are longer
FAMILIES: dict[str, dict] = {"llama3": {}, "mistral_v1": {}, "qwen2": {"use_sliding_window": True}, "qwen3": {}}
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


@functools.cache
def pair(family: str) -> tuple[PreTrainedModel, CausalLM]:
    hf = tiny(family, **FAMILIES[family])
    return hf, ours(hf)


def random_prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def greedy(model: CausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int = NEW_TOKENS, **settings) -> list[list[int]]:
    return [answer.ids for answer in generate_ids(model, prompts, tokenizer(), max_new_tokens, **settings)]


def recomputed(model: CausalLM, prompt: Sequence[int], tokens: int) -> list[int]:
    """The greedy continuation without a cache: the whole sequence again for each token."""
    whole = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            whole.append(int(model(torch.tensor(whole))[-1].argmax()))
    return whole[len(prompt) :]


# --- the same tokens as transformers ---


@EVERY_FAMILY
def test_greedy_ids_are_those_of_transformers_in_any_batch(family: str):
    hf, model = pair(family)
    prompts = random_prompts(50, 5 * WINDOW, seed=list(FAMILIES).index(family))
    assert sum(len(prompt) > WINDOW for prompt in prompts) > 35
    expected = [theirs(hf, prompt, ENDS, NEW_TOKENS) for prompt in prompts]
    lengths = [len(ids) for ids in expected]
    assert len(set(lengths)) > 5 and NEW_TOKENS in lengths and min(lengths) < 4
    for batch_size in (1, 3, 16):
        assert greedy(model, prompts, stop_ids=ENDS, batch_size=batch_size) == expected
    order = list(range(len(prompts)))
    for shuffled in (order[::-1], random.Random(0).sample(order, len(order))):
        assert greedy(model, [prompts[i] for i in shuffled], stop_ids=ENDS) == [expected[i] for i in shuffled]


ROPES: dict[str, dict] = {
    "linear": {"type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 4.0, "beta_slow": 0.5,
    },
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", ["mistral_v1", "qwen2"])
def test_scaled_rope_far_beyond_window_and_context(family: str, rope: str):
    hf = tiny(family, **FAMILIES[family], rope_scaling=ROPES[rope], rope_theta=500.0, max_position_embeddings=16)
    prompts = [*random_prompts(2, 2 * WINDOW, seed=1), [5]]
    expected = [theirs(hf, prompt, [], 60) for prompt in prompts]
    assert greedy(ours(hf), prompts, 60) == expected
    plain = tiny(family, **FAMILIES[family], rope_theta=500.0, max_position_embeddings=16)
    assert greedy(ours(plain), prompts, 60) != expected  # the scaling decides some token


@EVERY_FAMILY
def test_bfloat16_mostly_agrees_with_transformers(family: str):
    """Rounding may turn a close choice, and all that follows: tokens are compared up to the first that differs, of which
    both must be about as probable without rounding."""
    hf, exact = in_bfloat16(family)
    prompts = random_prompts(25, 3 * WINDOW, seed=2)
    same = 0
    for prompt, ids in zip(prompts, greedy(ours(hf), prompts), strict=True):
        expected = theirs(hf, prompt, [], NEW_TOKENS)
        n = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=True)) if a != b), NEW_TOKENS)
        same += n
        if n < NEW_TOKENS:
            with torch.no_grad():
                logits = exact(torch.tensor([prompt + ids[:n]])).logits[0, -1]
            assert (logits[ids[n]] - logits[expected[n]]).abs() < 0.5 * logits.std()
    assert same > 0.5 * NEW_TOKENS * len(prompts)


# --- adapters ---


@EVERY_FAMILY
def test_live_folded_and_merged_say_the_same(family: str, tmp_path: Path):
    tied = {"tie_word_embeddings": family == "qwen3"}
    base = base_of(tiny(family, **FAMILIES[family], **tied), tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter")
    prompts = random_prompts(20, 3 * WINDOW, seed=3)

    live, _ = minilora.load(str(adapter), device="cpu")
    expected = greedy(live, prompts, stop_ids=ENDS)
    fold(live)
    assert not [name for name, _ in live.named_parameters() if "lora" in name or "base_layer" in name]
    folded = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    fold(live)
    assert folded.keys() == live.state_dict().keys()
    assert all(torch.equal(tensor, live.state_dict()[name]) for name, tensor in folded.items())
    assert greedy(live, prompts, stop_ids=ENDS) == expected
    assert greedy(minilora.load(str(merged(adapter)), device="cpu")[0], prompts, stop_ids=ENDS) == expected
    hf = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).merge_and_unload()
    assert [theirs(hf, prompt, ENDS, NEW_TOKENS) for prompt in prompts] == expected
    assert greedy(minilora.load(str(base), device="cpu")[0], prompts, stop_ids=ENDS) != expected


@EVERY_FAMILY
def test_folding_in_bfloat16_gives_the_weights_of_merge(family: str, tmp_path: Path):
    base = base_of(in_bfloat16(family)[0], tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter")
    model, _ = minilora.load(str(adapter), device="cpu")
    fold(model)
    written = tensors_of(merged(adapter))
    state = model.state_dict()
    assert state.keys() == written.keys()
    assert all(tensor.dtype == torch.bfloat16 and torch.equal(tensor, written[name]) for name, tensor in state.items())
    before = tensors_of(base)
    for name, tensor in state.items():  # rounded once
        update = update_of(adapter, name)
        exact = before[name].double() + (0 if update is None else update)
        assert ((tensor.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()
    assert sum(not torch.equal(state[name], before[name]) for name in before) == 2 * 7  # the linear layers of two blocks


# --- sampling ---


def reference(
    logits: Tensor, temperature: float, top_k: int, top_p: float, penalty: float, ids: Sequence[Sequence[int]]
) -> Tensor:
    """transformers' probabilities [S, V] in float64."""
    steps: list[LogitsProcessor] = [RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1.0 else []
    steps.append(TemperatureLogitsWarper(temperature))
    steps += [TopKLogitsWarper(top_k)] if top_k else []
    steps += [TopPLogitsWarper(top_p)] if top_p < 1.0 else []
    scores = logits.clone()
    for step in steps:
        scores = step(torch.tensor(ids), scores)
    return scores.double().softmax(-1)


def assert_drawn(logits: Tensor, expected: Tensor, temperature: float, top_k: int, top_p: float) -> None:
    """Draws on a grid give each token, and each most probable so-and-so-many, as often as its share, to one draw."""
    n = 1000
    grid = (torch.arange(n) + 0.5) / n
    counts = torch.bincount(sample(logits.expand(n, -1), temperature, top_p, grid, top_k), minlength=len(logits))
    assert not counts[expected == 0].any(), "a token outside"
    assert (counts - n * expected).abs().max() <= 1.01
    order = expected.argsort(descending=True)
    assert (counts[order].cumsum(0) - n * expected[order].cumsum(0)).abs().max() <= 1.01


FILTERS = [  # temperature, top_k, top_p, penalty
    (1.0, 0, 1.0, 1.0), (0.6, 0, 1.0, 1.3), (1.7, 0, 0.9, 1.0), (1.0, 0, 0.99, 0.7), (0.2, 0, 0.5, 1.0), (1.0, 0, 0.01, 1.2),
    (1.0, 1, 1.0, 1.0), (1.3, 7, 1.0, 1.1), (0.9, 40, 0.8, 1.0), (2.0, 400, 0.95, 1.5), (1.0, 10**6, 0.9, 1.0),
]  # fmt: skip


@pytest.mark.parametrize("settings", FILTERS, ids=str)
@pytest.mark.parametrize(("vocabulary", "spread"), [(50, 2.0), (50, 0.01), (5000, 4.0), (5000, 1.0), (5000, 0.01)])
def test_the_tokens_drawn_are_those_of_transformers(vocabulary: int, spread: float, settings: tuple):
    temperature, top_k, top_p, penalty = settings
    generator = torch.Generator().manual_seed(vocabulary)
    logits = spread * torch.randn(1, vocabulary, generator=generator)
    seen = torch.randint(vocabulary, (1, 30), generator=generator).tolist()
    expected = reference(logits, temperature, top_k, top_p, penalty, seen)[0]
    if spread < 1 and vocabulary > NUCLEUS and not top_k and top_p > 0.1:
        assert (expected > 0).sum() > NUCLEUS, "the whole vocabulary must be looked at"
    if penalty != 1.0:
        penalise(logits, seen, penalty)
    assert_drawn(logits[0], expected, temperature, top_k, top_p)


@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_no_row_depends_on_its_neighbours(settings: tuple):
    """Rows whose nucleus is small beside rows for which the whole vocabulary is sorted."""
    temperature, top_k, top_p, _ = settings
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(24, 5000, generator=generator) * torch.tensor([0.01, 1.0, 9.0]).repeat(8)[:, None]
    draws = torch.rand(24, generator=generator)
    alone = [int(sample(logits[i : i + 1], temperature, top_p, draws[i : i + 1], top_k)) for i in range(24)]
    assert sample(logits, temperature, top_p, draws, top_k).tolist() == alone
    order = torch.randperm(24, generator=generator)
    assert sample(logits[order], temperature, top_p, draws[order], top_k).tolist() == [alone[i] for i in order]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("penalty", [0.5, 1.1, 1.3, 2.0])
def test_penalised_logits_are_those_of_transformers(penalty: float, dtype: torch.dtype):
    """Of tokens once or often seen, in the prompt or the answer, with logits of either sign or zero."""
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(5, 60, generator=generator)).to(dtype)
    logits[:, ::7] = 0
    ids = torch.randint(30, (5, 40), generator=generator)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    penalise(logits, ids.tolist(), penalty)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("penalty", [0.8, 1.3])
def test_penalised_answers_are_those_of_transformers(penalty: float):
    hf, model = tiny("llama3"), pair("llama3")[1]
    hf.generation_config.repetition_penalty = penalty
    prompts = random_prompts(12, 3 * WINDOW, seed=4)
    expected = [theirs(hf, prompt, ENDS, NEW_TOKENS) for prompt in prompts]
    for batch_size in (1, 5):
        assert greedy(model, prompts, stop_ids=ENDS, repetition_penalty=penalty, batch_size=batch_size) == expected
    assert greedy(model, prompts, stop_ids=ENDS) != expected


# --- the cache ---


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_p": 0.9, "top_k": 50}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("seed", range(4))
def test_no_batch_changes_an_answer(seed: int, sampling: dict):
    """Answers that end at very different times, long prompts among short ones, more prompts than slots or fewer."""
    rng = random.Random(seed)
    model = pair(rng.choice(list(FAMILIES)))[1]
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, 9, 150]))] for _ in range(rng.randint(5, 20))]
    settings = {"stop_ids": rng.sample(range(VOCAB), rng.randint(1, 8)), "max_new_tokens": rng.choice([3, 60]), **sampling}
    alone = [greedy(model, [prompt], indices=[i], **settings)[0] for i, prompt in enumerate(prompts)]
    for batch_size in (1, 2, 5, 64):
        assert greedy(model, prompts, batch_size=batch_size, **settings) == alone, batch_size


@EVERY_FAMILY
def test_the_cache_grows_while_answers_do(family: str):
    """From a capacity of 1 token, several times; beside a prompt that comes in when others are under way."""
    model = pair(family)[1]
    prompts = [[7], [7, 8], [9]]
    assert greedy(model, prompts, 90, batch_size=2) == [recomputed(model, prompt, 90) for prompt in prompts]


def filled_cache(lengths: Sequence[int]) -> tuple[KVCache, list[list[Tensor]]]:
    """A cache whose slots hold random numbers, and for each slot what each layer holds [2, K, length, E]."""
    cache = KVCache(pair("llama3")[1].config, len(lengths) + 1, torch.float32, CPU)
    cache.lengths = list(lengths)
    cache.reserve(max(lengths))
    for kv in cache.layers:
        kv.normal_(generator=torch.Generator().manual_seed(0))
    return cache, [held(cache, slot) for slot in range(len(lengths))]


def held(cache: KVCache, slot: int) -> list[Tensor]:
    return [kv[:, slot, :, : cache.lengths[slot]].clone() for kv in cache.layers]


def assert_held(cache: KVCache, expected: list[list[Tensor]]) -> None:
    assert cache.lengths == [layers[0].shape[2] for layers in expected]
    for slot, layers in enumerate(expected):
        assert all(torch.equal(a, b) for a, b in zip(held(cache, slot), layers, strict=True)), slot


@pytest.mark.parametrize("slot", range(4))
@pytest.mark.parametrize("lengths", [[5, 3, 9, 7], [5, 9, 3, 1], [4, 4, 4, 4]], ids=str)
def test_giving_up_a_slot_keeps_the_others(lengths: list[int], slot: int):
    """The last one moves, whether it is longer or shorter than what it replaces."""
    cache, before = filled_cache(lengths)
    cache.free(slot)
    before[slot] = before[-1]
    assert_held(cache, before[:-1])
    cache.reserve(100)
    assert_held(cache, before[:-1])
    assert cache.layers[0].shape[3] >= 100
    while cache.lengths:
        cache.free(0)
    assert cache.lengths == []


def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by a second each time it is looked at."""
    seconds = iter(range(10**6))
    monkeypatch.setitem(minilora.generate.__globals__, "time", types.SimpleNamespace(monotonic=lambda: next(seconds)))


@pytest.mark.parametrize("batch_size", [3, 16])
@pytest.mark.parametrize("max_time", [1e-9, 1, 5, 12])
def test_what_max_time_leaves_is_the_beginning(max_time: float, batch_size: int, monkeypatch: pytest.MonkeyPatch):
    model, prompts = pair("llama3")[1], random_prompts(12, 20, seed=5)
    whole = generate_ids(model, prompts, tokenizer(), NEW_TOKENS, stop_ids=ENDS, batch_size=batch_size)
    clock(monkeypatch)
    cut = generate_ids(model, prompts, tokenizer(), NEW_TOKENS, stop_ids=ENDS, batch_size=batch_size, max_time=max_time)
    passes = max(0, -int(-max_time // 1) - 1)  # those that begin before
    assert max(len(answer.ids) for answer in cut) == passes
    for answer, full in zip(cut, whole, strict=True):
        if answer.finish_reason is None:
            assert answer.ids == full.ids[: len(answer.ids)] and answer.text == "" and answer.finish_reason is None
            assert len(answer.ids) < len(full.ids)
        else:
            assert answer == full
    assert any(answer.finish_reason is None for answer in cut)
    assert generate_ids(model, prompts, tokenizer(), NEW_TOKENS, stop_ids=ENDS) == whole  # and the model is none the worse


def assert_untouched(model: CausalLM, training: bool) -> None:
    assert all(module.training == training for module in model.modules())
    assert not [path for path, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("adapters", [True, False])
def test_however_it_ends_the_model_is_as_before(adapters: bool, training: bool, monkeypatch: pytest.MonkeyPatch):
    model = ours(pair("qwen2")[0])
    if adapters:
        inject(model, LoraConfig(rank=4, dropout=0.5))
        init_adapters(model, seed=0)
        randomise(model)
    model.train(training)
    prompts = random_prompts(6, 9)
    expected = greedy(model, prompts)
    assert_untouched(model, training)

    answers = stream(model, prompts, tokenizer(), NEW_TOKENS)
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    assert_untouched(model, training)

    answers = stream(model, prompts, tokenizer(), NEW_TOKENS)
    for _ in range(9):
        next(answers)
    assert torch.is_grad_enabled()  # between two answers the caller's own work goes on
    del answers
    assert_untouched(model, training)

    with pytest.raises(ZeroDivisionError):
        for i, _ in stream(model, prompts, tokenizer(), NEW_TOKENS):
            raise ZeroDivisionError(i)
    assert_untouched(model, training)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setitem(minilora.generate.__globals__, "sample", lambda *_: 1 / 0)
        greedy(model, prompts)
    assert_untouched(model, training)
    assert greedy(model, prompts) == expected


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9}, {"repetition_penalty": 1.3}], ids=str)
def test_passes_for_the_sake_of_others(settings: dict, monkeypatch: pytest.MonkeyPatch):
    """Where processes share a model, one whose answers have ended goes on with stand-ins until all have."""
    model, prompts = pair("llama3")[1], random_prompts(5, 20)
    alone = greedy(model, prompts, stop_ids=ENDS, **settings)
    for own in (prompts, []):
        waits = iter([False, False, False, True])  # once it is done, others are not, three times
        monkeypatch.setattr(dist, "everyone", lambda done, device, waits=waits: done and next(waits))
        assert greedy(model, own, stop_ids=ENDS, together=True, **settings) == alone[: len(own)]
        assert next(waits, None) is None


# --- arithmetic ---


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 17, FEW_ROWS, FEW_ROWS + 1])
@torch.no_grad()
def test_few_rows_are_as_exact_as_many(rows: int, bias: bool):
    """Within one bfloat16 rounding of the product and, where there is a bias, one of the sum."""
    generator = torch.Generator().manual_seed(rows)
    layer = nn.Linear(192, 80, bias=bias, dtype=torch.bfloat16)
    for p in layer.parameters():
        p.normal_(generator=generator)
    x = torch.randn(rows, 192, generator=generator).bfloat16()
    product = x.double() @ layer.weight.double().t()
    exact = product + layer.bias.double() if bias else product
    # 2^-8: half a unit in the last of 8 bits; sums in fp32 are off by far less
    bound = 2**-8 * (product.abs() * bias + exact.abs()) * 1.02 + 2**-18 * (x.double().abs() @ layer.weight.double().abs().t())
    assert ((_linear(x, layer.weight).double() - product).abs() <= 2**-8 * 1.02 * product.abs() + bound).all()
    plain = layer(x)
    few_rows(layer, True)
    assert "forward" in vars(layer)
    out = layer(x)
    assert out.shape == plain.shape and out.dtype == plain.dtype
    assert ((out.double() - exact).abs() <= bound).all() and ((plain.double() - exact).abs() <= bound).all()
    few_rows(layer, False)
    assert "forward" not in vars(layer) and torch.equal(layer(x), plain)


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_base_decodes_as_it_recomputes(bits: int, adapters: bool, tmp_path: Path):
    """In 8 bits without outliers: which features are multiplied in 16 bits is decided over all tokens of a pass."""
    base = tmp_path / "base"
    hf = tiny("mistral_v1", hidden_size=64, intermediate_size=128)
    for p in hf.parameters():
        p.data *= 0.4 if p.dim() > 1 else 1
    hf.save_pretrained(base)
    lora = LoraConfig(rank=4) if adapters else None
    model = build_model(base, CPU, lora=lora, bits=bits).model.eval()
    randomise(model)
    prompts = random_prompts(6, 3 * WINDOW, seed=6)
    expected = [recomputed(model, prompt, NEW_TOKENS) for prompt in prompts]
    for batch_size in (1, 4):
        assert greedy(model, prompts, batch_size=batch_size) == expected


# --- stop strings ---

STOPS = [" ", "\n", "한", "物", "🤖", "物理", "は🤖", "e ", ". ", "(x", "Art\n", "t", " -> ", "->", "1984", "あ", "\n\n", "한국"]
PIECES = [" Science", " -> Art\n", "서울 ", "한국어", "🤖🤖", " 物理学史の博物館", "、(x) ", "end. ", "1984\n\n", " the", "é"]


def random_answer(rng: random.Random, name: str, length: int) -> list[int]:
    """Ids of words, of fragments of words (so of characters), and of anything in the vocabulary but the end token."""
    tokens, ids = tokenizer_named(name), list[int]()
    plain = sorted(set(range(tokens.vocab_size)) - set(tokens.specials.values()))
    while len(ids) < length:
        piece = [i for i in tokens.encode(rng.choice(PIECES)).ids if i != tokens.bos_id]
        cut = sorted(rng.choices(range(len(piece) + 1), k=2)) if rng.random() < 0.5 else (0, len(piece))
        ids += piece[slice(*cut)] if rng.random() < 0.8 else rng.choices(plain, k=rng.randint(1, 3))
    return ids[:length]


def say(monkeypatch: pytest.MonkeyPatch, answers: Iterable[tuple[list[int], list[int]]], name: str, stop: Sequence[str]):
    """(ids, text, reason) of each answer when the model says these ids after these prompts, one after the other."""
    tokens, answers = tokenizer_named(name), list(answers)
    order = iter(sorted(range(len(answers)), key=lambda i: -len(answers[i][0])))
    ended: dict[int, tuple] = {}
    script(monkeypatch, answers[next(order)][1])
    length = max(len(ids) for _, ids in answers)
    prompts = [prompt for prompt, _ in answers]
    for i, answer in stream(model_over(tokens.vocab_size), prompts, tokens, length, stop=stop, batch_size=1):
        if answer.finish_reason:
            ended[i] = (answer.ids, answer.text, answer.finish_reason)
            script(monkeypatch, answers[next(order, i)][1])
    return [ended[i] for i in range(len(answers))]


def by_brute_force(name: str, prompt: list[int], ids: list[int], stop: Sequence[str]) -> tuple[list[int], str, str]:
    """The same, by decoding the whole answer after each token."""
    for n in range(1, len(ids) + 1):
        text = tokenizer_named(name).decode_after(prompt, ids[:n])
        if found := [text.index(s) for s in stop if s in text]:
            return ids[:n], text[: min(found)], "stop"
    return ids, text, "length"


@pytest.mark.parametrize("ask", ["in words", "after a special token", "out of nothing"])
@pytest.mark.parametrize("name", BUILDERS)
def test_no_stop_string_is_missed(name: str, ask: str, monkeypatch: pytest.MonkeyPatch):
    tokens, rng = tokenizer_named(name), random.Random(0)
    start = tokens.encode("Why? ->").ids
    special = next(i for i in tokens.specials.values() if i not in (tokens.bos_id, tokens.eos_id))
    prompt = {
        "in words": start,
        "after a special token": [*start, special],
        "out of nothing": [tokens.bos_id if tokens.bos_id is not None else special],
    }[ask]
    reasons = []
    for _ in range(12):
        stop = rng.sample(STOPS, rng.choice([1, 1, 2, 4]))
        answers = [(prompt, random_answer(rng, name, 20)) for _ in range(5)]
        expected = [by_brute_force(name, *answer, stop) for answer in answers]
        assert say(monkeypatch, answers, name, stop) == expected, stop
        reasons += [reason for _, _, reason in expected]
    assert 10 < reasons.count("stop") < 58


BYTES = " 👩‍👩‍👧‍👦🤖ᚠᚠ👨‍👩‍👧é🤖ꙮ🤖\n"  # characters of one to four bytes, for most of which no tokenizer has a token


@pytest.mark.parametrize("name", BUILDERS)
def test_stop_strings_in_long_runs_of_bytes(name: str, monkeypatch: pytest.MonkeyPatch):
    tokens, rng = tokenizer_named(name), random.Random(0)
    prompt = tokens.encode("Why? ->").ids
    ids = tokens.encode("Why? ->" + BYTES).ids[len(prompt) :]
    for _ in range(30):
        begin = rng.randrange(len(BYTES))
        stop = [BYTES[begin : begin + rng.randint(1, 4)]]
        expected = by_brute_force(name, prompt, ids, stop)
        assert expected[1:] == (BYTES[: BYTES.index(stop[0])], "stop")
        assert say(monkeypatch, [(prompt, ids)], name, stop) == [expected], stop
