"""Reading config.json: what is refused, and which keys are reported as unknown."""

import pytest
from transformers import CONFIG_MAPPING

from helpers.tiny_models import FAMILIES, WINDOW, config_json
from minilora.errors import UserError
from minilora.model.hf_config import DecoderConfig

# the field that the message names -> changes to config.json
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
    "partial_rotary_factor: v5": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    },
    "num_key_value_heads": {"num_key_value_heads": 3},
    "layer_types": {"model_type": "qwen2", "layer_types": ["full_attention"]},
    "layer_types: unknown": {"model_type": "qwen2", "layer_types": ["full_attention", "linear"]},
    "hidden_size": {"hidden_size": ...},
    "num_attention_heads": {"num_attention_heads": ...},
    "num_hidden_layers": {"num_hidden_layers": ...},
    "vocab_size": {"vocab_size": ...},
    "intermediate_size": {"intermediate_size": ...},
}

WINDOWS = {
    "llama": ("llama3", {"sliding_window": WINDOW}, (None, None)),
    "mistral": ("mistral", {"sliding_window": WINDOW}, (WINDOW, WINDOW)),
    "mistral: absent": ("mistral", {"sliding_window": ...}, (4096, 4096)),
    "qwen2: off": ("qwen2", {}, (None, None)),
    "qwen2: upper layers": ("qwen2", {"use_sliding_window": True}, (None, WINDOW)),
    "qwen2: beyond the last layer": (
        "qwen2",
        {"use_sliding_window": True, "max_window_layers": ...},
        (None, None),
    ),
    "qwen2: layer_types": (
        "qwen2",
        {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]},
        (WINDOW, None),
    ),
    "qwen2: layer_types, off": (
        "qwen2",
        {"layer_types": ["sliding_attention", "full_attention"]},
        (None, None),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_values_are_refused_by_name(case: str):
    with pytest.raises(UserError) as error:
        DecoderConfig.from_hf(config_json("llama2", **REFUSED[case]), "some/config.json")
    field = case.split(":")[0]
    assert field in str(error.value) and "some/config.json" in str(error.value)


def test_unknown_keys_are_reported():
    raw = config_json("llama3", attn_logit_softcapping=30.0, a_new_scale=2)
    assert DecoderConfig.from_hf(raw).unknown_keys == ("a_new_scale", "attn_logit_softcapping")


def test_a_key_of_another_architecture_is_unknown():
    raw = config_json("mistral", attention_bias=True)
    config = DecoderConfig.from_hf(raw)
    assert config.unknown_keys == ("attention_bias",) and not config.qkv_bias


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_of_transformers_are_known(family: str):
    config = CONFIG_MAPPING[FAMILIES[family]["model_type"]].from_dict(FAMILIES[family])
    for raw in (FAMILIES[family], config.to_dict(), config.to_diff_dict()):
        assert DecoderConfig.from_hf(raw).unknown_keys == ()


@pytest.mark.parametrize("case", WINDOWS)
def test_sliding_windows_of_the_layers(case: str):
    family, changes, windows = WINDOWS[case]
    assert DecoderConfig.from_hf(config_json(family, **changes)).windows == windows
