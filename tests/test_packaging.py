"""What the sdist and the wheel hold, and what they install: the commands, from any directory."""

import filecmp
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import minilora
from helpers.documents import DOCS, ROOT, text_of

pytestmark = pytest.mark.system

SCRIPTS = ("train", "merge", "infer")
# what belongs to the project; a clone may also hold data and the output of runs
FOLDERS = (".ci", ".github", "bench", "configs", "docs", "examples", "launch", "minilora", "tests")
FILES = (
    "train.py merge.py infer.py CONTRIBUTING.md LICENSE MANIFEST.in Makefile README.md "
    "constraints.txt pyproject.toml .gitignore .pre-commit-config.yaml"
).split()
SHOW_HELP = """
import runpy, sys
for command in sys.argv[1:]:
    sys.argv = [command, "--help"]
    try:
        runpy.run_path(command, run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, command
"""
CONFIG = """
from minilora.config import Config, DataConfig, ModelConfig

config = Config(
    output_dir="out",
    model=ModelConfig(name={model!r}),
    data=DataConfig(train_file="rows.jsonl", format="prompt", num_workers=1),
)
"""


@dataclass
class Distributions:
    """What a release consists of."""

    sdist: Path
    """The unpacked source distribution."""
    wheel: Path
    """The wheel, which was built from the sdist."""

    def files_of_wheel(self) -> set[str]:
        with zipfile.ZipFile(self.wheel) as archive:
            return set(archive.namelist())


def call(words: list[str | Path], directory: Path, code: int = 0) -> str:
    """Run a command in a directory, without the repository on its path. Returns its output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        words, cwd=directory, env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == code, run.stdout + run.stderr
    return run.stdout + run.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """Build the sdist from a copy of the repository, and the wheel from the sdist."""
    directory = tmp_path_factory.mktemp("packaging")
    copy = directory / "copy"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    call([sys.executable, "-m", "build", "--no-isolation", "--outdir", directory, copy], directory)
    (archive,) = directory.glob("*.tar.gz")
    (wheel,) = directory.glob("*.whl")
    with tarfile.open(archive) as packed:
        packed.extractall(directory, filter="data")
    return Distributions(directory / archive.name.removesuffix(".tar.gz"), wheel)


def install(directory: Path, *what: str | Path) -> Path:
    """Make an environment with minilora in it; the libraries are those of the tests.

    Returns:
        The folder of its programs.
    """
    venv.create(directory, symlinks=True)
    programs = directory / "bin"
    paths = {"base": str(directory), "platbase": str(directory)}
    packages = Path(sysconfig.get_path("purelib", "venv", paths))
    libraries = sysconfig.get_path("purelib")
    (packages / "libraries.pth").write_text(libraries + "\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", programs / "python", "install", "--no-deps"]
    offline = ["--no-index", "--no-build-isolation", "--ignore-installed"]
    call([*pip, *offline, *what], directory)
    return programs


# --- the distributions


def test_the_wheel_holds_the_package_and_the_scripts(built: Distributions):
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "minilora").rglob("*")
        if path.suffix in (".py", ".jinja")
    }
    scripts = {f"minilora/scripts/{name}.py" for name in SCRIPTS}
    files = {name for name in built.files_of_wheel() if ".dist-info/" not in name}
    assert "minilora/tracking/report.html.jinja" in package
    assert "minilora/tracking/page_style.css.jinja" in package
    assert files == package | scripts  # so no `train.py`, no tests and no documents


def test_the_sdist_is_the_whole_project(built: Distributions):
    names = list(FILES)
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix != ".pyc":
                names.append(str(path.relative_to(ROOT)))
    assert "docs/pictures/report.png" in names
    packed = {str(path.relative_to(built.sdist)) for path in built.sdist.rglob("*")}
    assert set(names) - packed == set()
    assert [n for n in names if not filecmp.cmp(ROOT / n, built.sdist / n, shallow=False)] == []
    assert os.access(built.sdist / "launch/torchrun.sh", os.X_OK)


def test_the_metadata_of_the_wheel(built: Distributions):
    metadata = importlib.metadata.PathDistribution(
        zipfile.Path(built.wheel, f"minilora-{minilora.__version__}.dist-info/")
    )
    assert metadata.version == minilora.__version__
    assert metadata.metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.metadata.get_payload() == text_of(ROOT / "README.md")
    assert metadata.metadata["Project-URL"]
    commands = {entry.name: entry.value for entry in metadata.entry_points}
    assert commands == {f"minilora-{name}": f"minilora.commands:{name}" for name in SCRIPTS}


def test_the_version_is_in_one_place(built: Distributions):
    settings = tomllib.loads(text_of(ROOT / "pyproject.toml"))
    assert "version" not in settings["project"]
    assert built.wheel.name.split("-")[1] == minilora.__version__
    assert built.sdist.name == f"minilora-{minilora.__version__}"


# --- installed


def test_the_commands_of_the_wheel_run_anywhere(built: Distributions, tmp_path: Path):
    programs = install(tmp_path / "environment", built.wheel)
    commands = [programs / f"minilora-{name}" for name in SCRIPTS]
    shown = call([programs / "python", "-c", SHOW_HELP, *commands], tmp_path)
    for name in SCRIPTS:
        assert f"usage: minilora-{name} " in shown
    for flag in ("--train.learning_rate", "--verify", "--num_samples"):
        assert flag in shown

    model = ROOT / "examples/tiny-mistral"
    (tmp_path / "config.py").write_text(CONFIG.format(model=str(model)), encoding="utf-8")
    row = {"prompt": "What is a lute?", "completion": "An instrument."}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    shown = call([programs / "minilora-train", "config.py", "--preview", "1"], tmp_path)
    assert "What is a lute?" in shown
    (line,) = text_of(tmp_path / "out/preview.jsonl").splitlines()
    assert "An instrument." in json.loads(line)["text"]


def test_an_editable_installation_runs_the_scripts_of_the_clone(
    built: Distributions, tmp_path: Path
):
    programs = install(tmp_path / "environment", "--editable", built.sdist)
    found = call([programs / "python", "-c", "import train"], tmp_path, code=1)
    assert "No module named 'train'" in found  # the name stays free for other packages
    script = built.sdist / "merge.py"
    script.write_text("def run():\n    print(__name__, __file__)\n", encoding="utf-8")
    shown = call([programs / "minilora-merge"], tmp_path)
    assert shown.split() == ["merge", str(script)]


# --- what the documents say


def test_the_extras_that_the_documents_name_exist():
    extras = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    named = set()
    for path in [*DOCS, ROOT / "CONTRIBUTING.md", ROOT / "Makefile"]:
        for names in re.findall(r"(?:minilora|\.)\[([\w,]+)\]'", text_of(path)):
            named |= set(names.split(","))
    assert named == set(extras)


def test_the_pins_satisfy_the_requirements():
    """constraints.txt has an exact version of everything that is installed from pyproject.toml."""
    requirement = re.compile(r"([\w.-]+)==(\S+)")
    pins = dict(requirement.findall(text_of(ROOT / "constraints.txt")))
    pinned = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    settings = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]
    wanted = list(settings["dependencies"])
    for names in settings["optional-dependencies"].values():
        wanted += names
    for name in wanted:
        assert re.split("[<>=]", name)[0].lower() in pinned
