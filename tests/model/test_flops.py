"""Operations of a training step, beside those that torch counts and those that are published."""

import dataclasses

import pytest
from torch.utils.flop_counter import FlopCounterMode

from helpers.tiny_models import ours, random_tokens, tiny
from minilora.config import LoraConfig
from minilora.model.flops import attention_flops, training_flops
from minilora.model.hf_config import DecoderConfig
from minilora.model.lora import init_adapters, inject, lora_layers
from minilora.model.transformer import CausalLM

LLAMA_8B = DecoderConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    rope={},
    windows=(None,) * 32,
)


def counted_by_torch(model: CausalLM, length: int) -> int:
    """Count the operations of a forward and a backward pass over one document, without attention.

    Products that are added in place are not counted.
    """
    tokens = random_tokens(length)
    labels = tokens.clone()
    labels[0] = -100
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=labels).backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in counts.items() if "mm" in str(operation))


def test_flops_of_an_8b_are_the_published_ones():
    """33.5 and, with recomputation, 48.5 GFLOP a token at 4,096 tokens (LoRA of rank 32)."""
    length, adapters = 4096, 83_886_080
    plain = training_flops(LLAMA_8B, [length], length, "lora", 0, adapters)
    recomputed = training_flops(LLAMA_8B, [length], length, "lora", 32, adapters)
    assert abs(plain / length / 33.5e9 - 1) < 0.01
    assert abs(recomputed / length / 48.5e9 - 1) < 0.01


def test_flops_are_those_that_torch_counts():
    """But for what torch leaves out, and the gradient of the first block's input, which is not
    needed over a frozen embedding."""
    length = 24
    for trained in ("full", "lora"):
        model = ours(tiny("llama3")).train().requires_grad_()
        adapters = 0
        if trained == "lora":
            inject(model, LoraConfig(rank=4))
            init_adapters(model, seed=0)
            layers = [layer for _, layer in lora_layers(model)]
            adapters = sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in layers)
        planned = training_flops(
            model.config, [length], length - 1, trained, adapter_parameters=adapters
        )
        planned -= 3 * attention_flops(model.config, [length])
        assert counted_by_torch(model, length) == pytest.approx(planned, rel=0.12)


def test_attention_is_quadratic_within_a_document_and_linear_beyond_a_window():
    assert attention_flops(LLAMA_8B, [2000]) > 3.9 * attention_flops(LLAMA_8B, [1000])
    assert attention_flops(LLAMA_8B, [1000] * 2) == 2 * attention_flops(LLAMA_8B, [1000])
    windowed = dataclasses.replace(LLAMA_8B, windows=(100,) * 32)
    a_thousand_more = attention_flops(windowed, [3000]) - attention_flops(windowed, [2000])
    assert a_thousand_more == attention_flops(windowed, [2000]) - attention_flops(windowed, [1000])
    assert a_thousand_more > 0
