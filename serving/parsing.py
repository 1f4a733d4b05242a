"""What a parser makes of one choice, and what becomes of the choice where the parser fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import structlog

from serving.engine import Delta, FinishReason, Parsed, Parser, Prompt
from serving.messages import Chat, NamedTool

log = structlog.get_logger(__name__)

T = TypeVar("T")

NOTHING = Delta()


class Verbatim:
    """The parser of a model that says nothing but its text. `before`: text that its first delta begins
    with."""

    def __init__(self, before: str = "") -> None:
        self._before = before

    def delta(self, text: str, token_ids: Sequence[int], *, finished: bool) -> Delta | None:
        before, self._before = self._before, ""
        return Delta(content=before + text)

    def whole(self, text: str, token_ids: Sequence[int]) -> Parsed:
        return Parsed(text, None, ())

    def reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        return 0


class ParsedChoice:
    """One choice under its parser. A parser that fails costs the client no more than that it gets the text,
    from there on, as the model wrote it."""

    def __init__(self, request: Chat, prompt: Prompt) -> None:
        self.length = 0
        """Characters that were added."""
        self._completion = request.id
        self._new_parser: Callable[[], Parser] = prompt.parser or Verbatim
        self._parser = self._new_parser()
        self._parallel = request.parallel_tool_calls
        self._named = isinstance(request.tool_choice, NamedTool)
        self._called = False
        # Text of which no delta has shown anything.
        self._unseen: list[str] = []
        self._texts: list[str] = []
        self._contents: list[str] = []
        self._token_ids: list[int] = []

    def delta(self, text: str, token_ids: Sequence[int], *, finished: bool) -> Delta:
        """What this adds to the message; it may be nothing yet."""
        self._token_ids += token_ids
        self._texts.append(text)
        delta = self._ask(lambda parser: parser.delta(text, token_ids, finished=finished)) or NOTHING
        if any(delta):
            self._unseen.clear()
        else:
            self._unseen.append(text)
        if not self._parallel:
            delta = delta._replace(tool_calls=[call for call in delta.tool_calls if call.call == 0])
        self._called = self._called or bool(delta.tool_calls)
        self._contents.append(delta.content or "")
        if finished and not self._called:
            delta = delta._replace(content=(delta.content or "") + self._held_back() or None)
        return delta

    def add(self, text: str, token_ids: Sequence[int]) -> None:
        """Keep this for the message."""
        self.length += len(text)
        self._unseen.append(text)
        self._token_ids += token_ids

    def message(self) -> Parsed:
        """All that was added."""
        text = "".join(self._unseen)
        message = self._ask(lambda parser: parser.whole(text, self._token_ids))
        self._unseen.clear()
        if not self._parallel:
            message = message._replace(tool_calls=message.tool_calls[:1])
        self._called = bool(message.tool_calls)
        return message

    def reasoning_tokens(self) -> int:
        """How many of the tokens were reasoning."""
        return self._ask(lambda parser: parser.reasoning_tokens(self._token_ids))

    def finish_reason(self, reason: FinishReason) -> str:
        """How the choice has ended, as the client is told. A call that the client has named itself is no
        reason."""
        return "tool_calls" if reason == "stop" and self._called and not self._named else reason

    def _held_back(self) -> str:
        """What the whole message has in its content and no delta has shown: the beginning of a call, which a
        parser keeps to itself, may be all that there ever is of it."""
        if not self._unseen or isinstance(self._parser, Verbatim):
            return ""
        self._parser = self._new_parser()
        text, shown = "".join(self._texts), "".join(self._contents)
        content = self._ask(lambda parser: parser.whole(text, self._token_ids)).content or ""
        return content[len(shown) :] if content.startswith(shown) else ""

    def _ask(self, question: Callable[[Parser], T]) -> T:
        try:
            return question(self._parser)
        except Exception:
            log.exception("a parser failed, the text goes out as it is", completion=self._completion)
            self._parser = Verbatim("".join(self._unseen))
            return question(self._parser)
