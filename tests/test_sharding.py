"""Sharding: which strategy is chosen, and the layout `Sharded`.

A process group of one process is enough here; system/test_sharded_models.py has real ones.
"""

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.distributed.fsdp as fsdp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from helpers.tiny_models import config_json, random_tokens
from minilora import distributed, sharding
from minilora.checkpoint.training_state import load_sharded, save_sharded
from minilora.cli import check_device, validate
from minilora.config import Config
from minilora.distributed import REPLICATED
from minilora.errors import UserError
from minilora.model.hf_config import DecoderConfig
from minilora.model.quantization import quantize_linears
from minilora.model.transformer import CausalLM

CPU = torch.device("cpu")


@pytest.fixture
def meta_model() -> CausalLM:
    raw = config_json("llama3", hidden_size=64, intermediate_size=128)
    with torch.device("meta"):
        return CausalLM(DecoderConfig.from_hf(raw))


def settings(**changes) -> Config:
    """Return a configuration; `changes` are `section__field=value`."""
    config = Config()
    for name, value in changes.items():
        section, field = name.split("__")
        setattr(getattr(config, section), field, value)
    return config


def strategy_of(monkeypatch, world_size: int, model: CausalLM, **changes) -> str:
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    return sharding.choose_strategy(settings(**changes), model, CPU)


# ---- the strategy


@pytest.mark.parametrize(
    ("is_trained", "optimizer", "bytes_per_parameter"),
    [(True, "adamw", 16), (True, "adamw8bit", 10), (False, "adamw", 2)],
)
@pytest.mark.parametrize("fits", [True, False])
def test_auto_shards_what_does_not_fit(
    monkeypatch, meta_model, capsys, is_trained, optimizer, bytes_per_parameter, fits
):
    """A parameter trained by AdamW takes weight, gradient and two states; a frozen one itself."""
    needed = bytes_per_parameter * sum(p.numel() for p in meta_model.parameters())
    if not is_trained:
        meta_model.to(torch.bfloat16).requires_grad_(False)
    available = math.ceil((1.02 if fits else 0.98) * needed / sharding.WEIGHTS_SHARE)
    monkeypatch.setattr(sharding, "device_bytes", lambda device: available)

    chosen = strategy_of(monkeypatch, 2, meta_model, train__optimizer=optimizer)
    message = capsys.readouterr().err
    if fits:
        assert chosen == "ddp"
        assert "parallel.strategy: ddp, because" in message and ") fit in" in message
    else:
        assert chosen == "fsdp"
        assert "parallel.strategy: fsdp, because" in message and ") do not fit in" in message

    assert strategy_of(monkeypatch, 1, meta_model, train__optimizer=optimizer) == "ddp"
    assert not capsys.readouterr().err


@pytest.mark.parametrize("wanted", ["ddp", "fsdp", "hsdp"])
def test_a_wanted_strategy_is_taken(monkeypatch, meta_model, wanted, capsys):
    changes = {"parallel__strategy": wanted}
    if wanted == "hsdp":
        changes["parallel__shard_size"] = 2
    unhelpful = 1 if wanted == "ddp" else 10**15  # bytes at which auto would choose otherwise
    monkeypatch.setattr(sharding, "device_bytes", lambda device: unhelpful)
    assert strategy_of(monkeypatch, 4, meta_model, **changes) == wanted
    assert strategy_of(monkeypatch, 1, meta_model, **changes) == "ddp"  # nothing to share
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("world_size", "size"), [(4, 3), (2, 4), (6, 4)])
def test_a_shard_size_that_does_not_divide_is_refused(monkeypatch, meta_model, world_size, size):
    changes = {"parallel__strategy": "hsdp", "parallel__shard_size": size}
    message = f"parallel.shard_size = {size} does not divide the {world_size} processes"
    with pytest.raises(UserError, match=message):
        strategy_of(monkeypatch, world_size, meta_model, **changes)


