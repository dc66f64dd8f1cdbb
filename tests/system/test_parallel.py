"""Training in several processes: the numbers of one, and checkpoints that any number continues.

Real processes under torchrun. A start costs seconds, so each of the fixtures `on_two`, `on_four`
and `on_two_again` does every run that is wanted of that many processes; the tests look at what
the runs have written. What a sharded model is made of is tested in test_sharded_models.py.
"""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import minilora
import train
from helpers import ranks
from helpers.build import build
from helpers.processes import write_config_file
from helpers.quantized import need_sharding
from helpers.ranks import fit, launch, outcome
from helpers.tiny_models import random_tokens
from helpers.tiny_runs import base_model, config, losses, metrics
from minilora.config import Config
from minilora.errors import UserError

pytestmark = pytest.mark.system

SIZES = {"hidden_size": 64, "intermediate_size": 128}  # whole blocks of 64 in each row
ROWS = 27  # at 8 documents a step, an epoch's last step has 3: some processes have none
STEPS = 8  # two epochs
TOKENS = random_tokens(16)

# Adam turns the rounding of small gradients into whole steps, so these are small
FULL = {"method": "full", "train__learning_rate": 1e-5}
BITS8_STATES = {**FULL, "train__optimizer": "adamw8bit"}

VARIANTS: dict[str, dict] = {
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

# Number of processes, and settings. Evaluation batches differ on purpose: the figures are those of
# all documents, whatever the batch size.
LAYOUTS: dict[str, tuple[int, dict]] = {
    "one": (1, {}),
    "1 x 8": (1, {"train__batch_size": 1, "train__grad_acc_steps": 8, "eval__batch_size": 1}),
    "ddp 2": (2, {"train__batch_size": 4, "parallel__strategy": "ddp", "eval__batch_size": 8}),
    "fsdp 2": (2, {"train__batch_size": 4, "parallel__strategy": "fsdp", "eval__batch_size": 1}),
    "fsdp 2 x 2": (
        2,
        {"train__batch_size": 2, "train__grad_acc_steps": 2, "parallel__strategy": "fsdp"},
    ),
    "ddp 4": (4, {"train__batch_size": 2, "parallel__strategy": "ddp"}),
    "fsdp 4": (4, {"train__batch_size": 2, "parallel__strategy": "fsdp", "eval__batch_size": 8}),
    "hsdp 4": (
        4,
        {"train__batch_size": 2, "parallel__strategy": "hsdp", "parallel__shard_size": 2},
    ),
}

# (variant, layout): every variant is sharded over two processes, the main ones in other ways too
Case = tuple[str, str]
CASES: list[Case] = [
    *((variant, "1 x 8") for variant in ("16 bits", "full")),
    *((variant, "ddp 2") for variant in ("16 bits", "4 bits double", "full")),
    *((variant, "fsdp 2") for variant in VARIANTS),
    *((variant, "fsdp 2 x 2") for variant in ("full", "checkpointing")),
    ("16 bits", "ddp 4"),
    ("16 bits", "fsdp 4"),
    *((variant, "hsdp 4") for variant in ("16 bits", "4 bits", "4 bits double", "full")),
]

# runs that are interrupted and continued
CHAINS: dict[str, dict] = {
    "lora": {},
    "full": FULL,
    "lora 4 bits": {"model__bits": 4},
    "full bfloat16": {**FULL, "model__dtype": "bfloat16"},
}
FSDP_2 = {"train__batch_size": 4, "parallel__strategy": "fsdp"}
FSDP_4 = {"train__batch_size": 2, "parallel__strategy": "fsdp"}
DDP_2 = {"train__batch_size": 4, "parallel__strategy": "ddp"}

# No evaluation is better than the first one, and answers take longer than they may.
NOT_LEARNING = {
    **FSDP_2,
    "lora__alpha": 0.0,
    "eval__eval_steps": 1,
    "eval__max_new_tokens": 100_000,
    "eval__max_time": 0.1,
    "train__metric_for_best_model": "loss",
}


# ---- the runs


class Runs:
    """Makes the configurations of runs, each in a directory of its own below `home`."""

    def __init__(self, home: Path):
        self.home = home
        self.bases = {
            "mistral": base_model(home / "mistral", **SIZES),
            "tied": base_model(home / "tied", "qwen2", tie_word_embeddings=True, **SIZES),
            "biased": base_model(home / "biased", "qwen2", **SIZES),
        }

    def run(self, name: str, base: str = "mistral", **changes) -> Config:
        """Return the configuration of a run of two epochs."""
        (self.home / name).mkdir(exist_ok=True)
        defaults = {
            "train__batch_size": 8,
            "train__epochs": 2.0,
            "train__learning_rate": 1e-3,
            "eval__eval_steps": 4,
            "eval__num_generate_samples": 3,
            "eval__max_new_tokens": 6,
        }
        return config(self.home / name, self.bases[base], ROWS, **{**defaults, **changes})

    def case(self, variant: str, layout: str) -> Config:
        """Return the configuration of one of CASES."""
        _, settings = LAYOUTS[layout]
        schedule = {"train__lr_scheduler": "linear"}  # each step has another learning rate
        return self.run(f"{variant}, {layout}", **schedule, **VARIANTS[variant], **settings)

    def part(self, name: str, until: int, **changes) -> Config:
        """Return the configuration of a run, or of its next part, that ends after `until` steps.

        The default schedule does not depend on where a run ends.
        """
        return self.run(name, train__max_steps=until, **changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("parallel"))


@pytest.fixture(scope="module")
def alone(runs: Runs) -> Callable[[str], Config]:
    """Return a function that trains a variant in one process: what all layouts must equal."""

    @functools.cache
    def trained(variant: str) -> Config:
        run = runs.case(variant, "one")
        fit(run)
        return run

    return trained


@pytest.fixture(scope="module")
def uninterrupted(runs: Runs) -> Callable[[str], Config]:
    """Return a function that trains a chain's run in one process without a break."""

    @functools.cache
    def trained(name: str) -> Config:
        run = runs.part(f"uninterrupted {name}", STEPS, **CHAINS[name])
        fit(run)
        return run

    return trained


def case_jobs(runs: Runs, num_ranks: int) -> dict[str, ranks.Job]:
    """Return the jobs of CASES for this number of processes."""
    return {
        str(case): (fit, (runs.case(*case),)) for case in CASES if LAYOUTS[case[1]][0] == num_ranks
    }


@pytest.fixture(scope="module")
def on_two(runs: Runs) -> ranks.Results:
    def fit_part(name: str, until: int, **changes) -> ranks.Job:
        return fit, (runs.part(name, until, **changes),)

    jobs = case_jobs(runs, 2)
    for name, settings in CHAINS.items():
        jobs[f"chain {name}"] = fit_part(f"chain {name}", 3, **FSDP_2, **settings)
        jobs[f"whole {name}"] = fit_part(f"whole {name}", STEPS, **FSDP_2, **settings)
        jobs[f"broken {name}, begun"] = fit_part(f"broken {name}", 3, **FSDP_2, **settings)
        jobs[f"broken {name}"] = fit_part(f"broken {name}", STEPS, **FSDP_2, **settings)
    for name in ("lora", "full"):
        for until, strategy in ((3, DDP_2), (5, FSDP_2), (STEPS, DDP_2)):
            changes = {**strategy, **CHAINS[name]}
            jobs[f"mixed {name} {until}"] = fit_part(f"mixed {name}", until, **changes)

    states = {**FSDP_2, **BITS8_STATES}
    jobs["whole 8-bit states"] = fit_part("whole 8-bit states", 6, **states)
    jobs["broken 8-bit states, begun"] = fit_part("broken 8-bit states", 3, **states)
    jobs["broken 8-bit states"] = fit_part("broken 8-bit states", 6, **states)
    jobs["8-bit states"] = fit_part("8-bit states", 3, **states)

    jobs["not learning"] = ranks.fit_logging, (runs.part("not learning", 3, **NOT_LEARNING),)
    back = runs.part("not learning", 4, train__resume="best", **NOT_LEARNING)
    jobs["not learning, back"] = ranks.fit_logging, (back,)

    counted = runs.part("counting", STEPS, eval__num_generate_samples=0, **DDP_2)
    counted.train.batch_size, counted.train.grad_acc_steps = 2, 2
    jobs["counting"] = ranks.fit_counting, (counted,)
    return launch(runs.home / "jobs 2", 2, jobs)


@pytest.fixture(scope="module")
def on_four(runs: Runs, on_two: ranks.Results) -> ranks.Results:
    """Continue the chains alone to step 5, then in four processes to step 6."""
    jobs = case_jobs(runs, 4)
    for name, settings in CHAINS.items():
        fit(runs.part(f"chain {name}", 5, **settings))
        jobs[f"chain {name}"] = fit, (runs.part(f"chain {name}", 6, **FSDP_4, **settings),)
    return launch(runs.home / "jobs 4", 4, jobs)


@pytest.fixture(scope="module")
def on_two_again(runs: Runs, on_four: ranks.Results) -> ranks.Results:
    """Continue the chains in two processes to the end."""
    jobs: dict[str, ranks.Job] = {}
    for name, settings in CHAINS.items():
        jobs[f"chain {name}"] = fit, (runs.part(f"chain {name}", STEPS, **FSDP_2, **settings),)
    return launch(runs.home / "jobs 2 again", 2, jobs)


@pytest.fixture
def trained(request: pytest.FixtureRequest, runs: Runs) -> Callable[[str, str], Config]:
    """Return a function that gives one of CASES after its run."""
    fixtures = {2: "on_two", 4: "on_four"}

    def case(variant: str, layout: str) -> Config:
        run, num_ranks = runs.case(variant, layout), LAYOUTS[layout][0]
        if num_ranks == 1:
            fit(run)
        else:
            outcome(request.getfixturevalue(fixtures[num_ranks]), str((variant, layout)))
        return run

    return case


# ---- what runs have written


def final_checkpoint(run: Config) -> Path:
    return Path(run.output_dir) / "checkpoint-final"


def saved_weights(run: Config) -> dict[str, Tensor]:
    return load_file(weights_file(run))


def weights_file(run: Config) -> Path:
    name = "model.safetensors" if run.method == "full" else "adapter_model.safetensors"
    return final_checkpoint(run) / name


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compare names, shapes, dtypes and values."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name],
            tensor,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda message, name=name: f"{name}: {message}",
        )


