"""Generation against transformers' `generate`, softmax itself and brute force; and a model that has learnt to stop."""

import functools
import json
import random
import shutil
from collections.abc import Sequence
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
from minilora.config import Config, DataConfig, EvalConfig, LogConfig, LoraConfig, ModelConfig, TrainConfig, UserError
from minilora.generate import Answer, generate_ids, sample
from minilora.lora import adapter_state, init_adapters, inject, lora_layers
from minilora.model import CausalLM
from minilora.running.saving import save_adapter
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
    assert ids_of(model, prompts()[7:], stop_ids=ENDS, indices=range(7, len(prompts())), **sampling) == alone[7:]


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
    model = ours(hf_model("llama3"))
    inject(model, LoraConfig(rank=4, dropout=0.5))
    init_adapters(model, seed=0)
    randomise(model)
    expected = ids_of(model.eval(), prompts())
    assert not model.training
    state = torch.random.get_rng_state()
    assert ids_of(model.train(), prompts()) == expected  # without dropout
    assert model.training and torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def randomise(model: CausalLM) -> None:
    """Adapters that do something: B is zero at first."""
    generator = torch.Generator().manual_seed(1)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1, generator=generator)


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
    """Each token as often as its probability says, within 4 standard errors; the rarest may turn up once."""
    n = len(tokens)
    counts = torch.bincount(tokens, minlength=len(probabilities))
    sigma = (n * probabilities * (1 - probabilities)).sqrt()
    assert ((counts - n * probabilities).abs() <= 4 * sigma + 1).all(), (counts / n, probabilities)


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

SAID = " Science -> Art\n서울 🤖🤖🤖 物理学史の博物館と大学、(x) end 1984"
QUESTION = "Why? ->"
EVERY_TOKENIZER = pytest.mark.parametrize("name", tiny_tokenizers.BUILDERS)


@functools.cache
def tokenizer_named(name: str) -> Tokenizer:
    return Tokenizer(tiny_tokenizers.BUILDERS[name]())


@functools.cache
def model_over(vocab_size: int) -> CausalLM:
    """One whose vocabulary is a tokenizer's; what it would say is of no interest."""
    return ours(tiny("llama3", vocab_size=vocab_size, num_hidden_layers=1))


def said_ids(tokens: Tokenizer) -> list[int]:
    """The ids of SAID as an answer to QUESTION."""
    question, whole = tokens.encode(QUESTION).ids, tokens.encode(QUESTION + SAID).ids
    assert whole[: len(question)] == question
    return whole[len(question) :]


def script(monkeypatch: pytest.MonkeyPatch, ids: Sequence[int]) -> None:
    """Make the model say `ids`."""
    said = iter(ids)
    monkeypatch.setitem(minilora.generate.__globals__, "sample", lambda *_: torch.tensor([next(said)]))


def scripted(monkeypatch: pytest.MonkeyPatch, tokens: Tokenizer, ids: Sequence[int], stop: Sequence[str] = ()) -> Answer:
    """The answer to QUESTION when the model says `ids`."""
    script(monkeypatch, ids)
    (answer,) = generate_ids(model_over(tokens.vocab_size), [tokens.encode(QUESTION).ids], tokens, len(ids), stop=stop)
    return answer


@EVERY_TOKENIZER
def test_answers_end_before_a_stop_string(name: str, monkeypatch: pytest.MonkeyPatch):
    """Wherever it lies: inside a token, across several, across the bytes of characters; and nothing is generated after it."""
    tokens, rng = tokenizer_named(name), random.Random(0)
    question, ids = tokens.encode(QUESTION).ids, said_ids(tokens)
    cuts = [sorted(rng.sample(range(len(SAID) + 1), 2)) for _ in range(25)]
    for begin, end in [*cuts, (SAID.index("物"), SAID.index("、"))]:
        stop = SAID[begin:end]
        answer = scripted(monkeypatch, tokens, ids, stop=("not there", stop))
        assert answer.text == SAID[: SAID.index(stop)], repr(stop)
        needed = next(n for n in range(1, len(ids) + 1) if stop in tokens.decode_after(question, ids[:n]))
        assert answer.ids == ids[:needed] and answer.finish_reason == "stop", repr(stop)


