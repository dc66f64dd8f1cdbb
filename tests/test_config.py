"""Config files and flags: what is accepted, and that every mistake is named before anything runs."""

import ast
import dataclasses
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from minilora import config as config_module
from minilora.config import Config, UserError
from minilora.running import settings
from minilora.running.directory import changed_fields
from minilora.running.settings import leaves, load_config, run_main

FIELDS = {f.name: getattr(Config(), f.name) for f in dataclasses.fields(Config)}
SECTIONS = {name: type(value) for name, value in FIELDS.items() if dataclasses.is_dataclass(value)}
IMPORTS = f"from minilora.config import Config, {', '.join(section.__name__ for section in SECTIONS.values())}\n"
MINIMAL = 'config = Config(data=DataConfig(train_file="t.jsonl"))\n'


@pytest.fixture
def parsed(tmp_path, monkeypatch):
    """Writes a config file (its imports on line 1) and loads it with flags; without a width to wrap messages at."""
    monkeypatch.setenv("COLUMNS", "200")

    def load(*flags: str, body: str = MINIMAL) -> Config:
        file = tmp_path / "a_config.py"
        file.write_text(IMPORTS + body)
        return load_config([str(file), *flags])

    return load


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
        ("--eval.eval_steps epoch", "eval.eval_steps", "epoch"),
        ("--eval.eval-on-start", "eval.eval_on_start", True),
        ("--hub.repo_id me/it", "hub.repo_id", "me/it"),
        ("--hub.private False", "hub.private", False),
        ("--method full", "method", "full"),
        ("--preview 3", "preview", 3),
    ],
)  # fmt: skip
def test_flags_replace_single_values(flags, field, value, parsed):
    before, after = leaves(parsed()), leaves(parsed(*flags.split()))
    assert after[field] == value and type(after[field]) is type(value)
    touched = {name for name in after if after[name] != before[name]} - {field}
    assert touched <= {"seed", "output_dir"}, "only what the flags name"


@pytest.mark.parametrize(
    "flags, value", [("--plan", True), ("--plan True", True), ("--plan False", False), ("--plan --seed 1", True)]
)
def test_plan_works_alone(flags, value, parsed, monkeypatch):
    monkeypatch.setattr(settings, "validate", lambda config: None)
    assert parsed(*flags.split()).plan is value


