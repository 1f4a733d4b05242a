"""Models of a provider that is well: another Trunkline, or one whose bytes the test decides."""

from __future__ import annotations

import asyncio
import gc
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from msgspec.structs import replace
from pydantic import SecretStr

from router.backend import Job
from router.errors import MissingProviderKey
from router.reading import read_chat
from router.settings import ModelCard, ModelLimits, UpstreamModel
from serving.messages import Chat
from tests.harness import Deployment, HandEngine, deployed, echo_engine, request, served
from tests.router.providers import (
    CALLERS_KEY,
    DONE,
    END,
    HEAD,
    KEY,
    OTHER_KEY,
    USAGE,
    Line,
    Provider,
    body,
    chunk,
    chunked,
    event,
    provider,
    says,
    usage,
    whole,
)
from tests.waiting import soon, until

pytestmark = pytest.mark.usefixtures("no_key_in_logs")

AT_ONCE_S = 5.0
"""Five times the second within which a client that leaves has to free what it held."""

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


def upstream(url: str, **settings: Any) -> UpstreamModel:
    """A model of the provider at that URL, which calls it `echo`."""
    fields: dict[str, Any] = {"name": "near", "upstream_name": "echo", "api_key": SecretStr(KEY)}
    return UpstreamModel(base_url=url, **fields | settings)


@asynccontextmanager
async def pair(*engines: Any, **settings: Any) -> AsyncIterator[tuple[Deployment, Deployment]]:
    """A deployment with one model of its own, and another whose model `near` is that one."""
    far_settings = settings.pop("far", {})
    async with (
        deployed(served(*(engines or [echo_engine()]), **far_settings)) as far,
        deployed(upstream(f"{far.url}/v1", **settings)) as near,
    ):
        yield far, near


@asynccontextmanager
async def asking(*behaviours: Any, **settings: Any) -> AsyncIterator[tuple[Provider, Deployment]]:
    """A provider that behaves so, and a deployment whose model `near` is there."""
    async with provider(*behaviours) as one, deployed(upstream(one.url, **settings)) as near:
        yield one, near


# ---- answers ------------------------------------------------------------------------------------------


async def test_a_whole_answer_is_the_providers_under_our_name() -> None:
    """Text, end and usage are what the provider says, the model's name is the one that was asked for."""
    async with pair() as (far, near):
        theirs = await far.ask("one two three", max_tokens=5)
        ours = await near.ask("one two three", max_tokens=5, model="NEAR")
        assert (theirs.pop("model"), ours.pop("model")) == ("echo", "near")
        assert theirs.pop("id") != ours.pop("id")
        assert theirs.pop("created") <= ours.pop("created")
        assert ours == theirs
        assert ours["choices"][0]["message"]["content"] == "one two three one two"


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": True}}])
async def test_a_stream_is_the_providers_under_our_name(options: dict[str, Any]) -> None:
    """Every chunk comes through, and usage only where the client asked for it."""
    async with pair() as (far, near):
        theirs = await far.stream("one two three", **options)
        ours = await near.stream("one two three", model="near", **options)
        assert (ours.done, ours.complete, ours.text()) == (True, True, theirs.text())
        assert {each["model"] for each in ours.events} == {"near"}
        assert ours.deltas() == theirs.deltas()
        assert [each.get("usage") for each in ours.events] == [each.get("usage") for each in theirs.events]
        assert all(("usage" in each) == bool(options) for each in ours.events)


async def test_a_text_completion_goes_where_those_go() -> None:
    """/v1/completions is asked of the provider's /v1/completions, whole and streamed."""
    async with pair() as (_, near):
        body = {"model": "near", "prompt": "one two three", "max_tokens": 4}
        whole = (await near.http.post(TEXT, json=body)).json()
        assert (whole["object"], whole["model"]) == ("text_completion", "near")
        assert whole["choices"][0]["text"].split() == ["one", "two", "three", "one"]
        streamed = (await near.http.post(TEXT, json=body | {"stream": True})).text
        assert streamed.endswith("data: [DONE]\n\n")
        assert '"model":"near"' in streamed


async def test_an_alias_stays_the_alias() -> None:
    """The answer has the alias that was asked for."""
    async with pair(aliases=("Gpt",)) as (_, near):
        assert (await near.ask("hi", model="gpt"))["model"] == "Gpt"
        assert {each["model"] for each in (await near.stream("hi", model="GPT")).events} == {"Gpt"}


