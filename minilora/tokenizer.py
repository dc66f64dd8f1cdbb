"""Text to token ids with the place of every token in the text, behind one class for both kinds of tokenizer files.

`tokenizer.json` is read by tokenizers, `tokenizer.model` by sentencepiece; where a directory has both, tokenizer.json
wins, as in transformers. Special tokens written in the text (`<s>`, `[INST]`, `<|eot_id|>`) become their ids. Chat templates
are rendered in jinja2's sandbox, as transformers does. Nothing here runs a repository's code or unpickles a file.
"""

import json
import re
from collections.abc import Sequence
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox
import sentencepiece
import tokenizers

from minilora.config import UserError

# The form Mistral-7B-Instruct was tuned with and OLLM trains on (arXiv 2410.23584): no space after [/INST].
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('the Mistral form wants user and assistant turns in alternation, user first') }}{% endif %}"
    "{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


class Encoding(NamedTuple):
    ids: list[int]
    spans: list[tuple[int, int]]  # of each token: characters [start, end) of the text; empty for what is not in it


class _SentencePiece:
    """tokenizer.model. Text between special tokens is encoded piece by piece, with the dummy space sentencepiece adds."""

    SENTINEL = "\x01"  # a byte-fallback piece, which never merges with its neighbours

    def __init__(self, path: Path, config: dict):
        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.size = self.processor.vocab_size()
        self.pieces = [self.processor.id_to_piece(i) for i in range(self.size)]
        self.is_byte = [self.processor.is_byte(i) for i in range(self.size)]
        control = [i for i in range(self.size) if self.processor.is_control(i) or self.processor.is_unknown(i)]
        self.specials = {self.pieces[i]: i for i in control}
        self.shown: set[str] = set()  # added tokens that are text, not special
        for i, token in config.get("added_tokens_decoder", {}).items():
            self.specials[token["content"]] = int(i)
            self.size = max(self.size, int(i) + 1)
            if not token.get("special"):
                self.shown.add(token["content"])
        # transformers' "legacy": every stretch of text after a special token starts with a space, not just the first
        self.legacy = config.get("legacy") is not False
        self.dummy_prefix = self.processor.encode("a", out_type=str)[0].startswith("▁")
        self.pattern = re.compile("|".join(re.escape(s) for s in sorted(self.specials, key=len, reverse=True)))

    def token_to_id(self, token: str) -> int | None:
        i = self.processor.piece_to_id(token)  # the unknown piece's id for what is none
        return self.specials.get(token, i if self.pieces[i] == token else None)

    def encode(self, text: str) -> Encoding:
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        at = 0
        for match in [*self.pattern.finditer(text), None]:  # None: the text after the last special token
            start, end = match.span() if match else (len(text), len(text))
            if at < start:
                self._encode_plain(text[at:start], at, ids, spans, prefix=self.dummy_prefix and (self.legacy or at == 0))
            if match:
                ids.append(self.specials[match.group()])
                spans.append((start, end))
            at = end
        return Encoding(ids, spans)

    def _encode_plain(self, text: str, at: int, ids: list[int], spans: list[tuple[int, int]], prefix: bool) -> None:
        """Append the tokens of a text without special tokens that begins at character `at`.

        sentencepiece puts a dummy space before whatever it is given. Where none is wanted, the text's own first space
        is left out for it to stand for, or a sentinel takes it.
        """
        given, shown, skip = text, text, 0
        if prefix:
            shown = " " + text
        elif self.dummy_prefix and text.startswith(" ") and text != " ":
            given = text[1:]
        elif self.dummy_prefix:
            given, skip = self.SENTINEL + text, 2
        new = self.processor.encode(given)
        pieces = [self.pieces[i] for i in new]
        if self.processor.unk_id() in new:  # an unknown piece has a surface of its own
            pieces = self.processor.encode(given, out_type=str)
        shift = at + len(text) - len(shown)
        position = pending = 0
        for i, piece in zip(new[skip:], pieces[skip:], strict=True):
            if self.is_byte[i]:  # the bytes of one character all have its span
                pending = (pending or len(shown[position].encode())) - 1
                start, end = position, position + 1
                position += not pending
            else:
                start, end = position, position + len(piece)
                if piece.replace("▁", " ") != shown[start:end].replace("▁", " "):
                    break
                position = end
            ids.append(i)
            spans.append((max(shift + start, at), shift + end))
        if position != len(shown):
            raise UserError(
                f"tokenizer.model normalises the text near {shown[position : position + 20]!r}, so its tokens have no place "
                "in it; use a tokenizer.json of this model, or one trained with normalization_rule_name=identity"
            )

    def decode(self, ids: list[int], first: bool) -> str:
        """first: nothing comes before. Only where encode puts a dummy space is the first space not the text's own."""
        own = not first and not self.legacy and self.pieces[ids[0]].startswith("▁")
        return " " * own + self.processor.decode(ids)


