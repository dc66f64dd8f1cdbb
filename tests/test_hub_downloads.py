"""Models and datasets fetched by their ids from a hub that may break; with the real client."""

import copy
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

import merge
import minilora
import train
from helpers import tiny_runs
from helpers.hub_runs import final, finished_run, uploadable_files
from helpers.hub_server import Hub, running_hub
from minilora.config import Config
from minilora.data.sources import data_files, read_lines
from minilora.data.tokenizer import Tokenizer
from minilora.errors import UserError
from minilora.hub import resolve
from minilora.loading import find_model, load_files
from minilora.tracking.model_card import model_card


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


# --- models and adapters at revisions


@pytest.fixture
def adapters(hub: Hub, base: dict[str, bytes], run: Config) -> Hub:
    """Put the run's adapter on the hub as tester/adapter: v0 after two steps, main after three."""
    earlier = Path(run.output_dir) / "checkpoint-2"
    hub.add("tester/adapter", uploadable_files(earlier), tags=["v0"])
    hub.add("tester/adapter", uploadable_files(final(run)), tags=["v1"])
    return hub


def logits(*args, **settings) -> torch.Tensor:
    """Return the logits of the model that `find_model` finds, on some tokens."""
    files = find_model(*args, **settings)
    ids = Tokenizer(files.tokenizer).encode("Title: Topic 1").ids
    return load_files(files)(torch.tensor(ids))


def test_each_revision_is_that_of_its_own_repository(adapters: Hub, run: Config):
    """Of a model: `revision`; of an adapter: `adapter_revision`; in either name: @REVISION."""
    v0, v1 = logits(str(Path(run.output_dir) / "checkpoint-2")), logits(str(final(run)))
    assert not torch.equal(v0, v1)
    base = run.model.name
    assert torch.equal(logits(base, "tester/adapter"), v1)
    assert torch.equal(logits(base, "tester/adapter", adapter_revision="v0"), v0)
    assert torch.equal(logits(base, "tester/adapter@v0"), v0)
    both = {"revision": "v1", "adapter_revision": "v0"}
    assert torch.equal(logits("tester/base", "tester/adapter", **both), v0)
    assert torch.equal(logits("tester/base@v1", "tester/adapter@v0", **both), v0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"revision": "v0"}, "^revision 'v0' belongs .* is a directory: leave it out"),
        ({"adapter_revision": "v9"}, r"tester/adapter.*404"),
        ({"adapter": "tester/adapter@v1", "adapter_revision": "v0"}, "^adapter_revision 'v0' con"),
        ({"adapter": None, "adapter_revision": "v0"}, "adapter_revision is given, but no adapter"),
        ({"adapter": "{checkpoint}", "adapter_revision": "v0"}, "^adapter_revision 'v0' belongs"),
        ({"name": "tester/base@v1", "revision": "v0"}, "^revision 'v0' contradicts"),
    ],
)
def test_a_revision_that_would_be_ignored(
    adapters: Hub, run: Config, settings: dict[str, str | None], message: str
):
    arguments: dict[str, Any] = {"name": run.model.name, "adapter": "tester/adapter"}
    arguments.update(settings)
    if arguments["adapter"] == "{checkpoint}":
        arguments["adapter"] = str(final(run))
    with pytest.raises(UserError, match=message):
        find_model(**arguments)


def test_a_revision_in_an_adapter_over_a_directory_means_nothing(run: Config, tmp_path: Path):
    """Files of other programs name one."""
    adapter = tmp_path / "adapter"
    shutil.copytree(final(run), adapter)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "revision": "main"}))
    assert torch.equal(logits(str(adapter)), logits(str(final(run))))


def test_an_adapter_over_a_directory_of_another_machine(
    adapters: Hub, run: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """It is an error, or where a directory has the same name by chance, it is said."""
    message = "'the-base': no such directory.*the base of the adapter tester/adapter"
    with pytest.raises(UserError, match=message):
        minilora.load("tester/adapter")
    base = Path(run.model.name)
    monkeypatch.chdir(base.parent)
    capsys.readouterr()
    assert torch.equal(logits("tester/adapter"), logits(str(final(run))))
    note = f"note: the base of tester/adapter is taken to be the directory {base}\n"
    assert capsys.readouterr().err.count(note) == 1


def test_training_on_a_directory_at_a_revision(run: Config, tmp_path: Path):
    config = copy.deepcopy(run)
    config.output_dir, config.model.revision = str(tmp_path / "out"), "v2"
    config.data.train_file = "a file that does not exist"
    with pytest.raises(UserError, match=r"model\.revision 'v2' belongs to a repository"):
        train.main(config)
    assert not (tmp_path / "out").exists()


def test_merge_an_adapter_and_a_base_by_their_ids(adapters: Hub, run: Config, tmp_path: Path):
    """At revisions, too. The merged model keeps the form of the prompts."""
    out = tmp_path / "merged"
    args = merge.Args("tester/adapter@v0", base="tester/base@v1", out=str(out), dtype="float32")
    assert merge.main(args) == 0
    expected = logits(str(Path(run.output_dir) / "checkpoint-2"))
    torch.testing.assert_close(logits(str(out)), expected, rtol=0, atol=1e-4)
    recorded = json.loads((out / "minilora.json").read_text())
    assert recorded == json.loads(adapters.repos["tester/adapter"].files["minilora.json"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"out": None}, "tester/adapter is not a directory; an adapter on the hub needs --out"),
        ({}, r"'the-base'.*--base names another"),
        ({"base": "{base}@v1"}, "'@v1' in .* belongs to a repository"),
        ({"checkpoint": "{checkpoint}@v1"}, "'@v1' in .* belongs to a repository"),
        ({"base": "tester/base@v9"}, "tester/base.*404"),
        ({"checkpoint": "tester/base"}, "tester/base is not an adapter.*whole model already"),
    ],
)
def test_merge_refuses_what_it_cannot_find(
    adapters: Hub, run: Config, tmp_path: Path, settings: dict[str, str | None], message: str
):
    out = str(tmp_path / "merged")
    arguments: dict[str, Any] = {"checkpoint": "tester/adapter", "out": out, **settings}
    for name, value in arguments.items():
        if value:
            arguments[name] = value.format(base=run.model.name, checkpoint=final(run))
    with pytest.raises(UserError, match=message):
        merge.main(merge.Args(**arguments))
    assert not (tmp_path / "merged").exists()


# --- faults


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
        ("tester/subsets", r"tester/subsets:en/train\.jsonl or tester/subsets:ko"),
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
    card = model_card(config, final(config), [], step=2)
    assert "over tester/base (revision v1)" in card
    assert r"| lora.init\_from | tester/adapter (revision best) |" in card
