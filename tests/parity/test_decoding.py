"""Decoding against transformers and PEFT: tokens, texts, adapters, probabilities of draws."""

import functools
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.generation.logits_process import (
    LogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import merge
import minilora
from helpers import tiny_tokenizers
from helpers.checkpoints import random_adapter
from helpers.decoding import (
    ENDS,
    EVERY_FAMILY,
    FAMILIES,
    NEW_TOKENS,
    decode,
    hf_model,
    model_of,
    random_prompts,
    sampling,
    tokenizer_named,
    transformers_ids,
)
from helpers.sampling import FILTERS, occurrences
from helpers.tiny_models import WINDOW, in_bfloat16, ours, tiny
from minilora.config import LoraConfig
from minilora.generation.sampling import (
    MAX_CANDIDATES,
    SamplingParams,
    apply_repetition_penalty,
    sample_tokens,
)
from minilora.model.lora import merge_adapters

LORA = LoraConfig(rank=4, alpha=6, rslora=True)


# --- the same tokens as transformers ---


@EVERY_FAMILY
def test_greedy_ids_in_any_batch(family: str):
    hf, model = hf_model(family), model_of(family)
    prompts = random_prompts(50, 5 * WINDOW, seed=list(FAMILIES).index(family))
    assert sum(len(prompt) > WINDOW for prompt in prompts) > 35
    expected = [transformers_ids(hf, prompt, ENDS) for prompt in prompts]
    lengths = [len(ids) for ids in expected]
    assert len(set(lengths)) > 5 and NEW_TOKENS in lengths and min(lengths) < 4

    params = sampling(ends=ENDS)
    for batch_size in (1, 3, 16):
        assert decode(model, prompts, params, batch_size=batch_size) == expected
    order = list(range(len(prompts)))
    for shuffled in (order[::-1], random.Random(0).sample(order, len(order))):
        answers = decode(model, [prompts[i] for i in shuffled], params)
        assert answers == [expected[i] for i in shuffled]


ROPES: dict[str, dict] = {
    "linear": {"type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
    },
}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", ["mistral_v1", "qwen2"])
def test_scaled_rope_far_beyond_window_and_context(family: str, rope: str):
    changes = {**FAMILIES[family], "rope_theta": 500.0, "max_position_embeddings": 16}
    hf = tiny(family, **changes, rope_scaling=ROPES[rope])
    prompts = [*random_prompts(2, 2 * WINDOW, seed=1), [5]]
    expected = [transformers_ids(hf, prompt, [], 60) for prompt in prompts]
    assert decode(ours(hf), prompts, sampling(60)) == expected
    unscaled = tiny(family, **changes)
    assert decode(ours(unscaled), prompts, sampling(60)) != expected  # scaling decides some token


@EVERY_FAMILY
def test_bfloat16_mostly_agrees(family: str):
    """Rounding may turn a close choice, and all that follows.

    Tokens are compared up to the first that differs. Both must then be about as probable without
    rounding.
    """
    hf, exact = in_bfloat16(family)
    prompts = random_prompts(25, 3 * WINDOW, seed=2)
    num_same = 0
    for prompt, ids in zip(prompts, decode(ours(hf), prompts), strict=True):
        expected = transformers_ids(hf, prompt, [])
        assert len(ids) == len(expected) == NEW_TOKENS
        n = 0
        while n < NEW_TOKENS and ids[n] == expected[n]:
            n += 1
        num_same += n
        if n < NEW_TOKENS:
            with torch.no_grad():
                logits = exact(torch.tensor([prompt + ids[:n]])).logits[0, -1]
            assert (logits[ids[n]] - logits[expected[n]]).abs() < 0.5 * logits.std()
    assert num_same > 0.5 * NEW_TOKENS * len(prompts)


@pytest.mark.parametrize("penalty", [0.8, 1.3])
def test_penalized_answers(penalty: float):
    hf, model = tiny("llama3"), model_of("llama3")
    hf.generation_config.repetition_penalty = penalty
    prompts = random_prompts(12, 3 * WINDOW, seed=4)
    expected = [transformers_ids(hf, prompt, ENDS) for prompt in prompts]
    params = sampling(ends=ENDS, repetition_penalty=penalty)
    for batch_size in (1, 5):
        assert decode(model, prompts, params, batch_size=batch_size) == expected
    assert decode(model, prompts, sampling(ends=ENDS)) != expected


# --- the same texts ---

TEXTS = ["Science", "The history of", "a -> b\n", "서울 物理学", "1984.", "x"]
ONE_BOS = ["mistral", "llama2", "llama3"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write tiny random models, each over the vocabulary of one of the tokenizers."""
    directories = {}
    for name, make_tokenizer in tiny_tokenizers.BUILDERS.items():
        directory = tmp_path_factory.mktemp("bases") / name
        shutil.copytree(make_tokenizer(), directory)
        tokens = tokenizer_named(name)
        hf = tiny("llama3", vocab_size=tokens.vocab_size, eos_token_id=tokens.eos_id)
        hf.save_pretrained(directory)
        directories[name] = directory
    return directories


def transformers_text(directory: Path, text: str, extra: Sequence[int] = ()) -> str:
    """Return the text with which transformers continues a text, `extra` ids before it."""
    hf = AutoModelForCausalLM.from_pretrained(directory)
    tokens = AutoTokenizer.from_pretrained(directory)
    ids = [*extra, *tokens(text).input_ids]
    decode_ids = functools.partial(
        tokens.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    answer = transformers_ids(hf, ids, [tokens.eos_token_id])
    return decode_ids(ids + answer)[len(decode_ids(ids)) :]


@pytest.mark.parametrize("name", ["llama2", "llama3", "qwen"])
def test_texts(name: str, bases: dict[str, Path]):
    model, tokens = minilora.load(str(bases[name]), device="cpu")
    expected = [transformers_text(bases[name], text) for text in TEXTS]
    assert minilora.generate(model, tokens, TEXTS, max_new_tokens=NEW_TOKENS) == expected


@pytest.mark.parametrize("name", ONE_BOS)
def test_exactly_one_bos(name: str, bases: dict[str, Path]):
    model, tokens = minilora.load(str(bases[name]), device="cpu")
    assert tokens.bos_token is not None and tokens.bos_id is not None

    def answers(before: str) -> list[str]:
        texts = [before + text for text in TEXTS]
        return minilora.generate(model, tokens, texts, max_new_tokens=NEW_TOKENS)

    assert answers("") == answers(tokens.bos_token)
    # sentencepiece and tokenizers write the invalid UTF-8 of a random model differently
    if name != "mistral":
        assert answers("")[0] == transformers_text(bases[name], TEXTS[0])
        with_two = transformers_text(bases[name], TEXTS[0], extra=[tokens.bos_id])
        assert answers("")[0] != with_two  # a second BOS would be noticed


# --- adapters ---


def write_base(hf: PreTrainedModel, directory: Path) -> Path:
    """Write a model, and a tokenizer, in HF layout."""
    shutil.copytree(tiny_tokenizers.llama3(), directory)
    hf.save_pretrained(directory)
    return directory


def merged(adapter: Path) -> Path:
    """Run merge.py, and return the directory that it wrote."""
    assert merge.main(merge.Args(str(adapter))) == 0
    return adapter / "merged"


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """Return all tensors of a model that is one file."""
    return load_file(directory / "model.safetensors")


def update_of(adapter: Path, name: str) -> Tensor | int:
    """Return scaling * B @ A of a weight in float64, from the adapter's file; 0 if it has none."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    path = f"base_model.model.{name.removesuffix('.weight')}"
    if f"{path}.lora_A.weight" not in tensors:
        return 0
    a = tensors[f"{path}.lora_A.weight"].double()
    b = tensors[f"{path}.lora_B.weight"].double()
    return LORA.alpha / LORA.rank**0.5 * b @ a


@EVERY_FAMILY
def test_live_merged_and_saved_adapters_say_the_same(family: str, tmp_path: Path):
    tied = {"tie_word_embeddings": family == "qwen3"}
    base = write_base(tiny(family, **FAMILIES[family], **tied), tmp_path / "base")
    adapter = random_adapter(base, tmp_path / "adapter", LORA)
    prompts, params = random_prompts(20, 3 * WINDOW, seed=3), sampling(ends=ENDS)

    model, _ = minilora.load(str(adapter), device="cpu")
    expected = decode(model, prompts, params)
    merge_adapters(model)
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name in names if "lora" in name or "base_layer" in name]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merge_adapters(model)  # there is nothing left to merge
    assert state.keys() == model.state_dict().keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert decode(model, prompts, params) == expected

    saved, _ = minilora.load(str(merged(adapter)), device="cpu")
    assert decode(saved, prompts, params) == expected
    hf = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    hf = hf.merge_and_unload()
    assert [transformers_ids(hf, prompt, ENDS) for prompt in prompts] == expected
    without, _ = minilora.load(str(base), device="cpu")
    assert decode(without, prompts, params) != expected


@EVERY_FAMILY
def test_merging_in_bfloat16_gives_the_weights_of_merge(family: str, tmp_path: Path):
    base = write_base(in_bfloat16(family)[0], tmp_path / "base")
    adapter = random_adapter(base, tmp_path / "adapter", LORA)
    model, _ = minilora.load(str(adapter), device="cpu")
    merge_adapters(model)
    written, state = tensors_of(merged(adapter)), model.state_dict()
    assert state.keys() == written.keys()
    for name, tensor in state.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, written[name])

    before = tensors_of(base)
    for name, tensor in state.items():  # rounded once
        exact = before[name].double() + update_of(adapter, name)
        assert ((tensor.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()
    changed = [name for name in before if not torch.equal(state[name], before[name])]
    assert len(changed) == 2 * 7  # the linear layers of two blocks


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.7, "top_p": 0.9, "seed": 5}], ids=["greedy", "sampled"]
)
def test_an_adapter_says_the_same_however_it_is_named(
    settings: dict, bases: dict[str, Path], tmp_path: Path
):
    """Beside its base, by itself, and merged."""
    base = bases["llama3"]
    adapter = random_adapter(base, tmp_path / "adapter", LoraConfig(rank=4, alpha=8))

    def answers(*names: str) -> list[str]:
        model, tokens = minilora.load(*names, device="cpu")
        return minilora.generate(model, tokens, TEXTS, max_new_tokens=NEW_TOKENS, **settings)

    live = answers(str(base), str(adapter))
    assert live == answers(str(adapter)) == answers(str(merged(adapter)))
    assert live != answers(str(base))


