"""Special tokens added to a tokenizer, held against transformers'."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

import train
from helpers import tiny_tokenizers
from helpers.added_token_runs import ADDED, copy_files, run_config, vocab_size
from helpers.tiny_models import tiny
from helpers.tiny_runs import base_model
from minilora.cli import validate
from minilora.data.added_tokens import tokenizer_with_added_tokens
from minilora.data.tokenizer import Tokenizer
from minilora.errors import UserError
from minilora.training.datasets import make_tokenizer


@pytest.mark.parametrize("name", tiny_tokenizers.BUILDERS)
def test_an_added_token_is_one_id_as_in_transformers(name: str, tmp_path: Path):
    base = tiny_tokenizers.copy(tiny_tokenizers.BUILDERS[name](), tmp_path / "base")
    before = Tokenizer(base)
    directory = tokenizer_with_added_tokens(base, ADDED)
    ours, theirs = Tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    reference = AutoTokenizer.from_pretrained(base)  # the same, done by transformers
    assert reference.add_special_tokens({"additional_special_tokens": [*ADDED]}) == 2

    ids = [before.vocab_size, before.vocab_size + 1]
    assert [ours.specials[token] for token in ADDED] == ids
    assert theirs.convert_tokens_to_ids([*ADDED]) == ids
    assert reference.convert_tokens_to_ids([*ADDED]) == ids
    assert ours.vocab_size == before.vocab_size + 2 == len(theirs)

    # no space after a token: there transformers 5 and sentencepiece disagree (test_tokenizer.py)
    texts = ["a<edge>b", "music <edge>art<|끝|>", "<edge><edge>", "<edg e>", "물리학<edge>과학\n"]
    for text in texts:
        encoded = ours.backend.encode(text).ids
        for other in (theirs, reference):
            assert encoded == other(text, add_special_tokens=False)["input_ids"]
        assert [encoded.count(i) for i in ids] == [text.count(token) for token in ADDED]
        decoded = theirs.decode(encoded, skip_special_tokens=True)
        assert ours.decode(encoded).replace(" ", "") == decoded.replace(" ", "")

    plain = "music of the art, 과학 <unrelated>"
    assert ours.encode(plain) == before.encode(plain)
    assert tokenizer_with_added_tokens(base, ADDED) == directory, "kept, not made again"
    assert tokenizer_with_added_tokens(base, ADDED[:1]) != directory


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("bases")
    return {
        "mistral": base_model(home / "mistral", "llama2", "mistral"),
        "llama2": base_model(home / "llama2", "llama3", "llama2"),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data__add_tokens": ("</s>",)}, "</s>.*already"),
        ({"data__add_tokens": ("<a>", "<b>", "<a>")}, "twice"),
        ({"data__add_tokens": ("<a>", "")}, "empty"),
        ({"data__add_tokens": (" ",)}, "empty"),
        ({"lora__train_embeddings": False}, "add_tokens.*train_embeddings"),
    ],
)
@pytest.mark.parametrize("name", ["mistral", "llama2"])
def test_tokens_that_cannot_be_added(name: str, change: dict, message: str, bases, tmp_path):
    run = run_config(tmp_path, bases[name], **change)
    with pytest.raises(UserError, match=message):
        validate(run)
        make_tokenizer(run, bases[name])
    assert not Path(run.output_dir).exists()


@pytest.mark.parametrize("name", ["mistral", "llama2"])
def test_an_ordinary_piece_cannot_be_added(name: str, bases, tmp_path):
    backend = Tokenizer(bases[name]).backend
    candidates = ("▁music", "music", "ic")
    piece = next(piece for piece in candidates if backend.token_to_id(piece) is not None)
    run = run_config(tmp_path, bases[name], data__add_tokens=(piece,))
    with pytest.raises(UserError, match=f"{piece}.*already"):
        validate(run)
        make_tokenizer(run, bases[name])
    assert not Path(run.output_dir).exists()


def test_a_model_is_not_resized_for_a_token_nobody_added(bases, tmp_path):
    """A vocabulary larger than the model's is refused by the token's name."""
    model = tiny("llama3", vocab_size=vocab_size(bases["llama2"]))
    model.save_pretrained(tmp_path / "base")
    tokenizer = tokenizer_with_added_tokens(bases["llama2"], ADDED)
    base = copy_files(tokenizer, tmp_path / "base")
    with pytest.raises(UserError, match=r"<edge>|끝"):
        train.main(run_config(tmp_path / "run", base, data__add_tokens=()))
