"""Merge an adapter into its base model, and write the result in Hugging Face layout.

    python merge.py OUT/checkpoint-final        writes OUT/checkpoint-final/merged

Memory holds a few tensors, not the model. `lora.merged_weight` computes each sum in float32, and
`tensor_files.write_safetensors` rounds it once, by its cast to the dtype of the file.

An adapter trained over a quantized base (QLoRA) can be merged into the original 16-bit weights,
which is the default, or with --from_quantized into the dequantized weights that it was trained
over. --verify shows how far each of the two is from the model in training.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import torch
import tyro
from torch import Tensor

from minilora.build import build_for_inference, quantize_base
from minilora.checkpoint.hf import checkpoint_bits
from minilora.checkpoint.merge_writer import (
    MergedWeights,
    write_merged_weights,
    write_other_files,
)
from minilora.checkpoint.model_record import read_model_record
from minilora.checkpoint.peft import CONFIG_FILE, Adapter, read_adapter
from minilora.config import ModelConfig
from minilora.errors import UserError
from minilora.exit_codes import run_script
from minilora.files import read_json, write_directory
from minilora.hub import resolve
from minilora.loading import find_base
from minilora.model.hf_config import DecoderConfig
from minilora.model.precision import DTYPES, choose_precision
from minilora.model.quantized_linear import QuantizedLinear
from minilora.model.transformer import CausalLM

CPU = torch.device("cpu")
VERIFY_TOKENS = 64
"""T, the number of random tokens that --verify runs the models on."""


@dataclass
class Args:
    """Merge an adapter into its base model and write the result in Hugging Face layout."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """A checkpoint of train.py, or any PEFT LoRA adapter: a directory, or with --out a hub id,
    owner/name[@revision]."""
    base: str | None = None
    """Base model, if not the one that adapter_config.json names: directory, or hub id
    owner/name[@revision]."""
    out: str | None = None
    """Where to write (default: CHECKPOINT/merged)."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Dtype of the written weights; auto keeps that of each tensor of the base."""
    from_quantized: Annotated[bool, tyro.conf.arg(aliases=["--from_quantised"])] = False
    """QLoRA: merge into the dequantized weights that the adapter was trained over, not into the
    original base."""
    bits: Literal[8, 4] | None = None
    """How the base was quantized in training, where the checkpoint does not say (another trainer's
    QLoRA adapter)."""
    verify: bool = False
    """Afterwards run base + adapter and the merged model on random tokens, and print the largest
    difference of their logits. For a QLoRA adapter, compare both ways to merge."""


@dataclass
class TrainedAdapter:
    """An adapter and what it was trained over."""

    adapter: Adapter
    base: Path
    """The base model's directory."""
    stored_bits: int
    """Bits per weight of the linear layers in the base's files: 16, or 8 or 4 if quantized."""
    bits: int
    """Bits per weight of the linear layers in training."""
    double_quant: bool
    """With 4 bits, whether the quantization constants were quantized too."""
    trained_in: str
    """Setting model.dtype in training: a dtype's name, or "auto"."""
    rounded_to: torch.dtype
    """What the base's weights were rounded to before they were quantized."""

    def quantized_layers(self) -> dict[str, QuantizedLinear]:
        """Return {path: layer} of the layers that were quantized in training, without weights."""
        config_file = self.base / "config.json"
        raw = read_json(config_file)
        with torch.device("meta"):
            model = CausalLM(DecoderConfig.from_hf(raw, str(config_file)))
        return quantize_base(model, raw, self.base, self.bits, self.double_quant)


def main(args: Args) -> int:
    """Merge the adapter that the arguments name; return the exit code."""
    checkpoint = find_adapter(args)
    out = Path(args.out) if args.out else checkpoint / "merged"
    if out.exists():
        raise UserError(f"{out} exists: remove it or choose another --out")
    trained = read_trained(checkpoint, args)
    check_way_to_merge(trained, args.from_quantized)

    write_directory(out, lambda target: merge(trained, args.dtype, args.from_quantized, target))
    print(f"merged model: {out}")
    if args.verify:
        verify(trained, args, out)
    return 0


def find_adapter(args: Args) -> Path:
    """Return the directory of the adapter. Raises UserError if the name is not of an adapter."""
    if args.out is None and not Path(args.checkpoint).expanduser().is_dir():
        raise UserError(f"{args.checkpoint} is not a directory; an adapter on the hub needs --out")
    checkpoint = resolve(args.checkpoint)
    if (checkpoint / CONFIG_FILE).is_file():
        return checkpoint

    why = f"it has no {CONFIG_FILE}"
    if list(checkpoint.glob("model*.safetensors")):
        why += "; it is a whole model already, as merging creates one"
    raise UserError(f"{args.checkpoint} is not an adapter: {why}")


