"""Models and datasets fetched by their ids from a hub that may break; with the real client."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch

import minilora
import train
from helpers import tiny_runs
from helpers.hub_runs import final, finished_run, uploadable_files
from helpers.hub_server import Hub, running_hub
from minilora.config import Config
from minilora.data.sources import data_files, read_lines
from minilora.errors import UserError
from minilora.hub import resolve


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub(monkeypatch, tmp_path / "hf") as hub:
        yield hub


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return finished_run(tmp_path_factory.mktemp("run"))


def files_in(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def make_downloads_impatient(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT", "DEFAULT_ETAG_TIMEOUT"):
        monkeypatch.setattr(huggingface_hub.constants, name, seconds)


# --- models


@pytest.fixture
def base(run: Config, hub: Hub) -> dict[str, bytes]:
    """Put a base model on the hub as tester/base, in two versions.

    The first one, v0, has another generation_config.json, and files that are never fetched.

    Returns:
        The files of v1.
    """
    files = files_in(Path(run.model.name))
    never_fetched = {
        "README.md": b"# base",
        "pytorch_model.bin": b"a pickle",
        "modeling.py": b"raise SystemExit",
    }
    old = {**files, **never_fetched, "generation_config.json": b'{"old": 1}'}
    hub.add("tester/base", old, tags=["v0"])
    hub.add("tester/base", files, tags=["v1"])
    return files


def test_a_model_at_any_revision(hub: Hub, base: dict[str, bytes]):
    old = {**base, "generation_config.json": b'{"old": 1}'}
    refs = hub.repos["tester/base"].refs
    refs["feature/x"] = refs["v0"]
    revisions = {None: base, "v0": old, "main": base, refs["v0"]: old, "feature/x": old}
    for revision, files in revisions.items():
        assert files_in(resolve("tester/base", revision)) == files  # no pickle, no code
    with pytest.raises(UserError, match=r"tester/base.*404"):
        resolve("tester/base", "v9")


def test_a_revision_in_the_name(hub: Hub, base: dict[str, bytes]):
    directory = resolve("tester/base@v0")
    assert (directory / "generation_config.json").read_bytes() == b'{"old": 1}'


def test_a_private_model_needs_a_token(
    hub: Hub, base: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    hub.repos["tester/base"].private = True
    assert resolve("tester/base").is_dir()
    hub.connect(monkeypatch, tmp_path / "other", None)
    with pytest.raises(UserError, match="401"):
        resolve("tester/base")
    with pytest.raises(UserError, match=r"401|404"):
        resolve("tester/nothing")


def test_load_a_model_and_an_adapter_by_id(hub: Hub, base: dict[str, bytes], run: Config):
    hub.add("tester/adapter", uploadable_files(final(run)))
    model, _ = minilora.load("tester/base", adapter="tester/adapter")
    local, tokenizer = minilora.load(str(final(run)))
    plain, _ = minilora.load("tester/base")
    ids = torch.tensor(tokenizer.encode("Title: Topic 1").ids)
    expected = local(ids, lengths=[len(ids)])
    assert torch.equal(model(ids, lengths=[len(ids)]), expected)
    assert not torch.equal(plain(ids, lengths=[len(ids)]), expected)


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
def test_a_download_goes_on_after_a_fault(
    hub: Hub, base: dict[str, bytes], monkeypatch, kind: str, fault: int | str, times: int
):
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # kept of a broken answer
    hub.fail(kind, fault, times)
    assert files_in(resolve("tester/base")) == base
    assert all(times_left == 0 for _, _, times_left in hub.faults)
    if fault == "cut":  # resumed
        names = {name.lower() for headers in hub.headers for name in headers}
        assert "range" in names


@pytest.mark.parametrize("fault", [500, 404, "reset", "cut", "hang"])
@pytest.mark.parametrize("kind", ["info", "tree", "resolve", "store"])
def test_a_model_that_cannot_be_fetched(
    hub: Hub, base: dict[str, bytes], monkeypatch, kind: str, fault: int | str
):
    make_downloads_impatient(monkeypatch, 0.3)
    hub.hang_seconds = 0.6
    hub.fail(kind, fault, times=10_000)
    with pytest.raises(UserError, match="tester/base") as error:
        resolve("tester/base")
    assert hub.token not in str(error.value)
    if isinstance(fault, int):
        assert str(fault) in str(error.value)
    hub.fail("*", 500, times=10_000)
    with pytest.raises(UserError, match="tester/base"):  # the cache is not taken for complete
        resolve("tester/base")
    hub.heal()
    assert files_in(resolve("tester/base")) == base


def test_the_error_names_the_cause(hub: Hub, base: dict[str, bytes]):
    hub.fail("resolve", 500, times=10_000)
    with pytest.raises(UserError, match="500"):
        resolve("tester/base")


@pytest.mark.parametrize("kind", ["info", "tree"])
def test_a_hub_that_hangs_is_given_up(
    hub: Hub, base: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, kind: str
):
    monkeypatch.setattr("minilora.hub.TIMEOUT", 0.2)
    hub.hang_seconds = 3.5 if kind == "info" else 0.7  # the client asks for a tree six times
    hub.fail(kind, "hang", times=100)
    start = time.monotonic()
    with pytest.raises(UserError, match="tester/base"):
        resolve("tester/base")
    assert time.monotonic() - start < 3.0


# --- datasets


def rows_as_json(first: int, count: int) -> bytes:
    lines = []
    for i in range(first, first + count):
        lines.append(json.dumps({"prompt": f"question {i}", "completion": f"answer {i}"}) + "\n")
    return "".join(lines).encode()


@pytest.fixture
def datasets(hub: Hub) -> Hub:
    shards = {f"data/train-0000{i}-of-00002.jsonl": rows_as_json(10 * i, 10) for i in range(2)}
    test_file = {"data/test-00000-of-00001.jsonl": rows_as_json(100, 3)}
    script = {"script.py": b"raise SystemExit"}
    hub.add("datasets/tester/split", {**shards, **test_file, **script}, tags=["v1"])
    other_shard = {"data/train-00001-of-00002.jsonl": rows_as_json(50, 4)}
    hub.add("datasets/tester/split", {**shards, **other_shard}, tags=["v2"])
    hub.add("datasets/tester/plain", {"rows.jsonl": rows_as_json(0, 5), "README.md": b"rows"})
    subsets = {
        "en/train.jsonl": rows_as_json(0, 5),
        "ko/train.jsonl": rows_as_json(9, 2),
        "ko/dev.jsonl": rows_as_json(7, 1),
    }
    hub.add("datasets/tester/subsets", subsets)
    hub.add("datasets/tester/closed", {"train.jsonl": rows_as_json(0, 5)}, private=True)
    return hub


@pytest.mark.parametrize(
    ("name", "setting", "numbers"),
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
def test_a_dataset_by_id(datasets: Hub, name: str, setting: str, numbers: list[int]):
    rows = []
    for shown_name, path in data_files(name, setting):
        rows += [json.loads(line.content) for line in read_lines(shown_name, path)]
    assert [row["prompt"] for row in rows] == [f"question {i}" for i in numbers]
    fetched = [path for kind, path in datasets.requests if kind == "resolve"]
    assert not any("script" in path for path in fetched), "no code is fetched"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tester/absent", "404"),
        ("tester/split@v9", "404"),
        ("tester/plain:validation", "no validation file"),
        ("tester/subsets", r"tester/subsets:en/train\*\.jsonl or tester/subsets:ko"),
        ("tester/plain:*.csv", r"no \*\.csv file"),
    ],
)
def test_a_dataset_that_cannot_be_had(datasets: Hub, name: str, message: str):
    with pytest.raises(UserError, match=rf"data\.train_file: .*{message}"):
        data_files(name, "train_file")


@pytest.mark.parametrize("fault", [500, "hang", "reset", "cut"])
def test_a_dataset_behind_a_broken_server(
    datasets: Hub, monkeypatch: pytest.MonkeyPatch, fault: int | str
):
    make_downloads_impatient(monkeypatch, 0.3)
    datasets.hang_seconds = 0.6
    datasets.fail("*", fault, times=10_000)
    message = (
        r"data\.train_file: 'tester/plain' is not a file, and tester/plain could not be fetched"
    )
    with pytest.raises(UserError, match=message):
        data_files("tester/plain", "train_file")
    datasets.heal()
    ((_, path),) = data_files("tester/plain", "train_file")
    assert path.read_bytes() == rows_as_json(0, 5)


# --- everything in one run


def test_a_run_on_a_base_an_adapter_and_rows_from_the_hub(
    datasets: Hub,
    base: dict[str, bytes],
    run: Config,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
):
    """Each of them at a revision."""
    datasets.add("tester/adapter", uploadable_files(final(run)), tags=["best"])
    config = tiny_runs.config(tmp_path, Path("unused"), train__max_steps=2, eval__eval_steps=2)
    config.model.name = "tester/base@v1"
    config.lora.init_from = "tester/adapter@best"
    config.data.format = "prompt"
    config.data.train_file = ("tester/split@v1", "tester/plain")
    config.data.eval_file = "tester/split@v1:test"
    config.data.train_weights = (0.5, 2.0)
    assert train.main(config) == 0
    text = capsys.readouterr().err
    assert "tester/split@v1, tester/plain: 25 lines read, 25 kept" in text
    assert "20 documents, 2 steps" in text
    written = json.loads((final(config) / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "tester/base"
    assert written["revision"] == "v1"
