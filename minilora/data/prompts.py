"""A row's prompt, as training renders it, and its reference answer.

Training reads a row as one text (formats.py); generation and evaluation need its two parts.
"""

from collections.abc import Callable, Iterable

from minilora.config import DataConfig
from minilora.data.chat import asked_turns, turns_of
from minilora.data.example import RowError, string_of
from minilora.data.formats import fill_template, no_marker_error
from minilora.data.paths import ARTICLE_END, article_prompt, paths_of, write_paths
from minilora.data.tokenizer import Tokenizer
from minilora.errors import UserError

ADDED_COLUMNS = frozenset({"id", "sample", "generated"})  # those that infer.py writes into rows


def prompt_for_row(row: dict, data: DataConfig, tokenizer: Tokenizer) -> str:
    """Return the text after which a model writes the row's response, as in training.

    Raises:
        RowError: a column is missing or of the wrong type; the message names it.
        UserError: the chat template refuses the row.
    """
    if _is_conversation(row, data):
        turns = asked_turns(turns_of(row))
        return tokenizer.render(turns, add_generation_prompt=True)

    question = question_of_row(row, data)
    if data.format == "text":
        return question
    if data.chat:
        turns = [{"role": "user", "content": question}]
        return tokenizer.render(turns, add_generation_prompt=True)
    if _is_article(row, data):
        return question + ARTICLE_END
    return question


def question_of_row(row: dict, data: DataConfig) -> str:
    """Return what a row asks, before a chat template is applied.

    Formats messages, paths and text: the row's column "prompt" if there is one (for paths, if there
    is no "title"); otherwise its turns, article or text up to the response marker. Format prompt:
    the filled data.prompt_template, or the column "prompt" of a row that has no other.

    Raises:
        RowError: a column is missing or of the wrong type; the message names it.
    """
    if _is_conversation(row, data):
        turns = asked_turns(turns_of(row))
        return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
    if data.format == "text":
        text = string_of(row, "prompt" if "prompt" in row else "text")
        return _through_marker(text, data.response_marker)
    if _is_article(row, data):
        return article_prompt(row)
    if data.format != "prompt":
        return string_of(row, "prompt")

    try:
        return fill_template(data.prompt_template, row)
    except RowError:
        # a finished prompt without the template's columns; if there are others, one is missing
        is_bare_prompt = row.keys() - ADDED_COLUMNS == {"prompt"}
        if not is_bare_prompt:
            raise
        return string_of(row, "prompt")


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


def references_of(
    path: str,
    rows: Iterable[tuple[int, dict]],
    data: DataConfig,
    read_reference: Callable[[dict, DataConfig], str] = reference_of_row,
) -> list[str]:
    """Return what the answers to a file's rows should be.

    Args:
        path: the file's name, for messages.
        rows: (line number, row) of each.
        data: the format of the rows.
        read_reference: returns the reference of a row.

    Raises:
        UserError: a row has no reference; the message names file, line and field.
    """
    references = []
    for number, row in rows:
        try:
            references.append(read_reference(row, data))
        except RowError as error:
            raise UserError(
                f"{path}:{number}: --metrics needs what each answer should be: {error}"
            ) from error
    return references


def _is_conversation(row: dict, data: DataConfig) -> bool:
    """Return whether a row's question is in its chat turns."""
    return data.format == "messages" and "prompt" not in row


def _is_article(row: dict, data: DataConfig) -> bool:
    """Return whether a row's question is an article of format paths."""
    return data.format == "paths" and "title" in row


def _through_marker(text: str, marker: str | None) -> str:
    """Return a text up to and with the last occurrence of a marker, or all of it without one."""
    if not marker or marker not in text:
        return text
    head, _, _ = text.rpartition(marker)
    return head + marker
