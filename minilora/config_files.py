"""Read a config file: Python, YAML or JSON, with the same names and the same checks.

A Python file defines `config = Config(...)`. YAML and JSON hold the settings by their names,
section by section; what they leave out has its default. Every error names the file and the setting
and, as far as it is known, the line.
"""

import dataclasses
import json
import re
import runpy
import traceback
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typeguard
import yaml

from minilora.config import Config, RowFormat, config_fields, flatten_config
from minilora.errors import UserError, did_you_mean

Keys = tuple[str, ...]
"""Where a setting is: ("train", "epochs"), or ("data", "file_formats", FILE, "format")."""


def load_config_file(path: str) -> Config:
    """Read a config file: .py, .yaml, .yml or .json, such as the config.json of a run.

    Raises:
        UserError: the file does not exist, cannot be read, or has a setting that does not exist or
            has the wrong type.
    """
    file = Path(path)
    if not file.is_file():
        problem = "is not a file" if file.exists() else "does not exist"
        raise UserError(f"config file {path!r} {problem}")

    readers = {".yaml": _read_yaml, ".yml": _read_yaml, ".json": _read_json}
    suffix = file.suffix.lower()
    if suffix == ".py":
        config = _run_python(path)
        _check_types(config, (), lambda keys: path)
    elif suffix in readers:
        document = readers[suffix](path)
        config = Config()
        _fill(config, document.values, (), document)
        _check_types(config, (), document.location)
    else:
        raise UserError(f"config file {path!r} must be a .py, .yaml, .yml or .json file")
    return config


# ---- Python


def _run_python(path: str) -> Config:
    """Run a config file and return its `config`. Raises UserError if it fails, with its line."""
    try:
        config = runpy.run_path(path).get("config")
    except Exception as error:
        line = _failing_line(path, error)
        message = f"{path}:{line}: {type(error).__name__}: {error}{_hint_for(error)}"
        raise UserError(message) from error
    if not isinstance(config, Config):
        raise UserError(
            f"{path}: must define `config = Config(...)` from minilora.config, "
            f"found {type(config).__name__}"
        )
    return config


def _failing_line(path: str, error: Exception) -> int | str:
    """Return the number of the config file's line that raised an error, or "?"."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename.endswith(Path(path).name)]
    if lines and lines[-1] is not None:
        return lines[-1]
    if isinstance(error, SyntaxError) and error.lineno is not None:  # the file has not begun to run
        return error.lineno
    return "?"


def _hint_for(error: Exception) -> str:
    """Return `; did you mean 'X'?` for an error about an unknown field, or an empty string."""
    if not isinstance(error, TypeError | AttributeError):
        return ""
    # "... unexpected keyword argument 'x'" or "... object has no attribute 'x'"
    quoted = re.findall("'([^']*)'", str(error))
    if not quoted:
        return ""
    settings = [name.rpartition(".")[2] for name in flatten_config(Config())]
    return did_you_mean(quoted[-1], settings + _section_names())


# ---- YAML and JSON


@dataclass
class _Document:
    """The content of a YAML or JSON file."""

    path: str
    values: dict[str, Any] = field(default_factory=dict)
    """The settings, section by section."""
    lines: dict[Keys, int] = field(default_factory=dict)
    """The line of each setting and section."""

    def location(self, keys: Keys) -> str:
        """Return `file:line` of a setting, or else of what it is in."""
        while keys not in self.lines and keys:
            keys = keys[:-1]
        return f"{self.path}:{self.lines.get(keys, '?')}"

    def error(self, keys: Keys, problem: str) -> UserError:
        """Return the error for a setting or section: `file:line: name problem`."""
        return UserError(f"{self.location(keys)}: {_name_of(keys)} {problem}")


class _Loader(yaml.SafeLoader):
    """YAML without its machinery: what a file says stands where it says it."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Return the next node. Raises MarkedYAMLError for an anchor, an alias or a tag."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor or event.tag:
            problem = "anchors (&), aliases (*) and tags (!) are not supported: write the value"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


# a plain scalar is a number or one of these words, or else a string (YAML 1.2, where `1e-4` is a
# number, `no` a string and `010` ten)
WORDS = {
    "null": None,
    "Null": None,
    "NULL": None,
    "~": None,
    "true": True,
    "True": True,
    "false": False,
    "False": False,
}
INTEGER = re.compile(r"[-+]?[0-9]+")
NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


def _read_yaml(path: str) -> _Document:
    """Read a YAML file. Raises UserError with the line of its first mistake."""
    document = _Document(path)
    document.values = _compose(_read_text(path), document)
    return document


