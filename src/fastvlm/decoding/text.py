"""A reply's text as its tokens come: whole characters only, and where a stop string ends it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import cast

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fastvlm.functional.errors import InputError

REPLACEMENT_CHARACTER = "\N{REPLACEMENT CHARACTER}"
"""The text that an incomplete character is decoded to."""


BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}
"""The bytes that letters stand for in the tokens of byte-level BPE."""


def token_bytes(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bytes:
    """Return the bytes of a token by itself, which may be part of a character."""
    text = cast("str", tokenizer.decode([token_id]))
    token = tokenizer.convert_ids_to_tokens(token_id)
    if REPLACEMENT_CHARACTER not in text or not isinstance(token, str):
        return text.encode()
    byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
    if byte is not None:  # as SentencePiece spells it
        return bytes.fromhex(byte[1])
    if all(letter in BYTES for letter in token):
        return bytes(BYTES[letter] for letter in token)
    return text.encode()


class ReplyText:
    """Decodes a reply token by token, each with a few others, however long the reply is.

    Args:
        tokenizer: The model's tokenizer.
        stop: Strings that end the reply. They are not part of its text.
        min_tokens: Those that end within the first so many tokens don't end it.

    Raises:
        InputError: A stop string is empty.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), min_tokens: int = 0
    ) -> None:
        if any(not string for string in stop):
            raise InputError("A stop string has at least one character.")
        self.tokenizer, self.stop, self.min_tokens = tokenizer, tuple(stop), min_tokens
        self.whole = ""
        self.token_ids: list[int] = []
        self.stopped = self.ended = False
        # A token's text depends on the one before it, so the last ones whose text is known are
        # decoded once more with the new one: those from `_before` on are decoded, of which the
        # text of those up to `_known` has been taken.
        self._before = self._known = 0

    def follow(self, reply: Sequence[int]) -> bool:
        """Decode the new tokens of a reply; return whether a stop string has ended it."""
        for token in reply[len(self.token_ids) :]:
            self.token_ids.append(token)
            text = self._decode(self.token_ids[self._before :])
            if not text.endswith(REPLACEMENT_CHARACTER):
                self._take(text)
        return self.stopped

    def end(self) -> None:
        """Add the text that was held back, as no other token will follow."""
        self._take(self._decode(self.token_ids[self._before :]))
        self.ended = True

    @property
    def final(self) -> str:
        """The text that no later token can change; what may begin a stop string is held back."""
        if self.stopped or self.ended or not self.stop:
            return self.whole
        longest = max(len(string) for string in self.stop)
        for size in range(min(longest - 1, len(self.whole)), 0, -1):
            if any(string.startswith(self.whole[-size:]) for string in self.stop):
                return self.whole[:-size]
        return self.whole

    def _take(self, text: str) -> None:
        taken = self._decode(self.token_ids[self._before : self._known])
        added = text[len(taken) :]
        self._before, self._known = self._known, len(self.token_ids)
        if self.stopped:
            return
        known = len(self.whole)
        self.whole += added
        if len(self.token_ids) <= self.min_tokens:
            return
        # A stop string ends in the new text, so it began at most its own length before.
        found = [self.whole.find(one, max(0, known + 1 - len(one))) for one in self.stop]
        if any(place >= 0 for place in found):
            self.stopped = True
            self.whole = self.whole[: min(place for place in found if place >= 0)]

    def _decode(self, tokens: list[int]) -> str:
        # One list of tokens is decoded to one string; the stubs don't tell it from a list of them.
        return cast(str, self.tokenizer.decode(tokens, skip_special_tokens=True))
