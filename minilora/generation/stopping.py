"""Decide when an answer ends, and which text a complete answer has."""

from collections.abc import Sequence
from typing import Literal

from minilora.data.tokenizer import Tokenizer
from minilora.generation.sampling import SamplingParams

FinishReason = Literal["stop", "length"]
"""Why an answer ended: with an end token or a stop string, or at the longest length allowed."""

REPLACEMENT = "\ufffd"  # what some of the bytes of a character decode to


class StopCriteria:
    """The conditions that end an answer, checked after each token.

    An answer ends with an end token, with the token that completes a stop string, or at
    `max_new_tokens`. To find stop strings, the last tokens of the answer are decoded, but only
    after a token that can complete one: decoding at every token would be slow.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams):
        """Collect the end tokens and stop strings of the settings and of the tokenizer."""
        self.tokenizer = tokenizer
        self.max_new_tokens = params.max_new_tokens
        self.stop_strings = params.stop_strings

        end_tokens = params.stop_token_ids
        if end_tokens is None:
            end_tokens = tokenizer.stop_ids()
        self.end_tokens = set(end_tokens)
        if tokenizer.eos_id is not None:
            self.end_tokens.add(tokenizer.eos_id)

        # how many tokens are decoded to find a stop string: one for each of its bytes, and 8 more
        # for tokens that decode to no text
        longest = max((len(string.encode()) for string in self.stop_strings), default=0)
        self.num_tail_tokens = longest + 8
        self._can_complete: dict[int, bool] = {}  # by token: whether a stop string can end in it
        # decoded after a letter, a token keeps the space that it begins with
        self._letter = tokenizer.encode("a").ids if self.stop_strings else []

    def finish_reason(self, prompt: Sequence[int], ids: Sequence[int]) -> FinishReason | None:
        """Return why an answer ends with its last token, or None if it goes on.

        Args:
            prompt: ids of the prompt.
            ids: ids of the answer so far, at least one.
        """
        if ids[-1] in self.end_tokens:
            return "stop"
        if self.stop_strings and self._completes_stop_string(prompt, ids):
            return "stop"
        if len(ids) >= self.max_new_tokens:
            return "length"
        return None

    def text(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """Return the text of a complete answer: without an end token, and up to a stop string.

        Args:
            prompt: ids of the prompt.
            ids: ids of the answer.
        """
        if ids[-1] in self.end_tokens:
            ids = ids[:-1]
        text = self.tokenizer.decode_after(prompt, ids)
        starts = [text.find(string) for string in self.stop_strings if string in text]
        return text[: min(starts, default=len(text))]

    def _completes_stop_string(self, prompt: Sequence[int], ids: Sequence[int]) -> bool:
        """Return whether the last token completes a stop string."""
        token = ids[-1]
        if token not in self._can_complete:
            self._can_complete[token] = self._contains_last_character(token)
        if not self._can_complete[token]:
            return False

        start = self.tokenizer.character_boundary_before(ids, len(ids) - self.num_tail_tokens)
        text = self.tokenizer.decode_after([*prompt, *ids[:start]], ids[start:])
        # a stop string in the text is new: an earlier one would have ended the answer
        return any(string in text for string in self.stop_strings)

    def _contains_last_character(self, token: int) -> bool:
        """Return whether a token may hold the last character of a stop string, or bytes of it."""
        text = self.tokenizer.decode_after(self._letter, [token])
        if not text or REPLACEMENT in text:
            return True
        return any(string[-1] in text for string in self.stop_strings)
