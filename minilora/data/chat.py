"""Chat conversations (format messages): rendered by the chat template, with supervised spans.

Every assistant turn is supervised, unless it has `"train": false`. Chat templates do not say which
part of their output is a turn's text, so a conversation is rendered several times: up to a turn,
and through it. What the second rendering adds is the turn.
"""

import re
from collections.abc import Iterable

from minilora.data.example import Example, RewrittenTurnsError, RowError, Span, column_of
from minilora.data.tokenizer import Tokenizer
from minilora.errors import UserError


def turns_of(row: dict) -> list[dict]:
    """Return the turns of a row of format messages. Raises RowError naming the field."""
    turns = column_of(row, "messages")
    if not isinstance(turns, list) or not turns:
        raise RowError("malformed", '"messages": expected a non-empty list of turns')
    for i, turn in enumerate(turns):
        _check_turn(turn, f'"messages"[{i}]')
    return turns


def _check_turn(turn: object, where: str) -> None:
    """Raise RowError unless a turn has a role, a content and, if any, a valid train flag."""
    wanted = 'expected an object with the strings "role" and "content"'
    if not isinstance(turn, dict):
        raise RowError("malformed", f"{where}: {wanted}, not {type(turn).__name__}")
    if not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
        columns = ", ".join(map(repr, turn)) or "no fields"
        raise RowError("malformed", f"{where}: {wanted}; it has {columns}")
    # Parquet gives every turn the column, null where the flag was absent
    if not isinstance(turn.get("train"), bool | None):
        raise RowError("malformed", f'{where}["train"]: expected true or false')


def asked_turns(turns: list[dict]) -> list[dict]:
    """Return the turns that a model is to answer: all but a last one of the assistant's."""
    return turns[:-1] if turns[-1]["role"] == "assistant" else turns


def conversation_examples(row: dict, tokenizer: Tokenizer) -> list[Example]:
    """Return the examples of a row of format messages: one, or one for each supervised turn.

    Some templates render a turn differently when others follow (Qwen 3 drops the reasoning of
    earlier answers). The model would then be trained on text that it never sees when it answers,
    so each supervised turn becomes an example that ends with it.

    Raises:
        RowError: there is nothing to train on, or the template cannot render the turns.
    """
    turns = turns_of(row)
    supervised = [i for i, turn in enumerate(turns) if _is_supervised(turn)]
    if not any(turns[i]["content"].strip() for i in supervised):
        raise RowError("empty response", '"messages": no assistant turn to train on')

    try:
        return [_conversation_example(turns, supervised, tokenizer)]
    except RewrittenTurnsError:
        return [_conversation_example(turns[: i + 1], [i], tokenizer) for i in supervised]


def _is_supervised(turn: dict) -> bool:
    """Return whether a turn is the assistant's, and is not left out by its train flag."""
    return turn["role"] == "assistant" and turn.get("train") is not False


def _conversation_example(
    turns: list[dict], supervised: list[int], tokenizer: Tokenizer
) -> Example:
    """Return one example of a conversation.

    Its prompt, which may be shortened, is the last user turn before the last supervised one.
    """
    example, _ = render_supervised(turns, supervised, tokenizer)
    before_answer = turns[: supervised[-1]]
    user_turns = [i for i, turn in enumerate(before_answer) if turn["role"] == "user"]
    if not user_turns:
        return example

    last = user_turns[-1]
    content = turns[last]["content"]

    def shorten(length: int) -> Example:
        question = {**turns[last], "content": content[:length]}
        shortened = [*turns[:last], question, *turns[last + 1 :]]
        return _conversation_example(shortened, supervised, tokenizer)

    example.prompt = content
    example.shorten = shorten
    return example


def render_supervised(
    turns: list[dict], supervised: list[int], tokenizer: Tokenizer
) -> tuple[Example, list[int]]:
    """Render a conversation and find its supervised turns in the text.

    A turn is supervised from where the model would begin to write, which is after the generation
    prompt, through the token that ends the turn.

    Args:
        turns: the conversation ({"role", "content"}).
        supervised: indices of the supervised turns, ascending.
        tokenizer: its chat template renders the turns.

    Returns:
        The example, and for each supervised turn where its content begins in the text. If the
        template has stripped white space from the content's beginning, this is where it would begin
        without that: adding k still gives the place of the content's character k.

    Raises:
        RewrittenTurnsError: the template renders a turn differently when others follow.
        RowError: the template refuses the conversation, or changes the text of a turn.
    """
    text = _render(turns, tokenizer)
    spans: list[Span] = []
    starts: list[int] = []  # of the contents
    for i in supervised:
        is_last = i + 1 == len(turns)
        before = _render(turns[:i], tokenizer, add_generation_prompt=True)
        through = text if is_last else _render(turns[: i + 1], tokenizer)
        if not text.startswith(before) or not text.startswith(through):
            message = (
                f"the chat template renders turn {i}, or what comes before it, differently "
                "when other turns follow"
            )
            raise RewrittenTurnsError("template rewrites turns", message)

        content = turns[i]["content"]
        found = _find_content(content, text, len(before), len(through))
        if found is None:
            message = f"the chat template changes the text of turn {i}"
            raise RowError("template rewrites turns", message)
        begin, end = found
        leading_space = len(content) - len(content.lstrip())
        starts.append(begin - leading_space)

        token_end = _end_of_special_token(text[end : len(through)], tokenizer.specials)
        if token_end is not None:
            turn_end = end + token_end
        elif is_last and tokenizer.eos_token:
            # without an end of turn in the text, the model could never learn to stop. After the
            # last turn nothing follows that this could move
            text += tokenizer.eos_token
            turn_end = len(text)
        else:
            turn_end = len(through)
        spans.append((len(before), turn_end))
    return Example(text, spans), starts


def _render(turns: list[dict], tokenizer: Tokenizer, add_generation_prompt: bool = False) -> str:
    """Render turns, reporting a template's complaint as a RowError: it concerns this row alone."""
    try:
        return tokenizer.render(turns, add_generation_prompt)
    except UserError as error:
        raise RowError("refused by the chat template", str(error)) from error


def _find_content(content: str, text: str, begin: int, end: int) -> Span | None:
    """Return where text[begin:end] holds a turn's content, without the white space around it.

    White space inside the content may differ: some templates change it. None if the text does not
    hold the content.
    """
    content = content.strip()
    at = text.find(content, begin, end)
    if at >= 0:
        return at, at + len(content)

    # the same characters, with any white space between them
    characters = [re.escape(character) for character in content if not character.isspace()]
    match = re.compile(r"\s*".join(characters)).search(text, begin, end)
    return match.span() if match else None


def _end_of_special_token(text: str, specials: Iterable[str]) -> int | None:
    """Return the first place in a text at which a special token ends; None if it has none."""
    ends = [text.find(token) + len(token) for token in specials if token in text]
    return min(ends, default=None)
