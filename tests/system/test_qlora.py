"""QLoRA runs: 4- and 8-bit bases, 8-bit optimizers, resuming, and precision."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional as bnb
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import minilora
import train
from helpers.checkpoints import contents
from helpers.processes import ROOT, TORCHRUN, final_adapter, start, write_config_file
from helpers.qlora import LINEARS, PEFT_PREFIX, SIZES, crash_after, final, qlora_config
from helpers.tiny_runs import base_model, losses, metrics, poison_loss
from minilora.checkpoint.training_state import (
    TENSORS_FILE,
    load_training_tensors,
    training_tensors,
)
from minilora.config import Config
from minilora.errors import RunError, UserError
from minilora.model import transformer
from minilora.model.quantization import QuantizedLinear
from minilora.training.optimizer import make_bitsandbytes_optimizer

# bitsandbytes keeps the states of parameters with 4096 elements and more in 8 bits
WIDE = {"lora__rank": 64, "train__optimizer": "adamw8bit"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_model(tmp_path_factory.mktemp("base") / "model", "mistral_v1", **SIZES)


def pair(tmp_path: Path, base: Path, **overrides) -> tuple[Config, Config]:
    """The same run in two directories: one to leave alone, one to disturb."""
    for name in "ab":
        (tmp_path / name).mkdir()
    whole = qlora_config(tmp_path / "a", base, **overrides)
    broken = qlora_config(tmp_path / "b", base, **overrides)
    return whole, broken


def quantized_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all that the quantized layers hold beside biases."""
    state = {}
    for path, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            for name, tensor in layer.state_dict().items():
                if name != "bias":
                    state[f"{path.removesuffix('.base_layer')}.{name}"] = tensor.clone()
    return state


