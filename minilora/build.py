"""Build a model from its files, for training or for inference.

Both builders take the same steps, those in brackets only for training:

    config.json -> modules on the meta device -> quantized (or cast) linear layers -> adapters
    [-> gradient checkpointing -> shards] -> weights

Modules on the meta device have shapes but no memory: nothing is allocated before its dtype and its
shards are decided.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from minilora import distributed
from minilora.checkpoint.hf import (
    base_parameters,
    checkpoint_bits,
    draw_weights,
    load_weights,
    materialize_parameter,
    weight_map,
)
from minilora.checkpoint.peft import (
    Adapter,
    adapter_vocab_size,
    load_adapter_state,
    read_adapter,
)
from minilora.config import Config, LoraConfig
from minilora.distributed import REPLICATED, Layout
from minilora.errors import UserError
from minilora.files import read_json
from minilora.hub import resolve
from minilora.model.block_execution import prepare_blocks
from minilora.model.frozen_linear import hold_in_16_bits
from minilora.model.hf_config import DecoderConfig
from minilora.model.lora import init_adapters, inject
from minilora.model.precision import Precision, choose_precision
from minilora.model.quantized_linear import QuantizedLinear
from minilora.model.transformer import CausalLM


@dataclass
class LoadedModel:
    """A model with its weights, and how it was built."""

    model: CausalLM
    dtype: torch.dtype
    """Of the arithmetic."""
    weight_dtype: torch.dtype
    """Of frozen weights in memory, and of the weights of a full run when they are saved."""
    lora: LoraConfig | None
    """The adapters' settings; those of the adapter itself where it was read from a file."""
    num_parameters: int
    """Of the base, counted before quantization."""
    autocast: torch.dtype | None = None
    """The dtype of autocast around float32 weights in a full run, else None."""
    layout: Layout = REPLICATED
    """How the parameters are distributed over the processes."""


def build_for_training(
    config: Config,
    base: Path,
    device: torch.device,
    checkpoint: Path | None = None,
    vocab_size: int = 0,
) -> LoadedModel:
    """Build the model of a training run; several processes may share it in shards.

    All weights that are trained are float32, whatever the dtype of the arithmetic.

    Args:
        config: the run's settings.
        base: the directory of the base model.
        device: where the weights go.
        checkpoint: a checkpoint of this run, whose weights replace the ones to start from.
        vocab_size: the smallest vocabulary that the model must have; it grows if need be.

    Raises:
        UserError: a file is missing or damaged, or does not fit the settings.
    """
    full = config.method == "full"
    directory = checkpoint if full and checkpoint is not None else base  # of the base's weights
    hf_config = read_json(directory / "config.json")
    precision = choose_precision(config.model.dtype, hf_config, device)

    # The settings of lora.init_from (rank, targets) hold for a resumed run too; its values do not.
    lora = None if full else config.lora
    init_adapter: Adapter | None = None
    if lora is not None and lora.init_from is not None:
        init_adapter = read_adapter(resolve(lora.init_from))
        lora = init_adapter.lora
        vocab_size = max(vocab_size, adapter_vocab_size(init_adapter))

    model, new_tokens = _modules_on_meta(directory, hf_config, vocab_size)
    num_parameters = sum(p.numel() for p in model.parameters())
    bits, double_quant = config.model.bits, config.model.double_quant
    quantized = quantize_base(model, hf_config, directory, bits, double_quant)
    _log_quantized(model, quantized, bits)
    model.requires_grad_(full)
    if lora is not None:
        _freeze_base(model, precision)
        inject(model, lora)  # leaves an embedding and head to train
    prepare_blocks(model, config.train)
    _set_dtypes(model, precision)
    layout = _distribute(model, config, precision.compute, device)

    if config.model.init == "random" and checkpoint is None:
        std = model.config.initializer_range
        draw_weights(model, device, None, std, config.seed, layout)
    else:
        rounded_to = precision.before_quantization
        load_weights(model, directory, device, rounded_to, quantized, layout, new_tokens)
    if lora is not None:
        adapter = init_adapter if checkpoint is None else read_adapter(checkpoint)
        _fill_adapters(model, adapter, config.seed, device, layout)
    autocast = _autocast_dtype(full, precision.compute, layout)
    return LoadedModel(
        model, precision.compute, precision.weights, lora, num_parameters, autocast, layout
    )


def _autocast_dtype(full: bool, dtype: torch.dtype, layout: Layout) -> torch.dtype | None:
    """Return the dtype of autocast around float32 weights that are trained with 16-bit arithmetic.

    Sharded weights need no autocast: they are gathered in 16 bits already (see `shard_model`).
    """
    if full and dtype != torch.float32 and layout is REPLICATED:
        return dtype
    return None


def build_for_inference(
    directory: Path,
    device: torch.device,
    dtype: str = "auto",
    bits: int = 16,
    double_quant: bool = True,
    adapter: Path | None = None,
) -> LoadedModel:
    """Build a frozen model in evaluation mode, replicated on every process.

    An embedding and head that come with the adapter stay in float32.

    Args:
        directory: the model in Hugging Face layout.
        device: where the weights go.
        dtype: of the arithmetic; for auto see `choose_precision`.
        bits: 16, 8 (LLM.int8) or 4 (NF4).
        double_quant: with 4 bits, quantize the quantization constants too.
        adapter: the directory of a PEFT adapter to put on the model.

    Raises:
        UserError: a file is missing or damaged, or does not fit the others.
    """
    hf_config = read_json(directory / "config.json")
    precision = choose_precision(dtype, hf_config, device)
    loaded = None if adapter is None else read_adapter(adapter)
    vocab_size = 0 if loaded is None else adapter_vocab_size(loaded)

    model, new_tokens = _modules_on_meta(directory, hf_config, vocab_size)
    num_parameters = sum(p.numel() for p in model.parameters())
    quantized = quantize_base(model, hf_config, directory, bits, double_quant)
    _log_quantized(model, quantized, bits)
    _freeze_base(model, precision)
    if loaded is not None:
        inject(model, loaded.lora)

    _set_dtypes(model, precision)
    rounded_to = precision.before_quantization
    load_weights(model, directory, device, rounded_to, quantized, new_tokens=new_tokens)
    if loaded is not None:
        unused_seed = 0  # the adapter's values replace all that are drawn
        _fill_adapters(model, loaded, unused_seed, device, REPLICATED)
    model.eval().requires_grad_(False)
    lora = None if loaded is None else loaded.lora
    return LoadedModel(model, precision.compute, precision.weights, lora, num_parameters)


