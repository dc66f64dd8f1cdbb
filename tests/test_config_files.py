"""Config files in YAML and JSON: the same settings as in Python, and errors with their line."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

import train
from helpers.documents import ROOT, blocks
from helpers.tiny_runs import base_model, quick_config
from helpers.tiny_runs import metrics as metrics_of
from minilora.cli import load_config
from minilora.config import Config, DataConfig, LoraConfig, RowFormat, TrainConfig
from minilora.config_files import load_config_file
from minilora.errors import UserError

AS_PYTHON = Config(
    output_dir="2024-01-01",
    lora=LoraConfig(target_modules=("q_proj", "v_proj")),
    data=DataConfig(
        train_file=("a.csv", "b/*.jsonl"),
        train_weights=(1, 0.5),
        format="text",
        response_marker="### 답변:",
        file_formats={
            "a.csv": RowFormat(
                format="prompt", prompt_template="{질문}\n\n### 답변:", response_template=" {a}"
            )
        },
    ),
    train=TrainConfig(learning_rate=1e-4, warmup_ratio=0.5, save_steps="epoch", max_steps=None),
)

AS_YAML = """\
# the same as AS_PYTHON
output_dir: 2024-01-01
lora:
  target_modules: [q_proj, v_proj]
data:
  train_file:
    - a.csv
    - "b/*.jsonl"
  train_weights: [1, 0.5]
  format: text
  response_marker: "### 답변:"
  file_formats:
    a.csv:
      format: prompt
      prompt_template: "{질문}\\n\\n### 답변:"
      response_template: " {a}"
train:
  learning_rate: 1e-4
  warmup_ratio: .5
  save_steps: epoch
  max_steps: null
