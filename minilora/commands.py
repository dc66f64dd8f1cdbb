"""The commands of an installed package: minilora-train, minilora-merge and minilora-infer.

Each one does what `python train.py` (merge.py, infer.py) does. A wheel has the scripts in
minilora/scripts; in a clone they lie beside the package, where readers start (pyproject.toml).
"""

import importlib.util
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def train() -> None:
    """Run train.py."""
    _run("train")


def merge() -> None:
    """Run merge.py."""
    _run("merge")


def infer() -> None:
    """Run infer.py."""
    _run("infer")


def _run(name: str) -> None:
    """Import the script NAME.py from where it lies, and call its `run`, which exits."""
    script = PACKAGE / "scripts" / f"{name}.py"
    if not script.is_file():  # a clone, installed with `pip install -e`
        script = PACKAGE.parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, script)
    assert spec is not None and spec.loader is not None  # it is a file, and ends with .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as an import does: dataclasses look their module up
    spec.loader.exec_module(module)
    sys.argv[0] = Path(sys.argv[0]).name  # --help names the command, not where it is installed
    module.run()