class _Fast:
    """tokenizer.json, whose own encoder does all the work."""

    def __init__(self, path: Path, config: dict):
        self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self.size = self.tokenizer.get_vocab_size(with_added_tokens=True)
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.first_of_empty = self.tokenizer.encode("", add_special_tokens=True).ids[:1]
        self.specials = {t.content: i for i, t in self.tokenizer.get_added_tokens_decoder().items() if t.special}
        # the post-processor adds BOS, which is ours to do, and trims the spaces that spans must show
        self.tokenizer.post_processor = tokenizers.processors.Sequence([])
        self.shown: set[str] = set()
        self.letter = self.tokenizer.encode("a", add_special_tokens=False).ids
        special = next(iter(self.specials), "")
        again = self.tokenizer.encode(special + "a", add_special_tokens=False).ids[1:]
        self.one_dummy = again != self.letter  # only the first stretch of text begins with a dummy space

    def token_to_id(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)

    def encode(self, text: str) -> Encoding:
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return Encoding(encoding.ids, encoding.offsets)

    def decode(self, ids: list[int], first: bool) -> str:
        if first or not self.one_dummy:
            return self.tokenizer.decode(ids, skip_special_tokens=False)
        return self.tokenizer.decode([*self.letter, *ids], skip_special_tokens=False)[1:]


