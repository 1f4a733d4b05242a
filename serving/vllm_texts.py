"""What tokens say: most of them the same wherever they stand, so that they need not be decoded again.

Import this module only through `serving.engines`, which sets the environment first.
"""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import Tokenizer, decoders
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

_UNKNOWN = "\ufffd"
"""Stands in a text for bytes that are no character, or not a whole one yet."""


class Texts(dict[int, str]):
    """What each token of a byte-level tokenizer says: nothing if it is special, or a part of a character.

    Each is found when it is first asked for. All of a large vocabulary take some 10 MB.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._special = set(tokenizer.get_added_tokens_decoder())

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Texts | None:
        """Those of a tokenizer; None where what a token says may hang on the one before it."""
        return cls(tokenizer) if isinstance(tokenizer.decoder, decoders.ByteLevel) else None

    def __missing__(self, token: int) -> str:
        text = "" if token in self._special else self._tokenizer.decode([token], skip_special_tokens=False)
        self[token] = text = "" if _UNKNOWN in text else text
        return text


class Decoder:
    """Tells one answer's tokens as vLLM's detokenizer would, which it asks about those that it has to."""

    __slots__ = ("_detokenizer", "_make", "_texts", "_whole")

    def __init__(self, texts: Texts, make: Callable[[], FastIncrementalDetokenizer], *, whole: bool) -> None:
        """`make` makes the detokenizer, which has heard nothing of the answer yet. `whole`: the prompt ends
        with a whole character."""
        self._texts = texts
        self._make = make
        self._detokenizer: FastIncrementalDetokenizer | None = None
        # Whether all that was said does.
        self._whole = whole

    def decode_next(self, token: int) -> str:
        """What one more token adds to the answer's text."""
        if self._whole and (text := self._texts[token]):
            # The detokenizer need not hear of it: what it says next does not hang on whole characters before.
            return text
        if self._detokenizer is None:
            self._detokenizer = self._make()
        text = self._detokenizer.decode_next(token)
        # It says nothing until a character is whole.
        self._whole = bool(text)
        return text
