"""minilora.json: what has to be known of a model's training to ask the model, and to merge it.

Every artifact has this file: checkpoints, adapters and models on the hub, merged models. It holds
{"data": {...}, "model": {...}}, fields of `DataConfig` and `ModelConfig` by their names. The chat
template is not among them; it is saved with the tokenizer, as chat_template.jinja.
"""

import dataclasses
import typing
from dataclasses import dataclass
from pathlib import Path

import typeguard

from minilora import distributed
from minilora.checkpoint.trainer_state import TRAINER_STATE_FILE
from minilora.config import DataConfig, ModelConfig, config_fields
from minilora.data.tokenizer import Tokenizer
from minilora.errors import UserError
from minilora.files import read_json, write_json

RECORD_FILE = "minilora.json"

DATA_FIELDS = (
    "format",
    "prompt_template",
    "response_template",
    "response_marker",
    "chat",
    "add_tokens",
    "max_seq_length",
    "too_long",
)
"""The recorded fields of `DataConfig`: they decide how a row becomes a prompt and an answer."""

MODEL_FIELDS = ("bits", "double_quant", "dtype")
"""The recorded fields of `ModelConfig`: they decide the arithmetic."""


@dataclass(frozen=True)
class ModelRecord:
    """How a model was trained."""

    data: DataConfig
    """The form of its prompts and answers (`DataConfig.asked_form`). Fields that are not recorded
    have their defaults."""
    model: ModelConfig
    """How the frozen weights were held in training, or are to be held of a merged model. Fields
    that are not recorded have their defaults."""

    def merged(self) -> "ModelRecord":
        """Return the record of the merged model: its linear layers are in 16 bits."""
        return dataclasses.replace(self, model=dataclasses.replace(self.model, bits=16))


def write_model_record(directory: Path, record: ModelRecord) -> None:
    """Write minilora.json."""
    content = {
        "data": _pick(record.data, DATA_FIELDS),
        "model": _pick(record.model, MODEL_FIELDS),
    }
    write_json(directory / RECORD_FILE, content)


def read_model_record(directory: Path) -> ModelRecord | None:
    """Read how the model in a directory was trained; None: another program wrote it.

    Checkpoints of older versions have no minilora.json, but trainer_state.json with the whole
    config. Fields that this version does not know are ignored.

    Raises:
        UserError: the file is damaged.
    """
    file, old_file = directory / RECORD_FILE, directory / TRAINER_STATE_FILE
    if file.is_file():
        content = read_json(file)
    elif old_file.is_file():
        file = old_file
        content = read_json(file).get("config", {})
    else:
        return None
    data = _recorded_values(content, "data", DATA_FIELDS, DataConfig, file)
    model = _recorded_values(content, "model", MODEL_FIELDS, ModelConfig, file)
    return ModelRecord(DataConfig(**data), ModelConfig(**model))


def find_model_record(adapter: Path | None, base: Path) -> ModelRecord | None:
    """Read how a model was trained: the adapter's record, or else the base's, which is logged.

    Args:
        adapter: directory of the adapter, if there is one.
        base: directory of the base model, or of a whole model.
    """
    if adapter is None:
        return read_model_record(base)
    record = read_model_record(adapter)
    if record is None:
        record = read_model_record(base)
        if record is not None:
            distributed.log(
                f"note: {adapter} does not say how it was trained (no {RECORD_FILE}): prompts have "
                f"the form in which its base {base} was trained"
            )
    return record


def prompt_form(record: ModelRecord | None, tokenizer: Tokenizer) -> DataConfig:
    """Return the form of a model's prompts.

    Args:
        record: how it was trained. None: nothing is known of that, and prompts are questions, in
            the tokenizer's chat template if it has one.
        tokenizer: the model's.
    """
    if record is not None:
        return record.data
    return DataConfig(format="prompt", chat=tokenizer.has_template)


def _pick(config: DataConfig | ModelConfig, names: tuple[str, ...]) -> dict[str, object]:
    """Return {name: value} of some fields of a config."""
    return {name: value for name, value in config_fields(config) if name in names}


def _recorded_values(
    content: dict, section: str, names: tuple[str, ...], section_class: type, file: Path
) -> dict:
    """Return the values of a section's fields. Lists become tuples, as in the config.

    Args:
        content: the record as it was read.
        section: "data" or "model".
        names: the fields; others are ignored.
        section_class: the config class that has the fields.
        file: where the record is from, for messages.

    Raises:
        UserError: a value has another type than its field.
    """
    values = content.get(section, {})
    if not isinstance(values, dict):
        raise UserError(f"{file}: {section} is {values!r}, expected an object")
    hints = typing.get_type_hints(section_class)
    found = {}
    for name in names:
        if name not in values:
            continue
        value = values[name]
        found[name] = tuple(value) if isinstance(value, list) else value
        try:
            typeguard.check_type(
                found[name],
                hints[name],
                collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS,
            )
        except typeguard.TypeCheckError as error:
            raise UserError(f"{file}: {section}.{name} = {value!r}: {error}") from error
    return found
