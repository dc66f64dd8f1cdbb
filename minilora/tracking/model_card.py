"""The model card (README.md) of a checkpoint on the Hugging Face hub."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import jinja2

from minilora import distributed
from minilora.config import Config, flatten_config
from minilora.data.dataset_files import parse_dataset_name

CARD_SETTINGS = (
    "method",
    "model.bits",
    "data.format",
    "data.max_seq_length",
    "train.epochs",
    "train.max_steps",
    "train.batch_size",
    "train.grad_acc_steps",
    "train.optimizer",
    "train.learning_rate",
    "train.lr_scheduler",
    "train.weight_decay",
    "seed",
)
"""The settings that the card shows."""

ADAPTER_SETTINGS = ("r", "lora_alpha", "lora_dropout", "use_rslora")
"""The fields of adapter_config.json that the card shows, besides the target modules."""


class _ModelName(NamedTuple):
    """The name of the model that was trained, or of the adapter that training began with."""

    name: str
    """A hub id or a local directory."""
    revision: str
    """Branch, tag or commit on the hub, or empty."""
    is_on_hub: bool
    """Whether the name is a hub id."""


def model_card(
    config: Config, checkpoint: Path, events: list[dict], step: int, repo_id: str = ""
) -> str:
    """Write the card of a checkpoint: its origin, settings, figures and use.

    Local files and directories appear by their last name only, not by their path.

    Args:
        config: of the run.
        checkpoint: its directory; if it is an adapter, its adapter_config.json is read.
        events: rows of metrics.jsonl; those after `step` are ignored.
        step: optimizer steps done.
        repo_id: the checkpoint's repository, if it is not config.hub.repo_id.

    Returns:
        Markdown with a YAML header.
    """
    is_full = config.method == "full"
    repo_id = repo_id or config.hub.repo_id or "owner/name"
    base = _split_name(config.model.name, config.model.revision)
    from_scratch = is_full and config.model.init == "random"

    rows: dict[str, object] = {"training data": _training_data(config)}
    settings = flatten_config(config)
    rows.update({name: settings[name] for name in CARD_SETTINGS})
    if config.data.file_formats:
        rows["data.file_formats"] = _file_formats(config)
    rows["processes"] = distributed.world_size()
    if not is_full:
        rows.update(_adapter_settings(checkpoint))
        if config.lora.init_from is not None:
            rows["lora.init_from"] = _describe(_split_name(config.lora.init_from))
    rows.update(_last_figures(events, step))

    base_text = _escape(_describe(base))
    if from_scratch:
        base_text += ", from random weights"
    load_arguments = json.dumps(repo_id)
    if not is_full and not base.is_on_hub:
        load_arguments = f'"PATH/TO/THE/BASE", adapter={json.dumps(repo_id)}'

    source = Path(__file__).with_name("model_card.md.jinja").read_text(encoding="utf-8")
    return jinja2.Template(source, keep_trailing_newline=True).render(
        header=_metadata(config, base, from_scratch).to_yaml(),
        title=repo_id.split("/")[-1],
        what="All weights" if is_full else "A LoRA adapter",
        step=f"{step:,}",
        base=base_text,
        table=_markdown_rows(rows),
        load_arguments=load_arguments,
        library="transformers" if is_full else "peft",
        auto_class="AutoModelForCausalLM" if is_full else "AutoPeftModelForCausalLM",
        repository=json.dumps(repo_id),
    )


def is_hub_id(name: str) -> bool:
    """Return whether a model's name is a hub id, owner/name, and not a local path."""
    has_form = re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) is not None
    return has_form and not Path(name).exists()


def _split_name(full_name: str, revision: str | None = None) -> _ModelName:
    """Split a name from its revision: on the hub it may be "owner/name@revision"."""
    name, _, at_revision = full_name.partition("@")
    if is_hub_id(name):
        return _ModelName(name, revision or at_revision, is_on_hub=True)
    return _ModelName(full_name, revision or "", is_on_hub=False)


def _describe(model: _ModelName) -> str:
    """Describe a model without the path to it."""
    text = model.name if model.is_on_hub else Path(model.name).name
    if model.revision:
        text += f" (revision {model.revision})"
    return text


def _training_data(config: Config) -> str:
    """List the names of the training files and datasets."""
    return ", ".join(_data_name(name) for name in config.data.train_files)


def _file_formats(config: Config) -> str:
    """List the files that have a format of their own, with its name."""
    data = config.data
    return ", ".join(
        f"{_data_name(name)}: {data.for_file(name).format}" for name in data.file_formats
    )


def _data_name(name: str) -> str:
    """Return the name of a dataset, or that of a file without the path to it."""
    is_dataset = parse_dataset_name(name) is not None
    return name if is_dataset else Path(name).name


def _adapter_settings(checkpoint: Path) -> dict[str, object]:
    """Return the fields of a checkpoint's adapter_config.json that the card shows."""
    raw = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
    settings = {key: raw.get(key) for key in ADAPTER_SETTINGS}
    settings["target_modules"] = ", ".join(sorted(raw.get("target_modules") or ()))
    return settings


def _last_figures(events: list[dict], step: int) -> dict[str, object]:
    """Return the last training loss and the last value of each evaluation figure up to a step."""
    figures = {}
    for event in events:
        if event["step"] > step:
            continue
        for key, value in event.items():
            if key == "loss" or key.startswith("eval/"):
                figures[key] = value
    return figures


def _metadata(
    config: Config, base: _ModelName, from_scratch: bool
) -> huggingface_hub.ModelCardData:
    """Return the card's header: the metadata by which the hub lists and links the model."""
    is_full = config.method == "full"
    datasets = [parse_dataset_name(name) for name in config.data.train_files]
    repositories = [dataset.repository for dataset in datasets if dataset is not None]
    return huggingface_hub.ModelCardData(
        base_model=base.name if base.is_on_hub and not from_scratch else None,
        library_name="transformers" if is_full else "peft",
        pipeline_tag="text-generation",
        datasets=repositories or None,
        tags=["minilora", "full-fine-tuning" if is_full else "lora"],
    )


def _markdown_rows(rows: dict[str, object]) -> str:
    """Format the rows of the card's table, without those that have no value."""
    lines = []
    for key, value in rows.items():
        if value is not None:
            lines.append(f"| {_escape(key)} | {_escape(value)} |")
    return "\n".join(lines)


def _escape(value: object) -> str:
    """Format a value on one line, with the characters escaped that markdown or HTML would use."""
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    return re.sub(r"([\\`*_<>\[\]|~&#$])", r"\\\1", " ".join(text.split()))
