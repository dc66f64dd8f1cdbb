"""The two kinds of tokenizer files behind one interface: tokenizer.model and tokenizer.json.

A backend turns text into ids with spans, and ids into text. Special tokens that are written in the
text (`<s>`, `[INST]`, `<|eot_id|>`) become their ids. tokenizer.py adds BOS and chat templates.
"""

import re
from pathlib import Path
from typing import NamedTuple, Protocol

import sentencepiece
import tokenizers

from minilora.errors import UserError

SPACE = "▁"  # how a piece writes a space


class Encoding(NamedTuple):
    """The tokens of a text."""

    ids: list[int]
    spans: list[tuple[int, int]]
    """For each token the characters [start, end) of the text that it covers; an empty span for a
    token that is not written in the text (a BOS that was added, a dummy space)."""


class Backend(Protocol):
    """What `Tokenizer` needs of a tokenizer file."""

    size: int
    """Number of ids, added tokens included."""
    specials: dict[str, int]
    """The ids of the special tokens by their texts. With a tokenizer.model also those of
    `plain_added_tokens`; the decoder of a tokenizer.json writes these as ordinary text."""
    plain_added_tokens: set[str]
    """Those of `specials` that were added to the vocabulary without the flag "special": they are
    ordinary text to the model, so decoding never leaves them out."""

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token, or None if the vocabulary does not have it."""
        ...

    def adds_bos(self, bos_id: int | None) -> bool:
        """Return whether texts begin with BOS where tokenizer_config.json does not say."""
        ...

    def encode(self, text: str) -> Encoding:
        """Return the tokens of a text, without adding BOS or EOS."""
        ...

    def decode(self, ids: list[int], begins_text: bool) -> str:
        """Return the text of one or more ids, none of them in `specials`.

        Args:
            ids: the ids.
            begins_text: whether no text comes before them. Then their dummy space is left out.
        """
        ...


class _PreparedStretch(NamedTuple):
    """How to encode a stretch of text with sentencepiece."""

    input_text: str
    """What sentencepiece is given."""
    num_skipped_tokens: int
    """How many of the resulting tokens to leave out, from the first on."""
    spelled_text: str
    """What the other tokens spell: the stretch, with the dummy space before it if it has one."""


class SentencePieceBackend:
    """A tokenizer.model, read by sentencepiece.

    sentencepiece puts a dummy space before every text that it encodes, so that a word has the same
    token at the beginning as elsewhere. A stretch, the text between two special tokens, is encoded
    on its own.
    """

    SENTINEL = "\x01"  # becomes a byte token, which never merges with its neighbors

    def __init__(self, path: Path, config: dict):
        """Read the file. `config` is the content of tokenizer_config.json."""
        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.size: int = self.processor.vocab_size()
        self.pieces: list[str] = [self.processor.id_to_piece(i) for i in range(self.size)]
        self.is_byte: list[bool] = [self.processor.is_byte(i) for i in range(self.size)]

        self.specials: dict[str, int] = {}
        self.plain_added_tokens: set[str] = set()
        for i, piece in enumerate(self.pieces):
            if self.processor.is_control(i) or self.processor.is_unknown(i):
                self.specials[piece] = i
        for key, token in config.get("added_tokens_decoder", {}).items():
            self.specials[token["content"]] = int(key)
            self.size = max(self.size, int(key) + 1)
            if not token.get("special"):
                self.plain_added_tokens.add(token["content"])
        longest_first = sorted(self.specials, key=len, reverse=True)
        self.special_pattern = re.compile("|".join(map(re.escape, longest_first)))

        self.has_dummy_space = self.processor.encode("a", out_type=str)[0].startswith(SPACE)
        # transformers' "legacy": every stretch has the dummy space. With legacy=False only a
        # stretch at the beginning of the text has it
        self.legacy = config.get("legacy") is not False

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token, or None if the vocabulary does not have it."""
        if token in self.specials:
            return self.specials[token]
        i = self.processor.piece_to_id(token)  # that of the unknown piece if there is no such token
        return i if self.pieces[i] == token else None

    def adds_bos(self, bos_id: int | None) -> bool:
        """Return True: models with a tokenizer.model were trained with BOS."""
        return True

    def encode(self, text: str) -> Encoding:
        """Return the tokens of a text, without adding BOS or EOS.

        Raises:
            UserError: the file normalizes the text, so that its tokens have no place in it.
        """
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        at = 0
        for match in self.special_pattern.finditer(text):
            start, end = match.span()
            before = self._encode_stretch(text[at:start], at)
            ids += [*before.ids, self.specials[match.group()]]
            spans += [*before.spans, (start, end)]
            at = end
        rest = self._encode_stretch(text[at:], at)
        return Encoding(ids + rest.ids, spans + rest.spans)

    def _prepare(self, stretch: str, begin: int) -> _PreparedStretch:
        """Return how a stretch that begins at character `begin` is encoded.

        The dummy space, which sentencepiece always writes, is wanted for some stretches only. For
        the others there are two ways to be rid of it: a stretch that has a first space of its own
        is given without it, and the dummy space then replaces it; any other stretch gets a
        sentinel before it, and the tokens of dummy space and sentinel are left out.
        """
        if not self.has_dummy_space:
            return _PreparedStretch(stretch, 0, spelled_text=stretch)
        if self.legacy or begin == 0:
            return _PreparedStretch(stretch, 0, spelled_text=" " + stretch)

        rest = stretch[1:]
        if stretch.startswith(" ") and rest:  # an empty text would not get a dummy space
            return _PreparedStretch(rest, 0, spelled_text=stretch)
        return _PreparedStretch(self.SENTINEL + stretch, 2, spelled_text=stretch)

    def _encode_stretch(self, stretch: str, begin: int) -> Encoding:
        """Return the tokens of text that begins at character `begin` and has no special token."""
        if not stretch:
            return Encoding([], [])
        prepared = self._prepare(stretch, begin)
        ids = self.processor.encode(prepared.input_text)
        if self.processor.unk_id() in ids:  # an unknown token has its own text as its piece
            pieces = self.processor.encode(prepared.input_text, out_type=str)
        else:
            pieces = [self.pieces[i] for i in ids]
        ids = ids[prepared.num_skipped_tokens :]
        pieces = pieces[prepared.num_skipped_tokens :]

        # a dummy space lies before the stretch: its token is cut to the characters in the stretch
        num_dummy_spaces = len(prepared.spelled_text) - len(stretch)
        shift = begin - num_dummy_spaces
        spans = [
            (max(shift + start, begin), shift + end)
            for start, end in self._find_pieces(ids, pieces, prepared.spelled_text)
        ]
        return Encoding(ids[: len(spans)], spans)

    def _find_pieces(self, ids: list[int], pieces: list[str], text: str) -> list[tuple[int, int]]:
        """Return the characters [start, end) of a text that each of its tokens spells.

        A character that the vocabulary lacks is written byte by byte, with a token for each byte
        of its UTF-8 form. All of these tokens have the character's span.

        Args:
            ids: the tokens. Any that follow the text's end have no span.
            pieces: what each token spells.
            text: the text.

        Raises:
            UserError: the tokens spell something else.
        """
        spans: list[tuple[int, int]] = []
        start = 0
        bytes_left = 0  # of the character at `start`, while it is written byte by byte
        for i, piece in zip(ids, pieces, strict=True):
            if self.is_byte[i]:
                end = start + 1
                if bytes_left == 0:
                    bytes_left = len(text[start].encode())
                bytes_left -= 1
                is_complete = bytes_left == 0
            else:
                end = start + len(piece)
                if piece.replace(SPACE, " ") != text[start:end].replace(SPACE, " "):
                    break
                is_complete = True

            spans.append((start, end))
            if is_complete:
                start = end

        if start != len(text):
            raise UserError(
                f"tokenizer.model normalizes the text near {text[start : start + 20]!r}, "
                "so its tokens have no place in it; use a tokenizer.json of this model, or one "
                "trained with normalization_rule_name=identity"
            )
        return spans

    def decode(self, ids: list[int], begins_text: bool) -> str:
        """Return the text of ids; see `Backend.decode`."""
        text = self.processor.decode(ids)  # without a space that the first piece begins with
        first_space_is_dummy = begins_text or self.legacy
        if not first_space_is_dummy and self.pieces[ids[0]].startswith(SPACE):
            return " " + text
        return text


