"""The decoder of Llama, Mistral, Qwen2 and Qwen3, on one axis of packed tokens.

It knows nothing of LoRA, quantisation, ranks or files: those attach from outside. Module and parameter names are
Hugging Face's, so the keys of a checkpoint are the keys of the state dict.

Shapes: T tokens (documents laid end to end), D model, H query heads, K key/value heads (H a multiple of K), E head size,
F feed-forward, V vocabulary. There is no batch axis and no padding: `lengths` says where documents end.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.config import UserError


class Attend(Protocol):
    """How tokens see each other: inside packed documents here, over a cache in generate.py."""

    positions: Tensor  # [T], of each token in its document

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """q [T, H, E], k and v [T, K, E], the layer's sliding window -> [T, H, E]."""
        ...


Apply = Callable[[Tensor, Tensor], Tensor]  # of hidden states [T, D] and the head's weight [V, D]
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
# config.json keys that change no number here: bookkeeping, defaults of generation, and what the tokenizer owns
IGNORED_KEYS = frozenset(
    "architectures model_type torch_dtype dtype transformers_version use_cache bos_token_id eos_token_id pad_token_id "
    "initializer_range _name_or_path max_position_embeddings _attn_implementation attn_implementation "
    "output_attentions output_hidden_states return_dict unsloth_version unsloth_fixed tokenizer_class "
    "chunk_size_feed_forward id2label label2id is_encoder_decoder problem_type".split()
)


