"""minilora's decoder against transformers': logits and gradients, with the same weights, in fp32."""

import functools
import itertools
import json
import random

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import CONFIG_MAPPING, PreTrainedModel

from minilora.config import LoraConfig, UserError
from minilora.lora import init_adapters, inject, lora_layers
from minilora.model import CausalLM, DecoderConfig
from tiny_models import FAMILIES, WINDOW, config_json, from_config_json, in_bfloat16, ours, random_tokens, tiny

YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 4.0, "beta_slow": 0.5,
}  # fmt: skip
MSCALE = {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4}
TYPES = ["sliding_attention", "full_attention"]

# what is changed in a config.json with the same weights
ROPES = {
    "default rope": {"rope_scaling": None},
    "default rope, other theta": {"rope_scaling": None, "rope_theta": 77},
    "default rope, theta absent": {"rope_scaling": None, "rope_theta": ...},
    "linear rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3 rope": {},
    "yarn": {"rope_scaling": YARN},
    "yarn, context absent": {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 3.0}},
    "yarn, context at top level": {
        "original_max_position_embeddings": 16, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 3.0},
    },
    "yarn, default betas": {"rope_scaling": {**YARN, "beta_fast": None, "beta_slow": None}},
    "yarn, factor null": {"max_position_embeddings": 96, "rope_scaling": {**YARN, "factor": None}},
    "yarn, attention_factor": {"rope_scaling": {**YARN, "attention_factor": 0.5}},
    "yarn, mscale": {"rope_scaling": MSCALE},
    "yarn, mscale and attention_factor": {"rope_scaling": {**MSCALE, "attention_factor": 0.6}},
    "yarn, not truncated": {"rope_scaling": {**YARN, "truncate": False}},
}  # fmt: skip

# family, what is changed in its config.json
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
    "mistral: kv heads absent": ("mistral", {"num_attention_heads": 16, "num_key_value_heads": ...}),
    "mistral: yarn": ("mistral", {"rope_scaling": YARN}),
    "qwen2": ("qwen2", {}),
    "qwen2: windows": ("qwen2", {"use_sliding_window": True}),
    "qwen2: layer_types": ("qwen2", {"use_sliding_window": True, "layer_types": TYPES}),
    "qwen2: kv heads absent": ("qwen2", {"hidden_size": 64, "num_attention_heads": 32, "num_key_value_heads": ...}),
    "qwen2: tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2: yarn": ("qwen2", {"rope_scaling": YARN}),
    "qwen3": ("qwen3", {}),
    "qwen3: windows": ("qwen3", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3: layer_types": ("qwen3", {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": TYPES}),
    "qwen3: head_dim absent": ("qwen3", {"head_dim": ..., "hidden_size": 16}),
    "qwen3: attention_bias": ("qwen3", {"attention_bias": True}),
    "qwen3: tied": ("qwen3", {"tie_word_embeddings": True}),
}


def reference(hf: PreTrainedModel, tokens: Tensor) -> Tensor:
    """transformers' logits [T, V] of one document."""
    return hf(tokens.unsqueeze(0)).logits.squeeze(0)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("spelling", ["transformers 4", "transformers 5"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits(case: str, spelling: str, tmp_path):
    family, changes = CASES[case]
    raw = config_json(family, **changes)
    hf = from_config_json(raw)
    if spelling == "transformers 5":
        hf.config.save_pretrained(tmp_path)
        raw = json.loads((tmp_path / "config.json").read_text())
        assert "rope_parameters" in raw and "dtype" in raw and not {"rope_theta", "rope_scaling", "torch_dtype"} & raw.keys()
    model = ours(hf, raw)
    for length in (1, 5, 80):  # 80 is beyond every window, original context and max_position_embeddings here
        tokens = random_tokens(length)
        assert_same(model(tokens), reference(hf, tokens))


@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW, WINDOW + 1])
@pytest.mark.parametrize("family, changes", [("mistral_v1", {}), ("qwen2", {"use_sliding_window": True})])
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
def test_every_rope_setting_is_visible_in_the_logits():
    """Else two of the cases above could agree with transformers only because their setting changes nothing here."""
    logits = [reference(tiny("llama3", head_dim=24, **changes), random_tokens(80)) for changes in ROPES.values()]
    for (i, first), (j, second) in itertools.combinations(enumerate(logits), 2):
        assert (first - second).abs().max() > 1e-2, (list(ROPES)[i], list(ROPES)[j])


