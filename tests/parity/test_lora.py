"""LoRA against PEFT's: logits, gradients, merged weights and files."""

import copy
import json
import math
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from helpers.tiny_models import in_bfloat16, ours, random_tokens, tiny
from minilora.checkpoint.peft import (
    adapter_state,
    from_peft_config,
    load_adapter_state,
    to_peft_config,
)
from minilora.config import LoraConfig
from minilora.errors import UserError
from minilora.model.lora import init_adapters, inject, lora_layers, merged_weight
from minilora.model.transformer import CausalLM

ATTENTION = ("q_proj", "v_proj")
ALL = LoraConfig().target_modules
TOKENS = random_tokens(40)


def with_adapters(hf: PreTrainedModel, lora: LoraConfig) -> CausalLM:
    """Make minilora's model with the weights of `hf` and random adapters, B included."""
    model = ours(hf)
    inject(model, lora)
    model.eval()
    init_adapters(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1, generator=generator)
    return model


def peft_config(lora: LoraConfig, **changes) -> peft.LoraConfig:
    """Write minilora's settings as PEFT's."""
    settings = {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "target_modules": list(lora.target_modules),
        "task_type": "CAUSAL_LM",
    }
    return peft.LoraConfig(**{**settings, **changes})


def with_peft(
    hf: PreTrainedModel, lora: LoraConfig, state: dict[str, Tensor] | None = None, **changes
) -> PeftModel:
    """Make PEFT's model over a copy of `hf`, with the adapter `state`, or a random one."""
    torch.manual_seed(0)
    settings = peft_config(lora, init_lora_weights=False, **changes)
    model = get_peft_model(copy.deepcopy(hf), settings).eval()
    if state is not None:
        assert state.keys() == get_peft_model_state_dict(model).keys()
        set_peft_model_state_dict(model, state)
    return model


def logits_of(model: CausalLM | PreTrainedModel | PeftModel) -> Tensor:
    if isinstance(model, CausalLM):
        return model(TOKENS)
    return model(TOKENS.unsqueeze(0)).logits.squeeze(0)


def backward(model: CausalLM | PeftModel) -> Tensor:
    """Run the loss of predicting each next token backward, and return it."""
    loss = F.cross_entropy(logits_of(model).float()[:-1], TOKENS[1:])
    loss.backward()
    return loss.detach()


