"""What a checkpoint records about its run: trainer_state.json, with the whole config.

A merged model has only the data settings of its run, in minilora.json. Generation reads them to
ask questions in the form that the model was trained on.
"""

import dataclasses
import json
from pathlib import Path

from minilora.checkpoint.trainer_state import TrainerState
from minilora.config import Config, DataConfig, ModelConfig
from minilora.data.tokenizer import Tokenizer
from minilora.files import read_json
from minilora.hub import resolve

TRAINER_STATE_FILE = "trainer_state.json"
MERGED_DATA_FILE = "minilora.json"


def write_trainer_state(directory: Path, state: TrainerState, config: Config) -> None:
    """Write trainer_state.json: the state's fields, and the config under "config"."""
    record = {**dataclasses.asdict(state), "config": dataclasses.asdict(config)}
    text = json.dumps(record, indent=2, ensure_ascii=False)
    (directory / TRAINER_STATE_FILE).write_text(text, encoding="utf-8")


def read_model_config(directory: Path) -> ModelConfig | None:
    """Return the model settings of the run that wrote a checkpoint.

    None means that another program made the adapter. Fields that this version does not know are
    ignored.
    """
    if not (directory / TRAINER_STATE_FILE).is_file():
        return None
    values = read_json(directory / TRAINER_STATE_FILE)["config"]["model"]
    return ModelConfig(**_known_fields(ModelConfig, values))


def read_data_config(
    model: str,
    adapter: str | None,
    revision: str | None,
    plain_prompts: bool,
    tokenizer: Tokenizer | None = None,
) -> DataConfig:
    """Return the data settings that a model or adapter was trained with.

    Args:
        model: hub id or directory.
        adapter: hub id or directory; its settings come before the model's.
        revision: the model's revision on the hub.
        plain_prompts: return the settings for prompts that are used as they are, whatever is
            recorded.
        tokenizer: the model's tokenizer.

    Returns:
        The recorded settings. If there are none: those for plain prompts, in the chat template of
        the tokenizer if it has one.

    Raises:
        UserError: a name cannot be resolved, or a file cannot be read.
    """
    if plain_prompts:
        return DataConfig(format="prompt", chat=False)
    directories = [resolve(adapter)] if adapter else []
    directories.append(resolve(model, revision))
    for directory in directories:
        recorded = _recorded_data_config(directory)
        if recorded is not None:
            return recorded
    has_template = tokenizer is not None and tokenizer.has_template
    return DataConfig(format="prompt", chat=has_template)


def _recorded_data_config(directory: Path) -> DataConfig | None:
    """Return the data settings in a checkpoint's or a merged model's directory, if any."""
    if (directory / TRAINER_STATE_FILE).is_file():
        values = read_json(directory / TRAINER_STATE_FILE)["config"]["data"]
    elif (directory / MERGED_DATA_FILE).is_file():
        values = read_json(directory / MERGED_DATA_FILE)["data"]
    else:
        return None
    return DataConfig(**_known_fields(DataConfig, values))


def _known_fields(config_class: type, values: dict) -> dict:
    """Keep the values whose names are fields of a config class."""
    names = {field.name for field in dataclasses.fields(config_class)}
    return {name: value for name, value in values.items() if name in names}
