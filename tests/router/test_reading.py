"""Chats on the short way, of which only the messages are read: it must not be told from the whole one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.errors import InvalidRequest
from router.protocol import read_json
from router.reading import MAX_KNOWN, MAX_KNOWN_BYTES, known, read_chat
from router.settings import ModelSettings
from serving.messages import Chat, Message, ToolCall
from tests.router.asking import HELLO, chat, parse
from tests.router.test_parameters import BOTH, ONLY_CHAT
from tests.router.test_protocol import nearly_chats

NAMED = [{**HELLO[0], "name": None}]
"""The same as HELLO, but for a field that says nothing: no request with it goes the short way."""

TABLE = [
    (name, value, parameter.beside)
    for name, parameter in (BOTH | ONLY_CHAT).items()
    if name not in {"model", "messages"}
    for value in [None, *(sent for sent, _ in parameter.good), *parameter.bad]
]
"""Every value of every parameter that is known to be good or bad, and what it needs beside it."""


def outcome(body: dict[str, Any], **settings: Any) -> tuple[type, Any]:
    """What a body asks for, with the types of its numbers, or how it is refused."""
    try:
        asked = parse(body, **settings)
    except InvalidRequest as error:
        return InvalidRequest, error.body()
    return Chat, repr(asked)


def test_a_parameter_means_the_same_on_either_way() -> None:
    """Whatever is sent beside a text, again and again and in any order, is taken as it is where nothing is
    remembered: 1 is neither 1.0 nor true, and what was refused once is refused in the same words."""
    for name, value, beside in TABLE + TABLE[::-1]:
        body = {"model": "m", **beside, name: value}
        expected = outcome(body | {"messages": NAMED})
        assert outcome(body | {"messages": HELLO}) == expected, (name, value)
        assert outcome(body | {"messages": HELLO}) == expected, (name, value)


@pytest.mark.parametrize("number", ["1e400", "-1e400", "1" * 40], ids=["huge", "very low", "long"])
@pytest.mark.parametrize("remembered", ["null", "0"])
def test_a_number_beyond_all_bounds_is_refused_also_beside_what_is_remembered(
    number: str, remembered: str
) -> None:
    """Such a number is not taken for any other, or for none."""
    body = b'{"model": "m", "messages": [{"role": "user", "content": "a"}], "temperature": %b}'
    assert outcome(read_json(body % remembered.encode()))[0] is Chat
    assert outcome(read_json(body % number.encode()))[0] is InvalidRequest


@settings(deadline=None)
@given(nearly_chats)
def test_a_body_is_read_the_same_twice(body: dict[str, Any]) -> None:
    """No body, however odd, is taken otherwise when its parameters are remembered."""
    first = outcome(body)
    outcome(body | {"messages": HELLO})
    assert outcome(body) == first


@given(
    st.lists(st.tuples(st.sampled_from(["system", "developer", "user", "assistant"]), st.text()), max_size=16)
)
def test_every_conversation_keeps_its_own_messages(said: list[tuple[str, str]]) -> None:
    """Only parameters are remembered: each request asks with its own messages, in their order."""
    body = {"model": "m", "messages": [{"role": role, "content": text} for role, text in said]}
    if said:
        assert [(message.role, message.content) for message in parse(body).messages] == said
    else:
        assert outcome(body)[0] is InvalidRequest


def test_nothing_of_a_message_is_lost_with_remembered_parameters() -> None:
    """What a message has beside a role and a text is read as well."""
    chat()
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    said = [
        {"role": "user", "content": "a", "name": "ada"},
        {"role": "assistant", "content": "b", "tool_calls": [call]},
        {"role": "tool", "content": "c", "tool_call_id": "c"},
        {"role": "user", "content": [{"type": "text", "text": "d"}, {"type": "text", "text": "e"}]},
    ]
    for before in ([], HELLO):
        assert parse({"model": "m", "messages": before + said}).messages[len(before) :] == (
            Message("user", "a", "ada"),
            Message("assistant", "b", tool_calls=(ToolCall("c", "f", "{}"),)),
            Message("tool", "c", tool_call_id="c"),
            Message("user", "d\ne"),
        )


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "a"},
        {"role": ["user"], "content": "a"},
        {"role": "nobody", "content": "a"},
        {"role": "user", "content": None},
        {"role": "user", "text": "a"},
        {"role": "user"},
        {"role": "user", "content": 5},
        {"content": "a", "name": "ada"},
        {"role": "user", "content": "a", "audio": {}},
        {"role": "user", "content": "a", "name": 5},
        "user",
        None,
    ],
)
def test_an_odd_message_is_refused_also_with_remembered_parameters(message: Any) -> None:
    """That its parameters are known to be good excuses no message, wherever it stands."""
    chat()
    for messages in ([message], [*HELLO, message], [message, *HELLO]):
        assert outcome({"model": "m", "messages": messages})[0] is InvalidRequest


def test_more_messages_than_a_model_takes_are_refused_also_with_remembered_parameters() -> None:
    """The limit is the model's."""
    assert outcome({"model": "m", "messages": HELLO * 16})[0] is Chat
    assert "at most 16" in outcome({"model": "m", "messages": HELLO * 17})[1].decode()


