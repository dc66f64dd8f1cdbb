"""Several processes: the numbers of one, each with its rows of the model; checkpoints that any number of them continue.

Real processes under torchrun. A start costs seconds, so each of the fixtures `on_two`, `on_four`, ... does all that is
wanted of that many processes, and the tests look at what came out.
"""

import contextlib
import functools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import minilora
import ranks
import train
from minilora import parallel
from minilora.build import build_model
from minilora.config import Config, LoraConfig, UserError
from minilora.model import CausalLM, DecoderConfig
from minilora.quant import quantize_linears
from minilora.running.settings import check_device, leaves, validate
from minilora.tokenizer import Tokenizer
from ranks import CPU, fit, launch, outcome
from tiny_models import config_json, random_tokens, tiny
from tiny_runs import base_model, config, losses, metrics

SIZES = {"hidden_size": 64, "intermediate_size": 128}  # whole blocks of 64 in each row
ROWS = 27  # at 8 documents a step, an epoch's last step has 3: some processes have none
STEPS = 8  # two epochs
TOKENS = random_tokens(16)

Place = tuple[str, str]  # variant, layout

FULL = {"method": "full", "train__learning_rate": 1e-5}  # Adam turns the rounding of small gradients into whole steps
BITS8_STATES = {**FULL, "train__optimizer": "adamw8bit"}
VARIANTS = {
    "16 bits": {},
    "4 bits": {"model__bits": 4, "model__double_quant": False},
    "4 bits double": {"model__bits": 4},
    "8 bits": {"model__bits": 8},
    "checkpointing": {"train__gradient_checkpointing": True},
    "tied": {"base": "tied"},
    "biased": {"base": "biased"},
    "full": FULL,
    "tied full": {**FULL, "base": "tied"},
    "random full": {**FULL, "model__init": "random"},
}
# Evaluation batches differ on purpose: its values depend on no batch size (row 22). The loss is a sum over all documents.
LAYOUTS = {
    "1 x 8": (1, {"train__batch_size": 1, "train__grad_acc_steps": 8, "eval__batch_size": 1}),
    "ddp 2": (2, {"train__batch_size": 4, "parallel__strategy": "ddp", "eval__batch_size": 8}),
    "fsdp 2": (2, {"train__batch_size": 4, "parallel__strategy": "fsdp", "eval__batch_size": 1}),
    "fsdp 2 x 2": (2, {"train__batch_size": 2, "train__grad_acc_steps": 2, "parallel__strategy": "fsdp"}),
    "ddp 4": (4, {"train__batch_size": 2, "parallel__strategy": "ddp"}),
    "fsdp 4": (4, {"train__batch_size": 2, "parallel__strategy": "fsdp", "eval__batch_size": 8}),
    "hsdp 4": (4, {"train__batch_size": 2, "parallel__strategy": "hsdp", "parallel__shard_size": 2}),
}
PLACES: list[Place] = [
    *((variant, "1 x 8") for variant in ("16 bits", "full")),
    *((variant, "ddp 2") for variant in ("16 bits", "4 bits double", "full")),
    *((variant, "fsdp 2") for variant in VARIANTS),
    *((variant, "fsdp 2 x 2") for variant in ("16 bits", "full", "checkpointing")),
    *((variant, layout) for variant in ("16 bits", "4 bits double") for layout in ("ddp 4", "fsdp 4", "hsdp 4")),
    ("4 bits", "hsdp 4"), ("full", "hsdp 4"),
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def bases(home: Path) -> dict[str, Path]:
    """Models with a tokenizer, for runs."""
    return {
        "mistral": base_model(home / "mistral", **SIZES),
        "tied": base_model(home / "tied", "qwen2", tie_word_embeddings=True, **SIZES),
        "biased": base_model(home / "biased", "qwen2", **SIZES),
    }


def setting(home: Path, bases: dict[str, Path], name: str, **changes) -> Config:
    """A run of two epochs in a directory of its own."""
    (home / name).mkdir(exist_ok=True)
    base = bases[changes.pop("base", "mistral")]
    defaults = {
        "train__batch_size": 8, "train__epochs": 2.0, "train__learning_rate": 1e-3, "eval__eval_steps": 4,
        "eval__num_generate_samples": 3, "eval__max_new_tokens": 6,
    }  # fmt: skip
    return config(home / name, base, ROWS, **{**defaults, **changes})


def placed(home: Path, bases: dict[str, Path], place: Place) -> Config:
    variant, layout = place
    changes = LAYOUTS[layout][1] if layout else {}
    schedule = {"train__lr_scheduler": "linear"}  # so that every step has a learning rate of its own
    return setting(home, bases, f"{variant}, {layout or 'one'}", **schedule, **VARIANTS[variant], **changes)


def training_jobs(home: Path, bases: dict[str, Path], processes: int) -> dict[str, ranks.Job]:
    """The runs of PLACES for so many processes."""
    here = [place for place in PLACES if LAYOUTS[place[1]][0] == processes]
    return {str(place): (fit, (placed(home, bases, place),)) for place in here}


@pytest.fixture(scope="module")
def alone(home: Path, bases: dict[str, Path]):
    """A variant's run with one process and one micro-batch of 8 a step: what all others must equal."""

    @functools.cache
    def run(variant: str) -> Config:
        c = placed(home, bases, (variant, ""))
        fit(c)
        return c

    return run


def final(c: Config) -> Path:
    return Path(c.output_dir) / "checkpoint-final"


def weights_file(c: Config) -> Path:
    return final(c) / ("model.safetensors" if c.method == "full" else "adapter_model.safetensors")


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """The same names, shapes and dtypes, and values."""
    assert {k: (v.shape, v.dtype) for k, v in actual.items()} == {k: (v.shape, v.dtype) for k, v in expected.items()}
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def identical(a: Tensor, b: Tensor) -> bool:
    """To the bit."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (a, b)))


# ---- the resumed runs: each is continued by other processes in the same directory

CHAINS = {"lora": {}, "full": FULL, "lora 4 bits": {"model__bits": 4}, "full bfloat16": {**FULL, "model__dtype": "bfloat16"}}
ON_TWO = {"train__batch_size": 4, "parallel__strategy": "fsdp"}
ON_FOUR = {"train__batch_size": 2, "parallel__strategy": "fsdp"}
DDP = {"train__batch_size": 4, "parallel__strategy": "ddp"}


def leg(home: Path, bases: dict[str, Path], name: str, until: int, **changes) -> Config:
    """A run, or the next part of it, that ends after `until` steps. (The default schedule does not look at the end.)"""
    return setting(home, bases, name, train__max_steps=until, **changes)


@pytest.fixture(scope="module")
def on_two(home: Path, bases: dict[str, Path], plain, stored, odd) -> dict[str, list]:
    def part(name: str, until: int, **changes) -> ranks.Job:
        return fit, (leg(home, bases, name, until, **changes),)

    jobs = training_jobs(home, bases, 2)
    for name, settings in CHAINS.items():
        jobs[f"chain {name}"] = part(f"chain {name}", 3, **ON_TWO, **settings)
        jobs[f"whole {name}"] = part(f"whole {name}", STEPS, **ON_TWO, **settings)
        jobs[f"broken {name}, begun"] = part(f"broken {name}", 3, **ON_TWO, **settings)
        jobs[f"broken {name}"] = part(f"broken {name}", STEPS, **ON_TWO, **settings)
    for name, settings in (("lora", {}), ("full", FULL)):
        for until, strategy in ((3, DDP), (5, ON_TWO), (STEPS, DDP)):
            jobs[f"mixed {name} {until}"] = part(f"mixed {name}", until, **strategy, **settings)
    jobs["whole 8-bit states"] = part("whole 8-bit states", 6, **ON_TWO, **BITS8_STATES)
    jobs["broken 8-bit states, begun"] = part("broken 8-bit states", 3, **ON_TWO, **BITS8_STATES)
    jobs["broken 8-bit states"] = part("broken 8-bit states", 6, **ON_TWO, **BITS8_STATES)
    jobs["8-bit states"] = part("8-bit states", 3, **ON_TWO, **BITS8_STATES)
    counted = {"train__batch_size": 2, "train__grad_acc_steps": 2, "parallel__strategy": "ddp", "eval__num_generate_samples": 0}
    jobs["counting"] = (ranks.fit_counting, (leg(home, bases, "counting", STEPS, **counted),))
    return launch(home / "jobs 2", 2, jobs | holding_jobs(plain, stored, odd) | answer_jobs(bases))


@pytest.fixture(scope="module")
def continued_alone(home: Path, bases: dict[str, Path], on_two) -> None:
    for name, settings in CHAINS.items():
        fit(leg(home, bases, f"chain {name}", 5, **settings))


@pytest.fixture(scope="module")
def on_four(home: Path, bases: dict[str, Path], continued_alone, plain, stored, odd) -> dict[str, list]:
    jobs = training_jobs(home, bases, 4)
    for name, settings in CHAINS.items():
        jobs[f"chain {name}"] = (fit, (leg(home, bases, f"chain {name}", 6, **ON_FOUR, **settings),))
    hsdp = {"strategy": "hsdp", "shard_size": 2}
    jobs |= answer_jobs(bases) | {"hsdp": (ranks.holdings, (plain, TOKENS, {**HELD["nf4 double"][1], **hsdp}))}
    return launch(home / "jobs 4", 4, jobs)


@pytest.fixture(scope="module")
def on_two_again(home: Path, bases: dict[str, Path], on_four, plain, large) -> dict[str, list]:
    measured = {f"peak in {bits} bits": (ranks.load_peak, (plain, large, bits)) for bits in (16, 4)}  # first: memory is fresh
    chains = {name: (fit, (leg(home, bases, f"chain {name}", STEPS, **ON_TWO, **s),)) for name, s in CHAINS.items()}
    return launch(home / "jobs 2 again", 2, measured | chains)


@pytest.fixture
def results(request: pytest.FixtureRequest):
    """The results of so many processes."""
    return lambda processes: request.getfixturevalue({2: "on_two", 3: "on_three", 4: "on_four"}[processes])


# ---- 1. the same numbers whatever the layout


def assert_same_numbers(c: Config, reference: Config, tolerance: float = 1e-5, steps: int = STEPS) -> None:
    for key in ("loss", "grad_norm", "lr", "tokens", "supervised_tokens"):
        theirs = [(row["step"], row[key]) for row in metrics(reference)]
        assert [step for step, _ in theirs] == list(range(1, steps + 1))
        exact = key in ("lr", "tokens", "supervised_tokens")
        values = [value for _, value in theirs]
        assert [row["step"] for row in metrics(c)] == list(range(1, steps + 1))
        assert [row[key] for row in metrics(c)] == (values if exact else pytest.approx(values, rel=tolerance)), key


def evaluations(c: Config) -> list[float]:
    keys = [f"eval/{name}/{what}" for name in ("in_domain", "out_of_domain") for what in ("loss", "ppl")]
    values = [row[key] for key in keys for row in metrics(c, key)]
    assert len(values) == 2 * len(keys)
    return values


def samples(c: Config) -> list[dict]:
    return [json.loads(line) for line in (Path(c.output_dir) / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("place", PLACES, ids=", ".join)
def test_the_layout_does_not_change_the_numbers(place, home, bases, alone, results):
    """Rows 5, 22, 33 and 36, over steps that leave some processes without documents."""
    variant, layout = place
    c, reference = placed(home, bases, place), alone(variant)
    if LAYOUTS[layout][0] > 1:
        outcome(results(LAYOUTS[layout][0]), str(place))
    else:
        fit(c)
    assert_same_numbers(c, reference)
    # LLM.int8 multiplies a column with an outlier in 16 bits for all documents of a batch: there the batch is seen
    assert evaluations(c) == pytest.approx(evaluations(reference), rel=1e-2 if variant == "8 bits" else 1e-5)
    assert samples(c) == samples(reference) and len(samples(c)) == 6
    assert len({row["lr"] for row in metrics(c)}) == STEPS, "three up, five down: no two alike"


@pytest.mark.parametrize("place", [p for p in PLACES if p[1] != "1 x 8"], ids=", ".join)
def test_the_weights_of_one_process_are_saved(place, home, bases, alone, results):
    """Row 6: names, shapes, dtypes and values, of adapters and of models."""
    outcome(results(LAYOUTS[place[1]][0]), str(place))
    saved = load_file(weights_file(placed(home, bases, place)))
    expected = load_file(weights_file(alone(place[0])))
    # what Adam makes of a gradient that is nearly zero is rounding: no more than the learning rate, here and there
    assert_close(saved, expected, 1e-5)
    assert all(t.isfinite().all() for t in saved.values())
    assert all(t.any() for name, t in saved.items() if ".lora_B." in name)


# ---- 2. what each process holds

HELD = {  # what: (fixture of the checkpoint, options)
    "16 bits": ("plain", {"lora": LoraConfig(rank=4)}),
    "full": ("plain", {"full": True}),
    "random": ("plain", {"full": True, "random_weights": True, "seed": 3}),
    "nf4": ("plain", {"bits": 4, "double_quant": False, "lora": LoraConfig(rank=4)}),
    "nf4 double": ("plain", {"bits": 4, "lora": LoraConfig(rank=4)}),
    "int8": ("plain", {"bits": 8}),
    "stored nf4": ("nf4", {"bits": 4, "lora": LoraConfig(rank=4)}),
    "stored nf4 double": ("nf4 double", {"bits": 4}),
    "stored int8": ("int8", {"bits": 8}),
    "odd nf4": ("odd", {"bits": 4, "double_quant": False}),
    "odd nf4 double": ("odd", {"bits": 4, "lora": LoraConfig(rank=5)}),
    "odd int8": ("odd", {"bits": 8, "lora": LoraConfig(rank=5)}),
    "odd stored nf4 double": ("odd nf4 double", {"bits": 4}),
}


@pytest.fixture(scope="module")
def plain(home: Path) -> Path:
    """A Qwen2 (with biases) with more than one nested block of 256 x 64 weights a layer."""
    tiny("qwen2", hidden_size=128, intermediate_size=192).save_pretrained(home / "plain")
    return home / "plain"


@pytest.fixture(scope="module")
def odd(home: Path) -> dict[str, Path]:
    """Rows that are no whole blocks, and numbers of rows that neither 2 nor 3 processes divide; plain and stored."""
    tiny("qwen2", hidden_size=200, intermediate_size=50).save_pretrained(home / "odd")
    return {"odd": home / "odd", "odd nf4 double": store_quantised(home / "odd", home / "odd nf4 double", 4)}


def store_quantised(source: Path, directory: Path, bits: int, double_quant: bool = True) -> Path:
    """A checkpoint that transformers quantised and saved."""
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double_quant}
    quantization = BitsAndBytesConfig(**(nf4 if bits == 4 else {"load_in_8bit": True}))
    hf = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, quantization_config=quantization)
    hf.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def stored(home: Path, plain: Path) -> dict[str, Path]:
    return {
        name: store_quantised(plain, home / name, bits, double_quant)
        for name, bits, double_quant in (("nf4", 4, False), ("nf4 double", 4, True), ("int8", 8, True))
    }


def holding_jobs(plain: Path, stored: dict[str, Path], odd: dict[str, Path]) -> dict[str, ranks.Job]:
    directories = {"plain": plain, **stored, **odd}
    return {f"holds {what}": (ranks.holdings, (directories[d], TOKENS, options)) for what, (d, options) in HELD.items()}


@pytest.fixture(scope="module")
def on_three(home: Path, plain, stored, odd) -> dict[str, list]:
    return launch(home / "jobs 3", 3, holding_jobs(plain, stored, odd))


@pytest.fixture(scope="module")
def held_alone(plain, stored, odd):
    jobs = holding_jobs(plain, stored, odd)

    @functools.cache
    def held(what: str) -> dict:
        function, arguments = jobs[f"holds {what}"]
        return function(*arguments)

    return held


BOTH = pytest.mark.parametrize("processes", [2, 3])
EVERY = pytest.mark.parametrize("what", HELD)


@EVERY
@BOTH
def test_gathered_rows_are_the_model_to_the_bit(what, processes, results, held_alone):
    expected = held_alone(what)
    for mine in outcome(results(processes), f"holds {what}"):
        for kind in ("whole", "buffers"):
            assert mine[kind].keys() == expected[kind].keys()
            assert all(identical(mine[kind][name], tensor) for name, tensor in expected[kind].items()), kind
        torch.testing.assert_close(mine["logits"], expected["logits"], rtol=1e-5, atol=1e-5)
        assert mine["trainable"] == expected["trainable"]
    if "nf4" in what:
        assert {t.dtype for n, t in expected["whole"].items() if n.endswith("proj.weight")} <= {torch.uint8}
        assert any("nested_absmax" in name for name in expected["buffers"]) == ("double" in what)


def rows_of(rank: int, processes: int, rows: int) -> int:
    """How many rows a process holds: chunks of one size, the last ones short or empty, as torch.chunk."""
    chunks = torch.arange(rows).chunk(processes)
    return len(chunks[rank]) if rank < len(chunks) else 0


@EVERY
@BOTH
def test_every_parameter_is_spread_by_rows(what, processes, results, held_alone):
    whole = held_alone(what)["whole"]
    wanted = {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    assert wanted < whole.keys() and any("q_proj" in name for name in whole)
    sums = dict.fromkeys(whole, 0)
    for rank, mine in enumerate(outcome(results(processes), f"holds {what}")):
        assert mine["placements"] == dict.fromkeys(whole, "(Shard(dim=0),)")
        assert not mine["gathered"], "after passes forward alone"
        for name, tensor in whole.items():
            row = tensor[:1].numel() * tensor.itemsize
            # memory is given out in chunks of equal size: a last, shorter one may be padded
            assert rows_of(rank, processes, len(tensor)) * row <= mine["bytes"][name] <= -(-len(tensor) // processes) * row, name
            sums[name] += rows_of(rank, processes, len(tensor))
    assert sums == {name: len(tensor) for name, tensor in whole.items()}


def test_hsdp_spreads_inside_its_groups(on_four, held_alone):
    whole = held_alone("nf4 double")["whole"]
    for mine in outcome(on_four, "hsdp"):
        assert mine["placements"] == dict.fromkeys(whole, "(Replicate(), Shard(dim=0))")
        assert all(identical(mine["whole"][name], tensor) for name, tensor in whole.items())
        share = sum(mine["bytes"].values()) / sum(t.numel() * t.itemsize for t in whole.values())
        assert 0.49 < share < 0.52
        torch.testing.assert_close(mine["logits"], held_alone("nf4 double")["logits"], rtol=1e-5, atol=1e-5)


# ---- 3. loading


@pytest.mark.parametrize("what", ["16 bits", "full", "nf4", "nf4 double", "int8", "odd int8"])
@BOTH
def test_each_process_reads_its_own_rows_once(what, processes, results, held_alone):
    shapes = {name: shape for name, _, shape in held_alone(what)["read"]}
    for rank, mine in enumerate(outcome(results(processes), f"holds {what}")):
        assert sorted(name for name, _, _ in mine["read"]) == sorted(shapes)
        for name, start, shape in mine["read"]:
            rows = shapes[name][0]
            assert start == min(rows, rank * -(-rows // processes)), name
            assert shape == (rows_of(rank, processes, rows), *shapes[name][1:]), name


MB = 1_000_000
NOISE = 12 * MB  # what the allocator rounds up and keeps


@pytest.fixture(scope="module")
def large(home: Path) -> Path:
    """A random bfloat16 checkpoint of 300 MB in tensors of 8 MB and less."""
    large = home / "large"
    large.mkdir()
    raw = config_json(
        "llama3", hidden_size=1024, intermediate_size=4096, num_hidden_layers=9, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=4096, torch_dtype="bfloat16",
    )  # fmt: skip
    (large / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in CausalLM(DecoderConfig.from_hf(raw)).named_parameters()}
    noise = torch.randn(4096 * 1024, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    save_file({name: noise[: s.numel()].view(s).clone() for name, s in shapes.items()}, large / "model.safetensors")
    assert (large / "model.safetensors").stat().st_size > 300 * MB
    return large


@pytest.mark.parametrize("bits", [16, 4])
def test_loading_takes_a_share_and_a_few_tensors(bits, on_two_again, large):
    """Row 19: host memory does not grow with the number of processes."""
    total, largest = (large / "model.safetensors").stat().st_size, 4096 * 1024 * 2
    whole = total if bits == 16 else 2 * largest + (total - 2 * largest) * 0.26
    for held, peak in outcome(on_two_again, f"peak in {bits} bits"):
        assert 0.48 * whole < held < 0.53 * whole
        assert peak < held + 3 * largest + NOISE, f"{peak / MB:.0f} MB for {held / MB:.0f} MB held"


# ---- 4. checkpoints


@pytest.fixture(scope="module")
def uninterrupted(home: Path, bases: dict[str, Path]):
    """The run of a chain by one process without a break."""

    @functools.cache
    def run(name: str) -> Config:
        c = leg(home, bases, f"uninterrupted {name}", STEPS, **CHAINS[name])
        fit(c)
        return c

    return run


@pytest.mark.parametrize("name", ["lora", "full", "lora 4 bits"])
def test_saved_on_two_resumed_on_one_then_four_then_two(name, home, bases, on_two_again, uninterrupted, on_four):
    """Row 18."""
    for results, job in ((on_four, f"chain {name}"), (on_two_again, name)):
        outcome(results, job)
    c = leg(home, bases, f"chain {name}", STEPS, **CHAINS[name])
    assert_same_numbers(c, uninterrupted(name))
    assert_close(load_file(weights_file(c)), load_file(weights_file(uninterrupted(name))), 1e-5)
    assert {p.name for p in Path(c.output_dir).glob("checkpoint-*")} >= {"checkpoint-3", "checkpoint-5", "checkpoint-6"}


def test_masters_of_a_half_precision_run_are_resumed_anywhere(home, bases, on_two_again, on_four, uninterrupted):
    for results, job in ((on_four, "chain full bfloat16"), (on_two_again, "full bfloat16")):
        outcome(results, job)
    c = leg(home, bases, "chain full bfloat16", STEPS, **CHAINS["full bfloat16"])
    assert losses(c) == pytest.approx(losses(uninterrupted("full bfloat16")), rel=1e-2)
    rounded = load_file(weights_file(c))
    assert {t.dtype for t in rounded.values()} == {torch.bfloat16}
    masters = read_spread(final(c) / "training_state")
    assert {name: masters[f"master.{name}"].bfloat16() for name in rounded}.keys() == rounded.keys()
    assert all(torch.equal(masters[f"master.{name}"].bfloat16(), tensor) for name, tensor in rounded.items())
    assert any(not torch.equal(masters[f"master.{name}"], t.float()) for name, t in rounded.items())


def read_spread(directory: Path) -> dict[str, Tensor]:
    """All tensors of a torch.distributed.checkpoint, whole, without the package."""
    entries = dcp.FileSystemReader(str(directory)).read_metadata().state_dict_metadata
    state = {name: torch.empty(e.size, dtype=e.properties.dtype) for name, e in entries.items()}
    dcp.load(state, checkpoint_id=str(directory), no_dist=True)
    return state


@pytest.mark.parametrize("name", [*CHAINS, "8-bit states"])
def test_resumed_on_two_is_uninterrupted_on_two_to_the_bit(name, home, bases, on_two):
    for job in (f"whole {name}", f"broken {name}, begun", f"broken {name}"):
        outcome(on_two, job)
    settings = {**CHAINS, "8-bit states": BITS8_STATES}[name]
    whole, broken = (leg(home, bases, f"{kind} {name}", STEPS, **settings) for kind in ("whole", "broken"))
    assert weights_file(whole).read_bytes() == weights_file(broken).read_bytes()
    drop = "tokens_per_second"
    rows = [[{k: v for k, v in row.items() if k != drop} for row in metrics(c)] for c in (whole, broken)]
    assert rows[0] == rows[1] and len(rows[0]) == (6 if "8-bit" in name else STEPS)
    states = [read_spread(final(c) / "training_state") for c in (whole, broken)]
    assert states[0].keys() == states[1].keys() and all(identical(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize("name", ["lora", "full"])
def test_ddp_and_fsdp_continue_each_other(name, home, bases, on_two, uninterrupted):
    for until in (3, 5, STEPS):
        outcome(on_two, f"mixed {name} {until}")
    c = leg(home, bases, f"mixed {name}", STEPS, **CHAINS[name])
    assert_same_numbers(c, uninterrupted(name))
    forms = {step: sorted(p.name for p in (Path(c.output_dir) / f"checkpoint-{step}").glob("training_state*")) for step in (3, 5)}
    assert forms == {3: ["training_state.safetensors"], 5: ["training_state"]}


@pytest.mark.parametrize("variant", ["16 bits", "biased", "tied", "4 bits"])
def test_peft_loads_the_adapter_of_a_sharded_run(variant, home, bases, on_two):
    """Row 6. The answers of PEFT over the plain base are those of minilora."""
    outcome(on_two, str((variant, "fsdp 2")))
    c = placed(home, bases, (variant, "fsdp 2"))
    hf = AutoModelForCausalLM.from_pretrained(c.model.name, dtype=torch.float32)
    model = PeftModel.from_pretrained(hf, final(c))
    loaded = model.load_adapter(final(c), adapter_name="again")
    assert not loaded.unexpected_keys and not [key for key in loaded.missing_keys if "lora_" in key]
    ours, _ = minilora.load(c.model.name, adapter=str(final(c)), device="cpu", dtype="float32", bits=16)
    with torch.no_grad():
        theirs = model.eval()(TOKENS[None]).logits[0]
        torch.testing.assert_close(ours(TOKENS), theirs, rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            assert not torch.allclose(model(TOKENS[None]).logits[0], theirs, atol=1e-3), "the adapter does something"


@pytest.mark.parametrize("variant", ["full", "tied full"])
def test_transformers_loads_the_model_of_a_sharded_run(variant, home, bases, on_two, alone):
    outcome(on_two, str((variant, "fsdp 2")))
    c = placed(home, bases, (variant, "fsdp 2"))
    hf, info = AutoModelForCausalLM.from_pretrained(final(c), output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours, _ = minilora.load(str(final(alone(variant))), device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(hf.eval()(TOKENS[None]).logits[0], ours(TOKENS), rtol=1e-3, atol=1e-3)


def test_8bit_states_are_kept_by_process(home, bases, on_two):
    """8-bit statistics are made over a process's rows; what bitsandbytes keeps in 32 bits goes by rows."""
    outcome(on_two, "8-bit states")
    state = read_spread(final(leg(home, bases, "8-bit states", 3, **BITS8_STATES)) / "training_state")
    weight = load_file(final(leg(home, bases, "8-bit states", 3, **BITS8_STATES)) / "model.safetensors")["lm_head.weight"]
    of_head = {name.removeprefix("optimizer.lm_head.weight."): t for name, t in state.items() if "lm_head" in name}
    assert {name for name in of_head if "absmax" in name} == {f"absmax{i}#{r}/2" for i in (1, 2) for r in (0, 1)}
    assert {name for name in of_head if "qmap" in name} == {"qmap1", "qmap2"}
    assert of_head["state1"].dtype == torch.uint8 and of_head["state1"].shape == weight.shape
    assert of_head["state1"].any() and of_head["state2"].any()
    norm = state["optimizer.model.norm.weight.state1"]
    assert norm.dtype == torch.float32 and norm.shape == (64,) and norm.any()


def write_config(c: Config, path: Path) -> Path:
    """The configuration as a file that train.py reads."""
    lines = [f"config.{name} = {value!r}" for name, value in leaves(c).items()]
    path.write_text("\n".join(["from minilora.config import *", "config = Config()", *lines]) + "\n", encoding="utf-8")
    return path


def test_8bit_states_on_another_number_of_processes_are_refused(home, bases, on_two):
    outcome(on_two, "8-bit states")
    alone = leg(home, bases, "8-bit states", 6, **BITS8_STATES)
    before = {p: p.read_bytes() for p in Path(alone.output_dir).rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="only on as many processes as saved them"):
        train.main(alone)
    four = leg(home, bases, "8-bit states", 6, **ON_FOUR, **BITS8_STATES)
    run = ranks.torchrun(4, str(ranks.ROOT / "train.py"), str(write_config(four, home / "four.py")))
    assert "exitcode  : 2" in run.stderr and "exitcode  : 1" not in run.stderr
    assert "error: " in run.stderr and "8-bit optimizer states continue only on as many processes as saved them" in run.stderr
    assert 'Traceback (most recent call last):\n  File "' + str(ranks.ROOT / "train.py") not in run.stderr
    assert before == {p: p.read_bytes() for p in Path(alone.output_dir).rglob("*") if p.is_file()}


def test_a_qlora_run_on_two_processes_saves_in_time(on_two):
    """Row 15: the whole run, with its saves, takes less than a save may."""
    assert max(outcome(on_two, str(("4 bits double", "fsdp 2")))) < 60


# ---- 5. generation

ENDS = tuple(range(3, 5000, 17))  # answers end by themselves, each at its own time


def prompts(base: Path) -> list[list[int]]:
    tokenizer = Tokenizer(base)
    return [tokenizer.encode(text).ids for text in ("Old light", "sound of the new work " * 20, "new")]


def answer_jobs(bases: dict[str, Path]) -> dict[str, ranks.Job]:
    """Three prompts; with batches of one, a process may have two while another has one, or none."""
    base = bases["mistral"]
    return {
        f"answer in {bits} bits, {batch} at a time": (ranks.answer, (base, prompts(base), ENDS, {"bits": bits}, batch))
        for bits in (16, 4) for batch in (1, 16)
    }  # fmt: skip


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("batch", [1, 16])
def test_uneven_prompts_are_answered_in_lockstep(processes, bits, batch, results, bases):
    """Row 33."""
    name = f"answer in {bits} bits, {batch} at a time"
    function, arguments = answer_jobs(bases)[name]
    expected = function(*arguments)
    by_rank = outcome(results(processes), name)
    assert [len(mine) for mine in by_rank] == ([2, 1] if processes == 2 else [1, 1, 1, 0])
    assert sorted(a for mine in by_rank for a in mine) == expected
    assert len({len(ids) for _, ids, _ in expected}) == 3, "they stop at different times"


# ---- 6. which strategy


@pytest.fixture
def meta_model() -> CausalLM:
    with torch.device("meta"):
        return CausalLM(DecoderConfig.from_hf(config_json("llama3", **SIZES)))


def strategy(monkeypatch, world: int, model: CausalLM, **changes) -> str:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    c = Config()
    for name, value in changes.items():
        section, _, field = name.rpartition("__")
        setattr(getattr(c, section) if section else c, field, value)
    return parallel.choose(c, model, CPU)


def test_auto_shards_what_does_not_fit(monkeypatch, meta_model, capsys):
    """Full AdamW training takes 16 bytes a parameter (weight, gradient, two states), a frozen weight its own."""
    n = sum(p.numel() for p in meta_model.parameters())
    half = CausalLM(meta_model.config).to(torch.bfloat16).requires_grad_(False)
    for model, optimizer, need in ((meta_model, "adamw", 16 * n), (meta_model, "adamw8bit", 10 * n), (half, "adamw", 2 * n)):
        for room, wanted, why in ((0.98, "fsdp", "do not fit"), (1.02, "ddp", "fit")):
            monkeypatch.setattr(parallel, "device_bytes", lambda device, b=room * need / parallel.ROOM: math.ceil(b))
            assert strategy(monkeypatch, 2, model, train__optimizer=optimizer) == wanted
            told = capsys.readouterr().err
            assert f"parallel.strategy: {wanted}, because" in told and f") {why} in" in told
            assert strategy(monkeypatch, 1, model) == "ddp" and not capsys.readouterr().err


@pytest.mark.parametrize("wanted", ["ddp", "fsdp", "hsdp"])
def test_a_wanted_strategy_is_taken(monkeypatch, meta_model, wanted, capsys):
    size = {"parallel__shard_size": 2} if wanted == "hsdp" else {}
    monkeypatch.setattr(parallel, "device_bytes", lambda device: 1 if wanted == "ddp" else 10**15)
    assert strategy(monkeypatch, 4, meta_model, parallel__strategy=wanted, **size) == wanted
    assert strategy(monkeypatch, 1, meta_model, parallel__strategy=wanted, **size) == "ddp", "nothing to spread"
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("world", "size"), [(4, 3), (2, 4), (6, 4)])
def test_a_shard_size_that_does_not_divide_is_refused(monkeypatch, meta_model, world, size):
    with pytest.raises(UserError, match=f"parallel.shard_size = {size} does not divide the {world} processes"):
        strategy(monkeypatch, world, meta_model, parallel__strategy="hsdp", parallel__shard_size=size)


