"""How large a model is: its parameters, and the bytes in which they are held.

The modules of the run are made on the meta device, quantized and with their adapters, as
`build_for_training` makes them; only their shapes and dtypes are read.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from minilora.checkpoint.hf import VOCABULARY_MATRICES, checkpoint_bits
from minilora.config import LoraConfig, ModelConfig
from minilora.errors import UserError
from minilora.model.hf_config import DecoderConfig
from minilora.model.lora import inject
from minilora.model.precision import Precision
from minilora.model.transformer import CausalLM
from minilora.planning.block_memory import BlockCounter


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a model; bytes are those of all processes together."""

    decoder: DecoderConfig
    blocks: BlockCounter
    """Counts the activations of a block."""
    precision: Precision
    lora: LoraConfig | None
    """The adapters; None: every weight is trained, or the model is only asked."""
    parameters: int
    """Of the base, counted before quantization."""
    trained: int
    """Trained elements, which are held in fp32."""
    trained_in_block: int
    """Those of one block."""
    trained_in_vocabulary: int
    """Those of embedding and head."""
    frozen_bytes: int
    """Of all weights that are not trained, quantization constants included."""
    frozen_block_bytes: int
    """Those of one block."""
    converted_bytes: int
    """The largest matrix of a block in the dtype of the arithmetic, if its weight is held in
    another form (quantized, or 16 bits beside fp32), else 0: one such copy lives at a time."""


def model_size(
    hf_config: dict,
    where: Path,
    precision: Precision,
    lora: LoraConfig | None,
    full: bool,
    model: ModelConfig,
    vocab_size: int = 0,
) -> ModelSize:
    """Measure a model that is not loaded.

    Args:
        hf_config: config.json of the base.
        where: that file, for messages.
        precision: the dtypes of the arithmetic and of frozen weights.
        lora: the adapters, if there are any.
        full: whether every weight is trained.
        model: how the blocks' linear layers are held: bits and double_quant are used.
        vocab_size: the smallest vocabulary that the model must have; it grows if need be.

    Raises:
        UserError: the model is not supported, or quantized in another way.
    """
    bits, double_quant = model.bits, _double_quant(hf_config, where, model)
    decoder = DecoderConfig.from_hf(hf_config, str(where))
    decoder = replace(decoder, vocab_size=max(decoder.vocab_size, vocab_size))
    with torch.device("meta"):
        modules = CausalLM(decoder)
    parameters = sum(p.numel() for p in modules.parameters())
    linears = [module for module in modules.modules() if type(module) is nn.Linear]
    largest_matrix = max(layer.weight.numel() for layer in linears)
    constants = 0
    if bits < 16:
        from minilora.model.quantization import quantize_linears  # imports bitsandbytes: 2 seconds

        layers = quantize_linears(modules, bits, double_quant, ())
        if bits == 4 and double_quant:
            constants = sum(_nested_bytes(layer) for layer in layers.values())
    if lora is not None:
        inject(modules, lora)
    else:
        modules.requires_grad_(full)

    block = modules.model.layers[0]
    converted_bytes = 0
    if not full and (bits < 16 or precision.weights != precision.compute):
        converted_bytes = largest_matrix * precision.compute.itemsize
    return ModelSize(
        decoder=decoder,
        blocks=BlockCounter(decoder, lora, precision.compute),
        precision=precision,
        lora=lora,
        parameters=parameters,
        trained=_trained_elements(modules),
        trained_in_block=_trained_elements(block),
        trained_in_vocabulary=_trained_elements(modules, VOCABULARY_MATRICES),
        frozen_bytes=_frozen_bytes(modules, precision) + constants,
        frozen_block_bytes=_frozen_bytes(block, precision),
        converted_bytes=converted_bytes,
    )


def _double_quant(hf_config: dict, where: Path, model: ModelConfig) -> bool:
    """Return whether 4-bit constants are quantized too: a checkpoint in 4 bits decides itself.

    Raises:
        UserError: the checkpoint is quantized in another way than `model.bits`.
    """
    stored_bits = checkpoint_bits(hf_config, str(where))
    if stored_bits not in (16, model.bits):
        raise UserError(
            f"{where} describes a model in {stored_bits} bits: set model.bits={stored_bits} "
            f"(infer.py --bits {stored_bits})"
        )
    if stored_bits == 4:
        return bool(hf_config["quantization_config"].get("bnb_4bit_use_double_quant"))
    return model.double_quant


def _trained_elements(module: nn.Module, suffixes: tuple[str, ...] = ("",)) -> int:
    """Count the trained elements of parameters whose names end with one of the suffixes."""
    return sum(
        p.numel()
        for name, p in module.named_parameters()
        if p.requires_grad and name.endswith(suffixes)
    )


def _frozen_bytes(module: nn.Module, precision: Precision) -> int:
    """Add up the bytes of the parameters that are not trained.

    Quantized ones are integers. Of the others, matrices have the dtype of weights, and vectors
    (norms and biases) that of the arithmetic.
    """
    total = 0
    for p in module.parameters():
        if p.requires_grad:
            continue
        if not p.is_floating_point():
            itemsize = p.itemsize
        elif p.ndim > 1:
            itemsize = precision.weights.itemsize
        else:
            itemsize = precision.compute.itemsize
        total += p.numel() * itemsize
    return total


def _nested_bytes(layer: nn.Module) -> int:
    """Return the bytes of what double quantization holds beside the weight and its constants.

    They are an fp32 number for every 256 blocks, a table of 256, and the mean (see `NF4Linear`).
    """
    assert isinstance(layer, nn.Linear)
    num_blocks = math.ceil(layer.in_features * layer.out_features / 64)
    return 4 * (math.ceil(num_blocks / 256) + 256 + 1)
