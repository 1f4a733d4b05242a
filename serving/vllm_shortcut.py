"""A shorter way from a plain conversation to its tokens, to the same ones as vLLM's renderer finds.

vLLM renders in threads, through objects that are made for pictures, tools and batches. Most conversations are
short and plain: for them the template and the tokenizer are called where the request arrives, and what was
said before, such as a system prompt or the turns so far, is not tokenized again.

Import this module only through `serving.engines`, which sets the environment first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from tokenizers import Tokenizer
from transformers import TokenizersBackend
from transformers.utils.chat_template_utils import _compile_jinja_template
from vllm.config import ModelConfig
from vllm.renderers import BaseRenderer
from vllm.renderers.hf import resolve_chat_template, resolve_chat_template_content_format

from serving.messages import Message
from serving.words import Words, whole

LONGEST = 4096
"""Bytes of a conversation that goes this way: some ms of the event loop's time at worst. A thread's switches
cost 0.2 ms, and more where several threads want the interpreter."""

MESSAGE = 32
"""Bytes that a message counts for beside its content: it takes the template as long."""

ROLES = {"system", "user", "assistant"}
"""Those that a template is given as they are."""

KEPT_PIECES = 1024
"""Pieces of text whose tokens are kept; of 4,096 characters, they take 10 MB."""

MOST_MARKS = 64
"""Marks that a text is cut at. They are looked for one after another."""

_PROBE = ("a b", " c", "d\n", "\n\ne  f ", "1 2")
_LONG_PROBE = " ".join(_PROBE) * 1000


class Shortcut:
    """Renders plain conversations of one model."""

    def __init__(self, template: str, tokenizer: TokenizersBackend) -> None:
        self._render = renderer_of(template)
        # What vLLM's renderer tells a template of every plain conversation.
        self._always = {
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **tokenizer.special_tokens_map,
        }
        # Without what transformers lays around it, most of which is for batches.
        backend: Any = tokenizer._tokenizer  # noqa: SLF001 - as vLLM's detokenizer takes it
        self._encode = Pieces.encoder(backend)

    @classmethod
    def of(cls, model: ModelConfig, renderer: BaseRenderer[Any]) -> Shortcut | None:
        """That of a model; None where its conversations need more than a template and a fast tokenizer."""
        tokenizer = renderer.tokenizer
        plain = renderer.default_chat_tok_params
        if not isinstance(tokenizer, TokenizersBackend) or plain.do_lower_case or plain.add_special_tokens:
            return None
        if not _is_nothing_else(tokenizer):
            return None
        template = resolve_chat_template(tokenizer, None, None, model_config=model)
        form = resolve_chat_template_content_format(None, None, "auto", tokenizer, model_config=model)
        return cls(template, tokenizer) if template is not None and form == "string" else None

    def render(self, messages: Sequence[Message]) -> tuple[str, list[int]] | None:
        """The prompt's text and its tokens; None where vLLM's renderer is to be asked."""
        size = sum(MESSAGE + len((message.content or "").encode()) for message in messages)
        if size > LONGEST or not all(message.role in ROLES for message in messages):
            return None
        try:
            text = self._render(self._always, messages=[said(message) for message in messages])
        except Exception:  # noqa: BLE001 - a template raises what it likes, and vLLM's renderer says it in words
            return None
        return text, self._encode(text)


def renderer_of(template: str) -> Callable[..., str]:
    """What renders a chat template as transformers does.

    As it comes, a template gathers its environment's names and its own for each conversation; here that is
    done.
    """
    compiled: Any = _compile_jinja_template(template)
    own = compiled.environment.from_string(template)
    own.globals = dict(own.globals)
    render: Callable[..., str] = own.render
    return render


def _is_nothing_else(tokenizer: TokenizersBackend) -> bool:
    """Whether what is laid around a tokenizer does nothing to a text, and it has been told to cut none."""
    backend: Any = tokenizer._tokenizer  # noqa: SLF001 - as vLLM's detokenizer takes it
    if backend.truncation is not None or backend.padding is not None:
        return False
    theirs: Any = tokenizer(_LONG_PROBE, add_special_tokens=False)
    return bool(theirs["input_ids"] == backend.encode(_LONG_PROBE, add_special_tokens=False).ids)


class Pieces:
    """Tokens of texts in which special tokens stand, piece by piece.

    A tokenizer cuts a text at its special tokens first, and each piece by itself after that: so a piece has
    the same tokens in every text.
    """

    def __init__(self, tokenizer: Tokenizer, marks: Mapping[str, int]) -> None:
        longest_first = sorted(marks, key=len, reverse=True)
        self._marks = marks
        self._tokenizer = tokenizer
        self._words = Words.of(tokenizer)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")").split
        self._piece = lru_cache(KEPT_PIECES)(self._tokens)

    @classmethod
    def encoder(cls, tokenizer: Tokenizer) -> Any:
        """What makes tokens (a list of ids) of a text: by pieces, if the tokenizer shows that it can be."""
        alone = partial(whole, tokenizer)
        added = tokenizer.get_added_tokens_decoder()
        marks = {token.content: number for number, token in added.items() if not token.normalized}
        if not 0 < len(marks) <= MOST_MARKS:
            return alone
        pieces = cls(tokenizer, marks)
        probes = [mark.join(_PROBE) for mark in marks]
        return pieces.encode if all(pieces.encode(probe) == alone(probe) for probe in probes) else alone

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        tokens: list[int] = []
        for piece in self._split(text):
            mark = self._marks.get(piece)
            if mark is not None:
                tokens.append(mark)
            elif piece:
                tokens += self._piece(piece)
        return tokens

    def _tokens(self, piece: str) -> list[int]:
        if self._words is not None and piece.isascii():
            return self._words.tokens(piece)
        return whole(self._tokenizer, piece)


def said(message: Message) -> dict[str, str]:
    """A plain message as chat templates take it."""
    said = {"role": message.role, "content": message.content or ""}
    return said if message.name is None else said | {"name": message.name}