@pytest.mark.parametrize("wanted", ["auto", "fsdp", "hsdp"])
@pytest.mark.parametrize(
    ("version", "is_old"),
    [
        ("2.9.1", True),
        ("2.11.0+cu128", True),
        ("2.12.1", True),
        ("2.13.0", False),
        ("2.14.0a0+git1", False),
        ("3.0.0", False),
    ],
)
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_older_torch_does_not_shard_a_quantized_base(
    monkeypatch, meta_model, capsys, bits, version, is_old, wanted
):
    changes = {"parallel__strategy": wanted}
    if wanted == "hsdp":
        changes["parallel__shard_size"] = 2
    if bits < 16:
        quantize_linears(meta_model.requires_grad_(False), bits, True, ())
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(sharding, "device_bytes", lambda device: 1)

    chosen = strategy_of(monkeypatch, 2, meta_model, **changes)
    message = f"torch {version} cannot shard a quantized base"
    if is_old and bits < 16:
        assert chosen == "ddp" and message in capsys.readouterr().err
    else:
        assert chosen == ("fsdp" if wanted == "auto" else wanted)
        assert message not in capsys.readouterr().err


# ---- settings


NEED_EACH_OTHER = "parallel.shard_size and parallel.strategy='hsdp' need each other"


@pytest.mark.parametrize(
    ("shard_size", "strategy", "message"),
    [
        (2, "auto", NEED_EACH_OTHER),
        (2, "fsdp", NEED_EACH_OTHER),
        (2, "ddp", NEED_EACH_OTHER),
        (None, "hsdp", NEED_EACH_OTHER),
        (0, "hsdp", "parallel.shard_size must be at least 1"),
    ],
)
def test_contradictory_settings_are_refused(shard_size, strategy, message):
    config = settings(data__train_file="train.jsonl")
    validate(config)
    config.parallel.shard_size, config.parallel.strategy = shard_size, strategy
    with pytest.raises(UserError, match=re.escape(message)):
        validate(config)


