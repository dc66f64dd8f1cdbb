"""infer.py on runs of ours, merged models and plain directories: the answers are those of transformers and PEFT to the very
prompt the model was trained with, in each format; and what it refuses."""

import copy
import functools
import itertools
import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import infer
import merge
import tiny_tokenizers
import train
from minilora.config import Config, DataConfig, EvalConfig, LogConfig, LoraConfig, ModelConfig, TrainConfig, UserError
from minilora.tokenizer import Tokenizer
from tiny_models import tiny

ROOT = Path(__file__).resolve().parent.parent
NEW_TOKENS = 12
TEXT = "Art in 서울?"
COUNT = itertools.count()  # an output is never another job's


def base_of(name: str, directory: Path) -> Path:
    """A tiny random Llama over the vocabulary of a tokenizer, in HF layout."""
    shutil.copytree(tiny_tokenizers.BUILDERS[name](), directory)
    tokens = Tokenizer(directory)
    tiny("llama3", vocab_size=tokens.vocab_size, eos_token_id=tokens.eos_id).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_of("llama3", tmp_path_factory.mktemp("base") / "llama")


def write_rows(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def trained(base: str | Path, out: Path, data: DataConfig, rows: list[dict]) -> Path:
    """The final checkpoint of a short run on `rows`, with steps so large that the answers change."""
    data = copy.copy(data)
    data.train_file = str(write_rows(out.with_suffix(".jsonl"), rows))
    config = Config(
        output_dir=str(out), model=ModelConfig(name=str(base)), lora=LoraConfig(rank=4), data=data,
        train=TrainConfig(max_steps=2, batch_size=4, learning_rate=0.1, warmup_steps=0, gradient_checkpointing=False),
        eval=EvalConfig(num_generate_samples=0), log=LogConfig(tensorboard=False),
    )  # fmt: skip
    assert train.main(config) == 0
    return out / "checkpoint-final"


def ask(model: Path, rows: list[dict], tmp_path: Path, **options) -> list[dict]:
    """The rows that infer.py writes for these."""
    source, target = write_rows(tmp_path / "questions.jsonl", rows), tmp_path / f"answers{next(COUNT)}.jsonl"
    options = {"max_new_tokens": NEW_TOKENS, "temperature": 0.0, "stop": (), **options}
    assert infer.main(infer.Args(str(model), input=str(source), output=str(target), **options)) == 0
    return read_rows(target)


@functools.cache
def reference(directory: Path):
    """transformers' (or PEFT's) model and transformers' tokenizer of a directory."""
    tokens = AutoTokenizer.from_pretrained(directory)
    if not (directory / "adapter_config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(directory), tokens
    base = json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"]
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory), tokens


def answer(directory: Path, prompt: str | list[dict]) -> str:
    """The reference's greedy answer to a text, or to turns in the model's chat form."""
    model, tokens = reference(directory)
    if isinstance(prompt, str):
        ids = tokens(prompt).input_ids
    else:
        ids = tokens.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    given = torch.tensor([ids])
    out = model.generate(
        input_ids=given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=NEW_TOKENS,
        eos_token_id=tokens.eos_token_id, pad_token_id=0,
    )  # fmt: skip
    decode = functools.partial(tokens.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return decode(out[0])[len(decode(ids)) :]


def user(content: str) -> list[dict]:
    return [{"role": "user", "content": content}]


# --- in the form of training ---

ARTICLES = [
    {"id": f"article {i}", "title": f"title {i}", "abstract": "All of\nit. 物理", "paths": [["a", "b"], ["a", f"c{i}"]]}
    for i in range(4)
]
QUESTIONS = [{"question": f"history {i}", "year": i, "completion": "museums"} for i in range(4)]
CHATS = [
    {"messages": [{"role": "system", "content": "Be brief."}, *user(f"q{i}"), {"role": "assistant", "content": f"r{i}"}]}
    for i in range(4)
]  # fmt: skip
CHATS[3]["messages"] = [*CHATS[3]["messages"], *user("and?"), {"role": "assistant", "content": "more", "train": True}]
NOTES = [{"text": f"note {i}\n### Answer:\nof {i}"} for i in range(4)]

# the settings, the rows, and what a row asks: a text, or turns
FORMATS: dict[str, tuple[DataConfig, list[dict], Callable[[dict], str | list[dict]]]] = {
    "paths": (DataConfig(), ARTICLES, lambda row: user(f"Title: {row['title']}\n{row['abstract']}")),
    "paths without chat": (DataConfig(chat=False), ARTICLES, lambda row: f"Title: {row['title']}\n{row['abstract']}\n"),
    "paths in Mistral's form": (
        DataConfig(chat_template="mistral"), ARTICLES, lambda row: user(f"Title: {row['title']}\n{row['abstract']}"),
    ),
    "prompt": (
        DataConfig(format="prompt", prompt_template="Q: {question} ({year})?"), QUESTIONS,
        lambda row: user(f"Q: {row['question']} ({row['year']})?"),
    ),
    "prompt without chat": (
        DataConfig(format="prompt", prompt_template="Q: {question}?\nA:", chat=False), QUESTIONS,
        lambda row: f"Q: {row['question']}?\nA:",
    ),
    "messages": (DataConfig(format="messages"), CHATS, lambda row: row["messages"][:-1]),
    "text": (DataConfig(format="text", response_marker="### Answer:\n"), NOTES, lambda row: row["text"].split("of")[0]),
    "text without marker": (DataConfig(format="text"), NOTES, lambda row: row["text"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_asked_as_in_training(name: str, base: Path, tmp_path: Path):
    """By the checkpoint, which knows its form from trainer_state.json, and once merged, from minilora.json."""
    data, rows, asked = FORMATS[name]
    checkpoint = trained(base, tmp_path / "run", data, rows)
    expected = [{"id": i, **row, "generated": answer(checkpoint, asked(row))} for i, row in enumerate(rows)]
    assert len({row["generated"] for row in expected}) > 1
    assert ask(checkpoint, rows, tmp_path) == expected
    assert merge.main(merge.Args(str(checkpoint))) == 0
    merged = checkpoint / "merged"
    assert not (merged / "trainer_state.json").exists()
    assert [answer(merged, asked(row)) for row in rows] == [row["generated"] for row in expected]
    assert ask(merged, rows, tmp_path) == expected
    assert ask(base, rows, tmp_path, adapter=str(checkpoint)) == expected


@pytest.mark.parametrize("name", FORMATS)
def test_a_prompt_is_a_turn_or_a_text(name: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """--prompt asks in the trained form too; stdout holds the answer and nothing else."""
    data, rows, _ = FORMATS[name]
    checkpoint = trained(base, tmp_path / "run", data, rows)
    plain = not data.chat or data.format == "text"
    expected = answer(checkpoint, TEXT if plain else user(TEXT))
    capsys.readouterr()
    assert infer.main(infer.Args(str(checkpoint), prompt=TEXT, max_new_tokens=NEW_TOKENS, temperature=0.0, stop=())) == 0
    assert capsys.readouterr().out == expected + "\n"
    assert [row["generated"] for row in ask(checkpoint, [{"prompt": TEXT}], tmp_path)] == [expected]


@pytest.fixture(scope="module")
def checkpoint(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run on articles."""
    return trained(base, tmp_path_factory.mktemp("runs") / "run", DataConfig(), ARTICLES)


def test_raw_prompts(checkpoint: Path, tmp_path: Path):
    (row,) = ask(checkpoint, [{"prompt": TEXT}], tmp_path, raw=True)
    assert row["generated"] == answer(checkpoint, TEXT) != answer(checkpoint, user(TEXT))
    begun = "<|begin_of_text|>" + TEXT
    assert ask(checkpoint, [{"prompt": begun}], tmp_path, raw=True)[0]["generated"] == row["generated"]  # one BOS


def test_models_that_are_not_ours(base: Path, tmp_path: Path):
    """In the chat form they bring along; those without one are given the text itself."""
    assert ask(base, [{"prompt": TEXT}], tmp_path)[0]["generated"] == answer(base, user(TEXT))
    without = base_of("llama2", tmp_path / "llama2")
    assert ask(without, [{"prompt": TEXT}], tmp_path)[0]["generated"] == answer(without, TEXT)


def test_a_full_checkpoint(base: Path, tmp_path: Path):
    out = tmp_path / "run"
    config = Config(
        output_dir=str(out), method="full", model=ModelConfig(name=str(base)),
        data=DataConfig(train_file=str(write_rows(tmp_path / "rows.jsonl", ARTICLES)), chat_template="mistral"),
        train=TrainConfig(max_steps=2, batch_size=4, learning_rate=0.1, warmup_steps=0, gradient_checkpointing=False),
        eval=EvalConfig(num_generate_samples=0), log=LogConfig(tensorboard=False),
    )  # fmt: skip
    assert train.main(config) == 0
    final = out / "checkpoint-final"
    expected = [answer(final, user(f"Title: {row['title']}\n{row['abstract']}")) for row in ARTICLES]
    assert [row["generated"] for row in ask(final, ARTICLES, tmp_path)] == expected


def test_a_checkpoint_finds_its_base_from_anywhere(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Though it was trained on a relative path."""
    monkeypatch.chdir(base.parent)
    checkpoint = trained(base.name, tmp_path / "run", DataConfig(), ARTICLES)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert ask(checkpoint, [{"prompt": TEXT}], tmp_path)[0]["generated"] == answer(checkpoint, user(TEXT))


# --- several answers, sampling, stopping ---


def test_several_samples(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [{"id": "own", "prompt": TEXT}, {"prompt": "x"}]
    sampled = {"num_samples": 4, "temperature": 1.0, "top_p": 0.9}
    answers = ask(checkpoint, rows, tmp_path, **sampled)
    assert [(row["id"], row["prompt"], row["sample"]) for row in answers] == [
        *(("own", TEXT, i) for i in range(4)), *((1, "x", i) for i in range(4)),
    ]  # fmt: skip
    assert len({row["generated"] for row in answers}) == 8
    assert ask(checkpoint, rows, tmp_path, **sampled, batch_size=3) == answers
    other = ask(checkpoint, rows, tmp_path, **sampled, seed=1)
    assert not {row["generated"] for row in other} & {row["generated"] for row in answers}
    capsys.readouterr()
    infer.main(infer.Args(str(checkpoint), prompt=TEXT, max_new_tokens=NEW_TOKENS, **sampled))
    assert capsys.readouterr().out == "\n---\n".join(row["generated"] for row in answers[:4]) + "\n"


def test_stop_strings_and_lengths(checkpoint: Path, tmp_path: Path):
    whole = answer(checkpoint, user(TEXT))
    stop = whole[5:8]
    (row,) = ask(checkpoint, [{"prompt": TEXT}], tmp_path, stop=("not there", stop))
    assert row["generated"] == whole[: whole.index(stop)]
    (row,) = ask(checkpoint, [{"prompt": TEXT}], tmp_path, max_new_tokens=3)
    assert whole.startswith(row["generated"]) and len(row["generated"]) < len(whole)


# --- what it refuses ---

PLACE = "questions.jsonl:2: "
MALFORMED: dict[str, tuple[str, str, str]] = {  # format, line, what the message says of it
    "torn": ("paths", '{"title": "x", "abst', PLACE + "not JSON"),
    "no JSON": ("paths", "title: x", PLACE + "not JSON"),
    "no UTF-8": ("paths", '"\udcff"', PLACE),
    "a list": ("paths", "[1]", PLACE + ".*list"),
    "no abstract": ("paths", '{"title": "x"}', PLACE + '.*"abstract"'),
    "a number for a title": ("paths", '{"title": 7, "abstract": "x"}', PLACE + '.*"title".*int'),
    "another format's columns": ("paths", '{"question": "x"}', PLACE + '.*"prompt".*question'),
    "no column of the template": ("prompt", '{"question": "x"}', PLACE + ".*year"),
    "no marker's text": ("text", '{"note": "x"}', PLACE + '.*"text"'),
    "messages no list": ("messages", '{"messages": "x"}', PLACE + '.*"messages"'),
    "no messages": ("messages", '{"messages": []}', PLACE + '.*"messages"'),
    "a turn without role": ("messages", '{"messages": [{"content": "x"}]}', PLACE + '.*"messages"'),
    "a turn without content": ("messages", '{"messages": [{"role": "user"}]}', PLACE + '.*"messages"'),
}


@pytest.fixture(scope="module")
def checkpoints(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    runs = tmp_path_factory.mktemp("checkpoints")
    return {name: trained(base, runs / name, *FORMATS[name][:2]) for name in ("paths", "prompt", "messages", "text")}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_rows_are_named(case: str, checkpoints: dict[str, Path], tmp_path: Path):
    name, line, message = MALFORMED[case]
    source, target = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    first, third = (json.dumps({**FORMATS[name][1][0], "id": f"line {i}"}) for i in (1, 3))
    source.write_text(f"{first}\n{line}\n{third}\n", encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match=message):
        infer.main(infer.Args(str(checkpoints[name]), input=str(source), output=str(target)))
    assert not target.exists()


BAD_ARGS: dict[str, tuple[list[str], str]] = {
    "metrics of nothing": (["--prompt", "x", "--metrics", "bleu"], "--input"),
    "a misspelt metric": (["--input", "rows.jsonl", "--output", "out.jsonl", "--metrics", "blue"], "bleu"),
    "both": (["--prompt", "x", "--input", "rows.jsonl", "--output", "out.jsonl"], "--prompt"),
    "no output": (["--input", "rows.jsonl"], "--output"),
    "output alone": (["--prompt", "x", "--output", "out.jsonl"], "--output"),
    "no such input": (["--input", "absent.jsonl", "--output", "out.jsonl"], "absent.jsonl"),
    "no place for the output": (["--input", "rows.jsonl", "--output", "absent/out.jsonl"], "absent"),
    "temperature": (["--prompt", "x", "--temperature", "-1"], "temperature"),
    "top_p": (["--prompt", "x", "--top_p", "0"], "top_p"),
    "max_new_tokens": (["--prompt", "x", "--max_new_tokens", "0"], "max_new_tokens"),
    "num_samples": (["--prompt", "x", "--num_samples", "0"], "num_samples"),
    "malformed": (["--input", "malformed.jsonl", "--output", "out.jsonl"], "malformed.jsonl:1: "),
}


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The script itself, run in a directory of its own: (arguments) -> exit code, stdout, stderr."""
    write_rows(tmp_path / "rows.jsonl", [{"prompt": TEXT}])
    (tmp_path / "malformed.jsonl").write_text("{\n")
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["infer.py", *args])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "infer.py"), run_name="__main__")
        return stop.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("case", BAD_ARGS)
def test_bad_arguments_are_one_message(case: str, checkpoint: Path, command, tmp_path: Path):
    args, message = BAD_ARGS[case]
    code, out, err = command(str(checkpoint), *args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and message in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("name", ["./absent", "absent", "{}/absent"])
def test_an_unknown_model_or_adapter_is_one_message(name: str, base: Path, command, tmp_path: Path):
    absent = name.format(tmp_path)
    for args in ([absent], [str(base), "--adapter", absent]):
        code, out, err = command(*args, "--prompt", "x")
        assert (code, out) == (2, "")
        assert re.fullmatch(rf"error: .*{re.escape(repr(absent))}.*\n", err)


@pytest.mark.parametrize("name", [None, ""])  # as PEFT writes it for a model that was made in memory
def test_an_adapter_of_an_unnamed_base_is_refused(name: str | None, checkpoint: Path, base: Path, tmp_path: Path):
    adapter = shutil.copytree(checkpoint, tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": name}))
    with pytest.raises(UserError, match=rf"{re.escape(str(adapter))}.*base_model_name_or_path"):
        infer.main(infer.Args(str(adapter), prompt=TEXT))
    assert ask(base, [{"prompt": TEXT}], tmp_path, adapter=str(adapter))[0]["generated"] == answer(checkpoint, user(TEXT))


def test_an_empty_prompt_is_refused(tmp_path: Path):
    """A model without BOS has nothing to go on."""
    base = base_of("qwen", tmp_path / "qwen")
    with pytest.raises(UserError, match="empty"):
        infer.main(infer.Args(str(base), prompt="", raw=True))


def test_the_command_line(checkpoint: Path, command, tmp_path: Path):
    model = [str(checkpoint), "--max_new_tokens", str(NEW_TOKENS)]
    code, out, _ = command(*model, "--prompt", TEXT, "--stop", "not there", "nor this")
    assert (code, out) == (0, answer(checkpoint, user(TEXT)) + "\n")
    code, out, err = command(*model, "--input", "rows.jsonl", "--output", "out.jsonl", "--batch-size", "2")
    assert (code, out) == (0, "") and "1 answers: out.jsonl" in err
    assert read_rows(tmp_path / "out.jsonl") == [{"id": 0, "prompt": TEXT, "generated": answer(checkpoint, user(TEXT))}]
    assert command(str(checkpoint), "--promt", "x")[0] == 2


def test_blank_lines_of_the_input_are_passed_over(checkpoint: Path, tmp_path: Path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n\n', encoding="utf-8")
    args = infer.Args(
        str(checkpoint), input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "out.jsonl"), max_new_tokens=2, raw=True
    )
    assert infer.main(args) == 0
    assert [row["prompt"] for row in read_rows(tmp_path / "out.jsonl")] == ["a", "b"]


def test_arguments_that_would_lose_the_answers_are_refused(checkpoint: Path, tmp_path: Path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "\\ud800"}\n', encoding="utf-8")
    for options, message in (
        ({"output": str(tmp_path)}, "is a directory"),
        ({"output": str(tmp_path / "out"), "stop": ("",)}, "--stop"),
        ({"output": str(tmp_path / "out")}, "in.jsonl:1"),
    ):
        with pytest.raises(UserError, match=message):
            infer.main(infer.Args(str(checkpoint), input=str(tmp_path / "in.jsonl"), **options))
