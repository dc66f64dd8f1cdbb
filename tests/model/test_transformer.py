"""The decoder: the three results of `forward`, dtypes, and documents."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers import PreTrainedModel

from helpers.tiny_models import config_json, ours, random_tokens, tiny
from minilora.model.attention import PackedAttention
from minilora.model.hf_config import DecoderConfig
from minilora.model.loss import cross_entropy_sum
from minilora.model.transformer import CausalLM, RMSNorm

LENGTHS = [10, 1, 19]
TOKENS = random_tokens(sum(LENGTHS))


@pytest.fixture(params=[False, True], ids=["own head", "tied head"])
def model(request) -> CausalLM:
    return ours(tiny("llama3", tie_word_embeddings=request.param))


def supervised(share: float = 0.5) -> Tensor:
    """Labels of TOKENS; the first of each document has none."""
    draws = torch.rand(len(TOKENS), generator=torch.Generator().manual_seed(0))
    labels = torch.where(draws < share, TOKENS, -100)
    for start in itertools.accumulate([0, *LENGTHS[:-1]]):
        labels[start] = -100
    return labels


def test_names_are_those_of_hugging_face(hf_llama: PreTrainedModel):
    config = DecoderConfig.from_hf(config_json("llama3"))
    assert set(CausalLM(config).state_dict()) == set(hf_llama.state_dict())


def test_labels_give_the_loss(model: CausalLM):
    labels = supervised()
    loss = model(TOKENS, LENGTHS, labels=labels)
    assert loss.dtype == torch.float32 and loss.shape == ()
    logits = model(TOKENS, LENGTHS)
    expected = F.cross_entropy(logits[:-1], labels[1:], reduction="sum")
    torch.testing.assert_close(loss, expected)
    hidden = model.model(TOKENS, PackedAttention(LENGTHS, TOKENS.device))
    assert torch.equal(loss, cross_entropy_sum(hidden, model.head_weight, labels))


@torch.no_grad()
def test_logits_at_gives_the_logits_of_some_rows(model: CausalLM):
    logits = model(TOKENS, LENGTHS)
    assert logits.shape == (len(TOKENS), model.config.vocab_size)
    for rows in ([29], [9, 10, 29], [3, 3, 0], list(range(len(TOKENS)))):
        some = model(TOKENS, LENGTHS, logits_at=torch.tensor(rows))
        torch.testing.assert_close(some, logits[rows])


@torch.no_grad()
def test_tokens_are_one_document_by_default(model: CausalLM):
    assert torch.equal(model(TOKENS), model(TOKENS, [len(TOKENS)]))
    assert not torch.equal(model(TOKENS), model(TOKENS, LENGTHS))


@torch.no_grad()
def test_another_attention_replaces_that_of_documents(llama: CausalLM):
    attention = PackedAttention(LENGTHS, TOKENS.device)
    assert torch.equal(llama(TOKENS, attention=attention), llama(TOKENS, LENGTHS))


@torch.no_grad()
def test_documents_do_not_see_each_other(llama: CausalLM):
    tokens = TOKENS.clone()
    before = llama(tokens, LENGTHS)
    tokens[10] = (tokens[10] + 1) % llama.config.vocab_size  # all of the second document
    after = llama(tokens, LENGTHS)
    assert torch.equal(before[:10], after[:10]) and torch.equal(before[11:], after[11:])
    assert not torch.equal(before[10], after[10])


@torch.no_grad()
def test_a_tied_head_is_the_embedding():
    tied = ours(tiny("llama3", tie_word_embeddings=True))
    assert tied.head_weight is tied.model.embed_tokens.weight
    assert "lm_head.weight" not in tied.state_dict()


def test_activations_have_the_dtype_of_autocast(llama: CausalLM):
    """Over fp32 weights, the hidden states that blocks pass on are 16-bit under autocast."""
    dtypes = []
    for block in llama.model.layers:
        block.register_forward_hook(lambda block, inputs, out: dtypes.append(out.dtype))
    llama(TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        assert llama(TOKENS).dtype == torch.bfloat16
        assert llama(TOKENS, labels=supervised()).dtype == torch.float32
    assert dtypes == [torch.float32] * 2 + [torch.bfloat16] * 4


def test_norms_stay_in_16_bits_under_autocast_on_a_gpu():
    """There autocast would return float32 (torch >= 2.12), and all that follows would be too."""
    was_enabled, was_dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    norm = RMSNorm(8, eps=1e-5)
    with FakeTensorMode():
        # not torch.autocast, which looks for a real GPU
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            norm.weight = nn.Parameter(torch.ones(8, device="cuda"), requires_grad=False)
            x = torch.empty(3, 8, dtype=torch.bfloat16, device="cuda")
            out = norm(x)
            assert torch.is_autocast_enabled("cuda")
        finally:
            torch.set_autocast_enabled("cuda", was_enabled)
            torch.set_autocast_dtype("cuda", was_dtype)
    assert out.dtype == torch.bfloat16


def test_a_head_in_fp32_is_used_in_the_dtype_of_the_activations(llama: CausalLM):
    """As with lora.train_embeddings over a 16-bit base."""
    llama.to(torch.bfloat16)
    expected = llama(TOKENS)
    llama.lm_head.weight = nn.Parameter(llama.lm_head.weight.float())
    assert torch.equal(llama(TOKENS), expected)
    assert llama(TOKENS, logits_at=torch.tensor([1])).dtype == torch.bfloat16
