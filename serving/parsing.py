"""What a parser makes of one choice, and what becomes of the choice where the parser fails.

Whole or streamed, a message is what the deltas of its tokens add up to: so it is the same, also where a call
is broken or cut off.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import structlog
from msgspec.structs import astuple

from serving.engine import Delta, FinishReason, Parsed, Parser, Prompt, ToolCallDelta
from serving.messages import Chat, NamedTool, ToolCall

log = structlog.get_logger(__name__)

T = TypeVar("T")

NOTHING = Delta()

Spelled = tuple[str, Sequence[int]]
"""A text and the tokens that spell it."""


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


class Spelling:
    """Brings each token together with its text, which comes later than the token where it may be part of a
    stop string, and with that of others where several come at once."""

    def __init__(self, decode: Callable[[int], str]) -> None:
        """`decode` tells of each token in turn what it adds to the text."""
        self._decode = decode
        self._waiting: deque[tuple[int, int]] = deque()
        """Tokens whose text has not come, and its length."""
        self._text = ""
        """What has come of the text of the first of them."""

    def spelled(self, text: str, token_ids: Sequence[int], *, finished: bool) -> Iterator[Spelled]:
        """What is complete with this, token by token. `finished`: nothing follows."""
        self._waiting.extend((token, len(self._decode(token))) for token in token_ids)
        self._text += text
        while self._waiting and self._waiting[0][1] <= len(self._text):
            token, length = self._waiting.popleft()
            said, self._text = self._text[:length], self._text[length:]
            yield said, (token,)
        # What is left then are the tokens of a stop string, which may begin within the first of them; or the
        # one that ended the answer, of which there never is a text.
        if finished and (self._text or len(self._waiting) == 1):
            yield self._text, [token for token, _ in islice(self._waiting, 1)]


class ParsedChoice:
    """One choice under its parser. A parser that fails costs the client no more than that it gets the text,
    from there on, as the model wrote it."""

    def __init__(self, request: Chat, prompt: Prompt) -> None:
        self.length = 0
        """Characters that were added."""
        self._completion = request.id
        self._new_parser: Callable[[], Parser] = prompt.parser or Verbatim
        self._parser = self._new_parser()
        self._spelling = Spelling(prompt.decoder()) if prompt.decoder else None
        self._parallel = request.parallel_tool_calls
        self._named = isinstance(request.tool_choice, NamedTool)
        # Text of which no delta has shown anything.
        self._unseen: list[str] = []
        self._texts: list[str] = []
        self._spelled_by: list[int] = []
        self._token_ids: list[int] = []
        # What the deltas have shown.
        self._contents: list[str] = []
        self._reasonings: list[str] = []
        self._calls: dict[int, list[ToolCallDelta]] = {}

    def delta(self, text: str, token_ids: Sequence[int], *, finished: bool) -> Delta:
        """What this adds to the message; it may be nothing yet."""
        self.length += len(text)
        self._token_ids += token_ids
        delta = NOTHING
        pieces = self._pieces(text, token_ids, finished=finished)
        for number, (piece, tokens) in enumerate(pieces, 1):
            ends = finished and number == len(pieces)
            delta = _joined(delta, self._piece(piece, tokens, finished=ends))
        return delta

    def message(self) -> Parsed:
        """All that was added."""
        content, reasoning = "".join(self._contents), "".join(self._reasonings)
        return Parsed(content or None, reasoning or None, list(map(_call, self._calls.values())))

    def reasoning_tokens(self) -> int:
        """How many of the tokens were reasoning."""
        return self._ask(lambda parser: parser.reasoning_tokens(self._token_ids))

    def finish_reason(self, reason: FinishReason) -> str:
        """How the choice has ended, as the client is told. A call that the client has named itself is no
        reason."""
        return "tool_calls" if reason == "stop" and self._calls and not self._named else reason

    def _pieces(self, text: str, token_ids: Sequence[int], *, finished: bool) -> list[Spelled]:
        """What the parser is to be told: at the end at least that it is the end."""
        if self._spelling is None:
            return [(text, token_ids)]
        pieces = list(self._spelling.spelled(text, token_ids, finished=finished))
        return pieces or [("", ())] if finished else pieces

    def _piece(self, text: str, token_ids: Sequence[int], *, finished: bool) -> Delta:
        """What a text adds that these tokens spell."""
        self._texts.append(text)
        self._spelled_by += token_ids
        delta = self._ask(lambda parser: parser.delta(text, token_ids, finished=finished)) or NOTHING
        if any(delta):
            self._unseen.clear()
        elif text:
            self._unseen.append(text)
        delta = self._shown(delta)
        if finished and self._unseen and not self._calls:
            delta = _joined(delta, self._shown(self._held_back()))
        return delta

    def _shown(self, delta: Delta) -> Delta:
        """What the client is shown of it, which is kept."""
        if not self._parallel:
            delta = delta._replace(tool_calls=[call for call in delta.tool_calls if call.call == 0])
        self._contents.append(delta.content or "")
        self._reasonings.append(delta.reasoning or "")
        for call in delta.tool_calls:
            self._calls.setdefault(call.call, []).append(call)
        return delta

    def _held_back(self) -> Delta:
        """What the whole message has and no delta has shown: the beginning of a call, which a parser keeps to
        itself, may be all that there ever is of it; and there are parsers that find a call in nothing but a
        whole text."""
        if isinstance(self._parser, Verbatim):
            return NOTHING
        self._parser = self._new_parser()
        text = "".join(self._texts)
        message = self._ask(lambda parser: parser.whole(text, self._spelled_by))
        if isinstance(self._parser, Verbatim):
            return Delta(content="".join(self._unseen))
        return Delta(
            _beyond("".join(self._contents), message.content),
            _beyond("".join(self._reasonings), message.reasoning),
            [ToolCallDelta(number, *call) for number, call in enumerate(map(astuple, message.tool_calls))],
        )

    def _ask(self, question: Callable[[Parser], T]) -> T:
        try:
            return question(self._parser)
        except Exception:
            log.exception("a parser failed, the text goes out as it is", completion=self._completion)
            self._parser = Verbatim("".join(self._unseen))
            return question(self._parser)


def _joined(first: Delta, second: Delta) -> Delta:
    """One delta that says what two say, one after the other."""
    if not any(first) or not any(second):
        return first if any(first) else second
    calls = list(first.tool_calls)
    for call in second.tool_calls:
        if calls and calls[-1].call == call.call:
            calls[-1] = calls[-1]._replace(arguments=calls[-1].arguments + call.arguments)
        else:
            calls.append(call)
    content, reasoning = (
        f"{one or ''}{other or ''}" for one, other in zip(first[:2], second[:2], strict=True)
    )
    return Delta(content or None, reasoning or None, calls)


def _beyond(shown: str, whole: str | None) -> str | None:
    """What follows in a whole text on what was shown of it."""
    return whole[len(shown) :] or None if whole is not None and whole.startswith(shown) else None


def _call(deltas: Sequence[ToolCallDelta]) -> ToolCall:
    """The call that these add up to."""
    first = deltas[0]
    return ToolCall(first.id or "", first.name or "", "".join(delta.arguments for delta in deltas))
