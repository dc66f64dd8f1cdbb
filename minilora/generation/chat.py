"""A conversation with a model on stdin and stdout."""

import io
import sys

from minilora.errors import UserError
from minilora.generation.answering import TextGenerator
from minilora.generation.stopping import REPLACEMENT


def check_stdin() -> None:
    """Raise UserError if there is nothing to read questions from."""
    if sys.stdin is None:
        raise UserError("nothing to read from: give --prompt, or --input and --output")


def chat(generator: TextGenerator) -> None:
    """Answer each line of stdin until the input ends, printing each answer while it grows.

    Each prompt holds the whole conversation so far, if the form of the model's prompts has a chat
    template, and the line alone otherwise. A line "/new" begins a new conversation.

    Raises:
        UserError: a line cannot be put into the form of the prompts. On a terminal this is printed,
            and the chat goes on.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are not UTF-8 must not end the chat
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401 - line editing and history for input()

        keys = "Ctrl-C cuts an answer off; /new begins a new conversation; Ctrl-D ends"
        print(keys, file=sys.stderr)

    turns: list[dict] = []
    while True:
        try:
            line = input("> " if is_terminal else "")
        except (EOFError, KeyboardInterrupt):
            return
        if line.strip() == "/new":
            turns = []
        elif line.strip():
            try:
                ids, conversation = generator.writer.encode_turns(turns, line)
            except UserError as error:
                if not is_terminal:
                    raise
                print(f"error: {error}", file=sys.stderr)
                continue
            reply = print_reply(generator, ids, len(conversation))
            turns = [*conversation, {"role": "assistant", "content": reply}]


def print_reply(generator: TextGenerator, ids: list[int], index: int) -> str:
    """Print the reply to a prompt while it grows, and return what was printed.

    Ctrl-C cuts the reply off.

    Args:
        generator: the model.
        ids: the prompt.
        index: decides the random draws of the reply.
    """
    # the last characters may be the beginning of a stop string, so they are printed later
    num_held_back = max((len(string) - 1 for string in generator.params.stop_strings), default=0)
    printed = ""
    try:
        for _, answer in generator.stream([ids], [index]):
            text = generator.text_so_far(ids, answer)
            end = len(text)
            if answer.finish_reason is None:
                complete = text.rstrip(REPLACEMENT)  # without the bytes of an unfinished character
                end = max(len(printed), len(complete) - num_held_back)
            print(text[len(printed) : end], end="", flush=True)
            printed = text[:end]
    except KeyboardInterrupt:
        pass
    print()
    return printed