@dataclass(frozen=True)
class DecoderConfig:
    """What the decoder needs to know, read from a Hugging Face config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope: dict
    windows: tuple[int | None, ...]  # per layer: a token sees itself and the window - 1 tokens before it; None sees all
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    initializer_range: float = 0.02
    unknown_keys: tuple[str, ...] = ()

    @classmethod
    def from_hf(cls, raw: dict, where: str = "config.json") -> "DecoderConfig":
        """Read config.json as written by transformers 4 or 5; absent fields take transformers' defaults.

        Raises UserError for an architecture, or a value, that would need other arithmetic than is here.
        """
        kind = raw.get("model_type")
        if kind not in ARCHITECTURES:
            raise UserError(f"{where}: model_type {kind!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
        seen: set[str] = set()

        def get(key: str, default=None):
            seen.add(key)
            return raw.get(key, default)

        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        if missing := [key for key in sizes if not isinstance(raw.get(key), int)]:
            raise UserError(f"{where}: {missing[0]} is missing or not a number")
        fixed = {"hidden_act": ("silu", "swish"), "attention_dropout": (0.0, None), "pretraining_tp": (1, None)}
        for key, allowed in [*fixed.items(), ("auto_map", (None,))]:  # which asks for remote code: never run
            if get(key, allowed[0]) not in allowed:
                raise UserError(f"{where}: {key} = {raw[key]!r} is not supported, only {allowed[0]!r}")
        if (method := (get("quantization_config") or {}).get("quant_method")) not in (None, "bitsandbytes"):
            raise UserError(f"{where}: quantization_config of {method!r} is not supported, only bitsandbytes")
        hidden, heads, layers = get("hidden_size"), get("num_attention_heads"), get("num_hidden_layers")
        kv_heads = get("num_key_value_heads", {"llama": None, "mistral": 8}.get(kind, 32)) or heads
        head_dim = get("head_dim", 128 if kind == "qwen3" else None) or hidden // heads
        if heads % kv_heads:
            raise UserError(f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        return cls(
            vocab_size=get("vocab_size"), hidden_size=hidden, intermediate_size=get("intermediate_size"),
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
            rms_norm_eps=get("rms_norm_eps", 1e-6), tie_word_embeddings=bool(get("tie_word_embeddings", False)),
            rope=_read_rope(get, raw, where), windows=_read_windows(get, kind, layers, where),
            qkv_bias=kind == "qwen2" or (kind != "mistral" and bool(get("attention_bias", False))),
            o_bias=kind in ("llama", "qwen3") and bool(get("attention_bias", False)),
            mlp_bias=kind == "llama" and bool(get("mlp_bias", False)), qk_norm=kind == "qwen3",
            initializer_range=raw.get("initializer_range", 0.02),
            unknown_keys=tuple(sorted(set(raw) - seen - IGNORED_KEYS)),
        )  # fmt: skip


def _read_rope(get, raw: dict, where: str) -> dict:
    """The rotary settings as one dict {rope_type, rope_theta, ...} from either major version's spelling."""
    rope = {**(get("rope_scaling") or {}), **(get("rope_parameters") or {})}
    rope.setdefault("rope_theta", get("rope_theta", 10_000.0))
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    if original := get("original_max_position_embeddings"):  # at the top level it comes first, as in transformers
        rope["original_max_position_embeddings"] = original
    rope.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings"))
    rope.setdefault("max_position_embeddings", raw.get("max_position_embeddings"))
    if rope["rope_type"] not in ("default", "linear", "llama3", "yarn"):
        raise UserError(f"{where}: rope_type {rope['rope_type']!r} is not supported; supported are default, linear, llama3, yarn")
    if (get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor other than 1 is not supported")
    return rope


def _read_windows(get, kind: str, layers: int, where: str) -> tuple[int | None, ...]:
    """The sliding window of each layer. Mistral: one for all layers. Qwen: `layer_types`, or the upper layers."""
    window, types = get("sliding_window", 4096), get("layer_types")
    use, first = get("use_sliding_window", False), get("max_window_layers", 28)
    if kind in ("llama", "mistral"):
        return (window if kind == "mistral" else None,) * layers
    window = window if use else None
    types = types or ["sliding_attention" if window and i >= first else "full_attention" for i in range(layers)]
    if len(types) != layers or set(types) - {"sliding_attention", "full_attention"}:
        raise UserError(f"{where}: layer_types must name sliding_attention or full_attention for each layer")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def rope_frequencies(rope: dict, head_dim: int) -> tuple[Tensor, float]:
    """Inverse frequencies [E/2] in fp32 and the factor on cos and sin. Equals transformers' `ROPE_INIT_FUNCTIONS`: default
    (arXiv 2104.09864), linear, llama3, yarn (arXiv 2309.00071)."""
    theta, kind = rope["rope_theta"], rope["rope_type"]
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)  # [E/2]
    if kind == "linear":
        return inv_freq / rope["factor"], 1.0
    if kind == "llama3":
        low, high, original = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
        turns = original * inv_freq / (2 * math.pi)  # full turns within the original context
        smooth = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow, interpolate; 1: fast, keep
        return inv_freq * ((1 - smooth) / rope["factor"] + smooth), 1.0
    if kind == "yarn":
        original = rope["original_max_position_embeddings"]
        factor = rope.get("factor") or rope["max_position_embeddings"] / original

        def dimension(turns: float) -> float:  # the dimension that makes this many turns in the original context
            return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        first, last = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
        if rope.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        ramp = ((torch.arange(head_dim // 2) - first) / max(last - first, 1e-3)).clamp(0, 1)  # 1: interpolate

        def mscale(weight: float) -> float:
            return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

        scale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        scaling = mscale(scale) / mscale(all_dim) if scale and all_dim else mscale(1)
        return inv_freq * (ramp / factor + 1 - ramp), rope.get("attention_factor") or scaling
    return inv_freq, 1.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, dimension i paired with i + E/2. x [T, heads, E]; cos, sin [T, 1, E] in x's dtype."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class PackedAttention:
    """Causal attention inside each document of a packed batch; no token sees another document.

    Built once a batch and shared by all layers. CUDA in half precision runs one variable-length kernel; elsewhere each
    document is a call of scaled_dot_product_attention.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device):
        self.lengths = list(lengths)
        starts = torch.tensor([0, *self.lengths]).cumsum(0)
        positions = torch.arange(int(starts[-1])) - starts[:-1].repeat_interleave(torch.tensor(self.lengths))
        self.positions = positions.to(device, non_blocking=True)  # [T], restarting at 0 in each document
        self.cu_seqlens = starts.to(device, torch.int32, non_blocking=True)
        self.kernel = _varlen_kernel() if device.type == "cuda" else None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        if self.kernel is not None and q.dtype in (torch.float16, torch.bfloat16):
            return self.kernel(q, k, v, self.cu_seqlens, max(self.lengths), window)
        qs, ks, vs = (x.split(self.lengths) for x in (q, k, v))
        return torch.cat([attend_one(*document, window) for document in zip(qs, ks, vs, strict=True)])


def attend_one(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Causal attention of one document: q [t, H, E] over k, v [t, K, E] -> [t, H, E]."""
    t, mask = q.shape[0], None
    if window is not None and t > window:
        mask = torch.ones(t, t, dtype=torch.bool, device=q.device).tril_().triu_(1 - window)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, heads, t, E]
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1])
    return out.squeeze(0).transpose(0, 1)  # [t, H, E]


