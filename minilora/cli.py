"""From a config file and command-line flags to a checked `Config`.

A config file (config_files.py) holds what differs from the defaults. Flags replace single values of
it. Every mistake is reported before the run writes anything.
"""

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch
import tyro

from minilora.config import Config, RowFormat, flatten_config
from minilora.config_checks import validate
from minilora.config_files import load_config_file
from minilora.errors import UserError

USAGE = "usage: train.py CONFIG.py [--section.field value ...]; CONFIG may be .yaml or .json too"


def load_config(argv: list[str]) -> Config:
    """Return the checked config that `CONFIG.py [--section.field value ...]` describes.

    `--help` alone shows every flag.

    Raises:
        UserError: the file is bad, or values contradict each other.
        SystemExit: an unknown flag or a value of the wrong type (code 2), or --help (code 0).
    """
    if argv and not argv[0].startswith("-"):
        base = load_config_file(argv[0])
        flags = argv[1:]
    elif "-h" in argv or "--help" in argv:
        base = Config()
        flags = argv
    else:
        raise UserError(f"no config file given; {USAGE}")

    config = tyro.cli(
        Config,
        prog=f"{Path(sys.argv[0]).name} CONFIG.py",
        description="Fine-tune the model that CONFIG.py describes. Flags replace its values.",
        default=base,
        args=_spell_out_booleans(flags),
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),
        registry=FLAG_TYPES,
    )
    validate(config)
    return config


FLAG_TYPES = tyro.constructors.ConstructorRegistry()
"""How tyro reads flags whose type it does not know."""


@FLAG_TYPES.primitive_rule
def _file_formats_rule(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Show data.file_formats in --help, but refuse it as a flag: it is a table."""
    if info.type != dict[str, RowFormat]:
        return None

    def refuse(arguments: list[str]) -> dict[str, RowFormat]:
        raise ValueError("it is a table, which only a config file can hold")

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="(IN A CONFIG FILE)",
        instance_from_str=refuse,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [", ".join(value) or "none"],
    )


def _spell_out_booleans(flags: list[str]) -> list[str]:
    """Add the value True to every boolean flag that is given without one: `--data.strict`."""
    defaults = flatten_config(Config())
    booleans = {name for name, value in defaults.items() if isinstance(value, bool)}
    spelled = []
    for i, flag in enumerate(flags):
        spelled.append(flag)
        is_boolean = flag.lstrip("-").replace("-", "_") in booleans
        has_no_value = i + 1 == len(flags) or flags[i + 1].startswith("--")
        if is_boolean and has_no_value:
            spelled.append("True")
    return spelled


def check_device(config: Config) -> None:
    """Refuse settings that need a GPU where there is none; a preview needs none.

    Raises:
        UserError: names the setting, before any data is read.
    """
    if config.preview or torch.cuda.is_available():
        return
    optimizer = config.train.optimizer
    if optimizer.startswith("paged"):
        raise UserError(
            f"train.optimizer={optimizer!r} pages its states out of GPU memory, and there is no "
            f"GPU here: use {optimizer.removeprefix('paged_')!r}"
        )
    if config.parallel.cpu_offload:
        raise UserError(
            "parallel.cpu_offload moves parameters out of GPU memory, and there is no GPU here: "
            "leave it out"
        )


def check_compiler(config: Config) -> None:
    """Refuse train.compile where torch.compile lacks the programs that it calls.

    On a CPU that is a C++ compiler, which includes Python's headers. On a GPU it is Triton, which
    calls a C compiler, with the same headers.

    Raises:
        UserError: names what is missing, before any data is read.
    """
    if config.preview or config.plan or not config.train.compile:
        return
    compilers = [os.environ.get("CXX", "g++")]
    if torch.cuda.is_available():
        if importlib.util.find_spec("triton") is None:
            raise UserError(
                "train.compile needs Triton on a GPU: pip install triton, or leave it out"
            )
        compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(shutil.which(compiler) for compiler in compilers):
        raise UserError(
            f"train.compile needs a compiler, and there is no {' or '.join(compilers)} here: "
            "install it (apt install g++), or leave train.compile out"
        )
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if not headers.is_file():
        raise UserError(
            f"train.compile needs Python's headers, and there is no {headers}: "
            "install them (apt install python3-dev), or leave train.compile out"
        )
