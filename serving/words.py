"""Tokens of plain texts, word by word.

A byte-level tokenizer cuts a text into words by an expression and makes tokens of each word by itself, so
that a word has the same tokens in every text. Most words of a conversation have been seen before: to look
them up takes a third of the time of going through the text again.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

KEPT_WORDS = 16384
LONGEST_KEPT = 32
"""Words whose tokens are kept, and how many characters they may have; all of them take 8 MB."""

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How a byte-level tokenizer cuts where it is not told otherwise."""

_ENDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

EXPRESSIONS = {
    # Llama 3 and those that follow it, Qwen 2 and 3, Qwen 3.5, gpt-oss.
    rf"{_ENDS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BLANKS}",
    rf"{_ENDS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BLANKS}",
    (
        rf"{_ENDS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_BLANKS}"
    ),
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDS}?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}"
    ),
}
"""How others are told to. Any other expression may mean something else to Python than to the tokenizer."""

COMPOSED = (normalizers.NFC, normalizers.NFD, normalizers.NFKC, normalizers.NFKD)
"""What leaves a text in ASCII as it is."""

ASCII = "".join(map(chr, range(128)))


class Words:
    """Tokens of texts in ASCII: there a letter is the same to every engine for expressions."""

    def __init__(self, model: models.Model, expression: str) -> None:
        written = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        # The character that a byte is written as, which for most of them is the byte's own.
        as_written = {ord(c): written.pre_tokenize_str(c)[0][0] for c in ASCII}
        self._split: Callable[[str], list[str]] = re.compile(_in_ascii(expression), re.ASCII).findall

        def made(word: str) -> list[int]:
            return [token.id for token in model.tokenize(word.translate(as_written))]

        self._made = made
        self._kept = lru_cache(KEPT_WORDS)(made)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Words | None:
        """Those of a tokenizer; None where words alone do not say its tokens."""
        expression = _expression(tokenizer)
        if expression is None:
            return None
        words = cls(tokenizer.model, expression)
        probes = [f"{c}a{c}b {c}1{c}{c} {c}\n{c}'{c}" for c in ASCII]
        return words if all(words.tokens(probe) == whole(tokenizer, probe) for probe in probes) else None

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text in ASCII."""
        tokens: list[int] = []
        for word in self._split(text):
            tokens += self._kept(word) if len(word) <= LONGEST_KEPT else self._made(word)
        return tokens


def _in_ascii(expression: str) -> str:
    """The same expression with the characters themselves in the place of their properties, which Python's
    engine does not know."""
    written = []
    within = False  # a set
    for part in re.findall(r"\\p\{\w+\}|\\.|.", expression):
        if part.startswith(r"\p{"):
            found = "".join(c for c in ASCII if unicodedata.category(c).startswith(part[3:-1]))
            written.append(found if within else f"[{found}]")
        else:
            within = part == "[" or (within and part != "]")
            written.append(part)
    return "".join(written)


def _expression(tokenizer: Tokenizer) -> str | None:
    """What cuts a text into words, if nothing else is done to an ASCII text before the model has it."""
    model, normalizer = tokenizer.model, tokenizer.normalizer
    if not isinstance(model, models.BPE) or model.dropout or tokenizer.pre_tokenizer is None:
        return None
    if normalizer is not None and not isinstance(normalizer, COMPOSED):
        return None
    if any(token.normalized for token in tokenizer.get_added_tokens_decoder().values()):
        return None  # they are looked for within words
    match _told(tokenizer.pre_tokenizer):
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return GPT2
        case {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": str(expression)},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        } if expression in EXPRESSIONS:
            return expression
    return None


def _told(pre_tokenizer: Any) -> Any:
    """A pre-tokenizer as its file has it."""
    return json.loads(pre_tokenizer.__getstate__())


def whole(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens that a tokenizer makes of a text by itself."""
    return tokenizer.encode(text, add_special_tokens=False).ids
