"""Checkpoints are uploaded while a run goes on, whatever the hub does; with the real client."""

import copy
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest

import train
from helpers import tiny_runs
from helpers.hub_runs import LOCAL_FILES, final, finished_run, uploadable_files
from helpers.hub_server import Hub, running_hub, sha256
from minilora.config import Config
from minilora.errors import UserError
from minilora.tracking import hub_upload
from minilora.tracking.hub_upload import HubUploader

ROOT = Path(__file__).resolve().parents[2]
NAME = "tester/adapter"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub(monkeypatch, tmp_path / "hf") as hub:
        yield hub


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return finished_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def config(run: Config, tmp_path: Path) -> Config:
    """Return the run's config for pushing, with a copy of its output directory."""
    out = tmp_path / "out"
    shutil.copytree(run.output_dir, out)
    config = copy.deepcopy(run)
    config.output_dir, config.hub.push, config.hub.repo_id = str(out), True, NAME
    return config


def uploaded_files(hub: Hub) -> dict[str, bytes]:
    """Return the files on the hub apart from the model card."""
    files = dict(hub.repos[NAME].files)
    files.pop("README.md", None)
    return files


def commit_messages(hub: Hub) -> list[str]:
    return [commit.message for commit in hub.repos[NAME].commits[1:]]  # the hub made the first


def staging_directories(config: Config) -> list[Path]:
    return list(Path(config.output_dir).glob(".tmp-*"))


def push_final(config: Config, message: str = "step 3") -> None:
    """Upload the final checkpoint and wait for it."""
    uploader = HubUploader(config)
    uploader.push(final(config), 3, message)
    uploader.close(30)


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# --- what is uploaded


def test_an_adapter_is_one_commit_of_what_makes_it_usable(
    hub: Hub, config: Config, capfd: pytest.CaptureFixture
):
    checkpoint = final(config)
    (checkpoint / "training_state").mkdir()  # as a sharded run has it
    (checkpoint / "training_state" / "__0_0.distcp").write_bytes(b"shard")
    # large, although .gitattributes does not say so
    (checkpoint / "tokenizer.json").write_bytes(b"{" + b" " * 11_000_000 + b"}")
    expected = uploadable_files(checkpoint)
    names = {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "minilora.json"}
    assert names | {"chat_template.jinja"} <= expected.keys()

    push_final(config, "step 3: loss 1.23")
    assert hub.repos[NAME].private
    assert commit_messages(hub) == ["step 3: loss 1.23"]
    assert uploaded_files(hub) == expected
    for name in ("adapter_model.safetensors", "tokenizer.json"):
        assert sha256(expected[name]) in hub.store  # by LFS
    assert "README.md" in hub.repos[NAME].files
    text = capfd.readouterr().err
    assert f"pushed 1 of 1 checkpoints to {hub.url}/{NAME}" in text
    assert "failed" not in text and "By hand" not in text and "superseded" not in text
    assert not staging_directories(config)
    assert uploadable_files(checkpoint) == expected


def test_files_of_an_earlier_checkpoint_are_removed(
    hub: Hub, config: Config, capfd: pytest.CaptureFixture
):
    """A chat template would be used although this checkpoint has none. Other files stay."""
    others = {
        "notes.txt": b"of the user",
        "adapter_notes/config.json": b"{}",
        "model.safetensors": b"a whole model, which an adapter may lie beside",
    }
    hub.add(NAME, {**others, "chat_template.jinja": b"{{ old }}"})
    (final(config) / "chat_template.jinja").unlink(missing_ok=True)
    push_final(config)
    assert uploaded_files(hub) == uploadable_files(final(config)) | others
    assert commit_messages(hub) == ["add files", "step 3"]
    message = f"chat_template.jinja of an earlier checkpoint removed from {hub.url}/{NAME}"
    assert message in capfd.readouterr().err


def test_a_full_model_in_shards(hub: Hub, config: Config):
    checkpoint = final(config)
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()
    uploaded = [
        "config.json",
        "generation_config.json",
        "minilora.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "special_tokens_map.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    local = ["training_state.safetensors", "trainer_state.json", "manifest.json"]
    for name in [*uploaded, *local, "optimizer.safetensors"]:
        (checkpoint / name).write_text(f"the bytes of {name}")
    config.method = "full"
    push_final(config)
    assert uploaded_files(hub) == {name: f"the bytes of {name}".encode() for name in uploaded}
    assert commit_messages(hub) == ["step 3"]


def test_a_full_model_over_an_adapter_is_warned_about(
    hub: Hub, config: Config, capfd: pytest.CaptureFixture
):
    """Its files would be read as those of the adapter, which stays: it is the user's."""
    hub.add(NAME, {"adapter_config.json": b"{}", "model-00009-of-00009.safetensors": b"old"})
    config.method = "full"
    checkpoint = final(config)
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"new")
    push_final(config)
    expected = {"adapter_config.json": b"{}", "model.safetensors": b"new"}
    assert uploaded_files(hub) == expected
    assert "has an adapter_config.json" in capfd.readouterr().err


