from __future__ import annotations

import json
from typing import Any

import pytest

from router.errors import InvalidRequest
from router.protocol import MAX_TOKEN_ID
from serving.messages import Sampling, Text
from tests.router.asking import chat, parse_as_text, text, text_refused

A_PROMPT = (
    "a string or an array of 1 to 128 strings or a non-empty array of token ids or an array of 1 to 128"
    " non-empty arrays of token ids"
)
NO_PROMPTS: list[Any] = [None, 5, True, {}, [], [None], [True], [1.5], [{}]]
AN_ID = "an integer from 0 to 2147483647"
AN_ID_LIST = f"a non-empty array, each item {AN_ID}"

# ---- prompts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("hello", ("hello",)),
        ("", ("",)),
        (" a\u0000b\n é😀\u2028", (" a\u0000b\n é😀\u2028",)),
        (["one", "two", ""], ("one", "two", "")),
        ([0, 5, MAX_TOKEN_ID], ((0, 5, MAX_TOKEN_ID),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
    ],
)
def test_a_prompt_is_text_or_token_ids_or_several_of_either(prompt: Any, prompts: Any) -> None:
    """Each of the four forms reaches the replica as a row of prompts, unchanged and in order; a row of
    numbers is one prompt. A prompt without text is one too."""
    assert text(prompt=prompt).prompts == prompts


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        *((each, f"prompt must be {A_PROMPT}, not {json.dumps(each)}") for each in NO_PROMPTS),
        (["a", 5], "prompt[1] must be a string, not 5"),
        (["a", [1]], "prompt[1] must be a string, not [1]"),
        ([1, "a"], f'prompt[1] must be {AN_ID}, not "a"'),
        ([1, True], f"prompt[1] must be {AN_ID}, not true"),
        ([-1], f"prompt[0] must be {AN_ID}, not -1"),
        ([1, 2, MAX_TOKEN_ID + 1], f"prompt[2] must be {AN_ID}, not 2147483648"),
        ([[]], f"prompt[0] must be {AN_ID_LIST}, not []"),
        ([[1], "a"], f'prompt[1] must be {AN_ID_LIST}, not "a"'),
        ([[1], [2, -1]], f"prompt[1][1] must be {AN_ID}, not -1"),
        ([[1], [[2]]], f"prompt[1][0] must be {AN_ID}, not [2]"),
    ],
)
def test_a_wrong_prompt_is_held_against_the_form_that_it_began(prompt: Any, message: str) -> None:
    """The first item of an array tells what the others must be; the refusal names the first that is not."""
    error = text_refused(prompt=prompt)
    assert error.message == message
    assert message.startswith(f"{error.param} ")


def test_a_prompt_is_required() -> None:
    """There is no default; null is none either, and another endpoint's messages are no prompt."""
    for body in ({"model": "m"}, {"model": "m", "messages": [{"role": "user", "content": "a"}]}):
        with pytest.raises(InvalidRequest) as caught:
            parse_as_text(body)
        error = caught.value
        assert (error.param, error.code) == ("prompt", "missing_required_parameter")
        assert error.message == f"prompt is missing: it must be {A_PROMPT}"


def test_a_hundred_thousand_bad_items_are_one_refusal() -> None:
    """Reading ends at the first item that is wrong, and the refusal shows but the beginning."""
    for prompt in (["a"] * 100_000, [-1] * 100_000, [["a"]] * 100_000):
        assert len(text_refused(prompt=prompt).message) < 200


@pytest.mark.parametrize(
    ("prompt", "n", "sequences"),
    [("a", 1, 1), ("a", 3, 3), (["a", "b"], 3, 6), ([1, 2, 3], 2, 2), ([[1, 2], [3], [4]], 2, 6)],
)
def test_each_choice_of_each_prompt_takes_a_slot(prompt: Any, n: int, sequences: int) -> None:
    """What a router counts as in flight is what an engine has to batch."""
    assert text(prompt=prompt, n=n).sequences == sequences


# ---- parameters, beside what the table in test_parameters.py says of each -----------------------------


