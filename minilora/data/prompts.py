"""A row's prompt, as training renders it, and its reference answer.

Training reads a row as one text (formats.py); generation and evaluation need its two parts. A text
that a user types is first made a row (`row_of_text`).
"""

import json
import re
from collections.abc import Iterable
from string import Formatter

from minilora.config import DataConfig
from minilora.data.chat import asked_turns, turns_of
from minilora.data.example import RowError, string_of
from minilora.data.formats import fill_template, no_marker_error
from minilora.data.paths import ARTICLE_END, article_prompt, paths_of, write_paths
from minilora.data.tokenizer import Tokenizer
from minilora.errors import UserError

ADDED_COLUMNS = frozenset({"id", "sample", "generated"})  # those that infer.py writes into rows


class RefusedRowError(RowError):
    """The chat template refuses the turns of a row."""


def row_of_text(text: str, data: DataConfig) -> dict:
    """Return the row that a text stands for, in the form of training.

    A JSON object that has all columns of the form is the row itself. Any other text is what the row
    asks: in format prompt the one column of data.prompt_template, otherwise the column "prompt".

    Raises:
        RowError: the text is not valid; it is a JSON object with some of the form's columns but not
            all; or the template of format prompt does not have one column but several, or none. The
            message names the columns that are missing.
    """
    check_encodable(text)
    columns = columns_of_form(data)
    given = _json_object(text)
    missing = [column for column in columns if column not in (given or {})]
    if given is not None and not missing:
        return given
    has_some_columns = len(missing) < len(columns)
    if data.format != "prompt" and not has_some_columns:
        return {"prompt": text}
    if len(columns) == 1:
        return {columns[0]: text}
    if not columns:
        raise RowError("malformed", "data.prompt_template has no column to put the text in")
    wanted = json.dumps(dict.fromkeys(columns, "..."), ensure_ascii=False)
    raise RowError(
        "malformed",
        f"prompts of this form have the columns {', '.join(columns)}; "
        f"missing: {', '.join(missing)}. Give a JSON object: {wanted}",
    )


def columns_of_form(data: DataConfig) -> list[str]:
    """Return the columns that a row needs to be asked, in the order in which they are written."""
    if data.format == "paths":
        return ["title", "abstract"]
    if data.format == "messages":
        return ["messages"]
    if data.format == "text":
        return ["text"]
    return _columns_of_template(data.prompt_template)


def _columns_of_template(template: str) -> list[str]:
    """Return the columns in a `str.format` template. Raises UserError if it is not one."""
    columns: list[str] = []
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"data.prompt_template: {error}") from error
    for _, field, format_spec, _ in parts:
        if field is not None:
            column = re.split(r"[.\[]", field)[0]  # {price[usd]} and {price.real} are of "price"
            columns += [column, *_columns_of_template(format_spec or "")]
    return list(dict.fromkeys(columns))


def _json_object(text: str) -> dict | None:
    """Return the JSON object that a text is; None if it is anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    check_encodable(json.dumps(value, ensure_ascii=False))
    return value


def check_encodable(text: str) -> None:
    """Raise RowError if UTF-8 cannot encode a text, such as half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError("malformed", f"the prompt is not text: {error}") from error


def turns_of_row(row: dict, data: DataConfig) -> list[dict]:
    """Return the turns in which a row asks its question: its conversation, or one user turn.

    Raises:
        RowError: a column is missing or of the wrong type; the message names it.
    """
    row = _expand_bare_prompt(row, data)
    if _is_conversation(row, data):
        return asked_turns(turns_of(row))
    return [{"role": "user", "content": question_of_row(row, data)}]


def prompt_for_row(row: dict, data: DataConfig, tokenizer: Tokenizer) -> str:
    """Return the text after which a model writes the row's response, as in training.

    Raises:
        RowError: a column is missing or of the wrong type; the message names it.
        RefusedRowError: the chat template refuses the row.
    """
    if data.is_chat:
        return prompt_for_turns(turns_of_row(row, data), tokenizer)
    question = question_of_row(row, data)
    return question + ARTICLE_END if data.format == "paths" else question


