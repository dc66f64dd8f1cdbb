"""Adapters: targets, initial values, what is trained, merging. PEFT is compared with in parity/."""

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from helpers.tiny_models import ours, random_tokens, tiny
from minilora.config import LoraConfig
from minilora.errors import UserError
from minilora.model.lora import (
    LoRALinear,
    init_adapters,
    inject,
    lora_layers,
    merge_adapters,
    merged_weight,
)
from minilora.model.transformer import CausalLM

TOKENS = random_tokens(40)


def adapter_tensors(model: CausalLM) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if ".lora_" in name}


def with_random_adapters(model: CausalLM, lora: LoraConfig) -> CausalLM:
    """Add adapters to a model that change what it computes."""
    inject(model, lora)
    init_adapters(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.1, generator=generator)
    return model.eval()


# ---- targets


# targets -> words of the message
UNTRAINABLE = {
    ("q_prj",): ("q_prj", "did you mean 'q_proj'"),
    # PEFT would train v_proj alone, silently
    ("v_proj", "gate_porj"): ("gate_porj", "did you mean 'gate_proj'"),
    ("gate_porj", "v_proj"): ("gate_porj", "did you mean 'gate_proj'"),
    ("query_key_value_of_gpt",): ("query_key_value_of_gpt", "linear layers are down_proj, "),
    ("proj",): ("proj",),  # a part of a name is not a name
    ("self_attn",): ("self_attn", "linear"),
    ("input_layernorm",): ("input_layernorm", "linear"),
    ("embed_tokens",): ("embed_tokens", "linear"),
    ("lm_head",): ("lm_head",),
    ("q_proj", "lm_head"): ("lm_head",),
}


@pytest.mark.parametrize("targets", UNTRAINABLE, ids=str)
def test_targets_that_cannot_be_trained_are_refused(targets: tuple[str, ...], llama: CausalLM):
    with pytest.raises(UserError) as error:
        inject(llama, LoraConfig(target_modules=targets))
    for word in ("lora.target_modules", *UNTRAINABLE[targets]):
        assert word in str(error.value)


def test_a_layer_named_twice_is_wrapped_once(llama: CausalLM):
    targets = ("q_proj", "self_attn.q_proj", "model.layers.0.self_attn.q_proj")
    inject(llama, LoraConfig(target_modules=targets))
    paths = [path for path, _ in lora_layers(llama)]
    assert paths == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert not any(isinstance(layer.base_layer, LoRALinear) for _, layer in lora_layers(llama))


def test_only_adapters_are_trained(llama: CausalLM):
    inject(llama, LoraConfig(rank=4))
    trained = {name for name, parameter in llama.named_parameters() if parameter.requires_grad}
    expected = {f"{path}.{ab}" for path, _ in lora_layers(llama) for ab in ("lora_A", "lora_B")}
    assert trained == expected and len(trained) == 2 * 2 * 7


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_are_trained_beside_adapters(tied: bool):
    model = ours(tiny("llama3", tie_word_embeddings=tied))
    inject(model, LoraConfig(rank=4, train_embeddings=True))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    whole = {name for name in trained if ".lora_" not in name}
    assert whole == {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert len(trained - whole) == 2 * 2 * 7


# ---- initial values


def test_b_of_zero_equals_the_base(llama: CausalLM):
    base = llama(TOKENS)
    inject(llama, LoraConfig(rank=4, dropout=0.5))
    init_adapters(llama, seed=0)
    assert torch.equal(llama(TOKENS), base) and torch.equal(llama.train()(TOKENS), base)


def test_initial_adapters_are_a_function_of_the_seed(hf_llama: PreTrainedModel):
    def initial(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(torch.initial_seed() + 1)  # the global generator must not matter
        model = ours(hf_llama)
        inject(model, LoraConfig(rank=16))
        init_adapters(model, seed)
        return adapter_tensors(model)

    first, again, other = initial(3), initial(3), initial(4)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        if "lora_B" in name:
            assert not tensor.any()
            continue
        bound = 1 / math.sqrt(tensor.shape[1])
        assert 0.9 * bound < tensor.abs().max() <= bound and abs(tensor.mean()) < 0.1 * bound
        uniform_std = bound / math.sqrt(3)
        torch.testing.assert_close(tensor.std().item(), uniform_std, rtol=0.1, atol=0)
        assert not torch.equal(tensor, other[name])
    beginnings = {
        tuple(tensor.flatten()[:8].tolist()) for name, tensor in first.items() if "lora_A" in name
    }
    assert len(beginnings) == len(first) // 2  # no two layers start alike


def test_adapters_injected_on_meta_start_like_any_others(llama: CausalLM):
    """A model is built so: nothing has memory until its weights arrive."""
    with torch.device("meta"):
        empty = CausalLM(llama.config)
    for model in (empty, llama):
        inject(model, LoraConfig(rank=4))
        init_adapters(model, 3, torch.device("cpu"))
    state, expected = adapter_tensors(empty), adapter_tensors(llama)
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor)
    for name, p in empty.named_parameters():
        assert p.requires_grad == name.endswith(("lora_A", "lora_B"))


# ---- merging


def test_merging_is_in_fp32():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 16, generator=generator).to(torch.bfloat16)
    a = torch.randn(3, 16, generator=generator)
    b = torch.randn(24, 3, generator=generator)
    merged = merged_weight(weight, a, b, 0.5)
    assert merged.dtype == torch.float32
    exact = weight.double() + 0.5 * b.double() @ a.double()
    torch.testing.assert_close(merged.double(), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_merged_adapters_are_gone_and_act_as_before(llama: CausalLM, dtype: torch.dtype):
    names = set(llama.state_dict())
    model = with_random_adapters(llama.to(dtype), LoraConfig(rank=4))
    before = model(TOKENS)
    expected = {
        path: merged_weight(layer.base_layer.weight, layer.lora_A, layer.lora_B, layer.scaling)
        for path, layer in lora_layers(model)
    }
    merge_adapters(model)
    assert not list(lora_layers(model)) and set(model.state_dict()) == names
    for path, weight in expected.items():
        assert torch.equal(model.get_submodule(path).weight, weight.to(dtype))  # rounded once
    if dtype == torch.float32:
        torch.testing.assert_close(model(TOKENS), before, rtol=0, atol=1e-4)
