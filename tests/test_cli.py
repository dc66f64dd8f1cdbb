"""Config files and flags: what is accepted, and how a mistake is reported before anything runs."""

import ast
import dataclasses
import json
import os
import re
from itertools import pairwise
from pathlib import Path

import pytest

from minilora import config as config_module
from minilora.checkpoint.resume import changed_fields
from minilora.cli import load_config
from minilora.config import Config, flatten_config
from minilora.errors import RunError, UserError
from minilora.exit_codes import run_script

FIELDS = {field.name: getattr(Config(), field.name) for field in dataclasses.fields(Config)}
SECTIONS = {name: type(value) for name, value in FIELDS.items() if dataclasses.is_dataclass(value)}
SECTION_CLASSES = ", ".join(section.__name__ for section in SECTIONS.values())
IMPORTS = f"from minilora.config import Config, RowFormat, {SECTION_CLASSES}\n"
MINIMAL = 'config = Config(data=DataConfig(train_file="t.jsonl"))\n'


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Write a config file, whose first line holds the imports, and load it with flags."""
    monkeypatch.setenv("COLUMNS", "200")  # messages are not wrapped

    def load_with(*flags: str, body: str = MINIMAL) -> Config:
        file = tmp_path / "a_config.py"
        file.write_text(IMPORTS + body)
        return load_config([str(file), *flags])

    return load_with


# ---- flags


@pytest.mark.parametrize(
    "flags, field, value",
    [
        ("--output_dir x", "output_dir", "x"),
        ("--output-dir x", "output_dir", "x"),
        ("--output_dir=x", "output_dir", "x"),
        ("--train.learning_rate 1e-3", "train.learning_rate", 1e-3),
        ("--train.learning-rate 1e-3", "train.learning_rate", 1e-3),
        ("--train.learning_rate 1", "train.learning_rate", 1.0),
        ("--data.edge_dropping False", "data.edge_dropping", False),
        ("--data.edge-dropping True", "data.edge_dropping", True),
        ("--data.strict", "data.strict", True),
        ("--data.strict --seed 3", "data.strict", True),
        ("--seed 3 --deterministic", "deterministic", True),
        ("--deterministic", "deterministic", True),
        ("--deterministic False", "deterministic", False),
        ("--deterministic=True", "deterministic", True),
        ("--train.gradient-checkpointing --output_dir x", "train.gradient_checkpointing", True),
        ("--lora.target_modules q_proj v_proj", "lora.target_modules", ("q_proj", "v_proj")),
        ("--lora.target-modules o_proj --seed 1", "lora.target_modules", ("o_proj",)),
        ("--train.max_steps 7", "train.max_steps", 7),
        ("--train.max_steps None", "train.max_steps", None),
        ("--data.eval_file None", "data.eval_file", None),
        ("--data.eval_file e.jsonl", "data.eval_file", "e.jsonl"),
        ("--data.train_file A", "data.train_file", "A"),
        ("--data.train_file A B --seed 1", "data.train_file", ("A", "B")),
        ("--data.train_weights 2", "data.train_weights", (2.0,)),
        ("--data.eval_first", "data.eval_first", True),
        ("--lora.train_embeddings --seed 3", "lora.train_embeddings", True),
        ("--train.ema_decay 0.999", "train.ema_decay", 0.999),
        ("--train.ema_decay 0", "train.ema_decay", 0.0),
        ("--train.save_steps epoch", "train.save_steps", "epoch"),
        ("--train.save_steps 7", "train.save_steps", 7),
        ("--train.save_steps 0.5", "train.save_steps", 0.5),
        ("--train.save_steps 0", "train.save_steps", 0),
        ("--eval.eval_steps epoch", "eval.eval_steps", "epoch"),
        ("--eval.eval_steps 0.25", "eval.eval_steps", 0.25),
        ("--eval.eval_steps 0", "eval.eval_steps", 0),
        ("--eval.eval_steps None", "eval.eval_steps", None),
        ("--eval.max_time 2.5", "eval.max_time", 2.5),
        ("--eval.eval-on-start", "eval.eval_on_start", True),
        ("--hub.repo_id me/it", "hub.repo_id", "me/it"),
        ("--hub.private False", "hub.private", False),
        ("--method full", "method", "full"),
        ("--preview 3", "preview", 3),
    ],
)
def test_flag_replaces_one_value(flags, field, value, load):
    before = {**flatten_config(Config()), "data.train_file": "t.jsonl"}
    after = flatten_config(load(*flags.split()))
    assert after[field] == value
    assert type(after[field]) is type(value)
    others = {name for name in after if after[name] != before[name]} - {field}
    assert others <= {"seed", "output_dir"}, "only what the flags name"


def test_flags_replace_values_of_the_file(load):
    body = (
        'config = Config(seed=5, data=DataConfig(train_file="t.jsonl", chat=False))\n'
        "config.train.epochs = 3\n"
    )
    config = load("--train.epochs", "4", body=body)
    assert (config.seed, config.data.chat, config.train.epochs) == (5, False, 4.0)
    assert flatten_config(config) == {
        **flatten_config(Config()),
        "seed": 5,
        "data.chat": False,
        "data.train_file": "t.jsonl",
        "train.epochs": 4.0,
    }


@pytest.mark.parametrize(
    "flags, nearest",
    [
        ("--train.learning_rat 1e-3", "--train.learning_rate"),
        ("--train.learning-rates 1e-3", "--train.learning_rate"),
        ("--learning_rate 1e-3", "--train.learning_rate"),
        ("--data.edge_droping False", "--data.edge_dropping"),
        ("--lora.target_module q_proj", "--lora.target_modules"),
        ("--no-deterministic", "--deterministic"),
    ],
)
def test_unknown_flag_exits_with_2_and_names_the_nearest(flags, nearest, load, capsys):
    with pytest.raises(SystemExit) as exit:
        load(*flags.split())
    assert exit.value.code == 2
    captured = capsys.readouterr()
    message = captured.out + captured.err
    assert flags.split()[0] in message
    assert nearest in message


@pytest.mark.parametrize(
    "flags",
    [
        "--train.learning_rate fast",
        "--train.batch_size 1.5",
        "--train.max_steps soon",
        "--data.chat maybe",
        "--model.bits 5",
        "--train.save_steps epochs",
        "--eval.eval_steps never",
        "--data.file_formats a.csv",
        "--train.ema_decay much",
        "--hub.push perhaps",
        "--data.train_weights twice",
        "--method lore",
        "--data.too_long cut",
        "--seed",
        "--train.epochs",
        "another_config.py",
    ],
)
def test_flag_with_a_wrong_value_exits_with_2_and_is_named(flags, load, capsys):
    with pytest.raises(SystemExit) as exit:
        load(*flags.split())
    assert exit.value.code == 2
    captured = capsys.readouterr()
    assert flags.split()[0] in captured.out + captured.err


# ---- config files


@pytest.mark.parametrize(
    "body, message",
    [
        ("config = Config(\n    modle=ModelConfig(),\n)\n", r":2: .*'modle'.*did you mean 'model'"),
        (
            "config = Config()\ndata = DataConfig(train_fil='x')\n",
            r":3: .*'train_fil'.*did you mean 'train_file'",
        ),
        (
            "config = Config()\n\nconfig.train.epoch = 3\n",
            r":4: .*'epoch'.*did you mean 'epochs'",
        ),
        (
            "config = Config()\nconfig.output = 'x'\n",
            r":3: .*'output'.*did you mean 'output_dir'",
        ),
        ("config = Config(\n", r":2: SyntaxError"),
        ("x = 1\n  y = 2\n", r":3: IndentationError"),
        ("config = Config()\nconfig.seed = 1 / 0\n", r":3: ZeroDivisionError"),
        (
            "import no_such_module_anywhere\n",
            r":2: ModuleNotFoundError.*no_such_module_anywhere",
        ),
        (
            "def helper():\n    return undefined\n\n\nconfig = helper()\n",
            r":3: NameError.*undefined",
        ),
        ("settings = Config()\n", r": must define `config = Config\(\.\.\.\)`"),
        ("config = {'seed': 1}\n", r": must define .*found dict"),
        ("config = DataConfig()\n", r": must define .*found DataConfig"),
    ],
)
def test_config_file_error_names_the_line(body, message, load):
    with pytest.raises(UserError, match=r"a_config\.py" + message):
        load(body=body)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("seed='1'", r"seed = '1'"),
        ("train=TrainConfig(learning_rate='1e-3')", r"train\.learning_rate = '1e-3'"),
        ("train=TrainConfig(batch_size=1.5)", r"train\.batch_size = 1\.5"),
        ("train=TrainConfig(batch_size=True)", r"train\.batch_size = True"),
        ("train=TrainConfig(max_steps=False)", r"train\.max_steps = False"),
        ("lora=LoraConfig(alpha=True)", r"lora\.alpha = True"),
        ("data=DataConfig(chat=1)", r"data\.chat = 1"),
        ("data=DataConfig(train_file=None)", r"data\.train_file = None"),
        ("data=DataConfig(too_long='cut')", r"data\.too_long = 'cut'"),
        ("model=ModelConfig(bits=5)", r"model\.bits = 5"),
        ("lora=LoraConfig(target_modules='q_proj')", r"lora\.target_modules = 'q_proj'"),
        ("lora=LoraConfig(target_modules=('q_proj', 5))", r"lora\.target_modules = .*5"),
        ("data=DataConfig(train_file=('a', 5))", r"data\.train_file = .*5"),
        ("data=DataConfig(train_weights=2.0)", r"data\.train_weights = 2\.0"),
        ("data=DataConfig(train_weights=('2',))", r"data\.train_weights = .*'2'"),
        ("data=DataConfig(eval_first=1)", r"data\.eval_first = 1"),
        ("data=DataConfig(add_tokens='<x>')", r"data\.add_tokens = '<x>'"),
        ("lora=LoraConfig(train_embeddings='yes')", r"lora\.train_embeddings = 'yes'"),
        ("train=TrainConfig(ema_decay=True)", r"train\.ema_decay = True"),
        ("train=TrainConfig(save_steps='epochs')", r"train\.save_steps = 'epochs'"),
        ("train=TrainConfig(save_steps=True)", r"train\.save_steps = True"),
        ("eval=EvalConfig(eval_steps='0.5')", r"eval\.eval_steps = '0\.5'(.|\n)*without quotes"),
        ("eval=EvalConfig(eval_steps=False)", r"eval\.eval_steps = False"),
        ("data=DataConfig(file_formats=['a'])", r"data\.file_formats = \('a',\)"),
        ("data=DataConfig(file_formats={'a': 'text'})", r"data\.file_formats = {'a': 'text'}"),
        (
            "data=DataConfig(file_formats={'a.csv': RowFormat(chat='no')})",
            r"data\.file_formats\['a\.csv'\]\.chat = 'no'",
        ),
        ("hub=HubConfig(repo_id=3)", r"hub\.repo_id = 3"),
        ("train=DataConfig()", r"train = "),
        ("train={'epochs': 1}", r"train = "),
        ("train=TrainConfig", r"train = "),
    ],
)
def test_wrong_type_in_a_config_file_names_the_field(arguments, message, load):
    with pytest.raises(UserError, match=rf"a_config\.py: {message}"):
        load(body=f"config = Config({arguments})\n")


def test_missing_config_file_is_named(tmp_path):
    for path in (tmp_path / "absent.py", tmp_path):
        with pytest.raises(UserError, match=re.escape(str(path))):
            load_config([str(path)])
    for argv in ([], ["--seed", "1"]):
        with pytest.raises(UserError, match=r"no config file given.*CONFIG\.py"):
            load_config(argv)


def test_ints_and_lists_are_accepted_for_floats_and_tuples(load):
    body = MINIMAL + (
        'config.lora = LoraConfig(alpha=8, target_modules=["q_proj"])\nconfig.train.epochs = 3\n'
    )
    config = load(body=body)
    assert config.lora.alpha == 8
    assert config.lora.target_modules == ("q_proj",)
    assert config.train.epochs == 3


def test_config_file_may_compute(load):
    loop = "for name in ('save_steps', 'logging_steps'):\n    setattr(config.train, name, 7)\n"
    config = load(body=MINIMAL + loop)
    assert (config.train.save_steps, config.train.logging_steps) == (7, 7)


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[1] / "configs").glob("*.py")), ids=lambda file: file.name
)
def test_config_that_comes_with_the_project_loads(file):
    assert isinstance(load_config([str(file), "--data.train_file", "t.jsonl"]), Config)


# ---- contradictions


@pytest.mark.parametrize(
    "flags, fields",
    [
        ("--lora.rank 0", "lora.rank"),
        ("--lora.dropout 1", "lora.dropout"),
        ("--lora.dropout -0.1", "lora.dropout"),
        ("--lora.target_modules", "lora.target_modules"),
        ("--method full --model.bits 4", "method model.bits"),
        ("--method full --model.bits 8", "method model.bits"),
        ("--method full --lora.init_from a", "method lora.init_from"),
        ("--model.init random", "model.init method"),
        ("--train.epochs 0", "train.epochs"),
        ("--train.max_steps 0", "train.max_steps"),
        ("--train.batch_size 0", "batch"),
        ("--train.grad_acc_steps 0", "grad_acc_steps"),
        ("--eval.batch_size 0", "batch"),
        ("--train.learning_rate 0", "train.learning_rate"),
        ("--train.learning_rate nan", "train.learning_rate"),
        ("--train.warmup_steps -1", "train.warmup_steps"),
        ("--train.warmup_ratio 1.1", "train.warmup_ratio"),
        ("--train.warmup_ratio -0.1", "train.warmup_ratio"),
        ("--train.min_lr_ratio 1.1 --train.lr_scheduler cosine", "train.min_lr_ratio"),
        ("--train.min_lr_ratio -0.1 --train.lr_scheduler cosine", "train.min_lr_ratio"),
        ("--train.min_lr_ratio 0.1", "train.min_lr_ratio lr_scheduler"),
        (
            "--train.min_lr_ratio 0.1 --train.lr_scheduler constant",
            "train.min_lr_ratio lr_scheduler",
        ),
        ("--train.max_grad_norm -1", "train.max_grad_norm"),
        ("--data.edge_draw once --data.edge_dropping False", "data.edge_draw data.edge_dropping"),
        ("--data.edge_draw once --data.format text", "data.edge_draw data.format"),
        ("--train.logging_steps 0", "logging_steps"),
        ("--eval.eval_steps -1", "eval.eval_steps"),
        ("--eval.eval_steps 1.5", "eval.eval_steps"),
        ("--eval.eval_steps -0.5", "eval.eval_steps"),
        ("--eval.eval_steps nan", "eval.eval_steps"),
        ("--train.save_steps 1.0", "train.save_steps 'epoch'"),
        ("--train.save_steps -1", "train.save_steps"),
        ("--eval.eval_steps 0 --eval.eval_on_start", "eval.eval_steps eval.eval_on_start"),
        (
            "--eval.eval_steps 0 --train.early_stopping_patience 2",
            "eval.eval_steps train.early_stopping_patience",
        ),
        ("--eval.metrics ontology", "eval.metrics infer.py"),
        (
            "--eval.eval_steps 0 --train.metric_for_best_model loss",
            "eval.eval_steps train.metric_for_best_model",
        ),
        ("--eval.max_time 0", "eval.max_time"),
        ("--eval.max_time -1", "eval.max_time"),
        ("--eval.max_time nan", "eval.max_time"),
        ("--parallel.strategy hsdp", "parallel.shard_size parallel.strategy"),
        ("--parallel.strategy hsdp --parallel.shard_size 1", "parallel.shard_size ddp"),
        ("--train.save_total_limit 0", "train.save_total_limit"),
        ("--data.max_seq_length 1", "data.max_seq_length"),
        ("--data.train_size 0", "data.train_size"),
        ("--data.eval_size 0", "data.eval_size"),
        ("--data.num_workers 0", "data.num_workers"),
        ("--data.response_marker A:", "data.response_marker data.format"),
        ("--data.format prompt --data.response_marker A:", "data.response_marker data.format"),
        ("--data.format text --data.response_marker=", "data.response_marker"),
        ("--eval.temperature -1", "eval.temperature"),
        ("--eval.top_p 0", "eval.top_p"),
        ("--eval.top_p 1.1", "eval.top_p"),
        ("--eval.num_generate_samples -1", "eval.num_generate_samples"),
        ("--eval.max_new_tokens 0", "max_new_tokens"),
        ("--preview -1", "preview"),
        ("--data.train_file=", "data.train_file"),
        ("--data.train_file A A", "data.train_file data.train_weights"),
        ("--data.train_weights 1 2", "data.train_weights"),
        ("--data.train_file A B --data.train_weights 1", "data.train_weights"),
        ("--data.train_weights 0", "data.train_weights"),
        ("--data.train_weights -1", "data.train_weights"),
        ("--data.train_weights nan", "data.train_weights"),
        ("--data.train_weights inf", "data.train_weights"),
        ("--data.add_tokens <a>", "data.add_tokens lora.train_embeddings method"),
        ("--method full --data.add_tokens <a> <a>", "data.add_tokens"),
        ("--method full --data.add_tokens=", "data.add_tokens"),
        ("--train.ema_decay 1", "train.ema_decay"),
        ("--train.ema_decay -0.1", "train.ema_decay"),
        ("--train.ema_decay nan", "train.ema_decay"),
        ("--hub.push", "hub.push hub.repo_id"),
        ("--hub.push --hub.repo_id=", "hub.push hub.repo_id"),
    ],
)
def test_bad_values_name_their_fields(flags, fields, load):
    with pytest.raises(UserError) as error:
        load(*flags.split())
    assert all(field in str(error.value) for field in fields.split())


@pytest.mark.parametrize(
    "flags",
    [
        "--method full",
        "--method full --model.init random",
        "--train.warmup_steps 0",
        "--train.warmup_ratio 0",
        "--train.max_grad_norm 0",
        "--train.min_lr_ratio 0.1 --train.lr_scheduler linear",
        "--train.save_steps 1",
        "--train.save_steps 0.999 --eval.eval_steps 0.001",
        "--eval.eval_steps 0 --data.eval_file e.jsonl",
        "--eval.eval_steps 0 --eval.metrics bleu",
        "--eval.eval_steps None --train.save_steps epoch",
        "--parallel.strategy hsdp --parallel.shard_size 2",
        "--train.epochs 0.01",
        "--train.max_steps 1",
        "--data.format text",
        "--data.format text --data.response_marker A:",
        "--data.train_file A B",
        "--data.train_file A B --data.train_weights 2 0.5",
        "--data.train_weights 0.1",
        "--method full --data.add_tokens <a> <b>",
        "--data.add_tokens <a> --lora.train_embeddings",
        "--train.ema_decay 0",
        "--train.ema_decay 0.9999",
        "--hub.push --hub.repo_id me/it",
        "--hub.repo_id me/it",
        "--data.max_seq_length 2",
        "--eval.temperature 0",
        "--eval.top_p 1",
        "--eval.num_generate_samples 0",
    ],
)
def test_values_at_the_edge_are_accepted(flags, load):
    assert isinstance(load(*flags.split()), Config)


TWO_FILES = "config = Config(data=DataConfig(train_file=('a', 'b'), eval_file='e', {}))\n"
"""A config file with two training files; a test fills in the other settings of its data."""


@pytest.mark.parametrize(
    "settings, fields",
    [
        ("file_formats={'c': RowFormat(format='text')}", "data.file_formats 'c' data.train_file"),
        (
            "file_formats={'b': RowFormat(prompt_template='{q}')}",
            "['b'] prompt_template format='prompt' 'paths'",
        ),
        (
            "format='prompt', file_formats={'b': RowFormat(response_marker='A:')}",
            "['b'] response_marker format='text' 'prompt'",
        ),
        (
            "chat=False, file_formats={'b': RowFormat(format='messages')}",
            "['b'] chat=False format='messages'",
        ),
        (
            "file_formats={'b': RowFormat(format='text', response_marker='')}",
            "['b'] response_marker empty",
        ),
        (
            "response_marker='A:', file_formats={'b': RowFormat(format='prompt')}",
            "data.response_marker data.format",
        ),
    ],
)
def test_an_entry_of_file_formats_that_cannot_hold_is_named(settings, fields, load):
    with pytest.raises(UserError) as error:
        load(body=TWO_FILES.format(settings))
    assert all(field in str(error.value) for field in fields.split()), error.value


def test_every_file_may_have_a_format_of_its_own(load):
    """The model is then asked in the form of the first."""
    settings = "file_formats={'a': RowFormat(format='text'), 'b': RowFormat(format='messages')}"
    data = load(body=TWO_FILES.format(settings)).data
    assert (data.format, data.asked_form.format) == ("paths", "text")
    assert data.uses_chat_template  # for b


def test_a_file_may_have_another_format(load):
    """Each with what it inherits; flags leave the table as it is."""
    settings = (
        "format='prompt', response_template='{a}', response_marker='A:', chat=False, file_formats="
        "{'b': RowFormat(format='text'), 'e': RowFormat(prompt_template='{x}', chat=True)}"
    )
    data = load("--data.max_seq_length", "99", body=TWO_FILES.format(settings)).data
    assert list(data.file_formats) == ["b", "e"]
    assert data.for_file("a") is data and data.asked_form is data
    of_b, of_e = data.for_file("b"), data.for_file("e")
    assert (of_b.format, of_b.response_marker, of_b.chat) == ("text", "A:", False)
    assert (of_e.format, of_e.prompt_template, of_e.chat) == ("prompt", "{x}", True)
    assert of_e.response_template == "{a}" and of_e.max_seq_length == 99
    with pytest.raises(UserError, match=r"data\.file_formats: \['b'\]"):
        load("--data.train_file", "a", body=TWO_FILES.format(settings))


def test_config_read_back_from_a_checkpoint_is_unchanged(load):
    flags = (
        "--data.train_file A B --data.train_weights 2 0.5 --data.eval_first "
        "--data.add_tokens <a> --lora.train_embeddings"
    ).split()
    steps = "--train.ema_decay 0.9 --train.save_steps epoch --eval.eval_steps epoch".split()
    config = load(*flags, *steps)
    saved = json.loads(json.dumps(dataclasses.asdict(config)))
    assert changed_fields(config, saved) == []

    # a table of formats may come and go: what it changes of the rows shows in their fingerprint
    with_formats = load(*flags, *steps)
    with_formats.data.file_formats = {"B": config_module.RowFormat(format="text")}
    saved_then = json.loads(json.dumps(dataclasses.asdict(with_formats)))
    assert changed_fields(with_formats, saved_then) == changed_fields(config, saved_then) == []
    del saved["data"]["file_formats"]  # an older version's
    assert changed_fields(with_formats, saved) == []

    changes: dict[str, tuple] = {
        "train_weights": (2.0, 1.0),
        "add_tokens": ("<b>",),
        "train_file": ("A", "C"),
    }
    for field, value in changes.items():
        other = dataclasses.replace(config, data=dataclasses.replace(config.data, **{field: value}))
        (change,) = changed_fields(other, saved)
        assert change.startswith(f"data.{field}: [")
        assert str(value[-1]) in change

    for changed in (
        "--train.ema_decay 0.8",
        "--train.ema_decay None",
        "--lora.train_embeddings False --data.add_tokens",
    ):
        assert changed_fields(load(*flags, *changed.split()), saved)

    free_to_change = (
        "--train.ema_decay 0.9 --train.save_steps 5 --eval.eval_steps 6 --eval.eval_on_start "
        "--hub.push --hub.repo_id me/it --data.eval_first False"
    )
    assert changed_fields(load(*flags, *free_to_change.split()), saved) == []


# ---- help


def docstrings() -> dict[str, str]:
    """Return {"section.field": docstring}: in the source, the string under each field."""
    tree = ast.parse(Path(config_module.__file__).read_text(encoding="utf-8"))
    by_class: dict[str, dict[str, str]] = {}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or not node.name.endswith("Config"):
            continue
        by_class[node.name] = {}
        for field, after in pairwise(node.body):
            is_field = isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if is_field and is_text:
                assert isinstance(after.value.value, str)
                by_class[node.name][field.target.id] = after.value.value

    flat = by_class["Config"]
    for name, section in SECTIONS.items():
        for field, text in by_class[section.__name__].items():
            flat[f"{name}.{field}"] = text
    return flat


def test_every_field_has_a_docstring():
    assert set(docstrings()) == set(flatten_config(Config()))
    assert all(len(text.split()) > 1 for text in docstrings().values())


def test_help_shows_every_field_and_its_docstring(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as exit:
        load_config(["--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    letters = re.sub(r"\W", "", shown)  # without the frames and line breaks of the layout
    for field, text in docstrings().items():
        assert f"--{field} " in shown
        assert re.sub(r"\W", "", text) in letters, field


def test_help_with_a_config_file_shows_its_values(load, capsys):
    body = 'config = Config(output_dir="somewhere_else", data=DataConfig(train_file="t"))\n'
    with pytest.raises(SystemExit) as exit:
        load("--help", body=body)
    assert exit.value.code == 0
    assert "somewhere_else" in capsys.readouterr().out


# ---- exit codes


@pytest.mark.parametrize("returned, code", [(None, 0), (0, 0), (143, 143)])
def test_script_exits_with_what_main_returns(returned, code):
    with pytest.raises(SystemExit) as exit:
        run_script(lambda: returned)
    assert exit.value.code == code


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, None),
    ],
)
def test_script_lets_segments_expand_unless_the_user_says_otherwise(
    variables, expected, monkeypatch
):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # the first call makes monkeypatch restore what the script sets
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    seen = []
    with pytest.raises(SystemExit):
        run_script(lambda: seen.append(os.environ.get("PYTORCH_ALLOC_CONF")))
    assert seen == [expected]


@pytest.mark.parametrize("error, code", [(UserError, 2), (RunError, 1)])
def test_script_error_is_one_message_and_an_exit_code(error, code, capsys):
    def main() -> None:
        raise error("data.train_file: 'x' does not exist")

    with pytest.raises(SystemExit) as exit:
        run_script(main)
    assert exit.value.code == code
    assert capsys.readouterr() == ("", "error: data.train_file: 'x' does not exist\n")


def test_any_other_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 // 0)