async def test_many_at_once_each_get_their_own() -> None:
    """A hundred requests, whole and streamed, each get their own answer."""
    async with pair(echo_engine(tokens_per_second=500)) as (_, near):
        words = [f"word-{number}" for number in range(50)]
        streams = asyncio.gather(*(near.stream(word, model="near", max_tokens=9) for word in words))
        wholes = asyncio.gather(*(near.ask(word, model="near", max_tokens=9) for word in words))
        assert [answer.text() for answer in await streams] == [" ".join([word] * 9) for word in words]
        assert [answer["usage"]["completion_tokens"] for answer in await wholes] == [9] * 50


async def test_it_is_listed_as_upstream() -> None:
    """The card says where the model lives and what the configuration tells of it."""
    async with pair(card=ModelCard(max_context_length=4096, creator="Far")) as (_, near):
        entry = (await near.http.get("/v1/models/near")).json()
        assert (entry["kind"], entry["state"], entry["max_context_length"]) == ("upstream", "ready", 4096)
        assert (await near.http.get("/health")).json()["models"] == {"near": "ready"}


@pytest.mark.parametrize("ending", [[DONE], []])
@pytest.mark.parametrize("missing", [None, 0, 3])
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_a_stream_is_complete_with_its_last_choice(
    path: str, missing: int | None, ending: list[bytes]
) -> None:
    """Whether a provider says [DONE] or just ends: where each of the choices, of all prompts, has had its end
    the client is told [DONE], and otherwise that the answer was cut off."""
    body: dict[str, Any] = {"prompt": ["a", "b"], "n": 2}
    if path == CHAT:
        body = {"messages": [{"role": "user", "content": "hi"}], "n": 4}
    choices = [{"index": index, "finish_reason": "stop"} for index in range(4) if index != missing]
    events = [event({"choices": [choice]}) for choice in choices]
    async with asking(says(HEAD, *map(chunked, events + ending), END)) as (_, near):
        answer = await near.http.post(path, json={"model": "near", "stream": True, **body})
        assert answer.text.count("finish_reason") == len(choices)
        assert answer.text.endswith("data: [DONE]\n\n") == (missing is None)
        assert ("ended before it was complete" in answer.text) == (missing is not None)


async def test_a_choice_without_an_index_is_the_only_one() -> None:
    """A provider that does not number its only choice has its end noticed."""
    answer = chunked(event({"choices": [{"delta": {}, "finish_reason": "stop"}]}))
    async with asking(says(HEAD, answer, chunked(DONE), END)) as (_, near):
        told = await near.post(request("hi", model="near", stream=True))
        assert told.text.endswith("data: [DONE]\n\n")


# ---- what is counted ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_are_counted_as_the_provider_does(stream: bool) -> None:
    """Prompt and generated tokens are in the metrics though the client was not shown the usage."""
    async with pair() as (_, near):
        await near.post(request("one two three", model="near", stream=stream, max_tokens=7))
        assert near.metric("trunkline_prompt_tokens_total", model="near") == 3
        assert near.metric("trunkline_generation_tokens_total", model="near") == 7
        assert near.metric("trunkline_requests_total", model="near", outcome="completed", status="200") == 1


@pytest.mark.parametrize(
    ("told", "tokens"), [(USAGE, 5), (USAGE | {"completion_tokens": 1}, 3), ({"completion_tokens": -9}, 3)]
)
async def test_a_strange_count_never_takes_tokens_back(told: dict[str, int], tokens: int) -> None:
    """What is counted as it comes stays counted, whatever the provider says at the end."""
    ending = event({"choices": [], "usage": told})

    async def tells(line: Line) -> None:
        await line.asked()
        await line.stream(chunk("a"), chunk("b"), chunk("c", "stop"), ending, DONE)

    async with asking(tells) as (_, near):
        assert (await near.stream("hi", model="near")).done
        assert near.metric("trunkline_generation_tokens_total", model="near") == tokens


