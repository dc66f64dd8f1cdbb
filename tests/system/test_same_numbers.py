"""A restructuring changes no number: what the scripts write is what commit f38750d wrote.

Everything goes through the command line (train.py, merge.py, infer.py, torchrun), the recipes in
configs/ and the files that come out, so that this file runs on any commit:

    python tests/system/test_same_numbers.py --repository DIR --record    # write same_numbers.json
    python tests/system/test_same_numbers.py --repository DIR             # compare DIR with it

Token ids and labels must be the same on every machine. Floating point results depend on the kernels
of a machine: on the one that same_numbers.json was recorded on every file must be the same to the
byte, elsewhere losses and sums of tensors must agree within a tolerance.
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.system

REPOSITORY = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).with_name("same_numbers.json")
MODEL = "examples/tiny-mistral"

# Relative tolerance where the machine is another one. In float32 other kernels (AVX2 or SSE in
# place of AVX-512) were seen to move losses, gradient norms and sums of tensors by 1e-5 at most.
TOLERANCE = 1e-4
TOLERANCES = {  # where activations are rounded to 8 bits, or all is computed in bfloat16
    "int8": 1e-3,
    "ddp": 2e-2,
    "qlora": 2e-2,
    "full": 2e-2,
    "merge qlora": 2e-2,
    "merge qlora from quantised": 2e-2,
    "answers of qlora": 2e-2,
}

# What a case gives, by kind:
#   everywhere  values that are equal on every machine
#   hashes      of files, equal on the same machine
#   numbers     lists by name, equal on the same machine and close elsewhere: metrics, and for each
#               tensor of a file the sum of its positive values and that of its negative ones
KINDS = ("everywhere", "hashes", "numbers")
Fingerprint = dict[str, dict]


# ---- the scripts of a checkout

# Of every run: small evaluations, few and short answers, no events for TensorBoard.
SHORT = (
    "--log.tensorboard False --data.eval_size 8 --eval.num_generate_samples 1 "
    "--eval.max_new_tokens 6"
)
STEPS = "--train.logging_steps 1 --train.learning_rate 5e-3 --train.warmup_steps 2"
FLOAT32 = "--model.dtype float32"
# A run's name -> (recipe, number of processes, what else differs from the recipe).
RUNS = {
    "tiny": ("tiny", 1, "--train.max_steps 40 --train.logging_steps 5"),
    "ddp": ("wiki", 2, f"{STEPS} --train.max_steps 4"),
    "fsdp": ("wiki", 2, f"{STEPS} {FLOAT32} --train.max_steps 4 --parallel.strategy fsdp"),
    "qlora": (
        "qlora",
        1,
        f"{STEPS} --train.max_steps 4 --train.grad_acc_steps 2 --train.optimizer adamw8bit",
    ),
    "int8": ("arxiv", 1, f"{STEPS} {FLOAT32} --train.max_steps 4 --model.bits 8"),
    "full": ("full", 1, "--train.logging_steps 1 --train.learning_rate 1e-3 --train.max_steps 4"),
    "full fsdp": ("full", 2, f"{STEPS} {FLOAT32} --train.max_steps 3"),
    "average": (
        "instruct",
        1,
        f"{STEPS} {FLOAT32} --train.max_steps 6 --train.ema_decay 0.9 --train.grad_acc_steps 2 "
        "--lora.dropout 0.1 --eval.eval_steps 3 --eval.metrics ppl",
    ),
}
# The tiny model's own chat template knows nothing of the system turns in examples/instruct.
CHAT_TEMPLATE = (
    "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
OF_TORCHRUN = re.compile("RANK$|WORLD_SIZE$|^MASTER_|^LOCAL_|^GROUP_|^ROLE_|^TORCHELASTIC_")


# Runs scripts in forked processes, which need not import what is imported here: that takes seconds.
# Each line of stdin is a command after the file for its output; the answer is its exit code.
FORK_SCRIPTS = """
import json, os, runpy, sys
import torch._dynamo
import train, merge, infer

