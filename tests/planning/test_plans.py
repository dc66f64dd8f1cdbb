"""`--plan` of train.py and infer.py: what is said, without weights and without a GPU."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import infer
import train
from helpers.asking import infer_args
from helpers.checkpoints import random_adapter
from helpers.hub_server import running_hub
from helpers.tiny_runs import base_model, quick_config
from minilora.build import build_for_training
from minilora.checkpoint.peft import read_adapter
from minilora.cli import validate
from minilora.config import Config, LoraConfig
from minilora.data.tokenizer import Tokenizer
from minilora.errors import UserError
from minilora.generation.arguments import ModelArgs
from minilora.loading import find_model
from minilora.model import precision
from minilora.model.activation_offload import OFFLOAD_BUFFERS
from minilora.planning.advice import (
    changes,
    fits,
    longest_document,
    recomputed_blocks_that_fit,
)
from minilora.planning.answering import plan_answers
from minilora.planning.memory import Job, plan_memory, with_settings
from minilora.planning.training import TrainingPlan, plan_training, strategy_on

LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "torch_dtype": "bfloat16",
}
GIB = 2**30


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A LoRA run of an 8B of which only config.json is here, and no data."""
    directory = tmp_path_factory.mktemp("llama")
    (directory / "config.json").write_text(json.dumps(LLAMA_8B))
    config = Config(plan=True)
    config.model.name = str(directory)
    config.data.train_file = "nowhere.jsonl"
    return config


@pytest.fixture(scope="module")
def plan(llama_8b: Config) -> TrainingPlan:
    return plan_training(llama_8b)


def job_with(config: Config, **settings) -> Job:
    """Return the planned job of a run with other settings, named section__field."""
    for name, value in settings.items():
        section, _, field = name.rpartition("__")
        if section:
            changed = dataclasses.replace(getattr(config, section), **{field: value})
            config = dataclasses.replace(config, **{section: changed})
        else:
            config = dataclasses.replace(config, **{field: value})
    validate(config)
    return plan_training(config).job


# ---- sizes


def test_an_8b_without_weights_or_data(plan: TrainingPlan):
    assert plan.job.size.parameters == 8_030_261_248
    assert plan.job.size.trained == 83_886_080
    parts = plan_memory(plan.job).parts
    assert parts["base weights"] == 2 * 8_030_261_248
    assert parts["optimizer states"] == 8 * 83_886_080
    assert plan.total_steps is None
    assert "nowhere.jsonl is not on this machine" in plan.notes[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="plans for a CPU")
