"""minilora.json: what it holds, what is read from old and from damaged files."""

import json
from pathlib import Path

import pytest

from minilora.checkpoint.model_record import ModelRecord, read_model_record, write_model_record
from minilora.checkpoint.trainer_state import TrainerState, write_trainer_state
from minilora.config import Config, DataConfig, ModelConfig, RowFormat
from minilora.errors import UserError

DATA = DataConfig(
    train_file="/home/someone/rows.jsonl",
    format="prompt",
    prompt_template="질문: {question}",
    response_template=" {answer}",
    chat=False,
    add_tokens=("<end>",),
    max_seq_length=128,
    too_long="truncate",
)
MODEL = ModelConfig(name="/home/someone/base", bits=4, double_quant=False, dtype="float16")


def form(record: ModelRecord | None) -> tuple:
    """Return all that a record has to tell."""
    assert record is not None
    data, model = record.data, record.model
    return (
        (data.format, data.prompt_template, data.response_template, data.response_marker),
        (data.chat, data.add_tokens, data.max_seq_length, data.too_long),
        (model.bits, model.double_quant, model.dtype),
    )


def test_record_is_read_as_it_was_written(tmp_path: Path):
    record = ModelRecord(DATA, MODEL)
    write_model_record(tmp_path, record)
    assert form(read_model_record(tmp_path)) == form(record)
    written = (tmp_path / "minilora.json").read_text(encoding="utf-8")
    assert "질문" in written and "someone" not in written
    write_model_record(tmp_path, record.merged())
    merged = read_model_record(tmp_path)
    assert form(merged)[:2] == form(record)[:2]
    assert form(merged)[2] == (16, False, "float16")


def test_checkpoint_of_an_older_version_has_its_config_instead(tmp_path: Path):
    assert read_model_record(tmp_path) is None
    write_trainer_state(tmp_path, TrainerState(), Config(data=DATA, model=MODEL))
    file = tmp_path / "trainer_state.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["config"]["data"]["setting_of_another_version"] = 1
    file.write_text(json.dumps(content))
    assert form(read_model_record(tmp_path)) == form(ModelRecord(DATA, MODEL))


def test_model_merged_by_an_older_version_has_no_model_settings(tmp_path: Path):
    content = {"data": {"format": "text", "response_marker": "A:", "shuffle": True}}
    (tmp_path / "minilora.json").write_text(json.dumps(content))
    expected = ModelRecord(DataConfig(format="text", response_marker="A:"), ModelConfig())
    assert form(read_model_record(tmp_path)) == form(expected)


def test_form_of_a_run_with_several_forms_is_that_of_its_data_section(tmp_path: Path):
    formats = {"b.jsonl": RowFormat("messages")}
    data = DataConfig(train_file=("a.jsonl", "b.jsonl"), format="text", file_formats=formats)
    write_model_record(tmp_path, ModelRecord(data, ModelConfig()))
    record = read_model_record(tmp_path)
    assert record is not None and record.data.format == "text"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "not readable as JSON"),
        ("[]", "expected a JSON object"),
        ('{"data": 5}', "data is 5"),
        ('{"data": {"format": "poem"}}', r"data\.format = 'poem'"),
        ('{"data": {"add_tokens": ["a", 3]}}', r"data\.add_tokens"),
        ('{"model": {"bits": 5}}', r"model\.bits = 5"),
    ],
)
def test_damaged_record_is_named(content: str, problem: str, tmp_path: Path):
    (tmp_path / "minilora.json").write_text(content)
    with pytest.raises(UserError, match=rf"minilora\.json: .*{problem}"):
        read_model_record(tmp_path)
