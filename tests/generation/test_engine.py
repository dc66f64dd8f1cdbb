"""Decoding of many prompts together: what must not change an answer, and what must stay as it was.

Also collective decoding, and the keywords of `minilora.generate`.
"""

import itertools
import random
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import minilora
from helpers import tiny_tokenizers
from helpers.cuda_graphs import emulate_cuda_graphs
from helpers.decoding import (
    ENDS,
    EVERY_FAMILY,
    FAMILIES,
    decode,
    hf_model,
    model_of,
    prompts,
    random_prompts,
    randomize_adapters,
    sampling,
    tokenizer,
    tokenizer_named,
)
from helpers.sampling import nucleus
from helpers.tiny_models import VOCAB, WINDOW, ours, random_tokens, tiny
from minilora import distributed
from minilora.config import LoraConfig
from minilora.errors import UserError
from minilora.generation import engine, passes
from minilora.generation.engine import generate_ids, stream
from minilora.generation.sampling import SamplingParams
from minilora.model.lora import init_adapters, inject
from minilora.model.transformer import CausalLM

# --- what must not change an answer ---


@EVERY_FAMILY
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.9, "top_p": 0.8, "seed": 3}], ids=["greedy", "sampled"]
)
def test_the_batch_does_not_change_an_answer(family: str, settings: dict):
    model, params = model_of(family), sampling(ends=ENDS, **settings)
    alone = decode(model, prompts(), params, batch_size=1)
    assert len({tuple(ids) for ids in alone}) > 15
    for batch_size in (3, 16, 50):
        assert decode(model, prompts(), params, batch_size=batch_size) == alone
    last = range(7, len(prompts()))
    assert decode(model, prompts()[7:], params, indices=last) == alone[7:]


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.0, "top_p": 0.9, "top_k": 50}], ids=["greedy", "sampled"]
)
@pytest.mark.parametrize("seed", range(4))
def test_no_kind_of_batch_changes_an_answer(seed: int, settings: dict):
    """Very different lengths of prompts and answers, and more prompts than slots or fewer."""
    rng = random.Random(seed)
    model = model_of(rng.choice(list(FAMILIES)))
    given = [
        [rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, 9, 150]))]
        for _ in range(rng.randint(5, 20))
    ]
    ends = rng.sample(range(VOCAB), rng.randint(1, 8))
    params = sampling(rng.choice([3, 60]), ends, **settings)
    alone = [decode(model, [prompt], params, indices=[i])[0] for i, prompt in enumerate(given)]
    for batch_size in (1, 2, 5, 64):
        assert decode(model, given, params, batch_size=batch_size) == alone, batch_size


@pytest.mark.parametrize("max_new_tokens", [1, 2, 7])
def test_a_shorter_answer_is_the_beginning_of_a_longer_one(max_new_tokens: int):
    longer = decode(model_of("llama3"), prompts())
    shorter = decode(model_of("llama3"), prompts(), sampling(max_new_tokens))
    assert shorter == [ids[:max_new_tokens] for ids in longer]


def test_seeds():
    def sampled(seed: int, given: list[list[int]]) -> list[list[int]]:
        return decode(model_of("llama3"), given, sampling(temperature=1.0, seed=seed))

    first, second = sampled(1, prompts()), sampled(2, prompts())
    assert sampled(1, prompts()) == first
    differ = [a != b for a, b in zip(first, second, strict=True)]
    assert sum(differ) >= 18
    same_prompt = sampled(1, [prompts()[0]] * 10)  # as for several samples of one prompt
    assert len({tuple(ids) for ids in same_prompt}) >= 9


def test_draws_are_below_one(monkeypatch: pytest.MonkeyPatch):
    """A draw that is rounded to 1 would choose the least probable token."""

    class Largest:
        """A generator that gives nothing but the largest number there is below 1."""

        def __init__(self, seed: object):
            pass

        def random(self, size: object = None, dtype: type = np.float64):
            return np.nextafter(dtype(1), dtype(0))

    monkeypatch.setattr(np.random, "default_rng", Largest)
    model, prompt = model_of("llama3"), prompts()[0]
    (ids,) = decode(model, [prompt], sampling(1, temperature=0.5, top_p=0.5))
    with torch.no_grad():
        logits = model(torch.tensor(prompt))[-1]
    assert nucleus(logits, 0.5, 0.5)[ids[0]] > 0


# --- no prompts, empty prompts, no time ---


def test_no_prompts_no_answers():
    assert generate_ids(model_of("llama3"), [], tokenizer(), sampling(5)) == []
    assert minilora.generate(model_of("llama3"), tokenizer(), []) == []


def test_a_prompt_without_tokens_is_refused():
    """Nor must it take over the continuation of its neighbor."""
    with pytest.raises(UserError, match="empty"):
        generate_ids(model_of("llama3"), [[], *prompts()], tokenizer(), sampling(5))


