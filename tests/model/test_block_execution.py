"""How blocks run: recomputed, kept, offloaded, in tiles or compiled, with the same numbers."""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from helpers.tiny_models import ours, random_tokens, tiny
from minilora.config import LoraConfig, TrainConfig
from minilora.distributed import REPLICATED
from minilora.model import activation_offload, block_execution
from minilora.model.activation_offload import OFFLOAD_BUFFERS, ActivationOffload
from minilora.model.attention import PackedAttention
from minilora.model.block_execution import (
    KeptBytes,
    block_forwards,
    prepare_blocks,
    recompute_blocks,
)
from minilora.model.lora import init_adapters, inject, lora_layers
from minilora.model.quantization import quantize_linears
from minilora.model.transformer import CausalLM

LENGTHS = [25, 15]
TOKENS = random_tokens(sum(LENGTHS))
LABELS = TOKENS.masked_fill(torch.tensor([0, 25])[:, None].eq(torch.arange(40)).any(0), -100)


@pytest.fixture(scope="module")
def hf_three_blocks() -> PreTrainedModel:
    return tiny("llama3", num_hidden_layers=3)


def with_adapters(hf: PreTrainedModel, dropout: float = 0.2, **settings) -> CausalLM:
    """Make a model in train mode whose adapters all have gradients, and prepare its blocks."""
    model = ours(hf).train()
    inject(model, LoraConfig(rank=4, dropout=dropout))
    _draw_adapters(model)
    prepare_blocks(model, TrainConfig(**settings))
    return model


def _draw_adapters(model: CausalLM) -> None:
    init_adapters(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.1, generator=generator)


def loss_and_gradients(
    model: CausalLM, tokens: Tensor = TOKENS, lengths: list[int] = LENGTHS, labels: Tensor = LABELS
) -> dict[str, Tensor]:
    """Return the loss, by the name of "loss", and all gradients by the parameters' names."""
    torch.manual_seed(0)  # dropout
    model.zero_grad()
    loss = model(tokens, lengths, labels=labels)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), **grads}


def count_runs(model: CausalLM) -> list[int]:
    """Return a list to which each block appends its index when it runs."""
    runs: list[int] = []
    for index, block in enumerate(model.model.layers):
        block.input_layernorm.register_forward_hook(lambda *_, index=index: runs.append(index))
    return runs


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]) and tensor.abs().max() > 0, name


RECOMPUTED = {
    "all": ({"gradient_checkpointing": True}, [0, 1, 2]),
    "one": ({"gradient_checkpointing": 1}, [0]),
    "more than there are": ({"gradient_checkpointing": 9}, [0, 1, 2]),
    "auto begins with all": ({"gradient_checkpointing": "auto"}, [0, 1, 2]),
    "offloaded": ({"gradient_checkpointing": True, "activation_offload": True}, [0, 1, 2]),
    "two offloaded": ({"gradient_checkpointing": 2, "activation_offload": True}, [0, 1]),
}


@pytest.mark.parametrize(("settings", "recomputed"), RECOMPUTED.values(), ids=RECOMPUTED.keys())
def test_recomputed_blocks_run_twice_and_give_the_same_bits(
    hf_three_blocks: PreTrainedModel, settings: dict, recomputed: list[int]
):
    """With dropout too. The base is frozen, so the first block's input requires no gradient."""
    plain = with_adapters(hf_three_blocks, gradient_checkpointing=False)
    model = with_adapters(hf_three_blocks, **settings)
    expected = loss_and_gradients(plain)
    for _ in range(2):  # what the first step leaves behind does not disturb the second
        runs = count_runs(model)
        assert_equal(loss_and_gradients(model), expected)
        assert sorted(runs) == sorted([0, 1, 2, *recomputed])


def test_blocks_that_are_not_recomputed_any_more_run_once(hf_three_blocks: PreTrainedModel):
    model = with_adapters(hf_three_blocks, gradient_checkpointing=True)
    expected = loss_and_gradients(model)
    recompute_blocks(model, 1)
    runs = count_runs(model)
    assert_equal(loss_and_gradients(model), expected)
    assert sorted(runs) == [0, 0, 1, 2]


# ---- offloaded inputs


