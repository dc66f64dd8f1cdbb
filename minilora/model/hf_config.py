"""The decoder's settings, read from a Hugging Face config.json."""

from dataclasses import dataclass

from minilora.errors import UserError

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

# Keys that every config.json must have.
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)

# Keys of config.json that change no number of the decoder: bookkeeping, defaults of generation, and
# what the tokenizer decides. The dtypes are read elsewhere, see `model.precision`.
IGNORED_KEYS = frozenset(
    {
        "_attn_implementation",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "is_encoder_decoder",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
    }
)


@dataclass(frozen=True)
class DecoderConfig:
    """The settings of a decoder. Names are those of config.json, except where a comment explains.

    The four architectures are one decoder with different switches: biases, norms of queries and
    keys, and sliding windows.
    """

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
    """Rotary settings in transformers 5's names: rope_type, rope_theta, factor, ..."""
    windows: tuple[int | None, ...]
    """Sliding window of each layer: a token sees itself and the window - 1 tokens before it. None:
    all tokens before it."""

    qkv_bias: bool = False
    """Whether q_proj, k_proj and v_proj have a bias."""
    o_bias: bool = False
    """Whether o_proj has a bias."""
    mlp_bias: bool = False
    """Whether gate_proj, up_proj and down_proj have a bias."""
    qk_norm: bool = False
    """Whether each head's queries and keys are normalized before they are rotated."""

    initializer_range: float = 0.02
    """Standard deviation of weights that are drawn instead of loaded."""
    unknown_keys: tuple[str, ...] = ()
    """Keys of config.json that nothing here reads; the user is told."""

    @classmethod
    def from_hf(cls, raw: dict, where: str = "config.json") -> "DecoderConfig":
        """Read a config.json of transformers 4 or 5; absent keys have transformers' defaults.

        Args:
            raw: the parsed file.
            where: the file's path, for error messages.

        Raises:
            UserError: a value asks for arithmetic that is not implemented here.
        """
        model_type = raw.get("model_type")
        if model_type not in ARCHITECTURES:
            raise UserError(
                f"{where}: model_type {model_type!r} is not supported; "
                f"supported are {', '.join(ARCHITECTURES)}"
            )
        keys = _KeyReader(raw, where)
        sizes = {key: keys.get_size(key) for key in SIZES}
        _check_fixed_values(keys)

        num_layers, num_heads = sizes["num_hidden_layers"], sizes["num_attention_heads"]
        # transformers' defaults; None means as many as num_attention_heads
        default_kv_heads = {"llama": None, "mistral": 8, "qwen2": 32, "qwen3": 32}[model_type]
        num_kv_heads = keys.get("num_key_value_heads", default_kv_heads) or num_heads
        if num_heads % num_kv_heads:
            raise UserError(
                f"{where}: num_attention_heads {num_heads} is not a multiple of "
                f"num_key_value_heads {num_kv_heads}"
            )
        default_head_dim = 128 if model_type == "qwen3" else None
        head_dim = keys.get("head_dim", default_head_dim) or sizes["hidden_size"] // num_heads

        # a bias that an architecture does not have is not asked for, and so reported as unknown
        qkv_bias = model_type == "qwen2"
        o_bias = False
        mlp_bias = False
        if model_type in ("llama", "qwen3"):
            has_bias = bool(keys.get("attention_bias", False))
            qkv_bias = has_bias
            o_bias = has_bias
        if model_type == "llama":
            mlp_bias = bool(keys.get("mlp_bias", False))

        return cls(
            **sizes,
            num_key_value_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=keys.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=bool(keys.get("tie_word_embeddings", False)),
            rope=_read_rope(keys),
            windows=_read_windows(keys, model_type, num_layers),
            qkv_bias=qkv_bias,
            o_bias=o_bias,
            mlp_bias=mlp_bias,
            qk_norm=model_type == "qwen3",
            initializer_range=keys.get("initializer_range", 0.02),
            unknown_keys=keys.unread_keys(),
        )