@pytest.mark.parametrize("stop", [("end", "rt", "Ar"), ("Art\n", "Ar", "rt")])
def test_the_first_of_several_stop_strings_counts(stop: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    """The first in the text; two of them are complete with the same token."""
    tokens = tokenizer_named("qwen")
    assert scripted(monkeypatch, tokens, said_ids(tokens), stop=stop).text == " Science -> "


@EVERY_TOKENIZER
def test_a_stop_string_in_the_prompt_stops_nothing(name: str, monkeypatch: pytest.MonkeyPatch):
    tokens = tokenizer_named(name)
    assert scripted(monkeypatch, tokens, said_ids(tokens), stop=("Why", "? ->", "-> Sci")).text == SAID


@EVERY_TOKENIZER
def test_eos_ends_an_answer_and_is_not_in_its_text(name: str, monkeypatch: pytest.MonkeyPatch):
    tokens = tokenizer_named(name)
    assert tokens.eos_id is not None
    ids = [*said_ids(tokens), tokens.eos_id]
    answer = scripted(monkeypatch, tokens, [*ids, *ids])
    assert (answer.text, answer.ids, answer.finish_reason) == (SAID, ids, "stop")


def test_an_answer_that_does_not_end(monkeypatch: pytest.MonkeyPatch):
    tokens = tokenizer_named("qwen")
    answer = scripted(monkeypatch, tokens, said_ids(tokens)[:5])
    assert len(answer.ids) == 5 and answer.text and SAID.startswith(answer.text) and answer.finish_reason == "length"


def test_stop_ids_of_generation_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where several tokens end an answer, generation_config.json lists them; also one that is otherwise plain text."""
    directory = tiny_tokenizers.copy(tiny_tokenizers.llama3(), tmp_path / "tokenizer")
    tokens = Tokenizer(directory)
    plain, ids = tokens.encode("Q").ids[-1], said_ids(tokens)
    ends = [tokens.specials["<|end_of_text|>"], plain]
    for listed in (ends, ends[0]):
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
        for end in (tokens.eos_id, *ends):
            script(monkeypatch, [*ids, end, *ids, tokens.eos_id])
            expected = SAID if end != plain or listed == ends else f"{SAID}Q{SAID}"
            assert minilora.generate(model_over(tokens.vocab_size), tokens, [QUESTION]) == [expected]


# --- text in, text out ---

TEXTS = ["Science", "The history of", "a -> b\n", "서울 物理学", "1984.", "x"]
ONE_BOS = ["mistral", "llama2", "llama3"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories with tiny random models, each over the vocabulary of one of the tokenizers."""
    directories = {}
    for name, tokenizer_of in tiny_tokenizers.BUILDERS.items():
        directories[name] = shutil.copytree(tokenizer_of(), tmp_path_factory.mktemp("bases") / name)
        tokens = tokenizer_named(name)
        tiny("llama3", vocab_size=tokens.vocab_size, eos_token_id=tokens.eos_id).save_pretrained(directories[name])
    return directories


def continued(directory: Path, text: str, extra: Sequence[int] = ()) -> str:
    """The text with which transformers continues a text, `extra` ids before it."""
    hf, tokens = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    ids = [*extra, *tokens(text).input_ids]
    decode = functools.partial(tokens.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return decode(ids + theirs(hf, ids, [tokens.eos_token_id]))[len(decode(ids)) :]


@pytest.mark.parametrize("name", ["llama2", "llama3", "qwen"])
def test_texts_are_those_of_transformers(name: str, bases: dict[str, Path]):
    model, tokens = minilora.load(str(bases[name]), device="cpu")
    expected = [continued(bases[name], text) for text in TEXTS]
    assert minilora.generate(model, tokens, TEXTS, max_new_tokens=NEW_TOKENS) == expected


@pytest.mark.parametrize("name", ONE_BOS)
def test_exactly_one_bos(name: str, bases: dict[str, Path]):
    model, tokens = minilora.load(str(bases[name]), device="cpu")
    assert tokens.bos_token is not None and tokens.bos_id is not None

    def answers(before: str) -> list[str]:
        return minilora.generate(model, tokens, [before + text for text in TEXTS], max_new_tokens=NEW_TOKENS)

    assert answers("") == answers(tokens.bos_token)
    if name != "mistral":  # sentencepiece and tokenizers write the invalid UTF-8 of a random model differently
        assert answers("")[0] == continued(bases[name], TEXTS[0])
        assert answers("")[0] != continued(bases[name], TEXTS[0], extra=[tokens.bos_id])  # two would be noticed


def test_a_live_adapter_says_what_the_merged_model_says(bases: dict[str, Path], tmp_path: Path):
    base, lora = bases["llama3"], LoraConfig(rank=4, alpha=8)
    model = build_model(base, CPU, lora=lora).model
    randomise(model)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_adapter(adapter, adapter_state(model), lora, Config(model=ModelConfig(name=str(base))))
    assert merge.main(merge.Args(str(adapter))) == 0

    def answers(*args: str, **options) -> list[str]:
        return minilora.generate(*minilora.load(*args, device="cpu"), TEXTS, max_new_tokens=NEW_TOKENS, **options)

    for options in ({}, {"temperature": 0.7, "top_p": 0.9, "seed": 5}):
        live = answers(str(base), str(adapter), **options)
        assert live == answers(str(adapter), **options) == answers(str(adapter / "merged"), **options)
        assert live != answers(str(base), **options)


# --- a model that has learnt to stop ---


def overfit(base: Path, tmp_path: Path) -> tuple[Path, list[dict]]:
    """Train a tiny Mistral with the tokenizer in `base` until it knows 50 rows by heart; its directory, and the rows."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.05}
    tokens = Tokenizer(base)
    raw = config_json("mistral", vocab_size=tokens.vocab_size, eos_token_id=tokens.eos_id, **sizes)
    (base / "config.json").write_text(json.dumps(raw))
    rng = random.Random(0)
    words = " ".join(tiny_tokenizers.corpus()[::4]).split()
    rows = [{"prompt": f"question {i}", "completion": " ".join(rng.choices(words, k=rng.randint(1, 5)))} for i in range(50)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    config = Config(
        output_dir=str(out), method="full", model=ModelConfig(name=str(base), init="random"),
        data=DataConfig(train_file=str(tmp_path / "rows.jsonl"), format="prompt"),
        train=TrainConfig(
            max_steps=240, batch_size=25, learning_rate=3e-3, lr_scheduler="cosine", warmup_steps=10,
            gradient_checkpointing=False,
        ),
        eval=EvalConfig(eval_steps=1000, num_generate_samples=0), log=LogConfig(tensorboard=False),
    )  # fmt: skip
    assert train.main(config) == 0
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert next(row["loss"] for row in reversed(metrics) if "loss" in row) < 0.05
    return out / "checkpoint-final", rows


def assert_all_end(directory: Path, rows: list[dict], end: str) -> None:
    """Each answer is the row's completion and `end`, and generation stops there: ours, and by what the files say elsewhere."""
    model, tokens = minilora.load(str(directory), device="cpu")
    asked = [tokens.render([{"role": "user", "content": row["prompt"]}], add_generation_prompt=True) for row in rows]
    ids = [tokens.encode(text).ids for text in asked]
    answers = generate_ids(model, ids, tokens, max_new_tokens=50, stop_ids=tokens.stop_ids())
    assert [answer.text for answer in answers] == [row["completion"] for row in rows]
    assert all(answer.finish_reason == "stop" and answer.ids[-1] == tokens.specials[end] for answer in answers)
    assert minilora.generate(model, tokens, asked, max_new_tokens=50) == [row["completion"] for row in rows]

    hf = AutoModelForCausalLM.from_pretrained(directory)
    for prompt, answer in list(zip(ids, answers, strict=True))[:10]:
        out = hf.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=50)
        assert out[0, len(prompt) :].tolist() == answer.ids


def test_an_overfit_model_stops_by_itself(tmp_path: Path):
    """Though pad_token == eos_token, which trainers that pad never teach."""
    base = tiny_tokenizers.copy(tiny_tokenizers.llama2(), tmp_path / "base", pad_token="</s>")
    assert_all_end(*overfit(base, tmp_path), end="</s>")


def test_a_model_trained_to_end_turns_stops_after_its_turn(tmp_path: Path):
    """The template of Qwen's base models ends a turn with <|im_end|>, while their EOS, <|endoftext|>, ends a document."""
    base = tiny_tokenizers.copy(tiny_tokenizers.qwen(), tmp_path / "base", eos_token="<|endoftext|>")
    assert_all_end(*overfit(base, tmp_path), end="<|im_end|>")
