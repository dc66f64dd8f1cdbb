"""The form of prompts: that of training or one that is given, and rows that cannot be asked."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

import infer
from helpers.asking import (
    FORMATS,
    SHORT,
    TEXT,
    answer_file,
    ask,
    assistant,
    infer_args,
    read_rows,
    train_adapter,
    transformers_answer,
    user,
    write_base,
    write_rows,
)
from helpers.checkpoints import names
from minilora.config import DataConfig
from minilora.errors import UserError

SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base("llama3", tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train an adapter on notes with a response marker."""
    data, rows, _ = FORMATS["text"]
    return train_adapter(base, tmp_path_factory.mktemp("runs") / "run", data, rows)


def write_config(file: Path, data: DataConfig) -> Path:
    """Write a config file that has everything but the data section by default."""
    fields = {
        name: value
        for name, value in dataclasses.asdict(data).items()
        if value != getattr(DataConfig(), name)
    }
    file.write_text(
        "from minilora.config import Config, DataConfig\n"
        f"config = Config(data=DataConfig(**{fields!r}))\n"
    )
    return file


# --- another form than that of training ---


@pytest.mark.parametrize("name", FORMATS)
def test_a_vanilla_model_is_asked_in_the_form_of_a_config(name: str, base: Path, tmp_path: Path):
    data, rows, asked = FORMATS[name]
    config = write_config(tmp_path / "config.py", data)
    metrics = ("exact_match",)
    if name == "text without marker":  # a row is the prompt as a whole
        with pytest.raises(UserError, match="no answer to compare with"):
            ask(base, rows, tmp_path, config=str(config), metrics=metrics)
        metrics = ()
    answers = ask(base, rows, tmp_path, config=str(config), metrics=metrics)
    expected = [asked(row) for row in rows]
    if name == "paths in Mistral's form":
        texts = [f"[INST] {turns[0]['content']} [/INST]" for turns in expected]
        expected = ["<|begin_of_text|>" + text for text in texts]
    assert [row["generated"] for row in answers] == [
        transformers_answer(base, _without_bos(prompt)) for prompt in expected
    ]


def _without_bos(prompt: str | list[dict]) -> str | list[dict]:
    """Leave out the BOS that transformers' tokenizer adds by itself."""
    return prompt.removeprefix("<|begin_of_text|>") if isinstance(prompt, str) else prompt


def test_a_form_is_given_by_flags(base: Path, trained: Path, tmp_path: Path):
    """It replaces that of training or of a config, setting by setting."""
    question = "Q: {question}?\nA:"
    rows = FORMATS["prompt"].rows
    form = {"format": "prompt", "prompt_template": question, "chat": False}
    expected = [transformers_answer(trained, f"Q: {row['question']}?\nA:") for row in rows]
    assert [row["generated"] for row in ask(trained, rows, tmp_path, **form)] == expected

    config = write_config(tmp_path / "config.py", FORMATS["paths"].data)
    asked_twice = ask(trained, rows, tmp_path, config=str(config), **form)
    assert [row["generated"] for row in asked_twice] == expected

    (row,) = ask(trained, [{"text": "a B: c"}], tmp_path, response_marker="B:")
    assert row["generated"] == transformers_answer(trained, "a B:")
    in_chat = "[INST] Q: 서울? [/INST]"
    (row,) = ask(
        base,
        [{"question": "서울"}],
        tmp_path,
        prompt_template="Q: {question}?",
        chat_template="mistral",
    )
    assert row["generated"] == transformers_answer(base, in_chat)


