"""infer.py on runs of ours, merged models and plain directories, and what it refuses.

The answers are those of transformers and PEFT to the very prompt that the model was trained with,
in each format.
"""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

import infer
import merge
import minilora
import train
from helpers.asking import (
    ARTICLES,
    FORMATS,
    NEW_TOKENS,
    SHORT,
    TEXT,
    answer_file,
    article_of,
    ask,
    infer_args,
    read_rows,
    short_training,
    train_adapter,
    transformers_answer,
    user,
    write_base,
    write_rows,
)
from helpers.hub_server import running_hub
from minilora.config import DataConfig, ModelConfig
from minilora.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base("llama3", tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def checkpoint(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train an adapter on articles."""
    return train_adapter(base, tmp_path_factory.mktemp("runs") / "run", DataConfig(), ARTICLES)


@pytest.fixture(scope="module")
def checkpoints(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    runs = tmp_path_factory.mktemp("checkpoints")
    names = ("paths", "prompt", "messages", "text")
    return {
        name: train_adapter(base, runs / name, FORMATS[name].data, FORMATS[name].rows)
        for name in names
    }


def ask_text(model: Path, tmp_path: Path, **options) -> str:
    """Return the answer of infer.py to TEXT in a file."""
    (row,) = ask(model, [{"prompt": TEXT}], tmp_path, **options)
    return row["generated"]


# --- in the form of training ---


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_asked_as_in_training(name: str, base: Path, tmp_path: Path):
    """The form is recorded in a checkpoint's trainer_state.json, or a merged minilora.json."""
    data, rows, asked = FORMATS[name]
    checkpoint = train_adapter(base, tmp_path / "run", data, rows)
    answers = [transformers_answer(checkpoint, asked(row)) for row in rows]
    assert len(set(answers)) > 1
    expected = [
        {"id": i, **row, "generated": answer}
        for i, (row, answer) in enumerate(zip(rows, answers, strict=True))
    ]
    assert ask(checkpoint, rows, tmp_path) == expected

    assert merge.main(merge.Args(str(checkpoint))) == 0
    merged = checkpoint / "merged"
    assert not (merged / "trainer_state.json").exists()
    assert [transformers_answer(merged, asked(row)) for row in rows] == answers
    assert ask(merged, rows, tmp_path) == expected
    assert ask(base, rows, tmp_path, adapter=str(checkpoint)) == expected


# what is typed for a model of each format, and what it is then asked
TYPED: dict[str, tuple[str, str | list[dict]]] = {
    "paths": (TEXT, user(TEXT)),
    "paths without chat": (TEXT, TEXT + "\n"),
    "paths in Mistral's form": (TEXT, user(TEXT)),
    "prompt": (json.dumps({"question": TEXT, "year": 7}), user(f"Q: {TEXT} (7)?")),
    "prompt without chat": (TEXT, f"Q: {TEXT}?\nA:"),
    "messages": (TEXT, user(TEXT)),
    "text": (TEXT, TEXT),
    "text without marker": (TEXT, TEXT),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_text_is_put_into_the_form_of_training(
    name: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """By --prompt, in a row of its own, and in Python; stdout holds the answer and nothing else."""
    data, rows, asked_by = FORMATS[name]
    checkpoint = train_adapter(base, tmp_path / "run", data, rows)
    typed, asked = TYPED[name]
    expected = transformers_answer(checkpoint, asked)
    capsys.readouterr()
    assert infer.main(infer_args(checkpoint, prompt=typed, **SHORT)) == 0
    out, err = capsys.readouterr()
    assert out == expected + "\n"
    assert ("note: the prompt lacks the response marker" in err) == (name == "text")
    (row,) = ask(checkpoint, [{"prompt": typed}], tmp_path)
    assert row["generated"] == expected

    # a row of the training format as JSON
    of_row = transformers_answer(checkpoint, asked_by(rows[0]))
    assert infer.main(infer_args(checkpoint, prompt=json.dumps(rows[0]), **SHORT)) == 0
    assert capsys.readouterr().out == of_row + "\n"

    model, tokenizer = minilora.load(str(checkpoint))
    prompts = [minilora.format_prompt(tokenizer, what) for what in (typed, rows[0])]
    answers = minilora.generate(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS)
    assert answers == [expected, of_row]


def test_a_text_for_several_columns_is_refused_before_the_model_is_loaded(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(infer, "load_files", None)
    for typed, missing in ((TEXT, "question, year"), ('{"question": "x"}', "year")):
        with pytest.raises(UserError, match=rf"columns question, year; missing: {missing}\."):
            infer.main(infer_args(checkpoints["prompt"], prompt=typed))


def test_the_form_of_a_config_with_several_formats(base: Path, tmp_path: Path):
    """A file of the table is asked in its own form, anything else as the trained model would be."""
    config = tmp_path / "c.yaml"
    config.write_text(
        "data:\n"
        "  train_file: [a.jsonl, b.jsonl]\n"
        "  file_formats:\n"
        "    a.jsonl: {format: prompt, prompt_template: 'A: {q}', chat: false}\n"
        "    b.jsonl: {format: prompt, prompt_template: 'B: {q}', chat: false}\n"
    )
    for source, expected in ((None, "A: {q}"), ("a.jsonl", "A: {q}"), ("b.jsonl", "B: {q}")):
        args = infer_args(base, config=str(config), input=source)
        assert infer.prepare(args).writer.data.prompt_template == expected


def test_raw_prompts(checkpoint: Path, tmp_path: Path):
    answer = ask_text(checkpoint, tmp_path, raw=True)
    assert answer == transformers_answer(checkpoint, TEXT)
    assert answer != transformers_answer(checkpoint, user(TEXT))
    with_bos = {"prompt": "<|begin_of_text|>" + TEXT}
    (row,) = ask(checkpoint, [with_bos], tmp_path, raw=True)
    assert row["generated"] == answer  # there is one BOS, not two


def test_models_that_are_not_ours(base: Path, tmp_path: Path):
    """They are asked in their own chat form; those without one are given the text itself."""
    assert ask_text(base, tmp_path) == transformers_answer(base, user(TEXT))
    without_template = write_base("llama2", tmp_path / "llama2")
    assert ask_text(without_template, tmp_path) == transformers_answer(without_template, TEXT)


def test_a_full_checkpoint(base: Path, tmp_path: Path):
    out, rows = tmp_path / "run", write_rows(tmp_path / "rows.jsonl", ARTICLES)
    config = short_training(
        output_dir=str(out),
        method="full",
        model=ModelConfig(name=str(base)),
        data=DataConfig(train_file=str(rows), chat_template="mistral"),
    )
    assert train.main(config) == 0
    final = out / "checkpoint-final"
    expected = [transformers_answer(final, user(article_of(row))) for row in ARTICLES]
    assert [row["generated"] for row in ask(final, ARTICLES, tmp_path)] == expected


def test_a_checkpoint_finds_its_base_from_anywhere(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Though it was trained on a relative path."""
    monkeypatch.chdir(base.parent)
    checkpoint = train_adapter(base.name, tmp_path / "run", DataConfig(), ARTICLES)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert ask_text(checkpoint, tmp_path) == transformers_answer(checkpoint, user(TEXT))


def test_a_revision_is_that_of_the_model_or_of_the_adapter(
    base: Path, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each flag has its own; a job that went on with another revision would mix two models."""
    source, target = write_rows(tmp_path / "in.jsonl", [{"prompt": TEXT}]), tmp_path / "out.jsonl"
    expected = transformers_answer(checkpoints["messages"], user(TEXT))
    with running_hub(monkeypatch, tmp_path / "hf") as hub:
        for name, version in (("messages", "v0"), ("paths", "v1")):
            files = {
                file: (checkpoints[name] / file).read_bytes()
                for file in ("adapter_config.json", "adapter_model.safetensors")
            }
            hub.add("tester/adapter", files, tags=[version])
        asked = {"adapter": "tester/adapter", **SHORT}
        answer_file(base, source, target, adapter_revision="v0", **asked)
        assert [row["generated"] for row in read_rows(target)] == [expected]
        for other, message in (
            ({"revision": "v0"}, "revision 'v0' belongs to a repository on the hub, and .*llama"),
            ({"adapter_revision": "v1"}, r"other settings \(adapter_revision: 'v0' -> 'v1'\)"),
            ({}, r"other settings \((adapter_revision|written): "),
        ):
            with pytest.raises(UserError, match=message):
                answer_file(base, source, target, **other, **asked)


# --- several answers, sampling, stopping ---


def test_several_samples(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [{"id": "own", "prompt": TEXT}, {"prompt": "x"}]
    options = {"num_samples": 4, "temperature": 1.0, "top_p": 0.9}
    answers = ask(checkpoint, rows, tmp_path, **options)
    found = [(row["id"], row["prompt"], row["sample"]) for row in answers]
    expected = [("own", TEXT, i) for i in range(4)] + [(1, "x", i) for i in range(4)]
    assert found == expected
    texts = [row["generated"] for row in answers]
    assert len(set(texts)) == 8

    assert ask(checkpoint, rows, tmp_path, **options, batch_size=3) == answers
    other = ask(checkpoint, rows, tmp_path, **options, seed=1)
    assert not {row["generated"] for row in other} & set(texts)
    capsys.readouterr()
    infer.main(infer_args(checkpoint, prompt=TEXT, max_new_tokens=NEW_TOKENS, **options))
    assert capsys.readouterr().out == "\n---\n".join(texts[:4]) + "\n"


def test_stop_strings_and_lengths(checkpoint: Path, tmp_path: Path):
    longest = transformers_answer(checkpoint, user(TEXT))
    stop = longest[5:8]
    answer = ask_text(checkpoint, tmp_path, stop=("not there", stop))
    assert answer == longest[: longest.index(stop)]
    answer = ask_text(checkpoint, tmp_path, max_new_tokens=3)
    assert longest.startswith(answer) and len(answer) < len(longest)


# --- what it refuses ---

MALFORMED: dict[str, tuple[str, str, str]] = {  # format, line, what the message says of it
    "torn": ("paths", '{"title": "x", "abst', "not JSON"),
    "no JSON": ("paths", "title: x", "not JSON"),
    "no UTF-8": ("paths", '"\udcff"', ""),
    "a list": ("paths", "[1]", ".*list"),
    "no abstract": ("paths", '{"title": "x"}', '.*"abstract"'),
    "a number for a title": ("paths", '{"title": 7, "abstract": "x"}', '.*"title".*int'),
    "another format's columns": ("paths", '{"question": "x"}', '.*"prompt".*question'),
    "no column of the template": ("prompt", '{"question": "x"}', ".*year"),
    "no marker's text": ("text", '{"note": "x"}', '.*"text"'),
    "messages no list": ("messages", '{"messages": "x"}', '.*"messages"'),
    "no messages": ("messages", '{"messages": []}', '.*"messages"'),
    "a turn without role": ("messages", '{"messages": [{"content": "x"}]}', '.*"messages"'),
    "a turn without content": (
        "messages",
        '{"messages": [{"role": "user"}]}',
        '.*"messages"',
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_rows_are_named(
    case: str, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Before the model is loaded."""
    monkeypatch.setattr(infer, "load_files", None)
    name, line, message = MALFORMED[case]
    source, target = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    good = FORMATS[name].rows[0]
    first, third = json.dumps({**good, "id": "line 1"}), json.dumps({**good, "id": "line 3"})
    source.write_text(f"{first}\n{line}\n{third}\n", encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match="questions.jsonl:2: " + message):
        infer.main(infer_args(checkpoints[name], input=str(source), output=str(target)))
    assert not target.exists()


BAD_ARGS: dict[str, tuple[list[str], str]] = {
    "metrics of nothing": (["--prompt", "x", "--metrics", "bleu"], "--input"),
    "a misspelled metric": (
        ["--input", "rows.jsonl", "--output", "out.jsonl", "--metrics", "blue"],
        "bleu",
    ),
    "both": (["--prompt", "x", "--input", "rows.jsonl", "--output", "out.jsonl"], "--prompt"),
    "no output": (["--input", "rows.jsonl"], "--output"),
    "output alone": (["--prompt", "x", "--output", "out.jsonl"], "--output"),
    "no such input": (["--input", "absent.jsonl", "--output", "out.jsonl"], "absent.jsonl"),
    "no place for the output": (
        ["--input", "rows.jsonl", "--output", "absent/out.jsonl"],
        "absent",
    ),
    "temperature": (["--prompt", "x", "--temperature", "-1"], "temperature"),
    "top_p": (["--prompt", "x", "--top_p", "0"], "top_p"),
    "max_new_tokens": (["--prompt", "x", "--max_new_tokens", "0"], "max_new_tokens"),
    "num_samples": (["--prompt", "x", "--num_samples", "0"], "num_samples"),
    "batch_size": (["--prompt", "x", "--batch_size", "0"], "batch_size"),
    "judge_requests": (["--prompt", "x", "--judge_requests", "0"], "judge_requests"),
    "top_k": (["--prompt", "x", "--top_k", "-1"], "--top_k"),
    "seed": (["--prompt", "x", "--seed", "-1"], "--seed"),
    "limit": (["--input", "rows.jsonl", "--output", "out.jsonl", "--limit", "0"], "--limit"),
    "limit of a prompt": (["--prompt", "x", "--limit", "1"], "--limit"),
    "equal samples": (["--prompt", "x", "--num_samples", "2", "--temperature", "0"], "--limit 2"),
    "a directory's revision": (["--prompt", "x", "--revision", "v2"], "revision 'v2'"),
    "no adapter's revision": (["--prompt", "x", "--adapter_revision", "v2"], "adapter_revision"),
    "comparison of nothing": (
        ["--input", "rows.jsonl", "--output", "out.jsonl", "--compare", "rows.jsonl"],
        "--compare needs --metrics",
    ),
    "comparison with no answers": (
        [*"--input rows.jsonl --output out.jsonl --metrics bleu --compare absent".split()],
        "--compare: 'absent'",
    ),
    "malformed": (["--input", "malformed.jsonl", "--output", "out.jsonl"], "malformed.jsonl:1: "),
}


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the script in a directory of its own: (arguments) -> exit code, stdout, stderr."""
    write_rows(tmp_path / "rows.jsonl", [{"prompt": TEXT}])
    (tmp_path / "malformed.jsonl").write_text("{\n")
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["infer.py", *args])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "infer.py"), run_name="__main__")
        return stop.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("case", BAD_ARGS)
def test_bad_arguments_are_one_message(case: str, checkpoint: Path, command, tmp_path: Path):
    args, message = BAD_ARGS[case]
    code, out, err = command(str(checkpoint), *args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and message in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("name", ["./absent", "absent", "{}/absent"])
def test_an_unknown_model_or_adapter_is_one_message(name: str, base: Path, command, tmp_path: Path):
    absent = name.format(tmp_path)
    for args in ([absent], [str(base), "--adapter", absent]):
        code, out, err = command(*args, "--prompt", "x")
        assert (code, out) == (2, "")
        assert re.fullmatch(rf"error: .*{re.escape(repr(absent))}.*\n", err)


# as PEFT writes it for a model that was made in memory
@pytest.mark.parametrize("name", [None, ""])
def test_an_adapter_of_an_unnamed_base_is_refused(
    name: str | None, checkpoint: Path, base: Path, tmp_path: Path
):
    adapter = shutil.copytree(checkpoint, tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": name}))
    with pytest.raises(UserError, match=rf"{re.escape(str(adapter))}.*base_model_name_or_path"):
        infer.main(infer_args(adapter, prompt=TEXT))
    answer = ask_text(base, tmp_path, adapter=str(adapter))
    assert answer == transformers_answer(checkpoint, user(TEXT))


def test_an_empty_prompt_is_refused(tmp_path: Path):
    """A model without BOS has nothing to go on."""
    base = write_base("qwen", tmp_path / "qwen")
    with pytest.raises(UserError, match="empty"):
        infer.main(infer_args(base, prompt="", raw=True))


def test_the_command_line(checkpoint: Path, command, tmp_path: Path):
    expected = transformers_answer(checkpoint, user(TEXT))
    model = [str(checkpoint), "--max_new_tokens", str(NEW_TOKENS)]
    code, out, _ = command(*model, "--prompt", TEXT, "--stop", "not there", "nor this")
    assert (code, out) == (0, expected + "\n")
    code, out, err = command(
        *model, "--input", "rows.jsonl", "--output", "out.jsonl", "--batch-size", "2"
    )
    assert (code, out) == (0, "") and "1 answers: out.jsonl" in err
    rows = read_rows(tmp_path / "out.jsonl")
    assert rows == [{"id": 0, "prompt": TEXT, "generated": expected}]
    assert command(str(checkpoint), "--promt", "x")[0] == 2
    code, out, _ = command("--help")
    assert code == 0 and "--prompt_template" in out
    for theme in ("model", "question", "form", "sampling", "scoring", "ontology"):
        assert f" {theme} options " in out


def test_blank_lines_of_the_input_are_skipped(checkpoint: Path, tmp_path: Path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n\n', encoding="utf-8")
    args = infer_args(
        checkpoint,
        input=str(tmp_path / "in.jsonl"),
        output=str(tmp_path / "out.jsonl"),
        max_new_tokens=2,
        raw=True,
    )
    assert infer.main(args) == 0
    assert [row["prompt"] for row in read_rows(tmp_path / "out.jsonl")] == ["a", "b"]


def test_arguments_that_would_lose_the_answers_are_refused(checkpoint: Path, tmp_path: Path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "\\ud800"}\n', encoding="utf-8")
    for options, message in (
        ({"output": str(tmp_path)}, "is a directory"),
        ({"output": str(tmp_path / "out"), "stop": ("",)}, "--stop"),
        ({"output": str(tmp_path / "out")}, "in.jsonl:1"),
    ):
        with pytest.raises(UserError, match=message):
            infer.main(infer_args(checkpoint, input=str(tmp_path / "in.jsonl"), **options))
