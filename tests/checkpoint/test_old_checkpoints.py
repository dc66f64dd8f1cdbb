"""Checkpoints, a merged model and a half-done job that commit f38750d wrote keep loading.

old_checkpoint/ holds them, with the tiny base and the rows that they were made from, and in
results.json what f38750d itself made of them. With a checkout of that commit in DIR,

    python tests/checkpoint/test_old_checkpoints.py --repository DIR --python PYTHON --make

writes all of it again, except for the two config files; without --make DIR is compared.

Each test copies the fixture to a temporary directory and runs the scripts there, on relative paths.
On the machine of results.json what comes out must be the same to the byte, on another one the
numbers must agree within a tolerance.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.system

REPOSITORY = Path(__file__).resolve().parents[2]
FIXTURE = Path(__file__).with_name("old_checkpoint")
CONFIGS = ("lora_config.py", "full_config.py")  # written by hand
ADAPTER, MODEL = "lora/checkpoint-4", "full/checkpoint-2"
STATE = "training_state.safetensors"

# Relative tolerance on another machine. Other kernels (AVX2 or SSE in place of AVX-512) were seen
# to move the numbers by 3e-6 at most in float32 and by 5e-3 in bfloat16.
TOLERANCE = 1e-4
IN_BFLOAT16 = ("full resumed", "lora merged", "merged asked", "full loaded", "merged loaded")
TOLERANCE_IN_BFLOAT16 = 8e-3

# What a case gives. everywhere: equal on every machine; hashes: equal on the machine of
# results.json; numbers: equal there, and within the tolerance elsewhere.
Result = dict[str, dict[str, Any]]


# ---- a copy of the fixture, and scripts that run in it


class Workspace:
    """A directory like the fixture, in which a checkout's scripts are run."""

    def __init__(self, place: Path, repository: Path, python: str):
        self.place, self.repository, self.python = place, repository, python

    def unpack(self) -> None:
        """Copy the fixture, and put in what git cannot keep: this place's path, files' times."""
        shutil.copytree(FIXTURE, self.place, dirs_exist_ok=True)
        name_base(self.place / ADAPTER, str(self.place / "base"))
        settings = read_json(self.place / "answers.jsonl.settings.json")
        weights = (f"{ADAPTER}/adapter_model.safetensors", "base/model.safetensors")
        for name, written in zip(weights, settings["written"], strict=True):
            os.utime(self.place / name, ns=(written, written))

    def script(self, name: str, *arguments: str) -> str:
        """Run a script of the repository; returns its standard output."""
        return self.execute(str(self.repository / name), *arguments)

    def execute(self, *arguments: str) -> str:
        """Run Python in the workspace, on one CPU thread; returns its standard output."""
        environment = os.environ | {
            "PYTHONPATH": str(self.repository),
            "PYTHONDONTWRITEBYTECODE": "1",
            "XDG_CACHE_HOME": str(self.place / "cache"),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [self.python, *arguments],
            cwd=self.place,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
        return done.stdout


def name_base(checkpoint: Path, base: str) -> None:
    """Let an adapter name its base by another path; the manifest lists the file's size."""
    config, manifest = checkpoint / "adapter_config.json", checkpoint / "manifest.json"
    write_json(config, read_json(config) | {"base_model_name_or_path": base})
    write_json(manifest, read_json(manifest) | {config.name: config.stat().st_size})


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write_rows(file: Path, rows: list[dict]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    file.write_text("".join(lines), encoding="utf-8")


def sha256(content: bytes | str) -> str:
    content = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(content).hexdigest()


# ---- the cases: what is done with the old files


def resumed(workspace: Workspace, method: str, weights: str) -> Result:
    """Continue a run to its end; return its metrics and its last checkpoint's weights."""
    out = workspace.place / method
    (checkpoint,) = out.glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    before = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [line for line in before if json.loads(line)["step"] <= step]
    workspace.script("train.py", f"{method}_config.py")
    after = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    # the old lines have the old speed in them: a run that began anew would have written others
    assert len(kept) < len(before) and after[: len(kept)] == kept
    final = out / "checkpoint-final"
    counts: dict[str, list] = {}
    numbers: dict[str, list] = {}
    for name, value in ((name, row[name]) for row in map(json.loads, after) for name in row):
        if name in ("loss", "grad_norm", "lr") or name.startswith("eval/"):
            numbers.setdefault(name, []).append(value)
        elif name in ("step", "tokens", "supervised_tokens"):
            counts.setdefault(name, []).append(value)
    state = read_json(final / "trainer_state.json")
    counts["state"] = [state[name] for name in ("step", "tokens", "supervised_tokens", "data")]
    hashes = {name: sha256((final / name).read_bytes()) for name in (weights, STATE)}
    numbers[weights] = sums_of(final / weights)
    return {"everywhere": counts, "hashes": hashes, "numbers": numbers}


def sums_of(weights: Path) -> list[list[float]]:
    """Sum the positive and the negative values of each tensor, in the order of their names."""
    tensors = [tensor.double() for _, tensor in sorted(load_file(weights).items())]
    pairs = [(t.clamp(min=0).sum().item(), t.clamp(max=0).sum().item()) for t in tensors]
    return [[float(f"{part:.7g}") for part in pair] for pair in pairs]


def merged(workspace: Workspace) -> Result:
    """Merge the adapter and ask the model; return its weights and its answers."""
    workspace.script("merge.py", ADAPTER, "--out", "merged again")
    # the new model records that its training computed in float32; f38750d asked in its files' dtype
    in_files_dtype = ("--dtype", "bfloat16")
    out, found = workspace.place / "merged again", asked(workspace, "merged again", *in_files_dtype)
    found["everywhere"]["config.json"] = read_json(out / "config.json")
    found["hashes"]["model.safetensors"] = sha256((out / "model.safetensors").read_bytes())
    found["numbers"]["model.safetensors"] = sums_of(out / "model.safetensors")
    return found


JOB = (
    f"{ADAPTER} --input questions.jsonl --output answers.jsonl --temperature 0.8 --top_p 0.95 "
    "--num_samples 2 --max_new_tokens 24 --seed 3 --batch_size 1"
).split()


def completed(workspace: Workspace) -> Result:
    """Finish the job: the rows that it has stay as they are, and the torn one is done again."""
    output = workspace.place / "answers.jsonl"
    *kept, torn = output.read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in kept]
    assert rows and torn
    text = "\n".join([json.dumps(row | {"generated": "an old answer"}) for row in rows] + [torn])
    output.write_text(text, encoding="utf-8")
    workspace.script("infer.py", *JOB, "--metrics", "loss")
    answers = read_rows(output)
    assert [row for row in answers if row["generated"] == "an old answer"] == [
        row | {"generated": "an old answer"} for row in rows
    ]
    return {
        "everywhere": {"rows": [[row["id"], row["sample"]] for row in answers]},
        "hashes": {"answers": sha256(output.read_bytes())},
        "numbers": {"loss": [read_json(workspace.place / "answers.metrics.json")["loss"]]},
    }


def asked(workspace: Workspace, model: str, *flags: str) -> Result:
    """Ask a merged model, in the form that its minilora.json gives."""
    command = "--input questions.jsonl --output others.jsonl --temperature 0".split()
    command += ["--max_new_tokens", "24", "--metrics", "loss", *flags]
    workspace.script("infer.py", model, *command)
    return {
        "everywhere": {"rows": [row["id"] for row in read_rows(workspace.place / "others.jsonl")]},
        "hashes": {"answers": sha256((workspace.place / "others.jsonl").read_bytes())},
        "numbers": {"loss": [read_json(workspace.place / "others.metrics.json")["loss"]]},
    }


# f38750d kept adapters beside the weights, and had no argument to say so
LOAD = """
import inspect, json, sys
import minilora, torch
has_fold = "fold" in inspect.signature(minilora.load).parameters
model, tokenizer = minilora.load(sys.argv[1], **({"fold": False} if has_fold else {}))
ids = tokenizer.encode("Title: Lute\\nA string instrument.").ids
with torch.no_grad():
    logits = model(torch.tensor(ids), lengths=[len(ids)])
print(json.dumps([ids, logits[-1].double().tolist()]))
"""


def loaded(workspace: Workspace, model: str) -> Result:
    """Load a model with minilora.load; return the ids of a text and the logits after it."""
    ids, logits = json.loads(workspace.execute("-c", LOAD, model).splitlines()[-1])
    parts = [math.fsum(x for x in logits if sign * x > 0) for sign in (1, -1)]
    hashes = {"logits": sha256(json.dumps(logits))}
    return {"everywhere": {"ids": ids}, "hashes": hashes, "numbers": {"logits": parts}}


CASES: dict[str, Callable[[Workspace], Result]] = {
    "lora resumed": lambda workspace: resumed(workspace, "lora", "adapter_model.safetensors"),
    "full resumed": lambda workspace: resumed(workspace, "full", "model.safetensors"),
    "lora merged": merged,
    "job completed": completed,
    "merged asked": lambda workspace: asked(workspace, "merged"),
    "lora loaded": lambda workspace: loaded(workspace, ADAPTER),
    "full loaded": lambda workspace: loaded(workspace, MODEL),
    "merged loaded": lambda workspace: loaded(workspace, "merged"),
}


# ---- comparing


def machine_of(python: str) -> dict[str, str]:
    """Describe what results depend on beside the code: the processor and the libraries."""
    file = Path("/proc/cpuinfo")
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*: (.*)$", text, re.MULTILINE)
    vector = [f for f in (flags[1].split() if flags else []) if re.match("avx|amx|fma|f16c", f)]
    libraries = ("torch", "numpy", "safetensors", "tokenizers")
    code = "import importlib.metadata as m, sys; print(*map(m.version, sys.argv[1:]))"
    versions = subprocess.check_output([python, "-c", code, *libraries], text=True).split()
    return {
        "cpu": model[1] if model else platform.processor(),
        "flags": " ".join(sorted(vector)),  # virtual machines give different CPUs one name
        "capability": torch.backends.cpu.get_cpu_capability(),
        **dict(zip(libraries, versions, strict=True)),
    }


def differences(recorded: Result, found: Result, tolerance: float) -> list[str]:
    """List what differs. A tolerance of 0 stands for the machine of results.json."""
    wrong = []
    for kind in recorded if tolerance == 0 else ("everywhere", "numbers"):
        for name in recorded[kind].keys() | found[kind].keys():
            one, other = recorded[kind].get(name), found[kind].get(name)
            close = kind == "numbers" and are_close(one, other, tolerance)
            if not (close or one == other):
                wrong.append(f"{kind} {name}: {one!r} was recorded, {other!r} found")
    return wrong


def are_close(one: object, other: object, tolerance: float) -> bool:
    """Tell whether two numbers, or two lists of them, agree within a relative tolerance."""
    if isinstance(one, list) and isinstance(other, list):
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(are_close(a, b, tolerance) for a, b in pairs)
    numbers = isinstance(one, float | int) and isinstance(other, float | int)
    return numbers and abs(one - other) <= tolerance * abs(one)


def tolerance_of(case: str, same_machine: bool) -> float:
    """Return the relative tolerance of a case's numbers."""
    if same_machine:
        return 0
    return TOLERANCE_IN_BFLOAT16 if case in IN_BFLOAT16 else TOLERANCE


# ---- the tests


@pytest.fixture(scope="module", autouse=True)
def unchanged() -> Iterator[None]:
    """Check that the tests leave the fixture as it is."""
    before = contents()
    yield
    assert contents() == before


def contents() -> dict[str, str]:
    files = sorted(file for file in FIXTURE.rglob("*") if file.is_file())
    return {str(file.relative_to(FIXTURE)): sha256(file.read_bytes()) for file in files}


@pytest.fixture(scope="module")
def recorded() -> dict:
    return read_json(FIXTURE / "results.json")


@pytest.fixture(scope="module")
def same_machine(recorded: dict) -> bool:
    return recorded["machine"] == machine_of(sys.executable)


@pytest.mark.parametrize("case", CASES)
def test_old_files_give_what_they_gave(
    case: str, tmp_path: Path, recorded: dict, same_machine: bool
):
    workspace = Workspace(tmp_path / "copy", REPOSITORY, sys.executable)
    workspace.unpack()
    found = CASES[case](workspace)
    wrong = differences(recorded["cases"][case], found, tolerance_of(case, same_machine))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "training_state.safetensors"])