@pytest.mark.parametrize(
    ("told", "tokens"),
    [
        ({"message": {"role": "assistant", "content": "all is well"}}, 3),
        ({"message": {"role": "assistant", "content": "é" * 8}}, 4),
        ({"message": {"role": "assistant", "content": None}}, 0),
        (
            {
                "message": {
                    "content": "four",
                    "reasoning_content": "and four",
                    "tool_calls": [
                        {
                            "id": "not counted",
                            "type": "function",
                            "function": {"name": "f", "arguments": "{ }"},
                        }
                    ],
                }
            },
            4,
        ),
        ({"message": {"content": "all"}, "logprobs": {"content": [{"token": each} for each in "abcdef"]}}, 6),
        ({"text": "all", "logprobs": {"tokens": ["a", "l"]}}, 2),
        ({"text": "all"}, 1),
    ],
)
@pytest.mark.parametrize("usage", [None, {"prompt_tokens": 3}, {"completion_tokens": 5.5}])
async def test_what_a_provider_does_not_count_is_estimated(
    told: dict[str, Any], tokens: int, usage: Any
) -> None:
    """Of a whole answer without a count of its tokens those are counted that have log-probs, or else one for
    every four bytes that are said."""
    answer = whole(choices=[{"index": 0, "finish_reason": "stop", **told}], usage=usage)
    async with asking(says(body(answer))) as (_, near):
        assert (await near.post(request("hi", model="near"))).json()["choices"][0].items() >= told.items()
        assert near.metric("trunkline_generation_tokens_total", model="near") == tokens


@pytest.mark.parametrize("told", [{"prompt_tokens": 3.5}, {"completion_tokens": "5"}, {}, [], 5, "many"])
@pytest.mark.parametrize("wanted", [False, True])
async def test_a_usage_of_another_kind(told: Any, wanted: bool) -> None:
    """What a provider says of the usage in a way of its own is what a client reads that has asked for it, and
    nothing to any other: not even a chunk without choices."""
    ending = event({"choices": [], "usage": told})

    async def tells(line: Line) -> None:
        await line.asked()
        await line.stream(chunk("a"), chunk("b", "stop"), ending, DONE)

    async with asking(tells) as (_, near):
        answer = await near.stream("hi", model="near", stream_options={"include_usage": wanted})
        assert answer.done
        assert [event["usage"] for event in answer.events if not event["choices"]] == [told] * wanted
        assert all("usage" not in event for event in answer.events) or wanted


@pytest.mark.parametrize("error", ["", False, None, {}, 0, []])
@pytest.mark.parametrize("stream", [False, True])
async def test_no_error_is_none(error: Any, stream: bool) -> None:
    """There are providers that say with each answer that there is no error. Their clients need not know."""
    answer = [HEAD, chunked(chunk("all is well", "stop", error=error)), chunked(DONE), END]
    async with asking(says(*answer) if stream else says(body(whole(error=error)))) as (_, near):
        told = await near.post(request("hi", model="near", stream=stream))
        assert told.status_code == 200
        assert "all is well" in told.text
        assert "error" not in told.text


# ---- what is asked ------------------------------------------------------------------------------------


async def test_the_provider_is_asked_what_the_client_asked() -> None:
    """The body is the client's own, unknown fields too, without nulls; only the name, the default of
    max_tokens and the question for the usage are ours."""
    asked = {
        "messages": [{"role": "user", "content": "hi", "name": "ada"}],
        "temperature": 0.25,
        "seed": -(2**63),
        "of_their_own": {"huge": 10**30, "deep": [None, 1.0, "é"]},
    }
    async with asking(upstream_name="Far/Model-7B") as (one, near):
        await near.post({"model": "near", "top_p": None, **asked})
        await near.post({"model": "near", "max_completion_tokens": 9, **asked})
        options = {"include_usage": None, "of_their_own": 1}
        await near.post(
            {"model": "near", "max_tokens": 8, "stream": True, "stream_options": options, **asked}
        )
        await near.http.post(TEXT, json={"model": "near", "prompt": "hi"})
        name = {"model": "Far/Model-7B"}
        assert [each.body for each in one.asked] == [
            {**asked, **name, "max_tokens": 24},
            {**asked, **name, "max_completion_tokens": 9},
            {
                **asked,
                **name,
                "max_tokens": 8,
                "stream": True,
                "stream_options": {"include_usage": True, "of_their_own": 1},
            },
            {**name, "prompt": "hi", "max_tokens": 16},
        ]
        assert [each.path for each in one.asked] == ["/v1/chat/completions"] * 3 + ["/v1/completions"]
        assert {each.headers["user-agent"].split("/")[0] for each in one.asked} == {"trunkline"}
        assert len({each.headers["x-request-id"] for each in one.asked}) == 4


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ({"max_tokens": 9, "max_completion_tokens": 9}, {"max_completion_tokens": 9}),
        ({"max_tokens": None, "max_completion_tokens": 9}, {"max_completion_tokens": 9}),
        ({"max_tokens": 9, "max_completion_tokens": None}, {"max_tokens": 9}),
    ],
)
async def test_a_provider_is_told_one_name_of_max_tokens(
    given: dict[str, int | None], sent: dict[str, int]
) -> None:
    """A client may give both names of max_tokens, but there are providers that refuse them together."""
    async with asking() as (one, near):
        asked = request("hi", model="near")
        asked.pop("max_tokens", None)
        assert (await near.post(asked | given)).status_code == 200
        assert [each.body for each in one.asked] == [asked | sent | {"model": "echo"}]


