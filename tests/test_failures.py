"""What a run survives: real processes that are killed, hang, fail or run out of disk, and runs over several machines.

Every run here is started as a user starts it, through torchrun. A worker script puts one fault into train.py (environment
variable FAULT), always at a definite call, so that nothing depends on the speed of the machine.
"""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import yaml
from torch.distributed.run import get_args_parser

import train
from minilora.config import Config
from minilora.running.directory import is_complete, newest
from minilora.running.settings import leaves, load_config
from tiny_runs import base_model, config, metrics

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
LIMIT = 60  # seconds after which nothing of a run that failed may be left
STEPS = 21

# train.py with a fault: at(rank, owner, name, n, act) calls act just before the n-th call of owner.name on that rank
WORKER = """
import datetime, itertools, os, signal, sys, time
from pathlib import Path

sys.path.insert(0, ROOT)
import train
from minilora import dist
from minilora.running import directory
from minilora.running.settings import load_config, run_main

def at(rank, owner, name, n, act):
    real, calls = getattr(owner, name), itertools.count(1)
    def wrapped(*args, **kwargs):
        if next(calls) == n:
            act(*args, **kwargs)
        return real(*args, **kwargs)
    if rank == dist.rank():
        setattr(owner, name, wrapped)

def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

def term(*pids):
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    time.sleep(1)  # until the launcher, too, has done what it does about it

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def fail(*_, **__):
    raise RuntimeError("no good reason")

def fill_disk(*_, **__):
    with open(Path(sys.argv[1]).parent / "out" / "filler", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass

if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
    exec(os.environ.get("FAULT", ""))
run_main(lambda: train.main(load_config(sys.argv[1:])))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def make(base: Path) -> Callable[..., Config]:
    """A run of 21 steps on two processes, half a step's documents each."""

    def make(directory: Path, **overrides) -> Config:
        directory.mkdir(parents=True, exist_ok=True)
        settings = {"train__batch_size": 2, "train__save_steps": 4, "eval__eval_steps": 6, "lora__dropout": 0.1} | overrides
        return config(directory, base, **settings)

    return make


@pytest.fixture(scope="module")
def uninterrupted(make: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    """The final adapter of a run left alone, by strategy."""
    known: dict[str, bytes] = {}

    def adapter_of(strategy: str) -> bytes:
        if strategy not in known:
            c = make(tmp_path_factory.mktemp(strategy), parallel__strategy=strategy)
            code, output = run(c)
            assert code == 0, output
            known[strategy] = adapter(c)
        return known[strategy]

    return adapter_of


@pytest.fixture(autouse=True)
def nothing_left_running(tmp_path: Path) -> Iterator[None]:
    yield
    for pid in processes(tmp_path):
        os.kill(pid, signal.SIGKILL)


def write(c: Config) -> Path:
    """The configuration as a file for train.py, the worker script beside it. Returns the former."""
    file = Path(c.output_dir).parent / "config.py"
    values = "".join(f"config.{name} = {value!r}\n" for name, value in leaves(c).items())
    file.write_text(f"from minilora.config import Config\n\nconfig = Config()\n{values}", encoding="utf-8")
    file.with_name("worker.py").write_text(f"ROOT = {str(ROOT)!r}\n{WORKER}", encoding="utf-8")
    return file


def start(c: Config, fault: str = "", command: list[str] = TORCHRUN, **environment: str) -> tuple[subprocess.Popen, Path]:
    """Start `command worker.py config.py`; returns it, and the file that gets all output."""
    file = write(c)
    log = file.with_name("log")
    variables = os.environ | {"OMP_NUM_THREADS": "1", "FAULT": fault} | environment
    with log.open("wb") as out:
        words = [*command, str(file.with_name("worker.py")), str(file)]
        return subprocess.Popen(words, stdout=out, stderr=out, env=variables, cwd=ROOT), log


def run(c: Config, fault: str = "", command: list[str] = TORCHRUN, **environment: str) -> tuple[int, str]:
    """Exit code and output of a run, which must end in time and leave no process behind."""
    process, log = start(c, fault, command, **environment)
    try:
        code = process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"not over after {LIMIT} s:\n{log.read_text()}") from None
    assert not processes(log.parent), "a process is left behind"
    return code, log.read_text(encoding="utf-8")


