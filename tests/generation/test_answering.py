"""Jobs that go on: what may change between two commands, and what is refused."""

import itertools
import json
import math
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

import infer
import minilora
from helpers.asking import (
    ARTICLES,
    NEW_TOKENS,
    SHORT,
    answer_file,
    article_of,
    ask,
    infer_args,
    read_rows,
    train_adapter,
    user,
    write_base,
    write_rows,
)
from helpers.checkpoints import names
from minilora import loading
from minilora.config import DataConfig
from minilora.errors import UserError
from minilora.generation import engine

ROWS: list[dict] = [{"id": f"질문 {i}", "title": f"t{i} 서울", "abstract": "x"} for i in range(6)]
SAMPLED: dict = {"temperature": 0.7, "max_new_tokens": 8, "stop": ()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base("llama3", tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def checkpoint(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train an adapter on articles."""
    return train_adapter(base, tmp_path_factory.mktemp("runs") / "run", DataConfig(), ARTICLES)


@dataclass
class FinishedJob:
    """A job over ROWS that has ended."""

    model: Path
    source: Path
    target: Path
    data: bytes = b""
    """What it wrote."""

    def go_on(self, rows: list[dict] = ROWS, **options) -> bytes:
        """Run the command again, perhaps with other rows or options; returns the output."""
        write_rows(self.source, rows)
        return answer_file(self.model, self.source, self.target, **SAMPLED | options)


@pytest.fixture
def job(checkpoint: Path, tmp_path: Path) -> FinishedJob:
    job = FinishedJob(checkpoint, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    job.data = job.go_on()
    return job


# --- torn, complete and partial outputs ---


def test_a_torn_line_is_answered_again(job: FinishedJob, capsys: pytest.CaptureFixture[str]):
    """Wherever it is cut, also within a character."""
    last_line = job.data.splitlines(keepends=True)[-1]
    inside_character = len(job.data) - 1
    while job.data[inside_character] & 0xC0 != 0x80:  # the byte begins a character
        inside_character -= 1

    for kept in (len(job.data) - 1, inside_character, len(job.data) - len(last_line) + 1, 1):
        left = job.data[:kept]
        job.target.write_bytes(left)
        capsys.readouterr()
        assert job.go_on() == job.data
        num_torn = kept - (left.rfind(b"\n") + 1)
        said = capsys.readouterr().err
        assert f"{job.target}: the last line is torn ({num_torn} bytes)" in said
        assert kept == 1 or "5 of 6 answers are there already" in said


def test_a_finished_job_needs_no_model(
    job: FinishedJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(infer, "load_files", None)
    assert job.go_on(metrics=(), batch_size=3) == job.data
    assert "6 of 6 answers" in capsys.readouterr().err


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_another_batch_size_changes_nothing(batch_size: int, job: FinishedJob):
    lines = job.data.splitlines(keepends=True)
    job.target.write_bytes(lines[3] + lines[2])
    assert job.go_on(batch_size=batch_size) == job.data


def test_several_samples(checkpoint: Path, tmp_path: Path):
    """Keys are (id, sample); neither the batch nor a restart decides what the answers are."""
    source, target = write_rows(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    options = SAMPLED | {"num_samples": 3, "temperature": 1.0}
    data = answer_file(checkpoint, source, target, **options)
    rows = read_rows(target)
    keys = [(row["id"], row["sample"]) for row in rows]
    assert keys == [(row["id"], i) for row in ROWS for i in range(3)]
    assert len({row["generated"] for row in rows}) == 18

    small = answer_file(checkpoint, source, tmp_path / "small.jsonl", batch_size=1, **options)
    assert small == data
    some = random.Random(0).sample(data.splitlines(keepends=True), 7)
    target.write_bytes(b"".join(some) + data[:20])
    assert answer_file(checkpoint, source, target, batch_size=4, **options) == data


def test_max_time(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """By a clock that a pass of the model puts forward by a second."""
    rows = [{"id": f"r{i}", "title": f"t{i} 서울", "abstract": "x " * (i % 13)} for i in range(60)]
    source, target = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    options = {"temperature": 0.7, "max_new_tokens": 24}
    expected = answer_file(checkpoint, source, tmp_path / "undisturbed.jsonl", **options)
    for file in tmp_path.glob("undisturbed*"):
        file.unlink()

    def count_answers() -> int:
        return target.read_bytes().count(b"\n") if target.exists() else 0

    for limit in (1, 30, 30):
        seconds = itertools.count()
        clock = SimpleNamespace(monotonic=lambda seconds=seconds: next(seconds))
        monkeypatch.setattr(engine, "time", clock)
        before = count_answers()
        paths = {"input": str(source), "output": str(target)}
        capsys.readouterr()
        assert infer.main(infer_args(checkpoint, **paths, max_time=limit, **options)) == 0
        after = count_answers()
        if limit == 1:
            assert names(tmp_path) == ["in.jsonl"]
        else:
            assert before < after < len(rows)
        said = f"{after} of 60 answers: {target}; the same command goes on"
        assert said in capsys.readouterr().err
    order = [row["id"] for row in read_rows(target)]
    assert order == sorted(order, key=lambda name: int(name[1:]))
    monkeypatch.undo()
    assert answer_file(checkpoint, source, target, **options) == expected


def test_nothing_is_written_before_the_first_answer(checkpoint: Path, tmp_path: Path):
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    (broken / "adapter_model.safetensors").unlink()
    for model, last in ((broken, ROWS[5]), (checkpoint, {"title": "no abstract"})):
        source = write_rows(tmp_path / "in.jsonl", [*ROWS[:5], last])
        with pytest.raises(UserError):
            answer_file(model, source, tmp_path / "out.jsonl", **SAMPLED)
        assert names(tmp_path) == ["broken", "in.jsonl"]


# --- other settings, other models ---

OTHER = {
    "seed": 1,
    "temperature": 0.5,
    "max_new_tokens": 9,
    "top_p": 0.5,
    "top_k": 3,
    "repetition_penalty": 1.5,
    "stop": ("x",),
    "num_samples": 2,
    "raw": True,
    "dtype": "bfloat16",
    "bits": 4,
    "fold": False,
}


@pytest.mark.parametrize("name", OTHER)
def test_other_settings_are_refused(name: str, job: FinishedJob, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(infer, "load_files", None)  # before the model is loaded
    with pytest.raises(UserError, match=rf"other settings \({name}: "):
        job.go_on(**{name: OTHER[name]})
    assert job.target.read_bytes() == job.data


def test_settings_are_those_of_the_first_release(job: FinishedJob, checkpoint: Path, base: Path):
    """Outputs that older versions began must go on: names, order and values in the file count."""
    file = job.target.with_name("out.jsonl.settings.json")
    weights = [checkpoint / "adapter_model.safetensors", base / "model.safetensors"]
    *settings, (newest, _) = json.loads(file.read_text()).items()
    assert newest == "prompts"  # which outputs of older versions need not have
    assert settings == [
        ("model", str(checkpoint)),
        ("adapter", None),
        ("revision", None),
        ("max_new_tokens", 8),
        ("temperature", 0.7),
        ("top_p", None),
        ("top_k", 0),
        ("repetition_penalty", 1.0),
        ("stop", []),
        ("num_samples", 1),
        ("seed", 0),
        ("raw", False),
        ("dtype", "auto"),
        ("bits", None),
        ("fold", True),
        ("written", [weight.stat().st_mtime_ns for weight in weights]),
    ]


SHIFTS = {  # in nanoseconds
    "the adapter, anew": 10**9,
    "the adapter, an older one": -(10**15),
    "the base under it": 10**9,
}


@pytest.mark.parametrize("what", SHIFTS)
def test_another_model_is_refused(what: str, checkpoint: Path, base: Path, tmp_path: Path):
    """Also one that is written in place of the first."""
    copied_base = shutil.copytree(base, tmp_path / "base")
    model = shutil.copytree(checkpoint, tmp_path / "model")
    file = model / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"base_model_name_or_path": str(copied_base)}))
    source, target = write_rows(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    answer_file(model, source, target, **SAMPLED)
    with pytest.raises(UserError, match=r"other settings \(model: "):
        answer_file(checkpoint, source, target, **SAMPLED)

    weights = copied_base / "model.safetensors"
    if "adapter" in what:
        weights = model / "adapter_model.safetensors"
    stat = weights.stat()
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + SHIFTS[what]))
    with pytest.raises(UserError, match=r"other settings \(written: "):
        answer_file(model, source, target, **SAMPLED)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    answer_file(model, source, target, **SAMPLED)


# --- other rows ---


def test_rows_may_be_added(job: FinishedJob, tmp_path: Path):
    added = [{"id": "new", "title": "t", "abstract": "y"}, {"title": "without id", "abstract": ""}]
    data = job.go_on([*ROWS, *added])
    assert data.startswith(job.data)
    assert data == answer_file(job.model, job.source, tmp_path / "anew.jsonl", **SAMPLED)
    assert json.loads(data.splitlines()[-1])["id"] == 7, "its place"

    added[-1] = {"id": 7} | added[-1]
    first = {"id": "first", "title": "t", "abstract": "y"}
    rows = [first, *reversed([*ROWS, *added])]
    more = job.go_on(rows)
    ids = [json.loads(line)["id"] for line in more.splitlines()]
    assert ids == [row["id"] for row in rows]
    assert set(data.splitlines()) < set(more.splitlines())


def test_rows_may_not_change(job: FinishedJob):
    changes: dict[str, dict] = {
        "abstract changed": {"abstract": "y"},
        "note changed": {"note": 1},
        "is not in the input": {"id": "other"},
    }
    for message, change in changes.items():
        with pytest.raises(UserError, match=message) as error:
            job.go_on([*ROWS[:2], ROWS[2] | change, *ROWS[3:]])
        assert f"{job.target}:3" in str(error.value) or f"{job.source}:3" in str(error.value)
    for gone in (0, 5):
        with pytest.raises(UserError, match=rf"out\.jsonl:{gone + 1}: id .* is not in the input"):
            job.go_on(ROWS[:gone] + ROWS[gone + 1 :])
    assert job.target.read_bytes() == job.data


@pytest.mark.parametrize("note", ["n", None])
def test_a_column_may_not_go(note: object, job: FinishedJob):
    """Also if there is null in it."""
    job.target.unlink()
    job.go_on([row | {"note": note} for row in ROWS])
    with pytest.raises(UserError, match=r"in\.jsonl:1: note changed"):
        job.go_on()


def test_a_row_may_not_change_though_only_a_later_sample_is_there(job: FinishedJob):
    """Samples end in any order."""
    job.target.unlink()
    data = job.go_on(num_samples=2)
    job.target.write_bytes(data.splitlines(keepends=True)[1])
    with pytest.raises(UserError, match=r"in\.jsonl:1: abstract changed"):
        job.go_on([ROWS[0] | {"abstract": "y"}, *ROWS[1:]], num_samples=2)


COLUMNS: dict[str, dict] = {
    "an earlier answer": {"generated": "old"},
    "not a number": {"score": math.nan},
    "a sample": {"sample": 4},
}


@pytest.mark.parametrize("case", COLUMNS)
def test_columns_of_an_output_in_the_input_are_refused_or_no_trouble(case: str, job: FinishedJob):
    """They are never an error once the rows are answered, and the job goes on."""
    rows = [row | COLUMNS[case] for row in ROWS]
    job.target.unlink()
    job.target.with_name("out.jsonl.settings.json").unlink()
    try:
        data = job.go_on(rows)
    except UserError as error:
        assert "changed since" not in str(error)
        assert names(job.target.parent) == ["in.jsonl"]
        return
    lines = data.splitlines(keepends=True)
    assert len(lines) == len(ROWS)
    job.target.write_bytes(b"".join(lines[:3]))
    assert job.go_on(rows) == data


@pytest.mark.parametrize("ids", [("a", "a"), (1, None), (1.5, 2), ([], "a"), (True, 1)])
def test_ids_must_tell_rows_apart(ids: tuple, checkpoint: Path, tmp_path: Path):
    """A row without an id gets its place: None stands for that, at place 1."""
    rows = []
    for row_id in ids:
        row: dict = {"prompt": "x"}
        if row_id is not None:
            row["id"] = row_id
        rows.append(row)
    source = write_rows(tmp_path / "in.jsonl", rows)
    with pytest.raises(UserError, match=r'in\.jsonl:[12]: "id": '):
        answer_file(checkpoint, source, tmp_path / "out.jsonl")
    assert names(tmp_path) == ["in.jsonl"]


# --- the adapter ---


def test_an_adapter_beside_the_weights_says_the_same(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As one that is merged into 16- or 32-bit weights first."""
    real, num_merged = loading.merge_adapters, 0

    def counting(model):
        nonlocal num_merged
        num_merged += 1
        real(model)

    monkeypatch.setattr(loading, "merge_adapters", counting)
    for options in (SHORT, SHORT | {"temperature": 1.0}):
        merged = ask(checkpoint, ROWS, tmp_path, **options)
        assert merged == ask(checkpoint, ROWS, tmp_path, fold=False, **options)
    assert num_merged == 2


@pytest.mark.parametrize("trained_bits", [16, 4, 8])
def test_no_adapter_is_merged_into_quantized_weights(
    trained_bits: int, checkpoint: Path, tmp_path: Path
):
    """Whether they are asked for, or the adapter was trained over such weights."""
    directory = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    record = json.loads((directory / "minilora.json").read_text())
    record["model"]["bits"] = trained_bits  # as such a run leaves it
    (directory / "minilora.json").write_text(json.dumps(record))

    bits = 4 if trained_bits == 16 else trained_bits
    model, tokenizer = minilora.load(str(checkpoint), bits=bits)
    prompts = [tokenizer.render(user(article_of(row)), add_generation_prompt=True) for row in ROWS]
    expected = minilora.generate(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS)

    def answers(asked: Path, **options) -> list[str]:
        return [row["generated"] for row in ask(asked, ROWS, tmp_path, **options)]

    assert answers(checkpoint) != expected
    if trained_bits == 16:
        assert answers(directory, bits=bits) == expected
        assert answers(directory, bits=bits, fold=False) == expected
    else:
        assert answers(directory) == expected


def test_the_wrong_base_and_too_long_prompts_are_told(
    checkpoint: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = shutil.copytree(base, tmp_path / "other")
    rows = [ROWS[0], {**ROWS[1], "abstract": "long " * 3000}]
    source = write_rows(tmp_path / "in.jsonl", rows)
    answer_file(other, source, tmp_path / "out.jsonl", adapter=str(checkpoint), **SHORT)
    said = capsys.readouterr().err
    assert f"was trained over {base}" in said and "the longest prompt has" in said


# --- outputs ---


def test_an_output_that_is_a_link_stays_one(checkpoint: Path, tmp_path: Path):
    source, link = write_rows(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    real = tmp_path / "elsewhere" / "real.jsonl"
    real.parent.mkdir()
    link.symlink_to(real)
    answer_file(checkpoint, source, link, **SHORT)
    assert link.is_symlink() and len(read_rows(real)) == len(ROWS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "/dev/null"}, "not a regular file"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty"),
        ({"max_time": float("nan")}, "max_time"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"input": "empty.jsonl"}, "no rows"),
    ],
)
def test_odd_arguments_are_refused(
    changes: dict, message: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "in.jsonl", ROWS)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    options = {"input": "in.jsonl", "output": "out.jsonl", **changes}
    with pytest.raises(UserError, match=message):
        infer.main(infer_args(checkpoint, **options))
    assert names(tmp_path) == ["empty.jsonl", "in.jsonl"]