PACKED = {
    "llama3": {},
    "mistral_v1": {},
    "qwen2": {"use_sliding_window": True},
    "qwen3": {"tie_word_embeddings": True},
}
LENGTHS = [[1], [1, 1, 1], [5, 1, 30, 8], [9, 8, 7, 1], [40, 3], random.Random(0).choices(range(1, 20), k=12)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("family", PACKED)
def test_packed_documents_equal_each_alone(family: str, lengths: list[int]):
    hf = tiny(family, **PACKED[family])
    model, tokens = ours(hf), random_tokens(sum(lengths))
    factors = torch.randn(len(tokens), hf.config.vocab_size, generator=torch.Generator().manual_seed(1))  # any loss will do

    logits = model(tokens, lengths)
    (logits * factors).sum().backward()
    for document, row, factor in zip(tokens.split(lengths), logits.split(lengths), factors.split(lengths), strict=True):
        alone = reference(hf, document)
        assert_same(row, alone)
        (alone * factor).sum().backward()  # gradients add up over the documents

    expected = {name: parameter.grad for name, parameter in hf.named_parameters()}
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    largest = max(grad.abs().max().item() for grad in expected.values())
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        # in fp32 both sides are off by up to 6e-6 of the largest gradient, measured against float64 on one CPU
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5 * largest, msg=name)


@torch.no_grad()
def test_documents_do_not_see_each_other(llama: CausalLM):
    tokens, lengths = random_tokens(30), [10, 1, 19]
    before = llama(tokens, lengths)
    tokens[10] = (tokens[10] + 1) % llama.config.vocab_size  # the whole of the second document
    after = llama(tokens, lengths)
    assert torch.equal(before[:10], after[:10]) and torch.equal(before[11:], after[11:])
    assert not torch.equal(before[10], after[10])


REFUSED = {
    "model_type": {"model_type": "gpt2"},
    "model_type: moe": {"model_type": "mixtral"},
    "model_type: absent": {"model_type": ...},
    "rope_type: dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "rope_type: longrope": {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
    "hidden_act": {"hidden_act": "gelu"},
    "attention_dropout": {"attention_dropout": 0.1},
    "auto_map": {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}},
    "quantization_config": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "pretraining_tp": {"pretraining_tp": 2},
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    "partial_rotary_factor: v5": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "num_key_value_heads": {"num_key_value_heads": 3},
    "layer_types": {"model_type": "qwen2", "layer_types": ["full_attention"]},
    "hidden_size": {"hidden_size": ...},
    "num_attention_heads": {"num_attention_heads": ...},
    "num_hidden_layers": {"num_hidden_layers": ...},
    "vocab_size": {"vocab_size": ...},
    "intermediate_size": {"intermediate_size": ...},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_other_arithmetic_is_refused_by_name(case: str):
    with pytest.raises(UserError) as error:
        DecoderConfig.from_hf(config_json("llama2", **REFUSED[case]), "some/config.json")
    field = case.split(":")[0]
    assert field in str(error.value) and "some/config.json" in str(error.value)


def test_unknown_keys_are_reported():
    raw = config_json("llama3", attn_logit_softcapping=30.0, a_new_scale=2)
    assert DecoderConfig.from_hf(raw).unknown_keys == ("a_new_scale", "attn_logit_softcapping")


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_of_transformers_are_known(family: str):
    config = CONFIG_MAPPING[FAMILIES[family]["model_type"]].from_dict(FAMILIES[family])
    for raw in (FAMILIES[family], config.to_dict(), config.to_diff_dict()):
        assert DecoderConfig.from_hf(raw).unknown_keys == ()


def _with_adapters(hf: PreTrainedModel) -> CausalLM:
    model = ours(hf).train()
    inject(model, LoraConfig(rank=4, dropout=0.2))
    init_adapters(model, seed=0)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(1))  # so that A has a gradient
    return model


def _gradients(model: CausalLM) -> dict[str, Tensor]:
    torch.manual_seed(0)  # dropout
    model(random_tokens(40), [25, 15]).logsumexp(dim=-1).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_checkpointed_blocks_give_the_same_gradients(hf_llama: PreTrainedModel):
    """With everything but the adapters frozen, the input of a checkpointed block does not require grad."""
    model, plain = _with_adapters(hf_llama), _with_adapters(hf_llama)
    runs: list[int] = []
    for layer, block in enumerate(model.model.layers):
        block.input_layernorm.register_forward_hook(lambda *_, layer=layer: runs.append(layer))
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    grads, expected = _gradients(model), _gradients(plain)
    assert sorted(runs) == [0, 0, 1, 1]  # each block ran again in the backward pass
    assert len(grads) == 2 * 2 * 7 and grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert torch.equal(grad, expected[name]) and grad.abs().max() > 0, name


@torch.no_grad()
def test_bfloat16_is_as_exact_as_in_transformers():
    (hf, hf_exact), tokens = in_bfloat16("llama3"), random_tokens(60)
    exact = reference(hf_exact, tokens)
    theirs, mine = ((logits.float() - exact).square().mean() for logits in (reference(hf, tokens), ours(hf)(tokens)))
    assert 0 < mine < 1.5 * theirs