def _read_json(path: str) -> _Document:
    """Read a JSON file. Raises UserError with the line of its first mistake."""
    text = _read_text(path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        found = "a list" if isinstance(content, list) else "a single value"
        raise UserError(f'{path}: expected a JSON object ({{"seed": 1}}), found {found}')

    # JSON is YAML, except for tabs between values and for unprintable characters in strings: read
    # as such it tells lines and duplicates
    document = _Document(path)
    _compose(yaml.reader.Reader.NON_PRINTABLE.sub(" ", text).replace("\t", " "), document)
    document.values = content
    return document


def _read_text(path: str) -> str:
    """Read a UTF-8 file. Raises UserError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable: {error}") from error


def _compose(text: str, document: _Document) -> dict[str, Any]:
    """Read the settings in YAML, and write the lines of their names into `document`.

    Raises:
        UserError: it is not YAML, holds something else, or names something twice.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
        if not isinstance(root, yaml.MappingNode):
            found = _kind_of(root)
            raise UserError(f"{document.path}: expected settings (seed: 1), found {found}")
        return _mapping_of(root, (), document)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        context = f"{error.context}: " if error.context else ""
        remedy = ": indent with spaces" if "\\t" in str(error.problem) else ""
        raise UserError(f"{document.path}:{line}: {context}{error.problem}{remedy}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{document.path}: not readable as YAML: {error}") from error


def _kind_of(root: yaml.Node | None) -> str:
    """Return what messages call the content of a file that holds no settings."""
    if isinstance(root, yaml.SequenceNode):
        return "a list"
    is_empty = root is None or root.value == ""
    return "none" if is_empty else "a single value"


def _value_of(node: yaml.Node, keys: Keys, document: _Document) -> object:
    """Return the value of a YAML node: a dict, a list, a string, a number, a boolean or None."""
    if isinstance(node, yaml.MappingNode):
        return _mapping_of(node, keys, document)
    if isinstance(node, yaml.SequenceNode):
        return [_value_of(item, keys, document) for item in node.value]
    return _scalar(node, keys, document)


def _mapping_of(node: yaml.MappingNode, keys: Keys, document: _Document) -> dict[str, Any]:
    """Return the values of a mapping by their names. Raises UserError if one is given twice."""
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = key_node.value
        value_keys = (*keys, key)
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"{document.path}:{line}: expected a name, found something else")
        if key in values:
            raise document.error(value_keys, f"is given a second time in line {line}")
        document.lines[value_keys] = line
        values[key] = _value_of(value_node, value_keys, document)
    return values


def _scalar(node: yaml.Node, keys: Keys, document: _Document) -> object:
    """Return the value of a scalar. Raises UserError where a value is missing, or is Python's."""
    text = node.value
    is_plain = node.style is None
    if not is_plain:  # quoted, or a block
        return text
    if text == "" and _is_section(keys):
        raise document.error(keys, "is empty: leave the section out")
    if text == "":  # YAML's other way to write null: mostly something was forgotten, or a comment
        problem = "has no value: write null for None, and put a text with #, { or : in quotes"
        raise document.error(keys, problem)
    if text == "None":
        raise document.error(keys, "is None: write null for None, and put it in quotes as a text")
    if text in WORDS:
        return WORDS[text]
    if INTEGER.fullmatch(text):
        return int(text)
    if NUMBER.fullmatch(text):
        return float(text)
    return text


def _is_section(keys: Keys) -> bool:
    """Return whether a name is that of a section, of data.file_formats or of a file in it."""
    if keys[:2] == ("data", "file_formats"):
        return len(keys) <= 3
    return len(keys) == 1 and dataclasses.is_dataclass(getattr(Config(), keys[0], None))


def _fill(section: object, values: dict, keys: Keys, document: _Document) -> None:
    """Set the fields of a config, of one of its sections or of a `RowFormat`.

    Args:
        section: has the defaults; changed in place.
        values: by the names of the fields. Their types are checked later.
        keys: where the section is.
        document: tells lines.

    Raises:
        UserError: a name is not that of a field, or a section is something else.
    """
    fields = dict(config_fields(section))
    for name, value in values.items():
        field_keys = (*keys, name)
        if name not in fields:
            remedy = _nearest(field_keys, list(fields))
            raise document.error(field_keys, f"is not a setting{remedy}")
        if dataclasses.is_dataclass(fields[name]):
            _fill(fields[name], _as_mapping(value, field_keys, document), field_keys, document)
        elif name == "file_formats":
            formats = {file: RowFormat() for file in _as_mapping(value, field_keys, document)}
            for file, row_format in formats.items():
                file_keys = (*field_keys, file)
                settings = _as_mapping(value[file], file_keys, document)
                _fill(row_format, settings, file_keys, document)
            setattr(section, name, formats)
        else:
            setattr(section, name, value)


