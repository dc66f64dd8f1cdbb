"""Read and write JSON; write files and directories so that a kill leaves the old or the new."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import safetensors

from minilora import distributed
from minilora.errors import RunError, UserError

MANIFEST = "manifest.json"


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Raises:
        UserError: the file does not exist, is not JSON, or holds something other than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_json_if_present(path: Path) -> dict:
    """Read a JSON object, or return an empty one where there is no such file. Raises UserError."""
    return read_json(path) if path.is_file() else {}


def write_json(path: Path, content: dict) -> None:
    """Write a JSON object, indented and as UTF-8."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def make_directory(path: Path) -> None:
    """Make a directory and its parents. Raises UserError if that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"{path} cannot be created or is not a directory: {error.strerror}"
        raise UserError(message) from error


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name beside `path`, then rename it: readers see old or new.

    Text is written as UTF-8 with the newlines that it has.
    """
    temporary = path.with_name(f".tmp-{path.name}-{distributed.rank()}")
    data = content.encode() if isinstance(content, str) else content
    temporary.write_bytes(data)
    os.replace(temporary, path)


def write_directory(directory: Path, write: Callable[[Path], None]) -> None:
    """Write a directory that is afterwards complete, or absent if anything failed.

    `write` fills a temporary directory, which is synced to disk, listed with file sizes in
    manifest.json, and renamed to `directory`; an older `directory` is replaced. All processes
    call this function together and `write` runs on each of them; the first one does the rest.

    Raises:
        RunError: the disk does not take it. What was there before is intact.
    """
    temporary = directory.with_name(f".tmp-{directory.name}")
    if distributed.rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        make_directory(temporary)
    try:
        distributed.barrier()
        write(temporary)
        distributed.barrier()
        if distributed.rank() == 0:
            _finish_directory(temporary, directory)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # the safetensors library reports a full disk as an error of its own
        if isinstance(error, OSError | safetensors.SafetensorError):
            message = f"{directory} could not be written ({error}); what was there before is intact"
            raise RunError(message) from error
        raise


def _finish_directory(temporary: Path, directory: Path) -> None:
    """Write the manifest, sync every file to disk, and give the directory its final name."""
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(temporary)): path.stat().st_size for path in files}
    manifest = temporary / MANIFEST
    manifest.write_text(json.dumps(sizes, indent=2), encoding="utf-8")

    for path in files:  # the safetensors library makes its files readable for the owner alone
        shutil.copymode(manifest, path)
    for path in [*files, manifest, temporary]:
        _sync(path)

    # an older directory is incomplete, or belongs to a run that was continued from before it
    shutil.rmtree(directory, ignore_errors=True)
    os.rename(temporary, directory)
    _sync(directory.parent)


def _sync(path: Path) -> None:
    """Wait until a file or directory is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_complete(directory: Path) -> bool:
    """Return whether every file in the directory's manifest is there with its size."""
    try:
        sizes = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        return all((directory / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False
