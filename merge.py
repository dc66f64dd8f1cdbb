"""Fold an adapter into its base: python merge.py OUT/checkpoint-final -> OUT/checkpoint-final/merged, in HF layout.

Shard by shard and tensor by tensor, so memory holds a few tensors, not the model. Sums are fp32 and cast once.

An adapter trained over a quantised base (QLoRA) can be folded into the original 16-bit weights, the default, or with
--from-quantised into the dequantised weights that it was trained over. --verify shows how far each is from the live model.
"""

import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import tqdm
import tyro
from torch import Tensor

from minilora.build import DTYPES, build_model, compute_dtype, quantized_layers, stored_bits
from minilora.checkpoint import STATE, base_of, read_adapter, trained_over
from minilora.config import LoraConfig, ModelConfig, UserError
from minilora.dist import WHOLE
from minilora.lora import EMBEDDING, PEFT_PREFIX, load_adapter_state, merged_weight, scaling_of, without_copy
from minilora.model import CausalLM, DecoderConfig
from minilora.running.directory import save_config, write_atomically
from minilora.running.saving import TOKENIZER_FILES, write_safetensors
from minilora.running.settings import run_main
from minilora.weights import (
    open_safetensors,
    read_json,
    read_named,
    read_tensor,
    resolve,
    weight_map,
)

if TYPE_CHECKING:
    from minilora.quant import QuantizedLinear

CODES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
VERIFY_TOKENS = 64
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # tensor name -> dtype, shape


@dataclass
class Args:
    """Fold an adapter into its base model and write the result in Hugging Face layout."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """A checkpoint of ours, or any PEFT LoRA adapter: a directory, or with --out a hub id."""
    base: str | None = None
    """Base model, if not the one that adapter_config.json names: hub id or directory."""
    out: str | None = None
    """Where to write (default: CHECKPOINT/merged)."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of the written weights; auto keeps each tensor's own."""
    from_quantised: bool = False
    """QLoRA: fold into the dequantised weights that the adapter was trained over, not into the original base."""
    bits: Literal[8, 4] | None = None
    """How the base was quantised in training, where the checkpoint does not say (another trainer's QLoRA adapter)."""
    verify: bool = False
    """Afterwards run base + adapter and the merged model on random tokens and print the largest logit gap, for a QLoRA
    adapter of both ways to merge."""


def main(args: Args) -> int:
    checkpoint = Path(args.checkpoint)
    if not checkpoint.exists() and args.checkpoint.count("/") == 1 and args.out:
        checkpoint = resolve(args.checkpoint)
    if not (checkpoint / "adapter_config.json").is_file():
        why = "it has no adapter_config.json" if checkpoint.exists() else "there is no such directory"
        whole = "; it is a whole model already, as merging makes one" * bool(list(checkpoint.glob("model*.safetensors")))
        raise UserError(f"{checkpoint} is not an adapter: {why}{whole}")
    lora, adapter, raw = read_adapter(checkpoint)
    try:
        base = resolve(args.base) if args.base else resolve(*base_of(raw, args.checkpoint))
    except UserError as error:
        raise UserError(f"{error} (the adapter's base; --base names another place)") from error
    out = Path(args.out) if args.out else checkpoint / "merged"
    if out.exists():
        raise UserError(f"{out} exists: remove it or choose another --out")
    raw_base = read_json(base / "config.json")
    stored = stored_bits(raw_base, str(base / "config.json"))
    ran = trained_over(checkpoint) or ModelConfig()
    bits = args.bits or (ran.bits if stored == 16 else stored)
    if args.from_quantised and bits == 16:
        raise UserError("--from-quantised: the adapter was trained over 16-bit weights (if it was not: --bits 4)")
    if stored < 16 and not args.from_quantised:
        raise UserError(f"{base} is quantised: merge with --from-quantised, or name its 16-bit original with --base")
    trained = Trained(base, lora, adapter, bits, ran.double_quant, compute_dtype(ran.dtype, raw_base, torch.device("cpu")))

    write_atomically(out, lambda target: merge(trained, checkpoint, args.dtype, args.from_quantised, target))
    print(f"merged model: {out}")
    if args.verify:
        verify(trained, checkpoint, args, out, has_original=stored == 16)
    return 0


