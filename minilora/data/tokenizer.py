"""A model's tokenizer: text to ids with the place of every token in the text, and back.

tokenizer.json is read by the tokenizers library and tokenizer.model by sentencepiece; where a
directory has both, tokenizer.json is used, as in transformers. Chat templates are rendered in
jinja2's sandbox. Code from a model's repository is never run, and no file is unpickled.
"""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import jinja2

from minilora.config import DataConfig
from minilora.data.chat_template import MISTRAL_TEMPLATE, find_chat_template, make_environment
from minilora.data.tokenizer_backends import (
    Backend,
    Encoding,
    SentencePieceBackend,
    TokenizersBackend,
)
from minilora.errors import UserError
from minilora.files import read_json_if_present

# the files of a model's directory that belong to its tokenizer
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
REPLACEMENT = "\ufffd"  # what decoding writes for bytes that are not a whole character


class Tokenizer:
    """A model's tokenizer and chat template.

    Attributes:
        directory: where the tokenizer files are.
        vocab_size: number of ids, added tokens included.
        specials: the id of each special token.
        bos_token, bos_id: the token that begins a text; None if the model has none.
        eos_token, eos_id: the token that ends a text; None if the model has none.
        adds_bos: whether `encode` puts BOS before a text.
        chat_template: the jinja template of conversations.
        has_template: whether it was given or is the model's own. Otherwise it is MISTRAL_TEMPLATE.
        generation_config: the content of generation_config.json, which may name more end tokens.
        prompt_form: how prompts were written in the model's training; set by `minilora.load`.
    """

    def __init__(self, directory: str | Path, chat_template: str | None = None):
        """Read the tokenizer files of a directory.

        Args:
            directory: in Hugging Face layout.
            chat_template: a jinja template to use in place of the model's own.

        Raises:
            UserError: a file is missing, not readable, or wants remote code.
        """
        self.directory = Path(directory)
        self.generation_config = read_json_if_present(self.directory / "generation_config.json")
        self.prompt_form: DataConfig | None = None
        config = read_json_if_present(self.directory / "tokenizer_config.json")
        if "auto_map" in config:
            raise UserError(
                f"{self.directory}/tokenizer_config.json: auto_map asks for remote code, "
                "which is never run"
            )
        self.backend: Backend = _read_backend(self.directory, config)
        self.vocab_size = self.backend.size
        self.specials = self.backend.specials
        self._text_of_special = {i: token for token, i in self.specials.items()}

        special_tokens_map = read_json_if_present(self.directory / "special_tokens_map.json")
        special_tokens = {**special_tokens_map, **config}
        self.bos_token, self.bos_id = self._find_special(special_tokens, "bos_token", "<s>")
        self.eos_token, self.eos_id = self._find_special(special_tokens, "eos_token", "</s>")

        adds_bos = config.get("add_bos_token")
        if adds_bos is None:
            adds_bos = self.backend.adds_bos(self.bos_id)
        self.adds_bos = bool(adds_bos) and self.bos_id is not None

        template = chat_template or find_chat_template(self.directory, config)
        self.has_template = template is not None
        self.chat_template = template or MISTRAL_TEMPLATE
        self._compiled_template = _compile_template(self.chat_template)
        self._template_variables = self._list_special_tokens(special_tokens)

    def _find_special(self, config: dict, key: str, default: str) -> tuple[str | None, int | None]:
        """Return text and id of a special token, or (None, None) if the model has none.

        Args:
            config: names the tokens, as tokenizer_config.json does.
            key: e.g. "bos_token".
            default: the token to try if the config has no such key; ignored if the vocabulary
                lacks it.
        """
        token = _content_of(config[key]) if key in config else default
        if not token:
            return None, None
        token_id = self.backend.token_to_id(token)
        if token_id is not None:
            return token, token_id
        if key in config:
            raise UserError(f"{self.directory}: {key} {token!r} is not in the vocabulary")
        return None, None

    def _list_special_tokens(self, config: dict) -> dict[str, str]:
        """Return the special tokens that chat templates know as variables (bos_token, ...)."""
        variables = {}
        for key, value in config.items():
            if key.endswith("_token"):
                content = _content_of(value)
                if content:
                    variables[key] = content
        variables["bos_token"] = self.bos_token or ""
        variables["eos_token"] = self.eos_token or ""
        return variables

    def encode(self, text: str) -> Encoding:
        """Return the tokens of a whole text, special tokens in it included.

        There is exactly one BOS at the beginning if `adds_bos`, whether or not the text has it. EOS
        is not added.
        """
        encoding = self.backend.encode(text)
        has_bos = encoding.ids[:1] == [self.bos_id]  # a slice, as an empty text has no ids
        if has_bos or not self.adds_bos:
            return encoding
        assert self.bos_id is not None, "adds_bos implies it"
        return Encoding([self.bos_id, *encoding.ids], [(0, 0), *encoding.spans])

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ids.

        A dummy space that the tokenizer puts before a text is left out. Where `ids` continue other
        ones, their first space is their own: see `decode_after`.
        """
        text = ""
        begins_text = True
        # runs of equal special tokens; between them runs of ordinary tokens, whose key is None
        for special, run in groupby(ids, key=self._text_of_special.get):
            run_ids = [int(i) for i in run]
            if special is None:
                text += self.backend.decode(run_ids, begins_text)
            elif special in self.backend.plain_added_tokens or not skip_special_tokens:
                text += special * len(run_ids)

            is_bos = special is not None and special == self.bos_token
            if not is_bos:  # what follows BOS still begins the text
                begins_text = False
        return text

    def decode_after(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """Return the text that `ids` add after the ids of `prompt`, with its first space."""
        # decoded with tokens before them, `ids` keep their first space, and bytes that complete a
        # character are read together with its others: a character has at most 4 byte tokens
        start = self.character_boundary_before(prompt, len(prompt) - 4)
        context = [i for i in prompt[start:] if i not in (self.bos_id, self.eos_id)]
        return self.decode([*context, *ids])[len(self.decode(context)) :]

    def character_boundary_before(self, ids: Sequence[int], start: int) -> int:
        """Return the last index at or before `start` whose token does not continue a character.

        A character may be written as several byte tokens. A negative `start` counts as 0.
        """
        start = max(start, 0)
        while start > 0 and REPLACEMENT in self.decode(ids[start : start + 1]):
            start -= 1
        return start

    def stop_ids(self) -> set[int]:
        """Return every id that ends an answer.

        These are EOS, what generation_config.json adds, and the token that ends a turn in the chat
        template (Qwen's base models end a turn with <|im_end|>, though their EOS is another).
        """
        candidates: list[object] = [self.eos_id, self.end_of_turn()]
        configured = self.generation_config.get("eos_token_id")
        candidates += configured if isinstance(configured, list) else [configured]
        return {i for i in candidates if isinstance(i, int)}

    def end_of_turn(self) -> int | None:
        """Return the id of the first special token that the chat template writes after an answer.

        None if it writes none.
        """
        answer = "!answer!"
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        try:
            text = self.render(turns)
        except UserError:
            return None
        after = text.rpartition(answer)[2]
        found = [(after.find(token), i) for token, i in self.specials.items() if token in after]
        if not found:
            return None
        _, first_id = min(found)
        return first_id

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """Return the chat template's text for a conversation.

        Args:
            messages: turns {"role", "content"}.
            add_generation_prompt: end with the beginning of an assistant turn, to be continued.

        Raises:
            UserError: the template refuses the conversation; the message is the template's own.
        """
        try:
            return self._compiled_template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,  # templates test whether there are any
                documents=None,
                **self._template_variables,
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise UserError(f"chat template: {error}") from error


def has_tokenizer(directory: Path) -> bool:
    """Return whether a directory has a tokenizer of its own."""
    return any((directory / file).is_file() for file in ("tokenizer.json", "tokenizer.model"))


def _read_backend(directory: Path, config: dict) -> Backend:
    """Read tokenizer.json if there is one, else tokenizer.model. Raises UserError."""
    json_file, model_file = directory / "tokenizer.json", directory / "tokenizer.model"
    if not json_file.is_file() and not model_file.is_file():
        raise UserError(f"{directory}: has neither tokenizer.json nor tokenizer.model")
    file = json_file if json_file.is_file() else model_file
    try:
        if file == json_file:
            return TokenizersBackend(file)
        return SentencePieceBackend(file, config)
    except Exception as error:  # both libraries raise bare exceptions of their own
        raise UserError(f"{file}: not a readable tokenizer: {error}") from error


def _compile_template(template: str) -> jinja2.Template:
    """Compile a chat template. Raises UserError naming the line of a mistake in it."""
    try:
        return make_environment().from_string(template)
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", "?")
        raise UserError(f"chat template: line {line}: {error}") from error


def _content_of(token: str | dict | None) -> str | None:
    """Return the text of a token, which a config holds as a string or an object."""
    return token.get("content") if isinstance(token, dict) else token