def test_a_repository_of_ones_own_account_keeps_its_visibility(
    hub: Hub, config: Config, capfd: pytest.CaptureFixture
):
    config.hub.repo_id, config.hub.private = "mine", False
    push_final(config)
    assert not hub.repos["tester/mine"].private
    config.hub.private = True
    push_final(config)
    assert not hub.repos["tester/mine"].private  # as it was
    text = capfd.readouterr().err
    assert text.count("is public") == 1 and text.count(f"{hub.url}/tester/mine") >= 2


def test_a_newer_checkpoint_supersedes_those_that_wait(
    hub: Hub, config: Config, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("minilora.hub.TIMEOUT", 30.0)
    uploader = HubUploader(config)
    hub.fail("commit", "hang")
    checkpoints = []
    for step in range(1, 5):
        copied = Path(config.output_dir) / f"copy-{step}"
        shutil.copytree(final(config), copied)
        (copied / "adapter_model.safetensors").write_bytes(b"adapter %d" % step)
        checkpoints.append(copied)

    start = time.monotonic()
    for step, checkpoint in enumerate(checkpoints, 1):
        uploader.push(checkpoint, step, f"step {step}")
        wait_until(lambda: hub.count("commit") == 1)
    assert time.monotonic() - start < 10  # the server has not answered yet
    assert len(staging_directories(config)) == 2
    for checkpoint in checkpoints:
        shutil.rmtree(checkpoint)  # as train.save_total_limit does
    hub.heal()
    uploader.close(30)
    assert commit_messages(hub) == ["step 1", "step 4"]
    assert uploaded_files(hub)["adapter_model.safetensors"] == b"adapter 4"
    text = capfd.readouterr().err
    assert "pushed 2 of 4 checkpoints" in text and "2 superseded" in text
    assert "failed" not in text
    assert not staging_directories(config)


@pytest.mark.parametrize("has_links", [True, False])
def test_a_checkpoint_may_be_removed_during_its_upload(
    hub: Hub, config: Config, has_links: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("minilora.hub.TIMEOUT", 30.0)
    if not has_links:

        def refuse(*_):
            raise OSError("no links here")

        monkeypatch.setattr(hub_upload.os, "link", refuse)
    expected = uploadable_files(final(config))
    uploader = HubUploader(config)
    hub.fail("preupload", "hang")
    before = hub.count("preupload")
    uploader.push(final(config), 3, "step 3")
    wait_until(lambda: hub.count("preupload") > before)
    shutil.rmtree(final(config))
    hub.heal()
    uploader.close(30)
    assert uploaded_files(hub) == expected


def test_the_card_shows_the_runs_figures_and_no_local_paths(
    hub: Hub, config: Config, tmp_path: Path
):
    push_final(config)
    card = hub.repos[NAME].files["README.md"].decode()
    assert huggingface_hub.ModelCard(card).data.to_dict() == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["minilora", "lora"],
    }
    for part in ("the-base", "train.jsonl", f'adapter="{NAME}"', "see the base model"):
        assert part in card
    base_directory = str(Path(config.model.name).parent)
    for part in (base_directory, str(tmp_path), config.output_dir, "/tmp", "/home"):
        assert part not in card
    for key in ("loss", "eval/out_of_domain/loss"):
        last = tiny_runs.metrics(config, key)[-1][key]
        escaped_key = key.replace("_", r"\_")
        assert f"| {escaped_key} | {last:.5g} |" in card
    assert "| r | 4 |" in card and r"| lora\_alpha | 8 |" in card


# --- refused before the run


@pytest.mark.parametrize("repo", ["", None, "a/b/c", "a b", "tester/..", "tester/a--b"])
def test_a_name_that_no_repository_can_have(hub: Hub, config: Config, repo: str | None):
    config.hub.repo_id = repo
    with pytest.raises(UserError, match=r"hub\.repo_id"):
        HubUploader(config)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        (None, NAME, "HF_TOKEN"),
        ("hf_unknown", NAME, "token"),
        ("hf_unknown", "mine", "token"),
        ("hf_reader", NAME, "write"),
        # the client takes it for a success that the repository exists
        ("hf_reader", "tester/there", "write"),
        ("", "somebody/else", "write"),
    ],
)
def test_a_token_that_may_not_write(
    hub: Hub,
    config: Config,
    tmp_path: Path,
    monkeypatch,
    token: str | None,
    repo: str,
    message: str,
):
    hub.add("tester/there", {"README.md": b"# there"}, private=True)
    hub.connect(monkeypatch, tmp_path / "hf", token)
    config.hub.repo_id, config.output_dir = repo, str(tmp_path / "new")
    with pytest.raises(UserError, match=message) as refused:
        HubUploader(config)
    assert "hub.push" in str(refused.value)
    for secret in ("hf_unknown", "hf_reader", hub.token):
        assert secret not in str(refused.value)
    assert not (tmp_path / "new").exists()
    assert list(hub.repos) == ["tester/there"]
    assert hub.repos["tester/there"].files == {"README.md": b"# there"}


