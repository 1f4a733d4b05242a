from __future__ import annotations

import openai

from tests.end_to_end.client import ask, asking, chat
from tests.end_to_end.server import Server
from tests.end_to_end.smollm import ALIAS, ECHO, PARIS, REFUSING, SMOLLM, UPSTREAM

ANSWER = "The capital of France is Paris."


async def test_a_real_model_answers(server: Server) -> None:
    """Asked for the capital of France at temperature 0 the model names it, the same text whole and
    streamed."""
    request = chat(SMOLLM, PARIS, temperature=0)
    whole = await ask(server, request)
    streamed = await ask(server, request | {"stream": True})
    assert whole.text() == streamed.text() == ANSWER
    assert whole.finish_reason() == streamed.finish_reason() == "stop"
    assert streamed.done


async def test_models_serve_side_by_side(server: Server) -> None:
    """Two hosted models stream at once under their names, and neither waits for the other."""
    slow = chat(SMOLLM, "Tell me a long story.", max_tokens=64, stream=True, ignore_eos=True)
    async with asking(server, slow) as story, asking(server, chat(ECHO, "a b c", stream=True)) as echo:
        await story.first()
        await echo.first()
        assert not story.ended.done(), story.body.decode()
        assert not echo.ended.done(), echo.body.decode()
        await story.end()
        await echo.end()
    assert {chunk["model"] for chunk in story.chunks} == {SMOLLM}
    assert {chunk["model"] for chunk in echo.chunks} == {ECHO}
    assert echo.text() == " ".join(["a b c"] * 8)


async def test_a_client_looks_its_models_up(server: Server) -> None:
    """The SDK finds every model, an alias as one of its own, ready, with its context length."""
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
        models = {model.id: model.model_dump() async for model in client.models.list()}
    assert set(models) == {SMOLLM, ALIAS, ECHO, UPSTREAM, REFUSING}
    assert models[SMOLLM]["max_context_length"] == 4096
    assert models[SMOLLM]["license_name"] == "Apache-2.0"
    assert {model["state"] for model in models.values()} == {"ready"}
