"""The model on a GPU, beside the same in float64 on the CPU."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.tiny_models import config_json, random_tokens
from minilora.build import autocast_to
from minilora.config import LoraConfig, TrainConfig
from minilora.model.attention import PackedAttention, document_attention
from minilora.model.block_execution import prepare_blocks
from minilora.model.hf_config import DecoderConfig
from minilora.model.lora import init_adapters, inject, lora_layers
from minilora.model.loss import BLOCK_ELEMENTS, CHUNK_ELEMENTS, cross_entropy_sum
from minilora.model.rope import rotary_cos_sin
from minilora.model.transformer import CausalLM

LENGTHS = [40, 3, 90]
TOKENS = random_tokens(sum(LENGTHS))
LABELS = TOKENS.clone()
LABELS[[*range(20), 40, *range(43, 80)]] = -100
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
FULL_PRECISION_AND_16_BITS = pytest.mark.parametrize("dtype", TOLERANCES)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference as a share of the norm of what was expected."""
    expected = expected.double().cpu()
    return float((found.double().cpu() - expected).norm() / expected.norm())


def on_gpu(model: CausalLM, dtype: torch.dtype, gpu: torch.device, **settings) -> CausalLM:
    """Return a copy of a model on a device, in train mode, with prepared blocks.

    What is trained is float32 at least, as in a run.
    """
    moved = copy.deepcopy(model).to(gpu).train()
    for p in moved.parameters():
        is_narrow = dtype in (torch.float16, torch.bfloat16)
        p.data = p.data.to(torch.float32 if is_narrow and p.requires_grad else dtype)
    prepare_blocks(moved, TrainConfig(**{"gradient_checkpointing": False, **settings}))
    return moved


def with_adapters(model: CausalLM) -> CausalLM:
    """Put adapters on a model, whose B is not zero."""
    inject(model, LoraConfig(rank=8))
    init_adapters(model, seed=0)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.02)
    return model


def gradients(
    model: CausalLM, lengths: list[int] = LENGTHS, autocast: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return the loss, by the name of "loss", and all gradients by the parameters' names."""
    model.zero_grad()
    device = model.head_weight.device
    tokens, labels = TOKENS[: sum(lengths)], LABELS[: sum(lengths)]
    with autocast_to(autocast, device):
        loss = model(tokens.to(device), lengths, labels=labels)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "window"), [(64, None), (128, None), (128, 37)])
def test_variable_length_attention(dtype, size, window, gpu):
    """Output and gradients are those of float64, also where several queries share a key."""
    lengths = [1, 130, 64, 7, 257]
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), heads, size) for heads in (8, 2, 2, 8)]
    q, k, v, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)

    packed = PackedAttention(lengths, gpu)
    inputs = [t.to(gpu, copy=True).requires_grad_() for t in (q, k, v)]
    out = packed(0, *inputs, window)
    out.backward(grad.to(gpu))

    exact = [t.double().requires_grad_() for t in (q, k, v)]
    documents = zip(*(t.split(lengths) for t in exact), strict=True)
    expected = torch.cat([document_attention(*document, window) for document in documents])
    expected.backward(grad.double())
    assert relative_error(out, expected) < 0.02
    for found, wanted in zip(inputs, exact, strict=True):
        assert relative_error(found.grad, wanted.grad) < 0.02


@FULL_PRECISION_AND_16_BITS
@pytest.mark.parametrize("recomputed", [0, 2, 3])
def test_loss_and_gradients(dtype, recomputed, gpu, wide_model, exact_products):
    model = with_adapters(wide_model)
    expected = gradients(on_gpu(model, torch.float64, torch.device("cpu")))
    found = gradients(on_gpu(model, dtype, gpu, gradient_checkpointing=recomputed))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(found[name], value) < TOLERANCES[dtype], name


def test_full_training_in_16_bits_has_16_bit_activations(gpu, wide_model):
    """torch >= 2.12 computes norms in float32 under autocast: the head must not get that."""
    model = on_gpu(wide_model, torch.float32, gpu)
    seen = []
    model.model.norm.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    for block in model.model.layers:
        block.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    found = gradients(model, autocast=torch.bfloat16)
    assert seen == [torch.bfloat16] * 4
    expected = gradients(on_gpu(wide_model, torch.float64, torch.device("cpu")))
    for name, value in expected.items():
        assert relative_error(found[name], value) < 0.1, name


def test_compiled_blocks(gpu, wide_model):
    """At most three graphs for any batch, and the numbers of the blocks that are not compiled."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    model = with_adapters(wide_model)
    eager = on_gpu(model, torch.bfloat16, gpu)
    compiled = on_gpu(model, torch.bfloat16, gpu, compile=True, gradient_checkpointing=2)
    for lengths in (LENGTHS, [40, 3], [133], [11] * 12, [2, 2, 60], [70, 63], [5] * 20, [128]):
        expected, found = gradients(eager, lengths), gradients(compiled, lengths)
        for name, value in expected.items():
            assert relative_error(found[name], value) < 0.05, (lengths, name)
    assert counters["stats"]["unique_graphs"] <= 3


def test_deterministic(gpu, wide_model):
    torch.use_deterministic_algorithms(True)
    try:
        model = on_gpu(with_adapters(wide_model), torch.bfloat16, gpu)
        first, second = gradients(model), gradients(model)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in first.items():
        assert torch.equal(second[name], value), name


def test_rotary_frequencies_are_uploaded_once(gpu):
    config = DecoderConfig.from_hf(config_json("llama3"))
    positions = torch.arange(9, device=gpu)
    arguments = (positions, config.rope, config.head_dim, torch.bfloat16)
    first = rotary_cos_sin(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = rotary_cos_sin(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_loss_over_a_large_vocabulary_has_a_limit_of_memory(gpu):
    """Several blocks of logits: all of them in float32 would take 1 GB, and their gradient too."""
    rows, vocab_size, size = 2000, 128_256, 512
    generator = torch.Generator(gpu).manual_seed(0)
    hidden = torch.randn(rows + 1, size, generator=generator, device=gpu).bfloat16()
    weight = torch.randn(vocab_size, size, generator=generator, device=gpu).mul_(0.05).bfloat16()
    labels = torch.randint(vocab_size, (rows + 1,))
    hidden.requires_grad_()
    _ = hidden.detach() @ hidden.detach().t()  # the first product allocates cuBLAS's work space

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = cross_entropy_sum(hidden, weight, labels)
    loss.backward()
    used = torch.cuda.max_memory_allocated() - before
    chunk, block = CHUNK_ELEMENTS["cuda"] * 2, 3 * BLOCK_ELEMENTS["cuda"] * 4
    inputs_and_gradients = 6 * hidden.numel() * 2
    assert used <= chunk + block + inputs_and_gradients

    logits = hidden[:-1].detach().float() @ weight.float().t()
    expected = F.cross_entropy(logits, labels[1:].to(gpu), reduction="sum")
    assert float(loss) == pytest.approx(float(expected), rel=1e-3)
