"""Which files of a dataset a setting takes: a repository of the hub, or a directory.

A dataset may have a file, or several, for each split. Names of files and folders tell the splits.
"""

import fnmatch
import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from minilora import distributed
from minilora.errors import UserError
from minilora.hub import fetch

SUFFIXES = (
    ".jsonl",
    ".jsonl.gz",
    ".json",
    ".json.gz",
    ".csv",
    ".csv.gz",
    ".tsv",
    ".tsv.gz",
    ".parquet",
)
# names of the settings in messages
SETTING_NAMES = {
    "train_file": "data.train_file",
    "eval_file": "data.eval_file",
    "input": "--input",
}
# the splits that a setting takes of a dataset: the first one that exists
DEFAULT_SPLITS = {
    "train_file": ("train",),
    "eval_file": ("validation", "test"),
    "input": ("test",),
}
NAMES_SHOWN = 5  # of the files in a message
# the words in the name of a file, or of its folder, that say which split it belongs to
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}


class DatasetName(NamedTuple):
    """The parts of `owner/name[@revision][:files]`, or of `directory[:files]`."""

    repository: str
    """`owner/name` on the hub, or the directory as the user wrote it."""
    revision: str | None
    """Branch, tag or commit on the hub."""
    files: str | None
    """A split, a folder, or a glob over the dataset's files: `*` stays within a folder, `**` stands
    for any folders."""
    directory: Path | None = None
    """The directory; None: the dataset is on the hub."""


class RepositoryFile(NamedTuple):
    """A file of a dataset."""

    name: Path
    """Its path in the repository or directory."""
    path: Path
    """Where it lies on disk, which may be the hub's cache."""


def is_data_file(path: Path) -> bool:
    """Return whether a path is a file whose name says that it holds rows."""
    return path.name.lower().endswith(SUFFIXES) and path.is_file()


def parse_directory_name(name: str) -> DatasetName | None:
    """Split `directory[:files]` into its parts; None unless there is such a directory."""
    whole = Path(name).expanduser()
    if whole.is_dir():
        return DatasetName(str(Path(name)), None, None, whole)
    directory_name, _, files = name.rpartition(":")
    directory = Path(directory_name).expanduser()
    if directory_name and files and directory.is_dir():
        return DatasetName(str(Path(directory_name)), None, files, directory)
    return None


DATASET_NAME = re.compile(
    r"""
    (?P<repository> \w[\w.-]* / [\w.-]+? )
    (?: @ (?P<revision> [\w./-]+ ) )?
    (?: : (?P<files> .+ ) )?
    """,
    re.VERBOSE,
)


def parse_dataset_name(name: str) -> DatasetName | None:
    """Split the name of a dataset on the hub into its parts; None for a file or a directory."""
    match = DATASET_NAME.fullmatch(name)
    if match is None or parse_directory_name(name) is not None:
        return None
    dataset = DatasetName(match["repository"], match["revision"], match["files"])
    looks_like_file = name.lower().endswith((*SUFFIXES, ".txt"))
    return None if looks_like_file and dataset.files is None else dataset


# Files are found in two steps: `_fetch_...` downloads what may be wanted, which is less than the
# whole dataset where possible; `_pick_...` chooses among that.


def dataset_files(dataset: DatasetName, setting: str) -> list[RepositoryFile]:
    """Return the files of a dataset that a setting takes. Raises UserError if there are none.

    Of a directory, log which files are taken and which are not, unless a glob names them.
    """
    is_glob = dataset.files is not None and re.search(r"[*./]", dataset.files) is not None
    if dataset.files is None:
        files = _default_files(dataset, setting)
        _refuse_several_sets(dataset, files, setting)
    elif is_glob:  # or the path of a file
        files = _glob_files(dataset, dataset.files, setting)
    else:
        files = _split_or_folder_files(dataset, dataset.files.lower(), setting)
        _refuse_several_sets(dataset, files, setting)

    if not files:
        sought = dataset.files or " or ".join(DEFAULT_SPLITS[setting])
        kinds = ", ".join(SUFFIXES)
        remedy = ""
        if dataset.directory is not None:
            remedy = f"; {dataset.repository}/*.jsonl would be all files of a kind"
        raise UserError(
            f"{SETTING_NAMES[setting]}: {_shown(dataset)} has no {sought} file ({kinds}){remedy}"
        )
    if dataset.directory is not None and not is_glob:
        _log_files(dataset, files, setting)
    return files


