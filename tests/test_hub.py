"""The hub, both ways: checkpoints uploaded while a run goes on, and models fetched by id. The client is the real one."""

import copy
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml  # type: ignore[import-untyped]

import minilora
import tiny_runs
import train
from hub_server import Hub, sha256
from minilora.config import Config, UserError
from minilora.running.sources import data_files, lines_of
from minilora.tracking import hub as tracking
from minilora.weights import resolve

ROOT = Path(__file__).resolve().parent.parent
NAME = "tester/adapter"
RESUMING = {"training_state.safetensors", "training_state", "trainer_state.json", "manifest.json"}


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between tries of ours and the client's shrink; so does the time limit of a request."""
    quick = types.SimpleNamespace(**{**vars(time), "sleep": lambda _: time.sleep(0.001)})
    monkeypatch.setattr(huggingface_hub.utils._http, "time", quick)
    monkeypatch.setattr(huggingface_hub.file_download, "time", quick)
    monkeypatch.setattr(tracking, "WAIT", 0.01)
    monkeypatch.setattr("minilora.weights.TIMEOUT", 1.0)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    http = huggingface_hub.utils._http
    monkeypatch.setattr(http, "_GLOBAL_CLIENT_FACTORY", http._GLOBAL_CLIENT_FACTORY)  # as it was, afterwards
    hurry(monkeypatch)
    with Hub() as hub:
        hub.connect(monkeypatch, tmp_path / "hf")
        yield hub
    huggingface_hub.close_session()
    huggingface_hub.utils.enable_progress_bars()


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished LoRA run over a local base, and its config."""
    tmp = tmp_path_factory.mktemp("run")
    config = tiny_runs.config(tmp, tiny_runs.base_model(tmp / "the-base"), rows=8, train__max_steps=3, eval__eval_steps=2)
    assert train.main(config) == 0
    return config


@pytest.fixture
def config(run: Config, tmp_path: Path) -> Config:
    """The run's config for pushing, with an output directory of its own."""
    out = tmp_path / "out"
    shutil.copytree(run.output_dir, out)
    config = copy.deepcopy(run)
    config.output_dir, config.hub.push, config.hub.repo_id = str(out), True, NAME
    return config


def final(config: Config) -> Path:
    return Path(config.output_dir) / "checkpoint-final"


def wanted(directory: Path) -> dict[str, bytes]:
    """What should be on the hub of a checkpoint: everything but what resuming needs, and where the base lies here."""
    files = {p.name: p.read_bytes() for p in directory.iterdir() if p.name not in RESUMING}
    if "adapter_config.json" in files:
        raw = json.loads(files["adapter_config.json"])
        raw["base_model_name_or_path"] = raw["base_model_name_or_path"].rpartition("/")[2]
        files["adapter_config.json"] = json.dumps(raw, indent=2).encode()
    return files


def on_hub(hub: Hub, repo: str = NAME) -> dict[str, bytes]:
    return {path: data for path, data in hub.repos[repo].files.items() if path != "README.md"}


def messages(hub: Hub, repo: str = NAME) -> list[str]:
    return [commit.message for commit in hub.repos[repo].commits[1:]]


def push(config: Config, message: str = "step 3", seconds: float = 30) -> tracking.HubPush:
    pusher = tracking.HubPush(config)
    pusher.push(final(config), 3, message)
    pusher.close(seconds)
    return pusher


def until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# --- what is pushed ---


def test_one_private_commit_of_what_makes_it_usable(hub: Hub, config: Config, capfd: pytest.CaptureFixture):
    checkpoint = final(config)
    (checkpoint / "training_state").mkdir()  # a sharded run's
    (checkpoint / "training_state" / "__0_0.distcp").write_bytes(b"shard")
    (checkpoint / "tokenizer.json").write_bytes(b"{" + b" " * 11_000_000 + b"}")  # large without a pattern
    expected = wanted(checkpoint)
    assert {"adapter_model.safetensors", "adapter_config.json", "chat_template.jinja", "tokenizer.json"} <= expected.keys()
    push(config, "step 3: loss 1.23")
    assert hub.repos[NAME].private
    assert messages(hub) == ["step 3: loss 1.23"]
    assert on_hub(hub) == expected
    assert {sha256(expected[n]) for n in ("adapter_model.safetensors", "tokenizer.json")} <= hub.store.keys()  # by LFS
    assert "README.md" in hub.repos[NAME].files
    text = capfd.readouterr().err
    assert f"pushed 1 of 1 checkpoints to {hub.url}/{NAME}" in text
    assert "failed" not in text and "By hand" not in text and "superseded" not in text
    assert not list(Path(config.output_dir).glob(".tmp-*"))
    assert wanted(checkpoint) == expected