def test_flags_lie_over_the_file(parsed):
    body = 'config = Config(seed=5, data=DataConfig(train_file="t.jsonl", chat=False))\nconfig.train.epochs = 3\n'
    config = parsed("--train.epochs", "4", body=body)
    assert (config.seed, config.data.chat, config.train.epochs) == (5, False, 4.0)
    assert leaves(config) == {
        **leaves(Config()),
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
def test_an_unknown_flag_exits_with_2_and_names_the_nearest(flags, nearest, parsed, capsys):
    with pytest.raises(SystemExit) as exit:
        parsed(*flags.split())
    assert exit.value.code == 2
    shown = capsys.readouterr()
    assert flags.split()[0] in shown.out + shown.err and nearest in shown.out + shown.err


@pytest.mark.parametrize(
    "flags",
    [
        "--train.learning_rate fast", "--train.batch_size 1.5", "--train.max_steps soon", "--data.chat maybe", "--model.bits 5",
        "--train.save_steps epochs", "--eval.eval_steps None", "--eval.eval_steps 1.5", "--train.ema_decay much",
        "--hub.push perhaps", "--data.train_weights twice", "--method lore",
        "--data.too_long cut", "--seed", "--train.epochs", "another_config.py",
    ],
)  # fmt: skip
def test_a_wrong_value_exits_with_2_and_names_its_flag(flags, parsed, capsys):
    with pytest.raises(SystemExit) as exit:
        parsed(*flags.split())
    assert exit.value.code == 2
    shown = capsys.readouterr()
    assert flags.split()[0] in shown.out + shown.err


# ---- config files


@pytest.mark.parametrize(
    "body, message",
    [
        ("config = Config(\n    modle=ModelConfig(),\n)\n", r"a_config\.py:2: .*'modle'.*did you mean 'model'"),
        ("config = Config()\ndata = DataConfig(train_fil='x')\n", r"a_config\.py:3: .*'train_fil'.*did you mean 'train_file'"),
        ("config = Config()\n\nconfig.train.epoch = 3\n", r"a_config\.py:4: .*'epoch'.*did you mean 'epochs'"),
        ("config = Config()\nconfig.output = 'x'\n", r"a_config\.py:3: .*'output'.*did you mean 'output_dir'"),
        ("config = Config(\n", r"a_config\.py:2: SyntaxError"),
        ("x = 1\n  y = 2\n", r"a_config\.py:3: IndentationError"),
        ("config = Config()\nconfig.seed = 1 / 0\n", r"a_config\.py:3: ZeroDivisionError"),
        ("import no_such_module_anywhere\n", r"a_config\.py:2: ModuleNotFoundError.*no_such_module_anywhere"),
        ("def helper():\n    return undefined\n\n\nconfig = helper()\n", r"a_config\.py:3: NameError.*undefined"),
        ("settings = Config()\n", r"a_config\.py: must define `config = Config\(\.\.\.\)`"),
        ("config = {'seed': 1}\n", r"a_config\.py: must define .*found dict"),
        ("config = DataConfig()\n", r"a_config\.py: must define .*found DataConfig"),
        ("config = Config(seed='1')\n", r"a_config\.py: seed = '1'"),
        ("config = Config(train=TrainConfig(learning_rate='1e-3'))\n", r"a_config\.py: train\.learning_rate = '1e-3'"),
        ("config = Config(train=TrainConfig(batch_size=1.5))\n", r"a_config\.py: train\.batch_size = 1\.5"),
        ("config = Config(train=TrainConfig(batch_size=True))\n", r"a_config\.py: train\.batch_size = True"),
        ("config = Config(train=TrainConfig(max_steps=False))\n", r"a_config\.py: train\.max_steps = False"),
        ("config = Config(lora=LoraConfig(alpha=True))\n", r"a_config\.py: lora\.alpha = True"),
        ("config = Config(data=DataConfig(chat=1))\n", r"a_config\.py: data\.chat = 1"),
        ("config = Config(data=DataConfig(train_file=None))\n", r"a_config\.py: data\.train_file = None"),
        ("config = Config(data=DataConfig(too_long='cut'))\n", r"a_config\.py: data\.too_long = 'cut'"),
        ("config = Config(model=ModelConfig(bits=5))\n", r"a_config\.py: model\.bits = 5"),
        ("config = Config(lora=LoraConfig(target_modules='q_proj'))\n", r"a_config\.py: lora\.target_modules = 'q_proj'"),
        ("config = Config(lora=LoraConfig(target_modules=('q_proj', 5)))\n", r"a_config\.py: lora\.target_modules = .*5"),
        ("config = Config(data=DataConfig(train_file=('a', 5)))\n", r"a_config\.py: data\.train_file = .*5"),
        ("config = Config(data=DataConfig(train_weights=2.0))\n", r"a_config\.py: data\.train_weights = 2\.0"),
        ("config = Config(data=DataConfig(train_weights=('2',)))\n", r"a_config\.py: data\.train_weights = .*'2'"),
        ("config = Config(data=DataConfig(eval_first=1))\n", r"a_config\.py: data\.eval_first = 1"),
        ("config = Config(data=DataConfig(add_tokens='<x>'))\n", r"a_config\.py: data\.add_tokens = '<x>'"),
        ("config = Config(lora=LoraConfig(train_embeddings='yes'))\n", r"a_config\.py: lora\.train_embeddings = 'yes'"),
        ("config = Config(train=TrainConfig(ema_decay=True))\n", r"a_config\.py: train\.ema_decay = True"),
        ("config = Config(train=TrainConfig(save_steps='epochs'))\n", r"a_config\.py: train\.save_steps = 'epochs'"),
        ("config = Config(train=TrainConfig(save_steps=True))\n", r"a_config\.py: train\.save_steps = True"),
        ("config = Config(eval=EvalConfig(eval_steps=None))\n", r"a_config\.py: eval\.eval_steps = None"),
        ("config = Config(hub=HubConfig(repo_id=3))\n", r"a_config\.py: hub\.repo_id = 3"),
        ("config = Config(train=DataConfig())\n", r"a_config\.py: train = "),
        ("config = Config(train={'epochs': 1})\n", r"a_config\.py: train = "),
        ("config = Config(train=TrainConfig)\n", r"a_config\.py: train = "),
    ],
)  # fmt: skip
def test_a_mistake_in_a_config_file_is_named_with_its_place(body, message, parsed):
    with pytest.raises(UserError, match=message):
        parsed(body=body)


def test_a_missing_config_file_is_named(tmp_path):
    for path in (tmp_path / "absent.py", tmp_path):
        with pytest.raises(UserError, match=re.escape(str(path))):
            load_config([str(path)])
    for argv in ([], ["--seed", "1"]):
        with pytest.raises(UserError, match=r"no config file given.*CONFIG\.py"):
            load_config(argv)


def test_numbers_and_lists_stand_in_where_nothing_is_lost(parsed):
    config = parsed(body=MINIMAL + 'config.lora = LoraConfig(alpha=8, target_modules=["q_proj"])\nconfig.train.epochs = 3\n')
    assert (config.lora.alpha, config.lora.target_modules, config.train.epochs) == (8, ("q_proj",), 3)


def test_a_config_file_may_compute(parsed):
    config = parsed(body=MINIMAL + "for name in ('save_steps', 'logging_steps'):\n    setattr(config.train, name, 7)\n")
    assert (config.train.save_steps, config.train.logging_steps) == (7, 7)


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[1] / "configs").glob("*.py")), ids=lambda file: file.name)
def test_the_configs_that_come_with_the_project_load(file):
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
        ("--train.min_lr_ratio 0.1 --train.lr_scheduler constant", "train.min_lr_ratio lr_scheduler"),
        ("--train.max_grad_norm -1", "train.max_grad_norm"),
        ("--train.logging_steps 0", "logging_steps"),
        ("--eval.eval_steps 0", "eval_steps"),
        ("--train.save_steps 0", "save_steps"),
        ("--train.save_steps -1", "save_steps"),
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
def test_values_out_of_range_and_contradictions_are_named(flags, fields, parsed):
    with pytest.raises(UserError) as error:
        parsed(*flags.split())
    assert all(field in str(error.value) for field in fields.split())