def peft_gradients(model: PeftModel) -> dict[str, Tensor]:
    return {
        name.replace(".default.", "."): p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def gradients(model: CausalLM) -> dict[str, Tensor]:
    """Return the gradients of all that is trained, under PEFT's names."""
    return {
        f"base_model.model.{name}.weight": p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llama3", "mistral_v1", "qwen2", "qwen3"])
@pytest.mark.parametrize("targets", [ALL, ATTENTION], ids=len)
@pytest.mark.parametrize("rslora", [False, True])
def test_logits_and_gradients(family: str, targets: tuple[str, ...], rslora: bool):
    hf, lora = tiny(family), LoraConfig(rank=4, alpha=6, target_modules=targets, rslora=rslora)
    model = with_adapters(hf, lora)
    reference = with_peft(hf, lora, adapter_state(model))
    assert_same(logits_of(model), logits_of(reference))
    assert (logits_of(model) - logits_of(hf)).abs().max() > 0.1  # the adapter does something

    torch.testing.assert_close(backward(model), backward(reference))
    grads, expected = gradients(model), peft_gradients(reference)
    assert grads.keys() == expected.keys() and len(grads) == 2 * 2 * len(targets)
    for name, grad in grads.items():
        scale = expected[name].abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_fp32_adapters_over_a_bfloat16_base():
    """As close to what fp32 would give as PEFT is."""
    (hf, hf_exact), lora = in_bfloat16("llama3"), LoraConfig(rank=4)
    model = with_adapters(hf, lora)
    theirs, exact = (with_peft(base, lora, adapter_state(model)) for base in (hf, hf_exact))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.bfloat16
    assert logits_of(model).dtype == torch.bfloat16

    loss, their_loss, exact_loss = (backward(each) for each in (model, theirs, exact))
    torch.testing.assert_close(loss, their_loss, rtol=1e-2, atol=0)  # bf16 keeps 8 bits
    torch.testing.assert_close(loss, exact_loss, rtol=1e-2, atol=0)
    grads, their_grads, expected = gradients(model), peft_gradients(theirs), peft_gradients(exact)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads.values())

    def error(actual: dict[str, Tensor]) -> float:
        squares = [(actual[name] - grad).square().sum().item() for name, grad in expected.items()]
        return math.sqrt(sum(squares))

    assert 0 < error(grads) < 1.5 * error(their_grads)


@pytest.mark.parametrize("rslora", [False, True])
def test_files_load_in_peft(rslora: bool, tmp_path: Path):
    hf, lora = tiny("qwen2"), LoraConfig(rank=4, alpha=6, rslora=rslora)
    model = with_adapters(hf, lora)
    save_file(adapter_state(model), tmp_path / "adapter_model.safetensors")
    written = json.dumps(to_peft_config(lora, "some/base", "main"))
    (tmp_path / "adapter_config.json").write_text(written)

    reference = PeftModel.from_pretrained(copy.deepcopy(hf), tmp_path)
    assert_same(logits_of(model), logits_of(reference))
    loaded = reference.load_adapter(tmp_path, "again")
    assert not loaded.missing_keys and not loaded.unexpected_keys
    config = reference.peft_config["default"]
    assert (config.base_model_name_or_path, config.revision) == ("some/base", "main")


TARGETS_OF_PEFT = {
    "names": list(ATTENTION),
    "dotted names": ["self_attn.q_proj", "mlp.up_proj"],
    "one name of two matches": ["q_proj", "query_key_value"],
    "all-linear": "all-linear",
    "regex": r".*\.(q_proj|down_proj)",
    "regex for one layer": r"model\.layers\.1\..*\.v_proj",
    "regex, other targets in other layers": r".*\.0\.self_attn\.q_proj|.*\.1\.mlp\.up_proj",
    "full path": ["model.layers.0.self_attn.q_proj"],
}


def read_into_our_model(directory: Path, hf: PreTrainedModel) -> CausalLM:
    """Read an adapter that PEFT saved into minilora's model."""
    raw = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    model = ours(hf)
    inject(model, from_peft_config(raw, list(tensors), str(directory)))
    load_adapter_state(model, tensors, str(directory))
    return model.eval()


@pytest.mark.parametrize("targets", TARGETS_OF_PEFT.values(), ids=list(TARGETS_OF_PEFT))
def test_adapters_saved_by_peft_load(targets: list[str] | str, tmp_path: Path):
    hf, lora = tiny("llama3"), LoraConfig(rank=3, alpha=5, rslora=True, dropout=0.1)
    reference = with_peft(hf, lora, target_modules=targets)
    reference.save_pretrained(tmp_path)
    model = read_into_our_model(tmp_path, hf)
    assert (logits_of(reference) - logits_of(hf)).abs().max() > 0.1
    assert_same(logits_of(model), logits_of(reference))
    assert all(layer.dropout.p == 0.1 for _, layer in lora_layers(model))


def test_saved_by_peft_and_written_again_is_the_same(tmp_path: Path):
    hf = tiny("llama3")
    with_peft(hf, LoraConfig(rank=3)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    state = adapter_state(read_into_our_model(tmp_path, hf))
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


REFUSED = {
    "use_dora": True,
    "modules_to_save": ["input_layernorm"],
    "bias": "all",
    "lora_bias": True,
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 2},
    "layers_to_transform": [0],
    "init_lora_weights": "pissa",
    "use_bdlora": {"nblocks": 2},
    "kasa_config": {"beta": 1e-4},
    "arrow_config": {"top_k": 2},
    "alora_invocation_tokens": [1, 2],
    "fan_in_fan_out": True,
    "peft_type": "IA3",
}


@pytest.mark.parametrize("field", REFUSED)
def test_adapters_with_other_arithmetic_are_refused_by_name(field: str):
    lora = LoraConfig(rank=4, target_modules=ATTENTION)
    raw = to_peft_config(lora, "some/base", None)
    names = list(get_peft_model_state_dict(with_peft(tiny("llama3"), lora)))
    assert from_peft_config(raw, names, "adapter").rank == 4
    with pytest.raises(UserError, match=f"adapter.*{field}"):
        from_peft_config({**raw, field: REFUSED[field]}, names, "adapter")


def test_dropout(hf_llama: PreTrainedModel):
    lora = LoraConfig(rank=4, dropout=0.5)
    model = with_adapters(hf_llama, lora)
    reference = with_peft(hf_llama, lora, adapter_state(model))
    assert_same(logits_of(model), logits_of(reference))  # off in eval mode
    trained = []
    for each in (model.train(), reference.train()):
        torch.manual_seed(0)  # both draw the same numbers in the same order
        trained.append(logits_of(each))
    assert_same(*trained)
    assert (trained[0] - logits_of(model.eval())).abs().max() > 0.1


@pytest.mark.parametrize("rslora", [False, True])
def test_merged_weights(rslora: bool):
    hf, lora = tiny("qwen2"), LoraConfig(rank=4, alpha=6, rslora=rslora)
    model = with_adapters(hf, lora)
    merged = with_peft(hf, lora, adapter_state(model)).merge_and_unload()
    unmerged = logits_of(model)
    for path, layer in lora_layers(model):
        weight = merged_weight(layer.base_layer.weight, layer.lora_A, layer.lora_B, layer.scaling)
        torch.testing.assert_close(weight, merged.get_submodule(path).weight, rtol=1e-5, atol=1e-6)
    assert_same(logits_of(merged), unmerged)