@dataclass
class Trained:
    """An adapter and what it was trained over: a base, held in so many bits, with arithmetic in `dtype`."""

    base: Path
    lora: LoraConfig
    adapter: dict[str, Tensor]
    bits: int
    double_quant: bool
    dtype: torch.dtype

    def quantized(self) -> "dict[str, QuantizedLinear]":
        """The layers that were quantised, not filled yet, by path."""
        raw = read_json(self.base / "config.json")
        with torch.device("meta"):
            model = CausalLM(DecoderConfig.from_hf(raw, str(self.base / "config.json")))
        return quantized_layers(model, raw, self.base, self.bits, self.double_quant)


def merge(trained: Trained, checkpoint: Path, dtype: str, from_quantised: bool, target: Path) -> None:
    """Write the merged model into `target`, with the base's own shards. Raises UserError if a target is not in the base."""
    base, adapter = trained.base, trained.adapter
    files = weight_map(base)
    left = {name.removeprefix(PEFT_PREFIX).removesuffix(".lora_A.weight") for name in adapter if name.endswith(".lora_A.weight")}
    if lost := sorted(path for path in left if f"{path}.weight" not in files):
        raise UserError(f"{base} has no {lost[0]}.weight, which the adapter changes: not this adapter's base")
    quantized = trained.quantized() if from_quantised else {}
    tied = bool(read_json(base / "config.json").get("tie_word_embeddings"))
    if tied:
        without_copy(adapter, str(checkpoint))

    def tensor_of(name: str) -> Tensor:
        path = name.removesuffix(".weight")
        bar.update()
        if (whole := replaced(name, adapter, tied)) is not None:
            return whole
        if layer := quantized.pop(path, None):  # dropped afterwards: memory holds one of them
            layer.fill(partial(read_named, files, path), torch.device("cpu"), trained.dtype, WHOLE)
            tensor = layer.dequantize(torch.float32)
        else:
            tensor = read_tensor(files[name], name)
        if path not in left:
            return tensor
        A, B = (adapter[f"{PEFT_PREFIX}{path}.lora_{part}.weight"] for part in "AB")
        if tensor.shape != (B.shape[0], A.shape[1]):
            raise UserError(f"{path}: the base's weight is {list(tensor.shape)}, the adapter's update {[B.shape[0], A.shape[1]]}")
        return merged_weight(tensor, A, B, scaling_of(trained.lora))

    layouts = {file: layout_of(file, DTYPES.get(dtype), quantized, trained.dtype) for file in sorted(set(files.values()))}
    for layout in layouts.values():
        for name, (to, _) in layout.items():
            if (whole := replaced(name, adapter, tied)) is not None:
                layout[name] = (to, tuple(whole.shape))
    with tqdm.tqdm(total=sum(map(len, layouts.values())), desc="merging", unit=" tensors") as bar:
        for file, layout in layouts.items():
            write_safetensors(target / file.name, layout, tensor_of)
    copy_beside(base, checkpoint, target, layouts)


def replaced(name: str, adapter: dict[str, Tensor], tied: bool) -> Tensor | None:
    """The embedding or head that an adapter brings whole (lora.train_embeddings)."""
    return adapter.get(EMBEDDING if tied and name == "lm_head.weight" else PEFT_PREFIX + name)


def layout_of(
    file: Path, dtype: torch.dtype | None, quantized: "Mapping[str, QuantizedLinear]", dequantised: torch.dtype
) -> Layout:
    """What to write for a file of the base: each tensor in `dtype` or its own; of quantised layers one weight each."""
    layout: Layout = {}
    beside = {f"{path}.{name}" for path, layer in quantized.items() for name in layer.names if name != "weight"}
    with open_safetensors(file) as opened:
        for name in opened.keys():
            code, shape = opened.get_slice(name).get_dtype(), tuple(opened.get_slice(name).get_shape())
            layer = quantized.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            if layer is not None and layer.is_stored:
                layout[name] = (dtype or dequantised, (layer.out_features, layer.in_features))
            elif name not in beside:
                if code not in CODES:
                    raise UserError(f"{file}: holds {code} tensors; merging wants a base in float32, float16 or bfloat16")
                layout[name] = (dtype or CODES[code], shape)
    return layout


