"""Building a model, in one function that can be followed from top to bottom."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.utils.checkpoint
from torch import nn

from minilora import dist
from minilora.checkpoint import base_of, read_adapter, trained_over
from minilora.config import Config, LoraConfig, UserError
from minilora.dist import WHOLE, Whole
from minilora.lora import init_adapters, inject, load_adapter_state
from minilora.model import CausalLM, DecoderConfig
from minilora.tokenizer import Tokenizer
from minilora.weights import ROWS_PER_TOKEN, assign, base_parameters, draw_weights, load_weights, read_json, resolve, weight_map

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass
class Built:
    model: CausalLM
    dtype: torch.dtype  # of the arithmetic, and of what is saved
    lora: LoraConfig | None  # as used: init_from brings its own
    parameters: int  # of the base, however few bits they are held in
    autocast: torch.dtype | None = None  # full training of fp32 masters with 16-bit arithmetic
    place: Whole = WHOLE  # whether parameters lie whole here, or in shards


def compute_dtype(wanted: str, raw: dict, device: torch.device) -> torch.dtype:
    """The dtype of the arithmetic. auto: the checkpoint's; bfloat16 for float16 where the device has it (it cannot
    overflow in training), and float32 where the device has no bfloat16."""
    if wanted != "auto":
        return DTYPES[wanted]
    saved = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if saved == "float32":
        return torch.float32
    return torch.bfloat16 if has_bfloat16 else torch.float16


def stored_bits(raw: dict, where: str) -> int:
    """16, or what bitsandbytes has quantised a checkpoint to. Raises UserError for a form that is not read."""
    quantization = raw.get("quantization_config") or {}
    if quantization.get("load_in_8bit"):
        if (threshold := quantization.get("llm_int8_threshold", 6.0)) != 6.0:
            raise UserError(f"{where}: quantization_config.llm_int8_threshold = {threshold!r} is not supported, only 6.0")
        return 8
    if quantization.get("load_in_4bit") and (kind := quantization.get("bnb_4bit_quant_type", "fp4")) != "nf4":
        raise UserError(f"{where}: quantization_config.bnb_4bit_quant_type = {kind!r} is not supported, only 'nf4'")
    return 4 if quantization.get("load_in_4bit") else 16


def quantized_layers(model: CausalLM, raw: dict, directory: Path, bits: int, double_quant: bool) -> dict:
    """Swap the linear layers for quantised ones where bits < 16 (see quant.py); returns them by path."""
    stored = stored_bits(raw, str(directory / "config.json"))
    if stored not in (16, bits):
        raise UserError(f"{directory} is quantised to {stored} bits already: set model.bits={stored} (infer.py --bits {stored})")
    if bits == 16:
        return {}
    from minilora.quant import quantize_linears  # brings bitsandbytes, two seconds

    return quantize_linears(model, bits, double_quant, weight_map(directory).keys() if stored < 16 else ())


def build_model(
    directory: Path, device: torch.device, dtype: str = "auto", lora: LoraConfig | None = None, full: bool = False,
    random_weights: bool = False, seed: int = 0, gradient_checkpointing: bool = False, bits: int = 16, double_quant: bool = True,
    run: Config | None = None, vocab_size: int = 0,
) -> Built:  # fmt: skip
    """config.json -> modules on the meta device -> quantised linears -> adapters -> checkpointing -> shards -> weights,
    streamed. run: the training run, whose `parallel` settings say how several processes share the model.

    full: every weight is trained and kept in fp32, whatever the dtype of the arithmetic, as are embedding and head with
    lora.train_embeddings. vocab_size: that the model should have at least; an adapter says so by itself. Raises UserError.
    """
    raw = read_json(directory / "config.json")
    config = DecoderConfig.from_hf(raw, str(directory / "config.json"))
    if config.unknown_keys:
        dist.log(f"{directory / 'config.json'}: ignored keys: {', '.join(config.unknown_keys)}")
    compute = compute_dtype(dtype, raw, device)
    adapter = None
    if lora is not None and lora.init_from is not None:
        source = resolve(lora.init_from)
        lora, adapter, _ = read_adapter(source)
        vocab_size = max([vocab_size, *(len(t) for name, t in adapter.items() if name.endswith(ROWS_PER_TOKEN))])
    new_tokens = max(0, vocab_size - config.vocab_size)
    if new_tokens:
        config = replace(config, vocab_size=vocab_size)
        dist.log(f"{new_tokens} rows more in embedding and head than in the base: {vocab_size} tokens")

    with torch.device("meta"):
        model = CausalLM(config)
    parameters = sum(p.numel() for p in model.parameters())
    quantized = quantized_layers(model, raw, directory, bits, double_quant)
    if quantized:
        kept = sum(type(m) is nn.Linear for m in model.model.modules())
        dist.log(f"{len(quantized)} linear layers in {bits} bits" + f", {kept} kept in 16 by the checkpoint" * bool(kept))
    if lora is not None:
        inject(model, lora)  # freezes the base
    model.requires_grad_(full) if lora is None else None
    if gradient_checkpointing:
        recompute_blocks(model)

    stored, place = torch.float32 if full else compute, WHOLE
    for path, p in base_parameters(model):
        if p.is_floating_point():
            assign(model, path, p.detach().to(torch.float32 if p.requires_grad else stored), WHOLE)
    if run is not None and dist.world_size() > 1:
        from minilora import parallel  # and with it DTensor, over half a second

        strategy = parallel.choose(run, model, device)
        place = WHOLE if strategy == "ddp" else parallel.shard(model, strategy, run, compute, device)

    if random_weights:
        draw_weights(model, device, stored, config.initializer_range, seed, place)
    else:
        load_weights(model, directory, device, stored, quantized, place, new_tokens)
    if lora is not None:
        init_adapters(model, seed, device, place)
        if adapter is not None:
            load_adapter_state(model, adapter, str(source), place)
    autocast = compute if full and compute != torch.float32 and place is WHOLE else None  # shards are gathered in 16 bits
    return Built(model, compute, lora, parameters, autocast, place)


def autocast_to(dtype: torch.dtype | None, device: torch.device) -> torch.autocast:
    """16-bit arithmetic over fp32 weights, or nothing."""
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def recompute_blocks(model: CausalLM) -> None:
    """Gradient checkpointing: each block runs again in the backward pass instead of keeping its activations.

    Non-reentrant, so it works although the first block's input, from a frozen embedding, needs no gradient.
    """
    for block in model.model.layers:
        block.forward = partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)


def load(
    name_or_dir: str, adapter: str | None = None, dtype: str = "auto", bits: int | None = 16,
    device: str | torch.device | None = None, revision: str | None = None,
) -> tuple[CausalLM, Tokenizer]:  # fmt: skip
    """A model ready to use, and its tokenizer.

    name_or_dir: hub id, HF directory, or one of our adapter checkpoints, whose base is then found by itself; adapter: a
    PEFT adapter directory or hub id to put on it; bits: 16, 8 (LLM.int8), 4 (NF4), or None for what the adapter was
    trained over, or the model is stored in. Logits: `model(tokens, lengths)`. Raises UserError.
    """
    directory, adapter = resolve(name_or_dir, revision), str(resolve(adapter)) if adapter else None
    if (directory / "adapter_config.json").is_file():
        if adapter is not None:
            raise UserError(f"{name_or_dir} is an adapter itself: name its base as the model, or leave out adapter={adapter!r}")
        adapter = str(directory)
        directory = resolve(*base_of(read_json(directory / "adapter_config.json"), adapter))
    lora = LoraConfig(init_from=adapter) if adapter else None
    trained = trained_over(Path(adapter)) if adapter else None
    if bits is None:
        bits = trained.bits if trained else stored_bits(read_json(directory / "config.json"), str(directory))
    double_quant = trained.double_quant if trained else True
    if trained and dtype == "auto":
        dtype = trained.dtype
    where = torch.device(device) if device else dist.default_device()
    built = build_model(directory, where, dtype, lora, bits=bits, double_quant=double_quant)
    has_tokenizer = adapter and any((Path(adapter) / f).is_file() for f in ("tokenizer.json", "tokenizer.model"))
    for p in (built.model.model.embed_tokens.weight, built.model.head_weight):  # masters, where the adapter trained them
        p.data = p.data.to(built.dtype)
    return built.model.eval().requires_grad_(False), Tokenizer(Path(adapter) if has_tokenizer and adapter else directory)
