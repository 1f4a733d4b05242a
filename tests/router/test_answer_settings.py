"""How a model's settings change the reading of requests and the writing of answers."""

from __future__ import annotations

from typing import Any

import pytest

from router.settings import ModelCard
from serving.echo import EchoArguments, EchoEngine
from tests.harness import HandEngine, deployed, request, served
from tests.waiting import until


async def test_a_model_has_its_own_default_of_max_tokens() -> None:
    """default_max_tokens is what a chat request that gives none has, of that model alone."""
    models = (
        served(EchoEngine(EchoArguments())),
        served(EchoEngine(EchoArguments()), name="long", default_max_tokens=40),
    )
    async with deployed(*models) as deployment:
        short = await deployment.ask("a b")
        long = await deployment.ask("a b", model="long")
        asked = await deployment.ask("a b", model="long", max_tokens=3)
        text = await deployment.http.post("/v1/completions", json={"model": "long", "prompt": "a b"})
    used = [answer["usage"]["completion_tokens"] for answer in (short, long, asked, text.json())]
    assert used == [24, 40, 3, 16]


async def test_a_model_can_say_its_role_in_every_chunk() -> None:
    """With stream_role every, each chunk with a choice has a role and a content that is not null, the last
    included; the text is the same."""
    models = (
        served(EchoEngine(EchoArguments())),
        served(EchoEngine(EchoArguments()), name="konko", stream_role="every"),
    )
    async with deployed(*models) as deployment:
        first = await deployment.stream("a b c", n=2)
        every = await deployment.stream("a b c", n=2, model="konko")
    deltas = [*every.deltas(0), *every.deltas(1)]
    assert {delta["role"] for delta in deltas} == {"assistant"}
    assert all(isinstance(delta["content"], str) for delta in deltas)
    assert ["role" in delta for delta in first.deltas()] == [True] + [False] * (len(first.deltas()) - 1)
    assert [first.text(0), first.text(1)] == [every.text(0), every.text(1)]


@pytest.mark.parametrize(
    ("meaning", "given", "additive", "multiplicative"),
    [
        ("additive", None, 0.0, 1.0),
        ("additive", -2, -2.0, 1.0),
        ("multiplicative", None, 0.0, 1.0),
        ("multiplicative", 1.2, 0.0, 1.2),
        ("multiplicative", 2, 0.0, 2.0),
    ],
)
async def test_a_repetition_penalty_means_what_its_model_says(
    meaning: str, given: float | None, additive: float, multiplicative: float
) -> None:
    """repetition_penalty reaches the engine as what the model's setting takes it for, neutral without one."""
    engine = HandEngine()
    async with deployed(served(engine, repetition_penalty=meaning)) as deployment:
        wire = await deployment.open("a", repetition_penalty=given, stream=True)
        await until(lambda: bool(engine.requests))
        (asked,) = engine.requests.values()
        engine.say("a", "stop")
        assert (await wire.answer()).done
    assert asked.request.sampling.repetition_penalty == additive
    assert asked.request.sampling.repetition_factor == multiplicative


@pytest.mark.parametrize(("value", "range_"), [(0, "above 0"), (-1, "above 0"), (2.1, "2")])
async def test_a_factor_has_a_range_of_its_own(value: float, range_: str) -> None:
    """A repetition_penalty that multiplies is refused outside of its own range, in words."""
    async with deployed(served(HandEngine(), repetition_penalty="multiplicative")) as deployment:
        refused = await deployment.post(request("a", repetition_penalty=value))
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "repetition_penalty"
    assert range_ in refused.json()["error"]["message"]


async def test_a_model_answers_where_its_card_says() -> None:
    """A model whose card says that it does not chat, or completes no text, refuses the one and does the
    other."""
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a b"}]},
        "/v1/completions": {"prompt": "a b"},
    }
    cards = {"talks": ModelCard(is_text=False), "writes": ModelCard(is_chat=False)}
    models = [served(EchoEngine(EchoArguments()), name=name, card=card) for name, card in cards.items()]
    async with deployed(*models) as deployment:
        statuses = {
            (name, path): (await deployment.http.post(path, json={"model": name, **body}))
            for name in cards
            for path, body in bodies.items()
        }
    assert [answer.status_code for answer in statuses.values()] == [200, 400, 400, 200]
    refused = statuses["writes", "/v1/chat/completions"].json()["error"]
    assert (refused["param"], refused["code"]) == ("model", "wrong_endpoint")
    assert "is_chat" in refused["message"]
