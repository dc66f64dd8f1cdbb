"""The warning about special tokens that the base has never learnt."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import minilora
import train
from helpers.added_token_runs import (
    EMBEDDING,
    HEAD,
    copy_files,
    fit,
    logits_of,
    make_bases,
    run_config,
    write_jsonl,
)
from helpers.tiny_runs import config
from minilora.data.tokenizer import Tokenizer

END_OF_TURN = "<|eot_id|>"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_bases(tmp_path_factory.mktemp("bases"))


def edit_weights(base: Path, target: Path, change: Callable) -> Path:
    """Copy a base; change(tensors, {special token: id}) edits the copy's weights."""
    copy_files(base, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors, Tokenizer(target).specials)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def warning_of(tmp_path: Path, base: Path, capsys, **changes) -> str:
    """What is said of unlearnt tokens when a run over chats begins."""
    rows = [{"prompt": f"music {i}", "completion": "art"} for i in range(3)]
    settings = {
        "data__train_file": write_jsonl(tmp_path / "chats.jsonl", rows),
        "data__eval_file": None,
        "data__format": "prompt",
        "data__chat_template": None,
        "preview": 1,
        **changes,
    }
    capsys.readouterr()
    assert train.main(config(tmp_path, base, **settings)) == 0
    lines = capsys.readouterr().err.splitlines()
    return "".join(line for line in lines if "never learnt" in line)


def scale(matrix: str, factor: float = 0.0) -> Callable:
    """Make the row of the end of a turn shorter, or zero."""
    return lambda tensors, specials: tensors[matrix][specials[END_OF_TURN]].mul_(factor)


def duplicate(matrix: str) -> Callable:
    """Make the row of the end of a turn equal to that of another token."""

    def change(tensors, specials):
        rows = tensors[matrix]
        rows[specials[END_OF_TURN]].copy_(rows[specials["<|end_of_text|>"]])

    return change


@pytest.mark.parametrize("matrix", [EMBEDDING, HEAD])
@pytest.mark.parametrize(
    "change",
    [scale, functools.partial(scale, factor=1e-3), duplicate],
    ids=["zero", "tiny", "duplicate"],
)
def test_an_unlearnt_end_of_turn_is_named(matrix: str, change, bases, tmp_path, capsys):
    base = edit_weights(bases["llama3"], tmp_path / "base", change(matrix))
    warning = warning_of(tmp_path, base, capsys)
    assert END_OF_TURN in warning and "train_embeddings" in warning
    for other in ("<|begin_of_text|>", "<|start_header_id|>", "<|end_of_text|>"):
        assert other not in warning
    assert not warning_of(tmp_path, base, capsys, lora__train_embeddings=True)


@pytest.mark.parametrize("name", ["llama2", "mistral", "llama3", "qwen", "bfloat16"])
def test_no_warning_of_a_healthy_base(name: str, bases, tmp_path, capsys):
    template = "mistral" if name in ("llama2", "mistral") else None
    assert not warning_of(tmp_path, bases[name], capsys, data__chat_template=template)


def test_no_warning_where_an_adapter_brings_the_matrices(bases, tmp_path, capsys):
    """An adapter at lora.init_from brings lora.train_embeddings too."""
    base = edit_weights(bases["llama3"], tmp_path / "base", scale(HEAD))
    settings = {"data__add_tokens": (), "train__max_steps": 1}
    first = fit(run_config(tmp_path / "first", base, **settings))
    (tmp_path / "run").mkdir()
    assert not warning_of(tmp_path / "run", base, capsys, lora__init_from=str(first))


def test_no_warning_of_tokens_that_no_row_uses(bases, tmp_path, capsys):
    def change(tensors, specials):
        for matrix in (EMBEDDING, HEAD):
            tensors[matrix][specials["<|end_of_text|>"]] = 0

    base = edit_weights(bases["llama3"], tmp_path / "base", change)
    assert not warning_of(tmp_path, base, capsys)


def test_no_warning_of_a_head_row_that_is_never_predicted(bases, tmp_path, capsys):
    """BOS and headers occur in prompts alone: their rows of the head are not needed."""

    def change(tensors, specials):
        ids = [specials["<|begin_of_text|>"], specials["<|start_header_id|>"]]
        tensors[HEAD][ids] = 0

    base = edit_weights(bases["llama3"], tmp_path / "base", change)
    assert not warning_of(tmp_path, base, capsys)


def test_an_unlearnt_row_of_a_tied_model(bases, tmp_path, capsys):
    def change(tensors, specials):
        tensors[EMBEDDING][specials["<|im_end|>"]].zero_()

    base = edit_weights(bases["qwen"], tmp_path / "base", change)
    assert "<|im_end|>" in warning_of(tmp_path, base, capsys)


@pytest.mark.parametrize("name, end", [("llama3", END_OF_TURN), ("qwen", "<|im_end|>")])
def test_an_unlearnt_end_is_learnt_with_the_embeddings_only(name, end, bases, tmp_path):
    """A base whose end of turn has a zero row never stops after training of adapters alone."""

    def change(tensors, specials):
        for matrix in {EMBEDDING, HEAD} & tensors.keys():  # the second is tied, and has no head
            tensors[matrix][specials[end]] = 0

    base = edit_weights(bases[name], tmp_path / "base", change)
    words = ("one", "two", "three", "four")
    rows = [{"prompt": f"music {word}", "completion": f"art {word}"} for word in words]
    settings = {
        "data__train_file": write_jsonl(tmp_path / "chats.jsonl", rows),
        "data__eval_file": None,
        "data__format": "prompt",
        "data__chat_template": None,
        "train__max_steps": 60,
        "train__learning_rate": 1e-2,
        "train__warmup_steps": 0,
        "eval__num_generate_samples": 0,
    }
    answers_that_end = {}
    for with_embeddings in (False, True):
        directory = tmp_path / str(with_embeddings)
        directory.mkdir()
        run = config(directory, base, **settings, lora__train_embeddings=with_embeddings)
        model, tokenizer = minilora.load(str(fit(run)), device="cpu")
        stop = tokenizer.specials[end]
        answers_that_end[with_embeddings] = 0
        for row in rows:
            turns = [{"role": "user", "content": row["prompt"]}]
            ids = tokenizer.encode(tokenizer.render(turns, add_generation_prompt=True)).ids
            answer: list[int] = []
            while len(answer) < 30 and answer[-1:] != [stop]:
                logits = logits_of(model, torch.tensor(ids + answer))
                answer.append(int(logits[-1].argmax()))
            answers_that_end[with_embeddings] += answer[-1] == stop
    assert answers_that_end == {False: 0, True: 4}
