from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from router.errors import InvalidRequest
from router.unserved import UNSERVED_IN_CHAT, UNSERVED_IN_MESSAGES, UNSERVED_IN_TEXT
from serving.messages import Request
from tests.router.asking import HELLO, chat, text

WITH_EFFECT: dict[str, Any] = {
    "use_beam_search": True,
    "structured_outputs": {"regex": "a"},
    "guided_json": {},
    "guided_regex": "a",
    "guided_choice": ["a", "b"],
    "guided_grammar": "root ::= a",
    "allowed_token_ids": [1],
    "bad_words": ["a"],
    "prompt_logprobs": 0,
    "truncate_prompt_tokens": 5,
    "skip_special_tokens": False,
    "include_stop_str_in_output": True,
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy", "format": "wav"},
    "web_search_options": {},
    "verbosity": "low",
    "include_reasoning": False,
    "echo": True,
    "add_generation_prompt": False,
    "continue_final_message": True,
    "chat_template": "{{ messages }}",
    "documents": [{"text": "a"}],
    "suffix": "the end",
    "max_completion_tokens": 5,
    "response_format": {"type": "json_object"},
    "prompt_embeds": "AAAA",
}
IN_MESSAGES_WITH_EFFECT: dict[str, Any] = {
    "function_call": {"name": "f", "arguments": "{}"},
    "audio": {"id": "audio_1"},
    "refusal": "I cannot.",
}
WRONG_TYPE = [("use_beam_search", 0), ("functions", {}), ("echo", 0), ("suffix", [])]

Ask = Callable[[Any], Request]


def in_chat(name: str) -> Ask:
    """A chat that gives a value to a parameter."""
    return lambda value: chat(**{name: value})


def in_a_message(name: str) -> Ask:
    """A chat whose second message gives a value to a field."""
    said = {"role": "assistant", "content": "hello"}
    return lambda value: chat(messages=[HELLO[0], said | {name: value}])


def in_text(name: str) -> Ask:
    """A text completion that gives a value to a parameter."""
    return lambda value: text(**{name: value})


UNSERVED: list[tuple[str, Ask, Any, tuple[Any, ...]]] = [
    *((name, in_chat(name), WITH_EFFECT[name], neutral) for name, neutral in UNSERVED_IN_CHAT.items()),
    *((name, in_text(name), WITH_EFFECT[name], neutral) for name, neutral in UNSERVED_IN_TEXT.items()),
    *(
        (f"messages[1].{name}", in_a_message(name), IN_MESSAGES_WITH_EFFECT[name], neutral)
        for name, neutral in UNSERVED_IN_MESSAGES.items()
    ),
]
"""Each parameter, how it is asked for, a value that would change the answer, and those that would not."""


@pytest.mark.parametrize(("param", "ask", "value", "neutral"), UNSERVED)
def test_what_would_change_the_answer_and_is_not_served_is_refused(
    param: str, ask: Ask, value: Any, neutral: tuple[Any, ...]
) -> None:
    """It is never ignored in silence: the refusal names it and says what it may be. Clients that always send
    null, or what changes nothing, are not turned away."""
    with pytest.raises(InvalidRequest) as caught:
        ask(value)
    error = caught.value
    assert (error.param, error.code) == (param, "unsupported_parameter")
    assert error.message.startswith(f"{param} is not supported: it must be left out or null")
    assert all(ask(each) == ask(None) for each in neutral)


@pytest.mark.parametrize(("name", "value"), WRONG_TYPE)
def test_a_neutral_value_has_its_own_type(name: str, value: Any) -> None:
    """0 is not false and an object is no array, for unserved parameters too."""
    with pytest.raises(InvalidRequest, match=f"{name} is not supported"):
        (in_text if name == "suffix" else in_chat)(name)(value)
