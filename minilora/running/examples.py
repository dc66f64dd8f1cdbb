"""One row of a file -> the text a model is trained on, with the places in it that are supervised; or what it is asked.

Each format is one function from a row's columns to an `Example`. Spans are characters of the rendered text: nothing is
ever found by searching token ids, so no example is lost because a name does not survive the tokenizer.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields

from minilora.checkpoint import STATE
from minilora.config import DataConfig, UserError
from minilora.labels import Edge, Span, path_edges
from minilora.tokenizer import Tokenizer
from minilora.weights import read_json, resolve

ARROW = " -> "


class RowError(Exception):
    """A row that cannot be used. `reason` groups it in the counts table, the text says what is wrong with which field."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class RewrittenError(RowError):
    """A chat template renders a turn differently once others follow."""


@dataclass
class Example:
    text: str
    supervised: list[Span]  # the responses, each with its end-of-turn token
    nodes: list[Span] = field(default_factory=list)  # format paths: node v of each edge occurrence u -> v
    edges: list[Edge] = field(default_factory=list)  # and its edge
    prompt: str = ""  # the part that too_long="truncate" may shorten
    shorten: Callable[[int], "Example"] | None = None  # the same example with only so many characters of it


def parse(line: bytes | str) -> object:
    """The JSON of a line; a str says what is wrong with one. Raises RowError, also for a lone surrogate: JSON, but no text."""
    if isinstance(line, str):
        raise RowError("malformed", line)
    try:
        row = json.loads(line)
        if b"\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise RowError("malformed", f"not JSON: {error}") from error
    return row


def build(row: object, data: DataConfig, tokenizer: Tokenizer) -> list[Example]:
    """The example of one parsed row, or (format messages) the examples. Raises RowError naming the field."""
    if not isinstance(row, dict):
        raise RowError("malformed", f"expected a JSON object, got {type(row).__name__}")
    if data.format == "paths":
        return [_paths(row, data, tokenizer)]
    if data.format == "prompt":
        prompt, response = fill_template(data.prompt_template, row), fill_template(data.response_template, row)
        return [_prompt_response(prompt, response, data, tokenizer)]
    if data.format == "messages":
        return _messages(row, tokenizer)
    return [_text(row, data, tokenizer)]


def column_of(row: dict, key: str) -> object:
    """A column that must be there."""
    if key not in row:
        has = ", ".join(map(repr, row)) or "no columns"
        raise RowError("malformed", f'"{key}" is missing; the row has {has} (data.format says what a row holds)')
    return row[key]


def string_of(row: dict, key: str) -> str:
    """A column that must be a string."""
    column_of(row, key)
    if not isinstance(row[key], str):
        raise RowError("malformed", f'"{key}": expected a string, got {type(row[key]).__name__}')
    return row[key]


def fill_template(template: str, row: dict) -> str:
    """A str.format template over the row's columns."""
    try:
        given = {name: value for name, value in row.items() if value is not None and value == value}  # NaN: none is given
        return template.format(**given)
    except KeyError as error:
        has = ", ".join(map(repr, row))
        raise RowError("malformed", f"column {error} of the template is missing or null; the row has {has}") from error
    except (IndexError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"data.prompt_template / response_template: {error} (write {{{{ and }}}} for literal braces)") from error


def _paths(row: dict, data: DataConfig, tokenizer: Tokenizer) -> Example:
    """`Title: ...` and the abstract -> the category paths, one a line (OLLM's prompt)."""
    paths, prompt = paths_of(row), article(row)
    nodes, at = [], 0
    for path in paths:
        for j, node in enumerate(path):
            if j:
                nodes.append((at, at + len(node)))
            at += len(node) + (len(ARROW) if j + 1 < len(path) else 1)
    response = "".join(ARROW.join(path) + "\n" for path in paths)
    return _prompt_response(prompt if data.chat else prompt + "\n", response, data, tokenizer, nodes, path_edges(paths))


def paths_of(row: dict) -> list[list[str]]:
    """The paths of a row of format paths."""
    paths = column_of(row, "paths")
    if not isinstance(paths, list) or not all(isinstance(p, list) and p for p in paths):
        raise RowError("malformed", '"paths": expected a list of non-empty lists of strings')
    for i, path in enumerate(paths):
        for j, node in enumerate(path):
            if not isinstance(node, str) or not node.strip() or "\n" in node or ARROW in node:
                raise RowError("malformed", f'"paths"[{i}][{j}]: {node!r} is not a name (a string without newline or "{ARROW}")')
    return paths


def article(row: dict) -> str:
    """The prompt of format paths (OLLM's)."""
    return f"Title: {string_of(row, 'title')}\n{string_of(row, 'abstract')}"


