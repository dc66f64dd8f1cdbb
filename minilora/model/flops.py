"""How many floating-point operations a training step takes, counted by its matrix products.

A product of [n, a] by [a, b] is n * b dot products of length a: 2 n a b operations. Everything else
(norms, activations, softmax) is small beside them and not counted.

The backward pass of a product has two products of the same size: one for the gradient of its input,
one for that of its weight. Over a frozen weight there is only the first, so a token costs 4
operations for each weight of a LoRA base, and 6 for each one that is trained.

Shapes: t tokens of a document, T of all documents, H query heads, E head size, D model, V
vocabulary.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from minilora.model.hf_config import DecoderConfig


def training_flops(
    config: DecoderConfig,
    lengths: Sequence[int],
    supervised: int,
    trained: Literal["lora", "full"],
    recomputed_blocks: int = 0,
    adapter_parameters: int = 0,
) -> float:
    """Count the operations of a forward and a backward pass over a batch.

    Args:
        config: the decoder.
        lengths: tokens of each document; the number T of tokens is their sum.
        supervised: tokens that have a label; the head computes logits for these alone.
        trained: "lora", over frozen weights, or "full".
        recomputed_blocks: blocks whose forward pass runs once more in the backward pass. 0 counts
            what the model needs, whatever recomputation saves memory ("model FLOPs").
        adapter_parameters: trained elements of A and B in all blocks together.
    """
    num_layers = config.num_hidden_layers
    tokens = sum(lengths)
    products = 3 if trained == "full" else 2  # forward, gradient of the input, of the weight

    blocks = blocks_flops(config, lengths)
    attention = attention_flops(config, lengths)
    # both factors of an attention product have gradients, whatever is trained
    flops = products * (blocks - attention) + 3 * attention
    flops += blocks * recomputed_blocks / num_layers
    flops += products * head_flops(config, supervised)

    adapters = 2.0 * tokens * adapter_parameters
    return flops + 3 * adapters + adapters * recomputed_blocks / num_layers


def blocks_flops(config: DecoderConfig, lengths: Sequence[int]) -> float:
    """Count the operations of all blocks in a forward pass: their weights, and attention."""
    matrices = 2.0 * sum(lengths) * block_weights(config) * config.num_hidden_layers
    return matrices + attention_flops(config, lengths)


def block_weights(config: DecoderConfig) -> int:
    """Return how many weights the seven matrices of a block have."""
    query_size = config.num_attention_heads * config.head_dim
    key_value_size = config.num_key_value_heads * config.head_dim
    attention = config.hidden_size * (2 * query_size + 2 * key_value_size)  # q and o, k and v
    mlp = 3 * config.hidden_size * config.intermediate_size  # gate, up and down
    return attention + mlp


def attention_flops(config: DecoderConfig, lengths: Sequence[int]) -> float:
    """Count the operations of q k^T and of its product with v, in all blocks of a forward pass.

    A pair of a token and one that it sees takes 2 E operations in each of the two, for each of H
    heads. A kernel that also computes the masked half of the pairs does up to twice as many.
    """
    per_pair = 4.0 * config.num_attention_heads * config.head_dim
    pairs = 0
    for window, num_layers in Counter(config.windows).items():
        pairs += num_layers * sum(_visible_pairs(t, window) for t in lengths)
    return per_pair * pairs


def _visible_pairs(length: int, window: int | None) -> int:
    """Return how many pairs of a token and one that it sees (itself too) a document has."""
    seen = length if window is None else min(length, window)
    first = seen * (seen + 1) // 2  # tokens that see all tokens before them
    return first + (length - seen) * seen


def head_flops(config: DecoderConfig, rows: int) -> float:
    """Count the operations of the logits of some tokens: [rows, D] by [D, V]."""
    return 2.0 * rows * config.hidden_size * config.vocab_size
