"""QLoRA from end to end: runs over 4- and 8-bit bases, 8-bit optimizers, resuming, precision, merging and asking."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import bitsandbytes
import peft
import pytest
import torch
import transformers
from bitsandbytes import functional as bnb
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import merge
import minilora
import train
from minilora.config import Config, RunError, UserError
from minilora.quant import QuantizedLinear, bitsandbytes_adamw
from minilora.running.saving import TOKENIZER_FILES
from minilora.running.training_state import TENSORS, load_training_tensors, training_tensors
from minilora.tokenizer import Tokenizer
from test_runs import ROOT, Crash, config_file, contents, crash_after, start, wait_for_step, weights
from tiny_runs import base_model, config, losses, metrics, poison_loss

# whole blocks of 64 in each row: where blocks cross rows, bitsandbytes 0.50 dequantises wrongly on a CPU, so that it and what
# is built on it are no reference; tests/test_quant.py compares those shapes with the arithmetic written out
SIZES = {"hidden_size": 64, "intermediate_size": 128}
WIDE = {"lora__rank": 64, "train__optimizer": "adamw8bit"}  # bitsandbytes keeps states of 4096 elements and more in 8 bits
INDEX = "model.safetensors.index.json"
PREFIX = "base_model.model."  # PEFT's
LINEARS = 14  # of two blocks


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return base_model(tmp_path_factory.mktemp("base") / "model", "mistral_v1", **SIZES)


def qlora(tmp_path: Path, base: Path, **overrides) -> Config:
    """A run over a 4-bit base."""
    return config(tmp_path, base, **{"model__bits": 4, "train__gradient_checkpointing": True, **overrides})


def pair(tmp_path: Path, base: Path, **overrides) -> tuple[Config, Config]:
    """The same run in two directories: one to leave alone, one to disturb."""
    for name in "ab":
        (tmp_path / name).mkdir()
    whole, broken = (qlora(tmp_path / name, base, **overrides) for name in "ab")
    return whole, broken


def final(c: Config) -> Path:
    return Path(c.output_dir) / "checkpoint-final"


def quantised_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all that the quantised layers hold beside biases."""
    return {
        f"{path.removesuffix('.base_layer')}.{name}": tensor.clone()
        for path, layer in model.named_modules()
        if isinstance(layer, QuantizedLinear)
        for name, tensor in layer.state_dict().items()
        if name != "bias"
    }


