"""What is told of a provider's refusal, and what never is."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from router.provider_errors import LEAST_PART, LONGEST_MESSAGE, REFUSAL_BYTES, provider_error, scrubbed

KEY = "sk-proj-AbCdEf0123456789xyz"

keys = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=80)
spans = st.tuples(st.integers(0, 80), st.integers(0, 80))


@given(keys, st.lists(st.text(max_size=12) | spans, max_size=8))
def test_no_part_of_a_key_that_says_much_is_left(key: str, pieces: list[str | tuple[int, int]]) -> None:
    """Whatever surrounds them, parts of the key of six characters and more are gone, as is a shorter key."""
    text = "".join(piece if isinstance(piece, str) else key[slice(*piece)] for piece in pieces)
    left = scrubbed(text, SecretStr(key))
    size = min(LEAST_PART, len(key))
    told = {key[at : at + size] for at in range(len(key) - size + 1)} - {"*" * size}
    assert not any(part in left for part in told)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("the model is busy", "the model is busy"),
        (f"bad key {KEY}.", "bad key ***"),
        ("bad key: sk-proj-*****wxyz, see the docs", "bad key: *** see the docs"),
        ("bad key 'sk-p***xyz'", "bad key '***'"),
        ("*this* and **that**", "*this* and **that**"),
    ],
)
def test_words_that_hide_a_key_go_as_a_whole(text: str, left: str) -> None:
    """A word with a part of the key in it, or which somebody has half masked, is not told; others stay."""
    assert scrubbed(text, SecretStr(KEY)) == left


@pytest.mark.parametrize(
    ("body", "message", "code"),
    [
        ({"error": {"message": "busy", "code": "rate_limit"}}, "busy", "rate_limit"),
        ({"error": {"message": "busy", "code": 429}}, "busy", "upstream_error"),
        ({"error": {"message": "busy", "code": "two words"}}, "busy", "upstream_error"),
        ({"error": "busy"}, "busy", "upstream_error"),
        ({"object": "error", "message": "busy"}, "busy", "upstream_error"),
        ("busy", "busy", "upstream_error"),
        ({"detail": "busy"}, "busy", "upstream_error"),
        ({"detail": "busy", "message": "far too busy", "code": "rate_limit"}, "far too busy", "rate_limit"),
        (
            {"detail": [{"loc": ["body", "messages", 0], "msg": "too long", "type": "x", "input": {}}]},
            "body.messages.0: too long",
            "upstream_error",
        ),
        ({"detail": [{"loc": ["a"], "msg": "b"}, {"msg": "c"}]}, "a: b; c", "upstream_error"),
        (
            {"detail": [{"loc": ["body", KEY], "msg": f"no {KEY}"}]},
            "*** no ***",
            "upstream_error",
        ),
        ({"detail": [{"loc": 7, "msg": "b"}]}, "the provider answered with status 429", "upstream_error"),
        ({"detail": []}, "the provider answered with status 429", "upstream_error"),
        ({"error": {"message": "busy", "code": KEY}}, "busy", "upstream_error"),
        ({"error": {"message": "busy", "code": "x" * 101}}, "busy", "upstream_error"),
        ({"error": {"message": " "}}, "the provider answered with status 429", "upstream_error"),
        ({"error": {"message": ["busy"]}}, "the provider answered with status 429", "upstream_error"),
        ({"error": None}, "the provider answered with status 429", "upstream_error"),
        ([1], "the provider answered with status 429", "upstream_error"),
        (None, "the provider answered with status 429", "upstream_error"),
    ],
)
def test_the_providers_words_are_found(body: object, message: str, code: str) -> None:
    """Providers give their errors in several shapes; where there are no words, the status has to do."""
    error = provider_error(429, json.dumps(body).encode(), SecretStr(KEY))
    assert (error.message, error.code, error.type) == (message, code, "rate_limit_error")


def test_a_long_message_is_cut() -> None:
    """A message has a largest length."""
    body = json.dumps({"error": {"message": "word " * 9000}}).encode()
    assert len(provider_error(500, body, SecretStr(KEY)).message) == LONGEST_MESSAGE


@pytest.mark.parametrize("over", [0, 1])
def test_an_immense_refusal_is_not_looked_at(over: int) -> None:
    """A refusal is read up to a largest size; of a longer one only the status is told."""
    body = b'{"error": {"message": "busy", "code": "%b"}}'
    body %= b"x" * (REFUSAL_BYTES + over - len(body % b""))
    message = "the provider answered with status 500" if over else "busy"
    assert len(body) == REFUSAL_BYTES + over
    assert provider_error(500, body, SecretStr(KEY)).message == message