def test_offloaded_inputs_are_on_the_host(hf_three_blocks: PreTrainedModel, monkeypatch):
    """What autograd keeps of a recomputed block's input is a copy, of every block."""
    kept = []
    keep = ActivationOffload._keep

    def recorded(self, x):
        kept.append(keep(self, x))
        return kept[-1]

    monkeypatch.setattr(ActivationOffload, "_keep", recorded)
    model = with_adapters(hf_three_blocks, gradient_checkpointing=True, activation_offload=True)
    loss = model(TOKENS, LENGTHS, labels=LABELS)
    assert [item.on_host.shape for item in kept] == [(40, 32)] * 3
    assert [item.on_device is not None for item in kept] == [False, True, True]
    assert [item.previous for item in kept] == [None, kept[0], kept[1]]
    loss.backward()
    assert all(item.on_device is None for item in kept)
    model(TOKENS, LENGTHS, labels=LABELS)
    assert kept[3].previous is None  # the inputs of the first pass are not kept by the second


class RecordedStreams:
    """Stands in for torch.cuda: records which stream waits for what."""

    def __init__(self):
        self.log: list[tuple] = []
        self.copies = 0
        self.main = self._stream("main")

    def _stream(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(
            name=name,
            wait_stream=lambda other: self.log.append((name, "waits for", other.name)),
            wait_event=lambda event: self.log.append((name, "waits for", event)),
            record_event=self._record_event,
        )

    def _record_event(self) -> str:
        self.copies += 1
        self.log.append(("side", "copies", self.copies))
        return f"copy {self.copies}"

    def Stream(self) -> SimpleNamespace:
        return self._stream("side")

    def current_stream(self) -> SimpleNamespace:
        return self.main

    def stream(self, stream: SimpleNamespace):
        return torch.no_grad()  # a context that changes nothing here


def test_offloading_waits_for_copies_where_it_must(monkeypatch):
    """Memory is given back, and used, only after its copy; each copy begins one block early."""
    streams = RecordedStreams()
    monkeypatch.setattr(activation_offload.torch, "get_device_module", lambda device: streams)
    offload = ActivationOffload()
    inputs = [torch.full((4, 2), float(block)) for block in range(4)]
    kept = []
    for block, x in enumerate(inputs):
        offload.hooks(x, is_first=block == 0)
        kept.append(offload._keep(x))
    to_host = [("side", "waits for", "main"), ("side", "copies", 1)]
    to_host += [("side", "waits for", "main"), ("side", "copies", 2)]
    to_host += [("side", "waits for", "main"), ("side", "copies", 3)]
    to_host += [("main", "waits for", "copy 1")]  # then block 0's input is dropped
    to_host += [("side", "waits for", "main"), ("side", "copies", 4)]
    to_host += [("main", "waits for", "copy 2")]
    assert streams.log == to_host
    assert sum(item.on_device is not None for item in kept) == OFFLOAD_BUFFERS

    streams.log.clear()
    for x, item in reversed(list(zip(inputs, kept, strict=True))):
        assert torch.equal(offload._bring_back(item), x)
    assert streams.log == [
        ("main", "waits for", "copy 4"),  # block 3's input was still there, and block 2's is
        ("side", "waits for", "main"),  # block 1's is fetched while block 2 computes
        ("side", "copies", 5),
        ("main", "waits for", "copy 3"),
        ("side", "waits for", "main"),
        ("side", "copies", 6),
        ("main", "waits for", "copy 5"),
        ("main", "waits for", "copy 6"),
    ]


# ---- tiles


def kept_bytes(model: CausalLM, num_tokens: int) -> float:
    """Return what the first block keeps for each token."""
    forward = block_forwards(model)[0]
    forward.kept_bytes = KeptBytes()
    loss_and_gradients(
        model,
        random_tokens(num_tokens),
        [num_tokens],
        random_tokens(num_tokens).index_fill(0, torch.tensor([0]), -100),
    )
    return forward.kept_bytes.per_token


@pytest.mark.parametrize("recomputed", [False, True])
def test_tiles_of_tokens_give_the_same_loss(hf_three_blocks: PreTrainedModel, recomputed: bool):
    settings = {"gradient_checkpointing": recomputed, "dropout": 0.0}
    expected = loss_and_gradients(with_adapters(hf_three_blocks, **settings))
    model = with_adapters(hf_three_blocks, **settings, mlp_tile_tokens=16)
    sizes: list[int] = []
    model.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda layer, inputs, out: sizes.append(len(inputs[0]))
    )
    actual = loss_and_gradients(model)
    assert sizes[:3] == [16, 16, 8]
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_tiles_keep_nothing_of_the_inner_activations(hf_three_blocks: PreTrainedModel):
    settings = {"gradient_checkpointing": False, "dropout": 0.0}
    whole = with_adapters(hf_three_blocks, **settings)
    tiled = with_adapters(hf_three_blocks, **settings, mlp_tile_tokens=16)
    inner_size = 48
    saved = kept_bytes(whole, 64) - kept_bytes(tiled, 64)
    # the outputs of gate and up, silu(gate) and the product; fp32
    assert saved >= 4 * inner_size * 4