def _varlen_kernel():
    """torch's variable-length attention (CUDA, torch >= 2.10), whose causal argument was renamed in 2.12."""
    from torch.nn.attention.varlen import varlen_attn

    by_window = "window_size" in inspect.signature(varlen_attn).parameters

    def kernel(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, window: int | None) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        if by_window:  # the left side counts the tokens before the query
            sides = (-1 if window is None else window - 1, 0)
            return cast(Tensor, varlen_attn(q, k, v, cu, cu, longest, longest, window_size=sides, enable_gqa=groups > 1))
        if window is not None and longest > window:
            raise UserError(f"a document of {longest} tokens is beyond the sliding window {window}: needs torch >= 2.12")
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        return cast(Tensor, varlen_attn(q, k, v, cu, cu, longest, longest, is_causal=True))  # type: ignore[call-arg]

    return kernel


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) over the last axis."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, c: DecoderConfig, layer: int):
        super().__init__()
        self.layer, self.window, self.head_dim = layer, c.windows[layer], c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # [T, H, E]
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # [T, K, E]
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # [T, K, E]
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        return self.o_proj(attend(self.layer, q, k, v, self.window).flatten(1))  # [T, H, E] -> [T, H*E] -> [T, D]


class MLP(nn.Module):
    """SwiGLU feed-forward (arXiv 2002.05202)."""

    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # [T, D] -> [T, F] -> [T, D]


class Block(nn.Module):
    """One pre-norm transformer layer. x [T, D] -> [T, D]."""

    def __init__(self, c: DecoderConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: tokens int64 [T] -> hidden states [T, D]."""

    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, tokens: Tensor, attend: Attend) -> Tensor:
        kind, half = tokens.device.type, self.norm.weight.dtype  # over fp32 masters the residual stream is 16-bit too
        x = self.embed_tokens(tokens).to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else half)  # [T, D]
        inv_freq, scaling = rope_frequencies(self.config.rope, self.config.head_dim)
        angles = torch.outer(attend.positions.float(), inv_freq.to(x.device)).repeat(1, 2).unsqueeze(1)  # [T, 1, E], in fp32
        cos, sin = (angles.cos() * scaling).to(x.dtype), (angles.sin() * scaling).to(x.dtype)
        for block in self.layers:
            x = block(x, cos, sin, attend)
        return self.norm(x)


def logits_of(hidden: Tensor, weight: Tensor) -> Tensor:  # a head that is trained is an fp32 master
    return F.linear(hidden, weight.to(hidden.dtype))


class Head(nn.Linear):
    """The projection to the vocabulary: logits [T, V], or whatever else `apply` makes of hidden states and the weight."""

    def forward(self, hidden: Tensor, apply: Apply = logits_of) -> Tensor:
        return apply(hidden, self.weight)


class CausalLM(nn.Module):
    """The decoder with its projection to the vocabulary."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:  # a tied model has one matrix, here as in its checkpoint
            self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """The matrix [V, D] that turns hidden states into logits."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(
        self, tokens: Tensor, lengths: Sequence[int] | None = None, apply: Apply = logits_of, attend: Attend | None = None
    ) -> Tensor:
        """Logits [T, V] of documents laid end to end. tokens int64 [T]; lengths: their sizes (default: one document). apply: what
        to make of hidden states and head instead, a loss for instance; attend: another attention than that of documents. All
        goes through here because sharding gathers weights around modules.
        """
        hidden = self.model(tokens, attend or PackedAttention(lengths or [tokens.shape[0]], tokens.device))
        return apply(hidden, self.head_weight) if self.config.tie_word_embeddings else self.lm_head(hidden, apply)
