"""The decoder against transformers': logits and gradients, with the same weights, in fp32."""

import itertools
import json
import random

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from helpers.tiny_models import (
    WINDOW,
    config_json,
    from_config_json,
    in_bfloat16,
    ours,
    random_tokens,
    tiny,
)

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
}
MSCALE = {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4}
TYPES = ["sliding_attention", "full_attention"]

# changes to the config.json of a model with the same weights
ROPES = {
    "default rope": {"rope_scaling": None},
    "default rope, other theta": {"rope_scaling": None, "rope_theta": 77},
    "default rope, theta absent": {"rope_scaling": None, "rope_theta": ...},
    "linear rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3 rope": {},
    "yarn": {"rope_scaling": YARN},
    "yarn, context absent": {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 3.0}},
    "yarn, context at top level": {
        "original_max_position_embeddings": 16,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 3.0},
    },
    "yarn, context at top level and inside": {
        "original_max_position_embeddings": 64,
        "rope_scaling": {**YARN, "factor": 3.0, "original_max_position_embeddings": 16},
    },
    "yarn, default betas": {"rope_scaling": {**YARN, "beta_fast": None, "beta_slow": None}},
    "yarn, factor null": {"max_position_embeddings": 96, "rope_scaling": {**YARN, "factor": None}},
    "yarn, attention_factor": {"rope_scaling": {**YARN, "attention_factor": 0.5}},
    "yarn, mscale": {"rope_scaling": MSCALE},
    "yarn, mscale and attention_factor": {"rope_scaling": {**MSCALE, "attention_factor": 0.6}},
    "yarn, not truncated": {"rope_scaling": {**YARN, "truncate": False}},
}

# family, changes to its config.json
CASES = {
    **{case: ("llama3", {"head_dim": 24, **changes}) for case, changes in ROPES.items()},
    "llama2": ("llama2", {}),
    "llama3": ("llama3", {}),
    "llama: odd eps": ("llama3", {"rms_norm_eps": 0.37}),
    "llama: eps absent": ("llama3", {"rms_norm_eps": ...}),
    "llama: kv heads absent": ("llama3", {"num_key_value_heads": ...}),
    "llama: kv heads null": ("llama3", {"num_key_value_heads": None}),
    "llama: attention_bias": ("llama3", {"attention_bias": True}),
    "llama: mlp_bias": ("llama3", {"mlp_bias": True}),
    "llama: tied": ("llama3", {"tie_word_embeddings": True}),
    "mistral v0.1": ("mistral_v1", {}),
    "mistral v0.1: window of one": ("mistral_v1", {"sliding_window": 1}),
    "mistral v0.1: layer_types change nothing": ("mistral_v1", {"layer_types": TYPES}),
    "mistral v0.2": ("mistral", {}),
    "mistral: head_dim": ("mistral", {"head_dim": 12}),
    "mistral: head_dim null": ("mistral", {"head_dim": None}),
    "mistral: kv heads absent": (
        "mistral",
        {"num_attention_heads": 16, "num_key_value_heads": ...},
    ),
    "mistral: yarn": ("mistral", {"rope_scaling": YARN}),
    "qwen2": ("qwen2", {}),
    "qwen2: windows": ("qwen2", {"use_sliding_window": True}),
    "qwen2: layer_types": ("qwen2", {"use_sliding_window": True, "layer_types": TYPES}),
    "qwen2: kv heads absent": (
        "qwen2",
        {"hidden_size": 64, "num_attention_heads": 32, "num_key_value_heads": ...},
    ),
    "qwen2: tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2: yarn": ("qwen2", {"rope_scaling": YARN}),
    "qwen3": ("qwen3", {}),
    "qwen3: windows": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3: layer_types": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": TYPES},
    ),
    "qwen3: head_dim absent": ("qwen3", {"head_dim": ..., "hidden_size": 16}),
    "qwen3: attention_bias": ("qwen3", {"attention_bias": True}),
    "qwen3: tied": ("qwen3", {"tie_word_embeddings": True}),
}