class Tokenizer:
    """A model's tokenizer and chat template.

    Attributes: bos_id, eos_id (None if the model has none), bos_token, eos_token, vocab_size, adds_bos, chat_template,
    has_template (given or the model's own, not the built-in), specials (text of each special token -> id).
    """

    def __init__(self, directory: str | Path, chat_template: str | None = None):
        """Read the tokenizer files of `directory`. chat_template replaces the model's own. Raises UserError."""
        self.directory = Path(directory)
        config = read_object(self.directory / "tokenizer_config.json")
        if "auto_map" in config:
            raise UserError(f"{self.directory}/tokenizer_config.json: auto_map asks for remote code, which is never run")
        fast, model = self.directory / "tokenizer.json", self.directory / "tokenizer.model"
        if not fast.is_file() and not model.is_file():
            raise UserError(f"{self.directory}: has neither tokenizer.json nor tokenizer.model")
        try:
            self.backend: _Fast | _SentencePiece = _Fast(fast, config) if fast.is_file() else _SentencePiece(model, config)
        except Exception as error:  # both libraries raise bare exceptions of their own
            raise UserError(f"{fast if fast.is_file() else model}: not a readable tokenizer: {error}") from error
        self.vocab_size, self.specials = self.backend.size, self.backend.specials
        self._special_text = {i: token for token, i in self.specials.items()}
        special = {**read_object(self.directory / "special_tokens_map.json"), **config}
        self.bos_token, self.bos_id = self._special(special, "bos_token", "<s>")
        self.eos_token, self.eos_id = self._special(special, "eos_token", "</s>")
        adds_bos = config.get("add_bos_token")
        if adds_bos is None:
            adds_bos = isinstance(self.backend, _SentencePiece) or self.backend.first_of_empty == [self.bos_id]
        self.adds_bos = bool(adds_bos) and self.bos_id is not None
        template = chat_template or self._own_template(config)
        self.has_template = template is not None
        self.chat_template = template or MISTRAL_TEMPLATE
        try:
            self._compiled = _environment().from_string(self.chat_template)
        except jinja2.TemplateError as error:
            raise UserError(f"chat template: line {getattr(error, 'lineno', '?')}: {error}") from error
        self._special_tokens = {k: v for k, v in ((k, _content(v)) for k, v in special.items() if k.endswith("_token")) if v}
        self._special_tokens |= {"bos_token": self.bos_token or "", "eos_token": self.eos_token or ""}

    def _special(self, config: dict, key: str, default: str) -> tuple[str | None, int | None]:
        token = _content(config[key]) if key in config else default
        token_id = self.backend.token_to_id(token) if token else None
        if token_id is None and key in config and token:
            raise UserError(f"{self.directory}: {key} {token!r} is not in the vocabulary")
        return (token, token_id) if token_id is not None else (None, None)

    def _own_template(self, config: dict) -> str | None:
        file = self.directory / "chat_template.jinja"
        try:
            template = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
        except ValueError as error:
            raise UserError(f"{file}: {error}") from error
        if isinstance(template, list):  # several, by name
            template = {t["name"]: t["template"] for t in template}.get("default")
        return template

    def encode(self, text: str) -> Encoding:
        """Ids and spans of the whole text, special tokens in it included, and exactly one BOS if the model has one."""
        ids, spans = self.backend.encode(text)
        if self.adds_bos and ids[:1] != [self.bos_id]:
            ids, spans = [self.bos_id, *ids], [(0, 0), *spans]  # type: ignore[list-item]
        return Encoding(ids, spans)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids. Some tokenizers drop the space each stretch of text begins with: see `decode_after`."""
        text = ""
        first = True
        for token, run in groupby(ids, key=self._special_text.get):
            if token is None:
                text += self.backend.decode([int(i) for i in run], first)
            elif token in self.backend.shown or not skip_special_tokens:
                text += token * len(list(run))
            first = first and token is not None and token == self.bos_token
        return text

    def decode_after(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """Text that `ids` add after `prompt`, its leading space kept."""
        context = [i for i in prompt[self.whole_from(prompt, len(prompt) - 4) :] if i not in (self.bos_id, self.eos_id)]
        return self.decode([*context, *ids])[len(self.decode(context)) :]

    def whole_from(self, ids: Sequence[int], start: int) -> int:
        """The nearest place at or before `start` where no character begins in one token and ends in another."""
        while start > 0 and "\ufffd" in self.decode(ids[start : start + 1]):
            start -= 1
        return max(start, 0)

    def stop_ids(self) -> set[int]:
        """Every id that ends an answer: EOS, what generation_config.json adds, and what ends a turn in the chat template
        (Qwen's base models end a turn with <|im_end|>, though their EOS is another)."""
        more = read_object(self.directory / "generation_config.json").get("eos_token_id")
        more = more if isinstance(more, list) else [more]
        try:
            text = self.render([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!answer!"}])
        except UserError:
            text = ""
        rest = text.rpartition("!answer!")[2]
        ends = sorted((rest.find(token), i) for token, i in self.specials.items() if token in rest)
        return {i for i in (self.eos_id, *more, *(i for _, i in ends[:1])) if isinstance(i, int)}

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """The chat template over `messages` ({"role", "content"}). Raises UserError with the template's own complaint."""
        try:
            return self._compiled.render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None, **self._special_tokens
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise UserError(f"chat template: {error}") from error


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text in some templates; rendering it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _environment() -> jinja2.Environment:
    """The environment chat templates are written for (transformers' `apply_chat_template`), sandboxed."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = tojson
    return environment


def _content(token: str | dict | None) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def read_object(path: Path) -> dict:
    """The JSON object in a file, empty if there is none."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
