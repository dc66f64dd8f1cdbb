"""QLoRA training follows transformers + bitsandbytes + peft step by step."""

from pathlib import Path

import pytest
import torch
import transformers
from test_training import reference_run, start_adapter

import train
from minilora.config import Config
from tiny_runs import base_model, config, metrics

STEPS = 30
# whole blocks of 64 in each row: where blocks cross rows, bitsandbytes 0.50 dequantises wrongly on a CPU, so that it and what
# is built on it are no reference; tests/test_quant.py compares those shapes with the arithmetic written out
SIZES = {"hidden_size": 64, "intermediate_size": 128}
LOADED = {
    4: {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    8: {"load_in_8bit": True},
}  # fmt: skip


def quantised_reference(c: Config, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float, float]]:
    """`reference_run` over a base that transformers has quantised.

    In train mode: in eval mode some CPUs take a kernel that rounds to bfloat16.
    """
    load = transformers.AutoModelForCausalLM.from_pretrained
    settings = transformers.BitsAndBytesConfig(**LOADED[c.model.bits])

    def quantised(*args, **options) -> transformers.PreTrainedModel:
        return load(*args, quantization_config=settings, **options).train()

    with monkeypatch.context() as patch:
        patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", quantised)
        return reference_run(c, adapter)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["mistral_v1", "qwen2"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_thirty_steps_follow_transformers_and_peft(tmp_path, family, accumulation, bits, monkeypatch):
    base = base_model(tmp_path / "base", family, **SIZES)
    adapter = start_adapter(base, tmp_path / "adapter", r=4, lora_alpha=8)
    c = config(
        tmp_path, base, rows=30, train__max_steps=STEPS, train__grad_acc_steps=accumulation, train__batch_size=4 // accumulation,
        train__lr_scheduler="cosine", train__learning_rate=5e-3, train__weight_decay=0.01, train__gradient_checkpointing=True,
        lora__init_from=str(adapter), model__bits=bits,
    )  # fmt: skip
    assert train.main(c) == 0
    ours, reference = metrics(c), quantised_reference(c, adapter, monkeypatch)
    assert len(ours) == len(reference) == STEPS
    assert max(abs(o["loss"] - loss) for o, (loss, _, _) in zip(ours, reference, strict=True)) <= 1e-4
    assert [o["grad_norm"] for o in ours] == pytest.approx([norm for _, norm, _ in reference], rel=1e-3)
    assert [o["lr"] for o in ours] == pytest.approx([lr for _, _, lr in reference], rel=1e-6)
    assert ours[-1]["loss"] < 0.8 * ours[0]["loss"], "the run learns, or following it would show little"
    plain = reference_run(c, adapter)
    assert max(abs(q - p) for (q, _, _), (p, _, _) in zip(reference, plain, strict=True)) > 1e-2, "quantising shows"