def _prompt_response(
    prompt: str, response: str, data: DataConfig, tokenizer: Tokenizer,
    nodes: list[Span] | None = None, edges: list[Edge] | None = None,
) -> Example:  # fmt: skip
    """A prompt and its supervised response, in the chat template or end to end; nodes are spans of the response."""
    if not response.strip():
        raise RowError("empty response", "the response is empty")
    if data.chat:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        example, (at,) = _render_chat(messages, [1], tokenizer)
        if nodes and response.strip() not in example.text:
            raise RowError("template rewrites turns", "the chat template changes the white space of the paths")
    else:
        text = _ended(prompt + response, tokenizer)
        example, at = Example(text, [(len(prompt), len(text))]), len(prompt)
    kept = len(response.rstrip()) if data.chat else len(response)  # a template may trim the response's end
    at -= len(response) - len(response.lstrip()) if example.text[at : at + kept] != response[:kept] else 0
    limit = at + (len(response) if example.text[at : at + len(response)] == response else len(response.rstrip()))
    example.nodes = [(at + begin, min(at + end, limit)) for begin, end in nodes or []]
    example.edges = edges or []
    example.prompt = prompt
    end = prompt[len(prompt.rstrip()) :]  # keeps the response apart from the prompt
    example.shorten = lambda length: _prompt_response(prompt[:length] + end, response, data, tokenizer, nodes, edges)
    return example


def _ended(text: str, tokenizer: Tokenizer) -> str:
    """The text with EOS at its end, once."""
    eos = tokenizer.eos_token or ""
    return text if eos and text.endswith(eos) else text + eos


def turns_of(row: dict) -> list[dict]:
    """The chat turns of format messages."""
    turns = column_of(row, "messages")
    if not isinstance(turns, list) or not turns:
        raise RowError("malformed", '"messages": expected a non-empty list of turns')
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
            has = ", ".join(map(repr, turn)) if isinstance(turn, dict) else type(turn).__name__
            raise RowError("malformed", f'"messages"[{i}]: expected an object with the strings "role" and "content", not {has}')
        if not isinstance(turn.get("train"), bool | None):  # null is what Parquet has for none
            raise RowError("malformed", f'"messages"[{i}]["train"]: expected true or false')
    return turns


def _messages(row: dict, tokenizer: Tokenizer) -> list[Example]:
    """Chat turns; every assistant turn is supervised unless it says `"train": false`.

    Some templates render a turn differently once others follow (Qwen3 drops the reasoning of earlier ones), which is not what
    the model sees when it answers: each turn is then an example of its own.
    """
    turns = turns_of(row)
    supervised = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and turn.get("train") is not False]
    if not supervised or not any(turns[i]["content"].strip() for i in supervised):
        raise RowError("empty response", '"messages": no assistant turn to train on')
    try:
        return [_conversation(turns, supervised, tokenizer)]
    except RewrittenError:
        return [_conversation(turns[: i + 1], [i], tokenizer) for i in supervised]


def _conversation(turns: list[dict], supervised: list[int], tokenizer: Tokenizer) -> Example:
    """One example of a conversation, whose last user turn before a supervised one may be shortened."""
    example, _ = _render_chat(turns, supervised, tokenizer)
    users = [i for i, turn in enumerate(turns) if turn["role"] == "user" and i < supervised[-1]]
    if users:
        last = users[-1]
        example.prompt = turns[last]["content"]

        def shorten(length: int) -> Example:
            cut = {**turns[last], "content": turns[last]["content"][:length]}
            return _conversation([*turns[:last], cut, *turns[last + 1 :]], supervised, tokenizer)

        example.shorten = shorten
    return example


def _render_chat(messages: list[dict], supervised: list[int], tokenizer: Tokenizer) -> tuple[Example, list[int]]:
    """Render a conversation and find its supervised turns by rendering it turn by turn.

    Returns the example and where the content of each supervised turn begins. A turn is supervised from where the model
    would begin to write (what the generation prompt does not give) through the token that ends it.
    """

    def render(turns: list[dict], add_generation_prompt: bool = False) -> str:
        try:
            return tokenizer.render(turns, add_generation_prompt)
        except UserError as error:  # what a template says of one conversation is no reason to end the run
            raise RowError("refused by the chat template", str(error)) from error

    text = render(messages)
    spans, contents = [], []
    for i in supervised:
        prompt = render(messages[:i], add_generation_prompt=True)
        through = text if i + 1 == len(messages) else render(messages[: i + 1])
        if not text.startswith(prompt) or not text.startswith(through):
            message = f"the chat template renders turn {i}, or what comes before it, differently once more is there"
            raise RewrittenError("template rewrites turns", message)
        content = messages[i]["content"].strip()
        at = text.find(content, len(prompt), len(through))
        if at < 0:
            content = _respaced(content, text[len(prompt) : len(through)])
            at = text.find(content, len(prompt), len(through)) if content else -1
        if at < 0:
            raise RowError("template rewrites turns", f"the chat template changes the text of turn {i}")
        rest = text[at + len(content) : len(through)]
        enders = [rest.find(s) + len(s) for s in tokenizer.specials if s in rest]
        spans.append((len(prompt), at + len(content) + min(enders, default=len(rest))))
        whole = messages[i]["content"]  # with the spaces around it, where the template leaves them
        lead = len(whole) - len(whole.lstrip())
        contents.append(at - lead if text[at - lead : at] == whole[:lead] and at - lead >= len(prompt) else at)
        if not enders and i + 1 == len(messages) and tokenizer.eos_token:  # a template that never ends the turn
            text += tokenizer.eos_token
            spans[-1] = (spans[-1][0], len(text))
    return Example(text, spans), contents