def _as_mapping(value: object, keys: Keys, document: _Document) -> dict:
    """Return the settings of a section. Raises UserError if it is something else, as null is."""
    if isinstance(value, dict):
        return value
    shown = "null: leave it out to have its defaults" if value is None else repr(value)
    raise document.error(keys, f"has settings of its own, found {shown}")


def _nearest(keys: Keys, fields: list[str]) -> str:
    """Return a remedy for an unknown name, or an empty string if none is near.

    Args:
        keys: where the name is.
        fields: the names that are known there.
    """
    name = keys[-1]
    settings = [*flatten_config(Config()), *_section_names()]
    section, _, setting = name.partition(".")
    if len(keys) == 1 and name in settings:
        return f": write {setting} in the section {section}"
    if len(keys) > 2:
        return did_you_mean(name, fields)
    return did_you_mean(_name_of(keys), settings)


# ---- names and types

TYPE_NAMES: dict[object, str] = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "a boolean",
    tuple[str, ...]: "a list of strings",
    types.NoneType: "null (None in Python)",
}


def _section_names() -> list[str]:
    """Return the names of the config's sections, and of the settings beside them."""
    return [name for name, _ in config_fields(Config())]


def _name_of(keys: Keys) -> str:
    """Return a setting's name: train.epochs, or data.file_formats['faq.csv'].format."""
    name = ".".join(keys[:2])
    if len(keys) > 2:
        name += f"[{keys[2]!r}]"
    return ".".join([name, *keys[3:]])


def _check_types(config: object, keys: Keys, location: Callable[[Keys], str]) -> None:
    """Check that every field of a config has the type of its annotation.

    An int is accepted for a float. A list is replaced by a tuple.

    Args:
        config: a config dataclass; its sections are checked too.
        keys: where it is in the config.
        location: returns where the setting with some keys is, `file` or `file:line`, for messages.

    Raises:
        UserError: names the first field that has another type.
    """
    hints = typing.get_type_hints(type(config))
    for name, value in config_fields(config):
        field_keys = (*keys, name)
        if isinstance(value, list):
            value = tuple(value)
            setattr(config, name, value)
        problem = _type_problem(value, hints[name])
        if problem:
            setting = f"{location(field_keys)}: {_name_of(field_keys)}"
            raise UserError(f"{setting} = {value!r}: {problem}")
        if dataclasses.is_dataclass(value):
            _check_types(value, field_keys, location)
        if isinstance(value, dict):  # data.file_formats
            for file, row_format in value.items():
                _check_types(row_format, (*field_keys, file), location)


def _type_problem(value: object, hint: object) -> str:
    """Return why a value does not have the type of an annotation; empty if it does."""
    members = typing.get_args(hint)  # of a union
    allowed = (hint, *members)
    # Python and typeguard accept a boolean for a number
    if isinstance(value, bool) and bool not in allowed:
        return "expected a number, not a boolean" if str not in allowed else "expected a string"
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    try:
        typeguard.check_type(
            value,
            hint,
            collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS,
        )
    except typeguard.TypeCheckError as error:
        problem = f"expected {_alternatives(members)}" if is_union else str(error)
        return f"{problem}{_remedy(value, allowed)}"
    return ""


def _alternatives(members: tuple[object, ...]) -> str:
    """Return the members of a union in words, such as "a number, 'epoch' or null"."""
    names: list[str] = []
    for member in members:
        if typing.get_origin(member) is typing.Literal:
            names += [repr(value) for value in typing.get_args(member)]
        elif member is not int or float not in members:
            names.append(TYPE_NAMES.get(member, str(member)))
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _remedy(value: object, allowed: tuple[object, ...]) -> str:
    """Return how to write a value of the right type, if that is likely what was meant.

    Args:
        value: has the wrong type.
        allowed: the types that are allowed.
    """
    takes_numbers = int in allowed or float in allowed
    if isinstance(value, str) and bool in allowed:
        return "; a boolean is True or False, in YAML and JSON true or false, without quotes"
    if isinstance(value, str) and takes_numbers and re.match(r"[-+.]?[0-9]", value):
        return "; a number is written without quotes and underscores"
    if isinstance(value, float) and int in allowed and value.is_integer():
        return "; a whole number is written without point and exponent"
    if isinstance(value, int | float) and str in allowed:
        return "; put it in quotes"
    if value is None:
        return "; leave the setting out to have its default"
    return ""