def test_settings_of_a_model_hold_for_its_own_requests() -> None:
    """The same body means something else to a model with other settings."""
    body = {"model": "m", "messages": HELLO, "repetition_penalty": 1.5}
    for _ in range(2):
        assert parse(body).sampling.repetition_penalty == 1.5
        assert parse(body, repetition_penalty="multiplicative").sampling.repetition_factor == 1.5
        assert parse(body, default_max_tokens=7).sampling.max_tokens == 7
        assert parse(body).role_in_every_chunk is False
        assert parse(body, stream_role="every").role_in_every_chunk is True


def test_a_seed_is_a_requests_own() -> None:
    """Requests that differ in nothing else have each their own seed, or none."""
    for seed in (7, 8, -(2**63), 2**63 - 1, None, 0, 7):
        assert chat(seed=seed).sampling.seed == seed
    assert chat().sampling.seed is None


FRESH: dict[str, Callable[[int], Any]] = {
    "seed": int,
    "user": str,
    "metadata": lambda number: {"run": number},
    "safety_identifier": str,
    "prompt_cache_key": str,
}
"""Fields of which clients send a new value each time, and such a value."""


@pytest.mark.parametrize("name", FRESH)
def test_what_is_another_each_time_is_not_remembered(name: str) -> None:
    """However many values of such a field come, the parameters beside it are one set."""
    known.clear()
    for number in range(2 * MAX_KNOWN):
        assert chat(max_tokens=9, **{name: FRESH[name](number)}).sampling.max_tokens == 9
    assert len(known) == 1


@pytest.mark.parametrize("missing", [{}, {"model": None}, {"model": ""}, {"model": 5}])
def test_a_request_names_a_model_also_with_remembered_parameters(missing: dict[str, Any]) -> None:
    """What the parameters mean hangs on no model, but without one there is no request."""
    own = ModelSettings(name="m")
    for body in ({"model": "m"}, {"model": "n"}, missing):
        data = {**body, "messages": HELLO}
        if body is missing:
            with pytest.raises(InvalidRequest):
                read_chat(data, own, "chatcmpl-key", "m", 0)
        else:
            assert read_chat(data, own, "chatcmpl-key", "m", 0).model == "m"


def test_what_is_used_is_not_forgotten() -> None:
    """Parameters that come again and again stay known, however many others come once."""
    known.clear()
    chat(max_tokens=9)
    (often,) = known
    for number in range(2 * MAX_KNOWN):
        chat(stop=str(number))
        chat(max_tokens=9)
        assert often in known
    assert len(known) == MAX_KNOWN


def test_what_is_remembered_is_bounded() -> None:
    """However many sets of parameters come, and however long they are, few and short ones are kept."""
    for number in range(2 * MAX_KNOWN):
        assert chat(stop=str(number)).sampling.stop == (str(number),)
    assert len(known) <= MAX_KNOWN
    long = tuple(letter * 1000 for letter in "abcd")
    assert chat(stop=[*long]).sampling.stop == long
    assert chat(user="u" * MAX_KNOWN_BYTES) == chat()
    assert all(len(written) <= MAX_KNOWN_BYTES for written, *_ in known)
