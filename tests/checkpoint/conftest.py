"""A short run with an adapter and one of all weights, which the tests of checkpoints share."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedModel

import train
from helpers import tiny_tokenizers
from helpers.checkpoints import short_run
from helpers.tiny_models import tiny
from minilora.data.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def hf() -> PreTrainedModel:
    """A tiny Llama with the vocabulary of a tokenizer; shared, so it must not be changed."""
    return tiny("llama3", vocab_size=Tokenizer(tiny_tokenizers.llama3()).vocab_size)


@pytest.fixture(scope="session")
def base(hf: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model and its tokenizer as a directory, with rows to train on."""
    directory = tmp_path_factory.mktemp("base") / "llama"
    shutil.copytree(tiny_tokenizers.llama3(), directory)
    hf.save_pretrained(directory)
    rows = [{"prompt": f"prompt {i}", "completion": "museums in France"} for i in range(8)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "rows.jsonl").write_text(text)
    return directory


@pytest.fixture(scope="session")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Output directories of the runs by method."""
    outs = {method: tmp_path_factory.mktemp("run") / method for method in ("lora", "full")}
    for method, out in outs.items():
        assert train.main(short_run(method, base, out)) == 0
    return outs
