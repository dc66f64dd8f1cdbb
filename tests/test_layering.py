"""The shape of the code, read with `ast`: imports run one way, nothing forbidden or slow is imported, files stay small."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT_NAMES = {"train", "merge", "infer"}
SCRIPTS = [path for path in sorted(ROOT.glob("*.py")) if path.stem in SCRIPT_NAMES]
PACKAGE = sorted((ROOT / "minilora").rglob("*.py"))

# A module of the core imports only from the sets before its own: never from a sibling, never upward.
LAYERS = [
    {"config", "dist"},
    {"model", "lora", "loss", "labels", "tokenizer", "quant"},
    {"examples", "weights"},
    {"data", "checkpoint", "parallel", "generate"},
    {"build"},
    {"__init__"},
]
LAYER = {module: layer for layer, modules in enumerate(LAYERS) for module in modules}
AROUND = {"running", "tracking", "evaluation", "planning"}  # for the scripts; the core never imports them
AROUND_LAYER, SCRIPT_LAYER = len(LAYERS), len(LAYERS) + 1

FORBIDDEN = {"transformers", "peft", "trl", "accelerate", "datasets", "pickle", "dill"}
SLOW = {"transformers", "peft", "matplotlib", "pandas", "tensorboard", "wandb"}  # loaded by the run that uses them, not before
IMPORTERS = {"import_module", "__import__", "find_spec"}  # calls that import, or look for, a module by name

MAX_FILE, MAX_FUNCTION, MAX_CORE, MAX_AROUND = 350, 80, 2600, 3200


def identifier(node: ast.AST) -> str:
    """The name a node carries: `c` of `a.b.c`, empty if it is no name."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name):
            return name.split(".")[-1]
        case _:
            return ""


def imports(source: str, package: str = "minilora") -> Iterator[str]:
    """Dotted names of all a source imports, at any depth; `package` is where its relative imports start."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                parts = package.split(".")
                start = parts[: len(parts) + 1 - level] if level else []
                yield from (".".join([*start, *([module] if module else []), alias.name]) for alias in names)
            case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]) if identifier(function) in IMPORTERS:
                yield name
            case ast.Call(func=function) if identifier(function) in IMPORTERS:
                yield f"<computed>.{ast.unparse(node)}"


def imported_tops(path: Path) -> set[str]:
    """The packages a file imports from."""
    return {name.split(".")[0] for name in imports(path.read_text(), package_of(path))}


def package_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parent.parts)


def layer_of(name: str) -> int:
    """The layer of an imported dotted name, -1 for other projects. An unknown name of minilora belongs to its __init__."""
    top, module = [*name.split("."), ""][:2]
    if top in SCRIPT_NAMES:
        return SCRIPT_LAYER
    if top != "minilora":
        return -1
    return AROUND_LAYER if module in AROUND else LAYER.get(module, LAYER["__init__"])


def upward(source: str, layer: int, package: str = "minilora") -> list[str]:
    """The imports of a source in `layer` that do not come from below it."""
    return [name for name in imports(source, package) if layer_of(name) >= layer]


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Name and length in lines, decorators included, of every function and method."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min(part.lineno for part in [node, *node.decorator_list])
            yield node.name, (node.end_lineno or node.lineno) - first + 1


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def is_core(path: Path) -> bool:
    return path.parent.name == "minilora" and path.stem not in AROUND


def modules_after(statements: str) -> set[str]:
    """The packages a fresh interpreter has loaded after running `statements`."""
    code = f"{statements}\nimport sys\nprint()\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return {name.split(".")[0] for name in run.stdout.splitlines()[-1].split()}


def per_file(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


def test_every_module_has_a_layer():
    core = {path.stem for path in PACKAGE if is_core(path)}
    assert "config" in core  # the files are found at all
    assert core <= LAYER.keys(), f"put into LAYERS: {core - LAYER.keys()}"
    folders = {path.relative_to(ROOT / "minilora").parts[0] for path in PACKAGE if path.parent.name != "minilora"}
    assert folders <= AROUND, f"packages beside the core: {folders - AROUND}"


@per_file(PACKAGE)
def test_imports_run_one_way(path: Path):
    layer = LAYER[path.stem] if is_core(path) else SCRIPT_LAYER  # what lies around the core may import all but the scripts
    assert upward(path.read_text(), layer, package_of(path)) == []


@per_file([*PACKAGE, *SCRIPTS])
def test_imports_are_allowed(path: Path):
    """The references are for tests, pickles run code, and a computed name could be anything."""
    assert imported_tops(path) & {*FORBIDDEN, "<computed>"} == set()
    if path.stem != "quant":
        assert "bitsandbytes" not in imported_tops(path)
    if path.stem != "parallel":
        assert "fully_shard" not in map(identifier, ast.walk(ast.parse(path.read_text())))


@per_file([*PACKAGE, *SCRIPTS])
def test_files_and_functions_are_small(path: Path):
    assert lines(path) <= MAX_FILE
    assert {name: size for name, size in functions(path.read_text()) if size > MAX_FUNCTION} == {}


def test_line_budget():
    assert sum(lines(path) for path in PACKAGE if is_core(path)) <= MAX_CORE
    assert sum(lines(path) for path in PACKAGE if not is_core(path)) <= MAX_AROUND


def test_importing_loads_nothing_slow():
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in PACKAGE]
    assert modules_after(f"import {', '.join(names)}") & SLOW == set()


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
    assert modules_after(code) & SLOW == set()


BAD = """
import torch, minilora
import minilora.data as rows
from minilora import dist, load
from minilora.lora import inject
from . import build
from .config import Config
def late():
    from .tracking.report import write
    importlib.import_module("peft.tuners")
    __import__("train")
    import_module(name)
"""


def test_the_checker_sees_every_form_of_import():
    assert set(imports(BAD)) == {
        "torch", "minilora", "minilora.data", "minilora.dist", "minilora.load", "minilora.lora.inject", "minilora.build",
        "minilora.config.Config", "minilora.tracking.report.write", "peft.tuners", "train", "<computed>.import_module(name)",
    }  # fmt: skip
    assert list(imports("from ..lora import merge\nfrom . import bar", "minilora.tracking")) == [
        "minilora.lora.merge",
        "minilora.tracking.bar",
    ]


def test_the_checker_tells_up_from_down():
    # what a module of layer 1 may not import: itself a sibling, above it, around it, the package, a script
    assert set(upward(BAD, LAYER["model"])) == {
        "minilora", "minilora.data", "minilora.load", "minilora.lora.inject", "minilora.build",
        "minilora.tracking.report.write", "train",
    }  # fmt: skip
    assert "minilora.lora.inject" not in upward(BAD, LAYER["data"])
    assert upward(BAD, SCRIPT_LAYER) == ["train"]


def test_the_other_checks_can_fail():
    source = "@a\n@b\ndef f():\n    def g():\n        fully_shard(x)\n\n    return g"
    assert dict(functions(source)) == {"f": 7, "g": 2}
    assert "fully_shard" in map(identifier, ast.walk(ast.parse(source)))
    assert "fully_shard" in map(identifier, ast.walk(ast.parse("from torch.distributed.fsdp import fully_shard as f")))
    assert "tensorboard" in modules_after("import tensorboard") & SLOW
