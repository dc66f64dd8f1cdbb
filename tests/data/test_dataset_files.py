"""The files that a setting takes of a dataset on the hub, or of a directory."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from minilora.data.sources import data_files
from minilora.errors import UserError

# ---- datasets of the hub, here directories; test_hub_upload.py has tests with the real client

TRAIN_0, TRAIN_1, TEST_0 = (
    f"data/{shard}-of-00002.parquet" for shard in ("train-00000", "train-00001", "test-00000")
)
REPOSITORIES = {
    "shards": [TRAIN_0, TRAIN_1, TEST_0, "README.md"],
    "plain": [
        "train.jsonl",
        "validation.jsonl",
        "test.jsonl",
        "constraints.jsonl",
        "dataset_infos.json",
    ],
    "one": ["data.csv", "README.md"],
    "configs": [
        "main/train-00000-of-00001.parquet",
        "main/test-00000-of-00001.parquet",
        "socratic/train-00000-of-00001.parquet",
        "socratic/test-00000-of-00001.parquet",
    ],
    "folders": ["train/0.jsonl", "train/1.jsonl", "test/0.jsonl"],
    "zipped": ["en/train.jsonl.gz", "de/train.jsonl.gz"],
    "Kaggle": ["Train.csv", "Test.csv"],
    "held out": ["data.jsonl", "test.jsonl"],
    "near": ["constraints.jsonl", "latest.jsonl"],
    "val": ["train.jsonl", "val.jsonl"],
    "kinds": ["train.jsonl", "train.parquet"],
    "text": ["train.txt"],
    "nested": ["a.jsonl", "old/a.jsonl", "old/b/c.jsonl"],
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`hub(layout)` gives every dataset those files; it returns what was asked for."""

    def serve(layout: str) -> list[tuple]:
        store, snapshot = tmp_path / "store" / layout, tmp_path / "snapshot" / layout
        asked: list[tuple] = []
        for name in REPOSITORIES[layout]:
            (store / name).parent.mkdir(parents=True, exist_ok=True)
            (store / name).write_text(json.dumps({"prompt": name, "completion": "c"}) + "\n")

        def snapshot_download(repository, *, repo_type, revision, allow_patterns):
            asked.append((repository, repo_type, revision))
            names = filter_repo_objects(REPOSITORIES[layout], allow_patterns=allow_patterns)
            for name in names:
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(store / name, snapshot / name)
            return str(snapshot)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return asked

    return serve


FOUND = pytest.mark.parametrize(
    ("layout", "name", "setting", "files"),
    [
        ("shards", "o/n", "train_file", [TRAIN_0, TRAIN_1]),
        ("shards", "o/n", "eval_file", [TEST_0]),
        ("shards", "o/n", "input", [TEST_0]),
        ("shards", "o/n:test", "train_file", [TEST_0]),
        ("shards", "o/n:data/train-00001*", "train_file", [TRAIN_1]),
        ("nested", "o/n:*.jsonl", "train_file", ["a.jsonl"]),
        ("nested", "o/n:old/*.jsonl", "train_file", ["old/a.jsonl"]),
        ("nested", "o/n:./*/b/*", "train_file", ["old/b/c.jsonl"]),
        ("nested", "o/n:**/a.jsonl", "train_file", ["a.jsonl", "old/a.jsonl"]),
        ("nested", "o/n:old/**", "train_file", ["old/a.jsonl", "old/b/c.jsonl"]),
        ("nested", "o/n:old/**/b/**/c*", "train_file", ["old/b/c.jsonl"]),
        ("plain", "o/n", "train_file", ["train.jsonl"]),
        ("plain", "o/n", "eval_file", ["validation.jsonl"]),
        ("plain", "o/n:test", "eval_file", ["test.jsonl"]),
        ("plain", "o/n:constraints.jsonl", "train_file", ["constraints.jsonl"]),
        ("one", "o/n", "train_file", ["data.csv"]),
        ("configs", "o/n:main/train*", "train_file", ["main/train-00000-of-00001.parquet"]),
        ("configs", "o/n:socratic/test*", "eval_file", ["socratic/test-00000-of-00001.parquet"]),
        ("folders", "o/n", "train_file", ["train/0.jsonl", "train/1.jsonl"]),
        ("folders", "o/n", "eval_file", ["test/0.jsonl"]),
        ("zipped", "o/n:en", "train_file", ["en/train.jsonl.gz"]),
        ("val", "o/n", "train_file", ["train.jsonl"]),
        ("val", "o/n:val", "eval_file", ["val.jsonl"]),
    ],
)


@FOUND
def test_the_files_of_a_dataset(layout: str, name: str, setting: str, files: list[str], hub):
    asked = hub(layout)
    for again in range(2):  # with what the first call left in the cache
        found = data_files(name, setting)
        assert [shown for shown, _ in found] == [f"o/n/{file}" for file in files], again
        assert [json.loads(path.read_text())["prompt"] for _, path in found] == files
    assert {*asked} == {("o/n", "dataset", None)}


def test_a_revision_may_have_slashes(hub):
    asked = hub("plain")
    for name in ("some-one/n.2@refs/convert/parquet", "some-one/n.2@v1.0:test"):
        data_files(name, "train_file")
    assert asked == [
        ("some-one/n.2", "dataset", "refs/convert/parquet"),
        ("some-one/n.2", "dataset", "v1.0"),
    ]