@pytest.mark.parametrize("has_gpu", [True, False])
def test_offloading_needs_a_gpu(has_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    config = settings(parallel__cpu_offload=True, parallel__strategy="fsdp")
    message = "parallel.cpu_offload moves parameters out of GPU memory, and there is no GPU"
    with contextlib.nullcontext() if has_gpu else pytest.raises(UserError, match=message):
        check_device(config)


@pytest.mark.parametrize("wanted", ["auto", "ddp"])
def test_offloading_needs_shards(wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    changes = {"data__train_file": "train.jsonl", "parallel__cpu_offload": True}
    message = "parallel.cpu_offload needs parallel.strategy fsdp or hsdp"
    with pytest.raises(UserError, match=message):
        validate(settings(**changes, parallel__strategy=wanted))
    validate(settings(**changes, parallel__strategy="fsdp"))


# ---- the layout


class MeshOfRank:
    """As much of a device mesh as `Sharded` reads when it is made."""

    ndim = 1

    def __init__(self, rank: int, size: int):
        self.rank, self.num_ranks = rank, size

    def get_local_rank(self, axis: int) -> int:
        return self.rank

    def size(self, axis: int) -> int:
        return self.num_ranks

    def get_group(self, axis: int) -> None:
        return None


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [1, 2, 4, 7, 12])
def test_rows_are_split_as_torch_chunk_does(ranks: int, rows: int):
    p = torch.arange(rows)
    chunks = list(p.chunk(ranks))
    chunks += [p[:0]] * (ranks - len(chunks))  # the last processes may have no rows
    for rank, chunk in enumerate(chunks):
        layout = sharding.Sharded(MeshOfRank(rank, ranks))  # type: ignore[arg-type]
        assert torch.equal(p[layout.local_rows(p)], chunk)
        assert layout.shard_count == ranks


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def sharded(process_group, meta_model: CausalLM) -> tuple[CausalLM, sharding.Sharded]:
    """A model of one shard, with values."""
    layout = sharding.shard_model(meta_model, "fsdp", Config(), torch.float32, CPU)
    generator = torch.Generator().manual_seed(0)
    for path, p in list(meta_model.named_parameters()):
        parent, _, name = path.rpartition(".")
        values = 0.1 * torch.randn(p.shape, generator=generator)
        layout.materialize(meta_model.get_submodule(parent), name, values)
    return meta_model, layout


def plain_copy(model: CausalLM) -> CausalLM:
    """Make an unsharded model with the same values."""
    copy = CausalLM(model.config)
    copy.load_state_dict({name: p.full_tensor() for name, p in model.state_dict().items()})
    return copy


def test_a_sharded_model_computes_what_a_plain_one_does(sharded):
    model, layout = sharded
    plain = plain_copy(model)
    tokens = random_tokens(12)
    labels = tokens.clone()
    labels[:4] = -100
    for p in model.parameters():
        assert isinstance(p, DTensor) and p.requires_grad
    with torch.no_grad():
        assert torch.equal(model(tokens), plain(tokens))
    layout.reshard(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())

    loss, expected = model(tokens, labels=labels), plain(tokens, labels=labels)
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    parameters = {
        name: nn.Parameter(layout.to_local(p.detach())) for name, p in model.named_parameters()
    }
    layout.sum_gradients(model, parameters)
    for name, p in plain.named_parameters():
        assert torch.equal(parameters[name].grad, p.grad), name
    assert all(p.grad is None for p in model.parameters())


def test_rows_become_tensors_of_all_processes(sharded):
    model, layout = sharded
    weight = model.lm_head.weight
    rows = torch.arange(2.0 * len(weight)).view(-1, 2)  # other columns than the parameter has
    tensor = layout.to_dtensor(rows, weight)
    assert isinstance(tensor, DTensor) and tensor.shape == rows.shape
    assert torch.equal(layout.to_local(tensor), rows)
    assert torch.equal(layout.full_tensor(rows, weight), rows)
    assert layout.sum_over_shards(torch.tensor(3.0)).item() == 3.0


def test_states_are_read_where_a_dtensor_copies_its_rows(sharded, tmp_path, monkeypatch):
    """As on a GPU: DTensor.from_local copies rows that are not on the mesh's device."""
    model, layout = sharded
    parameters = dict(model.named_parameters())
    saved = {
        f"optimizer.{name}.exp_avg": torch.rand(layout.to_local(p).shape)
        for name, p in parameters.items()
    }
    saved["optimizer.lm_head.weight.step"] = torch.tensor(7.0)
    saved["optimizer.lm_head.weight.absmax1"] = torch.rand(3)  # a statistic of this process
    save_sharded(tmp_path, saved, parameters, layout)

    from_local = DTensor.from_local
    monkeypatch.setattr(
        sharding.DTensor, "from_local", lambda rows, *args, **kw: from_local(rows + 1, *args, **kw)
    )
    loaded = load_sharded(tmp_path, parameters, layout)
    assert loaded.keys() == saved.keys()
    for name, tensor in saved.items():
        assert type(loaded[name]) is Tensor and torch.equal(loaded[name], tensor), name


def test_offloaded_rows_stay_on_the_cpu_for_files(sharded):
    model, layout = sharded
    gpus = MeshOfRank(0, 1)
    gpus.device_type = "cuda"
    offloaded = sharding.Sharded(gpus, host_mesh=layout.mesh)  # type: ignore[arg-type]
    weight = model.lm_head.weight
    rows = torch.rand(len(weight), 2)
    tensor = offloaded.to_dtensor(rows, weight)
    assert tensor.device_mesh is layout.mesh
    assert offloaded.to_local(tensor).data_ptr() == rows.data_ptr()


def test_cpu_offload_makes_a_mesh_for_files(process_group, meta_model, monkeypatch):
    """The mesh of GPUs is replaced by one of the CPU, and pages are not pinned: there is no GPU."""
    unpinned = fsdp.CPUOffloadPolicy(pin_memory=False)
    monkeypatch.setattr(fsdp, "CPUOffloadPolicy", lambda: unpinned)
    real, device_types = sharding.init_device_mesh, []

    def mesh_of_cpus(device_type: str, sizes: tuple[int, ...], **names):
        device_types.append(device_type)
        return real("cpu", sizes, **names)

    monkeypatch.setattr(sharding, "init_device_mesh", mesh_of_cpus)
    config = settings(parallel__cpu_offload=True)
    layout = sharding.shard_model(
        meta_model, "fsdp", config, torch.float32, torch.device("cuda", 0)
    )
    assert device_types == ["cuda", "cpu"]
    assert layout.host_mesh is not None
    assert all(layout.to_local(p).device == CPU for p in meta_model.parameters())


def test_free_memory_of_a_cpu_is_shared_by_its_processes(monkeypatch):
    free = distributed.free_bytes(CPU)
    assert 2**20 < free <= sharding.device_bytes(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert distributed.free_bytes(CPU) == pytest.approx(free / 4, rel=0.3)


def test_free_memory_without_linux_is_all_memory(monkeypatch):
    """macOS has no /proc."""
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    assert distributed.free_bytes(CPU) == sharding.device_bytes(CPU)


@pytest.mark.parametrize("fits", [True, False])
def test_rows_stay_gathered_between_passes_where_they_fit(sharded, fits, monkeypatch):
    model, layout = sharded
    tokens = random_tokens(8)
    needed = sum(p.numel() * p.itemsize for p in plain_copy(model).parameters())
    free = needed / sharding.GATHERED_SHARE * (1.01 if fits else 0.99)
    monkeypatch.setattr(distributed, "free_bytes", lambda device: free)

    blocks_and_embedding = nn.ModuleList([*model.model.layers, model.model.embed_tokens])
    with torch.no_grad():
        expected = model(tokens)
        for _ in range(2):
            with layout.keep_gathered(model):
                assert torch.equal(model(tokens), expected)
                gathered = [not isinstance(p, DTensor) for p in blocks_and_embedding.parameters()]
                assert all(gathered) if fits else not any(gathered)
                assert torch.equal(model(tokens), expected)
            assert fits == all(isinstance(p, DTensor) for p in model.parameters())
            model(tokens)
            assert all(isinstance(p, DTensor) for p in blocks_and_embedding.parameters())


def test_gradients_are_reduced_when_they_are_asked_for(sharded):
    model, layout = sharded
    tokens = random_tokens(8)
    layout.set_gradient_sync(model, False)
    model(tokens, labels=tokens).backward()
    assert model.lm_head.weight.grad is None  # accumulated where it is not yet reduced
    layout.set_gradient_sync(model, True)
    model(tokens, labels=tokens).backward()
    assert isinstance(model.lm_head.weight.grad, DTensor)


def test_methods_for_sharding_do_nothing_to_a_replicated_model(llama: CausalLM):
    REPLICATED.set_gradient_sync(llama, False)
    REPLICATED.reshard(llama)
    assert REPLICATED.local_rows(llama.lm_head.weight) == slice(None)


class Recorder(nn.Module):
    """Records its arguments."""

    def forward(self, tokens: Tensor, *, labels: Tensor | None = None) -> Tensor:
        self.seen = (tokens, labels)
        return tokens


@pytest.mark.parametrize("with_labels", [True, False])
def test_labels_are_hidden_from_the_hook_that_moves_arguments(with_labels: bool):
    """On CUDA fully_shard's hook, which is added first, moves tensors that it finds to the GPU."""
    model = Recorder()
    found = []

    def fully_shards_hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        found.extend(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))

    model.register_forward_pre_hook(fully_shards_hook, prepend=True, with_kwargs=True)
    sharding.keep_labels_on_host(model)
    tokens, labels = torch.tensor([1]), torch.tensor([2])
    if with_labels:
        model(tokens, labels=labels)
        assert model.seen[1] is labels
    else:
        model(tokens)
        assert model.seen[1] is None
    assert model.seen[0] is tokens and len(found) == 1 and found[0] is tokens
