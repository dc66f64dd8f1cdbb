"""From a row of a data file to the text that a model is trained on.

Each format of `data.format` is one function from the row's columns to an `Example`: text with the
spans of characters that are supervised. The formats paths and messages have modules of their own
(paths.py, chat.py). `tokenize.py` turns the examples into token ids and labels.
"""

import json
import math

from minilora.config import DataConfig
from minilora.data.chat import conversation_examples, render_supervised
from minilora.data.example import Edge, Example, RowError, Span, string_of
from minilora.data.paths import (
    ARTICLE_END,
    article_prompt,
    node_spans,
    path_edges,
    paths_of,
    write_paths,
)
from minilora.data.sources import Line
from minilora.data.tokenizer import Tokenizer
from minilora.errors import UserError


def parse_row(line: Line) -> object:
    """Return the JSON value of a line of a data file.

    Raises:
        RowError: the file's reader found a problem in the line, or it is not JSON, or a string in
            it is not text (it holds half of a surrogate pair, which UTF-8 cannot encode).
    """
    if line.problem:
        raise RowError("malformed", line.problem)
    try:
        row = json.loads(line.content)
        # only an escape can write half of a surrogate pair; most lines have none and skip the check
        if b"\\u" in line.content:
            json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise RowError("malformed", f"not JSON: {error}") from error
    return row


def build_examples(row: object, data: DataConfig, tokenizer: Tokenizer) -> list[Example]:
    """Return the examples of one parsed row: one, or several in format messages.

    Raises:
        RowError: the row cannot be used; the message names the field.
        UserError: a template of the settings is wrong for every row.
    """
    if not isinstance(row, dict):
        raise RowError("malformed", f"expected a JSON object, got {type(row).__name__}")
    if data.format == "messages":
        return conversation_examples(row, tokenizer)
    if data.format == "paths":
        return [_paths_example(row, data, tokenizer)]
    if data.format == "prompt":
        prompt = fill_template(data.prompt_template, row)
        response = fill_template(data.response_template, row)
        return [_prompt_example(prompt, response, data, tokenizer)]
    return [_text_example(row, data, tokenizer)]


def fill_template(template: str, row: dict) -> str:
    """Fill a `str.format` template with the columns of a row.

    Raises:
        RowError: the row lacks a column of the template, or has null or NaN in it.
        UserError: the template itself is wrong.
    """
    given = {name: value for name, value in row.items() if not _is_missing(value)}
    try:
        return template.format(**given)
    except KeyError as error:
        columns = ", ".join(map(repr, row))
        message = f"column {error} of the template is missing or null; the row has {columns}"
        raise RowError("malformed", message) from error
    except (IndexError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"data.prompt_template / response_template: {error} "
            "(write {{ and }} for literal braces)"
        ) from error


def _is_missing(value: object) -> bool:
    """Return whether a column's value is null, or NaN, which pandas writes for a missing number."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _paths_example(row: dict, data: DataConfig, tokenizer: Tokenizer) -> Example:
    """Return the example of an article and its category paths."""
    paths = paths_of(row)
    prompt = article_prompt(row)
    if not data.chat:
        prompt += ARTICLE_END
    response = write_paths(paths)
    nodes, edges = node_spans(paths), path_edges(paths)
    return _prompt_example(prompt, response, data, tokenizer, nodes, edges)


def _prompt_example(
    prompt: str,
    response: str,
    data: DataConfig,
    tokenizer: Tokenizer,
    nodes: list[Span] | None = None,
    edges: list[Edge] | None = None,
) -> Example:
    """Return the example of a prompt and its response, in the chat template or end to end.

    Args:
        prompt: what the model is asked.
        response: what it is to answer; supervised.
        data: `chat` says whether the two become turns of the chat template.
        tokenizer: renders the chat template, and knows the EOS token.
        nodes: spans of the response, see `Example.nodes`.
        edges: the edges of `nodes`.
    """
    if not response.strip():
        raise RowError("empty response", "the response is empty")

    if data.chat:
        turns = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": response},
        ]
        answer_turn = 1
        example, starts = render_supervised(turns, [answer_turn], tokenizer)
        start = starts[0]  # of the response in the text
        # spans of nodes are places in the response as it is written here
        if nodes and response.strip() not in example.text:
            message = "the chat template changes the white space of the paths"
            raise RowError("template rewrites turns", message)
    else:
        text = _end_with_eos(prompt + response, tokenizer)
        start = len(prompt)
        example = Example(text, [(start, len(text))])

    # a chat template may strip white space from the response's end: a node that ends in a space
    # ("Optics \n") then ends in the text before that space
    if example.text[start : start + len(response)] == response:
        response_end = start + len(response)
    else:
        response_end = start + len(response.rstrip())
    if nodes:
        example.nodes = [(start + begin, min(start + end, response_end)) for begin, end in nodes]
    if edges:
        example.edges = edges

    separator = _trailing_space(prompt)  # kept when the prompt is shortened

    def shorten(length: int) -> Example:
        shortened = prompt[:length] + separator
        return _prompt_example(shortened, response, data, tokenizer, nodes, edges)

    example.prompt = prompt
    example.shorten = shorten
    return example


def _text_example(row: dict, data: DataConfig, tokenizer: Tokenizer) -> Example:
    """Return the example of plain text.

    It is supervised after the last data.response_marker, or everywhere if there is no such setting.
    """
    text = string_of(row, "text")
    if not text.strip():
        raise RowError("empty response", '"text" is empty')
    if data.response_marker is None:
        return _supervised_text(text, tokenizer)

    prompt, marker, response = text.rpartition(data.response_marker)
    if not marker:
        raise no_marker_error(data)
    if not response.strip():
        raise RowError("empty response", '"text": nothing follows data.response_marker')

    def build(prompt_length: int) -> Example:
        head = prompt[:prompt_length]
        if prompt_length < len(prompt):
            head += _trailing_space(prompt)  # separates the prompt from the marker
        head += marker
        whole = _end_with_eos(head + response, tokenizer)
        return Example(whole, [(len(head), len(whole))], prompt=prompt, shorten=build)

    return build(len(prompt))


def _supervised_text(text: str, tokenizer: Tokenizer) -> Example:
    """Return the example of a text that is supervised everywhere.

    Shortened, it has no EOS: the text goes on where it is cut.
    """

    def shorten(length: int) -> Example:
        return Example(text[:length], [(0, length)])

    whole = _end_with_eos(text, tokenizer)
    return Example(whole, [(0, len(whole))], prompt=text, shorten=shorten)


def no_marker_error(data: DataConfig) -> RowError:
    """Return the error for a text in which data.response_marker does not occur."""
    message = f'"text" does not contain data.response_marker {data.response_marker!r}'
    return RowError("no response marker", message)


def _trailing_space(text: str) -> str:
    """Return the white space at a text's end."""
    return text[len(text.rstrip()) :]


def _end_with_eos(text: str, tokenizer: Tokenizer) -> str:
    """Return the text with EOS at its end, once, if the tokenizer has an EOS token."""
    if tokenizer.eos_token is None or text.endswith(tokenizer.eos_token):
        return text
    return text + tokenizer.eos_token