def prompt_for_turns(turns: list[dict], tokenizer: Tokenizer) -> str:
    """Return the text after which a model answers turns. Raises RefusedRowError."""
    try:
        return tokenizer.render(turns, add_generation_prompt=True)
    except UserError as error:  # it concerns these turns alone
        raise RefusedRowError("refused by the chat template", str(error)) from error


def lacks_marker(prompt: str, data: DataConfig) -> bool:
    """Return whether a prompt lacks the response marker, after which answers began in training."""
    if data.format != "text" or not data.response_marker:
        return False
    return data.response_marker not in prompt


def question_of_row(row: dict, data: DataConfig) -> str:
    """Return what a row asks, before a chat template is applied.

    Formats messages, paths and text: its turns, its article, or its text up to the response marker;
    or, if it has no column "messages", "title" or "text", what stands in its column "prompt".
    Format prompt: the filled data.prompt_template. A row that has no column but "prompt" asks what
    its text asks (see `row_of_text`).

    Raises:
        RowError: a column is missing or of the wrong type; the message names it.
    """
    row = _expand_bare_prompt(row, data)
    if _is_conversation(row, data):
        turns = asked_turns(turns_of(row))
        return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
    if data.format == "text":
        text = string_of(row, "prompt" if "prompt" in row and "text" not in row else "text")
        return _through_marker(text, data.response_marker)
    if _is_article(row, data):
        return article_prompt(row)
    if data.format != "prompt":
        return string_of(row, "prompt")

    return fill_template(data.prompt_template, row)


def reference_of_row(row: dict, data: DataConfig) -> str:
    """Return what the answer to a row should be. Raises RowError naming the field."""
    if data.format == "messages":
        last = turns_of(row)[-1]
        if last["role"] != "assistant":
            raise RowError("malformed", '"messages": the last turn is not the assistant\'s')
        return last["content"]
    if data.format == "paths":
        return write_paths(paths_of(row))
    if data.format == "prompt":
        return fill_template(data.response_template, row)

    text = string_of(row, "text")
    if not data.response_marker:
        return text
    _, marker, response = text.rpartition(data.response_marker)
    if not marker:
        raise no_marker_error(data)
    return response


def references_of(path: str, rows: Iterable[tuple[int, dict]], data: DataConfig) -> list[str]:
    """Return what the answers to a file's rows should be.

    Args:
        path: the file's name, for messages.
        rows: (line number, row) of each.
        data: the format of the rows.

    Raises:
        UserError: a row has no reference; the message names file, line and field.
    """
    references = []
    for number, row in rows:
        try:
            references.append(reference_of_row(row, data))
        except RowError as error:
            raise UserError(
                f"{path}:{number}: --metrics needs what each answer should be: {error}"
            ) from error
    return references


def _expand_bare_prompt(row: dict, data: DataConfig) -> dict:
    """Return a row itself, or the one that its text stands for if it has no column but "prompt"."""
    is_bare_prompt = row.keys() - ADDED_COLUMNS == {"prompt"}
    if not is_bare_prompt or row.keys() >= set(columns_of_form(data)):
        return row
    return row_of_text(string_of(row, "prompt"), data)


def _is_conversation(row: dict, data: DataConfig) -> bool:
    """Return whether a row's question is in its chat turns.

    A row of format messages without turns is only malformed if it has no "prompt" either.
    """
    return data.format == "messages" and ("messages" in row or "prompt" not in row)


def _is_article(row: dict, data: DataConfig) -> bool:
    """Return whether a row's question is an article of format paths."""
    return data.format == "paths" and "title" in row


def _through_marker(text: str, marker: str | None) -> str:
    """Return a text up to and with the last occurrence of a marker, or all of it without one."""
    if not marker or marker not in text:
        return text
    head, _, _ = text.rpartition(marker)
    return head + marker
