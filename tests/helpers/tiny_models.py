"""Tiny random models: transformers' as the reference, and minilora's with the same weights."""

import json

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from minilora.model.hf_config import DecoderConfig
from minilora.model.transformer import CausalLM

VOCAB = 97
WINDOW = 8
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

FAMILIES = {
    "llama2": {
        **_SIZES,
        "model_type": "llama",
        "num_key_value_heads": 4,
        "rope_theta": 10000.0,
        "rope_scaling": None,
    },
    "llama3": {
        **_SIZES,
        "model_type": "llama",
        "rope_theta": 500.0,
        "rope_scaling": _LLAMA3_ROPE,
    },
    "mistral_v1": {
        **_SIZES,
        "model_type": "mistral",
        "rope_theta": 10000.0,
        "sliding_window": WINDOW,
    },
    "mistral": {  # v0.2 and v0.3
        **_SIZES,
        "model_type": "mistral",
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
    "qwen2": {
        **_SIZES,
        "model_type": "qwen2",
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    },
    "qwen3": {
        **_SIZES,
        "model_type": "qwen3",
        "rope_theta": 1000000.0,
        "head_dim": 16,
        "use_sliding_window": False,
    },
}
"""config.json of each family as transformers 4 wrote it, the spelling of most published models."""


def config_json(family: str, **changes) -> dict:
    """Return a family's config.json with some fields changed; a change to `...` removes one."""
    raw = {**FAMILIES[family], **changes}
    return {key: value for key, value in raw.items() if value is not ...}


def from_config_json(raw: dict, seed: int = 0) -> PreTrainedModel:
    """Make transformers' model of a config.json, with random weights.

    The weights are large, so that logits are far from uniform and attention far from an average.
    Attention is transformers' eager one, so that the reference shares no kernel with minilora.
    """
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(json.loads(json.dumps(raw)))
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=config.dtype
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            center = 1.0 if "norm" in name else 0.0
            weight.copy_(center + 0.3 * torch.randn(weight.shape, generator=generator))
    return model


def tiny(family: str, seed: int = 0, **changes) -> PreTrainedModel:
    """Make transformers' tiny random model of a family, with changes to its config.json."""
    return from_config_json(config_json(family, **changes), seed)


def in_bfloat16(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Make a bfloat16 model, and one in float32 with the same (rounded) weights.

    The second gives what the first would without rounding. `model.to(torch.bfloat16)` would not
    do: it rounds the rotary frequencies too, which no model loaded from files does.
    """
    rounded, exact = tiny(family, torch_dtype="bfloat16"), tiny(family)
    exact.load_state_dict(rounded.state_dict())
    return rounded, exact


def ours(hf_model: PreTrainedModel, raw: dict | None = None) -> CausalLM:
    """Make minilora's model with the weights of `hf_model`.

    Args:
        hf_model: transformers' model.
        raw: the config.json to read; default: what save_pretrained would write.
    """
    config = DecoderConfig.from_hf(raw or json.loads(hf_model.config.to_json_string()))
    state = hf_model.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]  # the embedding under its second name
    model = CausalLM(config).to(hf_model.dtype).eval()
    model.load_state_dict(state)
    return model


def random_tokens(length: int, seed: int = 0) -> Tensor:
    """Draw token ids int64 [length]."""
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed))