# ---- what a block keeps


def test_kept_bytes_are_counted_once_and_without_input_and_weights():
    weight = nn.Parameter(torch.randn(8, 8))
    x = torch.randn(10, 8, requires_grad=True)
    kept = KeptBytes()
    with kept.hooks(x, [weight]):
        product = x @ weight  # keeps x and the weight, which are not counted
        (product[:5] * product[5:]).exp()  # keeps two parts of one tensor, and its own result
    assert kept.per_token == (10 * 8 + 5 * 8) * 4 / 10
    assert kept.num_tokens == 10


# ---- compiled blocks


def quantized(hf: PreTrainedModel, bits: int) -> CausalLM:
    """Make a model with quantized linear layers."""
    model = ours(hf).train()
    weights = {
        path: layer.weight.detach()
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    }
    for path, layer in quantize_linears(model, bits, True, ()).items():
        layer.quantize(weights[path], REPLICATED)
    return model


def prepared(hf: PreTrainedModel, kind: str, compiles: bool) -> CausalLM:
    """Make a model of one of the kinds that are trained."""
    model = ours(hf).train() if kind in ("lora", "full") else quantized(hf, int(kind))
    if kind != "full":
        inject(model, LoraConfig(rank=4))
        _draw_adapters(model)
    prepare_blocks(model, TrainConfig(compile=compiles, gradient_checkpointing=1))
    return model


@pytest.mark.parametrize(
    ("kind", "backend"), [("lora", "eager"), ("4", "eager"), ("8", "eager"), ("full", "aot_eager")]
)
def test_any_batches_need_few_compiled_forms(monkeypatch, kind: str, backend: str):
    """Of compiling, graphs are made here, in one case those of the backward pass too.

    Machine code, which would take a minute, is not.
    """
    compile_quickly = functools.partial(torch.compile, backend=backend, fullgraph=True)
    monkeypatch.setattr(block_execution.torch, "compile", compile_quickly)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()

    hf = tiny("llama3", hidden_size=64, intermediate_size=128)
    compiled, eager = prepared(hf, kind, compiles=True), prepared(hf, kind, compiles=False)
    generator = torch.Generator().manual_seed(0)
    for batch in range(20):
        documents = int(torch.randint(1, 6, (), generator=generator))
        lengths = torch.randint(2, 40, (documents,), generator=generator).tolist()
        tokens = random_tokens(sum(lengths), seed=batch)
        labels = tokens.clone()
        labels[[sum(lengths[:i]) for i in range(documents)]] = -100
        actual = loss_and_gradients(compiled, tokens, lengths, labels)
        expected = loss_and_gradients(eager, tokens, lengths, labels)
        for name, tensor in actual.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4, msg=name)
    assert 0 < counters["stats"]["unique_graphs"] <= 3

    before = counters["stats"]["calls_captured"]
    with torch.no_grad():  # evaluation and generation
        logits = compiled(TOKENS, [11, 29])
    assert torch.equal(logits, eager(TOKENS, [11, 29]))
    assert counters["stats"]["calls_captured"] == before


def test_blocks_are_not_compiled_where_attention_cannot_be(
    hf_three_blocks: PreTrainedModel, monkeypatch, capsys
):
    """On a GPU without the variable-length kernel; a line says so once."""
    monkeypatch.setattr(PackedAttention, "can_be_compiled", lambda self, x: False)
    block_execution._log_uncompiled.cache_clear()
    model = with_adapters(hf_three_blocks, gradient_checkpointing=False)
    expected = loss_and_gradients(model)
    for forward in block_forwards(model):
        forward.compiled = None if forward.compiled else _never
    assert_equal(loss_and_gradients(model), expected)
    assert capsys.readouterr().err.count("train.compile: the blocks are not compiled") == 1


def _never(*_):
    raise AssertionError("a compiled block ran")
