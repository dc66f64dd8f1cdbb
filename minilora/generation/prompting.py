"""From what a user asks to the prompt that the model was trained on, as token ids.

A `PromptWriter` needs the tokenizer and the form of the prompts, but no weights: prompts are
written, and mistakes in them found, before the model is loaded.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from minilora import distributed
from minilora.checkpoint.model_record import prompt_form
from minilora.config import DataConfig
from minilora.data.chat_template import load_chat_template
from minilora.data.example import RowError
from minilora.data.prompts import (
    RefusedRowError,
    check_encodable,
    lacks_marker,
    prompt_for_row,
    prompt_for_turns,
    row_of_text,
    turns_of_row,
)
from minilora.data.tokenizer import Tokenizer
from minilora.errors import UserError
from minilora.generation.arguments import FORM_FIELDS, FormArgs, check_form_in_use, given_form
from minilora.generation.jobs import Row
from minilora.loading import ModelFiles, read_tokenizer

REFUSED_SHOWN = 5  # of the rows that a chat template refuses
RAW_FORM = DataConfig(format="prompt", chat=False)  # the column "prompt" is the prompt


@dataclass(frozen=True)
class PromptWriter:
    """Writes what is asked as a prompt, in the form that prompts had in training."""

    tokenizer: Tokenizer
    data: DataConfig
    """The form of rows and prompts."""
    raw: bool = False
    """Whether a text is the prompt itself, in no form."""
    changes: dict[str, object] = field(default_factory=dict)
    """What the user has changed of the form of training: {setting: value}."""

    def digest(self) -> str:
        """Return a hash of all that decides how a row becomes a prompt, besides the tokenizer."""
        form = dataclasses.asdict(self.data)
        parts = [self.raw, *(form[name] for name in FORM_FIELDS)]
        if self.data.is_chat:
            parts.append(self.tokenizer.chat_template)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def row_of_text(self, text: str) -> dict:
        """Return the row that a text stands for. Raises RowError; see `prompts.row_of_text`."""
        if not self.raw:
            return row_of_text(text, self.data)
        check_encodable(text)
        return {"prompt": text}

    def write(self, question: str | dict) -> str:
        """Write the prompt of a row, or of the row that a text stands for.

        Raises:
            RowError: the row lacks a column.
            RefusedRowError: the chat template refuses the row.
        """
        row = self.row_of_text(question) if isinstance(question, str) else question
        return prompt_for_row(row, self.data, self.tokenizer)

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of the prompt that a text stands for. Raises UserError."""
        try:
            prompt = self.write(text)
        except RowError as error:
            raise UserError(str(error)) from error
        if lacks_marker(prompt, self.data):
            distributed.log(f"note: the prompt lacks {_marker_note(self.data)}")
        return self.tokenizer.encode(prompt).ids

    def encode_turns(self, turns: Sequence[dict], text: str) -> tuple[list[int], list[dict]]:
        """Encode a text as the next thing to say in a conversation.

        Args:
            turns: the conversation so far.
            text: what the user says next.

        Returns:
            The ids of the prompt, and the turns with those of `text` added. If the form has no chat
            template, the prompt is that of the text alone.

        Raises:
            UserError: the text lacks columns, or the chat template refuses the turns.
        """
        try:
            more = [*turns, *turns_of_row(self.row_of_text(text), self.data)]
            if not self.data.is_chat:
                return self.encode_text(text), more
            return self.tokenizer.encode(prompt_for_turns(more, self.tokenizer)).ids, more
        except RowError as error:
            raise UserError(str(error)) from error


def make_prompt_writer(
    files: ModelFiles, form: FormArgs, config: DataConfig | None = None
) -> PromptWriter:
    """Read a model's tokenizer, and find the form of its prompts.

    Args:
        files: the model's directories and the record of its training.
        form: the flags that change the form.
        config: a form to use in place of that of training; flags change it too.

    Raises:
        UserError: the tokenizer cannot be read, or settings of the form contradict each other.
    """
    own_tokenizer = read_tokenizer(files)
    trained = prompt_form(files.record, own_tokenizer)
    if form.raw:
        return PromptWriter(own_tokenizer, RAW_FORM, raw=True)

    data = dataclasses.replace(config or trained, **given_form(form))
    if data.format == "messages" and form.chat is None:
        data.chat = True  # that of another format may be turned off
    check_form_in_use(data, form)

    template = load_chat_template(data.chat_template)
    tokenizer = own_tokenizer if template is None else read_tokenizer(files, template)
    if data.is_chat and not tokenizer.has_template:
        distributed.log("note: the model has no chat template: the built-in [INST] form is used")

    in_use, in_training = dataclasses.asdict(data), dataclasses.asdict(trained)
    changes = {name: in_use[name] for name in FORM_FIELDS if in_use[name] != in_training[name]}
    if data.is_chat and tokenizer.chat_template != own_tokenizer.chat_template:
        digest = hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()
        changes["chat_template"] = digest[:16]
    return PromptWriter(tokenizer, data, changes=changes)


def encode_rows(
    writer: PromptWriter, rows: Sequence[Row], source: str
) -> dict[str | int, list[int]]:
    """Encode the prompts of rows, and say so if the chat template refuses some.

    Args:
        writer: writes the prompts.
        rows: the rows to be asked about.
        source: the input file's name, for messages.

    Returns:
        {id of a row: ids of its prompt} of the rows that are not refused.

    Raises:
        UserError: a row has no prompt; the message names file, line and field.
    """
    prompts: dict[str | int, list[int]] = {}
    refused: list[str] = []
    num_without_marker = 0
    for number, values in rows:
        try:
            prompt = writer.write(values)
            ids = writer.tokenizer.encode(prompt).ids
        except RefusedRowError as error:
            refused.append(f"{source}:{number}: {error}")
            continue
        except (RowError, UserError) as error:
            raise UserError(f"{source}:{number}: {error}") from error
        if not ids:
            raise UserError(f"{source}:{number}: the prompt is empty: there is nothing to continue")
        prompts[values["id"]] = ids
        num_without_marker += lacks_marker(prompt, writer.data)

    if num_without_marker:
        distributed.log(f"note: {num_without_marker} prompts lack {_marker_note(writer.data)}")
    if refused:
        lines = [f"{len(refused)} rows are refused by the chat template, and left out:"]
        lines += [f"  {message}" for message in refused[:REFUSED_SHOWN]]
        if len(refused) > REFUSED_SHOWN:
            lines.append(f"  and {len(refused) - REFUSED_SHOWN} more")
        distributed.log("\n".join(lines))
    return prompts


def format_prompt(tokenizer: Tokenizer, prompt: str | dict) -> str:
    """Write a question as the prompt that a model was trained on, for `minilora.generate`.

    Args:
        tokenizer: from `minilora.load`. Its `prompt_form` is how prompts were written in training;
            if there is none, the question is put into the chat template that the model has.
        prompt: what to ask: a text, or a row of the training format as a dictionary. Where the form
            has several columns, a text must be a JSON object with them.

    Raises:
        UserError: columns are missing, or the chat template refuses the row.
    """
    data = tokenizer.prompt_form or prompt_form(None, tokenizer)
    try:
        return PromptWriter(tokenizer, data).write(prompt)
    except RowError as error:
        raise UserError(str(error)) from error


def _marker_note(data: DataConfig) -> str:
    """Return the words for a prompt that has no response marker."""
    return f"the response marker {data.response_marker!r}, after which answers began in training"