def test_another_checkpoint_gives_another_end(name: str, tmp_path: Path, recorded: dict):
    """Resume from changed tensors: the end differs by more than other machines may."""
    workspace = Workspace(tmp_path / "copy", REPOSITORY, sys.executable)
    workspace.unpack()
    file = workspace.place / ADAPTER / name
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}
    save_file(
        {k: t if k.endswith(".step") else 1.02 * t for k, t in tensors.items()}, file, metadata
    )
    found = CASES["lora resumed"](workspace)
    wrong = differences(recorded["cases"]["lora resumed"], found, TOLERANCE)
    assert any(line.startswith("numbers loss: ") for line in wrong)
    assert any(line.startswith("numbers adapter_model.safetensors: ") for line in wrong)
    assert not any(line.startswith("everywhere") for line in wrong)


def test_the_fixture_is_small():
    assert sum(file.stat().st_size for file in FIXTURE.rglob("*") if file.is_file()) <= 300_000


# ---- the command


def make(repository: Path, python: str) -> None:
    """Write the fixture with a checkout's scripts, and record what they make of it."""
    with tempfile.TemporaryDirectory() as place:
        workspace = Workspace(Path(place).resolve() / "old_checkpoint", repository, python)
        workspace.place.mkdir()
        for name in CONFIGS:
            shutil.copyfile(FIXTURE / name, workspace.place / name)
        write_data(repository, workspace.place)
        text = (workspace.place / "train.jsonl").read_text(encoding="utf-8")
        write_base(workspace.place / "base", text)
        ends = {}  # the weights of the runs that are not interrupted
        for config, checkpoint in zip(CONFIGS, (ADAPTER, MODEL), strict=True):
            workspace.script("train.py", config)
            out = (workspace.place / checkpoint).parent
            (weights,) = (out / "checkpoint-final").glob("*model.safetensors")
            ends[out.name] = sha256(weights.read_bytes())
            interrupt(workspace.place / checkpoint)
        workspace.script("merge.py", ADAPTER, "--out", "merged")
        answer_some(workspace)
        name_base(workspace.place / ADAPTER, "base")
        shutil.rmtree(workspace.place / "cache")
        shutil.rmtree(FIXTURE)
        shutil.copytree(workspace.place, FIXTURE)
    cases = try_all(repository, python)
    for method, digest in ends.items():
        assert digest in cases[f"{method} resumed"]["hashes"].values(), "resuming changes the end"
    commit = ["git", "-C", str(repository), "rev-parse", "HEAD"]
    record = {"commit": subprocess.check_output(commit, text=True).strip()}
    record |= {"machine": machine_of(python), "cases": cases}
    (FIXTURE / "results.json").write_text(as_text(record) + "\n", encoding="utf-8")