def assert_identical(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys() and actual
    for name, tensor in actual.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


class Watch:
    """Records what train.py sets up for each run, and its gradients in each step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.runs: list[train.TrainingRun] = []
        # before the first step of each run:
        self.quantized: list[dict[str, Tensor]] = []
        self.parameters: list[dict[str, Tensor]] = []
        self.optimizer_states: list[dict[str, Tensor]] = []
        # in each step, and in each forward pass with labels:
        self.gradients: list[list[Tensor]] = []
        self.hidden_dtypes: list[torch.dtype] = []
        set_up, finish_gradients = train.set_up, train.finish_gradients
        cross_entropy_sum = transformer.cross_entropy_sum

        def watched_set_up(*args):
            run = set_up(*args)
            self.runs.append(run)
            self.quantized.append(quantized_state(run.loaded.model))
            self.parameters.append({n: p.detach().clone() for n, p in run.parameters.items()})
            state = training_tensors(run.optimizer, run.parameters, keep_masters=False)
            self.optimizer_states.append({name: t.clone() for name, t in state.items()})
            return run

        def watched_finish_gradients(loaded, parameters, *args):
            norm = finish_gradients(loaded, parameters, *args)
            self.gradients.append([p.grad.clone() for p in parameters.values()])
            return norm

        def watched_cross_entropy_sum(hidden, *args):
            self.hidden_dtypes.append(hidden.dtype)
            return cross_entropy_sum(hidden, *args)

        monkeypatch.setattr(train, "set_up", watched_set_up)
        monkeypatch.setattr(train, "finish_gradients", watched_finish_gradients)
        monkeypatch.setattr(transformer, "cross_entropy_sum", watched_cross_entropy_sum)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


# --- the frozen base ---


def quantized_by_bitsandbytes(
    base: Path, bits: int, dtype: torch.dtype, double_quant: bool
) -> dict[str, bytes]:
    """What the layers of a 16-bit base must hold, made by bitsandbytes itself."""
    state: dict[str, Tensor] = {}
    for name, weight in load_file(base / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            continue
        path, weight = name.removesuffix(".weight"), weight.to(dtype)
        if bits == 8:
            packed, scale, _ = bnb.int8_vectorwise_quant(weight.half())
            state[f"{path}.weight"] = packed
            state[f"{path}.SCB"] = scale
            continue
        packed, stats = bnb.quantize_4bit(
            weight, blocksize=64, compress_statistics=double_quant, quant_type="nf4"
        )
        state[f"{path}.weight"] = packed
        state[f"{path}.absmax"] = stats.absmax
        if double_quant:
            state[f"{path}.nested_absmax"] = stats.state2.absmax
            state[f"{path}.nested_code"] = stats.state2.code
            state[f"{path}.offset"] = stats.offset
    return as_bytes(state)


def as_bytes(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {
        name: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize(("bits", "double_quant"), [(4, True), (4, False), (8, True)])
def test_base_is_the_same_bytes_before_and_after(
    tmp_path: Path, base: Path, bits: int, double_quant: bool, watch: Watch, monkeypatch
):
    """Before and after training, in a resumed run, and where the checkpoint is loaded."""
    c = qlora_config(
        tmp_path,
        base,
        model__bits=bits,
        model__double_quant=double_quant,
        train__save_steps=3,
        train__max_steps=8,
    )
    with crash_after(5, monkeypatch):
        train.main(c)
    assert train.main(c) == 0
    models = [run.loaded.model for run in watch.runs]
    models += [minilora.load(str(final(c)), bits=width)[0] for width in (bits, None)]

    states = [*watch.quantized, *map(quantized_state, models)]
    expected = quantized_by_bitsandbytes(base, bits, torch.float32, double_quant)
    tensors_per_layer = 5 if bits == 4 and double_quant else 2
    assert len(expected) == LINEARS * tensors_per_layer
    assert len(states) == 6
    assert all(as_bytes(state) == expected for state in states)


def test_checkpoint_is_loaded_over_the_weights_it_was_trained_over(
    tmp_path: Path, base: Path, watch: Watch
):
    """A run in bfloat16 rounds an fp32 base before it quantizes it: other blocks, other bytes."""
    c = qlora_config(tmp_path, base, model__dtype="bfloat16", train__max_steps=1)
    assert train.main(c) == 0
    expected = quantized_by_bitsandbytes(base, 4, torch.bfloat16, True)
    assert expected != quantized_by_bitsandbytes(base, 4, torch.float32, True)
    assert as_bytes(watch.quantized[0]) == expected
    model, _ = minilora.load(str(final(c)), bits=None)
    assert as_bytes(quantized_state(model)) == expected


def test_another_width_is_not_resumed(tmp_path: Path, base: Path):
    c = qlora_config(tmp_path, base, train__max_steps=2)
    assert train.main(c) == 0
    before = contents(Path(c.output_dir))
    c.train.max_steps = 4
    for field, value in (("bits", 8), ("bits", 16), ("double_quant", False)):
        old = getattr(c.model, field)
        setattr(c.model, field, value)
        with pytest.raises(UserError, match=rf"model\.{field}: {old} -> {value}\b"):
            train.main(c)
        setattr(c.model, field, old)
        assert contents(Path(c.output_dir)) == before


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path, base: Path, watch: Watch):
    """Also over quantized layers, which dequantize again in the backward pass."""
    first, second = pair(tmp_path, base, train__max_steps=4, lora__dropout=0.1)
    second.train.gradient_checkpointing = False
    for c in (first, second):
        assert train.main(c) == 0
    with_it, without = watch.gradients[:4], watch.gradients[4:]
    for a, b in zip(with_it, without, strict=True):
        assert any(gradient.abs().max() > 0 for gradient in a)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


# --- 8-bit and paged optimizers ---


def state_dtypes(parameters: dict[str, nn.Parameter]) -> dict[str, torch.dtype]:
    """bitsandbytes' rule: 8 bits from 4096 elements on."""
    return {
        name: torch.uint8 if p.numel() >= 4096 else torch.float32 for name, p in parameters.items()
    }


@pytest.mark.parametrize(
    "settings",
    [WIDE, {"method": "full", "model__bits": 16, "train__optimizer": "adamw8bit"}],
    ids=["lora", "full"],
)
def test_adamw8bit_is_that_of_bitsandbytes(
    tmp_path: Path, base: Path, settings: dict, watch: Watch
):
    """A loop by hand over the same gradients ends with the same bytes."""
    c = qlora_config(tmp_path, base, train__max_steps=20, train__weight_decay=0.1, **settings)
    assert train.main(c) == 0
    by_hand = {name: nn.Parameter(p) for name, p in watch.parameters[0].items()}
    matrices = [p for p in by_hand.values() if p.ndim > 1]
    vectors = [p for p in by_hand.values() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}]
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    optimizer = bitsandbytes.optim.AdamW8bit(groups)
    assert len(watch.gradients) == 20
    for row, gradients in zip(metrics(c), watch.gradients, strict=True):
        for p, gradient in zip(by_hand.values(), gradients, strict=True):
            p.grad = gradient
        for group in optimizer.param_groups:
            group["lr"] = row["lr"]
        optimizer.step()

    if c.method == "full":
        saved = load_file(final(c) / "model.safetensors")
        expected = {name: p.detach() for name, p in by_hand.items()}
    else:
        saved = load_file(final(c) / "adapter_model.safetensors")
        expected = {f"{PEFT_PREFIX}{name}.weight": p.detach() for name, p in by_hand.items()}
    assert_identical(saved, expected)
    state = load_file(final(c) / TENSORS_FILE)
    dtypes = {name: state[f"optimizer.{name}.state1"].dtype for name in by_hand}
    assert dtypes == state_dtypes(by_hand)
    assert set(dtypes.values()) == {torch.uint8, torch.float32}