class _KeyReader:
    """The keys of a config.json. A key that is never asked for is reported as unknown."""

    def __init__(self, raw: dict, where: str):
        self.raw = raw
        self.where = where
        self._read: set[str] = set()

    def get(self, key: str, default=None):
        """Return a key's value, or `default` if it is absent."""
        self._read.add(key)
        return self.raw.get(key, default)

    def get_size(self, key: str) -> int:
        """Return a key's value, which must be there and be an integer. Raises UserError."""
        value = self.get(key)
        if not isinstance(value, int):
            raise UserError(f"{self.where}: {key} is missing or not a number")
        return value

    def unread_keys(self) -> tuple[str, ...]:
        """Return the keys that have not been asked for and are not known to be without effect."""
        return tuple(sorted(set(self.raw) - self._read - IGNORED_KEYS))


def _check_fixed_values(keys: _KeyReader) -> None:
    """Raise UserError for a value other than the one that the decoder implements."""
    # of each key, the value that it has if it is absent, and others of the same effect
    supported_values: dict[str, tuple] = {
        "hidden_act": ("silu", "swish"),
        "attention_dropout": (0.0, None),
        "pretraining_tp": (1, None),
        "auto_map": (None,),  # asks for code from the hub, which is never run
    }
    for key, supported in supported_values.items():
        default = supported[0]
        value = keys.get(key, default)
        if value not in supported:
            raise UserError(f"{keys.where}: {key} = {value!r} is not supported, only {default!r}")

    quantization = keys.get("quantization_config") or {}
    method = quantization.get("quant_method")
    if method not in (None, "bitsandbytes"):
        raise UserError(
            f"{keys.where}: quantization_config of {method!r} is not supported, only bitsandbytes"
        )


def _read_rope(keys: _KeyReader) -> dict:
    """Read the rotary settings, which transformers 4 and 5 spell differently, into one dict.

    Raises:
        UserError: the type of rotary embedding is not implemented.
    """
    rope = {**(keys.get("rope_scaling") or {}), **(keys.get("rope_parameters") or {})}
    rope.setdefault("rope_theta", keys.get("rope_theta", 10_000.0))
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"

    # as in transformers, the key at the top level has precedence over the one inside
    original = keys.get("original_max_position_embeddings")
    if original:
        rope["original_max_position_embeddings"] = original
    max_positions = keys.get("max_position_embeddings")
    rope.setdefault("original_max_position_embeddings", max_positions)
    rope.setdefault("max_position_embeddings", max_positions)

    if rope["rope_type"] not in ROPE_TYPES:
        raise UserError(
            f"{keys.where}: rope_type {rope['rope_type']!r} is not supported; "
            f"supported are {', '.join(ROPE_TYPES)}"
        )
    rotary_share = keys.get("partial_rotary_factor") or rope.get("partial_rotary_factor")
    if rotary_share and rotary_share != 1.0:
        raise UserError(f"{keys.where}: partial_rotary_factor other than 1 is not supported")
    return rope


def _read_windows(keys: _KeyReader, model_type: str, num_layers: int) -> tuple[int | None, ...]:
    """Read the sliding window of each layer.

    Llama has none and Mistral one for all layers. In Qwen `layer_types` names the layers that have
    one; without it they are those from `max_window_layers` on.

    Raises:
        UserError: `layer_types` is malformed.
    """
    # Asked for in every architecture, so that none is reported: transformers writes some of them
    # into files of models that have no window. The defaults are transformers'.
    window = keys.get("sliding_window", 4096)
    use_window = keys.get("use_sliding_window", False)
    first_layer = keys.get("max_window_layers", 28)
    layer_types = keys.get("layer_types")

    if model_type == "llama":
        return (None,) * num_layers
    if model_type == "mistral":
        return (window,) * num_layers

    if not use_window:
        window = None
    if not layer_types:
        return tuple(
            window if window and layer >= first_layer else None for layer in range(num_layers)
        )

    if len(layer_types) != num_layers or set(layer_types) - {"sliding_attention", "full_attention"}:
        raise UserError(
            f"{keys.where}: layer_types must name sliding_attention or full_attention for "
            "each layer"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
