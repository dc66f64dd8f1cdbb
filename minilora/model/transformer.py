"""The decoder of Llama, Mistral, Qwen2 and Qwen3.

    tokens                                  [T]
    x = embedding of each                   [T, D]
    for each Block:
        x = x + Attention(RMSNorm(x))       [T, D]
        x = x + MLP(RMSNorm(x))             [T, D]
    hidden states = RMSNorm(x)              [T, D]
    LMHead: logits, or the loss             [T, V], or a scalar

There is no batch axis and no padding: the documents of a batch are laid end to end on one axis of
tokens, and `lengths` says where each ends. Every operation treats each token by itself, except
attention: an `AttentionContext` (attention.py) decides which tokens see each other.

Module and parameter names are Hugging Face's, so a checkpoint's keys are the state dict's keys.
Adapters, quantization and sharding are attached from outside and need almost no code here; the
exceptions are `LMHead` and `Decoder._hidden_dtype`.

Shapes: T tokens, D model, H query heads, K key/value heads (H is a multiple of K), E head size,
I inner size of the feed-forward layer, V vocabulary, N positions whose logits are wanted.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.model.attention import AttentionContext, PackedAttention
from minilora.model.frozen_linear import cast_linear
from minilora.model.hf_config import DecoderConfig
from minilora.model.loss import cross_entropy_sum
from minilora.model.rms_norm import rms_norm
from minilora.model.rope import rotary_cos_sin, rotate
from minilora.model.small_batch import small_batch_linear


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, with a learnt scale (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)  # full fine-tuning has fp32 weights
        if weight.dtype != self.weight.dtype and torch.is_autocast_enabled(x.device.type):
            # on a GPU autocast would return float32, and all that follows would be float32 too
            with torch.autocast(x.device.type, enabled=False):
                return rms_norm(x, weight, self.eps)
        return rms_norm(x, weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions."""

    def __init__(self, config: DecoderConfig, layer_index: int):
        super().__init__()
        hidden_size, head_dim = config.hidden_size, config.head_dim
        query_size = config.num_attention_heads * head_dim
        key_value_size = config.num_key_value_heads * head_dim

        self.layer_index = layer_index
        self.window = config.windows[layer_index]
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, key_value_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, key_value_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, hidden_size, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm: nn.Module = RMSNorm(head_dim, config.rms_norm_eps)
            self.k_norm: nn.Module = RMSNorm(head_dim, config.rms_norm_eps)
        else:
            self.q_norm = nn.Identity()
            self.k_norm = nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, context: AttentionContext) -> Tensor:
        """Apply causal self-attention: x [T, D] -> [T, D]; cos and sin are [T, 1, E]."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # [T, H*E] -> [T, H, E]
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # [T, K*E] -> [T, K, E]
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # [T, K*E] -> [T, K, E]
        q = rotate(self.q_norm(q), cos, sin)
        k = rotate(self.k_norm(k), cos, sin)

        out = context(self.layer_index, q, k, v, self.window)  # [T, H, E]
        return self.o_proj(out.flatten(1))  # [T, H, E] -> [T, H*E] -> [T, D]


class MLP(nn.Module):
    """Feed-forward layer with a gate, SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        hidden_size, inner_size = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden_size, inner_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(hidden_size, inner_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner_size, hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.silu(self.gate_proj(x)) * self.up_proj(x)  # [T, D] -> [T, I]
        return self.down_proj(inner)  # [T, I] -> [T, D]


class Block(nn.Module):
    """One layer of the transformer: attention and feed-forward, each added to its input."""

    def __init__(self, config: DecoderConfig, layer_index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer_index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, context: AttentionContext) -> Tensor:
        """Transform the hidden states: x [T, D] -> [T, D]; cos and sin are [T, 1, E]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: tokens int64 [T] -> hidden states [T, D]."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, layer_index) for layer_index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens: Tensor, context: AttentionContext) -> Tensor:
        rope, head_dim = self.config.rope, self.config.head_dim
        dtype = self._hidden_dtype(tokens.device)
        x = self.embed_tokens(tokens).to(dtype)  # [T] -> [T, D]
        cos, sin = rotary_cos_sin(context.positions, rope, head_dim, dtype)  # [T, 1, E] each
        for block in self.layers:
            x = block(x, cos, sin, context)
        return self.norm(x)

    def _hidden_dtype(self, device: torch.device) -> torch.dtype:
        """Return the dtype of the hidden states: autocast's if that is on, else the final norm's.

        Matrices may be quantized, or an embedding trained in fp32; the norm's weight is neither. In
        full fine-tuning it is fp32: there autocast makes the hidden states 16-bit, or, in a sharded
        model, FSDP, which gathers this weight in 16 bits.
        """
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return self.norm.weight.dtype


def project(
    hidden: Tensor, weight: Tensor, labels: Tensor | None, logits_at: Tensor | None
) -> Tensor:
    """Turn hidden states [T, D] and the head's weight [V, D] into a loss or logits.

    `labels`, `logits_at` and the result are those of `CausalLM.forward`.
    """
    if labels is not None:
        return cross_entropy_sum(hidden, weight, labels)
    if weight.itemsize < hidden.itemsize and not torch.is_grad_enabled():  # see precision.py
        return cast_linear(hidden if logits_at is None else hidden[logits_at], weight)
    matrix = weight.to(hidden.dtype)  # a head that is trained has an fp32 weight
    if logits_at is not None:
        return small_batch_linear(hidden[logits_at], matrix)  # [N, V]
    return F.linear(hidden, matrix)  # [T, V]


class LMHead(nn.Linear):
    """The projection to the vocabulary, of a model whose embedding is another matrix.

    The loss is computed inside this module, because sharding gathers a module's weight only while
    its `forward` runs.
    """

    def forward(
        self, hidden: Tensor, labels: Tensor | None = None, logits_at: Tensor | None = None
    ) -> Tensor:
        return project(hidden, self.weight, labels, logits_at)


class CausalLM(nn.Module):
    """The decoder with its projection to the vocabulary: a model that predicts the next token."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:  # a tied model projects with its embedding
            self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """The matrix [V, D] that turns hidden states into logits."""
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.weight
        return self.lm_head.weight

    def forward(
        self,
        tokens: Tensor,
        lengths: Sequence[int] | None = None,
        *,
        labels: Tensor | None = None,
        logits_at: Tensor | None = None,
        attention: AttentionContext | None = None,
    ) -> Tensor:
        """Compute the loss, or the logits, of documents that are laid end to end.

        Args:
            tokens: int64 [T].
            lengths: tokens of each document; default: one document.
            labels: for the loss: int64 [T] on the CPU, labels[t] is token t or -100; each
                document's first is -100 (see `cross_entropy_sum`).
            logits_at: for the logits at some positions: their indices, int64 [N]. Give at most one
                of `labels` and `logits_at`.
            attention: which tokens see each other; default: `PackedAttention(lengths)`.

        Returns:
            With labels the sum of the cross-entropies, an fp32 scalar. With logits_at logits
            [N, V], computed in the way that is fastest for a few rows. Otherwise logits [T, V].
        """
        assert labels is None or logits_at is None
        if attention is None:
            attention = PackedAttention(lengths or [len(tokens)], tokens.device)
        hidden = self.model(tokens, attention)  # [T, D]

        if self.config.tie_word_embeddings:
            # Outside of the embedding's forward, but inside of this one: sharding leaves a tied
            # matrix to the root module, which keeps it gathered until here (see `shard_model`).
            return project(hidden, self.head_weight, labels, logits_at)
        return self.lm_head(hidden, labels, logits_at)
