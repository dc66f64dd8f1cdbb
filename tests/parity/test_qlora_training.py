"""QLoRA training follows transformers + bitsandbytes + peft step by step."""

from pathlib import Path

import pytest
import torch
import transformers

import train
from helpers.peft_training import config_to_follow, reference_run
from helpers.tiny_runs import base_model, metrics
from minilora.config import Config

STEPS = 30
# Sizes with whole blocks of 64 in each row. Where blocks span rows bitsandbytes 0.50 dequantizes
# wrongly on a CPU, so it is no reference there; tests/model/test_quantization.py compares such
# shapes with the arithmetic written out.
SIZES = {"hidden_size": 64, "intermediate_size": 128}
QUANTIZATION = {
    4: {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    8: {"load_in_8bit": True},
}


def quantized_reference_run(
    run: Config, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[float, float, float]]:
    """Do `reference_run` over a base that transformers has quantized.

    The base is in train mode: in eval mode some CPUs take a kernel that rounds to bfloat16.
    """
    load = transformers.AutoModelForCausalLM.from_pretrained
    settings = transformers.BitsAndBytesConfig(**QUANTIZATION[run.model.bits])

    def load_quantized(*args, **options) -> transformers.PreTrainedModel:
        return load(*args, quantization_config=settings, **options).train()

    with monkeypatch.context() as patch:
        patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load_quantized)
        return reference_run(run, adapter)


@pytest.mark.system
@pytest.mark.parametrize(
    ("bits", "family", "accumulation"),
    [(4, "mistral_v1", 1), (4, "qwen2", 2), (8, "mistral_v1", 2), (8, "qwen2", 1)],
)
def test_thirty_steps_follow_transformers_and_peft(
    tmp_path, bits, family, accumulation, monkeypatch
):
    base = base_model(tmp_path / "base", family, **SIZES)
    changes = {"train__max_steps": STEPS, "model__bits": bits}
    run = config_to_follow(tmp_path, base, accumulation, **changes)
    adapter = Path(run.lora.init_from or "")
    assert train.main(run) == 0

    ours = metrics(run)
    losses, norms, rates = zip(*quantized_reference_run(run, adapter, monkeypatch), strict=True)
    assert len(ours) == len(losses) == STEPS
    assert [row["loss"] for row in ours] == pytest.approx(losses, rel=0, abs=1e-4)
    assert [row["grad_norm"] for row in ours] == pytest.approx(norms, rel=1e-3)
    assert [row["lr"] for row in ours] == pytest.approx(rates, rel=1e-6)
    assert ours[-1]["loss"] < 0.8 * ours[0]["loss"]  # to follow a run that learns says more

    losses_unquantized = [loss for loss, _, _ in reference_run(run, adapter)]
    differences = [abs(q - p) for q, p in zip(losses, losses_unquantized, strict=True)]
    assert max(differences) > 1e-2  # quantizing shows