def test_an_offline_client(hub: Hub, config: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        HubUploader(config)


@pytest.mark.parametrize(
    ("fault", "repo"),
    [(500, NAME), (503, "adapter"), (429, NAME), ("hang", "adapter"), ("reset", NAME),
     ("cut", "adapter"), ("hang", NAME), (500, "adapter")],
)  # fmt: skip
def test_a_server_that_does_not_answer_at_the_start_is_asked_again(
    hub: Hub, config: Config, capfd: pytest.CaptureFixture, fault: int | str, repo: str
):
    config.hub.repo_id = repo
    hub.fail("create" if repo == NAME else "whoami", fault)
    push_final(config)
    text = capfd.readouterr().err
    assert "tried again at each checkpoint" in text and "pushed 1 of 1" in text
    assert hub.repos[NAME].private
    assert uploaded_files(hub) == uploadable_files(final(config))
    if repo == NAME:
        assert json.dumps(NAME) in hub.repos[NAME].files["README.md"].decode()


# --- faults during an upload


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
def test_faults_that_pass(
    hub: Hub, config: Config, capfd: pytest.CaptureFixture, kind: str, fault: int | str, times: int
):
    uploader = HubUploader(config)
    hub.fail(kind, fault, times)
    uploader.push(final(config), 3, "step 3")
    uploader.close(60)
    assert commit_messages(hub) == ["step 3"]  # once, although an answer may have been lost
    assert uploaded_files(hub) == uploadable_files(final(config))
    text = capfd.readouterr().err
    assert "pushed 1 of 1 checkpoints" in text and "failed" not in text
    assert all(times_left == 0 for _, _, times_left in hub.faults)


@pytest.mark.parametrize("fault", [500, 403, "reset", "hang"])
def test_a_server_that_stays_broken(
    hub: Hub, config: Config, capfd: pytest.CaptureFixture, monkeypatch, fault: int | str
):
    monkeypatch.setattr("minilora.hub.TIMEOUT", 0.2)
    uploader = HubUploader(config)
    hub.fail("commit", fault, times=1000)
    uploader.push(final(config), 2, "step 2")
    wait_until(lambda: uploader.last_error)
    uploader.push(final(config), 3, "step 3")
    uploader.close(30)
    text = capfd.readouterr().err
    assert text.count("the training goes on") == 2
    assert f"pushed 0 of 2 checkpoints to {hub.url}/{NAME}, 2 failed: " in text
    if isinstance(fault, int):
        assert str(fault) in text.splitlines()[-1]
    else:
        assert "Error" in text or "Timeout" in text
    tries = 1 if fault == 403 else hub_upload.MAX_TRIES  # a refusal is final
    assert hub.count("commit") == 2 * tries
    assert commit_messages(hub) == [] and hub.token not in text
    assert not staging_directories(config)


@pytest.mark.system
def test_the_command_in_the_message_uploads_a_lost_checkpoint(
    hub: Hub, config: Config, capfd: pytest.CaptureFixture, tmp_path: Path
):
    uploader = HubUploader(config)
    hub.fail("commit", 500, times=1000)
    uploader.push(final(config), 3, "step 3")
    uploader.close(30)
    hub.heal()
    words = shlex.split(capfd.readouterr().err.rpartition("By hand: ")[2])
    assert words[0] == "hf"
    command = [str(Path(sys.executable).parent / "hf"), *words[1:]]
    environment = hub.environment(tmp_path)
    upload = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert upload.returncode == 0, upload.stderr
    files = [file for file in final(config).iterdir() if file.name not in LOCAL_FILES]
    assert uploaded_files(hub) == {file.name: file.read_bytes() for file in files}


def test_a_later_checkpoint_makes_up_for_a_lost_one(
    hub: Hub, config: Config, capfd: pytest.CaptureFixture
):
    uploader = HubUploader(config)
    hub.fail("commit", 403)
    uploader.push(final(config), 2, "step 2")
    wait_until(lambda: uploader.last_error)
    # nothing to link: not fatal either
    uploader.push(Path(config.output_dir) / "checkpoint-that-does-not-exist", 3, "step 3")
    uploader.push(final(config), 4, "step 4")
    uploader.close(30)
    text = capfd.readouterr().err
    assert commit_messages(hub) == ["step 4"]
    assert "pushed 1 of 3 checkpoints" in text and "2 failed" in text and "By hand" not in text


HANGING_UPLOAD = """
import sys
from pathlib import Path
from minilora.config import Config
from minilora.tracking.hub_upload import HubUploader

config = Config(output_dir=sys.argv[1], method="full")
config.hub.push, config.hub.repo_id = True, "tester/adapter"
uploader = HubUploader(config)
uploader.push(Path(sys.argv[1]) / "checkpoint-final", 3, "step 3")
uploader.close(2)
print("out")
"""


@pytest.mark.system
def test_a_process_ends_although_the_server_hangs(hub: Hub, config: Config, tmp_path: Path):
    """With two large files, which the client by itself would send from a pool of threads."""
    shutil.copy(final(config) / "adapter_model.safetensors", final(config) / "model.safetensors")
    hub.fail("lfs-upload", "hang", times=100)
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HANGING_UPLOAD, config.output_dir],
        cwd=ROOT,
        env=hub.environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (done.returncode, done.stdout) == (0, "out\n"), done.stderr
    assert time.monotonic() - start < 40  # not the 60 seconds of a request
    assert hub.count("lfs-upload") >= 1
    assert "1 failed: not done after 2 s. By hand: hf upload" in done.stderr
    assert hub.token not in done.stderr