def _respaced(content: str, rendered: str) -> str:
    """What stands in a rendered turn for a content of which the template has changed the white space; else nothing."""
    found = re.search(r"\s*".join(re.escape(c) for c in content if not c.isspace()), rendered)
    return found.group() if found else ""


def _text(row: dict, data: DataConfig, tokenizer: Tokenizer) -> Example:
    """Plain text and EOS, supervised after the last response_marker, or everywhere without one."""
    text = string_of(row, "text")
    if not text.strip():
        raise RowError("empty response", '"text" is empty')
    if data.response_marker is None:
        whole = _ended(text, tokenizer)
        return Example(whole, [(0, len(whole))], prompt=text, shorten=lambda length: Example(text[:length], [(0, length)]))
    prompt, marker, response = text.rpartition(data.response_marker)
    if not marker:
        raise RowError("no response marker", f'"text" does not contain data.response_marker {data.response_marker!r}')
    if not response.strip():
        raise RowError("empty response", '"text": nothing follows data.response_marker')

    def cut(length: int) -> Example:
        end = prompt[len(prompt.rstrip()) :] if length < len(prompt) else ""  # keeps the marker apart
        head = prompt[:length] + end + marker
        full = _ended(head + response, tokenizer)
        return Example(full, [(len(head), len(full))], prompt=prompt, shorten=cut)

    return cut(len(prompt))


def ask(row: dict, data: DataConfig, tokenizer: Tokenizer) -> str:
    """The text that asks a model for a row's response, in the form `build` trains it in. Raises RowError."""
    if data.format == "messages" and "prompt" not in row:
        turns = turns_of(row)
        return tokenizer.render(turns[:-1] if turns[-1]["role"] == "assistant" else turns, add_generation_prompt=True)
    asked = question(row, data)
    if data.format == "text":
        return asked
    if not data.chat:
        return asked + "\n" * (data.format == "paths" and "title" in row)
    return tokenizer.render([{"role": "user", "content": asked}], add_generation_prompt=True)


def question(row: dict, data: DataConfig) -> str:
    """What a row asks, without the chat form. A row with only a "prompt" is a user's turn whatever the format (format text:
    plain text). Raises RowError naming the field."""
    if data.format == "messages" and "prompt" not in row:
        turns = turns_of(row)
        return "\n\n".join(f"{t['role']}: {t['content']}" for t in (turns[:-1] if turns[-1]["role"] == "assistant" else turns))
    if data.format == "text":
        text = string_of(row, "prompt" if "prompt" in row else "text")
        head, marker, _ = text.rpartition(data.response_marker or "\0")
        return head + marker if marker else text
    if data.format == "paths" and "title" in row:
        return article(row)
    try:
        return fill_template(data.prompt_template, row) if data.format == "prompt" else string_of(row, "prompt")
    except RowError:
        if row.keys() - {"id", "sample", "generated"} != {"prompt"}:
            raise
        return string_of(row, "prompt")


def reference(row: dict, data: DataConfig) -> str:
    """What the answer to a row should be. Raises RowError naming the field."""
    if data.format == "messages":
        turns = turns_of(row)
        if turns[-1]["role"] != "assistant":
            raise RowError("malformed", '"messages": the last turn is not the assistant\'s')
        return turns[-1]["content"]
    if data.format == "text":
        _, marker, response = string_of(row, "text").rpartition(data.response_marker or "\0")
        if data.response_marker and not marker:
            raise RowError("no response marker", f'"text" does not contain data.response_marker {data.response_marker!r}')
        return response
    if data.format == "paths":
        return "".join(ARROW.join(path) + "\n" for path in paths_of(row))
    return fill_template(data.response_template, row)


def references_of(path: str, rows: list[tuple[int, dict]], data: DataConfig, of: Callable = reference) -> list[str]:
    """What the answers to a file's rows should be. Raises UserError naming file, line and field."""
    texts = []
    for number, row in rows:
        try:
            texts.append(of(row, data))
        except RowError as error:
            raise UserError(f"{path}:{number}: --metrics needs what each answer should be: {error}") from error
    return texts


def trained_format(
    model: str, adapter: str | None, revision: str | None, raw: bool, tokenizer: Tokenizer | None = None
) -> DataConfig:  # fmt: skip
    """The data settings of the run that made the model or adapter; else prompts, in the model's chat form if it has one."""
    if raw:
        return DataConfig(format="prompt", chat=False)
    for directory in (*([resolve(adapter)] if adapter else []), resolve(model, revision)):
        for name, path in ((STATE, ("config", "data")), ("minilora.json", ("data",))):
            if (directory / name).is_file():
                values = read_json(directory / name)
                for key in path:
                    values = values[key]
                known = {f.name for f in fields(DataConfig)}
                return DataConfig(**{k: v for k, v in values.items() if k in known})
    return DataConfig(format="prompt", chat=tokenizer is not None and tokenizer.has_template)
