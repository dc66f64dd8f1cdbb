"""Build a model on the CPU from a directory, with keywords instead of a whole Config."""

from pathlib import Path
from typing import Literal

import torch

from minilora.build import LoadedModel, build_for_inference, build_for_training
from minilora.config import Config, LoraConfig, TrainConfig
from minilora.model.block_execution import prepare_blocks

CPU = torch.device("cpu")


def build(  # noqa: PLR0913 - a keyword for each setting that some test changes
    directory: Path,
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    lora: LoraConfig | None = None,
    full: bool = False,
    random_weights: bool = False,
    seed: int = 0,
    gradient_checkpointing: bool = False,
    bits: Literal[16, 8, 4] = 16,
    double_quant: bool = True,
    vocab_size: int = 0,
) -> LoadedModel:
    """Build a model in one process.

    With `lora` it has fresh adapters over a frozen base, with `full` every weight is trained, and
    with neither it is a frozen model without adapters. The other keywords have the meaning of the
    config fields that they are named after.
    """
    if lora is None and not full:
        loaded = _build_frozen(
            directory, dtype, random_weights, seed, bits, double_quant, vocab_size
        )
        if gradient_checkpointing:
            prepare_blocks(loaded.model, TrainConfig(gradient_checkpointing=True))
        return loaded

    config = Config(seed=seed, method="full" if full else "lora")
    config.model.dtype, config.model.bits, config.model.double_quant = dtype, bits, double_quant
    config.model.init = "random" if random_weights else "pretrained"
    config.train.gradient_checkpointing = gradient_checkpointing
    if lora is not None:
        config.lora = lora
    return build_for_training(config, directory, CPU, vocab_size=vocab_size)


def _build_frozen(directory, dtype, random_weights, seed, bits, double_quant, vocab_size):
    """Build a model that nothing trains."""
    if not random_weights and not vocab_size:
        loaded = build_for_inference(directory, CPU, dtype, bits, double_quant)
        loaded.model.train()  # as the other builder leaves it
        return loaded

    # only training draws weights and adds rows, and it keeps them in float32
    assert bits == 16
    loaded = build(
        directory, dtype, full=True, random_weights=random_weights, seed=seed, vocab_size=vocab_size
    )
    loaded.model.requires_grad_(False)
    loaded.autocast = None
    for p in loaded.model.parameters():
        p.data = p.data.to(loaded.dtype)
    return loaded