def test_the_token_is_nowhere(
    hub: Hub, config: Config, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
):
    """Not even where a server repeats it in an error, as this one does."""
    uploader = HubUploader(config)
    hub.fail("preupload", 500, 2)
    hub.fail("commit", 403)
    uploader.push(final(config), 2, "step 2")
    wait_until(lambda: uploader.last_error)
    assert "you sent" in uploader.last_error
    uploader.push(final(config), 3, "step 3")
    uploader.close(30)

    sent = []
    for headers in hub.headers:
        sent += [value for name, value in headers.items() if name.lower() == "authorization"]
    assert any(hub.token in value for value in sent)
    captured = capfd.readouterr()
    shown = captured.err + captured.out + caplog.text + repr(config) + uploader.last_error
    secret = hub.token.removeprefix("hf_test_")
    assert secret not in shown
    for file in Path(config.output_dir).rglob("*"):
        assert not file.is_file() or secret.encode() not in file.read_bytes(), file
    assert not any(secret.encode() in data for data in hub.repos[NAME].files.values())


# --- runs that push


@pytest.mark.parametrize("is_broken", [False, True])
def test_a_run_pushes_its_checkpoints(
    hub: Hub, run: Config, tmp_path: Path, capfd: pytest.CaptureFixture, is_broken: bool
):
    """An upload that fails is a warning, and the run is what it would have been without it."""
    settings = {
        "eval__eval_steps": 2,
        "train__max_steps": 3,
        "train__save_total_limit": 1,
        "train__save_steps": 1,
        "hub__push": True,
        "hub__repo_id": NAME,
    }
    config = tiny_runs.config(tmp_path, Path(run.model.name), rows=8, **settings)
    if is_broken:
        hub.fail("*", 500, times=10_000)
    assert train.main(config) == 0
    text = capfd.readouterr().err
    assert tiny_runs.losses(config) == tiny_runs.losses(run)
    assert not staging_directories(config) and hub.token not in text
    for file in Path(config.output_dir).rglob("*"):
        assert not file.is_file() or hub.token.encode() not in file.read_bytes()
    if is_broken:
        assert hub.repos == {}
        assert "pushed 0 of 3" in text and "500" in text and "By hand: hf upload" in text
    else:
        assert re.match(r"step 3\b", commit_messages(hub)[-1])
        assert uploaded_files(hub) == uploadable_files(final(config))


def test_a_run_without_a_token_stops_before_it_writes(
    hub: Hub, run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("HF_TOKEN")
    push = {"hub__push": True, "hub__repo_id": NAME}
    config = tiny_runs.config(tmp_path, Path(run.model.name), rows=8, **push)
    with pytest.raises(UserError, match="HF_TOKEN"):
        train.main(config)
    assert not Path(config.output_dir).exists()
