"""Reasoning and calls, from a model's tokens through vLLM's parsers, the trunk and the router to what a
client puts together."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio

from tests.end_to_end.parsers import ANSWERS, MODELS, SEEDS
from tests.end_to_end.server import Server

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.parametrize("model", list(MODELS)),
]

CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": CITY}}
    for name in ("get_weather", "get_time")
]
WEATHER = ("get_weather", {"city": "Zürich 🚆", "days": 3})
TIME = ("get_time", {"city": "Rome"})

STOPS = [None, "\nObservation:", ["###", "STOP"]]
"""None, and such as never come: of each more or less text is held back."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    """The client that people use."""
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as one:
        yield one


def asking(model: str, kind: str, **parameters: Any) -> dict[str, Any]:
    """A request that is answered in this way, with functions that may be called."""
    question = [{"role": "user", "content": "How warm is it?"}]
    body: dict[str, Any] = {"messages": question, "seed": SEEDS[kind], "max_tokens": 200, "tools": TOOLS}
    return {"model": model, **body, **parameters}


async def told(
    client: openai.AsyncOpenAI, body: dict[str, Any]
) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """The message that the answer to a request is, how it ended and what was used: the same whole and put
    together by the client from a stream, but for the ids of calls."""
    whole = await client.chat.completions.create(**body)
    streamed = await accumulated(client, body)
    messages = [_said(answer.choices[0].message.model_dump(mode="json")) for answer in (whole, streamed)]
    assert messages[0] == messages[1]
    assert whole.choices[0].finish_reason == streamed.choices[0].finish_reason
    usages = [_counted(answer.usage) for answer in (whole, streamed)]
    assert usages[0] == usages[1]
    return messages[0], whole.choices[0].finish_reason, usages[0]


async def accumulated(client: openai.AsyncOpenAI, body: dict[str, Any]) -> Any:
    """What the client puts together from the stream of a request. One that is cut off is the client's own
    error, which has what there was."""
    async with client.chat.completions.stream(**body, stream_options={"include_usage": True}) as stream:
        try:
            return await stream.get_final_completion()
        except openai.LengthFinishReasonError as error:
            return error.completion


def _said(message: dict[str, Any]) -> dict[str, Any]:
    """A message without what the client adds to it, and calls without what differs each time."""
    calls = message.get("tool_calls") or []
    assert len({call["id"] for call in calls}) == len(calls)
    return {
        "role": message["role"],
        "content": message["content"] or None,
        "reasoning": message.get("reasoning_content"),
        "calls": [(call["function"]["name"], call["function"]["arguments"]) for call in calls],
    }


def _counted(usage: Any) -> dict[str, Any]:
    """A usage without what one of equal requests may have found in a cache."""
    details = usage.completion_tokens_details
    return {
        "prompt": usage.prompt_tokens,
        "completion": usage.completion_tokens,
        "reasoning": details.reasoning_tokens,
    }


@pytest.mark.parametrize("stop", STOPS, ids=["no stop", "a long stop", "short stops"])
@pytest.mark.parametrize(
    ("kind", "content", "calls", "ended"),
    [
        ("thinks and says", "\n\nParis is the capital 🏛 of France.", [], "stop"),
        ("thinks and calls", None, [WEATHER], "tool_calls"),
        ("thinks, says and calls twice", "Let me see.\n", [WEATHER, TIME], "tool_calls"),
    ],
)
async def test_a_client_reads_what_the_model_thought_said_and_called(
    client: openai.AsyncOpenAI, model: str, kind: str, content: Any, calls: Any, ended: str, stop: Any
) -> None:
    """Of an answer that the model was left to choose, a client reads reasoning, content and calls apart, the
    same whole and streamed, and whether or not text is held back for a stop string."""
    message, reason, usage = await told(client, asking(model, kind, stop=stop))
    assert (message["role"], message["content"], message["reasoning"]) == (
        "assistant",
        content,
        "What is asked?",
    )
    assert [(name, json.loads(arguments)) for name, arguments in message["calls"]] == calls
    assert reason == ended
    assert usage["reasoning"] == 4


@pytest.mark.parametrize("stop", STOPS, ids=["no stop", "a long stop", "short stops"])
@pytest.mark.parametrize("kind", ["only thinks", "calls in broken JSON", "thinks twice"])
async def test_what_a_model_does_wrong_is_one_answer(
    client: openai.AsyncOpenAI, model: str, kind: str, stop: Any
) -> None:
    """Reasoning without an end, a call that is no JSON and a mark in the wrong place make one message,
    however it is asked for."""
    message, reason, _ = await told(client, asking(model, kind, stop=stop))
    if kind == "calls in broken JSON":
        ((name, arguments),) = message["calls"]
        assert (name, reason) == ("get_time", "tool_calls")
        assert arguments.startswith('{"city"')
    else:
        assert reason == "stop"
        assert not message["calls"]
        assert message["reasoning"]


@pytest.mark.parametrize("kind", list(ANSWERS))
async def test_an_answer_that_is_cut_off_is_one_answer(
    client: openai.AsyncOpenAI, model: str, kind: str
) -> None:
    """At whatever token an answer is cut off, in a thought, a text or a call, a client reads the same of it
    whole and streamed, with the finish_reason length."""
    _, _, usage = await told(client, asking(model, kind))
    for longest in range(1, usage["completion"], 4):
        _, reason, used = await told(client, asking(model, kind, max_tokens=longest))
        assert (reason, used["completion"]) == ("length", longest)


async def test_a_stop_string_within_a_call_ends_it(client: openai.AsyncOpenAI, model: str) -> None:
    """A stop string ends a thought, a text or a call where it stands, and nothing of it is told."""
    kind = "thinks, says and calls twice"
    message, reason, _ = await told(client, asking(model, kind, stop="days"))
    assert message["calls"] == [("get_weather", '{"city": "Zürich 🚆", "')]
    assert reason == "tool_calls"
    message, reason, _ = await told(client, asking(model, kind, stop=["me see"]))
    assert (message["content"], message["calls"], reason) == ("Let ", [], "stop")
    message, reason, _ = await told(client, asking(model, kind, stop="is asked"))
    assert (message["content"], message["reasoning"], reason) == (None, "What ", "stop")