def assert_same_numbers(run: Config, reference: Config, steps: int = STEPS) -> None:
    """Compare what two runs have logged at every step."""
    ours, theirs = metrics(run), metrics(reference)
    assert [row["step"] for row in theirs] == list(range(1, steps + 1))
    assert [row["step"] for row in ours] == list(range(1, steps + 1))
    for key in ("lr", "tokens", "supervised_tokens"):
        assert [row[key] for row in ours] == [row[key] for row in theirs], key
    for key in ("loss", "grad_norm"):
        expected = pytest.approx([row[key] for row in theirs], rel=1e-5)
        assert [row[key] for row in ours] == expected, key


def evaluations(run: Config) -> list[float]:
    """Return the figures of both evaluations on both sets."""
    values = []
    for name in ("in_domain", "out_of_domain"):
        for figure in ("loss", "ppl"):
            key = f"eval/{name}/{figure}"
            rows = metrics(run, key)
            assert len(rows) == 2
            values += [row[key] for row in rows]
    return values


def samples(run: Config) -> list[dict]:
    text = (Path(run.output_dir) / "samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def read_sharded_state(run: Config) -> dict[str, Tensor]:
    """Read all of a sharded training state, without the package."""
    directory = str(final_checkpoint(run) / "training_state")
    entries = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    state = {name: torch.empty(e.size, dtype=e.properties.dtype) for name, e in entries.items()}
    dcp.load(state, checkpoint_id=directory, no_dist=True)
    return state


def assert_identical(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare tensors to the bit."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and actual[name].shape == tensor.shape, name
        our_bytes, their_bytes = (
            t.contiguous().view(-1).view(torch.uint8) for t in (actual[name], tensor)
        )
        assert torch.equal(our_bytes, their_bytes), name


# ---- the same numbers in every layout


@pytest.mark.parametrize(("variant", "layout"), CASES)
def test_the_layout_does_not_change_the_numbers(variant, layout, trained, alone):
    """Also not in steps that leave some processes without documents."""
    run, reference = trained(variant, layout), alone(variant)
    assert_same_numbers(run, reference)
    # LLM.int8 decides over all documents of a batch which columns it multiplies in 16 bits
    tolerance = 1e-2 if variant == "8 bits" else 1e-5
    assert evaluations(run) == pytest.approx(evaluations(reference), rel=tolerance)
    assert samples(run) == samples(reference) and len(samples(run)) == 6
    assert len({row["lr"] for row in metrics(run)}) == STEPS  # three up, five down: all differ


@pytest.mark.parametrize(("variant", "layout"), [case for case in CASES if LAYOUTS[case[1]][0] > 1])
def test_the_weights_of_one_process_are_saved(variant, layout, trained, alone):
    """Names, shapes, dtypes and values, of adapters and of models."""
    saved = saved_weights(trained(variant, layout))
    # Adam turns a gradient that is nearly zero into rounding, at most of the learning rate
    assert_close(saved, saved_weights(alone(variant)), 1e-5)
    for name, tensor in saved.items():
        assert tensor.isfinite().all(), name
        assert tensor.any() or ".lora_B." not in name, name


# ---- checkpoints


@pytest.mark.parametrize("name", ["lora", "full", "lora 4 bits"])
def test_saved_on_two_resumed_on_one_then_four_then_two(
    name, runs, on_two_again, on_four, uninterrupted
):
    outcome(on_four, f"chain {name}")
    outcome(on_two_again, f"chain {name}")
    run = runs.part(f"chain {name}", STEPS, **CHAINS[name])
    assert_same_numbers(run, uninterrupted(name))
    assert_close(saved_weights(run), saved_weights(uninterrupted(name)), 1e-5)
    names = {path.name for path in Path(run.output_dir).glob("checkpoint-*")}
    assert names >= {"checkpoint-3", "checkpoint-5", "checkpoint-6"}


def test_masters_of_a_half_precision_run_are_resumed_anywhere(
    runs, on_two_again, on_four, uninterrupted
):
    outcome(on_four, "chain full bfloat16")
    outcome(on_two_again, "chain full bfloat16")
    run = runs.part("chain full bfloat16", STEPS, **CHAINS["full bfloat16"])
    assert losses(run) == pytest.approx(losses(uninterrupted("full bfloat16")), rel=1e-2)

    rounded, state = saved_weights(run), read_sharded_state(run)
    assert {tensor.dtype for tensor in rounded.values()} == {torch.bfloat16}
    masters = {name: state[f"master.{name}"] for name in rounded}
    for name, tensor in rounded.items():
        assert torch.equal(masters[name].bfloat16(), tensor), name
    assert any(not torch.equal(masters[name], t.float()) for name, t in rounded.items())


@pytest.mark.parametrize("name", [*CHAINS, "8-bit states"])
def test_resumed_on_two_is_uninterrupted_on_two_to_the_bit(name, runs, on_two):
    for job in (f"whole {name}", f"broken {name}, begun", f"broken {name}"):
        outcome(on_two, job)
    settings = {**CHAINS, "8-bit states": BITS8_STATES}[name]
    whole = runs.part(f"whole {name}", STEPS, **settings)
    broken = runs.part(f"broken {name}", STEPS, **settings)
    assert weights_file(whole).read_bytes() == weights_file(broken).read_bytes()

    rows_of_whole, rows_of_broken = metrics(whole), metrics(broken)
    for row in [*rows_of_whole, *rows_of_broken]:
        for speed in ("tokens_per_second", "share_of_peak", "peak_memory"):
            del row[speed]
    assert rows_of_whole == rows_of_broken
    assert len(rows_of_whole) == (6 if name == "8-bit states" else STEPS)
    if name == "lora 4 bits":
        need_sharding(4)
    assert_identical(read_sharded_state(broken), read_sharded_state(whole))


@pytest.mark.parametrize("name", ["lora", "full"])
def test_ddp_and_fsdp_continue_each_other(name, runs, on_two, uninterrupted):
    for until in (3, 5, STEPS):
        outcome(on_two, f"mixed {name} {until}")
    run = runs.part(f"mixed {name}", STEPS, **CHAINS[name])
    assert_same_numbers(run, uninterrupted(name))
    for step, state in ((3, "training_state.safetensors"), (5, "training_state")):
        checkpoint = Path(run.output_dir) / f"checkpoint-{step}"
        assert [path.name for path in checkpoint.glob("training_state*")] == [state]


# ---- what a sharded run says, and where it goes back to


def test_a_sharded_run_without_gradients_is_warned_once(on_two):
    for messages in outcome(on_two, "not learning"):
        (warning,) = [message for message in messages if "warning: " in message]
        assert "gradient norm of step 1 is 0: lora.alpha is 0" in warning


def test_a_sharded_run_cuts_off_answers_on_every_process(runs, on_two):
    """Decoding is collective: each process has its own clock, and waits for the others."""
    said = [
        re.findall("of 3 answers were cut off", "".join(m)) for m in outcome(on_two, "not learning")
    ]
    assert len(said[0]) == len(said[1]) >= 1
    written = samples(runs.part("not learning", 4, **NOT_LEARNING))
    assert [row["step"] for row in written] == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3


def test_a_sharded_run_goes_back_to_its_best_checkpoint(runs, on_two):
    first, _ = outcome(on_two, "not learning, back")
    assert any("checkpoint-1 with eval/out_of_domain/loss" in message for message in first)
    run = runs.part("not learning", 4, **NOT_LEARNING)
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]
    names = {path.name for path in Path(run.output_dir).glob("*checkpoint*")}
    superseded = {"superseded-checkpoint-2", "superseded-checkpoint-final"}
    assert names == superseded | {f"checkpoint-{step}" for step in (1, 2, 3)} | {"checkpoint-final"}


# ---- other libraries read what sharded runs have saved


@pytest.mark.parametrize("variant", ["16 bits", "biased", "tied", "4 bits"])
def test_peft_loads_the_adapter_of_a_sharded_run(variant, trained):
    """PEFT over the plain base computes what minilora does."""
    run = trained(variant, "fsdp 2")
    checkpoint = final_checkpoint(run)
    hf = AutoModelForCausalLM.from_pretrained(run.model.name, dtype=torch.float32)
    model = PeftModel.from_pretrained(hf, checkpoint)
    loaded = model.load_adapter(checkpoint, adapter_name="again")
    assert not loaded.unexpected_keys and not [key for key in loaded.missing_keys if "lora_" in key]

    ours, _ = minilora.load(
        run.model.name, adapter=str(checkpoint), device="cpu", dtype="float32", bits=16
    )
    with torch.no_grad():
        theirs = model.eval()(TOKENS[None]).logits[0]
        torch.testing.assert_close(ours(TOKENS), theirs, rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            without = model(TOKENS[None]).logits[0]
    assert not torch.allclose(without, theirs, atol=1e-3)  # the adapter does something


@pytest.mark.parametrize("variant", ["full", "tied full"])
def test_transformers_loads_the_model_of_a_sharded_run(variant, trained, alone):
    checkpoint = final_checkpoint(trained(variant, "fsdp 2"))
    hf, info = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[key]
    ours, _ = minilora.load(str(final_checkpoint(alone(variant))), device="cpu")
    with torch.no_grad():
        theirs = hf.eval()(TOKENS[None]).logits[0]
        torch.testing.assert_close(theirs, ours(TOKENS), rtol=1e-3, atol=1e-3)


# ---- 8-bit optimizer states


def test_8bit_states_are_kept_by_process(runs, on_two):
    """8-bit statistics are of a process's rows; what bitsandbytes keeps in 32 bits is in rows."""
    outcome(on_two, "8-bit states")
    run = runs.part("8-bit states", 3, **BITS8_STATES)
    state, weight = read_sharded_state(run), saved_weights(run)["lm_head.weight"]
    prefix = "optimizer.lm_head.weight."
    head = {
        name.removeprefix(prefix): tensor for name, tensor in state.items() if "lm_head" in name
    }
    absmax_names = {name for name in head if "absmax" in name}
    assert absmax_names == {"absmax1#0/2", "absmax1#1/2", "absmax2#0/2", "absmax2#1/2"}
    assert {name for name in head if "qmap" in name} == {"qmap1", "qmap2"}
    assert head["state1"].dtype == torch.uint8 and head["state1"].shape == weight.shape
    assert head["state1"].any() and head["state2"].any()
    norm = state["optimizer.model.norm.weight.state1"]
    assert norm.dtype == torch.float32 and norm.shape == (64,) and norm.any()


def test_8bit_states_on_another_number_of_processes_are_refused(runs, on_two):
    outcome(on_two, "8-bit states")
    alone = runs.part("8-bit states", 6, **BITS8_STATES)
    files = [path for path in Path(alone.output_dir).rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    message = (
        "states of an 8-bit optimizer can only be continued with the number of processes that "
        "saved them"
    )
    with pytest.raises(UserError, match=message):
        train.main(alone)

    four = runs.part("8-bit states", 6, **FSDP_4, **BITS8_STATES)
    script = str(ranks.ROOT / "train.py")
    config_file = write_config_file(four, runs.home / "four.py")
    stderr = ranks.torchrun(4, script, str(config_file)).stderr
    assert "exitcode  : 2" in stderr and "exitcode  : 1" not in stderr
    assert "error: " in stderr
    assert message in stderr
    assert f'Traceback (most recent call last):\n  File "{script}' not in stderr

    files = [path for path in Path(alone.output_dir).rglob("*") if path.is_file()]
    assert before == {path: path.read_bytes() for path in files}


# ---- time and communication


def test_a_qlora_run_on_two_processes_saves_in_time(on_two):
    """The whole run, with its saves, takes less than a single collective may."""
    assert max(outcome(on_two, str(("4 bits double", "fsdp 2")))) < 60


def test_ddp_sums_the_trained_gradients_once_a_step(runs, on_two):
    """Two micro-batches a step, and one sum of all adapters' gradients in fp32.

    Beside it, only a few numbers are summed.
    """
    model = build(runs.bases["mistral"], lora=runs.part("counting", STEPS).lora).model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for sums in outcome(on_two, "counting"):
        large = [(elements, dtype) for elements, dtype in sums if elements > 100]
        assert large == [(trained, torch.float32)] * STEPS
        small = [elements * dtype.itemsize for elements, dtype in sums if elements <= 100]
        assert sum(small) < 500 * STEPS


def test_tokenizing_may_take_longer_than_a_collective(runs):
    """No process has joined a process group yet."""
    run = runs.part("slow", 1, train__batch_size=4, data__max_seq_length=1999)  # in no cache
    run.data.eval_file = None
    jobs = {"slow": (ranks.fit_slowly, (run, 4.0, 5.0))}
    results = launch(runs.home / "jobs slow", 2, jobs, join=False)
    # one process tokenizes, for both, and before the group exists
    assert sorted(outcome(results, "slow")) == [[], [False]]
    assert len(losses(run)) == 1