def copy_beside(base: Path, checkpoint: Path, target: Path, layouts: dict[Path, Layout]) -> None:
    """What makes the weights a model: config, index, tokenizer and template (the checkpoint's own, if it has one)."""
    index = base / "model.safetensors.index.json"
    if index.is_file():
        size = sum(d.itemsize * math.prod(shape) for layout in layouts.values() for d, shape in layout.values())
        names = {name: file.name for file, layout in layouts.items() for name in layout}
        read = {**read_json(index), "weight_map": names}
        read["metadata"] = {**read.get("metadata", {}), "total_size": size}
        (target / index.name).write_text(json.dumps(read, indent=2), encoding="utf-8")
    dtypes = {d for layout in layouts.values() for d, _ in layout.values()}
    raw = {key: value for key, value in read_json(base / "config.json").items() if key != "quantization_config"}
    embedding = EMBEDDING.removeprefix(PEFT_PREFIX)
    raw["vocab_size"] = next(layout[embedding][1][0] for layout in layouts.values() if embedding in layout)
    save_config(target, raw, next(iter(dtypes)) if len(dtypes) == 1 else torch.float32)
    for name in TOKENIZER_FILES:
        source = checkpoint / name if (checkpoint / name).is_file() else base / name
        if source.is_file():
            shutil.copyfile(source, target / name)
    if (checkpoint / STATE).is_file():  # how the model was asked in training, for infer.py
        data = read_json(checkpoint / STATE)["config"]["data"]
        (target / "minilora.json").write_text(json.dumps({"data": data}, indent=2, ensure_ascii=False), encoding="utf-8")


def verify(trained: Trained, checkpoint: Path, args: Args, out: Path, has_original: bool) -> None:
    """Print how far the merged model is from base + adapter; over a quantised base, for both ways to merge."""
    live = live_logits(trained)
    gap, beside = largest_gap(live, out), f"beside logits up to {live.abs().max():.3g}"
    if trained.bits == 16:
        print(f"largest logit gap between base + adapter (in fp32) and merged: {gap:.3g}, {beside}")
        return
    gaps = {args.from_quantised: f"{gap:.3g} (this one)"}
    if has_original:
        with tempfile.TemporaryDirectory(prefix=".verify-", dir=out.parent) as other:
            merge(trained, checkpoint, args.dtype, not args.from_quantised, Path(other))
            gaps[not args.from_quantised] = f"{largest_gap(live, Path(other)):.3g}"
    print(f"largest logit gap to the live {trained.bits}-bit base + adapter, {beside}:")
    print(f"  merged into the original base      {gaps.get(False, 'the base is only there quantised')}")
    print(f"  merged into the dequantised base   {gaps[True]}")


@torch.no_grad()
def live_logits(trained: Trained) -> Tensor:
    """Logits [T, vocab] of base + adapter on random tokens. Arithmetic is fp32, over the weights as they were trained."""
    quantised = trained.bits < 16
    dtype = str(trained.dtype).removeprefix("torch.") if quantised else "float32"
    cpu, double_quant = torch.device("cpu"), trained.double_quant
    tokens = len(trained.adapter.get(EMBEDDING, ()))
    model = build_model(
        trained.base, cpu, dtype, trained.lora, bits=trained.bits, double_quant=double_quant, vocab_size=tokens
    ).model
    load_adapter_state(model, trained.adapter, "adapter")
    return model.float().eval()(random_tokens(model))


@torch.no_grad()
def largest_gap(live: Tensor, merged: Path) -> float:
    """Largest absolute difference of a merged model's logits, in fp32, from the live ones."""
    model = build_model(merged, torch.device("cpu"), "float32").model.eval()
    return float((live - model(random_tokens(model))).abs().max())


def random_tokens(model: CausalLM) -> Tensor:
    return torch.randint(model.config.vocab_size, (VERIFY_TOKENS,), generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    run_main(lambda: main(tyro.cli(Args, description=__doc__, use_underscores=True)))
