"""The documents name only what exists: settings, flags, files, links, functions, tests."""

import ast
import dataclasses
import inspect
import itertools
import re
import tomllib
from pathlib import Path

import peft
import pytest
import torch
import transformers

import infer
import merge
from helpers.documents import DOCS, ROOT, anchors, blocks, table_rows, text_of
from minilora.config import Config, flatten_config

SECTIONS = "model lora data train eval parallel log hub".split()
SETTINGS = flatten_config(Config())
COMING = ROOT / "docs/coming-from.md"
ALL_PAGES = [*DOCS, ROOT / "bench/README.md", ROOT / "CONTRIBUTING.md"]
ARGUMENTS = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
FOLDERS = ("minilora", "tests", "bench", "configs", "docs", "examples", "launch")
FILE_NAMES = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")}
FILE_NAMES |= {path.name for path in ROOT.iterdir()}
# endings of file names such as model.safetensors, which are not settings
SUFFIXES = ("py", "jsonl", "json", "md", "safetensors")


def by_name(path: Path) -> str:
    return f"{path.parent.name}-{path.stem}"


# --- settings and flags


@pytest.mark.parametrize("path", ALL_PAGES, ids=by_name)
def test_settings_exist(path: Path):
    pattern = rf"(?<![\w./-])({'|'.join(SECTIONS)})\.(\w+)(?![\w/]|\.\w)"
    found = re.findall(pattern, text_of(path))
    named = {f"{section}.{name}" for section, name in found if name not in SUFFIXES}
    assert named - SETTINGS.keys() == set()


@pytest.mark.parametrize("path", [*DOCS, ROOT / "bench/README.md"], ids=by_name)
def test_flags_exist(path: Path):
    known = {name.split("=")[0] for name in SETTINGS}
    known |= {f.name for args in (infer.Args, merge.Args) for f in dataclasses.fields(args)}
    known |= {"help", "nproc_per_node", "max_restarts", "section.field"}
    bench = " ".join(text_of(file) for file in (ROOT / "bench").glob("*.py"))
    for flag in re.findall(r"(?<![\w-])--([a-z][\w.-]*\w)", text_of(path)):
        name = flag.replace("-", "_")
        in_bench = re.search(rf"^    {name}: ", bench, re.MULTILINE)
        assert name in known or in_bench, f"--{flag}"


def test_configs_name_settings_that_exist():
    pattern = rf"--({'|'.join(SECTIONS)})\.(\w+)"
    for path in (ROOT / "configs").glob("*.py"):
        for section, name in re.findall(pattern, text_of(path)):
            assert f"{section}.{name}" in SETTINGS, f"{path.name}: {section}.{name}"


def test_every_setting_is_in_some_document():
    text = "\n".join(map(text_of, DOCS))
    missing = []
    for name in SETTINGS:
        if not re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", text):
            missing.append(name)
    assert missing == []


# --- links, files, functions, tests


@pytest.mark.parametrize("path", ALL_PAGES, ids=by_name)
def test_links_lead_somewhere(path: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(path)):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("path", ALL_PAGES, ids=by_name)
def test_files_exist(path: Path):
    text = text_of(path)
    pattern = r"(?<![\w./*<{-])((?:[\w-]+/)*[\w-]+\.(?:py|md|sbatch|yaml|sh))(?![\w/])"
    for name in re.findall(pattern, text):
        known = any((folder / name).exists() for folder in (ROOT, path.parent))
        assert known or name in FILE_NAMES | {"CONFIG.py"}, name
    pattern = rf"(?<![\w./-])((?:{'|'.join(FOLDERS)})/[\w./-]*\w)"
    for name in re.findall(pattern, text):
        assert (ROOT / name).exists(), name


def defined(*patterns: str) -> set[str]:
    """Return the names of all functions, methods and classes of some files."""
    files = itertools.chain.from_iterable(ROOT.glob(pattern) for pattern in patterns)
    nodes = (node for file in files for node in ast.walk(ast.parse(text_of(file))))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_the_tour_names_functions_and_tests_that_exist():
    text = text_of(ROOT / "docs/tour.md")
    functions = set(re.findall(r"`(\w+)\(\)`", text))
    assert len(functions) > 30
    assert functions - defined("minilora/**/*.py", "*.py") == set()
    tests = set(re.findall(r"`(test_\w+)`", text))
    assert tests - defined("tests/**/*.py") == set()


def test_the_tour_says_where_its_proofs_are():
    """A proof is in a file that the same chapter names."""
    for chapter in re.split(r"^## ", text_of(ROOT / "docs/tour.md"), flags=re.MULTILINE):
        files = [text_of(ROOT / name) for name in re.findall(r"tests/[\w/]+\.py", chapter)]
        for test in re.findall(r"`(test_\w+)`", chapter):
            assert any(f"def {test}(" in text for text in files), test


def test_the_tour_lists_every_module():
    (plan,) = [text for _, text in blocks(ROOT / "docs/tour.md") if "transformer.py" in text]
    listed = sorted(re.findall(r"\w+\.py", plan))
    modules = [path.name for path in (ROOT / "minilora").rglob("*.py")]
    there = sorted([name for name in modules if name != "__init__.py"])
    assert listed == sorted([*there, "train.py", "merge.py", "infer.py"])


def lines_of_entries(tree: str) -> dict[str, int]:
    """Return the line of each module and folder directly in minilora/, by its name in a tree."""
    _, _, inside = tree.partition("minilora/\n")
    lines: dict[str, int] = {}
    for number, line in enumerate(inside.splitlines()):
        if not line.startswith("  "):
            break
        is_in_a_folder = line[2] == " "
        names, _, _ = line[2:].partition("   ")  # a wide gap comes before the description
        if not is_in_a_folder:
            lines.update(dict.fromkeys(re.findall(r"(\w+)(?:\.py|/)", names), number))
    return lines