def processes(directory: Path) -> dict[int, str]:
    """{pid: its RANK, or ""} of the processes with a file of `directory` on their command line."""
    found = {}
    for pid in (int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and int(p.name) != os.getpid()):
        try:
            if f"{directory}/".encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                rank = re.search(rb"(?:^|\0)RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes())
                found[pid] = rank[1].decode() if rank else ""
        except OSError:
            continue
    return found


def adapter(c: Config) -> bytes:
    return (Path(c.output_dir) / "checkpoint-final" / "adapter_model.safetensors").read_bytes()


def assert_whole(c: Config) -> list[str]:
    """All checkpoints are complete and readable, and finite. Returns their names."""
    found = sorted(Path(c.output_dir).glob("checkpoint-*"))
    for checkpoint in found:
        assert is_complete(checkpoint), checkpoint
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        tensors = safetensors.torch.load_file(checkpoint / "adapter_model.safetensors")
        assert tensors and all(t.isfinite().all() for t in tensors.values()), checkpoint
    return [checkpoint.name for checkpoint in found]


# --- the files of launch/ ---


def tool(directory: Path, name: str, body: str) -> None:
    """A program `name` for a PATH that begins with `directory`."""
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
    (directory / name).chmod(0o755)


def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch job on one node, with programs that do what Slurm's do there."""
    tools = tmp_path / "tools"
    tool(tools, "srun", 'while [[ $1 == --* ]]; do shift; done\nexec "$@"')
    tool(tools, "scontrol", f'[ "$1 $2" = "show hostnames" ] && echo localhost || echo "$@" >> {tmp_path}/scontrol.log')
    job = {"SLURM_JOB_NODELIST": "node", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_ID": str(free_port() - 20000)}
    return job | {"PATH": f"{tools}:{os.environ['PATH']}"}


def free_port() -> int:
    """A free port in the range that launch/slurm.sbatch uses, 20000 to 29999."""
    for port in range(20000 + os.getpid() % 9000, 30000):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise AssertionError("no free port")


def launch(name: str, c: Config, tmp_path: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Run a script of launch/ with the worker in place of train.py; returns exit code and output."""
    file = write(c)
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | slurm(tmp_path) | environment
    worker = f'a=("$@"); for i in "${{!a[@]}}"; do [[ ${{a[i]}} == *train.py ]] && a[i]={file.with_name("worker.py")}; done'
    tool(tmp_path / "tools", "torchrun", f'{worker}\nexec "{sys.executable}" -m torch.distributed.run "${{a[@]}}"')
    command = ["bash", str(ROOT / "launch" / name), str(file)]
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    return done.returncode, done.stdout + done.stderr


# --- processes that are killed ---

KILLS = {
    "ddp": {
        "start-up": "at(1, dist, 'init', 1, kill)",
        "a step": "at(1, train, 'finish_gradients', 7, kill)",
        "a save, by the process that writes": "at(0, directory, 'save_tokenizer', 1, kill)",
    },
    "fsdp": {
        "evaluation": "at(1, train, 'evaluate', 1, kill)",
        "a save, by another": "at(1, directory, 'save_spread', 1, kill)",
        "generation": "at(0, train, 'generate_ids', 1, kill)",
    },
}


@pytest.mark.parametrize("strategy", KILLS)
def test_a_killed_process_ends_the_run_and_the_same_command_continues(
    strategy: str, tmp_path: Path, make: Callable[..., Config], uninterrupted: Callable[[str], bytes]
):
    """Rows 11 and 16. The kills follow each other in one run, each in the continuation of the last."""
    c = make(tmp_path / "run", parallel__strategy=strategy)
    for moment, fault in KILLS[strategy].items():
        code, output = run(c, fault)
        assert code != 0, f"killed in {moment}, and nobody noticed"
        assert "Signal 9 (SIGKILL)" in output, output
        assert_whole(c)
    before = newest(Path(c.output_dir))
    code, output = run(c)
    assert code == 0 and f"resumed from {before}" in output, output
    assert len(assert_whole(c)) == 6 and not list(Path(c.output_dir).glob(".tmp-*")), "four, eight, ..., twenty, final"
    assert adapter(c) == uninterrupted(strategy)
    assert [row["step"] for row in metrics(c)] == list(range(1, STEPS + 1)), "every step once"


def test_torchrun_restarts_a_run(tmp_path: Path, make: Callable[..., Config], uninterrupted: Callable[[str], bytes]):
    """With the settings of launch/torchrun.sh: without them torch's restarts meet what is left of the first start."""
    c = make(tmp_path / "run", parallel__strategy="ddp")
    fault = "at(1, train, 'finish_gradients', 11, kill)"
    job = {"FAULT": fault, "HEAD": "localhost", "PORT": str(free_port()), "NODES": "1", "GPUS": "2", "RESTARTS": "1"}
    code, output = launch("torchrun.sh", c, tmp_path, job)
    assert code == 0 and "checkpoint-8 at step 8" in output, output
    assert adapter(c) == uninterrupted("ddp")
    assert [row["step"] for row in metrics(c)] == list(range(1, STEPS + 1))


FOREVER = """
import os, random, signal, sys, time
from pathlib import Path

sys.path.insert(0, ROOT)
import torch
import train
from minilora.running.settings import load_config

torch.set_num_threads(1)
config, rng = load_config(sys.argv[1:]), random.Random(0)
metrics, kills = Path(config.output_dir) / "metrics.jsonl", 0
for _ in range(200):
    before = metrics.stat().st_size if metrics.exists() else 0
    child = os.fork()  # a new process each time, which need not import torch again
    if child == 0:
        os._exit(train.main(config))
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if kills < 50 and metrics.exists() and metrics.stat().st_size > before:  # it trains
            time.sleep(rng.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
            kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
            break
        time.sleep(0.001)
    else:
        break
print(f"{kills} kills")
"""


def test_fifty_random_kills(tmp_path: Path, make: Callable[..., Config]):
    """Row 16: one process, killed anywhere and begun again fifty times, ends where an uninterrupted one does."""
    settings = {"rows": 8, "train__epochs": 40.0, "train__save_steps": 2, "train__save_total_limit": 3, "data__num_workers": 1}
    whole, broken = (make(tmp_path / name, eval__eval_steps=1000, **settings) for name in ("whole", "broken"))
    whole.train.save_steps = 1000
    assert train.main(whole) == 0
    file = write(broken)
    file.with_name("forever.py").write_text(f"ROOT = {str(ROOT)!r}\n{FOREVER}", encoding="utf-8")
    command = [sys.executable, str(file.with_name("forever.py")), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert "50 kills" in done.stdout, done.stdout + done.stderr
    assert done.stderr.count("resumed from") >= 40, "most kills come after a checkpoint"
    assert len(assert_whole(broken)) == 4 and not list(Path(broken.output_dir).glob(".tmp-*"))
    assert adapter(broken) == adapter(whole)
    assert [row["loss"] for row in metrics(broken)] == [row["loss"] for row in metrics(whole)]


# --- processes that are asked to stop ---


def test_sigterm_saves_one_checkpoint(tmp_path: Path, make: Callable[..., Config], uninterrupted: Callable[[str], bytes]):
    """SIGTERM to one process, to torchrun, and to the batch job, one after the other in one run."""
    c = make(tmp_path / "run", train__save_steps=1000, eval__eval_steps=1000, parallel__strategy="ddp")
    targets = {"one process": "os.getpid()", "torchrun": "os.getppid()", "the batch job": "parent(os.getppid())"}
    expected = []
    for step, (who, pids) in zip((4, 8, 12), targets.items(), strict=True):
        fault = f"at(1, train, 'finish_gradients', 4, lambda *_: term({pids}))"
        if who == "the batch job":
            code, output = launch("slurm.sbatch", c, tmp_path, {"FAULT": fault})
            assert "requeue" in (tmp_path / "scontrol.log").read_text(encoding="utf-8")
        else:
            code, output = run(c, fault)
        assert code != 0 and "stopped by signal 15 after step" in output, f"SIGTERM to {who}:\n{output}"
        expected.append(f"checkpoint-{step}")
        assert set(assert_whole(c)) == set(expected), f"SIGTERM to {who}:\n{output}"
    code, output = run(c)
    assert code == 0 and "checkpoint-12 at step 12" in output, output
    assert adapter(c) == uninterrupted("ddp")


def test_sigterm_to_everybody_counts_once(tmp_path: Path, make: Callable[..., Config]):
    """Slurm signals all processes of a job step, and torchrun, too, hands its signal on: each process gets it twice."""
    c = make(tmp_path / "run", train__save_steps=1000, eval__eval_steps=1000)
    everybody = "os.getppid(), *map(int, Path(f'/proc/{os.getppid()}/task/{os.getppid()}/children').read_text().split())"
    code, output = run(c, f"at(1, train, 'finish_gradients', 4, lambda *_: term({everybody}))")
    assert code != 0 and "stopped by signal 15 after step 4" in output, output
    assert assert_whole(c) == ["checkpoint-4"]


# --- processes that fail by themselves ---

NAN = (
    "at(1, train, 'finish_gradients', 5, lambda built, parameters, *_: next(iter(parameters.values())).grad.fill_(float('nan')))"
)


def test_a_nan_on_one_process_stops_all(tmp_path: Path, make: Callable[..., Config]):
    """Row 14; the logging interval comes between the step and its discovery."""
    c = make(tmp_path / "run", train__logging_steps=3, parallel__strategy="ddp", eval__eval_steps=1000)
    code, output = run(c, NAN)
    assert code != 0
    message = re.search(r"error: loss .* by step (\d+): .*Saved before it: (\S+)\.", output)
    assert message and 5 <= int(message[1]) <= 6, output
    assert Path(message[2]) == Path(c.output_dir) / "checkpoint-4" and assert_whole(c) == ["checkpoint-4"]
    assert all(math.isfinite(row["loss"]) for row in metrics(c))


def test_an_exception_on_one_process_is_told(tmp_path: Path, make: Callable[..., Config]):
    c = make(tmp_path / "run", parallel__strategy="fsdp", eval__eval_steps=1000)
    code, output = run(c, "at(1, train, 'finish_gradients', 6, fail)")
    assert code != 0 and "RuntimeError: no good reason" in output
    assert "error: process 0 of 2 lost touch" in output, output
    assert assert_whole(c) == ["checkpoint-4"]


def test_a_hanging_process_is_given_up(tmp_path: Path, make: Callable[..., Config]):
    c = make(tmp_path / "run", parallel__strategy="ddp", eval__eval_steps=1000)
    timeout, hang = "dist.COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=3)", "lambda *_: time.sleep(1000)"
    process, log = start(c, f"{timeout}\nat(1, train, 'finish_gradients', 6, {hang})")
    out, deadline = Path(c.output_dir), time.monotonic() + 30
    while not is_complete(out / "checkpoint-4"):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    since = time.monotonic()
    while "0" in processes(tmp_path).values():
        assert time.monotonic() < since + 3 + 30, log.read_text()
        time.sleep(0.05)
    for pid, rank in processes(tmp_path).items():
        if rank == "1":  # torchrun asks it nicely, and would kill it half a minute later
            os.kill(pid, signal.SIGKILL)
    assert process.wait(LIMIT) != 0 and not processes(tmp_path)
    assert re.search("error: process 0 of 2 lost touch .*(hangs|time)", log.read_text()), log.read_text()
    assert assert_whole(c) == ["checkpoint-4"]


@pytest.mark.parametrize(
    "where", ["at(1, directory, 'save_spread', 2, fill_disk)", "at(0, directory, 'save_adapter', 2, fill_disk)"]
)
def test_a_disk_full_during_a_sharded_save(where: str, tmp_path: Path, make: Callable[..., Config]):
    """Row 17, where several processes write: the previous checkpoint is intact, and the disk is named as the cause.

    The disk is a small file system in a mount namespace of the run; what lies there is copied out for a look.
    """
    c = make(tmp_path / "run", parallel__strategy="fsdp", eval__eval_steps=1000)
    out = Path(c.output_dir)
    out.mkdir()
    mount = (
        f'mount -t tmpfs -o size=20m tmpfs {out} && ("$@"; code=$?; rm -f {out}/filler; cp -a {out} {tmp_path}/after; exit $code)'
    )
    namespace = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-Urm"]
    code, output = run(c, where, [*namespace, "bash", "-c", mount, "bash", *TORCHRUN])
    c.output_dir = str(tmp_path / "after")
    assert code == 1 and assert_whole(c) == ["checkpoint-4"], output
    assert not list((tmp_path / "after").glob(".tmp-*"))
    assert re.search(r"error: \S+checkpoint-8 could not be written.*No space left", output), output
    first = re.search(r"Root Cause.*?exitcode\s*: (-?\d+)", output, re.DOTALL)  # torchrun may end the other one before it does
    assert first is not None and first[1] == "1", output


# --- several machines ---

MACHINES = """
set -e
mount --bind {hosts} /etc/hosts
hostname machine-a
ip link set lo up
unshare --net --uts sleep 1000 &
other=$!
trap 'kill $other' EXIT
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
ip link add name eth0 type veth peer name eth1
ip link set eth1 netns $other
ip addr add 10.77.0.1/24 dev eth0
ip link set eth0 up
there="nsenter -t $other --net --uts"
$there sh -c 'hostname machine-b; ip link set lo up; ip addr add 10.77.0.2/24 dev eth1; ip link set eth1 up'
$there "$@" &
"$@"
wait $!
"""


def machines(tmp_path: Path) -> tuple[list[str], str]:
    """A command that runs another on two machines at once (namespaces, joined by a cable), or on this one twice; and HEAD."""
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n10.77.0.1 machine-a\n10.77.0.2 machine-b\n", encoding="utf-8")
    command = [
        "unshare",
        "--user",
        "--map-root-user",
        "--net",
        "--mount",
        "--uts",
        "bash",
        "-c",
        MACHINES.format(hosts=hosts),
        "-",
    ]
    if subprocess.run([*command, "true"], capture_output=True).returncode == 0:
        return command, "machine-a"
    return ["bash", "-c", 'set -e; "$@" & "$@"; wait $!', "-"], "localhost"


def test_two_machines_give_the_numbers_of_one(tmp_path: Path, make: Callable[..., Config]):
    """launch/torchrun.sh on two machines, each with an address and a name of its own where the system lets us have them."""
    one = make(tmp_path / "one", train__batch_size=4, lora__dropout=0.0)
    two = make(tmp_path / "two", lora__dropout=0.0)
    assert train.main(one) == 0
    command, head = machines(tmp_path)
    print(f"two machines: {'network namespaces joined by a veth pair' if head == 'machine-a' else 'over loopback'}")
    variables = {"HEAD": head, "NODES": "2", "GPUS": "1", "OMP_NUM_THREADS": "1", "PORT": str(free_port())}
    variables["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [*command, str(ROOT / "launch" / "torchrun.sh"), str(write(two))],
        env=os.environ | variables, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "x 2 processes" in done.stderr
    for key in ("loss", "eval/in_domain/loss", "eval/out_of_domain/loss"):
        values = [[row[key] for row in metrics(c, key)] for c in (one, two)]
        assert len(values[0]) >= 4 and values[1] == pytest.approx(values[0], abs=1e-5)
    adapters = [safetensors.torch.load(adapter(c)) for c in (one, two)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all((adapters[0][k] - adapters[1][k]).abs().max() < 1e-5 for k in adapters[0])


FLAGS = ["configs/wiki.py", "--data.train_file", "T.jsonl", "--output_dir", "OUT"]


def torchrun_words(name: str, tmp_path: Path) -> list[str]:
    """The command line that a file of launch/ gives to torchrun for FLAGS (the manifest: its own)."""
    path = ROOT / "launch" / name
    if name.endswith(".yaml"):
        (container,) = yaml.safe_load(path.read_text())["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
        assert container["command"] == ["torchrun"]
        return container["args"]
    environment = os.environ | slurm(tmp_path) | {"HEAD": "machine-a"}
    tool(tmp_path / "tools", "torchrun", 'printf "%s\\n" "$@"')
    done = subprocess.run(["bash", str(path), *FLAGS], capture_output=True, text=True, env=environment, check=True, cwd=ROOT)
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch", "pytorchjob.yaml"])
def test_launch_files_say_what_torchrun_and_train_understand(name: str, tmp_path: Path):
    parsed = get_args_parser().parse_args(torchrun_words(name, tmp_path))
    assert Path(parsed.training_script).name == "train.py" and (ROOT / parsed.training_script).is_file()
    loaded = load_config([str(ROOT / parsed.training_script_args[0]), *parsed.training_script_args[1:]])
    assert loaded.data.train_file and loaded.output_dir != Config().output_dir
    if name != "pytorchjob.yaml":
        assert parsed.rdzv_backend == "c10d" and re.fullmatch(r"(machine-a|localhost):\d+", parsed.rdzv_endpoint)
        assert parsed.max_restarts > 0 and parsed.rdzv_id
    known = leaves(Config())
    for flag in re.findall(r"--((?:\w+\.)?\w+)[= ]/shared", (ROOT / "launch" / name).read_text(encoding="utf-8")):
        assert flag in known, f"{name} names --{flag}"


def test_the_manifest_holds_together():
    """Names as in the operator's API (kubeflow.org/v1, PyTorchJobSpec); all machines share what must be shared."""
    job = yaml.safe_load((ROOT / "launch" / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    spec, elastic, worker = job["spec"], job["spec"]["elasticPolicy"], job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert set(spec) == {"nprocPerNode", "elasticPolicy", "runPolicy", "pytorchReplicaSpecs"}
    assert set(elastic) == {"rdzvBackend", "minReplicas", "maxReplicas", "maxRestarts"}
    assert elastic["minReplicas"] == elastic["maxReplicas"] == worker["replicas"], "another number would change the steps"
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch" and spec["nprocPerNode"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    claims = [v["name"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
    shared = [m["mountPath"] for m in container["volumeMounts"] if m["name"] in claims]
    variables = {v["name"]: v.get("value") for v in container["env"]}
    written = [a.partition("=")[2] for a in container["args"] if a.startswith("--output_dir")] + [variables["HF_HOME"]]
    assert len(shared) == 1 and all(path.startswith(f"{shared[0]}/") for path in written)
    assert int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