@pytest.mark.parametrize(
    ("meaning", "given", "sent"),
    [
        ("additive", 0, False),
        ("additive", -0.0, False),
        ("additive", None, False),
        ("additive", 1, True),
        ("additive", -0.5, True),
        ("multiplicative", 1, False),
        ("multiplicative", 1.0, False),
        ("multiplicative", None, False),
        ("multiplicative", 1.3, True),
    ],
)
async def test_a_provider_is_not_told_of_a_neutral_repetition_penalty(
    meaning: str, given: float | None, sent: bool
) -> None:
    """Many do not know the field, and it has no effect; any other value goes as it was given."""
    async with asking(repetition_penalty=meaning) as (one, near):
        await near.post(request("hi", model="near", repetition_penalty=given))
        (asked,) = one.asked
        assert ("repetition_penalty" in asked.body) == sent
        assert asked.body.get("repetition_penalty", given) == given


async def test_a_bad_request_is_never_sent() -> None:
    """What the API does not describe is refused here."""
    async with asking() as (one, near):
        response = await near.post(request("hi", model="near", temperature=3))
        assert (response.status_code, response.json()["error"]["param"]) == (400, "temperature")
        assert one.accepted == 0


@pytest.mark.parametrize(
    ("parameters", "path"),
    [
        (b'"of_their_own": {"deep": [1, {"a": 1e400}]}', "of_their_own.deep[1].a"),
        (b'"metadata": {"a": "Infinity", "b": -1e999}', "metadata.b"),
    ],
)
async def test_a_number_that_is_none_is_never_sent(parameters: bytes, path: str) -> None:
    """A number too large to be one would go on as Infinity, which is not JSON. It is refused by its place,
    also in a field that nobody here knows."""
    head = b'{"model": "near", "messages": [{"role": "user", "content": "hi"}], '
    async with asking() as (one, near):
        told = await near.http.post(
            CHAT, content=head + parameters + b"}", headers={"content-type": "application/json"}
        )
        error = told.json()["error"]
        assert (told.status_code, error["param"]) == (400, path)
        assert error["message"].startswith(f"{path} must be a number from -1.8e308 to 1.8e308, not ")
        assert error["message"].endswith("Infinity")
        assert one.accepted == 0


@pytest.mark.parametrize(
    ("own", "sent", "used"),
    [
        (None, OTHER_KEY, OTHER_KEY),
        (SecretStr(KEY), OTHER_KEY, KEY),
        (SecretStr(KEY), None, KEY),
        (SecretStr(KEY), "not a key", KEY),
    ],
)
async def test_one_key_reaches_the_provider(own: SecretStr | None, sent: str | None, used: str) -> None:
    """The deployment's key is used where it has one, otherwise the caller's; neither the other one nor the
    caller's key for us is seen by the provider."""
    headers = {"authorization": f"Bearer {CALLERS_KEY}", "cookie": f"session={CALLERS_KEY}"}
    headers |= {"x-openai-api-key": sent} if sent else {}
    async with asking(api_key=own) as (one, near):
        assert (await near.post(request("hi", model="near"), **headers)).status_code == 200
        (asked,) = one.asked
        assert asked.headers["authorization"] == f"Bearer {used}"
        others = {OTHER_KEY, CALLERS_KEY, KEY} - {used}
        assert [key for key in others if key in str(asked)] == []