MISSING = pytest.mark.parametrize(
    ("layout", "name", "setting", "message"),
    [
        ("configs", "o/n", "train_file", r"several sets.*o/n:main/\S+ or o/n:socratic/"),
        ("kinds", "o/n", "train_file", r"several sets.*o/n:train\.jsonl or o/n:train\.parquet"),
        ("one", "o/n", "eval_file", "no validation or .*test file"),
        ("one", "o/n:train", "train_file", "no train file"),
        ("near", "o/n:train", "train_file", "no train file"),
        ("near", "o/n", "eval_file", "no validation or .*test file"),
        ("text", "o/n", "train_file", r"no .*\.jsonl.*\.parquet"),
        ("shards", "o/n:data/dev*", "train_file", r"no data/dev\* file"),
        ("shards", "o/n:*.parquet", "train_file", r"no \*\.parquet file"),
    ],
)


@MISSING
def test_a_dataset_without_such_files(layout: str, name: str, setting: str, message: str, hub):
    hub(layout)
    with pytest.raises(UserError, match=rf"data\.{setting}: dataset o/n .*{message}"):
        data_files(name, setting)


@pytest.mark.parametrize("layout", ["configs", "zipped", "kinds"])
def test_the_choices_that_are_named_are_choices(layout: str, hub):
    """What the message says to write works, and holds no row of another split."""
    hub(layout)
    with pytest.raises(UserError) as error:
        data_files("o/n", "train_file")
    for choice in re.findall(r"o/n:\S+", str(error.value)):
        found = data_files(choice.rstrip(","), "train_file")
        assert all("train" in shown for shown, _ in found), choice


def test_the_choices_that_are_named_hold_one_set_each(hub):
    hub("nested")
    with pytest.raises(UserError) as error:
        data_files("o/n", "train_file")
    choices = re.findall(r"o/n:[^\s,]+", str(error.value))
    found = [[shown for shown, _ in data_files(choice, "train_file")] for choice in choices]
    assert sorted(found) == [[f"o/n/{name}"] for name in REPOSITORIES["nested"]]


@pytest.mark.parametrize("layout", ["Kaggle", "held out"])
def test_no_test_file_is_trained_on_unasked(layout: str, hub):
    hub(layout)
    found = [shown for shown, _ in data_files("o/n", "train_file")]
    assert found == [f"o/n/{REPOSITORIES[layout][0]}"]


# ---- directories, which are read like datasets


def write_layout(directory: Path, layout: str) -> None:
    """Write the files of a layout, each with one row that says its name, and hidden ones."""
    for name in (*REPOSITORIES[layout], ".cache/train.jsonl", "._train.jsonl"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(json.dumps({"prompt": name, "completion": "c"}) + "\n")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where the hub is asked."""

    def snapshot_download(*arguments, **options):
        pytest.fail("asked the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


@FOUND
def test_the_files_of_a_directory(layout, name, setting, files, offline, tmp_path, monkeypatch):
    write_layout(tmp_path / "o" / "n", layout)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for directory in ("o/n", "./o/n", str(tmp_path / "o/n"), "~/o/n"):
        found = data_files(name.replace("o/n", directory), setting)
        shown = directory.removeprefix("./")
        assert [name for name, _ in found] == [f"{shown}/{file}" for file in files], directory
        assert [json.loads(path.read_text())["prompt"] for _, path in found] == files


@MISSING
def test_a_directory_without_such_files(layout, name, setting, message, offline, tmp_path):
    write_layout(tmp_path / "n", layout)
    name = name.replace("o/n", str(tmp_path / "n"))
    message = message.replace("o/n", re.escape(str(tmp_path / "n")))
    with pytest.raises(UserError, match=rf"data\.{setting}: directory \S+/n .*{message}") as error:
        data_files(name, setting)
    if "several" not in message:
        assert f"{tmp_path / 'n'}/*.jsonl" in str(error.value), "says what would do"


def test_a_directory_whose_files_tell_no_split(offline, tmp_path):
    directory = tmp_path / "rows"
    for name in ("part-1.jsonl", "part-0.jsonl", "notes.md"):
        directory.mkdir(exist_ok=True)
        (directory / name).write_text("{}\n")
    found = data_files(f"{directory}/", "train_file")
    assert [path.name for _, path in found] == ["part-0.jsonl", "part-1.jsonl"]
    with pytest.raises(UserError, match=r"no validation or test file"):
        data_files(str(directory), "eval_file")


def test_the_files_of_a_directory_that_are_left_out_are_named(
    offline, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "two"
    directory.mkdir()
    for name in ("train_extra.jsonl", "faq.jsonl", "notes.md"):
        (directory / name).write_text("{}\n")
    data_files("two", "train_file")
    assert capsys.readouterr().err == (
        "data.train_file two: train_extra.jsonl; not used: faq.jsonl\n"
    )

    data_files("two:*.jsonl", "train_file")
    assert capsys.readouterr().err == "", "a glob says itself what it takes"

    for number in range(7):
        (directory / f"faq{number}.jsonl").write_text("{}\n")
    data_files("two/", "train_file")
    left_out = "faq.jsonl, faq0.jsonl, faq1.jsonl, faq2.jsonl, faq3.jsonl and 3 more"
    assert capsys.readouterr().err == (
        f"data.train_file two: train_extra.jsonl; not used: {left_out}\n"
    )
    (directory / "train_extra.jsonl").unlink()
    data_files("two", "train_file")
    assert "not used" not in capsys.readouterr().err