def assert_identical(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys() and actual
    for name, tensor in actual.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


class Watch:
    """What train.py builds and does, run by run and step by step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.models: list[nn.Module] = []
        self.held: list[dict[str, Tensor]] = []  # by the quantised layers, before the first step
        self.parameters: list[dict[str, nn.Parameter]] = []
        self.begins: list[dict[str, Tensor]] = []  # the parameters before the first step
        self.optimizers: list[torch.optim.Optimizer] = []
        self.states: list[dict[str, Tensor]] = []  # of the optimizer, before the first step
        self.gradients: list[list[Tensor]] = []
        self.hidden: list[torch.dtype] = []
        build, adamw, finish, cross_entropy = (
            train.build_trainable, train.adamw, train.finish_gradients, train.cross_entropy_sum,
        )  # fmt: skip

        def watch_build(*args):
            built, parameters = build(*args)
            self.models.append(built.model)
            self.held.append(quantised_state(built.model))
            self.parameters.append(parameters)
            self.begins.append({name: p.detach().clone() for name, p in parameters.items()})
            return built, parameters

        def watch_adamw(built, parameters, *args):
            optimizer = adamw(built, parameters, *args)
            self.optimizers.append(optimizer)
            self.states.append({k: v.clone() for k, v in training_tensors(optimizer, parameters, keep_masters=False).items()})
            return optimizer

        def watch_gradients(built, parameters, *args):
            norm = finish(built, parameters, *args)
            self.gradients.append([p.grad.clone() for p in parameters.values()])
            return norm

        def watch_hidden(hidden, *args):
            self.hidden.append(hidden.dtype)
            return cross_entropy(hidden, *args)

        monkeypatch.setattr(train, "build_trainable", watch_build)
        monkeypatch.setattr(train, "adamw", watch_adamw)
        monkeypatch.setattr(train, "finish_gradients", watch_gradients)
        monkeypatch.setattr(train, "cross_entropy_sum", watch_hidden)


@pytest.fixture
def watch(monkeypatch) -> Watch:
    return Watch(monkeypatch)


def break_off(c: Config, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run, and fall over after so many steps."""
    with monkeypatch.context() as patch:
        crash_after(patch, after)
        with pytest.raises(Crash):
            train.main(c)


@pytest.fixture
def script(monkeypatch, capsys):
    """A script of ours as from the command line: (name, arguments) -> exit code, stdout, stderr."""

    def run(name: str, *args: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        return stop.value.code, *capsys.readouterr()

    return run


# --- the frozen base ---


def by_bitsandbytes(base: Path, bits: int, dtype: torch.dtype, double_quant: bool) -> dict[str, bytes]:
    """What the layers of a 16-bit base must hold, in bitsandbytes' own terms."""
    held: dict[str, Tensor] = {}
    for name, weight in load_file(base / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            continue
        path, weight = name.removesuffix(".weight"), weight.to(dtype)
        if bits == 8:
            held[f"{path}.weight"], held[f"{path}.SCB"], _ = bnb.int8_vectorwise_quant(weight.half())
            continue
        packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=double_quant, quant_type="nf4")
        held |= {f"{path}.weight": packed, f"{path}.absmax": state.absmax}
        if double_quant:
            held |= {f"{path}.nested_absmax": state.state2.absmax, f"{path}.nested_code": state.state2.code}
            held[f"{path}.offset"] = state.offset
    return as_bytes(held)


def as_bytes(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}


@pytest.mark.parametrize("bits, double_quant", [(4, True), (4, False), (8, True)])
def test_the_base_is_the_same_bytes_before_and_after(tmp_path, base, bits, double_quant, watch, monkeypatch):
    """Before training, after it, in a resumed run, and wherever the checkpoint is loaded: what bitsandbytes makes of it."""
    c = qlora(tmp_path, base, model__bits=bits, model__double_quant=double_quant, train__save_steps=3, train__max_steps=8)
    break_off(c, 5, monkeypatch)
    assert train.main(c) == 0
    loaded = [minilora.load(str(final(c)), bits=width)[0] for width in (bits, None)]
    held = [*watch.held, *map(quantised_state, [*watch.models, *loaded])]
    expected = by_bitsandbytes(base, bits, torch.float32, double_quant)
    assert len(held) == 6 and len(expected) == LINEARS * (2 if bits == 8 or not double_quant else 5)
    assert all(as_bytes(state) == expected for state in held)


def test_a_checkpoint_is_loaded_over_the_weights_it_was_trained_over(tmp_path, base, watch):
    """A run in bfloat16 rounds an fp32 base before it quantises it: other blocks, other bytes."""
    c = qlora(tmp_path, base, model__dtype="bfloat16", train__max_steps=1)
    assert train.main(c) == 0
    expected = by_bitsandbytes(base, 4, torch.bfloat16, True)
    assert expected != by_bitsandbytes(base, 4, torch.float32, True)
    assert as_bytes(watch.held[0]) == expected
    assert as_bytes(quantised_state(minilora.load(str(final(c)), bits=None)[0])) == expected


@pytest.mark.parametrize("change", [{"model__bits": 8}, {"model__bits": 16}, {"model__double_quant": False}], ids=str)
def test_another_width_is_not_resumed(tmp_path, base, change):
    c = qlora(tmp_path, base, train__max_steps=2)
    assert train.main(c) == 0
    before = contents(Path(c.output_dir))
    (field, value), c.train.max_steps = *change.items(), 4
    field = field.removeprefix("model__")
    then = getattr(c.model, field)
    setattr(c.model, field, value)
    with pytest.raises(UserError, match=rf"model\.{field}: {then} -> {value}\b"):
        train.main(c)
    assert contents(Path(c.output_dir)) == before


def test_gradient_checkpointing_changes_no_gradient(tmp_path, base, watch):
    """Row 13, over quantised layers, which dequantise again in the backward pass."""
    for c, on in zip(pair(tmp_path, base, train__max_steps=4, lora__dropout=0.1), (True, False), strict=True):
        c.train.gradient_checkpointing = on
        assert train.main(c) == 0
    with_it, without = watch.gradients[:4], watch.gradients[4:]
    for a, b in zip(with_it, without, strict=True):
        assert any(g.abs().max() > 0 for g in a)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


# --- 8-bit and paged optimizers ---


def state_dtypes(parameters: dict[str, nn.Parameter]) -> dict[str, torch.dtype]:
    """bitsandbytes' rule: 8 bits from 4096 elements on."""
    return {name: torch.uint8 if p.numel() >= 4096 else torch.float32 for name, p in parameters.items()}


@pytest.mark.parametrize("settings", [WIDE, {"method": "full", "model__bits": 16, "train__optimizer": "adamw8bit"}], ids=str)
def test_adamw8bit_is_that_of_bitsandbytes(tmp_path, base, settings, watch):
    """A loop by hand over the same gradients ends with the same bytes."""
    c = qlora(tmp_path, base, train__max_steps=20, train__weight_decay=0.1, **settings)
    assert train.main(c) == 0
    by_hand = {name: nn.Parameter(p) for name, p in watch.begins[0].items()}
    matrices, vectors = ([p for p in by_hand.values() if (p.ndim > 1) == matrix] for matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = bitsandbytes.optim.AdamW8bit([g for g in groups if g["params"]])
    assert len(watch.gradients) == 20
    for row, gradients in zip(metrics(c), watch.gradients, strict=True):
        for p, gradient in zip(by_hand.values(), gradients, strict=True):
            p.grad = gradient
        for group in optimizer.param_groups:
            group["lr"] = row["lr"]
        optimizer.step()
    saved = load_file(final(c) / ("model.safetensors" if c.method == "full" else "adapter_model.safetensors"))
    expected = by_hand if c.method == "full" else {f"{PREFIX}{name}.weight": p for name, p in by_hand.items()}
    assert_identical(saved, {name: p.detach() for name, p in expected.items()})
    state = load_file(final(c) / TENSORS)
    dtypes = {name: state[f"optimizer.{name}.state1"].dtype for name in by_hand}
    assert dtypes == state_dtypes(by_hand) and set(dtypes.values()) == {torch.uint8, torch.float32}


@pytest.mark.parametrize("bits", [4, 16])
def test_resumed_is_uninterrupted_with_8bit_states(tmp_path, base, bits, watch, monkeypatch):
    settings = {"model__bits": bits, "train__epochs": 2.0, "train__save_steps": 4, "lora__dropout": 0.1, **WIDE}
    whole, broken = pair(tmp_path, base, **settings)
    assert train.main(whole) == 0
    break_off(broken, 10, monkeypatch)  # in the second epoch of 7 steps
    saved = load_file(Path(broken.output_dir) / "checkpoint-8" / TENSORS)
    torch.manual_seed(12345)
    assert train.main(broken) == 0
    assert weights(broken) == weights(whole)
    assert losses(broken) == losses(whole)
    resumed, parameters = watch.optimizers[-1], watch.parameters[-1]
    assert_identical(watch.states[-1], saved)
    for name, dtype in state_dtypes(parameters).items():
        held = resumed.state[parameters[name]]
        assert type(held["step"]) is int and held["step"] == 14
        assert saved[f"optimizer.{name}.step"].item() == 8
        assert held["state1"].dtype == held["state2"].dtype == dtype
        assert saved[f"optimizer.{name}.state1"].any() and saved[f"optimizer.{name}.state2"].any()
    assert set(state_dtypes(parameters).values()) == {torch.uint8, torch.float32}


@pytest.mark.parametrize("kinds", [("adamw", "adamw8bit"), ("adamw8bit", "adamw")], ids=str)
def test_the_state_of_another_optimizer_is_refused(tmp_path, base, kinds):
    """Asked for on purpose it cannot work, and nothing is touched; without asking the run is not continued at all."""
    c = qlora(tmp_path, base, train__max_steps=2, train__optimizer=kinds[0])
    assert train.main(c) == 0
    before = contents(Path(c.output_dir))
    c.train.max_steps, c.train.optimizer = 4, kinds[1]
    for resume in ("auto", str(final(c))):
        c.train.resume = resume
        with pytest.raises(UserError, match="optimizer"):
            train.main(c)
        assert contents(Path(c.output_dir)) == before


def test_a_killed_run_over_4_bits_resumes(tmp_path, base):
    """A real process and a real SIGKILL."""
    whole, broken = pair(tmp_path, base, rows=10, train__batch_size=2, train__epochs=14.0, train__save_steps=4, **WIDE)
    assert train.main(whole) == 0
    killed = start(config_file(broken, tmp_path / "run.py"))
    wait_for_step(broken, 22, killed)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(60) == -signal.SIGKILL
    assert not final(broken).exists()
    assert train.main(broken) == 0
    assert weights(broken) == weights(whole)
    assert losses(broken) == losses(whole)


def test_paged_optimizers_without_a_gpu_are_refused(tmp_path, base):
    c = qlora(tmp_path, base)
    file = config_file(c, tmp_path / "run.py")
    before = contents(tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in ("paged_adamw", "paged_adamw8bit"):
        command = [sys.executable, str(ROOT / "train.py"), str(file), "--train.optimizer", name]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert (run.returncode, run.stdout) == (2, "")
        assert re.fullmatch(rf"error: train\.optimizer='{name}' .*GPU.* use '{name.removeprefix('paged_')}'\n", run.stderr)
    assert contents(tmp_path) == before and not Path(c.output_dir).exists()


SHAPES = {"large": (64, 64), "small": (8, 4), "other": (70, 90)}


def paged(name: str) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(0)
    parameters = {key: nn.Parameter(torch.randn(shape, generator=generator)) for key, shape in SHAPES.items()}
    return parameters, bitsandbytes_adamw(name, [{"params": list(parameters.values()), "weight_decay": 0.1}], 1e-2)


def take_steps(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in parameters.values():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("name, kind", [
    ("paged_adamw", bitsandbytes.optim.PagedAdamW32bit), ("paged_adamw8bit", bitsandbytes.optim.PagedAdamW8bit),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_restored_states_are_paged_again_once(tmp_path, name, kind, monkeypatch):
    """As far as a CPU can show: buffers come from where bitsandbytes takes pageable ones, and hold what was restored."""
    parameters, optimizer = paged(name)
    assert type(optimizer) is kind and optimizer.is_paged
    take_steps(parameters, optimizer, range(5))
    save_file(training_tensors(optimizer, parameters, keep_masters=True), tmp_path / TENSORS)
    restored, again = paged(name)
    load_training_tensors(tmp_path, again, restored)
    before = {key: {k: v.clone() for k, v in again.state[p].items() if k in ("state1", "state2")} for key, p in restored.items()}
    real, made, step_of = type(again).get_state_buffer, [], type(again).update_step

    def get_state_buffer(self, p, dtype=torch.float32):
        made.append((p, dtype, real(self, p, dtype)))
        return made[-1][2]

    def update_step(self, group, p, gindex, pindex):
        key = next(k for k, q in restored.items() if q is p)
        if again.state[p]["step"] == 5:  # the first step after the resume: not changed yet
            for state, expected in before[key].items():
                buffer = again.state[p][state]
                assert any(buffer is b for q, _, b in made if q is p) and torch.equal(buffer, expected)
        step_of(self, group, p, gindex, pindex)

    monkeypatch.setattr(type(again), "get_state_buffer", get_state_buffer)
    monkeypatch.setattr(type(again), "update_step", update_step)
    take_steps(restored, again, range(5, 8))
    dtypes = state_dtypes(restored) if name.endswith("8bit") else dict.fromkeys(restored, torch.float32)
    for key, p in restored.items():
        assert [dtype for q, dtype, _ in made if q is p] == [dtypes[key]] * 2, "once for each of the two moments"
    monkeypatch.undo()
    take_steps(parameters, optimizer, range(5, 8))
    assert_identical(dict(restored), dict(parameters))


# --- precision ---


@pytest.mark.parametrize("dtype, settings", [
    ("bfloat16", {}), ("float16", {}), ("bfloat16", {"model__double_quant": False}), ("float16", {"model__bits": 8}),
])  # fmt: skip
def test_only_the_arithmetic_is_in_16_bits(tmp_path, dtype, settings, watch):
    """Rows 14 and 15: masters, gradients and moments stay fp32; nothing else is kept in floating point that need not be."""
    base = base_model(tmp_path / "base", "qwen2", **SIZES)  # has biases
    c = qlora(tmp_path, base, model__dtype=dtype, train__max_steps=5, **settings)
    assert train.main(c) == 0
    computed, (model,) = getattr(torch, dtype), watch.models
    assert set(watch.hidden) == {computed}
    assert {g.dtype for gradients in watch.gradients for g in gradients} == {torch.float32}
    states = training_tensors(watch.optimizers[0], watch.parameters[0], keep_masters=False)
    assert len(states) == 3 * 2 * LINEARS and {t.dtype for t in states.values()} == {torch.float32}
    assert {t.dtype for t in load_file(final(c) / "adapter_model.safetensors").values()} == {torch.float32}
    allowed = {
        r".*\.lora_[AB]": torch.float32,
        r"model\.embed_tokens\.weight|lm_head\.weight|.*norm\.weight|.*\.[qkv]_proj\.base_layer\.bias": computed,
    }
    if not settings:
        allowed[r".*_proj\.base_layer\.(nested_absmax|nested_code|offset)"] = torch.float32
    seen = set()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            (pattern,) = [p for p in allowed if re.fullmatch(p, name)]
            assert tensor.dtype == allowed[pattern], name
            assert tensor.requires_grad == (".lora_" in name), name
            seen.add(pattern)
    assert seen == allowed.keys()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_run_in_16_bits_learns(tmp_path, base, dtype):
    c = qlora(tmp_path, base, model__dtype=dtype, train__max_steps=28)
    assert train.main(c) == 0
    assert losses(c)[-1] < 0.7 * losses(c)[0]
    evaluated = metrics(c, "eval/out_of_domain/loss")[-1]["eval/out_of_domain/loss"]
    assert evaluated < 0.8 * losses(c)[0]


def test_a_nan_over_4_bits_stops_the_run_and_is_never_saved(tmp_path, base, monkeypatch):
    c = qlora(tmp_path, base, model__dtype="bfloat16", train__save_steps=2, train__logging_steps=3)
    poison_loss(monkeypatch, 6)
    with pytest.raises(RunError, match=r"loss nan.*by step 6.*checkpoint-4"):
        train.main(c)
    saved = sorted(Path(c.output_dir).glob("checkpoint-*"))
    assert [p.name for p in saved] == ["checkpoint-2", "checkpoint-4"]
    for directory in saved:
        for file in directory.glob("*.safetensors"):
            assert all(t.isfinite().all() for t in load_file(file).values())


# --- several processes ---


def test_two_processes_give_the_numbers_of_one_over_4_bits(tmp_path, base):
    one, two = pair(tmp_path, base, train__epochs=1.0)
    two.train.batch_size = 2
    assert train.main(one) == 0
    file = config_file(two, tmp_path / "two.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*launcher, str(ROOT / "train.py"), str(file)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert run.returncode == 0, run.stderr
    for key in ("loss", "grad_norm", "eval/in_domain/loss", "eval/out_of_domain/loss"):
        values = [[row[key] for row in metrics(c, key)] for c in (one, two)]
        assert values[1] == pytest.approx(values[0], abs=1e-4 if key == "grad_norm" else 1e-5) and values[0]


# --- the reference of merging and asking: transformers + bitsandbytes + peft ---

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def theirs(
    directory: Path, bits: int = 16, adapter: Path | None = None, dtype: str = "float32", double_quant: bool = True
) -> nn.Module:
    """transformers' model of a directory, quantised on the way in if it is not yet, with a PEFT adapter on it if given.

    At 4 bits in train mode (there is no dropout): in eval mode some CPUs take a kernel that rounds to bfloat16.
    """
    settings = {}
    if bits < 16 and "quantization_config" not in json.loads((directory / "config.json").read_text()):
        wanted = {**NF4, "bnb_4bit_use_double_quant": double_quant} if bits == 4 else {"load_in_8bit": True}
        settings["quantization_config"] = transformers.BitsAndBytesConfig(**wanted)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager", **settings)
    if adapter:
        model = peft.PeftModel.from_pretrained(model, str(adapter))
    for p in model.parameters():
        if p.is_floating_point():  # a checkpoint that is quantised already is read in its own dtype, whatever is asked for
            p.data = p.data.to(getattr(torch, dtype))
    return model.train(bits == 4)


@torch.no_grad()
def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens[None]).logits[0]


def dequantised(directory: Path, bits: int, dtype: str = "float32", double_quant: bool = True) -> dict[str, Tensor]:
    """The weights in float64 of all layers that transformers has quantised, by name."""
    held = {}
    for path, layer in theirs(directory, bits, dtype=dtype, double_quant=double_quant).named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            layer.weight.quant_state.dtype = torch.float32
            held[f"{path}.weight"] = bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
        elif isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            held[f"{path}.weight"] = bnb.int8_vectorwise_dequant(layer.weight.CB, layer.weight.SCB).double()
    assert len(held) == LINEARS
    return held


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def with_update(held: dict[str, Tensor], adapter: Path) -> dict[str, Tensor]:
    """W + alpha / r * B A in float64."""
    raw, tensors = json.loads((adapter / "adapter_config.json").read_text()), load_file(adapter / "adapter_model.safetensors")
    changed = dict(held)
    for name in tensors:
        if ".lora_A." in name:
            A, B = tensors[name].double(), tensors[name.replace("lora_A", "lora_B")].double()
            path = name.removeprefix(PREFIX).replace(".lora_A", "")
            changed[path] = held[path].double() + raw["lora_alpha"] / raw["r"] * B @ A
    return changed


def assert_cast_once(actual: Tensor, exact: Tensor, name: str) -> None:
    """`actual` is `exact` after sums in fp32 and one rounding to its own dtype."""
    bound = torch.finfo(actual.dtype).eps / 2 * exact.double().abs() * (1 + 1e-3) + 2e-6
    assert ((actual.double() - exact.double()).abs() <= bound).all(), name


VARIANTS: dict[str, dict] = {
    "float32": {"family": "mistral_v1"},
    "bfloat16": {"family": "qwen2", "torch_dtype": "bfloat16", "shards": "20KB"},
    "tied": {"family": "qwen3", "torch_dtype": "bfloat16", "tie_word_embeddings": True},
}


def sharded_base(directory: Path, family: str, shards: str = "1GB", **changes) -> Path:
    base = base_model(directory, family, **SIZES, **changes)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size=shards)
    return base


def trained(directory: Path, base: Path, **overrides) -> Path:
    """The final checkpoint of a short run over `base`, with steps so large that the model changes."""
    directory.mkdir(exist_ok=True)
    settings = {"train__max_steps": 2, "train__warmup_steps": 0, "train__learning_rate": 0.05, "model__dtype": "auto"}
    c = qlora(directory, base, **{**settings, "lora__target_modules": ("q_proj", "o_proj", "down_proj"), **overrides})
    assert train.main(c) == 0
    return final(c)


def stored_by_transformers(base: Path, directory: Path, bits: int, shards: str = "1GB") -> Path:
    """The base as transformers saves it once bitsandbytes has quantised it."""
    settings = transformers.BitsAndBytesConfig(**(NF4 if bits == 4 else {"load_in_8bit": True}))
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=settings)
    model.save_pretrained(directory, max_shard_size=shards)
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, directory / name)
    return directory


def assert_loads(out: Path) -> nn.Module:
    """transformers takes the merged model for an ordinary one, complete."""
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    tensors = tensors_of(out)
    if (out / INDEX).is_file():
        index = json.loads((out / INDEX).read_text())
        held = {name: file.name for file in out.glob("*.safetensors") for name in load_file(file)}
        assert index["weight_map"] == held and len(set(held.values())) > 1
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    return model


# --- merge.py ---


@pytest.mark.parametrize("variant, settings", [
    *((variant, {"model__bits": bits}) for variant in VARIANTS for bits in (4, 8)),
    ("float32", {"model__dtype": "bfloat16"}),  # rounded before it is quantised
    ("float32", {"model__double_quant": False}),
])  # fmt: skip
def test_merging_into_either_base(tmp_path, variant, settings):
    """Row 9: the original by default, or the one that the adapter was trained over; sums in fp32, cast once."""
    base = sharded_base(tmp_path / "base", **VARIANTS[variant])
    adapter = trained(tmp_path / "run", base, **settings)
    originals = tensors_of(base)
    quantised = dequantised(base, **{"bits": 4, **{key.removeprefix("model__"): value for key, value in settings.items()}})
    for from_quantised, held in ((False, originals), (True, {**originals, **quantised})):
        out = tmp_path / f"merged {from_quantised}"
        assert merge.main(merge.Args(str(adapter), out=str(out), from_quantised=from_quantised)) == 0
        tensors, exact = tensors_of(out), with_update(held, adapter)
        assert tensors.keys() == originals.keys()
        for name, tensor in tensors.items():
            assert tensor.dtype == originals[name].dtype
            if exact[name] is originals[name]:
                assert torch.equal(tensor, originals[name]), name
            else:
                assert_cast_once(tensor, exact[name], name)
        model = assert_loads(out)
        assert (out / INDEX).is_file() == ("shards" in VARIANTS[variant])
        tied = "tie_word_embeddings" in VARIANTS[variant]
        assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) == tied
        assert ("lm_head.weight" in tensors) != tied


PRINTED = re.compile(r"merged into the (original|dequantised) base\s+(\S+)(.*)")


@pytest.mark.parametrize("variant, bits, ratio", [("float32", 4, 100), ("bfloat16", 4, 5), ("float32", 8, 0)])
@pytest.mark.parametrize("from_quantised", [False, True])
def test_verify_prints_both_gaps(tmp_path, variant, bits, ratio, from_quantised, capsys):
    base = sharded_base(tmp_path / "base", **VARIANTS[variant])
    adapter = trained(tmp_path / "run", base, model__bits=bits)
    files = contents(adapter)
    live = theirs(base, bits, adapter)
    tokens = torch.randint(live.config.vocab_size, (64,), generator=torch.Generator().manual_seed(0))
    expected = {}
    for kind in ("original", "dequantised"):
        out = tmp_path / kind
        assert merge.main(merge.Args(str(adapter), out=str(out), from_quantised=kind == "dequantised")) == 0
        expected[kind] = float((logits_of(live, tokens) - logits_of(theirs(out), tokens)).abs().max())
    capsys.readouterr()
    assert merge.main(merge.Args(str(adapter), verify=True, from_quantised=from_quantised)) == 0
    printed = {kind: (float(gap), mark) for kind, gap, mark in PRINTED.findall(capsys.readouterr().out)}
    gaps = {kind: gap for kind, (gap, _) in printed.items()}
    assert gaps == pytest.approx(expected, rel=6e-3, abs=2e-4)
    assert [kind for kind, (_, mark) in printed.items() if mark == " (this one)"] == [
        "dequantised" if from_quantised else "original"
    ]
    assert gaps["original"] > max(ratio * gaps["dequantised"], 1e-2)
    assert {p.name for p in adapter.iterdir()} == {*files, "merged"}, "nothing is left beside the result"
    assert files.items() <= contents(adapter).items()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shards", ["1GB", "20KB"])
def test_a_base_that_bitsandbytes_has_quantised(tmp_path, bits, shards, script):
    original = sharded_base(tmp_path / "original", "mistral_v1", torch_dtype="bfloat16")
    base = stored_by_transformers(original, tmp_path / "base", bits, shards)
    assert (base / INDEX).is_file() == (shards != "1GB")
    adapter = trained(tmp_path / "run", base, model__bits=bits)
    before = contents(adapter)
    code, out, err = script("merge.py", adapter)
    assert (code, out) == (2, "") and err.startswith("error: ") and len(err.splitlines()) == 1
    assert "--from-quantised" in err and "--base" in err and str(base) in err
    assert contents(adapter) == before and not (adapter / "merged").exists()

    code, printed, _ = script("merge.py", adapter, "--from-quantised", "--verify")
    assert code == 0
    gaps = {kind: gap for kind, gap, _ in PRINTED.findall(printed)}
    assert gaps.keys() == {"original", "dequantised"} and gaps["original"] == "the"  # base is only there quantised
    exact = with_update(dequantised(base, bits), adapter)
    tensors, stored = tensors_of(adapter / "merged"), tensors_of(base)
    assert tensors.keys() == tensors_of(original).keys()
    for name, tensor in tensors.items():
        if name in exact:
            assert tensor.dtype == torch.bfloat16
            assert_cast_once(tensor, exact[name], name)
        else:
            assert tensor.dtype == stored[name].dtype and torch.equal(tensor, stored[name]), name
    assert_loads(adapter / "merged")

    code, _, err = script("merge.py", adapter, "--base", original, "--out", tmp_path / "merged")
    assert code == 0, err
    exact = with_update(tensors_of(original), adapter)
    for name, tensor in tensors_of(tmp_path / "merged").items():
        assert_cast_once(tensor, exact[name], name)
    assert_loads(tmp_path / "merged")


def test_from_quantised_is_for_quantised_bases(tmp_path, base, script):
    adapter = trained(tmp_path / "run", base, model__bits=16)
    before = contents(adapter)
    code, out, err = script("merge.py", adapter, "--from-quantised")
    assert (code, out) == (2, "") and re.fullmatch(r"error: --from-quantised.*16-bit.*--bits 4.*\n", err)
    assert contents(adapter) == before


def test_a_qlora_adapter_of_another_trainer(tmp_path, base, script):
    """It does not say how its base was held: --bits does."""
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    adapter = tmp_path / "adapter"
    peft.get_peft_model(theirs(base, 4), settings, autocast_adapter_dtype=False).save_pretrained(str(adapter))
    code, out, err = script("merge.py", adapter, "--from-quantised", "--bits", 4, "--verify")
    assert code == 0, err
    exact = with_update({**tensors_of(base), **dequantised(base, 4)}, adapter)
    for name, tensor in tensors_of(adapter / "merged").items():
        assert_cast_once(tensor, exact[name], name)
    assert_loads(adapter / "merged")
    gaps = {kind: float(gap) for kind, gap, _ in PRINTED.findall(out)}
    assert gaps["original"] > 100 * gaps["dequantised"]


# --- infer.py ---

TEXT, NEW_TOKENS = "Title: old works of Korea", 16


def greedy(model: nn.Module, directory: Path) -> str:
    """transformers' greedy answer to the plain text."""
    tokenizer = Tokenizer(directory)
    ids = tokenizer.encode(TEXT).ids
    given = torch.tensor([ids])
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
    new = model.generate(input_ids=given, attention_mask=torch.ones_like(given), **options)[0, len(ids) :].tolist()
    assert len(new) == NEW_TOKENS
    return tokenizer.decode_after(ids, new)


def told(stderr: str) -> list[tuple[str, str]]:
    """(layers, bits) of what infer.py says of a quantised model."""
    return re.findall(r"(\d+) linear layers in (\d+) bits", stderr)


@pytest.mark.parametrize("bits", [4, 8])
def test_asking_a_qlora_checkpoint(tmp_path, base, bits, script):
    checkpoint = trained(tmp_path / "run", base, model__bits=bits)
    ask = ("infer.py", checkpoint, "--raw", "--prompt", TEXT, "--max_new_tokens", NEW_TOKENS)
    expected = {width: greedy(theirs(base, width, checkpoint), base) for width in (4, 8, 16)}
    assert expected[4] != expected[16], "the width shows"
    code, out, err = script(*ask)
    assert (code, out, told(err)) == (0, expected[bits] + "\n", [(str(LINEARS), str(bits))])
    for width in (4, 8, 16):  # the base is there in 16 bits: any width can be asked for
        code, out, err = script(*ask, "--bits", width)
        assert (code, out) == (0, expected[width] + "\n")
        assert told(err) == ([(str(LINEARS), str(width))] if width < 16 else [])
        model, tokenizer = minilora.load(str(checkpoint), bits=width)
        assert minilora.generate(model, tokenizer, [TEXT], max_new_tokens=NEW_TOKENS) == [expected[width]]


def test_asking_in_4_bits_gives_the_logits_of_training(tmp_path, base):
    checkpoint = trained(tmp_path / "run", base)
    tokens = torch.randint(200, (40,), generator=torch.Generator().manual_seed(1))
    expected = logits_of(theirs(base, 4, checkpoint), tokens)
    for bits in (4, None):
        model, _ = minilora.load(str(checkpoint), bits=bits)
        torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-3)
    assert (minilora.load(str(checkpoint))[0](tokens) - expected).abs().max() > 0.1  # the default is 16


def test_asking_a_plain_model_in_4_bits(base, script):
    code, out, err = script("infer.py", base, "--raw", "--prompt", TEXT, "--max_new_tokens", NEW_TOKENS, "--bits", 4)
    assert (code, out, told(err)) == (0, greedy(theirs(base, 4), base) + "\n", [(str(LINEARS), "4")])


@pytest.mark.parametrize("bits, others", [(4, (8, 16)), (8, (4, 16))])
def test_asking_a_model_that_is_stored_quantised(tmp_path, base, bits, others, script):
    stored = stored_by_transformers(base, tmp_path / "stored", bits)
    checkpoint = trained(tmp_path / "run", stored, model__bits=bits)
    for model, adapter in ((stored, None), (checkpoint, checkpoint)):
        ask = ("infer.py", model, "--raw", "--prompt", TEXT, "--max_new_tokens", NEW_TOKENS, "--dtype", "float32")
        code, out, err = script(*ask)
        assert (code, out, told(err)) == (0, greedy(theirs(stored, bits, adapter), stored) + "\n", [(str(LINEARS), str(bits))])
        for other in others:
            code, out, err = script(*ask, "--bits", other)
            assert (code, out) == (2, "") and re.fullmatch(rf"error: .*quantised to {bits} bits.*--bits {bits}\b.*\n", err)
