"""Runs on a GPU: saved, resumed, in float16, and without waiting."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed
from torch import nn

from helpers import tiny_runs
from helpers.tiny_models import config_json, random_tokens
from helpers.tiny_runs import losses, metrics, poison_loss
from minilora import distributed, sharding
from minilora.checkpoint.training_state import load_sharded, save_sharded
from minilora.config import Config, LoraConfig, TrainConfig
from minilora.model.hf_config import DecoderConfig
from minilora.model.lora import init_adapters, inject
from minilora.model.transformer import CausalLM
from minilora.training.optimizer import make_optimizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.base_model(tmp_path_factory.mktemp("base") / "base")


def final_weights(config: Config) -> dict[str, torch.Tensor]:
    """Return the adapters of the last checkpoint."""
    path = Path(config.output_dir) / "checkpoint-final/adapter_model.safetensors"
    return safetensors.torch.load_file(path)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(optimizer, base: Path, tmp_path: Path):
    changes = {"model__dtype": "bfloat16", "train__optimizer": optimizer, "deterministic": True}
    changes["train__save_steps"] = 3
    whole = tiny_runs.run(tmp_path / "whole", base, train__max_steps=6, **changes)
    tiny_runs.run(tmp_path / "parts", base, train__max_steps=3, **changes)
    resumed = tiny_runs.run(tmp_path / "parts", base, train__max_steps=6, **changes)
    torch.use_deterministic_algorithms(False)
    assert losses(resumed) == losses(whole)
    expected = final_weights(whole)
    for name, tensor in final_weights(resumed).items():
        assert torch.equal(tensor, expected[name]), name


def test_losses_are_those_of_a_cpu(base: Path, tmp_path: Path, monkeypatch, exact_products):
    on_gpu = tiny_runs.run(tmp_path / "gpu", base, train__max_steps=6)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = tiny_runs.run(tmp_path / "cpu", base, train__max_steps=6)
    assert losses(on_gpu) == pytest.approx(losses(on_cpu), rel=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": 1},
        {"gradient_checkpointing": "auto"},
        {"gradient_checkpointing": True, "activation_offload": True},
        {"mlp_tile_tokens": 50},
        {"compile": True, "gradient_checkpointing": "auto"},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_how_blocks_run_does_not_change_the_losses(settings, base: Path, tmp_path: Path):
    common = {"model__dtype": "bfloat16", "train__max_steps": 6}
    plain = tiny_runs.run(tmp_path / "plain", base, **common)
    changes = {f"train__{name}": value for name, value in settings.items()}
    changed = tiny_runs.run(tmp_path / "changed", base, **common, **changes)
    assert losses(changed) == pytest.approx(losses(plain), rel=1e-2)


def test_float16_skips_a_step_that_overflows(base: Path, tmp_path: Path, monkeypatch):
    changes = {"model__dtype": "float16", "train__logging_steps": 3, "train__max_steps": 9}
    config = tiny_runs.quick_config(tmp_path, base, **changes)
    poison_loss(monkeypatch, 5)
    tiny_runs.train.main(config)
    assert [row["skipped_steps"] for row in metrics(config)] == [0, 1, 0]
    assert all(tensor.isfinite().all() for tensor in final_weights(config).values())


def test_a_training_step_does_not_wait_for_the_gpu(gpu: torch.device, wide_model: CausalLM):
    """But for what is made once: rotary frequencies, the first allocation of pinned memory."""
    model = wide_model.to(torch.bfloat16)
    inject(model, LoraConfig(rank=8))
    init_adapters(model, seed=0)
    model.to(gpu).train()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(parameters, TrainConfig())
    tokens = random_tokens(133)

    def step() -> None:
        loss = model(distributed.to_device(tokens, gpu), [40, 3, 90], labels=tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_segments_can_expand():
    """`make gpu` sets it as the scripts do: before CUDA is used."""
    torch.ones(1, device="cuda")
    assert torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"]


@pytest.mark.parametrize("offload", [False, True])
def test_states_of_shards_are_saved_and_read(offload, gpu: torch.device, tmp_path: Path):
    store = torch.distributed.HashStore()
    backend = "cpu:gloo,cuda:nccl"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        with torch.device("meta"):
            model = CausalLM(DecoderConfig.from_hf(config_json("llama3")))
        config = Config()
        config.parallel.cpu_offload = offload
        layout = sharding.shard_model(model, "fsdp", config, torch.float32, gpu)
        for p in model.parameters():
            nn.init.ones_(layout.to_local(p.detach()))
        parameters = dict(model.named_parameters())
        saved = {
            f"optimizer.{name}.exp_avg": torch.rand_like(layout.to_local(p.detach()))
            for name, p in parameters.items()
        }
        save_sharded(tmp_path, saved, parameters, layout)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loaded = load_sharded(tmp_path, parameters, layout)
        if offload:
            assert torch.cuda.max_memory_allocated() == before
        for name, tensor in saved.items():
            assert loaded[name].device.type == ("cpu" if offload else "cuda")
            assert torch.equal(loaded[name], tensor), name
    finally:
        torch.distributed.destroy_process_group()