@pytest.mark.parametrize("wanted", ["auto", "fsdp", "hsdp"])
@pytest.mark.parametrize("version", ["2.9.1", "2.11.0+cu128", "2.12.1", "2.13.0", "2.14.0a0+git1", "3.0.0"])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_older_torch_does_not_shard_a_quantised_base(monkeypatch, meta_model, bits, version, wanted, capsys):
    if bits < 16:
        quantize_linears(meta_model.requires_grad_(False), bits, True, ())
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(parallel, "device_bytes", lambda device: 1)
    old = bits < 16 and version.startswith("2.") and int(version.split(".")[1]) < 13
    size = {"parallel__shard_size": 2} if wanted == "hsdp" else {}
    chosen = strategy(monkeypatch, 2, meta_model, parallel__strategy=wanted, **size)
    told = capsys.readouterr().err
    assert chosen == ("ddp" if old else "fsdp" if wanted == "auto" else wanted)
    assert (f"torch {version} cannot shard a quantised base" in told) == old


@pytest.mark.parametrize(("changes", "message"), [
    ({"shard_size": 2}, "parallel.shard_size goes with parallel.strategy='hsdp'"),
    ({"shard_size": 2, "strategy": "fsdp"}, "parallel.shard_size goes with"),
    ({"shard_size": 2, "strategy": "ddp"}, "parallel.shard_size goes with"),
    ({"strategy": "hsdp"}, "parallel.shard_size goes with parallel.strategy='hsdp', which needs it"),
    ({"shard_size": 0, "strategy": "hsdp"}, "parallel.shard_size must be at least 1"),
])  # fmt: skip
def test_settings_that_cannot_be_are_refused(changes, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    c = Config()
    c.data.train_file = "train.jsonl"
    validate(c)
    for name, value in changes.items():
        setattr(c.parallel, name, value)
    with pytest.raises(UserError, match=message):
        validate(c)


@pytest.mark.parametrize("gpu", [True, False])
def test_offloading_needs_a_gpu(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    c = Config()
    c.parallel.cpu_offload, c.parallel.strategy = True, "fsdp"
    message = "parallel.cpu_offload moves parameters out of GPU memory, and there is no GPU"
    with contextlib.nullcontext() if gpu else pytest.raises(UserError, match=message):
        check_device(c)


@pytest.mark.parametrize("wanted", ["auto", "ddp"])
def test_offloading_needs_shards(wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    c = Config()
    c.data.train_file, c.parallel.cpu_offload, c.parallel.strategy = "train.jsonl", True, wanted
    with pytest.raises(UserError, match=r"parallel.cpu_offload needs parallel.strategy fsdp or hsdp"):
        validate(c)
    c.parallel.strategy = "fsdp"
    validate(c)


# ---- 7. what ddp sends


def test_ddp_sums_the_trained_gradients_once_a_step(home, bases, on_two):
    """Two micro-batches a step, one sum of all adapters' gradients in fp32; beside it, a few numbers."""
    base = bases["mistral"]
    adapters = build_model(base, CPU, lora=leg(home, bases, "counting", STEPS).lora).model
    trained = sum(p.numel() for p in adapters.parameters() if p.requires_grad)
    for sums in outcome(on_two, "counting"):
        assert [s for s in sums if s[0] > 100] == [(trained, torch.float32)] * STEPS
        small = sum(n * dtype.itemsize for n, dtype in sums if n <= 100)
        assert small < 500 * STEPS


# ---- 8. starting


def test_slow_tokenising_does_not_outlast_the_collective_timeout(home, bases):
    """Row 28: nobody has joined a process group yet."""
    c = leg(home, bases, "slow", 1, train__batch_size=4, data__max_seq_length=1999)  # in no cache
    c.data.eval_file = None
    joined = launch(home / "jobs slow", 2, {"slow": (ranks.fit_slowly, (c, 4.0, 5.0))}, join=False)
    seen = outcome(joined, "slow")
    assert sorted(seen) == [[], [False]], "one tokenises, for both, and before the group exists"
    assert len(losses(c)) == 1