@pytest.mark.parametrize("sent", [None, "", "two words", "schlüssel", "tab\tbed"])
async def test_a_model_without_a_key_wants_the_callers(sent: str | None) -> None:
    """Without the deployment's key a caller that sends none, or what cannot be one, is told which header."""
    async with asking(api_key=None) as (one, near):
        headers = {} if sent is None else {b"x-openai-api-key": sent.encode()}
        response = await near.http.post(
            "/v1/chat/completions", json=request("hi", model="near"), headers=headers
        )
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (401, "missing_provider_key")
        assert "X-OpenAI-Api-Key" in error["message"]
        assert one.accepted == 0


async def test_a_hosted_model_takes_no_notice_of_a_providers_key() -> None:
    """Clients send it with every request."""
    async with deployed(served(echo_engine())) as deployment:
        response = await deployment.post(request("hi"), **{"x-openai-api-key": OTHER_KEY})
        assert response.status_code == 200


# ---- connections --------------------------------------------------------------------------------------


async def test_a_connection_is_used_again() -> None:
    """One request after another, whole and streamed, needs one connection; nothing of the one before, such as
    a cookie, comes along."""
    async with asking() as (one, near):
        for _ in range(5):
            assert (await near.ask("hi", model="near"))["choices"][0]["message"]["content"] == "all is well"
            assert (await near.stream("hi", model="near")).text() == "all is well"
            await until(near.idle)
        assert one.accepted == 1
        assert all("cookie" not in each.headers for each in one.asked)


async def test_a_connection_is_used_again_after_a_refusal() -> None:
    """An error that came whole leaves the connection as good as an answer does."""
    async with pair() as (far, near):
        for _ in range(3):
            assert (await near.post(request("hi", model="near"))).status_code == 200
            assert (await near.post(request("x " * 9000, model="near"))).status_code == 400
        assert len(far.connections) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("goodbye", [False, True])
async def test_a_connection_that_ends_as_it_is_used_again_is_replaced(goodbye: bool, stream: bool) -> None:
    """A provider may close a connection that was kept at the moment at which a request is sent on it, with a
    goodbye or without one. The request is sent again on a new connection, and its client notices nothing."""

    async def closes(line: Line) -> None:
        await line.asked()
        await line.answer(200, whole())
        await line.asked()
        if not goodbye:
            line.reset()

    async with asking(closes) as (one, near):
        assert (await near.post(request("hi", model="near"))).status_code == 200
        await until(near.idle)
        told = await near.post(request("again", model="near", stream=stream))
        assert told.status_code == 200
        assert "well" in told.text
        assert one.accepted == 2
        assert [each.body["messages"][0]["content"] for each in one.asked] == ["hi", "again", "again"]


async def test_only_a_silent_end_of_a_connection_that_was_kept_is_made_up_for() -> None:
    """A provider may have begun with a request when its connection ends. Where it has said a byte of an
    answer, or where the connection is a new one, that is the client's to know, and nothing is sent again."""

    async def breaks_off(line: Line) -> None:
        await line.asked()
        await line.answer(200, whole())
        await line.asked()
        await line.send(b"H")

    async def ends(line: Line) -> None:
        await line.asked()

    async def answers_once(line: Line) -> None:
        await ends(line)
        await line.answer(200, whole())
        await line.asked()

    async with asking(breaks_off, ends, answers_once, ends) as (one, near):
        statuses = []
        for expected in (1, 2, 3, 4, 6):
            statuses.append((await near.post(request("hi", model="near"))).status_code)
            await until(near.idle)
            assert len(one.asked) == expected
        # The last one met the end of a kept connection, and then that of a new one.
        assert statuses == [200, 502, 502, 200, 502]
        assert one.accepted == 4