def reference(hf: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Compute transformers' logits [T, V] of one document."""
    return hf(tokens.unsqueeze(0)).logits.squeeze(0)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits(case: str, tmp_path):
    family, changes = CASES[case]
    written_by_4 = config_json(family, **changes)
    hf = from_config_json(written_by_4)
    hf.config.save_pretrained(tmp_path)
    written_by_5 = json.loads((tmp_path / "config.json").read_text())
    assert {"rope_parameters", "dtype"} <= written_by_5.keys()
    assert not {"rope_theta", "rope_scaling", "torch_dtype"} & written_by_5.keys()

    models = [ours(hf, raw) for raw in (written_by_4, written_by_5)]
    # 80 is longer than every window, original context and max_position_embeddings here
    for length in (1, 5, 80):
        tokens = random_tokens(length)
        expected = reference(hf, tokens)
        for model in models:
            assert_same(model(tokens), expected)


@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW, WINDOW + 1])
@pytest.mark.parametrize(
    "family, changes", [("mistral_v1", {}), ("qwen2", {"use_sliding_window": True})]
)
@torch.no_grad()
def test_window_boundary(family: str, changes: dict, length: int):
    hf, tokens = tiny(family, **changes), random_tokens(length)
    logits = ours(hf)(tokens)
    assert_same(logits, reference(hf, tokens))
    without = ours(hf, config_json(family, sliding_window=None))(tokens)
    changed = (logits - without).abs().amax(dim=-1) > 1e-3  # [T]: the rows that the window reaches
    assert changed.tolist() == [position >= WINDOW for position in range(length)]


@torch.no_grad()
def test_mistral_without_the_window_key_has_4096():
    small = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    hf, tokens = tiny("mistral", sliding_window=..., **small), random_tokens(4100)
    expected = reference(hf, tokens)
    assert_same(ours(hf, config_json("mistral", sliding_window=..., **small))(tokens), expected)
    without = ours(hf, config_json("mistral", sliding_window=None, **small))(tokens)
    assert_same(without[:4096], expected[:4096])
    assert (without - expected)[4096:].abs().max() > 1e-3


@torch.no_grad()
def test_every_rope_setting_changes_the_logits():
    """Check that no case above agrees with transformers only because its setting has no effect."""
    logits = [
        reference(tiny("llama3", head_dim=24, **changes), random_tokens(80))
        for changes in ROPES.values()
    ]
    for (i, first), (j, second) in itertools.combinations(enumerate(logits), 2):
        assert (first - second).abs().max() > 1e-2, (list(ROPES)[i], list(ROPES)[j])


PACKED = {
    "llama3": {},
    "mistral_v1": {},
    "qwen2": {"use_sliding_window": True},
    "qwen3": {"tie_word_embeddings": True},
}
LENGTHS = [
    [1],
    [1, 1, 1],
    [5, 1, 30, 8],
    [9, 8, 7, 1],
    [40, 3],
    random.Random(0).choices(range(1, 20), k=12),
]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("family", PACKED)
def test_packed_documents_equal_each_alone(family: str, lengths: list[int]):
    hf = tiny(family, **PACKED[family])
    model, tokens = ours(hf), random_tokens(sum(lengths))
    # any loss will do
    generator = torch.Generator().manual_seed(1)
    factors = torch.randn(len(tokens), hf.config.vocab_size, generator=generator)

    logits = model(tokens, lengths)
    (logits * factors).sum().backward()
    documents = zip(
        tokens.split(lengths), logits.split(lengths), factors.split(lengths), strict=True
    )
    for document, document_logits, factor in documents:
        alone = reference(hf, document)
        assert_same(document_logits, alone)
        (alone * factor).sum().backward()  # gradients add up over the documents

    expected = {name: parameter.grad for name, parameter in hf.named_parameters()}
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    largest = max(grad.abs().max().item() for grad in expected.values())
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        # in fp32 each side is off by up to 6e-6 of the largest gradient, measured against float64
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("family", ["llama3", "qwen2"])
def test_loss_of_tied_weights_and_both_gradients(family: str):
    hf = tiny(family, tie_word_embeddings=True)
    model, tokens = ours(hf), random_tokens(30)
    labels = torch.where(torch.arange(30) < 12, -100, tokens)
    loss = model(tokens, labels=labels)
    expected = F.cross_entropy(reference(hf, tokens)[:-1], labels[1:], reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)

    loss.backward()
    expected.backward()
    grads = {name: parameter.grad for name, parameter in hf.named_parameters()}
    for name, parameter in model.named_parameters():
        atol = 1e-5 * grads[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=atol, msg=name)


@torch.no_grad()
def test_bfloat16_is_as_exact_as_in_transformers():
    hf, hf_exact = in_bfloat16("llama3")
    tokens = random_tokens(60)
    exact = reference(hf_exact, tokens)
    their_error = (reference(hf, tokens).float() - exact).square().mean()
    our_error = (ours(hf)(tokens).float() - exact).square().mean()
    assert 0 < our_error < 1.5 * their_error
