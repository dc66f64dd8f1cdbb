"""Model cards: origin, settings and figures, with nothing taken for markup and no local paths."""

import json
import re
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from minilora.config import Config, RowFormat
from minilora.tracking.model_card import model_card

NAME = "tester/adapter"


@pytest.fixture
def config() -> Config:
    config = Config()
    config.data.train_file = "train.jsonl"
    config.hub.repo_id = NAME
    return config


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """What a card needs of an adapter's checkpoint."""
    adapter = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    return tmp_path


def header_of(card: str) -> dict:
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert match
    return yaml.safe_load(match[1])


def test_an_adapter_over_a_base_on_the_hub(config: Config, checkpoint: Path):
    config.model.name, config.model.revision = "mistralai/Mistral-7B-v0.3", "v1"
    events = [{"step": 1, "loss": 2.5}, {"step": 9, "loss": 7.25}]
    card = model_card(config, checkpoint, events, step=3)
    assert header_of(card)["base_model"] == "mistralai/Mistral-7B-v0.3"
    assert f'minilora.load("{NAME}")' in card and "(revision v1)" in card
    assert "| 2.5 |" in card and "7.25" not in card  # nothing of later steps
    assert r"| target\_modules | k\_proj, q\_proj |" in card


def test_a_revision_in_the_name_of_the_base(config: Config, checkpoint: Path):
    config.model.name = "mistralai/Mistral-7B-v0.3@v2"
    card = model_card(config, checkpoint, [], step=3)
    assert header_of(card)["base_model"] == "mistralai/Mistral-7B-v0.3"
    assert "(revision v2)" in card


@pytest.mark.parametrize(
    ("init_from", "shown"),
    [("owner/first@best", "owner/first (revision best)"), ("/home/someone/first", "first")],
)
def test_the_adapter_that_training_began_with(
    config: Config, checkpoint: Path, init_from: str, shown: str
):
    config.lora.init_from = init_from
    card = model_card(config, checkpoint, [], step=3)
    assert rf"| lora.init\_from | {shown} |" in card and "someone" not in card
    config.lora.init_from = None
    assert "init" not in model_card(config, checkpoint, [], step=3)


def test_a_full_model(config: Config, tmp_path: Path):
    config.method, config.model.name = "full", "owner/base"
    config.data.train_file = ("/home/someone/a.jsonl", "b.jsonl")
    card = model_card(config, tmp_path, [], step=3)
    assert header_of(card) == {
        "base_model": "owner/base",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["minilora", "full-fine-tuning"],
    }
    assert "a.jsonl, b.jsonl" in card and "someone" not in card
    config.model.init = "random"
    card = model_card(config, tmp_path, [], step=3)
    assert "base_model" not in header_of(card) and "random weights" in card


def test_datasets_of_the_hub_are_in_the_header(config: Config, checkpoint: Path):
    config.data.train_file = ("owner/rows@v1:train", "local.jsonl")
    card = model_card(config, checkpoint, [], step=3)
    assert header_of(card)["datasets"] == ["owner/rows"]
    assert "owner/rows@v1:train, local.jsonl" in card


def test_files_with_a_format_of_their_own(config: Config, checkpoint: Path):
    config.data.train_file = ("/home/someone/a.jsonl", "owner/rows")
    formats = {"/home/someone/a.jsonl": RowFormat("messages"), "owner/rows": RowFormat(chat=False)}
    config.data.file_formats = formats
    card = model_card(config, checkpoint, [], step=3)
    assert r"| data.file\_formats | a.jsonl: messages, owner/rows: paths |" in card
    assert "someone" not in card


@pytest.mark.parametrize(
    "name",
    [
        "a/b\n---\nlicense: mit",
        "a: [b",
        "x | y <script> `z`",
        "/home/someone/'odd' \"name\": #1",
        "{step}",
        "日本/語",
        "a/b: c",
    ],
)
def test_a_strange_name_of_the_base(config: Config, checkpoint: Path, name: str):
    config.model.name = name
    card = model_card(config, checkpoint, [], step=3)
    assert header_of(card).keys() == {"library_name", "pipeline_tag", "tags"}
    assert "someone" not in card and "<script>" not in card and card.count("\n---\n") == 1
