"""What every engine does, whatever makes its tokens."""

from __future__ import annotations

import pytest
import pytest_asyncio

from tests.end_to_end.client import Exchange, ask, chat
from tests.end_to_end.server import Server
from tests.end_to_end.smollm import ECHO, SMOLLM

WORDS = "List ten animals that live in the sea, and say for each of them what it likes to eat."

pytestmark = [
    pytest.mark.parametrize("model", [ECHO, SMOLLM], scope="module"),
    pytest.mark.asyncio(loop_scope="module"),
]


async def both(server: Server, body: dict[str, object]) -> tuple[Exchange, Exchange]:
    """The whole answer, and the streamed one with its usage."""
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    return await ask(server, body), await ask(server, body | stream)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def plain(server: Server, model: str) -> tuple[Exchange, Exchange]:
    """Both answers at temperature 0 where nothing else is asked."""
    return await both(server, chat(model, WORDS, temperature=0))


async def test_an_answer_has_24_tokens_unless_asked(plain: tuple[Exchange, Exchange]) -> None:
    """Without max_tokens an answer ends after 24 tokens, and says that its length was why."""
    for answer in plain:
        assert answer.finish_reason() == "length"
        assert answer.usage["completion_tokens"] == 24


@pytest.mark.parametrize("max_tokens", [1, 7])
async def test_an_answer_has_max_tokens(server: Server, model: str, max_tokens: int) -> None:
    """An answer has no more tokens than it may, counted in usage."""
    for answer in await both(server, chat(model, WORDS, temperature=0, max_tokens=max_tokens)):
        assert answer.finish_reason() == "length"
        assert answer.usage["completion_tokens"] == max_tokens
        assert answer.usage["total_tokens"] == answer.usage["prompt_tokens"] + max_tokens


async def test_a_stream_says_what_the_whole_says(
    server: Server, model: str, plain: tuple[Exchange, Exchange]
) -> None:
    """At temperature 0 a stream's text, finish_reason and usage are those of the whole answer, time after
    time."""
    whole, streamed = plain
    again = await ask(server, chat(model, WORDS, temperature=0))
    assert whole.text() == streamed.text() == again.text() != ""
    assert whole.finish_reason() == streamed.finish_reason()
    for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert whole.usage[count] == streamed.usage[count]


async def test_a_stream_has_the_form_that_clients_read(
    server: Server, model: str, plain: tuple[Exchange, Exchange]
) -> None:
    """A stream's chunks are of one completion; the first alone has the role, the last alone a finish_reason,
    usage comes only where asked for, and [DONE] ends it."""
    uncounted = await ask(server, chat(model, WORDS, temperature=0, stream=True))
    _, counted = plain
    assert uncounted.headers["content-type"] == "text/event-stream; charset=utf-8"
    for stream in (uncounted, counted):
        assert stream.done
        assert {chunk["object"] for chunk in stream.chunks} == {"chat.completion.chunk"}
        assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in stream.chunks}) == 1
    choices = [choice for chunk in uncounted.chunks for choice in chunk["choices"]]
    assert ["role" in choice["delta"] for choice in choices] == [True] + [False] * (len(choices) - 1)
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert not any("usage" in chunk for chunk in uncounted.chunks)
    assert [chunk["usage"] is None for chunk in counted.chunks] == [True] * (len(counted.chunks) - 1) + [
        False
    ]
    assert counted.chunks[-1]["choices"] == []


async def test_an_answer_ends_before_a_stop_string(
    server: Server, model: str, plain: tuple[Exchange, Exchange]
) -> None:
    """An answer ends before the first of its stop strings, also where that begins in one token and ends in
    another, and no byte of it is sent."""
    whole, _ = plain
    first, second = whole.text().split()[4:6]
    stop = f"{first[-2:]} {second[:2]}"
    cut = whole.text()[: whole.text().index(stop)]
    for stops in (stop, ["never said", "\x00", stop, stop * 3]):
        for answer in await both(server, chat(model, WORDS, temperature=0, stop=stops)):
            assert answer.text() == cut
            assert answer.finish_reason() == "stop"
            assert 0 < answer.usage["completion_tokens"] < 24


async def test_a_seed_fixes_the_text(server: Server, model: str) -> None:
    """The same seed brings the same text, and another seed another."""
    first, again, other = [
        await ask(server, chat(model, WORDS, seed=seed, max_tokens=12)) for seed in (7, 7, 8)
    ]
    assert first.text() == again.text() != other.text()


async def test_choices_are_counted_together(server: Server, model: str) -> None:
    """Each of n choices is answered under its index, and usage counts the tokens of all of them."""
    for answer in await both(server, chat(model, WORDS, n=3, max_tokens=6, ignore_eos=True)):
        assert all(answer.text(choice) for choice in range(3))
        assert [answer.finish_reason(choice) for choice in range(3)] == ["length"] * 3
        assert answer.usage["completion_tokens"] == 18


async def test_choices_of_temperature_0_are_equal(server: Server, model: str) -> None:
    """At temperature 0 the n choices are n times the same."""
    for answer in await both(server, chat(model, WORDS, n=3, max_tokens=8, temperature=0)):
        assert answer.text(0) == answer.text(1) == answer.text(2) != ""


async def test_a_choice_takes_the_next_seed(server: Server, model: str) -> None:
    """Choice i of a seeded request is what a request with that seed plus i has alone."""
    together = await ask(server, chat(model, WORDS, n=3, seed=40, max_tokens=8))
    for choice in range(3):
        alone = await ask(server, chat(model, WORDS, seed=40 + choice, max_tokens=8))
        assert together.text(choice) == alone.text()


async def test_null_is_the_default(server: Server, model: str, plain: tuple[Exchange, Exchange]) -> None:
    """A parameter that is null is one that is not given."""
    optional = ("max_tokens", "stream", "top_p", "n", "seed", "stop", "logit_bias", "presence_penalty")
    nulls = await ask(server, chat(model, WORDS, temperature=0, **dict.fromkeys(optional)))
    whole, _ = plain
    assert whole.text() == nulls.text()