@pytest.mark.parametrize("bits", [4, 16])
def test_resumed_run_with_8bit_states_is_as_uninterrupted(
    tmp_path: Path, base: Path, bits: int, watch: Watch, monkeypatch
):
    settings = {
        "model__bits": bits,
        "train__epochs": 2.0,
        "train__save_steps": 4,
        "lora__dropout": 0.1,
        **WIDE,
    }
    whole, broken = pair(tmp_path, base, **settings)
    assert train.main(whole) == 0
    with crash_after(10, monkeypatch):  # in the second epoch of 7 steps
        train.main(broken)
    saved = load_file(Path(broken.output_dir) / "checkpoint-8" / TENSORS_FILE)
    torch.manual_seed(12345)
    assert train.main(broken) == 0
    assert final_adapter(broken) == final_adapter(whole)
    assert losses(broken) == losses(whole)

    resumed = watch.runs[-1]
    assert_identical(watch.optimizer_states[-1], saved)
    dtypes = state_dtypes(resumed.parameters)
    assert set(dtypes.values()) == {torch.uint8, torch.float32}
    for name, dtype in dtypes.items():
        state = resumed.optimizer.state[resumed.parameters[name]]
        assert type(state["step"]) is int and state["step"] == 14
        assert state["state1"].dtype == state["state2"].dtype == dtype
        assert saved[f"optimizer.{name}.step"].item() == 8
        assert saved[f"optimizer.{name}.state1"].any() and saved[f"optimizer.{name}.state2"].any()


@pytest.mark.parametrize(
    ("first", "second"), [("adamw", "adamw8bit"), ("adamw8bit", "adamw")], ids=str
)
def test_state_of_another_optimizer_is_refused(tmp_path: Path, base: Path, first: str, second: str):
    """Whether or not the checkpoint is named on purpose, nothing is touched."""
    c = qlora_config(tmp_path, base, train__max_steps=2, train__optimizer=first)
    assert train.main(c) == 0
    before = contents(Path(c.output_dir))
    c.train.max_steps = 4
    c.train.optimizer = second  # type: ignore[assignment]
    for resume in ("auto", str(final(c))):
        c.train.resume = resume
        with pytest.raises(UserError, match="optimizer"):
            train.main(c)
        assert contents(Path(c.output_dir)) == before