def _modules_on_meta(directory: Path, hf_config: dict, vocab_size: int) -> tuple[CausalLM, int]:
    """Return the model that config.json describes, on the meta device, and how far it has grown.

    The second value is the number of rows that embedding and head have more than the checkpoint,
    because `vocab_size` is larger than its vocabulary.
    """
    where = str(directory / "config.json")
    config = DecoderConfig.from_hf(hf_config, where)
    if config.unknown_keys:
        distributed.log(f"{where}: ignored keys: {', '.join(config.unknown_keys)}")

    new_tokens = max(0, vocab_size - config.vocab_size)
    if new_tokens:
        config = replace(config, vocab_size=vocab_size)
        message = f"{new_tokens} rows more in embedding and head than in the base"
        distributed.log(f"{message}: {vocab_size} tokens")
    with torch.device("meta"):
        return CausalLM(config), new_tokens


def quantize_base(
    model: CausalLM, hf_config: dict, directory: Path, bits: int, double_quant: bool
) -> dict[str, QuantizedLinear]:
    """Replace the blocks' linear layers by quantized ones, if `bits` is less than 16.

    Args:
        model: on the meta device.
        hf_config: the checkpoint's config.json, which says whether it is quantized already.
        directory: the checkpoint.
        bits: 16, 8 or 4.
        double_quant: with 4 bits, quantize the quantization constants too.

    Returns:
        The new layers by path; their weights are not loaded yet.

    Raises:
        UserError: the checkpoint is quantized already, in another way.
    """
    stored_bits = checkpoint_bits(hf_config, str(directory / "config.json"))
    if stored_bits not in (16, bits):
        raise UserError(
            f"{directory} is quantized to {stored_bits} bits already: "
            f"set model.bits={stored_bits} (infer.py --bits {stored_bits})"
        )
    if bits == 16:
        return {}
    from minilora.model.quantization import quantize_linears  # imports bitsandbytes: two seconds

    is_prequantized = stored_bits < 16
    checkpoint_names = weight_map(directory).keys() if is_prequantized else ()
    return quantize_linears(model, bits, double_quant, checkpoint_names)


def _log_quantized(model: CausalLM, quantized: Mapping[str, QuantizedLinear], bits: int) -> None:
    """Print how many layers are quantized, and how many a quantized checkpoint leaves as is."""
    if not quantized:
        return
    message = f"{len(quantized)} linear layers in {bits} bits"
    kept = [module for module in model.model.modules() if type(module) is nn.Linear]
    if kept:
        message += f", {len(kept)} kept in 16 by the checkpoint"
    distributed.log(message)


def _freeze_base(model: CausalLM, precision: Precision) -> None:
    """Freeze a model, and let its weights stay in 16 bits where the arithmetic is not."""
    model.requires_grad_(False)
    if precision.weights != precision.compute:
        hold_in_16_bits(model)


def _set_dtypes(model: CausalLM, precision: Precision) -> None:
    """Give the base's parameters their dtypes: trained ones are float32.

    Frozen vectors (norms and biases) have the dtype of the arithmetic: they need no memory to speak
    of. The model is still on the meta device, so this only decides what memory will be needed.
    Quantized parameters are integers, and stay so.
    """
    for path, p in list(base_parameters(model)):
        if not p.is_floating_point():
            continue
        if p.requires_grad:
            dtype = torch.float32
        elif p.ndim > 1:
            dtype = precision.weights
        else:
            dtype = precision.compute
        # replaces the parameter by one on the meta device again, of the other dtype
        materialize_parameter(model, path, p.detach().to(dtype), REPLICATED)


def _distribute(
    model: CausalLM, config: Config, dtype: torch.dtype, device: torch.device
) -> Layout:
    """Shard the model over the processes, if there are several and the settings ask for it."""
    if distributed.world_size() == 1:
        return REPLICATED
    from minilora.sharding import choose_strategy, shard_model  # imports DTensor: half a second

    strategy = choose_strategy(config, model, device)
    if strategy == "ddp":
        return REPLICATED
    return shard_model(model, strategy, config, dtype, device)


def _fill_adapters(
    model: CausalLM,
    adapter: Adapter | None,
    seed: int,
    device: torch.device,
    layout: Layout,
) -> None:
    """Give the adapters memory and values: new ones that depend on the seed alone, or `adapter`'s.

    Args:
        model: has adapters on the meta device, and its other weights already.
        adapter: the values; None draws new ones.
        seed: for new values.
        device: where the adapters go.
        layout: how parameters are distributed over processes.
    """
    init_adapters(model, seed, device, layout)
    if adapter is not None:
        load_adapter_state(model, adapter.tensors, str(adapter.directory), layout)


def autocast_to(dtype: torch.dtype | None, device: torch.device) -> torch.autocast:
    """Return a context that computes in `dtype` over float32 weights; None changes nothing."""
    return torch.autocast(device.type, dtype, enabled=dtype is not None)