"""


@pytest.fixture
def read(tmp_path: Path):
    """Write a config file and read it."""

    def write_and_read(content: str | bytes, name: str = "c.yaml") -> Config:
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_config_file(str(file))

    return write_and_read


# ---- what is read


def test_yaml_and_json_hold_what_python_does(read):
    assert read(AS_YAML) == read(AS_YAML, "c.yml") == AS_PYTHON
    assert read(AS_YAML.replace("\n", "\r\n").encode("utf-8-sig")) == AS_PYTHON
    as_dict = dataclasses.asdict(AS_PYTHON)
    for options in ({}, {"indent": "\t"}, {"separators": (",", ":")}, {"ensure_ascii": False}):
        assert read(json.dumps(as_dict, **options), "c.json") == AS_PYTHON, options
    python = "from minilora.config import *\nconfig = " + repr(AS_PYTHON)
    assert read(python, "c.py") == AS_PYTHON


def test_flags_replace_values_of_a_yaml_file(tmp_path, read):
    read(AS_YAML)
    config = load_config([str(tmp_path / "c.yaml"), "--train.learning_rate", "3e-4", "--seed=2"])
    assert (config.train.learning_rate, config.seed, config.train.warmup_ratio) == (3e-4, 2, 0.5)
    assert config.data == AS_PYTHON.data
    with pytest.raises(UserError, match=r"data\.train_file is not set"):  # checked as ever
        read("seed: 1\n")
        load_config([str(tmp_path / "c.yaml")])


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-4", 1e-4),
        ("1.5E+2", 150.0),
        (".5", 0.5),
        ("2.", 2.0),
        ("-0.25", -0.25),
        ("010", 10),
        ("+3", 3),
    ],
)
def test_numbers_of_yaml(text, value, read):
    assert read(f"train:\n  learning_rate: {text}\n").train.learning_rate == value


@pytest.mark.parametrize(
    "text, value",
    [
        ("~", None),
        ("null", None),
        ("Null", None),
        ("NULL", None),
        ("'None'", "None"),
        ("yes", "yes"),
        ("1_000", "1_000"),
        ("12:30:00", "12:30:00"),
        ("2024-01-01", "2024-01-01"),
        ('"12"', "12"),
        ("'null'", "null"),
        ("''", ""),
        ("|-\n    Q: {x}\n    A:", "Q: {x}\nA:"),
        ('"😀 \\u00e9"', "😀 é"),
    ],
)
def test_texts_of_yaml(text, value, read):
    assert read(f"hub:\n  repo_id: {text}\n").hub.repo_id == value


def test_escapes_of_json_are_those_of_json(read):
    config = read(r'{"output_dir": "\ud83d\ude00\/é\t", "train": {"max_grad_norm": 1E2}}', "c.json")
    assert (config.output_dir, config.train.max_grad_norm) == ("😀/é\t", 100.0)


def test_a_string_of_json_may_hold_unprintable_characters(read):
    assert read('{"output_dir": "a\x7fb\x90"}', "c.json").output_dir == "a\x7fb\x90"


def test_the_config_of_a_run_continues_it(tmp_path, capsys):
    """A run over files of two formats and without evaluations, by its own config.json."""
    (tmp_path / "notes.jsonl").write_text('{"text": "Q: why? A: because"}\n' * 6)
    config = quick_config(tmp_path, base_model(tmp_path / "base"), eval__eval_steps=0)
    config.data.train_file = (str(config.data.train_file), str(tmp_path / "notes.jsonl"))
    config.data.file_formats = {str(tmp_path / "notes.jsonl"): RowFormat("text", chat=False)}
    config.train.max_steps, config.train.lr_scheduler = 2, "constant"
    assert train.main(config) == 0
    assert not metrics_of(config, "eval/in_domain/loss")

    again = str(Path(config.output_dir) / "config.json")
    assert load_config([again]) == config
    assert train.main(load_config([again])) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert train.main(load_config([again, "--train.max_steps", "3"])) == 0
    assert [row["step"] for row in metrics_of(config)] == [1, 2, 3]
    report = (Path(config.output_dir) / "report.html").read_text()
    assert "6 lines read, 6 kept, 0 dropped" in report, "the table has a line for each file"


# ---- errors


@pytest.mark.parametrize(
    "content, message",
    [
        # names
        ("seed: 1\ntrain:\n  learning_rat: 1\n", ":3: .*did you mean 'train.learning_rate'"),
        ("\nlearning_rate: 1\n", ":2: learning_rate is .*did you mean 'train.learning_rate'"),
        ("seed: 1\ntrian:\n  epochs: 1\n", ":2: trian is .*did you mean 'train'"),
        ("train.epochs: 1\n", ":1: .*: write epochs in the section train"),
        ("data:\n  file_formats:\n    a:\n      formt: text\n", r":4: .*\['a'\].formt.*'format'"),
        ("seed: 1\nlora:\n  rank: 2\nseed: 3\n", ":1: seed is given a second time in line 4"),
        ("<<: {seed: 1}\n", ":1: << is not a setting"),
        ("? [seed]\n: 1\n", ":1: expected a name"),
        # sections
        ("seed: 1\ntrain:\nlora:\n  rank: 2\n", ":2: train is empty: leave the section out"),
        ("train:\n  # epochs: 2\n", ":1: train is empty: leave the section out"),
        ("data:\n  file_formats:\n    a:\n", r":3: data.file_formats\['a'\] is empty"),
        ("train:\n  epochs:\n", ":2: train.epochs has no value"),
        ("train: null\n", ":1: train has settings of its own, found null"),
        ("train: 3\n", ":1: train has settings of its own, found 3"),
        ("data:\n  file_formats: [a]\n", r":2: data.file_formats has settings .*\['a'\]"),
        ("data:\n  file_formats:\n    a: ~\n", r":3: data.file_formats\['a'\] has .*null"),
        ("", r": expected settings \(seed: 1\), found none"),
        ("- seed\n", r": expected settings \(seed: 1\), found a list"),
        ("- train:\n", r": expected settings \(seed: 1\), found a list"),
        ("---\n", r": expected settings \(seed: 1\), found none"),
        ("seed\n", r": expected settings \(seed: 1\), found a single value"),
        # values
        ("seed: '3'\n", ":1: seed = '3'.*without quotes"),
        ("seed: 1_000\n", ":1: seed = '1_000'.*underscores"),
        ("train:\n  max_steps: 1e3\n", r":2: train.max_steps = 1000.0(.|\n)*without point"),
        ("train:\n  max_steps: None\n", ":2: train.max_steps is None: write null for None"),
        (
            "train:\n  save_steps: nix\n",
            r":2: train.save_steps = 'nix': expected a number, 'epoch' or null \(None in Python\)$",
        ),
        ("data:\n  train_file: [3]\n", ":2: .*expected a string or a list of strings$"),
        ("model:\n  revision: 1234567\n", r":2: model.revision = 1234567(.|\n)*in quotes"),
        ("data:\n  chat: no\n", ":2: data.chat = 'no'.*true or false"),
        ("seed: true\n", ":1: seed = True"),
        ("output_dir: true\n", ":1: output_dir = True: expected a string"),
        ("data:\n  format: null\n", r":2: data.format = None.*leave the setting out"),
        ("data:\n  response_marker: ### A:\n", ":2: data.response_marker has no value.*quotes"),
        ("data:\n  prompt_template: {q}\n", ":2: data.prompt_template.*in quotes"),
        ("lora:\n  target_modules: q_proj\n", ":2: lora.target_modules = 'q_proj'"),
        ("lora:\n  target_modules: [[q]]\n", ":2: lora.target_modules = "),
        ("data:\n  file_formats:\n    a: {chat: 1}\n", r":3: data.file_formats\['a'\].chat = 1"),
        # YAML itself
        ("train:\n\tepochs: 3\n", ":2: .*indent with spaces"),
        ("seed: [1\n", ":2: "),
        ("lora: &x\n  rank: 2\n", ":1: anchors"),
        ("seed: 1\nlora: *x\n", ":2: anchors"),
        ("seed: 1\nlora: !!python/object:os.system {}\n", ":2: anchors .*tags"),
        ("seed: 1\n---\nseed: 2\n", ":2: expected a single document"),
        ("seed: \x07\n", ": not readable as YAML"),
        (b"seed: 1 # \xff\n", ": not readable: .*utf-8"),
        ("x: " + "[" * 999, ": not readable as YAML: .*recursion"),
    ],
)
def test_a_mistake_in_yaml_has_its_line(content, message, read):
    with pytest.raises(UserError, match=rf"^\S*c\.yaml{message}"):
        read(content)


@pytest.mark.parametrize(
    "content, message",
    [
        ('{\n"seed": 1,\n}', ":3: not JSON: |:2: not JSON: "),
        ('{\n"seed": 1\n"method": "full"}', ":3: not JSON: Expecting ',' delimiter"),
        ("", ":1: not JSON"),
        ("[" * 100_000, ": not JSON: .*recursion"),
        ("[1]", r": expected a JSON object \(.*\), found a list$"),
        ('{"seed": 1,\n\t"train": {\n\t\t"epoch": 1}}', ":3: .*did you mean 'train.epochs'"),
        ('{"seed": 1,\n"seed": 2}', ":1: seed is given a second time in line 2"),
        ('{"seed": 1,\n"train": null}', ":2: train has settings of its own, found null"),
        ('{\n"train": {"epochs":\n"2"}}', ":2: train.epochs = '2'.*without quotes"),
        (r'{"data": {"file_formats": {"\ud83d\ude00": {"x": 1}}}}', r":1: .*\['😀'\].x is not"),
    ],
)
def test_a_mistake_in_json_has_its_line(content, message, read):
    with pytest.raises(UserError, match=rf"^\S*c\.json({message})"):
        read(content, "c.json")


def test_only_these_kinds_of_files_are_configs(tmp_path, read):
    with pytest.raises(UserError, match=r"c\.toml' must be a \.py, \.yaml, \.yml or \.json file"):
        read("seed = 1", "c.toml")
    with pytest.raises(UserError, match="is not a file"):
        load_config_file(str(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        load_config_file(str(tmp_path / "none.yaml"))


# ---- the documents


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_the_yaml_of_a_page_is_a_config(page, tmp_path, read):
    for language, content in blocks(page):
        if language == "yaml" and re.search("^(data|train|model):", content, re.MULTILINE):
            read(content)
            config = load_config([str(tmp_path / "c.yaml")])
            assert config.data.train_file


def test_the_page_shows_a_table_of_formats(read):
    (shown,) = [text for language, text in blocks(ROOT / "docs/data.md") if language == "yaml"]
    data = read(shown).data
    of_faq, of_notes = data.for_file("faq.csv"), data.for_file("notes/*.jsonl")
    assert (of_faq.format, of_faq.response_template) == ("prompt", "{answer}")
    assert (of_notes.format, of_notes.response_marker) == ("text", "Price is $")
    assert data.for_file("articles.jsonl").format == "messages"