def test_messages_need_no_template_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A model without one is asked in the built-in form, as it would be trained; this is said."""
    base = write_base("llama2", tmp_path / "llama2")
    (row,) = ask(base, [{"messages": user(TEXT)}], tmp_path, format="messages")
    assert row["generated"] == transformers_answer(base, f"[INST] {TEXT} [/INST]")
    assert "the built-in [INST] form is used" in capsys.readouterr().err


def test_a_job_goes_on_in_an_equal_form_and_in_no_other(base: Path, tmp_path: Path):
    """The values count, wherever they come from."""
    data, rows, _ = FORMATS["prompt without chat"]
    source, target = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    config = write_config(tmp_path / "config.py", data)
    whole = answer_file(base, source, target, config=str(config), **SHORT)
    target.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))

    flags = {"prompt_template": data.prompt_template, "chat": False}
    moved = config.rename(tmp_path / "moved.py")
    for form in (flags, {"config": str(moved)}):
        assert answer_file(base, source, target, **form, **SHORT) == whole
    for other in (flags | {"chat": True}, flags | {"prompt_template": "{question}"}, {}):
        with pytest.raises(UserError, match=r"other settings \((form|prompts): "):
            answer_file(base, source, target, **other, **SHORT)

    # the same file with another content is another form
    template, target = tmp_path / "chat.jinja", tmp_path / "chat.jsonl"
    in_chat = flags | {"chat": True, "chat_template": str(template)}
    template.write_text("{{ messages[0].content }}")
    answer_file(base, source, target, **in_chat, **SHORT)
    template.write_text("{{ messages[0].content }}!")
    with pytest.raises(UserError, match=r"other settings \(form: "):
        answer_file(base, source, target, **in_chat, **SHORT)


def test_a_job_notices_that_the_template_of_the_model_has_changed(base: Path, tmp_path: Path):
    model = shutil.copytree(base, tmp_path / "model")
    rows = FORMATS["prompt"].rows
    source, target = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    form = {"format": "prompt", "prompt_template": "{question}", "chat": True}
    answer_file(model, source, target, **form, **SHORT)
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    with pytest.raises(UserError, match=r"other settings \(prompts: "):
        answer_file(model, source, target, **form, **SHORT)


def test_a_job_of_an_older_version_goes_on(trained: Path, tmp_path: Path):
    """Its settings have no form; one that is equal to that of training is none either."""
    data, rows, _ = FORMATS["text"]
    source, target = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    whole = answer_file(trained, source, target, **SHORT)
    settings_file = target.with_name("out.jsonl.settings.json")
    settings = json.loads(settings_file.read_text())
    assert not {"form", "limit", "adapter_revision"} & settings.keys()
    del settings["prompts"]
    settings_file.write_text(json.dumps(settings))
    config = write_config(tmp_path / "config.py", data)
    target.write_bytes(whole.splitlines(keepends=True)[0])
    assert answer_file(trained, source, target, config=str(config), **SHORT) == whole


CONTRADICTIONS: dict[str, tuple[dict, str]] = {
    "raw": ({"raw": True, "format": "text", "chat": False}, "leave out --format, --chat"),
    "raw and a config": ({"raw": True, "config": "c.py"}, "leave out --config"),
    "templates of text": ({"prompt_template": "{x}"}, "need --format prompt"),
    "a marker of prompts": (
        {"format": "prompt", "response_marker": "x"},
        "--response_marker needs --format text",
    ),
    "an empty marker": ({"response_marker": ""}, "--response_marker is empty"),
    "chat of text": ({"chat": True}, "--chat has no effect"),
    "a chat template of text": ({"chat_template": "mistral"}, "--chat_template has no effect"),
    "turns without chat": ({"format": "messages", "chat": False}, "--chat False contradicts"),
    "no such template": ({"format": "messages", "chat_template": "absent"}, "nor a file"),
    "no such config": ({"config": "absent.py"}, "absent.py"),
    "a broken template": ({"format": "prompt", "prompt_template": "{x"}, "prompt_template"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_forms_that_make_no_sense_are_refused(
    case: str, trained: Path, monkeypatch: pytest.MonkeyPatch
):
    """Before the model is loaded; it was trained on format text."""
    form, message = CONTRADICTIONS[case]
    monkeypatch.setattr(infer, "load_files", None)
    with pytest.raises(UserError, match=message):
        infer.main(infer_args(trained, prompt="x", **form))


# --- rows that a chat template refuses ---


def test_a_refused_row_is_left_out_and_the_job_goes_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Mistral's template wants no system turn. A finished job does not wait for these rows."""
    rows = [{"messages": [*user(f"q{i}"), assistant("r")]} for i in range(9)]
    for i in (0, 2, 3, 4, 5, 7):
        rows[i]["messages"].insert(0, SYSTEM)
    source, target = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    form = {"format": "messages", "chat_template": "mistral", **SHORT}
    data = answer_file(base, source, target, metrics=("exact_match", "loss"), **form)

    answers = read_rows(target)
    assert [row["id"] for row in answers] == [1, 6, 8]
    assert answers[1]["generated"] == transformers_answer(base, "[INST] q6 [/INST]")
    figures = json.loads((tmp_path / "out.metrics.json").read_text())
    assert (figures["answers"], figures["loss/rows"]) == (3, 3)
    said = capsys.readouterr().err
    assert "6 rows are refused by the chat template" in said and "and 1 more" in said
    for number in (1, 3, 4, 5, 6):
        assert f"in.jsonl:{number}: chat template: the Mistral form wants" in said
    assert f"3 of 3 answers: {target}" in said and "the same command goes on" not in said

    monkeypatch.setattr(infer, "load_files", None)
    assert answer_file(base, source, target, **form) == data
    said = capsys.readouterr().err
    assert f"3 of 3 answers: {target}" in said and "the same command goes on" not in said


def test_a_template_that_refuses_every_row_is_an_error(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(infer, "load_files", None)
    source = write_rows(tmp_path / "in.jsonl", [{"messages": [SYSTEM, *user("q")]}] * 2)
    form = {"format": "messages", "chat_template": "mistral"}
    with pytest.raises(UserError, match=r"the chat template refuses every row of .*in\.jsonl"):
        answer_file(base, source, tmp_path / "out.jsonl", **form)
    assert names(tmp_path) == ["in.jsonl"]


# --- the first rows ---


def test_limit(base: Path, tmp_path: Path):
    """Rows, not lines, count. A job may go on with more rows, not with fewer."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"prompt": f"p{i}", "completion": "x"} for i in range(5)]
    source.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n{torn")
    options = {"metrics": ("exact_match", "loss"), **SHORT}
    data = answer_file(base, source, target, limit=3, **options)
    assert [row["prompt"] for row in read_rows(target)] == ["p0", "p1", "p2"]
    figures = json.loads((tmp_path / "out.metrics.json").read_text())
    assert (figures["answers"], figures["loss/rows"]) == (3, 3)

    more = answer_file(base, source, target, limit=5, **options)
    assert more.startswith(data) and len(read_rows(target)) == 5
    with pytest.raises(UserError, match=r"out\.jsonl:4: id 3 is not in the input \(or is beyond"):
        answer_file(base, source, target, limit=3, **options)
    with pytest.raises(UserError, match=r"in\.jsonl:10: not JSON"):
        answer_file(base, source, target, limit=6, **options)
    assert target.read_bytes() == more


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}])
def test_equal_samples_are_refused(
    options: dict, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(infer, "load_files", None)
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "x"}])
    message = "the answers would all be the same; did you mean --limit 3?"
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        answer_file(base, source, tmp_path / "out.jsonl", num_samples=3, **options)