def read_trained(checkpoint: Path, args: Args) -> TrainedAdapter:
    """Read an adapter, and find its base and the base's bits and dtype in training.

    Raises:
        UserError: the adapter cannot be read, or its base cannot be found.
    """
    adapter = read_adapter(checkpoint)
    try:
        base = resolve(args.base) if args.base else find_base(checkpoint, args.checkpoint)
    except UserError as error:
        message = f"{error} (this is the adapter's base model; --base names another one)"
        raise UserError(message) from error

    raw = read_json(base / "config.json")
    stored_bits = checkpoint_bits(raw, str(base / "config.json"))
    record = read_model_record(checkpoint)
    settings = ModelConfig() if record is None else record.model
    if record is not None and args.bits not in (None, settings.bits):
        raise UserError(
            f"--bits {args.bits}: {checkpoint} was trained over {settings.bits} bits, as it "
            "records itself: leave it out"
        )
    if args.bits:
        bits: int = args.bits
    elif stored_bits < 16:
        bits = stored_bits
    else:
        bits = settings.bits
    rounded_to = choose_precision(settings.dtype, raw, CPU).before_quantization
    return TrainedAdapter(
        adapter, base, stored_bits, bits, settings.double_quant, settings.dtype, rounded_to
    )


def check_way_to_merge(trained: TrainedAdapter, from_quantized: bool) -> None:
    """Raise UserError if the adapter cannot be merged into its base in the way asked for."""
    if from_quantized and trained.bits == 16:
        problem = "the adapter was trained over 16-bit weights (if it was not: --bits 4)"
        raise UserError(f"--from_quantized: {problem}")
    if trained.stored_bits < 16 and not from_quantized:
        remedy = "merge with --from_quantized, or name its 16-bit original with --base"
        raise UserError(f"{trained.base} is quantized: {remedy}")


def merge(trained: TrainedAdapter, dtype: str, from_quantized: bool, target: Path) -> None:
    """Write the merged model.

    Args:
        trained: the adapter and its base.
        dtype: of the written weights; "auto" keeps each tensor's own.
        from_quantized: merge into the dequantized weights instead of the original ones.
        target: the directory to write to.

    Raises:
        UserError: the adapter does not belong to the base, or the base is damaged.
    """
    quantized = trained.quantized_layers() if from_quantized else {}
    weights = MergedWeights(trained.base, trained.adapter, quantized, trained.rounded_to)
    entries = write_merged_weights(weights, DTYPES.get(dtype), target)
    write_other_files(trained.base, trained.adapter.directory, target, entries)


def verify(trained: TrainedAdapter, args: Args, out: Path) -> None:
    """Print how far the merged model's logits are from those of base + adapter.

    If the base was quantized in training, both ways to merge are compared; the merged model that
    was not asked for is written to a temporary directory.

    Args:
        trained: the adapter and its base.
        args: the command's arguments.
        out: the directory of the merged model.
    """
    live = live_logits(trained)
    gap = largest_gap(live, out)
    scale = f"beside logits up to {live.abs().max():.3g}"
    if trained.bits == 16:
        print(f"largest logit gap between base + adapter (in fp32) and merged: {gap:.3g}, {scale}")
        return

    this_way = f"{gap:.3g} (this one)"
    other_way = "the base is only quantized"
    if trained.stored_bits == 16:
        with tempfile.TemporaryDirectory(prefix=".verify-", dir=out.parent) as directory:
            merge(trained, args.dtype, not args.from_quantized, Path(directory))
            other_way = f"{largest_gap(live, Path(directory)):.3g}"

    into_original, into_dequantized = this_way, other_way
    if args.from_quantized:
        into_original, into_dequantized = other_way, this_way
    print(f"largest logit gap to the live {trained.bits}-bit base + adapter, {scale}:")
    print(f"  merged into the original base      {into_original}")
    print(f"  merged into the dequantized base   {into_dequantized}")


@torch.no_grad()
def live_logits(trained: TrainedAdapter) -> Tensor:
    """Compute logits [T, V] of base + adapter, not merged, on random tokens.

    The arithmetic is float32. The base's weights are quantized as they were in training.
    """
    # in float32 quantized weights would not be rounded first, as they were in training
    dtype = trained.trained_in if trained.bits < 16 else "float32"
    loaded = build_for_inference(
        trained.base, CPU, dtype, trained.bits, trained.double_quant, trained.adapter.directory
    )
    return loaded.model.float()(random_tokens(loaded.model))


@torch.no_grad()
def largest_gap(live: Tensor, merged: Path) -> float:
    """Return the largest absolute difference between `live` and a merged model's fp32 logits."""
    model = build_for_inference(merged, CPU, "float32").model
    return float((live - model(random_tokens(model))).abs().max())


def random_tokens(model: CausalLM) -> Tensor:
    """Return the same token ids int64 [T] for every model of this vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (VERIFY_TOKENS,), generator=generator)


def run() -> NoReturn:
    """Run the command: `python merge.py`, and `minilora-merge` of an installed package."""
    run_script(lambda: main(tyro.cli(Args, description=__doc__, use_underscores=True)))


if __name__ == "__main__":
    run()