@pytest.mark.parametrize(("bits", "has_bfloat16"), [(16, True), (16, False), (8, True), (4, False)])
def test_weights_are_those_that_a_run_holds(
    bits: int, has_bfloat16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also on a CPU without bfloat16, where 16-bit weights are cast to fp32 to compute."""
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda device: has_bfloat16)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "torch_dtype": "bfloat16"}
    base = base_model(tmp_path / "base", **sizes)
    config = quick_config(tmp_path / "run", base, model__bits=bits, model__dtype="auto")
    job = plan_training(config).job_here
    assert job is not None
    model = build_for_training(config, base, torch.device("cpu")).model
    frozen = [p for p in (*model.parameters(), *model.buffers()) if not p.requires_grad]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert job.size.frozen_bytes == sum(p.numel() * p.itemsize for p in frozen)
    assert job.size.trained == sum(p.numel() for p in trained)
    is_converted = bits < 16 or not has_bfloat16
    itemsize = 2 if has_bfloat16 else 4
    assert job.size.converted_bytes == (128 * 256 * itemsize if is_converted else 0)


def test_processes_share_what_the_strategy_says(llama_8b: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    full = {"method": "full", "train__batch_size": 1}
    sharded = job_with(llama_8b, parallel__strategy="fsdp", **full)
    parts = plan_memory(sharded).parts
    assert parts["trained weights, fp32"] == pytest.approx(4 * 8_030_261_248 / 8)
    assert parts["gathered blocks and head"] > 2 * 2 * 218_000_000
    on_host = job_with(llama_8b, parallel__strategy="fsdp", parallel__cpu_offload=True, **full)
    assert plan_memory(on_host).peak < plan_memory(sharded).peak - 11 * GIB
    assert plan_memory(on_host).host["optimizer states"] == parts["optimizer states"]
    assert not any("gradients" in held for held in plan_memory(on_host).moments.values())
    with_blocks = {
        moment
        for moment, held in plan_memory(sharded).moments.items()
        if "gathered blocks and head" in held
    }
    assert plan_memory(sharded).moments.keys() - with_blocks == {"the update of the weights"}

    groups = job_with(llama_8b, parallel__strategy="hsdp", parallel__shard_size=4, **full)
    weights = plan_memory(groups).parts["trained weights, fp32"]
    assert weights == pytest.approx(4 * 8_030_261_248 / 4)
    automatic = job_with(llama_8b)
    assert (strategy_on(automatic, 16), strategy_on(automatic, 80)) == ("fsdp", "ddp")
    at_update = plan_memory(automatic).moments["the update of the weights"]
    assert at_update["gradients joined for their sum"] == at_update["gradients"] == 4 * 83_886_080

    with pytest.raises(UserError, match="3 does not divide the 8 processes"):
        job_with(llama_8b, parallel__strategy="hsdp", parallel__shard_size=3)


def test_offloaded_activations_are_on_the_host(plan: TrainingPlan):
    job = with_settings(plan.job, train__activation_offload=True)
    of_block = job.workload.batch_tokens * 4096 * 2  # its input, in 16 bits
    assert plan_memory(job).host == {"activations": 32 * of_block}
    kept, offloaded = (plan_memory(each).moments["the loss"] for each in (plan.job, job))
    assert kept["activations"] - offloaded["activations"] == (32 - OFFLOAD_BUFFERS) * of_block


# ---- what fits, and what to change


def test_each_change_saves_until_an_8b_fits_in_16_gb(plan: TrainingPlan):
    assert not fits(plan.job, 24)
    assert fits(plan.job, 80)
    peaks = [plan_memory(plan.job).peak]
    for change in changes(plan.job):
        peaks.append(change.peak)
        if fits(change.job, 16):
            break
    assert len(peaks) > 2
    assert peaks == sorted(peaks, reverse=True)
    assert change.settings.startswith("model.bits 4")


def test_fewer_answers_are_advised_where_they_need_the_most(plan: TrainingPlan):
    job = with_settings(plan.job, eval__num_generate_samples=200, eval__max_new_tokens=4096)
    assert "keys and values" in plan_memory(job).parts
    assert "eval.num_generate_samples 0" in [change.settings for change in changes(job)]


def test_the_longest_document_grows_with_each_saving(plan: TrainingPlan, llama_8b: Config):
    plain = plan.job
    offloaded = with_settings(plain, train__activation_offload=True, train__mlp_tile_tokens=8192)
    quantized = job_with(llama_8b, model__bits=4)
    before, after, in_4_bits = (longest_document(job, 80) for job in (plain, offloaded, quantized))
    assert before > 50_000
    assert after > 2 * before
    assert in_4_bits > 1.1 * before

    # what is said to fit does, and a tenth more does not
    for length, expected in ((before, True), (int(1.1 * before), False)):
        workload = dataclasses.replace(plain.workload, batch_tokens=length, batch_supervised=length)
        job = with_settings(plain, train__batch_size=1, eval__eval_steps=0)
        assert fits(dataclasses.replace(job, workload=workload), 80) == expected


def test_auto_recomputes_fewer_blocks_on_a_larger_gpu(plan: TrainingPlan):
    job = with_settings(plan.job, train__gradient_checkpointing="auto")
    on_40, on_80, on_141 = (recomputed_blocks_that_fit(job, size) for size in (40, 80, 141))
    assert 32 >= on_40 > on_80 > on_141 >= 0


def test_evaluations_are_part_of_the_plan(plan: TrainingPlan):
    large = with_settings(plan.job, eval__max_batch_tokens=10**6, eval__batch_size=512)
    assert plan_memory(large).peak_moment == "an evaluation"
    off = with_settings(large, eval__eval_steps=0)
    assert plan_memory(off).peak < plan_memory(large).peak


# ---- the commands


def test_train_shows_a_plan_of_its_data_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    base = base_model(tmp_path / "base")
    for file in base.glob("*.safetensors"):
        file.unlink()
    config = quick_config(tmp_path / "run", base, plan=True, train__epochs=2.0)
    validate(config)
    assert train.main(config) == 0
    text = capsys.readouterr().out
    assert "26, of" in text  # documents
    assert "14 steps" in text  # 26 documents in steps of 4, twice
    for gpu in ("A100", "H100", "H200", "4090", "L4", "T4", "this machine"):
        assert gpu in text
    for size in ("16 GB yes", "141 GB yes"):
        assert size in text
    assert not Path(config.output_dir).exists()


def test_a_plan_fetches_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    base = base_model(tmp_path / "base")
    with running_hub(monkeypatch, tmp_path / "hf") as hub:
        hub.add("tester/base", {path.name: path.read_bytes() for path in base.iterdir()})
        config = quick_config(tmp_path / "run", base, plan=True)
        config.model.name = "tester/base"
        assert train.main(config) == 0
        args = infer_args("tester/base", plan=True, prompt="Art", raw=True)
        assert infer.main(args) == 0
        fetched = [request for _, request in hub.requests]
    assert any("config.json" in request for request in fetched)
    assert not any("safetensors" in request for request in fetched)
    text = capsys.readouterr().out
    assert "Memory of each process" in text
    assert "keys and values of 1 answers" in text


def test_a_plan_without_any_data_says_what_it_assumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = quick_config(tmp_path / "run", base_model(tmp_path / "base"), plan=True)
    config.data.train_file = ""
    validate(config)
    assert train.main(config) == 0
    assert "every document is taken to have data.max_seq_length tokens" in capsys.readouterr().out


def test_infer_plans_the_longest_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = base_model(tmp_path / "base")
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"prompt": "Art"}\n{"prompt": "light sound old new"}\n')
    asked = {"plan": True, "input": str(source), "raw": True}
    assert infer.main(infer_args(base, **asked)) == 0
    text = capsys.readouterr().out
    assert "keys and values of 2 answers" in text
    longest = len(Tokenizer(base).encode("light sound old new").ids)
    assert f"{longest} tokens, the longest one" in text
    assert "Fits in: 16 GB" in text


def test_an_adapter_that_is_not_merged_takes_float32(tmp_path: Path):
    base = base_model(tmp_path / "base")
    adapter = random_adapter(base, tmp_path / "adapter", LoraConfig(rank=8))
    files = find_model(str(adapter))
    merged, beside = (
        plan_answers(files, ModelArgs(str(adapter), fold=fold), 16, 5) for fold in (True, False)
    )
    elements = sum(tensor.numel() for tensor in read_adapter(adapter).tensors.values())
    assert beside.weights - merged.weights == 4 * elements > 0
