"""Models that several processes share: what each holds and reads, and how they answer together.

Real processes under torchrun. A start costs seconds, so each of the fixtures `on_two`, `on_three`
and `on_four` does everything that is wanted of that many processes.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from helpers import ranks
from helpers.quantized import need_sharding, store_quantized
from helpers.ranks import Holdings, ModelOptions, launch, outcome
from helpers.tiny_models import config_json, random_tokens, tiny
from helpers.tiny_runs import base_model
from minilora.data.tokenizer import Tokenizer
from minilora.model.hf_config import DecoderConfig
from minilora.model.transformer import CausalLM

pytestmark = pytest.mark.system

TOKENS = random_tokens(16)
MB = 1_000_000
NOISE = 12 * MB  # the allocator rounds up, and keeps some of what is freed

# checkpoint, and how it is built
MODELS = {
    "16 bits": ("plain", ModelOptions()),
    "cast": ("bfloat16", ModelOptions(dtype="auto", cpu_has_bfloat16=False)),
    "full": ("plain", ModelOptions(method="full")),
    "random": ("plain", ModelOptions(method="full", init="random", seed=3)),
    "nf4": ("plain", ModelOptions(bits=4, double_quant=False)),
    "nf4 double": ("plain", ModelOptions(bits=4)),
    "int8": ("plain", ModelOptions(bits=8)),
    "stored nf4": ("nf4", ModelOptions(bits=4)),
    "stored nf4 double": ("nf4 double", ModelOptions(bits=4)),
    "stored int8": ("int8", ModelOptions(bits=8)),
    "odd nf4": ("odd", ModelOptions(bits=4, double_quant=False)),
    "odd nf4 double": ("odd", ModelOptions(bits=4, rank=5)),
    "odd int8": ("odd", ModelOptions(bits=8, rank=5)),
    "odd stored nf4 double": ("odd nf4 double", ModelOptions(bits=4)),
}
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)
TWO_OR_THREE = pytest.mark.parametrize("num_ranks", [2, 3])
HSDP = ModelOptions(bits=4, strategy="hsdp", shard_size=2)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def checkpoints(home: Path) -> dict[str, Path]:
    """Save the checkpoints of MODELS.

    plain is a Qwen2 (with biases) with more than one nested block of 256 x 64 weights in a layer,
    bfloat16 the same in that dtype.
    odd has rows that are not whole blocks, and numbers of rows that neither 2 nor 3 divides.
    """
    plain, odd = home / "plain", home / "odd"
    tiny("qwen2", hidden_size=128, intermediate_size=192).save_pretrained(plain)
    tiny("qwen2", hidden_size=200, intermediate_size=50).save_pretrained(odd)
    bfloat16 = home / "bfloat16"
    rounded = tiny("qwen2", hidden_size=128, intermediate_size=192, torch_dtype="bfloat16")
    rounded.save_pretrained(bfloat16)
    return {
        "plain": plain,
        "bfloat16": bfloat16,
        "nf4": store_quantized(plain, home / "nf4", 4, double_quant=False),
        "nf4 double": store_quantized(plain, home / "nf4 double", 4),
        "int8": store_quantized(plain, home / "int8", 8),
        "odd": odd,
        "odd nf4 double": store_quantized(odd, home / "odd nf4 double", 4),
    }


@pytest.fixture(scope="module")
def large(home: Path) -> Path:
    """Write a random bfloat16 checkpoint of 300 MB in tensors of 8 MB and less."""
    directory = home / "large"
    directory.mkdir()
    raw = config_json(
        "llama3",
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=9,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=4096,
        torch_dtype="bfloat16",
    )
    (directory / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    with torch.device("meta"):
        model = CausalLM(DecoderConfig.from_hf(raw))
    noise = torch.randn(4096 * 1024, generator=torch.Generator().manual_seed(0))
    noise = noise.mul_(0.02).to(torch.bfloat16)
    tensors = {
        name: noise[: p.numel()].view(p.shape).clone() for name, p in model.named_parameters()
    }
    save_file(tensors, directory / "model.safetensors")
    assert (directory / "model.safetensors").stat().st_size > 300 * MB
    return directory


@pytest.fixture(scope="module")
def base(home: Path) -> Path:
    """Save a model with a tokenizer, for answers."""
    return base_model(home / "base", hidden_size=64, intermediate_size=128)


def holding_jobs(checkpoints: dict[str, Path]) -> dict[str, ranks.Job]:
    return {
        f"holds {name}": (ranks.holdings, (checkpoints[checkpoint], TOKENS, options))
        for name, (checkpoint, options) in MODELS.items()
    }


@pytest.fixture(scope="module")
def on_two(home: Path, checkpoints, large, base) -> ranks.Results:
    jobs: dict[str, ranks.Job] = {}
    for bits in (16, 4):  # first: what other jobs have freed would hide a peak
        options = ModelOptions(dtype="bfloat16", bits=bits, rank=1)
        jobs[f"peak in {bits} bits"] = ranks.load_peak, (checkpoints["plain"], large, options)
    return launch(home / "jobs 2", 2, jobs | holding_jobs(checkpoints) | answer_jobs(base))


@pytest.fixture(scope="module")
def on_three(home: Path, checkpoints) -> ranks.Results:
    return launch(home / "jobs 3", 3, holding_jobs(checkpoints))


@pytest.fixture(scope="module")
def on_four(home: Path, checkpoints, base) -> ranks.Results:
    jobs: dict[str, ranks.Job] = {"hsdp": (ranks.holdings, (checkpoints["plain"], TOKENS, HSDP))}
    return launch(home / "jobs 4", 4, jobs | answer_jobs(base))


@pytest.fixture
def results_of(request: pytest.FixtureRequest) -> Callable[[int], ranks.Results]:
    """Return a function from a number of processes to their results."""
    fixtures = {2: "on_two", 3: "on_three", 4: "on_four"}
    return lambda num_ranks: request.getfixturevalue(fixtures[num_ranks])


@pytest.fixture(scope="module")
def held_alone(checkpoints) -> Callable[[str], Holdings]:
    """Return a function from a name of MODELS to what one process holds of it."""
    jobs = holding_jobs(checkpoints)

    @functools.cache
    def held(name: str) -> Holdings:
        function, arguments = jobs[f"holds {name}"]
        return function(*arguments)

    return held


def assert_identical(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare tensors to the bit."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and actual[name].shape == tensor.shape, name
        our_bytes, their_bytes = (
            t.contiguous().view(-1).view(torch.uint8) for t in (actual[name], tensor)
        )
        assert torch.equal(our_bytes, their_bytes), name


# ---- what each process holds


@EVERY_MODEL
@TWO_OR_THREE
def test_gathered_rows_are_the_model_to_the_bit(name, num_ranks, results_of, held_alone):
    expected = held_alone(name)
    for mine in outcome(results_of(num_ranks), f"holds {name}"):
        assert_identical(mine.full, expected.full)
        assert_identical(mine.buffers, expected.buffers)
        torch.testing.assert_close(mine.logits, expected.logits, rtol=1e-5, atol=1e-5)
        assert mine.trainable == expected.trainable
    if name == "cast":
        assert expected.full["lm_head.weight"].dtype == torch.bfloat16
        assert expected.full["model.norm.weight"].dtype == expected.logits.dtype == torch.float32
    if "nf4" in name:
        projections = [n for n in expected.full if n.endswith("proj.base_layer.weight")]
        assert {expected.full[n].dtype for n in projections} == {torch.uint8}
        has_nested = any("nested_absmax" in buffer for buffer in expected.buffers)
        assert has_nested == ("double" in name)


def num_rows(rank: int, num_ranks: int, total: int) -> int:
    """Return how many rows a process holds: chunks as torch.chunk makes them, or none."""
    chunks = torch.arange(total).chunk(num_ranks)
    return len(chunks[rank]) if rank < len(chunks) else 0


@EVERY_MODEL
@TWO_OR_THREE
def test_every_parameter_is_split_by_rows(name, num_ranks, results_of, held_alone):
    need_sharding(MODELS[name][1].bits)
    full = held_alone(name).full
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} < full.keys()
    assert any("q_proj" in path for path in full)
    rows_in_all = dict.fromkeys(full, 0)
    for rank, mine in enumerate(outcome(results_of(num_ranks), f"holds {name}")):
        assert mine.placements == dict.fromkeys(full, "(Shard(dim=0),)")
        assert not mine.unsharded
        for path, tensor in full.items():
            row_bytes = tensor[:1].numel() * tensor.itemsize
            rows = num_rows(rank, num_ranks, len(tensor))
            # memory is allocated in chunks of equal size: a last, shorter one may be padded
            chunk = -(-len(tensor) // num_ranks)
            assert rows * row_bytes <= mine.local_bytes[path] <= chunk * row_bytes, path
            rows_in_all[path] += rows
    assert rows_in_all == {path: len(tensor) for path, tensor in full.items()}


def test_hsdp_shards_inside_its_groups(on_four, held_alone):
    need_sharding(HSDP.bits)
    expected = held_alone("nf4 double")
    total = sum(tensor.numel() * tensor.itemsize for tensor in expected.full.values())
    for mine in outcome(on_four, "hsdp"):
        assert mine.placements == dict.fromkeys(expected.full, "(Replicate(), Shard(dim=0))")
        assert_identical(mine.full, expected.full)
        assert 0.49 < sum(mine.local_bytes.values()) / total < 0.52
        torch.testing.assert_close(mine.logits, expected.logits, rtol=1e-5, atol=1e-5)


# ---- loading


@pytest.mark.parametrize("name", ["16 bits", "full", "nf4", "nf4 double", "int8", "odd int8"])
@TWO_OR_THREE
def test_each_process_reads_its_own_rows_once(name, num_ranks, results_of, held_alone):
    need_sharding(MODELS[name][1].bits)
    shapes = {tensor: shape for tensor, _, shape in held_alone(name).reads}
    for rank, mine in enumerate(outcome(results_of(num_ranks), f"holds {name}")):
        assert sorted(tensor for tensor, _, _ in mine.reads) == sorted(shapes)
        for tensor, start, shape in mine.reads:
            total, *columns = shapes[tensor]
            assert start == min(total, rank * -(-total // num_ranks)), tensor
            assert shape == (num_rows(rank, num_ranks, total), *columns), tensor


@pytest.mark.parametrize("bits", [16, 4])
def test_loading_takes_a_share_and_a_few_tensors(bits, on_two, large):
    """Host memory does not grow with the number of processes."""
    need_sharding(bits)
    total, largest = (large / "model.safetensors").stat().st_size, 4096 * 1024 * 2
    expected = total if bits == 16 else 2 * largest + (total - 2 * largest) * 0.26
    for held, peak in outcome(on_two, f"peak in {bits} bits"):
        assert 0.48 * expected < held < 0.53 * expected
        assert peak < held + 3 * largest + NOISE, f"{peak / MB:.0f} MB for {held / MB:.0f} MB held"


# ---- answers

STOP_TOKEN_IDS = tuple(range(3, 5000, 17))  # answers end by themselves, each at its own time


def answer_jobs(base: Path) -> dict[str, ranks.Job]:
    """Answer three prompts: a process may have two of them, and another one or none."""
    tokenizer = Tokenizer(base)
    texts = ("Old light", "sound of the new work " * 20, "new")
    prompts = [tokenizer.encode(text).ids for text in texts]
    jobs: dict[str, ranks.Job] = {}
    for bits in (16, 4):
        options = ModelOptions(bits=bits)
        for batch_size in (1, 16):
            arguments = (base, prompts, STOP_TOKEN_IDS, options, batch_size)
            jobs[f"answer in {bits} bits, {batch_size} at a time"] = ranks.answer, arguments
    return jobs


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_processes_with_uneven_prompts_answer_together(
    num_ranks, bits, batch_size, results_of, base
):
    name = f"answer in {bits} bits, {batch_size} at a time"
    function, arguments = answer_jobs(base)[name]
    expected = function(*arguments)
    by_rank = outcome(results_of(num_ranks), name)
    assert [len(mine) for mine in by_rank] == ([2, 1] if num_ranks == 2 else [1, 1, 1, 0])
    assert sorted(answer for mine in by_rank for answer in mine) == expected
    assert len({len(ids) for _, ids, _ in expected}) == 3  # they end at different times