def test_a_full_model_in_shards(hub: Hub, config: Config):
    checkpoint = final(config)
    shutil.rmtree(checkpoint)
    names = ["config.json", "generation_config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    names += ["model.safetensors.index.json", "tokenizer.model", "special_tokens_map.json", "tokenizer_config.json"]
    checkpoint.mkdir()
    for name in [*names, "training_state.safetensors", "trainer_state.json", "manifest.json", "optimizer.safetensors"]:
        (checkpoint / name).write_text(f"the bytes of {name}")
    config.method = "full"
    push(config)
    assert on_hub(hub) == {name: f"the bytes of {name}".encode() for name in names}
    assert messages(hub) == ["step 3"]


def test_own_account_public_and_existing(hub: Hub, config: Config, capfd: pytest.CaptureFixture):
    config.hub.repo_id, config.hub.private = "mine", False
    push(config)
    assert not hub.repos["tester/mine"].private
    config.hub.private = True
    push(config)
    assert not hub.repos["tester/mine"].private  # as it was
    text = capfd.readouterr().err
    assert text.count("is public") == 1 and text.count(f"{hub.url}/tester/mine") >= 2


def test_the_newest_of_those_that_wait(hub: Hub, config: Config, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("minilora.weights.TIMEOUT", 30.0)
    pusher = tracking.HubPush(config)
    hub.fail("commit", "hang")
    copies = [shutil.copytree(final(config), Path(config.output_dir) / f"copy-{i}") for i in range(1, 5)]
    for i, one in enumerate(copies, 1):
        (one / "adapter_model.safetensors").write_bytes(b"adapter %d" % i)
    start = time.monotonic()
    pusher.push(copies[0], 1, "step 1")
    until(lambda: hub.count("commit") == 1)
    for i, one in enumerate(copies[1:], 2):
        pusher.push(one, i, f"step {i}")
    assert time.monotonic() - start < 10  # the server has not answered yet
    assert len(list(Path(config.output_dir).glob(".tmp-hub-*"))) == 2
    for one in copies:
        shutil.rmtree(one)  # as train.save_total_limit does
    hub.heal()
    pusher.close(30)
    assert messages(hub) == ["step 1", "step 4"]
    assert on_hub(hub)["adapter_model.safetensors"] == b"adapter 4"
    assert "pushed 2 of 4 checkpoints" in (text := capfd.readouterr().err) and "2 superseded" in text and "failed" not in text
    assert not list(Path(config.output_dir).glob(".tmp-*"))


@pytest.mark.parametrize("links", [True, False])
def test_a_checkpoint_removed_during_its_upload(hub: Hub, config: Config, links: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("minilora.weights.TIMEOUT", 30.0)
    if not links:

        def refuse(*_):
            raise OSError("no links here")

        monkeypatch.setattr(tracking.os, "link", refuse)
    expected = wanted(final(config))
    pusher = tracking.HubPush(config)
    hub.fail("preupload", "hang")
    before = hub.count("preupload")
    pusher.push(final(config), 3, "step 3")
    until(lambda: hub.count("preupload") > before)
    shutil.rmtree(final(config))
    hub.heal()
    pusher.close(30)
    assert on_hub(hub) == expected


# --- refused at the start ---


@pytest.mark.parametrize("repo", ["", None, "a/b/c", "a b", "tester/..", "tester/a--b"])
def test_no_repository_of_that_name(hub: Hub, config: Config, repo: str | None):
    config.hub.repo_id = repo
    with pytest.raises(UserError, match=r"hub\.repo_id"):
        tracking.HubPush(config)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "repo", "words"),
    [
        (None, NAME, "HF_TOKEN"),
        ("hf_unknown", NAME, "token"),
        ("hf_unknown", "mine", "token"),
        ("hf_reader", NAME, "write"),
        ("hf_reader", "tester/there", "write"),  # the client takes its existence for success
        ("", "somebody/else", "write"),
    ],
)
def test_no_right_to_write(hub: Hub, config: Config, tmp_path: Path, monkeypatch, token: str | None, repo: str, words: str):
    hub.add("tester/there", {"README.md": b"# there"}, private=True)
    hub.connect(monkeypatch, tmp_path / "hf", token)
    config.hub.repo_id, config.output_dir = repo, str(tmp_path / "new")
    with pytest.raises(UserError, match=words) as refused:
        tracking.HubPush(config)
    assert "hub.push" in str(refused.value)
    assert not any(t in str(refused.value) for t in ("hf_unknown", "hf_reader", hub.token))
    assert not (tmp_path / "new").exists()
    assert list(hub.repos) == ["tester/there"] and hub.repos["tester/there"].files == {"README.md": b"# there"}


def test_offline(hub: Hub, config: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        tracking.HubPush(config)


@pytest.mark.parametrize("repo", [NAME, "adapter"])
@pytest.mark.parametrize("fault", [500, 503, 429, "hang", "reset", "cut"])
def test_a_server_that_does_not_answer_at_the_start(hub: Hub, config: Config, capfd, fault: int | str, repo: str):
    config.hub.repo_id = repo
    hub.fail("whoami" if repo == "adapter" else "create", fault)
    push(config)
    text = capfd.readouterr().err
    assert "tried again at each checkpoint" in text and "pushed 1 of 1" in text
    assert hub.repos[NAME].private and on_hub(hub) == wanted(final(config))
    assert json.dumps(NAME) in hub.repos[NAME].files["README.md"].decode() or repo == "adapter"


# --- faults on the way ---


@pytest.mark.parametrize(
    ("kind", "fault", "times"),
    [
        ("preupload", 500, 3),
        ("validate-yaml", 500, 2),
        ("lfs-batch", 502, 2),
        ("lfs-upload", 500, 7),
        ("lfs-upload", "reset", 2),
        ("lfs-upload", "hang", 1),
        ("commit", 500, 3),
        ("commit", "reset", 2),
        ("commit", "hang", 1),
        ("commit", "cut", 1),
        ("commit", "lost", 1),
    ],
)
def test_faults_that_pass(hub: Hub, config: Config, capfd: pytest.CaptureFixture, kind: str, fault: int | str, times: int):
    pusher = tracking.HubPush(config)
    hub.fail(kind, fault, times)
    pusher.push(final(config), 3, "step 3")
    pusher.close(60)
    assert messages(hub) == ["step 3"]  # once, although an answer may have been lost
    assert on_hub(hub) == wanted(final(config))
    assert "pushed 1 of 1 checkpoints" in (text := capfd.readouterr().err) and "failed" not in text
    assert all(fault[2] == 0 for fault in hub.faults)  # they have happened


@pytest.mark.parametrize("fault", [500, 403, "reset", "hang"])
def test_a_server_that_stays_broken(hub: Hub, config: Config, capfd, monkeypatch, tmp_path: Path, fault: int | str):
    monkeypatch.setattr("minilora.weights.TIMEOUT", 0.2)
    pusher = tracking.HubPush(config)
    hub.fail("commit", fault, times=1000)
    pusher.push(final(config), 2, "step 2")
    until(lambda: pusher.error)
    pusher.push(final(config), 3, "step 3")
    pusher.close(30)
    text = capfd.readouterr().err
    assert text.count("the training goes on") == 2
    assert f"pushed 0 of 2 checkpoints to {hub.url}/{NAME}, 2 failed: " in text
    assert str(fault) in text.splitlines()[-1] if isinstance(fault, int) else "Error" in text or "Timeout" in text
    assert hub.count("commit") == (2 if fault == 403 else 2 * tracking.TRIES)  # a refusal is final
    assert messages(hub) == [] and hub.token not in text
    assert not list(Path(config.output_dir).glob(".tmp-*"))

    if fault != 500:
        return
    hub.heal()
    words = shlex.split(text.rpartition("By hand: ")[2])
    assert words[0] == "hf"
    command = [str(Path(sys.executable).parent / "hf"), *words[1:]]
    upload = subprocess.run(command, env=hub.environment(tmp_path), capture_output=True, text=True, timeout=60)
    assert upload.returncode == 0, upload.stderr
    assert on_hub(hub) == {p.name: p.read_bytes() for p in final(config).iterdir() if p.name not in RESUMING}


def test_a_later_checkpoint_makes_up_for_a_lost_one(hub: Hub, config: Config, capfd: pytest.CaptureFixture):
    pusher = tracking.HubPush(config)
    hub.fail("commit", 403)
    pusher.push(final(config), 2, "step 2")
    until(lambda: pusher.error)
    pusher.push(Path(config.output_dir) / "checkpoint-that-is-not-there", 3, "step 3")  # nothing to link: not fatal either
    pusher.push(final(config), 4, "step 4")
    pusher.close(30)
    text = capfd.readouterr().err
    assert messages(hub) == ["step 4"]
    assert "pushed 1 of 3 checkpoints" in text and "2 failed" in text and "By hand" not in text


HANGING = """
import sys
from pathlib import Path
from minilora.config import Config
from minilora.tracking.hub import HubPush

config = Config(output_dir=sys.argv[1], method="full")
config.hub.push, config.hub.repo_id = True, "tester/adapter"
push = HubPush(config)
push.push(Path(sys.argv[1]) / "checkpoint-final", 3, "step 3")
push.close(2)
print("out")
"""


def test_a_process_ends_although_the_server_hangs(hub: Hub, config: Config, tmp_path: Path):
    """With two large files: those the client would send from a pool of threads, for which Python waits at its end."""
    shutil.copy(final(config) / "adapter_model.safetensors", final(config) / "model.safetensors")
    hub.fail("lfs-upload", "hang", times=100)
    start = time.monotonic()
    command = [sys.executable, "-c", HANGING, config.output_dir]
    done = subprocess.run(command, cwd=ROOT, env=hub.environment(tmp_path), capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout) == (0, "out\n"), done.stderr
    assert time.monotonic() - start < 40  # not the 60 seconds of a request
    assert hub.count("lfs-upload") >= 1
    assert "1 failed: not done after 2 s. By hand: hf upload" in done.stderr and hub.token not in done.stderr


def test_the_token_is_nowhere(hub: Hub, config: Config, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture):
    """Not even where a server repeats it in an error, as this one does."""
    pusher = tracking.HubPush(config)
    hub.fail("preupload", 500, 2)
    hub.fail("commit", 403)
    pusher.push(final(config), 2, "step 2")
    until(lambda: pusher.error)
    assert "you sent" in pusher.error
    pusher.push(final(config), 3, "step 3")
    pusher.close(30)
    assert any(hub.token in headers.get("authorization", "") for headers in map(lower, hub.headers))  # it was used
    captured = capfd.readouterr()
    secret = hub.token.removeprefix("hf_test_")
    assert secret not in captured.err + captured.out + caplog.text + repr(config) + pusher.error
    for file in [p for p in Path(config.output_dir).rglob("*") if p.is_file()]:
        assert secret.encode() not in file.read_bytes(), file
    assert not any(secret.encode() in data for data in hub.repos[NAME].files.values())


def lower(headers: dict[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


# --- the model card ---


def header_of(card: str) -> dict:
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert found
    return yaml.safe_load(found[1])


def test_card_of_a_local_base(hub: Hub, config: Config, tmp_path: Path):
    push(config)
    card = hub.repos[NAME].files["README.md"].decode()
    assert header_of(card) == {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["minilora", "lora"]}
    assert huggingface_hub.ModelCard(card).data.to_dict()["library_name"] == "peft"
    assert "the-base" in card and "train.jsonl" in card and f'adapter="{NAME}"' in card and "see the base model" in card
    for part in (str(Path(config.model.name).parent), str(tmp_path), config.output_dir, "/tmp", "/home"):
        assert part not in card
    rows = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    last = [row["loss"] for row in rows if "loss" in row][-1]
    assert f"| loss | {last:.5g} |" in card
    assert f"{[r['eval/out_of_domain/loss'] for r in rows if 'eval/out_of_domain/loss' in r][-1]:.5g} |" in card
    assert re.search(r"\| r \| 4 \|", card) and re.search(r"\| lora\\_alpha \| 8 \|", card)


def test_card_of_a_hub_base(config: Config):
    config.model.name, config.model.revision = "mistralai/Mistral-7B-v0.3", "v1"
    card = tracking.model_card(config, final(config), [{"step": 1, "loss": 2.5}, {"step": 9, "loss": 7.25}], 3)
    assert header_of(card)["base_model"] == "mistralai/Mistral-7B-v0.3"
    assert f'minilora.load("{NAME}")' in card and "(revision v1)" in card
    assert "| 2.5 |" in card and "7.25" not in card  # of later steps nothing
    config.model.name, config.model.revision = "mistralai/Mistral-7B-v0.3@v2", None
    card = tracking.model_card(config, final(config), [], 3)
    assert header_of(card)["base_model"] == "mistralai/Mistral-7B-v0.3" and "(revision v2)" in card


def test_card_of_a_full_model(config: Config, tmp_path: Path):
    config.method, config.model.name = "full", "owner/base"
    config.data.train_file = ("/home/someone/a.jsonl", "b.jsonl")
    card = tracking.model_card(config, tmp_path, [], 3)
    assert header_of(card) == {
        "base_model": "owner/base", "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["minilora", "full-fine-tuning"],
    }  # fmt: skip
    assert "a.jsonl, b.jsonl" in card and "someone" not in card
    config.model.init = "random"
    card = tracking.model_card(config, tmp_path, [], 3)
    assert "base_model" not in header_of(card) and "random weights" in card


@pytest.mark.parametrize(
    "name",
    ["a/b\n---\nlicense: mit", "a: [b", "x | y <script> `z`", "/home/someone/'odd' \"name\": #1", "{step}", "日本/語", "a/b: c"],
)
def test_card_of_a_strange_name(config: Config, name: str):
    config.model.name = name
    card = tracking.model_card(config, final(config), [], 3)
    assert header_of(card).keys() == {"library_name", "pipeline_tag", "tags"}
    assert "someone" not in card and "<script>" not in card and card.count("\n---\n") == 1


# --- a run that pushes ---


@pytest.mark.parametrize("broken", [False, True])
def test_a_run_pushes_its_checkpoints(hub: Hub, run: Config, tmp_path: Path, capfd: pytest.CaptureFixture, broken: bool):
    """Pitfall 30: an upload that fails is a warning, and the run is what it would have been."""
    changes = {
        "hub__push": True,
        "hub__repo_id": NAME,
        "train__save_total_limit": 1,
        "train__save_steps": 1,
    }
    config = tiny_runs.config(tmp_path, Path(run.model.name), rows=8, eval__eval_steps=2, train__max_steps=3, **changes)
    if broken:
        hub.fail("*", 500, times=10_000)
    assert train.main(config) == 0
    text = capfd.readouterr().err
    assert tiny_runs.losses(config) == tiny_runs.losses(run)
    assert not list(Path(config.output_dir).glob(".tmp-*")) and hub.token not in text
    for file in [p for p in Path(config.output_dir).rglob("*") if p.is_file()]:
        assert hub.token.encode() not in file.read_bytes()
    if broken:
        assert hub.repos == {} and "pushed 0 of 3" in text and "500" in text and "By hand: hf upload" in text
        return
    assert re.match(r"step 3\b", messages(hub)[-1])
    assert on_hub(hub) == wanted(final(config))


def test_a_run_without_a_token_stops_before_it_writes(hub: Hub, run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_TOKEN")
    config = tiny_runs.config(tmp_path, Path(run.model.name), rows=8, hub__push=True, hub__repo_id=NAME)
    with pytest.raises(UserError, match="HF_TOKEN"):
        train.main(config)
    assert not Path(config.output_dir).exists()


# --- models by id ---


@pytest.fixture
def base(run: Config, hub: Hub) -> dict[str, bytes]:
    """The files of a base model, which is on the hub as tester/base: first with other weights, then, as v1, with its own."""
    files = {p.name: p.read_bytes() for p in Path(run.model.name).iterdir()}
    other = tiny_runs.tiny("mistral", seed=5, vocab_size=json.loads(files["config.json"])["vocab_size"]).state_dict()
    assert other
    extra = {"README.md": b"# base", "pytorch_model.bin": b"a pickle", "modeling.py": b"raise SystemExit"}
    hub.add("tester/base", {**files, **extra, "generation_config.json": b'{"old": 1}'}, tags=["v0"])
    hub.add("tester/base", files, tags=["v1"])
    return files


def test_a_model_by_id(hub: Hub, base: dict[str, bytes]):
    old = {**base, "generation_config.json": b'{"old": 1}'}
    branch = hub.repos["tester/base"].refs
    branch["feature/x"] = branch["v0"]
    for revision, files in ((None, base), ("v0", old), ("main", base), (branch["v0"], old), ("feature/x", old)):
        directory = resolve("tester/base", revision)
        assert {p.name: p.read_bytes() for p in directory.iterdir()} == files  # no pickle, no code
    with pytest.raises(UserError, match=r"tester/base.*404"):
        resolve("tester/base", "v9")


def test_a_revision_in_the_name(hub: Hub, base: dict[str, bytes]):
    directory = resolve("tester/base@v0")
    assert (directory / "generation_config.json").read_bytes() == b'{"old": 1}'


def test_a_private_model(hub: Hub, base: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub.repos["tester/base"].private = True
    assert resolve("tester/base").is_dir()
    hub.connect(monkeypatch, tmp_path / "other", None)
    with pytest.raises(UserError, match="401"):
        resolve("tester/base")
    with pytest.raises(UserError, match=r"401|404"):
        resolve("tester/nothing")


def test_model_and_adapter_by_id(hub: Hub, base: dict[str, bytes], config: Config):
    push(config)
    model, _ = minilora.load("tester/base", adapter=NAME)
    local, tokenizer = minilora.load(str(final(config)))
    plain, _ = minilora.load("tester/base")
    ids = torch.tensor(tokenizer.encode("Title: Topic 1").ids)
    assert torch.equal(model(ids, lengths=[len(ids)]), local(ids, lengths=[len(ids)]))
    assert not torch.equal(plain(ids, lengths=[len(ids)]), local(ids, lengths=[len(ids)]))


@pytest.mark.parametrize(
    ("kind", "fault", "times"),
    [
        ("tree", 500, 2),
        ("tree", "reset", 2),
        ("store", "cut", 2),
        ("resolve", 429, 1),
        ("store", "hang", 1),
    ],
)
def test_downloads_go_on_after_a_fault(hub: Hub, base: dict[str, bytes], monkeypatch, kind: str, fault: int | str, times: int):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # what is kept of a broken answer
    hub.fail(kind, fault, times)
    directory = resolve("tester/base")
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == base
    assert all(fault[2] == 0 for fault in hub.faults)
    assert fault != "cut" or any("range" in lower(headers) for headers in hub.headers)  # resumed


@pytest.mark.parametrize("fault", [500, 404, "reset", "cut", "hang"])
@pytest.mark.parametrize("kind", ["info", "tree", "resolve", "store"])
def test_what_cannot_be_fetched(hub: Hub, base: dict[str, bytes], monkeypatch, kind: str, fault: int | str):
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT", "DEFAULT_ETAG_TIMEOUT"):
        monkeypatch.setattr(huggingface_hub.constants, name, 0.3)
    hub.hang_seconds = 0.6
    hub.fail(kind, fault, times=10_000)
    with pytest.raises(UserError, match="tester/base") as error:
        resolve("tester/base")
    assert hub.token not in str(error.value)
    assert str(fault) in str(error.value) or isinstance(fault, str)
    hub.fail("*", 500, times=10_000)
    with pytest.raises(UserError, match="tester/base"):  # what lies in the cache is not taken for whole
        resolve("tester/base")
    hub.heal()
    assert {p.name: p.read_bytes() for p in resolve("tester/base").iterdir()} == base


def test_the_cause_is_named(hub: Hub, base: dict[str, bytes]):
    hub.fail("resolve", 500, times=10_000)
    with pytest.raises(UserError, match="500"):
        resolve("tester/base")


@pytest.mark.parametrize("kind", ["info", "tree"])
def test_a_hub_that_hangs_is_given_up(hub: Hub, base: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, kind: str):
    monkeypatch.setattr("minilora.weights.TIMEOUT", 0.2)
    hub.hang_seconds = 3.5 if kind == "info" else 0.7  # the client asks for a tree six times
    hub.fail(kind, "hang", times=100)
    start = time.monotonic()
    with pytest.raises(UserError, match="tester/base"):
        resolve("tester/base")
    assert time.monotonic() - start < 3.0


# --- data sets ---


def jsonl(first: int, rows: int) -> bytes:
    return "".join(
        json.dumps({"prompt": f"question {i}", "completion": f"answer {i}"}) + "\n" for i in range(first, first + rows)
    ).encode()


@pytest.fixture
def datasets(hub: Hub) -> Hub:
    shards = {f"data/train-0000{i}-of-00002.jsonl": jsonl(10 * i, 10) for i in range(2)}
    hub.add(
        "datasets/tester/split",
        {**shards, "data/test-00000-of-00001.jsonl": jsonl(100, 3), "script.py": b"raise SystemExit"},
        tags=["v1"],
    )
    hub.add("datasets/tester/split", {**shards, "data/train-00001-of-00002.jsonl": jsonl(50, 4)}, tags=["v2"])
    hub.add("datasets/tester/plain", {"rows.jsonl": jsonl(0, 5), "README.md": b"rows"})
    hub.add(
        "datasets/tester/subsets", {"en/train.jsonl": jsonl(0, 5), "ko/train.jsonl": jsonl(9, 2), "ko/dev.jsonl": jsonl(7, 1)}
    )
    hub.add("datasets/tester/closed", {"train.jsonl": jsonl(0, 5)}, private=True)
    return hub


@pytest.mark.parametrize(
    "name, what, numbers",
    [
        ("tester/split", "train_file", [*range(10), *range(50, 54)]),
        ("tester/split@v1", "train_file", [*range(20)]),
        ("tester/split@v1", "eval_file", [100, 101, 102]),
        ("tester/split@v1:test", "train_file", [100, 101, 102]),
        ("tester/split@v1:data/train-00001*", "train_file", [*range(10, 20)]),
        ("tester/plain", "train_file", [*range(5)]),
        ("tester/subsets:ko/train*", "train_file", [9, 10]),
        ("tester/subsets", "eval_file", [7]),
        ("tester/closed", "train_file", [*range(5)]),
    ],
)
def test_a_data_set_by_id(datasets: Hub, name: str, what: str, numbers: list[int]):
    lines = [json.loads(raw) for shown, path in data_files(name, what) for _, raw in lines_of(shown, path)]
    assert [row["prompt"] for row in lines] == [f"question {i}" for i in numbers]
    assert not any("script" in path for kind, path in datasets.requests if kind == "resolve"), "no code is fetched"


@pytest.mark.parametrize(
    "name, message",
    [
        ("tester/absent", "404"), ("tester/split@v9", "404"), ("tester/plain:validation", "no validation file"),
        ("tester/subsets", r"tester/subsets:en/train\*\.jsonl or tester/subsets:ko"), ("tester/plain:*.csv", r"no \*\.csv file"),
    ],
)  # fmt: skip
def test_a_data_set_that_is_not_to_be_had(datasets: Hub, name: str, message: str):
    with pytest.raises(UserError, match=rf"data\.train_file: .*{message}"):
        data_files(name, "train_file")


@pytest.mark.parametrize("fault", [500, "hang", "reset", "cut"])
def test_a_data_set_behind_a_broken_server(datasets: Hub, monkeypatch: pytest.MonkeyPatch, fault: int | str):
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT", "DEFAULT_ETAG_TIMEOUT"):
        monkeypatch.setattr(huggingface_hub.constants, name, 0.3)
    datasets.hang_seconds = 0.6
    datasets.fail("*", fault, times=10_000)
    with pytest.raises(UserError, match=r"data\.train_file: 'tester/plain' is no file, and tester/plain could not be fetched"):
        data_files("tester/plain", "train_file")
    datasets.heal()
    ((_, path),) = data_files("tester/plain", "train_file")
    assert path.read_bytes() == jsonl(0, 5)


def test_everything_by_id(datasets: Hub, base: dict[str, bytes], run: Config, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Base, adapter to start from and rows, each at a revision, in one run."""
    datasets.add("tester/adapter", wanted(final(run)), tags=["best"])
    c = tiny_runs.config(tmp_path, Path("unused"), train__max_steps=2, lora__init_from="tester/adapter@best", eval__eval_steps=2)
    c.model.name, c.data.format = "tester/base@v1", "prompt"
    c.data.train_file, c.data.eval_file = ("tester/split@v1", "tester/plain"), "tester/split@v1:test"
    c.data.train_weights = (0.5, 2.0)
    assert train.main(c) == 0
    text = capsys.readouterr().err
    assert "tester/split@v1, tester/plain: 25 lines read, 25 kept" in text and "20 documents, 2 steps" in text
    written = json.loads((final(c) / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == ("tester/base", "v1")
    model, _ = minilora.load(str(final(c)))
    assert model.config.hidden_size == json.loads(base["config.json"])["hidden_size"]
