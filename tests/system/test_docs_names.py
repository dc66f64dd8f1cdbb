"""The documents name only what exists: settings, flags, files, links, functions, tests."""

import ast
import dataclasses
import itertools
import re
import tomllib
from pathlib import Path

import pytest

import infer
import merge
from helpers.documents import DOCS, ROOT, anchors, blocks, text_of
from minilora.cli import load_config
from minilora.config import Config, config_fields

SECTIONS = "model lora data train eval parallel log hub".split()


def setting_names() -> set[str]:
    """Return the names of all settings: "seed", "data.file_formats", ..."""
    names: set[str] = set()
    for name, value in config_fields(Config()):
        if name in SECTIONS:
            names |= {f"{name}.{field}" for field, _ in config_fields(value)}
        else:
            names.add(name)
    return names


SETTINGS = setting_names()
ALL_PAGES = [*DOCS, ROOT / "bench/README.md", ROOT / "CONTRIBUTING.md"]
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
    assert named - SETTINGS == set()


@pytest.mark.parametrize("path", [*DOCS, ROOT / "bench/README.md"], ids=by_name)
def test_flags_exist(path: Path):
    known = set(SETTINGS)
    themes = [theme.type for theme in dataclasses.fields(infer.Args)]
    known |= {f.name for args in (*themes, merge.Args) for f in dataclasses.fields(args)}
    known |= {"help", "section.field"}
    known |= {"nproc_per_node", "max_restarts", "no_python", "index_url"}  # torchrun's, pip's
    commands = [*ROOT.glob("bench/*.py"), *ROOT.glob("examples/ontology/*.py")]
    commands.append(ROOT / "minilora/evaluation/ontology.py")
    arguments = " ".join(map(text_of, commands))
    for flag in re.findall(r"(?<![\w-])--([a-z][\w.-]*\w)", text_of(path)):
        name = flag.replace("-", "_")
        in_command = re.search(rf"^    {name}: ", arguments, re.MULTILINE)
        is_flag = name in known or name.removeprefix("no_") in known  # --no-fold
        assert is_flag or in_command, f"--{flag}"


def test_configs_name_settings_that_exist():
    pattern = rf"--({'|'.join(SECTIONS)})\.(\w+)"
    for path in (ROOT / "configs").glob("*.py"):
        for section, name in re.findall(pattern, text_of(path)):
            assert f"{section}.{name}" in SETTINGS, f"{path.name}: {section}.{name}"


# each recipe, and what its docstring and recipes.md both call its source
RECIPES = {
    "wiki": "OLLM",
    "arxiv": "OLLM's script for arXiv",
    "price": "LLM engineering",
    "kanana": "a QLoRA run over this",
    "instruct": "universal-llm-trainer",
    "full": None,
    "qlora": "QLoRA",
}


def recipe_docstring(recipe: str) -> str:
    """Return the docstring of a recipe's config, in one line."""
    docstring = ast.get_docstring(ast.parse(text_of(ROOT / f"configs/{recipe}.py"))) or ""
    return " ".join(docstring.split())


def recipe_section(recipe: str) -> str:
    """Return a recipe's section of recipes.md."""
    page = text_of(ROOT / "docs/recipes.md")
    (section,) = re.findall(rf"^## {recipe}: .*?(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return section


def recipe_tables(recipe: str) -> list[list[dict[str, str]]]:
    """Return the tables of a recipe's section of recipes.md; a row by the names of its columns."""
    tables = []
    for block in re.findall(r"(?:^\|.*\n)+", recipe_section(recipe), re.MULTILINE):
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()]
        header, _, *rows = lines
        tables.append([dict(zip(header, row, strict=True)) for row in rows])
    return tables


def recipe_rows(recipe: str) -> list[dict[str, str]]:
    """Return the rows of all tables of a recipe."""
    return [row for table in recipe_tables(recipe) for row in table]