@pytest.mark.parametrize("page", ["README.md", "docs/tour.md"])
def test_plans_have_the_order_of_imports(page: str):
    """A module imports only from lines above its own, as both pages say."""
    (tree,) = [text for _, text in blocks(ROOT / page) if text.startswith("train.py  ")]
    lines = lines_of_entries(tree)
    settings = tomllib.loads(text_of(ROOT / "pyproject.toml"))
    (contract,) = settings["tool"]["importlinter"]["contracts"]
    layers = [layer.removeprefix("minilora.") for layer in reversed(contract["layers"])]
    assert sorted(lines) == sorted(layers)
    numbers = [lines[layer] for layer in layers]
    assert numbers == sorted(numbers)


def test_messages_that_are_quoted_exist():
    source = " ".join(text_of(path) for path in (ROOT / "minilora").rglob("*.py"))
    quoted = ["more documents than rows", "refused by the chat template"]
    page = text_of(ROOT / "docs/data.md")
    for message in quoted:
        assert message in page
        assert message in source


def test_equations_name_functions_in_their_files():
    """Each `name` before "in `file`" is defined in that file."""
    rows = [row for row in text_of(ROOT / "docs/equations.md").splitlines() if row[:2] == "| "]
    places = [row.split("|")[2] for row in rows]
    checked = 0
    for names, file in re.findall(
        r"((?:`\w+`(?:, )?)+) in `(minilora/[\w/]+\.py)`", " ".join(places)
    ):
        for name in re.findall(r"`(\w+)`", names):
            assert name in defined(file), f"{name} in {file}"
            checked += 1
    assert checked >= 25


def test_the_readme_lists_every_room_and_fits_on_a_page():
    (tree,) = [text for _, text in blocks(ROOT / "README.md") if text.startswith("train.py")]
    for path in (ROOT / "minilora").iterdir():
        if path.name == "__init__.py" or path.name.startswith("__pycache__"):
            continue
        name = f"{path.name}/" if path.is_dir() else path.name
        assert name in tree, name
    assert len(text_of(ROOT / "README.md").splitlines()) <= 150


def test_the_pictures_are_small():
    pictures = list((ROOT / "docs/pictures").iterdir())
    assert {path.name for path in pictures} == {"report.png", "loss.png"}
    assert sum(path.stat().st_size for path in pictures) <= 200_000


# --- names of other projects


def names_of_others(heading: str) -> list[str]:
    """Return the names in backticks in the left column of a table of coming-from.md."""
    found = []
    for left, _ in table_rows(COMING, heading):
        found += re.findall(r"`(\w+)`", left)
    return found


PEFT_FIELDS = {field.name for field in dataclasses.fields(peft.LoraConfig)}
QUANTIZATION = set(inspect.signature(transformers.BitsAndBytesConfig).parameters)


@pytest.mark.parametrize(
    ("heading", "known"),
    [
        ("transformers: TrainingArguments", ARGUMENTS),
        ("peft: LoraConfig", PEFT_FIELDS),
        ("transformers: BitsAndBytesConfig", QUANTIZATION),
        (
            "transformers: generate() and GenerationConfig",
            set(vars(transformers.GenerationConfig())),
        ),
    ],
)
def test_names_of_transformers_and_peft_exist(heading: str, known: set[str]):
    found = names_of_others(heading)
    assert found
    assert set(found) - known == set()
    assert len(found) == len(set(found))


def test_names_that_are_gone_and_names_of_trl():
    gone = set(names_of_others("Names of transformers 4 that 5 has not"))
    assert gone & ARGUMENTS == set()
    trl = names_of_others("trl: SFTConfig and SFTTrainer")
    assert len(trl) > 15
    assert set(trl) & ARGUMENTS == set(), "what trl inherits belongs to transformers' table"


def test_every_name_of_others_has_an_answer():
    headings = re.findall(r"^##+ (\w+: .*)$", text_of(COMING), re.MULTILINE)
    answers = [right for heading in headings for _, right in table_rows(COMING, heading)]
    assert len(answers) >= 90
    assert all(answers)


def test_defaults_of_others_that_are_told():
    defaults = {f.name: f.default for f in dataclasses.fields(transformers.TrainingArguments)}
    betas = (defaults["adam_beta1"], defaults["adam_beta2"])
    assert (*betas, defaults["adam_epsilon"]) == (0.9, 0.999, 1e-8)
    assert defaults["average_tokens_across_devices"] is True
    assert defaults["logging_nan_inf_filter"] is True
    parameters = inspect.signature(transformers.BitsAndBytesConfig).parameters
    assert parameters["bnb_4bit_quant_type"].default == "fp4"
    optimizer = torch.optim.AdamW([torch.zeros(1)])
    assert (*optimizer.defaults["betas"], optimizer.defaults["eps"]) == (0.9, 0.999, 1e-8)


def test_own_defaults_that_are_told():
    ours = Config()
    assert (ours.lora.rank, ours.lora.alpha) == (32, 16)
    assert (ours.train.learning_rate, ours.train.warmup_steps) == (1e-5, 100)
    assert ours.train.epochs == 2.0
    assert ours.train.lr_scheduler == "constant_with_warmup"
    assert ours.train.group_by_length is True
    assert ours.train.gradient_checkpointing is True
    assert ours.hub.private is True
    assert ours.model.double_quant is True