for line in sys.stdin:
    log, *command = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
        sys.exit()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code, flush=True)
"""


class Checkout:
    """A repository, the Python that runs its scripts, and a directory for what they write."""

    def __init__(self, repository: Path, python: str, place: Path):
        self.repository, self.python, self.place = repository, python, place
        self.done: set[Path] = set()  # the output directories of finished runs
        (place / "chat.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
        self.forking: subprocess.Popen[str] | None = None

    def close(self) -> None:
        """End the process that forks."""
        if self.forking is not None:
            self.forking.communicate()

    def execute(self, *command: str) -> None:
        """Run a script in the repository, in a process of its own on one CPU thread."""
        if self.forking is None:
            self.forking = subprocess.Popen(
                [self.python, "-c", FORK_SCRIPTS],
                cwd=self.repository,
                env=self.environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self.forking.stdin is not None and self.forking.stdout is not None
        log = Path(tempfile.mkdtemp(dir=self.place)) / "log"
        print(json.dumps([str(log), *command]), file=self.forking.stdin, flush=True)
        code = self.forking.stdout.readline().strip()
        assert code == "0", f"{' '.join(command)}\n{log.read_text(encoding='utf-8')}"

    def torchrun(self, processes: int, *command: str) -> None:
        """Run a script in the repository in several processes, on one CPU thread each."""
        launcher = "-m torch.distributed.run --standalone --nproc_per_node".split()
        done = subprocess.run(
            [self.python, *launcher, str(processes), *command],
            cwd=self.repository,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"

    def environment(self) -> dict[str, str]:
        """Return the environment of the processes: one thread, nothing of the machine's own."""
        environment = {k: v for k, v in os.environ.items() if not OF_TORCHRUN.search(k)}
        environment |= {
            "PYTHONPATH": str(self.repository),
            "PYTHONDONTWRITEBYTECODE": "1",
            "XDG_CACHE_HOME": str(self.place / "cache"),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        return environment

    def recipe(self, name: str) -> list[str]:
        """Return the command that runs a recipe with the tiny model in place of its own."""
        command = ["train.py", f"configs/{name}.py", "--model.name", MODEL, "--hub.push", "False"]
        if name == "instruct":
            command += ["--data.chat_template", str(self.place / "chat.jinja")]
        if name == "tiny_base":  # its own rows are made by examples/make_tiny_mistral.py
            command += ["--data.train_file", "examples/price/train.jsonl"]
        return command

    def train(self, name: str, *more: str) -> Path:
        """Train a run of RUNS, once; return its output directory. `more` are additional flags."""
        out = self.place / " ".join(["run", name, *more])
        if out not in self.done:
            recipe, processes, flags = RUNS[name]
            command = [*self.recipe(recipe), *SHORT.split(), *flags.split(), *more]
            command += ["--output_dir", str(out)]
            if processes > 1:
                self.torchrun(processes, *command)
            else:
                self.execute(*command)
            self.done.add(out)
        return out


# ---- fingerprints


def sha256(content: bytes | str) -> str:
    """Return the hex digest of a file's content or of a text."""
    content = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(content).hexdigest()


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def fingerprint_of_weights(file: Path) -> Fingerprint:
    """Fingerprint a safetensors file: names and shapes, bytes, and two sums of each tensor."""
    tensors = sorted(load_file(file).items())
    layout = [[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors]
    parts = [(t.double().clamp(min=0).sum(), t.double().clamp(max=0).sum()) for _, t in tensors]
    sums = [[float(f"{part.item():.7g}") for part in pair] for pair in parts]
    return {
        "everywhere": {f"layout of {file.name}": sha256(json.dumps(layout))},
        "hashes": {file.name: sha256(file.read_bytes())},
        "numbers": {file.name: sums},
    }


def fingerprint_of_metrics(file: Path) -> Fingerprint:
    """Fingerprint metrics.jsonl: steps, token counts and every figure but the speed."""
    counts: dict[str, list] = {}
    figures: dict[str, list[float]] = {}
    for row in read_rows(file):
        for name, value in row.items():
            if name in ("step", "epoch", "tokens", "supervised_tokens"):
                counts.setdefault(name, []).append(value)
            elif name in ("loss", "grad_norm", "lr") or name.startswith("eval/"):
                figures.setdefault(name, []).append(value)
    return {"everywhere": {"counts": counts}, "numbers": figures}


def fingerprint_of_run(out: Path) -> Fingerprint:
    """Fingerprint a training run: its metrics, its answers and its last checkpoint."""
    final = out / "checkpoint-final"
    state = json.loads((final / "trainer_state.json").read_text(encoding="utf-8"))
    of_state = {name: state[name] for name in ("step", "tokens", "supervised_tokens", "data")}
    parts = [{"everywhere": {"trainer_state": of_state}}]
    parts.append({"hashes": {"samples.jsonl": sha256((out / "samples.jsonl").read_bytes())}})
    parts.append(fingerprint_of_metrics(out / "metrics.jsonl"))
    for file in sorted(final.glob("*.safetensors")):
        parts.append(fingerprint_of_weights(file))
        if file.name == "training_state.safetensors":  # the bytes say enough
            del parts[-1]["numbers"]
    return united(parts)


def united(parts: list[Fingerprint]) -> Fingerprint:
    """Join fingerprints that have no names in common."""
    whole: Fingerprint = {kind: {} for kind in KINDS}
    for part in parts:
        for kind, values in part.items():
            whole[kind] |= values
    return whole


# ---- the cases


def preview(checkout: Checkout, recipe: str) -> Fingerprint:
    """Fingerprint the ids and labels of a recipe's first 50 rows."""
    out = checkout.place / f"preview {recipe}"
    checkout.execute(*checkout.recipe(recipe), "--preview", "50", "--output_dir", str(out))
    rows = read_rows(out / "preview.jsonl")
    found: dict[str, int | str] = {"rows": len(rows), "tokens": sum(len(r["labels"]) for r in rows)}
    for column in ("index", "input_ids", "labels", "train_labels"):
        found[column] = sha256(json.dumps([row[column] for row in rows]))
    return united([{"everywhere": found}])


def run(checkout: Checkout, name: str) -> Fingerprint:
    """Fingerprint a run of RUNS."""
    return fingerprint_of_run(checkout.train(name))


def merge(checkout: Checkout, name: str, *flags: str) -> Fingerprint:
    """Merge a run's adapter and fingerprint the model."""
    out = checkout.place / " ".join(["merged", name, *flags])
    checkpoint = checkout.train(name) / "checkpoint-final"
    checkout.execute("merge.py", str(checkpoint), "--out", str(out), *flags)
    config = {"everywhere": {"config.json": sha256((out / "config.json").read_bytes())}}
    return united([config, fingerprint_of_weights(out / "model.safetensors")])


def answers(checkout: Checkout, name: str, *flags: str) -> Fingerprint:
    """Fingerprint a run's answers to three rows of the test file, and its loss on these."""
    out = Path(tempfile.mkdtemp(dir=checkout.place)) / "answers.jsonl"
    rows = (checkout.repository / "examples/wiki/test.jsonl").read_text(encoding="utf-8")
    source = checkout.place / "questions.jsonl"
    source.write_text("\n".join(rows.splitlines()[:3]), encoding="utf-8")
    command = ["infer.py", str(checkout.train(name) / "checkpoint-final"), "--input", str(source)]
    checkout.execute(*command, "--output", str(out), "--max_new_tokens", "16", *flags)
    figures = out.with_name(out.stem + ".metrics.json")
    losses = json.loads(figures.read_text(encoding="utf-8")) if figures.exists() else {}
    return united([
        {"everywhere": {"ids": [row["id"] for row in read_rows(out)]}},
        {"hashes": {"answers": sha256(out.read_bytes())}},
        {"numbers": {name: [value] for name, value in losses.items()}},
    ])  # fmt: skip


RECIPES = "wiki arxiv price kanana instruct full qlora tiny tiny_base".split()
GREEDY = "--temperature 0 --metrics loss".split()
SAMPLED = "--temperature 0.9 --top_p 0.95 --top_k 40 --num_samples 2 --seed 7".split()
CASES: dict[str, Callable[[Checkout], Fingerprint]] = {
    **{f"preview {recipe}": functools.partial(preview, recipe=recipe) for recipe in RECIPES},
    **{name: functools.partial(run, name=name) for name in RUNS},
    "merge tiny": lambda checkout: merge(checkout, "tiny"),
    "merge qlora": lambda checkout: merge(checkout, "qlora"),
    "merge qlora from quantised": lambda checkout: merge(checkout, "qlora", "--from_quantised"),
    "answers of tiny": lambda checkout: answers(checkout, "tiny", *GREEDY),
    "answers of tiny, sampled": lambda checkout: answers(checkout, "tiny", *SAMPLED),
    "answers of qlora": lambda checkout: answers(checkout, "qlora", *GREEDY),
}


# ---- comparing

LIBRARIES = ("torch", "numpy", "bitsandbytes", "safetensors", "tokenizers")
Leaf = tuple[str | int, ...]  # the keys that lead to a plain value


def machine_of(python: str) -> dict[str, str]:
    """Describe what results depend on beside the code: the processor and the libraries."""
    file = Path("/proc/cpuinfo")
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*: (.*)$", text, re.MULTILINE)
    vector = [f for f in (flags[1].split() if flags else []) if re.match("avx|amx|fma|f16c", f)]
    code = "import importlib.metadata as m, sys; print(*map(m.version, sys.argv[1:]))"
    versions = subprocess.check_output([python, "-c", code, *LIBRARIES], text=True).split()
    return {
        "cpu": model[1] if model else platform.processor(),
        "flags": " ".join(sorted(vector)),  # virtual machines give different CPUs one name
        "capability": torch.backends.cpu.get_cpu_capability(),
        **dict(zip(LIBRARIES, versions, strict=True)),
    }


def leaves(value: object, path: Leaf = ()) -> dict[Leaf, Any]:
    """Flatten nested dicts and lists to their plain values."""
    if not isinstance(value, dict | list):
        return {path: value}
    found: dict[Leaf, Any] = {}
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        found |= leaves(inner, (*path, key))
    return found


def differences(recorded: Fingerprint, found: Fingerprint, tolerance: float) -> list[str]:
    """List what differs. A tolerance of 0 stands for the machine of the record."""
    wrong = []
    for kind in KINDS if tolerance == 0 else ("everywhere", "numbers"):
        then, now = leaves(recorded[kind]), leaves(found[kind])
        for leaf in sorted(then.keys() | now.keys(), key=str):
            one, other = then.get(leaf, "nothing"), now.get(leaf, "nothing")
            both_numbers = isinstance(one, float | int) and isinstance(other, float | int)
            if kind == "numbers" and both_numbers:
                same = abs(one - other) <= tolerance * abs(one)
            else:
                same = one == other
            if not same:
                wrong.append(f"{kind} {leaf}: {one!r} was recorded, {other!r} found")
    return wrong


def tolerance_of(case: str, same_machine: bool) -> float:
    """Return the relative tolerance of a case's numbers."""
    return 0 if same_machine else TOLERANCES.get(case, TOLERANCE)


def read_record() -> dict:
    return json.loads(RECORD.read_text(encoding="utf-8"))


def as_text(value: object, depth: int = 0) -> str:
    """Format as JSON, with a line for each value that is not an object."""
    if not value or not isinstance(value, dict):
        return json.dumps(value)
    inner = " " * (depth + 1)
    lines = [f"{inner}{json.dumps(key)}: {as_text(v, depth + 1)}" for key, v in value.items()]
    return "{\n" + ",\n".join(lines) + "\n" + " " * depth + "}"


# ---- the tests


@pytest.fixture(scope="module")
def recorded() -> dict:
    return read_record()


@pytest.fixture(scope="module")
def same_machine(recorded: dict) -> bool:
    return recorded["machine"] == machine_of(sys.executable)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    place = tmp_path_factory.mktemp("numbers")
    with contextlib.closing(Checkout(REPOSITORY, sys.executable, place)) as checkout:
        yield checkout


def test_every_case_is_recorded(recorded: dict):
    assert list(recorded["cases"]) == list(CASES)


@pytest.mark.parametrize("case", CASES)
def test_same_numbers(case: str, checkout: Checkout, recorded: dict, same_machine: bool):
    found = CASES[case](checkout)
    wrong = differences(recorded["cases"][case], found, tolerance_of(case, same_machine))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("same_machine", [True, False], ids=["here", "elsewhere"])
@pytest.mark.parametrize("case", CASES)
def test_every_recorded_value_matters(case: str, same_machine: bool, recorded: dict):
    """Change each value a little more than allowed: the comparison names it alone."""
    then, tolerance = recorded["cases"][case], tolerance_of(case, same_machine)
    assert not differences(then, then, tolerance)
    for kind in KINDS:
        for leaf, value in leaves(then[kind]).items():
            now = copy.deepcopy(then)
            holder = functools.reduce(lambda inner, key: inner[key], leaf[:-1], now[kind])
            holder[leaf[-1]] = changed(value, 1.1 * tolerance)
            noticed = [] if kind == "hashes" and not same_machine else [f"{kind} {leaf}"]
            assert [line.split(": ")[0] for line in differences(then, now, tolerance)] == noticed


def changed(value: str | float, share: float) -> str | float:
    """Change a text, or a number by a share of itself."""
    return value + "!" if isinstance(value, str) else value + (share * value or 1e-9)


def test_a_change_in_the_training_is_noticed_on_any_machine(checkout: Checkout, recorded: dict):
    """Scale the adapter by one percent more: losses and weights leave the tolerance."""
    found = fingerprint_of_run(checkout.train("average", "--lora.alpha", "64.64"))
    wrong = differences(recorded["cases"]["average"], found, TOLERANCE)
    assert any(line.startswith("numbers ('loss', ") for line in wrong)
    assert any(line.startswith("numbers ('adapter_model.safetensors', ") for line in wrong)
    assert not any(line.startswith("everywhere") for line in wrong)


# ---- the command


def main() -> int:
    parser = argparse.ArgumentParser(description="Record a checkout's numbers, or compare them.")
    parser.add_argument("--repository", type=Path, default=REPOSITORY, help="the checkout")
    parser.add_argument("--python", default=sys.executable, help="what runs its scripts")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD}")
    parser.add_argument("--elsewhere", action="store_true", help="compare as on another machine")
    parser.add_argument("--case", action="append", choices=CASES, help="compare only this one")
    args = parser.parse_args()
    machine = machine_of(args.python)
    recorded = {} if args.record else read_record()
    same_machine = not args.record and recorded["machine"] == machine and not args.elsewhere
    found, failed = {}, False
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="same-numbers-"))
        checkout = Checkout(args.repository.resolve(), args.python, Path(place))
        stack.callback(checkout.close)
        for case in CASES if args.record else args.case or CASES:
            found[case] = CASES[case](checkout)
            if args.record:
                print(f"{case}: recorded", flush=True)
                continue
            tolerance = tolerance_of(case, same_machine)
            wrong = differences(recorded["cases"][case], found[case], tolerance)
            failed |= bool(wrong)
            print(
                f"{case}: " + ("\n  ".join(["different", *wrong]) if wrong else "same"), flush=True
            )
    if args.record:
        whole = {"commit": commit_of(args.repository), "machine": machine, "cases": found}
        RECORD.write_text(as_text(whole) + "\n", encoding="utf-8")
    return int(failed)


def commit_of(repository: Path) -> str:
    command = ["git", "-C", str(repository), "rev-parse", "HEAD"]
    return subprocess.check_output(command, text=True).strip()


if __name__ == "__main__":
    sys.exit(main())