def settings_in(text: str) -> set[str]:
    """Return the settings that a text names in full: "lora.rank", ..."""
    return SETTINGS & set(re.findall(r"\w+\.\w+", text))


def changed_settings(recipe: str, sections: tuple[str, ...]) -> set[str]:
    """Return the settings of some sections that are not the defaults in a recipe."""
    config = load_config([f"configs/{recipe}.py"])
    changed = set()
    for section in sections:
        defaults = dict(config_fields(getattr(Config(), section)))
        for name, value in config_fields(getattr(config, section)):
            if value != defaults[name]:
                changed.add(f"{section}.{name}")
    if config.train.warmup_ratio is not None:
        changed.discard("train.warmup_steps")  # a ratio requires that it is 0
    return changed


def is_shown_as(value: object, cell: str) -> bool:
    """Return whether a cell of a table shows the value of a setting."""
    if isinstance(value, tuple):
        return cell == " ".join(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(cell) == value
    return cell == str(value)


@pytest.mark.parametrize(("recipe", "source"), RECIPES.items())
def test_recipes_tell_their_source(recipe: str, source: str | None):
    docstring = recipe_docstring(recipe)
    _, _, told_by_page = recipe_section(recipe).partition("**Source:** ")
    if source is None:
        assert "The settings have no source" in docstring
        assert told_by_page.startswith("none.")
        return
    _, _, told_by_config = docstring.partition("The source is ")
    assert source in told_by_config
    paragraph, _, _ = told_by_page.partition("\n\n")
    assert source in " ".join(paragraph.split())


@pytest.mark.parametrize("recipe", RECIPES)
def test_tables_of_recipes_show_the_values_of_the_config(recipe: str):
    config = load_config([f"configs/{recipe}.py"])
    rows = recipe_rows(recipe)
    assert rows or recipe == "full"
    for row in rows:
        setting = row.get("setting", "").strip("`")
        if setting in SETTINGS:
            section, name = setting.split(".")
            assert is_shown_as(getattr(getattr(config, section), name), row["here"]), setting
        if "why" in row:
            assert row["why"]
            assert row["source"] != row["here"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_configs_and_recipes_list_the_same_deviations(recipe: str):
    """A row with a reason is a deviation; the docstring lists them after "Deviations: "."""
    rows = [row["setting"] for row in recipe_rows(recipe) if "setting" in row and "why" in row]
    told = re.search(r"[Dd]eviations: (.*?)\.(?: |$)", recipe_docstring(recipe))
    assert bool(told) == bool(rows)
    if told:
        assert settings_in(told[1]) == settings_in(" ".join(rows))


@pytest.mark.parametrize("recipe", ["arxiv", "price", "kanana", "instruct", "qlora"])
def test_recipes_account_for_each_setting_of_training_that_they_change(recipe: str):
    """Below "Source" each is named: as a deviation, or as what was taken over or is not known."""
    _, _, told = recipe_section(recipe).partition("**Source:** ")
    changed = changed_settings(recipe, ("model", "lora", "train"))
    assert len(changed) >= 5
    assert changed - settings_in(told) == set()


def test_the_known_deviations_of_kanana_and_the_figures_of_the_course_are_told():
    kanana = {row["setting"].strip("`") for table in recipe_tables("kanana") for row in table}
    deviations = "model.double_quant train.lr_scheduler train.warmup_ratio train.optimizer"
    assert kanana == set(deviations.split())
    price = {row["setting"].strip("`"): row for row in recipe_tables("price")[0]}
    for name in ("rank", "alpha", "dropout"):
        assert f"lora.{name}" in price
    for name in ("batch_size", "learning_rate", "lr_scheduler", "optimizer", "group_by_length"):
        assert f"train.{name}" in price


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
    assert {path.name for path in pictures} == {"report.png", "loss.png", "ontology.png"}
    assert sum(path.stat().st_size for path in pictures) <= 200_000