async def test_a_long_conversation_is_not_held_until_its_answer_ends() -> None:
    """Once a provider has begun to answer, nothing of what was asked is left but what the relay needs."""

    async def begins(line: Line) -> None:
        await line.asked()
        await line.stream(chunk("a"))
        await line.gone()

    async with asking(begins) as (one, near):
        asked = await near.open("x" * 100_000, model="near", stream=True)
        assert await asked.event()
        one.asked.clear()
        gc.collect()
        left = gc.get_objects()  # some of which warn when they are asked what they are
        assert not [each for each in left if type(each) in {Job, Chat} and "x" * 100_000 in str(each)]
        bodies = [each for each in left if type(each) is io.BytesIO and not each.closed]
        assert all(each.getbuffer().nbytes < 100_000 for each in bodies)
        asked.leave()


async def test_the_rest_of_a_body_is_not_waited_for() -> None:
    """The client has its [DONE] though the provider does not end the body; the connection is given up."""

    async def lingers(line: Line) -> None:
        await line.asked()
        await line.stream(chunk("hi", "stop"), DONE)
        await line.gone()

    async with asking(lingers) as (one, near):
        assert (await near.stream("hi", model="near")).done
        await until(lambda: not one.lines)
        assert (await near.ask("hi", model="near"))["model"] == "near"


async def test_a_slow_reader_slows_its_provider() -> None:
    """While a client does not read, no more is taken from the provider than its buffer holds; nothing of its
    answer is lost, and others are not held up."""
    text = "x" * 1000
    sent = 0

    async def talks(line: Line) -> None:
        nonlocal sent
        await line.asked()
        await line.stream()
        for _ in range(20_000):
            await line.send(chunked(chunk(text)))
            sent += 1
        await line.send(*map(chunked, (chunk("", "stop"), usage(), DONE)), END)

    small = 2**14
    limits = ModelLimits(stream_buffer_bytes=2**16)
    async with (
        provider(talks) as one,
        deployed(upstream(one.url, limits=limits), send_buffer=small) as near,
    ):
        wire = await near.open("hi", model="near", stream=True, receive_buffer=small)
        assert await wire.event()
        before = 0
        while before < sent:
            before = sent
            for _ in range(9):
                assert (await near.stream("hi", model="near")).done
        assert sent < 20_000
        answer = await soon(wire.answer())
        assert answer.done
        assert len(answer.text()) == (20_000 - 1) * len(text)


# ---- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_an_unknown_model_is_the_providers_404(stream: bool) -> None:
    """The provider's status, message and code come through in our envelope."""
    async with pair(upstream_name="nobody") as (_, near):
        response = await near.post(request("hi", model="near", stream=stream))
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert '"nobody" does not exist' in error["message"]
        assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_bad_request_is_the_providers_400(stream: bool) -> None:
    """What only the provider can know is wrong is refused in its words."""
    async with pair() as (far, near):
        long = request("x " * 9000, stream=stream)
        theirs, ours = await far.post(long), await near.post(long | {"model": "near"})
        assert (ours.status_code, ours.json()) == (theirs.status_code, theirs.json())
        assert theirs.status_code == 400
        assert near.metric("trunkline_requests_total", model="near", outcome="refused", status="400") == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_queue_is_the_providers_429(stream: bool) -> None:
    """The provider's Retry-After comes through with its refusal."""
    engine = HandEngine()
    async with pair(engine, far={"limits": ModelLimits(in_flight=1, queued=0)}) as (_, near):
        first = await near.open("hi", model="near")
        await until(lambda: engine.requests)
        response = await near.post(request("hi", model="near", stream=stream))
        assert (response.status_code, response.json()["error"]["code"]) == (429, "overloaded")
        assert int(response.headers["retry-after"]) >= 1
        engine.say("first", "stop")
        assert b"first" in await first.body()


async def test_an_error_in_mid_stream_is_the_streams_last_event() -> None:
    """A provider that breaks its own stream off with an error has it relayed, and no [DONE] follows."""
    engine = HandEngine()
    async with pair(engine) as (far, near):
        wire = await near.open("hi", model="near", stream=True)
        await until(lambda: engine.requests)
        engine.say("first")
        assert await wire.event()
        await far.replicas["echo"][0].kill()
        answer = await wire.answer()
        assert answer.error is not None
        assert (answer.error["code"], answer.done, answer.complete) == ("replica_lost", False, True)
        assert near.metric("trunkline_requests_total", model="near", outcome="failed", status="200") == 1