def wait_for_step(c: Config, step: int, process: subprocess.Popen, log: Path) -> None:
    """Wait until a run in another process has logged a step."""
    file = Path(c.output_dir) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if file.is_file() and any(row["step"] >= step for row in metrics(c)):
            return
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    raise AssertionError(f"no step {step} within two minutes")


@pytest.mark.system
def test_killed_run_over_4_bits_resumes(tmp_path: Path, base: Path):
    """A real process and a real SIGKILL."""
    whole, broken = pair(
        tmp_path,
        base,
        rows=10,
        train__batch_size=2,
        train__epochs=14.0,
        train__save_steps=4,
        **WIDE,
    )
    assert train.main(whole) == 0
    killed, log = start(broken, command=[sys.executable])
    wait_for_step(broken, 22, killed, log)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(60) == -signal.SIGKILL
    assert not final(broken).exists()
    assert train.main(broken) == 0
    assert final_adapter(broken) == final_adapter(whole)
    assert losses(broken) == losses(whole)


@pytest.mark.system
def test_paged_optimizers_without_a_gpu_are_refused(tmp_path: Path, base: Path):
    c = qlora_config(tmp_path, base)
    file = write_config_file(c, tmp_path / "run.py")
    before = contents(tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in ("paged_adamw", "paged_adamw8bit"):
        command = [sys.executable, str(ROOT / "train.py"), str(file), "--train.optimizer", name]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert (run.returncode, run.stdout) == (2, "")
        alternative = name.removeprefix("paged_")
        message = rf"error: train\.optimizer='{name}' .*GPU.* use '{alternative}'\n"
        assert re.fullmatch(message, run.stderr)
    assert contents(tmp_path) == before
    assert not Path(c.output_dir).exists()


SHAPES = {"large": (64, 64), "small": (8, 4), "other": (70, 90)}


def paged_optimizer(name: str) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(0)
    parameters = {
        key: nn.Parameter(torch.randn(shape, generator=generator)) for key, shape in SHAPES.items()
    }
    groups = [{"params": list(parameters.values()), "weight_decay": 0.1}]
    return parameters, make_bitsandbytes_optimizer(name, groups, 1e-2)


def take_steps(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: range
) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in parameters.values():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("paged_adamw", bitsandbytes.optim.PagedAdamW32bit),
        ("paged_adamw8bit", bitsandbytes.optim.PagedAdamW8bit),
    ],
)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_restored_states_are_paged_again_once(
    tmp_path: Path, name: str, kind: type, monkeypatch: pytest.MonkeyPatch
):
    """As far as a CPU can show.

    The buffers come from where bitsandbytes takes pageable ones, and hold what was restored.
    """
    parameters, optimizer = paged_optimizer(name)
    assert type(optimizer) is kind and optimizer.is_paged
    take_steps(parameters, optimizer, range(5))
    tensors = training_tensors(optimizer, parameters, keep_masters=True)
    save_file(tensors, tmp_path / TENSORS_FILE)
    restored, again = paged_optimizer(name)
    load_training_tensors(tmp_path, again, restored)
    before = {
        p: {key: again.state[p][key].clone() for key in ("state1", "state2")}
        for p in restored.values()
    }

    made: list[tuple[nn.Parameter, torch.dtype, Tensor]] = []
    real_buffer, real_update = kind.get_state_buffer, kind.update_step

    def get_state_buffer(self, p, dtype=torch.float32):
        buffer = real_buffer(self, p, dtype)
        made.append((p, dtype, buffer))
        return buffer

    def update_step(self, group, p, gindex, pindex):
        if again.state[p]["step"] == 5:  # the first step after the resume: not changed yet
            for key, expected in before[p].items():
                state = again.state[p][key]
                assert any(state is buffer for owner, _, buffer in made if owner is p)
                assert torch.equal(state, expected)
        real_update(self, group, p, gindex, pindex)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "get_state_buffer", get_state_buffer)
        patch.setattr(kind, "update_step", update_step)
        take_steps(restored, again, range(5, 8))
    dtypes = dict.fromkeys(restored, torch.float32)
    if name.endswith("8bit"):
        dtypes = state_dtypes(restored)
    for key, p in restored.items():
        made_dtypes = [dtype for owner, dtype, _ in made if owner is p]
        assert made_dtypes == [dtypes[key]] * 2, "once for each of the two moments"
    take_steps(parameters, optimizer, range(5, 8))
    assert_identical(dict(restored), dict(parameters))