def test_a_batch_of_none_is_refused():
    with pytest.raises(UserError, match="batch_size"):
        decode(model_of("llama3"), prompts(), batch_size=0)


def use_counting_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the clock of decoding go on by a second each time that it is looked at."""
    seconds = itertools.count()
    clock = types.SimpleNamespace(monotonic=lambda: next(seconds))
    monkeypatch.setattr(engine, "time", clock)


@pytest.mark.parametrize("batch_size", [3, 16])
@pytest.mark.parametrize("max_time", [1e-9, 1, 5, 12])
def test_max_time_leaves_the_beginnings_of_answers(
    max_time: float, batch_size: int, monkeypatch: pytest.MonkeyPatch
):
    model, given = model_of("llama3"), random_prompts(12, 20, seed=5)

    def answers(**settings) -> list[engine.Answer]:
        params = sampling(ends=ENDS, **settings)
        return generate_ids(model, given, tokenizer(), params, batch_size=batch_size)

    complete = answers()
    use_counting_clock(monkeypatch)
    cut = answers(max_time=max_time)
    num_passes = max(0, -int(-max_time // 1) - 1)  # those that begin before
    assert max(len(answer.ids) for answer in cut) == num_passes
    for answer, expected in zip(cut, complete, strict=True):
        if answer.finish_reason is None:
            assert answer.ids == expected.ids[: len(answer.ids)]
            assert answer.text == ""
            assert len(answer.ids) < len(expected.ids)
        else:
            assert answer == expected
    assert any(answer.finish_reason is None for answer in cut)
    assert answers() == complete  # the model is as before


# --- what must stay as it was ---


def assert_untouched(model: CausalLM, training: bool) -> None:
    """Check the mode of all modules, and that none has a `forward` of its own."""
    assert all(module.training == training for module in model.modules())
    assert not [path for path, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize(
    "adapters, training", [(False, False), (False, True), (True, False), (True, True)]
)
def test_however_it_ends_the_model_is_as_before(
    adapters: bool, training: bool, monkeypatch: pytest.MonkeyPatch
):
    model = ours(hf_model("qwen2"))
    if adapters:
        inject(model, LoraConfig(rank=4, dropout=0.5))
        init_adapters(model, seed=0)
        randomize_adapters(model)
    model.train(training)
    given = random_prompts(6, 9)
    expected = decode(model, given)
    assert_untouched(model, training)

    answers = stream(model, given, tokenizer(), sampling())
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    assert_untouched(model, training)

    answers = stream(model, given, tokenizer(), sampling())
    for _ in range(9):
        next(answers)
    assert torch.is_grad_enabled()  # between two answers the caller's own work goes on
    del answers
    assert_untouched(model, training)

    with pytest.raises(ZeroDivisionError):
        for i, _ in stream(model, given, tokenizer(), sampling()):
            raise ZeroDivisionError(i)
    assert_untouched(model, training)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(passes, "sample_tokens", lambda *_: 1 / 0)
        decode(model, given)
    assert_untouched(model, training)
    assert decode(model, given) == expected


def test_training_goes_on_unchanged_after_decoding():
    """Dropout is off while answers grow; gradients and torch's random numbers are left alone."""
    model = ours(hf_model("llama3"))
    inject(model, LoraConfig(rank=4, dropout=0.5))
    init_adapters(model, seed=0)
    randomize_adapters(model)
    expected = decode(model.eval(), prompts())
    assert not model.training
    state = torch.random.get_rng_state()
    assert decode(model.train(), prompts()) == expected
    assert model.training and torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


# --- processes that share a model ---


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.9}, {"repetition_penalty": 1.3}], ids=str
)
def test_placeholder_passes_for_other_processes(settings: dict, monkeypatch: pytest.MonkeyPatch):
    """A process whose answers have ended goes on with placeholders until all others are done."""
    model, given = model_of("llama3"), random_prompts(5, 20)
    params = sampling(ends=ENDS, **settings)
    alone = decode(model, given, params)
    for own in (given, []):
        # once this process is done, the others are not, three times
        others_are_done = iter([False, False, False, True])

        def all_agree(done: bool, device: torch.device, others=others_are_done) -> bool:
            return done and next(others)

        monkeypatch.setattr(distributed, "all_agree", all_agree)
        assert decode(model, own, params, collective=True) == alone[: len(own)]
        assert next(others_are_done, None) is None


