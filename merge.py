"""Fold an adapter into its base: python merge.py OUT/checkpoint-final -> OUT/checkpoint-final/merged, in HF layout.

Shard by shard and tensor by tensor, so memory holds a few tensors, not the model. Sums are fp32 and cast once.
"""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tqdm
import tyro
from torch import Tensor

from minilora.build import DTYPES, build_model
from minilora.checkpoint import STATE, base_of, read_adapter, write_atomically
from minilora.config import LoraConfig, UserError, run_main
from minilora.lora import PEFT_PREFIX, load_adapter_state, merged_weight, scaling_of
from minilora.tokenizer import TOKENIZER_FILES
from minilora.weights import open_safetensors, read_json, read_tensor, resolve, save_config, weight_map, write_safetensors

CODES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
VERIFY_TOKENS = 64


@dataclass
class Args:
    """Fold an adapter into its base model and write the result in Hugging Face layout."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """A checkpoint of ours, or any PEFT LoRA adapter (directory)."""
    base: str | None = None
    """Base model, if not the one that adapter_config.json names: hub id or directory."""
    out: str | None = None
    """Where to write (default: CHECKPOINT/merged)."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of the written weights; auto keeps each tensor's own."""
    verify: bool = False
    """Afterwards run base + adapter and the merged model on random tokens and print the largest logit gap."""


def main(args: Args) -> int:
    checkpoint = Path(args.checkpoint)
    if not (checkpoint / "adapter_config.json").is_file():
        raise UserError(f"{checkpoint} is not an adapter: it has no adapter_config.json")
    lora, adapter, raw = read_adapter(checkpoint)
    try:
        base = resolve(args.base) if args.base else resolve(*base_of(raw, args.checkpoint))
    except UserError as error:
        raise UserError(f"{error} (the adapter's base; --base names another place)") from error
    out = Path(args.out) if args.out else checkpoint / "merged"
    if out.exists():
        raise UserError(f"{out} exists: remove it or choose another --out")
    write_atomically(out, lambda target: merge(base, checkpoint, lora, adapter, args.dtype, target))
    print(f"merged model: {out}")
    if args.verify:
        gap, largest = largest_gap(base, lora, adapter, out)
        print(f"largest logit gap between base + adapter (in fp32) and merged: {gap:.3g}, beside logits up to {largest:.3g}")
    return 0


def merge(base: Path, checkpoint: Path, lora: LoraConfig, adapter: dict[str, Tensor], dtype: str, target: Path) -> None:
    """Write the merged model into `target`, with the base's own shards. Raises UserError if a target is not in the base."""
    files = weight_map(base)
    left = {name.removeprefix(PEFT_PREFIX).removesuffix(".lora_A.weight") for name in adapter if name.endswith(".lora_A.weight")}
    if lost := sorted(path for path in left if f"{path}.weight" not in files):
        raise UserError(f"{base} has no {lost[0]}.weight, which the adapter changes: not this adapter's base")

    def tensor_of(name: str) -> Tensor:
        tensor = read_tensor(file, name)
        path = name.removesuffix(".weight")
        bar.update()
        if path not in left:
            return tensor
        A, B = (adapter[f"{PEFT_PREFIX}{path}.lora_{part}.weight"] for part in "AB")
        if tensor.shape != (B.shape[0], A.shape[1]):
            raise UserError(f"{path}: the base's weight is {list(tensor.shape)}, the adapter's update {[B.shape[0], A.shape[1]]}")
        return merged_weight(tensor, A, B, scaling_of(lora))

    dtypes, size = set(), 0
    with tqdm.tqdm(total=len(files), desc="merging", unit=" tensors") as bar:
        for file in sorted(set(files.values())):
            with open_safetensors(file) as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}
                if odd := [s.get_dtype() for s in slices.values() if s.get_dtype() not in CODES]:
                    raise UserError(f"{file}: holds {odd[0]} tensors; merging wants a base in float32, float16 or bfloat16")
                layout = {n: (DTYPES.get(dtype, CODES[s.get_dtype()]), tuple(s.get_shape())) for n, s in slices.items()}
            dtypes |= {d for d, _ in layout.values()}
            size += sum(d.itemsize * math.prod(shape) for d, shape in layout.values())
            write_safetensors(target / file.name, layout, tensor_of)
    copy_beside(base, checkpoint, target, next(iter(dtypes)) if len(dtypes) == 1 else torch.float32, size)


def copy_beside(base: Path, checkpoint: Path, target: Path, dtype: torch.dtype, size: int) -> None:
    """What makes the weights a model: config, index, tokenizer and template (the checkpoint's own, if it has one)."""
    index = base / "model.safetensors.index.json"
    if index.is_file():
        read = read_json(index)
        read["metadata"] = {**read.get("metadata", {}), "total_size": size}
        (target / index.name).write_text(json.dumps(read, indent=2), encoding="utf-8")
    save_config(target, read_json(base / "config.json"), dtype)
    for name in TOKENIZER_FILES:
        source = checkpoint / name if (checkpoint / name).is_file() else base / name
        if source.is_file():
            shutil.copyfile(source, target / name)
    if (checkpoint / STATE).is_file():  # how the model was asked in training, for infer.py
        data = read_json(checkpoint / STATE)["config"]["data"]
        (target / "minilora.json").write_text(json.dumps({"data": data}, indent=2, ensure_ascii=False), encoding="utf-8")


@torch.no_grad()
def largest_gap(base: Path, lora: LoraConfig, adapter: dict[str, Tensor], merged: Path) -> tuple[float, float]:
    """Largest absolute difference of logits between the live adapter and the merged model on random tokens, and the
    largest logit. Arithmetic is fp32: what is left is the rounding of the merged weights to their dtype."""
    cpu = torch.device("cpu")
    live = build_model(base, cpu, "float32", lora).model.eval()
    load_adapter_state(live, adapter, "adapter")
    tokens = torch.randint(live.config.vocab_size, (VERIFY_TOKENS,), generator=torch.Generator().manual_seed(0))
    expected = live(tokens)
    del live
    logits = build_model(merged, cpu, "float32").model.eval()(tokens)
    return float((expected - logits).abs().max()), float(expected.abs().max())


if __name__ == "__main__":
    run_main(lambda: main(tyro.cli(Args, description=__doc__, use_underscores=True)))