def test_max_tokens_is_the_endpoints_own() -> None:
    """Its default is 16 whatever the deployment's default for chats is, 0 asks for no token, and the chat's
    newer name for it is not ignored: an answer of 16 tokens would look like one that was complete."""
    assert parse_as_text({"model": "m", "prompt": "a"}, default_max_tokens=512).sampling.max_tokens == 16
    assert text(max_tokens=0).sampling.max_tokens == 0
    assert text(max_tokens=0, echo=True).echo
    assert text(max_completion_tokens=None) == text()
    error = text_refused(max_completion_tokens=5)
    assert (error.param, error.code) == ("max_completion_tokens", "unsupported_parameter")


def test_min_tokens_may_not_pass_max_tokens() -> None:
    """More tokens at least than at most is refused, the default limit and none at all included."""
    assert text(min_tokens=16).sampling.min_tokens == 16
    assert text_refused(min_tokens=17).message == (
        "min_tokens must be at most max_tokens, which is 16, not 17"
    )
    assert text_refused(max_tokens=0, min_tokens=1).param == "min_tokens"


def test_stream_options_need_a_stream() -> None:
    """Options of a stream that was not asked for are refused, as OpenAI does."""
    assert text_refused(stream_options={"include_usage": True}).param == "stream_options"
    assert text(stream=True, stream_options={"include_usage": True}).include_usage


def test_the_best_of_more_is_not_chosen() -> None:
    """best_of is good where it changes nothing, which is where it is n, and says so elsewhere."""
    assert text(best_of=1) == text(best_of=None) == text()
    assert text(best_of=3, n=3) == text(n=3)
    for best_of, n in ((2, 1), (1, 2), (0, 1), (10**4000, 1)):
        error = text_refused(best_of=best_of, n=n)
        assert (error.param, error.code) == ("best_of", "unsupported_parameter")
        assert error.message.startswith(f"best_of must equal n, which is {n}, not ")
        assert len(error.message) < 200


def test_a_suffix_is_refused_in_plain_words() -> None:
    """No model here fills in a middle; clients that always send an empty one are not turned away."""
    assert text(suffix="") == text(suffix=None) == text()
    assert text_refused(suffix="the end").message == (
        'suffix is not supported: it must be left out or null or "", not "the end"'
    )


def test_logprobs_are_a_number() -> None:
    """As on OpenAI's older endpoint; the chat's boolean is of another type."""
    assert (text().logprobs, text(logprobs=0).logprobs, text(logprobs=5).logprobs) == (None, 0, 5)
    assert text_refused(logprobs=True).message == "logprobs must be an integer from 0 to 5, not true"


def test_a_deployment_may_have_the_multiplicative_repetition_penalty() -> None:
    """There it means the same as for a chat."""
    body = {"model": "m", "prompt": "a", "repetition_penalty": 1.5}
    sampling = parse_as_text(body, repetition_penalty="multiplicative").sampling
    assert (sampling.repetition_penalty, sampling.repetition_factor) == (0.0, 1.5)


def test_what_nobody_knows_is_ignored() -> None:
    """What is a chat's alone is nobody's here, if it would not change the answer."""
    assert text(metadata={"a": 1}, tools=[], messages=[], store=True, repetition_factor=2) == text()


def test_sampling_is_a_chats() -> None:
    """What both endpoints have means the same at both."""
    same = {
        "temperature": 0.5,
        "top_p": 0,
        "frequency_penalty": 1,
        "repetition_penalty": -1,
        "presence_penalty": 0.5,
        "logit_bias": {"5": -100},
        "n": 2,
        "seed": -1,
        "stop": ["a", "b"],
        "top_k": -1,
        "min_p": 0.1,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [7],
        "max_tokens": 10**30,
    }
    assert text(**same).sampling == chat(**same).sampling != text().sampling


def test_what_crosses_the_trunk_is_the_request() -> None:
    """The struct holds the ids that the router chose and nothing that it was not given."""
    assert parse_as_text({"model": "M", "prompt": "hello"}) == Text(
        id="cmpl-key",
        model="M",
        created=1_700_000_000,
        prompts=("hello",),
        sampling=Sampling(max_tokens=16),
    )