@pytest.mark.parametrize(
    "flags",
    [
        "--method full", "--method full --model.init random", "--train.warmup_steps 0", "--train.warmup_ratio 0",
        "--train.max_grad_norm 0", "--train.min_lr_ratio 0.1 --train.lr_scheduler linear", "--train.save_steps 1",
        "--train.epochs 0.01", "--train.max_steps 1", "--data.format text", "--data.format text --data.response_marker A:",
        "--data.train_file A B", "--data.train_file A B --data.train_weights 2 0.5", "--data.train_weights 0.1",
        "--method full --data.add_tokens <a> <b>", "--data.add_tokens <a> --lora.train_embeddings", "--train.ema_decay 0",
        "--train.ema_decay 0.9999", "--hub.push --hub.repo_id me/it", "--hub.repo_id me/it",
        "--data.max_seq_length 2", "--eval.temperature 0", "--eval.top_p 1", "--eval.num_generate_samples 0",
    ],
)  # fmt: skip
def test_values_at_the_edge_are_accepted(flags, parsed):
    assert isinstance(parsed(*flags.split()), Config)


def test_a_saved_config_compares_equal(tmp_path, parsed):
    """What a checkpoint keeps of it, read back: nothing has changed."""
    values = "--data.train_file A B --data.train_weights 2 0.5 --data.eval_first --data.add_tokens <a> --lora.train_embeddings"
    config = parsed(*values.split(), *"--train.ema_decay 0.9 --train.save_steps epoch --eval.eval_steps epoch".split())
    saved = json.loads(json.dumps(dataclasses.asdict(config)))
    assert changed_fields(config, saved) == []
    for field, value in (("train_weights", (2.0, 1.0)), ("add_tokens", ("<b>",)), ("train_file", ("A", "C"))):
        other = dataclasses.replace(config, data=dataclasses.replace(config.data, **{field: value}))
        (change,) = changed_fields(other, saved)
        assert change.startswith(f"data.{field}: [") and str(value[-1]) in change
    for flags in ("--train.ema_decay 0.8", "--train.ema_decay None", "--lora.train_embeddings False --data.add_tokens"):
        assert changed_fields(parsed(*values.split(), *flags.split()), saved)
    free = "--train.save_steps 5 --eval.eval_steps 6 --eval.eval_on_start --hub.push --hub.repo_id me/it --data.eval_first False"
    assert changed_fields(parsed(*values.split(), "--train.ema_decay", "0.9", *free.split()), saved) == []


# ---- help


def docstrings() -> dict[str, str]:
    """`{"section.field": docstring}` read from the source: the string under each field of each dataclass."""
    tree = ast.parse(Path(config_module.__file__).read_text(encoding="utf-8"))
    by_class: dict[str, dict[str, str]] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
            by_class[node.name] = {
                field.target.id: after.value.value
                for field, after in pairwise(node.body)
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
            }  # fmt: skip
    flat = by_class["Config"]
    for name, section in SECTIONS.items():
        flat = flat | {f"{name}.{field}": text for field, text in by_class[section.__name__].items()}
    return flat


def test_every_field_has_a_docstring():
    assert set(docstrings()) == set(leaves(Config()))
    assert all(len(text.split()) > 1 for text in docstrings().values())


def test_help_shows_every_field_and_its_docstring(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as exit:
        load_config(["--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    bare = re.sub(r"\W", "", shown)  # without the frames and line breaks of the layout
    for field, text in docstrings().items():
        assert f"--{field} " in shown
        assert re.sub(r"\W", "", text) in bare, field


def test_help_with_a_config_file_shows_its_values(parsed, capsys):
    with pytest.raises(SystemExit) as exit:
        parsed("--help", body='config = Config(output_dir="somewhere_else", data=DataConfig(train_file="t"))\n')
    assert exit.value.code == 0
    assert "somewhere_else" in capsys.readouterr().out


# ---- exit codes


@pytest.mark.parametrize("returned, code", [(None, 0), (0, 0), (143, 143)])
def test_a_script_exits_with_what_main_returns(returned, code):
    with pytest.raises(SystemExit) as exit:
        run_main(lambda: returned)
    assert exit.value.code == code


def test_the_users_error_is_one_message_and_exit_code_2(capsys):
    def main() -> None:
        raise UserError("data.train_file: 'x' does not exist")

    with pytest.raises(SystemExit) as exit:
        run_main(main)
    assert exit.value.code == 2
    assert capsys.readouterr() == ("", "error: data.train_file: 'x' does not exist\n")


def test_any_other_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 // 0)