# --- the probabilities of draws ---


def reference_probabilities(
    logits: Tensor, params: SamplingParams, seen: Sequence[Sequence[int]]
) -> Tensor:
    """Return transformers' probabilities [S, V] in float64 after tokens `seen`."""
    steps: list[LogitsProcessor] = []
    if params.repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    steps.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        steps.append(TopPLogitsWarper(params.top_p))
    scores = logits.clone()
    for step in steps:
        scores = step(torch.tensor(seen), scores)
    return scores.double().softmax(-1)


def assert_drawn(logits: Tensor, expected: Tensor, params: SamplingParams) -> None:
    """Check that draws on a grid give each token as often as its share, to one draw.

    And each group of the most probable tokens, too.
    """
    n = 1000
    grid = (torch.arange(n) + 0.5) / n
    tokens = sample_tokens(logits.expand(n, -1), params, grid)
    counts = torch.bincount(tokens, minlength=len(logits))
    assert not counts[expected == 0].any(), "a token outside"
    assert (counts - n * expected).abs().max() <= 1.01
    order = expected.argsort(descending=True)
    assert (counts[order].cumsum(0) - n * expected[order].cumsum(0)).abs().max() <= 1.01


@pytest.mark.parametrize("settings", FILTERS, ids=str)
@pytest.mark.parametrize(
    ("vocabulary", "spread"), [(50, 2.0), (50, 0.01), (5000, 4.0), (5000, 1.0), (5000, 0.01)]
)
def test_draws(vocabulary: int, spread: float, settings: tuple):
    temperature, top_k, top_p, penalty = settings
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty
    )
    generator = torch.Generator().manual_seed(vocabulary)
    logits = spread * torch.randn(1, vocabulary, generator=generator)
    seen = torch.randint(vocabulary, (1, 30), generator=generator).tolist()
    expected = reference_probabilities(logits, params, seen)[0]
    if spread < 1 and vocabulary > MAX_CANDIDATES and not top_k and top_p > 0.1:
        assert (expected > 0).sum() > MAX_CANDIDATES, "the whole vocabulary must be looked at"
    if penalty != 1.0:
        apply_repetition_penalty(logits, occurrences(seen, vocabulary), penalty)
    assert_drawn(logits[0], expected, params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("penalty", [0.5, 1.1, 1.3, 2.0])
def test_penalized_logits(penalty: float, dtype: torch.dtype):
    """Of tokens once or often seen, with logits of either sign or zero."""
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(5, 60, generator=generator)).to(dtype)
    logits[:, ::7] = 0
    ids = torch.randint(30, (5, 40), generator=generator)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    apply_repetition_penalty(logits, occurrences(ids.tolist(), 60), penalty)
    assert torch.equal(logits, expected)
