"""What may be imported, and when: rules that import-linter's layers cannot state.

The order of the layers itself is checked by `make lint` (lint-imports, see pyproject.toml).
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [ROOT / name for name in ("infer.py", "merge.py", "train.py")]
PACKAGE = sorted((ROOT / "minilora").rglob("*.py"))

# the references are for tests, and a pickle runs code
FORBIDDEN = {"transformers", "peft", "trl", "accelerate", "datasets", "pickle", "dill"}
# loaded by the run that uses them, not before
SLOW = {
    "transformers",
    "peft",
    "matplotlib",
    "pandas",
    "tensorboard",
    "wandb",
    "bitsandbytes",
    "networkx",
    "scipy",
    "sentence_transformers",
    "openai",
    "pyarrow",
}
IMPORTING_CALLS = {"import_module", "__import__", "find_spec"}
QUANTIZING = {"model/quantization.py", "training/optimizer.py"}


def identifier(node: ast.AST) -> str:
    """Return the last name of an expression: `c` of `a.b.c`, or an empty string."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name):
            return name.split(".")[-1]
        case _:
            return ""


def imports(source: str) -> Iterator[str]:
    """Yield the dotted names of everything that a source imports, at any depth."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and identifier(node.func) in IMPORTING_CALLS:
            argument = node.args[0] if node.args else None
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield argument.value
            else:
                yield "<computed>"


def imported_packages(path: Path) -> set[str]:
    """Return the top-level packages that a file imports from."""
    return {name.split(".")[0] for name in imports(path.read_text(encoding="utf-8"))}


def loaded_packages(statements: str) -> set[str]:
    """Return the packages that a fresh interpreter has loaded after running `statements`."""
    code = f"{statements}\nimport sys\nprint()\nprint(*sys.modules)"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return {name.split(".")[0] for name in run.stdout.splitlines()[-1].split()}


def per_file(paths: list[Path]) -> pytest.MarkDecorator:
    names = [str(path.relative_to(ROOT)) for path in paths]
    return pytest.mark.parametrize("path", paths, ids=names)


def test_files_are_found():
    assert len(PACKAGE) > 30
    assert all(path.is_file() for path in SCRIPTS)


@per_file([*PACKAGE, *SCRIPTS])
def test_imports_are_allowed(path: Path):
    assert imported_packages(path) & {*FORBIDDEN, "<computed>"} == set()


@per_file(PACKAGE)
def test_the_package_never_imports_the_scripts(path: Path):
    assert imported_packages(path) & {script.stem for script in SCRIPTS} == set()


@per_file(PACKAGE)
def test_bitsandbytes_is_imported_only_where_something_is_quantized(path: Path):
    if str(path.relative_to(ROOT / "minilora")) not in QUANTIZING:
        assert "bitsandbytes" not in imported_packages(path)


@per_file([*PACKAGE, *SCRIPTS])
def test_fully_shard_is_named_only_in_sharding(path: Path):
    if path.name != "sharding.py":
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert "fully_shard" not in map(identifier, ast.walk(tree))


@per_file([*PACKAGE, *SCRIPTS])
def test_files_stay_below_450_lines(path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450


@pytest.mark.system
def test_importing_the_scripts_loads_nothing_slow():
    assert loaded_packages("import train, merge, infer, minilora") & SLOW == set()


@pytest.mark.system
def test_importing_every_module_loads_no_tracker_and_no_reference():
    modules = []
    for path in PACKAGE:
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules.append(".".join(parts).removesuffix(".__init__"))
    # bitsandbytes is imported by model/quantization.py, and brings networkx along
    slow = SLOW - {"bitsandbytes", "networkx"}
    assert loaded_packages(f"import {', '.join(modules)}") & slow == set()


@pytest.mark.system
@per_file(SCRIPTS)
def test_help_loads_nothing_slow(path: Path):
    code = f"""
import runpy, sys
sys.argv = [{path.name!r}, "--help"]
try:
    runpy.run_path({path.name!r}, run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
"""
    assert loaded_packages(code) & SLOW == set()


EVERY_FORM = """
import torch, minilora
import minilora.data as rows
from minilora.model.lora import inject
from . import build
def late():
    from transformers import AutoModel
    importlib.import_module("peft.tuners")
    import_module(name)
"""


def test_the_checker_sees_every_form_of_import():
    assert set(imports(EVERY_FORM)) == {
        "torch",
        "minilora",
        "minilora.data",
        "minilora.model.lora.inject",
        ".build",
        "transformers.AutoModel",
        "peft.tuners",
        "<computed>",
    }


def test_the_other_checks_can_fail(tmp_path: Path):
    file = tmp_path / "bad.py"
    file.write_text("import pickle\nfully_shard(x)\n", encoding="utf-8")
    assert imported_packages(file) & FORBIDDEN == {"pickle"}
    assert "fully_shard" in map(identifier, ast.walk(ast.parse(file.read_text())))
    assert "fully_shard" in map(identifier, ast.walk(ast.parse("from a import fully_shard as f")))


@pytest.mark.system
def test_a_slow_import_is_noticed():
    assert "tensorboard" in loaded_packages("import tensorboard") & SLOW