def as_text(value: object, depth: int = 0) -> str:
    """Format as JSON, with a line for each value that is not an object."""
    if not isinstance(value, dict):
        return json.dumps(value)
    inner = " " * (depth + 1)
    lines = [f"{inner}{json.dumps(key)}: {as_text(v, depth + 1)}" for key, v in value.items()]
    return "{\n" + ",\n".join(lines) + "\n" + " " * depth + "}"


def write_data(repository: Path, place: Path) -> None:
    """Write some of the rows in examples/wiki, with the first sentence of each abstract."""
    for source, target, count in (
        ("train", "train", 12),
        ("eval", "eval", 3),
        ("test", "questions", 5),
    ):
        rows = read_rows(repository / f"examples/wiki/{source}.jsonl")[:count]
        short = [row | {"abstract": row["abstract"].split(". ")[0] + "."} for row in rows]
        write_rows(place / f"{target}.jsonl", short)


def write_base(directory: Path, text: str) -> None:
    """Write a random model of Mistral's form, and a byte-level BPE tokenizer made from a text."""
    directory.mkdir()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    (directory / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    names = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    write_json(
        directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | names
    )
    size, inner, head, layers, vocabulary = 16, 16, 8, 2, tokenizer.get_vocab_size()
    config = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": vocabulary,
        "hidden_size": size,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": head,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    }
    write_json(directory / "config.json", config)
    shapes = {"model.embed_tokens.weight": (vocabulary, size), "model.norm.weight": (size,)}
    for layer in range(layers):
        for name, shape in {
            "input_layernorm": (size,),
            "post_attention_layernorm": (size,),
            "self_attn.q_proj": (2 * head, size),
            "self_attn.k_proj": (head, size),
            "self_attn.v_proj": (head, size),
            "self_attn.o_proj": (size, 2 * head),
            "mlp.gate_proj": (inner, size),
            "mlp.up_proj": (inner, size),
            "mlp.down_proj": (size, inner),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    random = torch.Generator().manual_seed(0)
    weights = {
        name: (0.3 * torch.randn(shape, generator=random) + (len(shape) == 1)).to(torch.bfloat16)
        for name, shape in shapes.items()
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def interrupt(checkpoint: Path) -> None:
    """Leave of a finished run what a kill would, one step after the checkpoint."""
    out = checkpoint.parent
    last = int(checkpoint.name.removeprefix("checkpoint-")) + 1
    for path in out.iterdir():
        if path.is_dir() and path != checkpoint:
            shutil.rmtree(path)
        elif path.suffix == ".jsonl":
            write_rows(path, [row for row in read_rows(path) if row["step"] <= last])
        elif path.name == "report.html":
            path.unlink()


def answer_some(workspace: Workspace) -> None:
    """Begin the job; leave some of the answers and a line that a kill has torn."""
    output, patience = workspace.place / "answers.jsonl", 0.02
    while not output.exists() or len(read_rows(output)) < 3:
        workspace.script("infer.py", *JOB, "--max_time", str(patience))
        patience *= 1.5
    assert len(read_rows(output)) < 10, "nothing is left to be answered: make it again"
    with output.open("a", encoding="utf-8") as file:
        file.write('{"id": "')


def try_all(repository: Path, python: str) -> dict[str, Result]:
    """Run every case with a checkout's scripts, each in a copy of its own."""
    found = {}
    for case, run in CASES.items():
        with tempfile.TemporaryDirectory() as place:
            workspace = Workspace(Path(place).resolve(), repository, python)
            workspace.unpack()
            found[case] = run(workspace)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the fixture, or compare a checkout with it.")
    parser.add_argument("--repository", type=Path, default=REPOSITORY, help="the checkout")
    parser.add_argument("--python", default=sys.executable, help="what runs its scripts")
    parser.add_argument("--make", action="store_true", help=f"write {FIXTURE}")
    parser.add_argument("--elsewhere", action="store_true", help="compare as on another machine")
    args = parser.parse_args()
    if args.make:
        make(args.repository.resolve(), args.python)
        return 0
    recorded, failed = read_json(FIXTURE / "results.json"), False
    same_machine = recorded["machine"] == machine_of(args.python) and not args.elsewhere
    for case, found in try_all(args.repository.resolve(), args.python).items():
        wrong = differences(recorded["cases"][case], found, tolerance_of(case, same_machine))
        failed |= bool(wrong)
        print("\n  ".join([f"{case}: {'different' if wrong else 'same'}", *wrong]))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
