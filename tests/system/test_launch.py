"""The files of launch/: what they tell torchrun and train.py, and a run on two machines."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import yaml
from torch.distributed.run import get_args_parser

import train
from helpers.processes import (
    LIMIT,
    ROOT,
    final_adapter,
    free_port,
    slurm_environment,
    write_program,
    write_run,
)
from helpers.tiny_runs import base_model, config, metrics
from minilora.cli import load_config
from minilora.config import Config, flatten_config

pytestmark = pytest.mark.system

FLAGS = ["configs/wiki.py", "--data.train_file", "T.jsonl", "--output_dir", "OUT"]

# Two network namespaces, each with a host name and an address of its own, joined by a cable.
MACHINES = """
set -e
mount --bind {hosts} /etc/hosts
hostname machine-a
ip link set lo up
unshare --net --uts sleep 1000 &
other=$!
trap 'kill $other' EXIT
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do
    sleep 0.05
done
ip link add name eth0 type veth peer name eth1
ip link set eth1 netns $other
ip addr add 10.77.0.1/24 dev eth0
ip link set eth0 up
there="nsenter -t $other --net --uts"
$there hostname machine-b
$there ip link set lo up
$there ip addr add 10.77.0.2/24 dev eth1
$there ip link set eth1 up
$there "$@" &
"$@"
wait $!
"""


def machines(tmp_path: Path) -> tuple[list[str], str]:
    """Return a command that runs another one on two machines at once, and the first one's name.

    Where the system allows no namespaces, both run on this machine.
    """
    hosts = tmp_path / "hosts"
    names = "127.0.0.1 localhost\n10.77.0.1 machine-a\n10.77.0.2 machine-b\n"
    hosts.write_text(names, encoding="utf-8")
    unshare = "unshare --user --map-root-user --net --mount --uts".split()
    command = [*unshare, "bash", "-c", MACHINES.format(hosts=hosts), "-"]
    if subprocess.run([*command, "true"], capture_output=True).returncode == 0:
        return command, "machine-a"
    return ["bash", "-c", 'set -e; "$@" & "$@"; wait $!', "-"], "localhost"


def test_two_machines_give_the_numbers_of_one(tmp_path: Path):
    base = base_model(tmp_path / "base")
    settings = {"train__save_steps": 4, "eval__eval_steps": 6}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = config(tmp_path / "one", base, train__batch_size=4, **settings)
    two = config(tmp_path / "two", base, train__batch_size=2, **settings)
    assert train.main(one) == 0

    command, head = machines(tmp_path)
    print(f"two machines: {'network namespaces' if head == 'machine-a' else 'over loopback'}")
    environment = {
        **os.environ,
        "HEAD": head,
        "NODES": "2",
        "GPUS": "1",
        "OMP_NUM_THREADS": "1",
        "PORT": str(free_port()),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    words = [*command, str(ROOT / "launch" / "torchrun.sh"), str(write_run(two))]
    done = subprocess.run(
        words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr
    assert "x 2 processes" in done.stderr

    for key in ("loss", "eval/in_domain/loss", "eval/out_of_domain/loss"):
        expected = [row[key] for row in metrics(one, key)]
        assert len(expected) >= 4
        assert [row[key] for row in metrics(two, key)] == pytest.approx(expected, abs=1e-5)
    adapters = [safetensors.torch.load(final_adapter(c)) for c in (one, two)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[0].items():
        assert (tensor - adapters[1][name]).abs().max() < 1e-5, name


# ---- what the files say


def read_manifest() -> dict:
    return yaml.safe_load((ROOT / "launch" / "pytorchjob.yaml").read_text(encoding="utf-8"))


def torchrun_words(name: str, tmp_path: Path) -> list[str]:
    """Return the command line that a file gives to torchrun for FLAGS (the manifest: its own)."""
    path = ROOT / "launch" / name
    if name.endswith(".yaml"):
        worker = read_manifest()["spec"]["pytorchReplicaSpecs"]["Worker"]
        (container,) = worker["template"]["spec"]["containers"]
        assert container["command"] == ["torchrun"]
        return container["args"]

    environment = {**os.environ, **slurm_environment(tmp_path), "HEAD": "machine-a"}
    write_program(tmp_path / "tools", "torchrun", 'printf "%s\\n" "$@"')
    command = ["bash", str(path), *FLAGS]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=True, cwd=ROOT
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch", "pytorchjob.yaml"])
def test_launch_file_says_what_torchrun_and_train_understand(name: str, tmp_path: Path):
    parsed = get_args_parser().parse_args(torchrun_words(name, tmp_path))
    assert Path(parsed.training_script).name == "train.py"
    assert (ROOT / parsed.training_script).is_file()

    recipe, *flags = parsed.training_script_args
    loaded = load_config([str(ROOT / recipe), *flags])
    assert loaded.data.train_file and loaded.output_dir != Config().output_dir
    if name != "pytorchjob.yaml":
        assert parsed.rdzv_backend == "c10d"
        assert re.fullmatch(r"(machine-a|localhost):\d+", parsed.rdzv_endpoint)
        assert parsed.max_restarts > 0 and parsed.rdzv_id

    known = flatten_config(Config())
    text = (ROOT / "launch" / name).read_text(encoding="utf-8")
    for flag in re.findall(r"--((?:\w+\.)?\w+)[= ]/shared", text):
        assert flag in known, f"{name} names --{flag}"


def test_manifest_is_consistent():
    """Names as in the operator's API (kubeflow.org/v1, PyTorchJobSpec).

    All machines must share what is written.
    """
    job = read_manifest()
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    spec = job["spec"]
    elastic, worker = spec["elasticPolicy"], spec["pytorchReplicaSpecs"]["Worker"]
    assert set(spec) == {"nprocPerNode", "elasticPolicy", "runPolicy", "pytorchReplicaSpecs"}
    assert set(elastic) == {"rdzvBackend", "minReplicas", "maxReplicas", "maxRestarts"}
    # another number of machines would change the optimizer steps
    assert elastic["minReplicas"] == elastic["maxReplicas"] == worker["replicas"]

    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"
    assert spec["nprocPerNode"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    variables = {v["name"]: v.get("value") for v in container["env"]}
    timeout = int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert timeout < pod["terminationGracePeriodSeconds"]

    claims = [v["name"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
    (shared,) = [m["mountPath"] for m in container["volumeMounts"] if m["name"] in claims]
    outputs = [arg for arg in container["args"] if arg.startswith("--output_dir")]
    written = [output.partition("=")[2] for output in outputs]
    assert all(path.startswith(f"{shared}/") for path in [*written, variables["HF_HOME"]])