# ---- leaving ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
async def test_a_client_that_leaves_cancels_the_call_upstream(stream: bool, begun: bool) -> None:
    """Before the first token or after it, streamed or not: the provider's engine is free at once."""
    engine = HandEngine()
    async with pair(engine) as (far, near):
        wire = await near.open("hi", model="near", stream=stream)
        await until(lambda: engine.requests)
        if begun:
            engine.say("first")
            if stream:
                assert await wire.event()
        wire.leave()
        await until(lambda: not engine.requests and not far.connections, AT_ONCE_S)
        await until(near.idle)
        await until(
            lambda: near.metric("trunkline_requests_total", model="near", outcome="cancelled") == 1, AT_ONCE_S
        )


async def test_a_router_that_ends_tells_its_clients() -> None:
    """Streams from a provider end with an error when the router leaves it, and so do whole answers; whoever
    comes later is told the same."""
    engine = HandEngine()
    async with pair(engine) as (far, near):
        streamed = await near.open("hi", model="near", stream=True)
        await until(lambda: engine.requests)
        engine.say("first")
        assert await streamed.event()
        whole = await near.open("hi", model="near")
        await until(lambda: len(engine.requests) == 2)
        await soon(near.application.close())
        answer = await streamed.answer()
        assert answer.error is not None
        assert (answer.error["code"], answer.complete) == ("shutting_down", True)
        assert b"shutting_down" in await whole.body()
        assert (await near.post(request("hi", model="near"))).status_code == 503
        await until(lambda: not engine.requests and not far.connections, AT_ONCE_S)


async def test_a_missing_key_waits_for_nothing() -> None:
    """Whether a request has a key for its provider can be checked before anything is waited for or taken."""
    async with asking(api_key=None) as (one, near):
        assert (await near.post(request("hi", model="near"))).status_code == 401
        model = near.model("near")
        job = Job("key", read_chat(request("hi"), model.settings, "chatcmpl-1", "near", 1), request("hi"))
        with pytest.raises(MissingProviderKey):
            model.backend.check(job)
        model.backend.check(replace(job, provider_key=SecretStr(OTHER_KEY)))
        assert one.accepted == 0


# ---- roles --------------------------------------------------------------------------------------------


async def test_every_chunk_has_a_role_where_that_is_wanted() -> None:
    """With stream_role every, a provider's chunks have a role and a content that is never null too."""
    parts = [{"role": "assistant", "content": None}, {"content": "a"}, {"content": None, "refusal": "b"}, {}]

    async def tells(line: Line) -> None:
        await line.asked()
        ends = [None] * 3 + ["stop"]
        choices = [
            {"index": 0, "delta": delta, "finish_reason": end} for delta, end in zip(parts, ends, strict=True)
        ]
        await line.stream(*(event({"choices": [choice]}) for choice in choices), usage(), DONE)

    async with asking(tells, stream_role="every") as (_, near):
        answer = await near.stream("hi", model="near")
        assert answer.done
        said = {"role": "assistant", "content": ""}
        assert answer.deltas() == [said, said | {"content": "a"}, said | {"refusal": "b"}, said]


@pytest.mark.parametrize("separate", [True, False])
async def test_a_role_is_told_once_however_often_a_provider_tells_it(separate: bool) -> None:
    """With stream_role first a client's accumulator reads one role for each choice, though the provider has
    it in every delta; all else of a delta stays as it is."""
    said = [
        {"index": index, "delta": {"role": "assistant", "content": text, "refusal": None}}
        for text in ("a", "b")
        for index in (0, 1)
    ]
    chunks = [[each] for each in said] if separate else [said[:2], said[2:]]
    ends = [{"index": index, "delta": {"role": "assistant"}, "finish_reason": "stop"} for index in (0, 1)]

    async def tells(line: Line) -> None:
        await line.asked()
        await line.stream(*(event({"choices": choices}) for choices in (*chunks, ends)), usage(), DONE)

    async with asking(tells) as (_, near):
        answer = await near.stream("hi", model="near", n=2)
        assert answer.done
        for index in (0, 1):
            deltas = [
                choice["delta"]
                for event in answer.events
                for choice in event["choices"]
                if choice["index"] == index
            ]
            told = {"content": "b", "refusal": None}
            assert deltas == [{"role": "assistant", "content": "a", "refusal": None}, told, {}]