def _default_files(dataset: DatasetName, setting: str) -> list[RepositoryFile]:
    """Return what a setting takes of a dataset whose name says neither split nor files."""
    splits = DEFAULT_SPLITS[setting]
    files = _pick_split(splits, _fetch_splits(dataset, splits, setting))
    if not files and setting == "train_file":
        every_file = [_any_case(f"*{suffix}") for suffix in SUFFIXES]
        files = _pick_for_setting(setting, _fetch_files(dataset, every_file, setting))
    return files


def _split_or_folder_files(dataset: DatasetName, wanted: str, setting: str) -> list[RepositoryFile]:
    """Return a named split, or else what a setting takes of the folder with that name.

    Args:
        dataset: the dataset.
        wanted: name of the split or folder, in lower case.
        setting: the setting.
    """
    fetched = _fetch_splits(dataset, (wanted,), setting)
    files = _pick_split((wanted,), fetched)
    if not files:
        folder = [file for file in fetched if wanted in _folders(file.name)]
        files = _pick_for_setting(setting, folder)
    return files


def _glob_files(dataset: DatasetName, pattern: str, setting: str) -> list[RepositoryFile]:
    """Return the files of a dataset that match a glob."""
    whole = PurePosixPath(pattern)
    # for `_fetch_files` a * stands for folders, too: it finds these files and maybe others
    found = _fetch_files(dataset, [str(whole).replace("**/", "*")], setting)
    return [file for file in found if _matches_glob(file.name.parts, whole.parts)]