# --- precision ---


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        ("bfloat16", {}),
        ("float16", {}),
        ("bfloat16", {"model__double_quant": False}),
        ("float16", {"model__bits": 8}),
    ],
    ids=str,
)
def test_only_the_arithmetic_is_in_16_bits(
    tmp_path: Path, dtype: str, settings: dict, watch: Watch
):
    """Adapters, gradients and moments stay fp32, and the frozen floats are in the compute dtype."""
    base = base_model(tmp_path / "base", "qwen2", **SIZES)  # has biases
    c = qlora_config(tmp_path, base, model__dtype=dtype, train__max_steps=5, **settings)
    assert train.main(c) == 0
    compute, (run,) = getattr(torch, dtype), watch.runs
    assert set(watch.hidden_dtypes) == {compute}
    assert {g.dtype for gradients in watch.gradients for g in gradients} == {torch.float32}
    states = training_tensors(run.optimizer, run.parameters, keep_masters=False)
    assert len(states) == 3 * 2 * LINEARS
    assert {tensor.dtype for tensor in states.values()} == {torch.float32}
    saved = load_file(final(c) / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}

    allowed = {
        r".*\.lora_[AB]": torch.float32,
        r"model\.embed_tokens\.weight|lm_head\.weight|.*norm\.weight": compute,
        r".*\.[qkv]_proj\.base_layer\.bias": compute,
    }
    if not settings:
        allowed[r".*_proj\.base_layer\.(nested_absmax|nested_code|offset)"] = torch.float32
    seen = set()
    model = run.loaded.model
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            (pattern,) = [pattern for pattern in allowed if re.fullmatch(pattern, name)]
            assert tensor.dtype == allowed[pattern], name
            assert tensor.requires_grad == (".lora_" in name), name
            seen.add(pattern)
    assert seen == allowed.keys()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_run_in_16_bits_learns(tmp_path: Path, base: Path, dtype: str):
    c = qlora_config(tmp_path, base, model__dtype=dtype, train__max_steps=28)
    assert train.main(c) == 0
    assert losses(c)[-1] < 0.7 * losses(c)[0]
    key = "eval/out_of_domain/loss"
    assert metrics(c, key)[-1][key] < 0.8 * losses(c)[0]


def test_nan_over_4_bits_stops_the_run_and_is_never_saved(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
):
    c = qlora_config(
        tmp_path, base, model__dtype="bfloat16", train__save_steps=2, train__logging_steps=3
    )
    poison_loss(monkeypatch, 6)
    with pytest.raises(RunError, match=r"loss nan.*by step 6.*checkpoint-4"):
        train.main(c)
    saved = sorted(Path(c.output_dir).glob("checkpoint-*"))
    assert [directory.name for directory in saved] == ["checkpoint-2", "checkpoint-4"]
    for directory in saved:
        for file in directory.glob("*.safetensors"):
            assert all(tensor.isfinite().all() for tensor in load_file(file).values())


# --- several processes ---


@pytest.mark.system
def test_two_processes_give_the_numbers_of_one_over_4_bits(tmp_path: Path, base: Path):
    one, two = pair(tmp_path, base, train__epochs=1.0)
    two.train.batch_size = 2
    assert train.main(one) == 0
    file = write_config_file(two, tmp_path / "two.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, str(ROOT / "train.py"), str(file)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    for key in ("loss", "grad_norm", "eval/in_domain/loss", "eval/out_of_domain/loss"):
        expected, found = ([row[key] for row in metrics(c, key)] for c in (one, two))
        tolerance = 1e-4 if key == "grad_norm" else 1e-5
        assert expected
        assert found == pytest.approx(expected, abs=tolerance)