class TokenizersBackend:
    """A tokenizer.json, read by the tokenizers library."""

    def __init__(self, path: Path):
        """Read the file."""
        self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.size: int = self.tokenizer.get_vocab_size(with_added_tokens=True)
        added = self.tokenizer.get_added_tokens_decoder()
        self.specials: dict[str, int] = {t.content: i for i, t in added.items() if t.special}
        self.plain_added_tokens: set[str] = set()

        # the post-processor adds BOS, which `Tokenizer` does, and trims spaces off the spans
        self.ids_of_empty_text: list[int] = self.tokenizer.encode("").ids
        self.tokenizer.post_processor = tokenizers.processors.Sequence([])

        # has every stretch after a special token a dummy space, or only the beginning of the text?
        self.ids_of_letter: list[int] = self.encode("a").ids
        self.one_dummy_space = False
        if self.specials:
            special = next(iter(self.specials))
            letter_after_special = self.encode(special + "a").ids[1:]
            self.one_dummy_space = letter_after_special != self.ids_of_letter

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token, or None if the vocabulary does not have it."""
        return self.tokenizer.token_to_id(token)

    def adds_bos(self, bos_id: int | None) -> bool:
        """Return whether the file's post-processor puts BOS before a text."""
        return self.ids_of_empty_text[:1] == [bos_id]

    def encode(self, text: str) -> Encoding:
        """Return the tokens of a text, without adding BOS or EOS."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return Encoding(encoding.ids, encoding.offsets)

    def decode(self, ids: list[int], begins_text: bool) -> str:
        """Return the text of ids; see `Backend.decode`."""
        if begins_text or not self.one_dummy_space:
            return self.tokenizer.decode(ids, skip_special_tokens=False)
        # the decoder leaves out a first space as the dummy one: put a letter before it
        return self.tokenizer.decode([*self.ids_of_letter, *ids], skip_special_tokens=False)[1:]