def _matches_glob(name: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Return whether a path matches a glob, both split into their parts.

    A part of the glob stands for one part of the path, `**` for any number of them.
    """
    if not name or not pattern:
        return not name and set(pattern) <= {"**"}
    if pattern[0] == "**":
        return _matches_glob(name, pattern[1:]) or _matches_glob(name[1:], pattern)
    return fnmatch.fnmatch(name[0], pattern[0]) and _matches_glob(name[1:], pattern[1:])


def _log_files(dataset: DatasetName, files: list[RepositoryFile], setting: str) -> None:
    """Log which data files of a directory a setting takes, and which it does not."""
    taken = [str(file.name) for file in files]
    every_file = [str(file.name) for file in _fetch_files(dataset, ["*"], setting)]
    left_out = sorted(set(every_file) - set(taken))
    message = f"{SETTING_NAMES[setting]} {dataset.repository}: {_shortened(taken)}"
    if left_out:
        message += f"; not used: {_shortened(left_out)}"
    distributed.log(message)


def _shortened(names: list[str]) -> str:
    """Return the first names, and how many more there are."""
    shown = ", ".join(names[:NAMES_SHOWN])
    if len(names) > NAMES_SHOWN:
        shown += f" and {len(names) - NAMES_SHOWN} more"
    return shown


def _pick_for_setting(setting: str, files: list[RepositoryFile]) -> list[RepositoryFile]:
    """Pick the split that a setting takes; training takes files of no split if there is none."""
    picked = _pick_split(DEFAULT_SPLITS[setting], files)
    if not picked and setting == "train_file":
        picked = [file for file in files if _split_of(file.name) is None]
    return picked


def _pick_split(splits: tuple[str, ...], files: list[RepositoryFile]) -> list[RepositoryFile]:
    """Pick the files of the first split that has any.

    A name that is not a split picks the files that are called so.
    """
    for split in splits:
        picked = []
        for file in files:
            belongs_to_split = _split_of(file.name) == split
            is_called_so = _stem(file.name).lower() == split
            if belongs_to_split or is_called_so:
                picked.append(file)
        if picked:
            return picked
    return []


def _fetch_splits(
    dataset: DatasetName, splits: tuple[str, ...], setting: str
) -> list[RepositoryFile]:
    """Fetch every data file that may belong to one of the splits, by its name or its folders."""
    patterns = []
    for split in splits:
        for word in SPLIT_WORDS.get(split, (split,)):
            patterns += [_any_case(f"*{word}*{suffix}") for suffix in SUFFIXES]
    return _fetch_files(dataset, patterns, setting)


def _fetch_files(dataset: DatasetName, patterns: list[str], setting: str) -> list[RepositoryFile]:
    """Fetch the data files whose path in the dataset matches a pattern, in order of path.

    As on the hub, a `*` in a pattern also stands for folders. Files of a directory are there
    already. Hidden ones, such as an editor's copies, are left out.
    """
    if dataset.directory is None:
        message_start = f"{SETTING_NAMES[setting]}: {dataset.repository!r} is not a file"
        root = fetch(dataset.repository, dataset.revision, patterns, message_start, kind="dataset")
    else:
        root = dataset.directory

    files = []
    for path in sorted(root.rglob("*")):  # what earlier calls have fetched is there, too
        name = path.relative_to(root)
        matches = any(fnmatch.fnmatch(str(name), pattern) for pattern in patterns)
        is_hidden = any(part.startswith(".") for part in name.parts)
        if matches and not is_hidden and is_data_file(path):
            files.append(RepositoryFile(name, path))
    return files


def _shown(dataset: DatasetName) -> str:
    """Return how messages call a dataset."""
    kind = "dataset" if dataset.directory is None else "directory"
    return f"{kind} {dataset.repository}"


def _refuse_several_sets(dataset: DatasetName, files: list[RepositoryFile], setting: str) -> None:
    """Raise UserError, with a glob for each set, if the files are not all of one set."""
    globs = {_glob_of_set(file.name) for file in files}
    if len(globs) > 1:
        choices = " or ".join(f"{dataset.repository}:{pattern}" for pattern in sorted(globs))
        raise UserError(
            f"{SETTING_NAMES[setting]}: {_shown(dataset)} holds several sets of files: "
            f"name one, {choices}"
        )


def _glob_of_set(file: Path) -> str:
    """Return the glob for a file and the others of its set, e.g. `main/train-*.parquet`.

    The shards of a set differ in their numbers alone (train-00000-of-00002). Files that differ in
    anything else (folder, kind, split in the name) are of different sets.
    """
    folder = "" if file.parent == Path() else f"{file.parent}/"
    suffixes = "".join(file.suffixes)
    is_named_after_split = _split_of(Path(file.name)) is not None
    if not is_named_after_split:
        return f"{folder}*{suffixes}"
    is_shard = _stem(file) != file.name.partition(".")[0]
    return f"{folder}{_stem(file)}-*{suffixes}" if is_shard else f"{folder}{file.name}"


def _stem(file: Path) -> str:
    """Return a file's name without its suffixes and without the number of its shard."""
    return re.sub(r"-\d+-of-\d+.*", "", file.name.partition(".")[0])


def _folders(file: Path) -> list[str]:
    """Return the names of the folders that a file lies in, in lower case."""
    return [folder.lower() for folder in file.parts[:-1]]


def _split_of(file: Path) -> str | None:
    """Return the split in a file's name, or else in the nearest folder's name that has one."""
    for name in (_stem(file), *(folder.name for folder in file.parents)):
        for split, words in SPLIT_WORDS.items():
            if re.search(rf"(?<![a-z])(?:{'|'.join(words)})(?![a-z])", name.lower()):
                return split
    return None


def _any_case(pattern: str) -> str:
    """Return a glob that matches letters in either case; the hub's globs tell them apart."""
    return "".join(f"[{c.lower()}{c.upper()}]" if c.isalpha() else c for c in pattern)
