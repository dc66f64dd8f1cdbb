"""What a model is asked for a row, held against what it was trained on."""

import pytest

from helpers.data_rows import EVERY_TOKENIZER, GOOD_ROWS, load_rows, tokenizer
from minilora.config import DataConfig
from minilora.data.prompts import prompt_for_row


@EVERY_TOKENIZER
@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("format", GOOD_ROWS)
def test_a_model_is_asked_with_the_ids_it_was_trained_on(format, chat, name, tmp_path):
    """One rendering, one encoder, one BOS."""
    of, row = tokenizer(name), GOOD_ROWS[format]
    marker = "\nA:" if format == "text" else None
    settings = {"format": format, "chat": chat, "response_marker": marker}
    prompt, _ = load_rows(tmp_path, [row], of, **settings).prompt_and_target(0)
    asked = prompt_for_row(row, DataConfig(**settings), of)
    assert of.encode(asked).ids == prompt