# --- many passes between two looks of the host, and CUDA graphs ---


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.9, "top_k": 20}, {"repetition_penalty": 1.3}],
    ids=["greedy", "sampled", "penalized"],
)
@pytest.mark.parametrize("family", ["llama3", "mistral_v1"])
def test_passes_as_cuda_graphs(family: str, settings: dict, monkeypatch: pytest.MonkeyPatch):
    """Answers end between two looks, slots are padded, and the cache grows beyond its graphs."""
    model, params = model_of(family), sampling(40, ends=range(3), **settings)
    given = random_prompts(9, 3 * WINDOW, seed=3)
    expected = decode(model, given, params, batch_size=6)
    assert len({len(ids) for ids in expected}) > 3

    graphs = emulate_cuda_graphs(monkeypatch)
    monkeypatch.setattr(engine, "can_use_graphs", lambda *_: True)
    monkeypatch.setattr(passes, "GRAPH_PLACES", 16)
    for passes_per_read in (1, 8):
        monkeypatch.setattr(engine, "passes_per_read", lambda *_, n=passes_per_read: n)
        assert decode(model, given, params, batch_size=6) == expected
    assert graphs.num_replayed > 2 * graphs.num_recorded > 8


@pytest.mark.parametrize("seed", [1, 14, 18])
def test_graphs_are_forgotten_when_new_prompts_let_the_cache_grow(
    seed: int, monkeypatch: pytest.MonkeyPatch
):
    """Short prompts come one after the other; the cache grows in a pass that has one of them."""
    model, params = model_of("llama3"), sampling(60, ends=range(6))
    rng = random.Random(seed)
    lengths = [rng.randint(1, 6) for _ in range(14)]
    given = [random_tokens(n, seed=seed * 50 + i).tolist() for i, n in enumerate(lengths)]
    expected = decode(model, given, params, batch_size=3)

    emulate_cuda_graphs(monkeypatch)
    monkeypatch.setattr(engine, "can_use_graphs", lambda *_: True)
    monkeypatch.setattr(passes, "GRAPH_PLACES", 4)
    assert decode(model, given, params, batch_size=3) == expected


def test_superfluous_tokens_are_dropped(monkeypatch: pytest.MonkeyPatch):
    """Each answer grows by one token at a time, and by none after its end."""
    model, params = model_of("llama3"), sampling(13, ends=ENDS)
    expected = decode(model, prompts(), params)
    monkeypatch.setattr(engine, "passes_per_read", lambda *_: 8)
    grown: dict[int, list[int]] = {}
    for i, answer in stream(model, prompts(), tokenizer(), params, batch_size=3):
        grown.setdefault(i, []).append(len(answer.ids))
    for i, ids in enumerate(expected):
        assert grown[i] == list(range(1, len(ids) + 1))
    assert decode(model, prompts(), params, batch_size=3) == expected


def test_cudnn_attention_is_off_while_decoding(monkeypatch: pytest.MonkeyPatch):
    """It may plan anew for each length. Between two answers the caller's setting is back."""
    inside = []

    def note(logits: torch.Tensor, *_: object) -> torch.Tensor:
        inside.append(torch.backends.cuda.cudnn_sdp_enabled())
        return logits.argmax(-1)

    monkeypatch.setattr(passes, "sample_tokens", note)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    for _ in stream(model_of("llama3"), prompts()[:3], tokenizer(), sampling(4)):
        assert torch.backends.cuda.cudnn_sdp_enabled()
    assert inside == [False] * 4


# --- text in, text out ---

TEXTS = ["Science", "The history of", "a -> b\n", "서울 物理学", "1984.", "x"]


def test_keywords_are_sampling_settings(tmp_path: Path):
    """They replace the fields of `params`, and unknown ones are refused."""
    directory = shutil.copytree(tiny_tokenizers.llama3(), tmp_path / "base")
    tokens = tokenizer_named("llama3")
    tiny("llama3", vocab_size=tokens.vocab_size).save_pretrained(directory)
    model, tokens = minilora.load(str(directory), device="cpu")

    params = SamplingParams(max_new_tokens=9, temperature=0.8, top_p=0.9, seed=2)
    expected = minilora.generate(model, tokens, TEXTS, params)
    given = {"max_new_tokens": 9, "temperature": 0.8, "top_p": 0.9}
    assert minilora.generate(model, tokens, TEXTS, **given, seed=2) == expected
    assert minilora.generate(model, tokens, TEXTS, params, seed=3) != expected
    assert minilora.generate(model, tokens, TEXTS, params, batch_size=2) == expected
    stop = expected[0][2:4]
    stopped = minilora.generate(model, tokens, TEXTS[:1], params, stop=stop)
    assert stopped == [expected[0].partition(stop)[0]]
    with pytest.raises(TypeError, match="temprature"):
        minilora.generate(model, tokens, TEXTS, temprature=0.8)
    with pytest.raises(UserError, match="top_p"):
        minilora.generate(model, tokens, TEXTS, top_p=0.0)
