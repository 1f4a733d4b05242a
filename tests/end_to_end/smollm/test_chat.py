from __future__ import annotations

import openai
import pytest
from openai.types.chat import ChatCompletionUserMessageParam

from tests.end_to_end.client import ask, asking, chat
from tests.end_to_end.server import Server
from tests.end_to_end.smollm import ALIAS, ECHO, PARIS, SMOLLM, UPSTREAM

QUESTION: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": PARIS}]
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


def test_the_sdk_gets_an_answer(server: Server) -> None:
    """The openai SDK reads a whole answer."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
        answer = client.chat.completions.create(model=SMOLLM, messages=QUESTION, temperature=0)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].message.role == "assistant"
    assert answer.model == SMOLLM
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_the_sdk_gets_a_stream(server: Server) -> None:
    """The openai SDK reads a stream, chunk by chunk, usage at its end."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
        stream = client.chat.completions.create(
            model=SMOLLM,
            messages=QUESTION,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == ANSWER
    assert [choice.finish_reason for choice in chunks[-2].choices] == ["stop"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 1


def test_the_sdk_gathers_a_stream(server: Server) -> None:
    """The openai SDK's accumulator, which is strict about roles, makes the whole answer of a stream."""
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="any") as client,
        client.chat.completions.stream(model=SMOLLM, messages=QUESTION, temperature=0) as stream,
    ):
        message = stream.get_final_completion().choices[0].message
    assert message.content == ANSWER
    assert message.role == "assistant"


async def test_the_sdk_works_without_threads(server: Server) -> None:
    """The openai SDK's asynchronous client reads a whole answer and a stream."""
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
        answer = await client.chat.completions.create(model=SMOLLM, messages=QUESTION, temperature=0)
        stream = await client.chat.completions.create(
            model=SMOLLM, messages=QUESTION, temperature=0, stream=True
        )
        pieces = [choice.delta.content or "" async for chunk in stream for choice in chunk.choices]
    assert answer.choices[0].message.content == "".join(pieces) == ANSWER


def test_the_sdk_knows_our_errors(server: Server) -> None:
    """The openai SDK raises its own exceptions for our refusals, each with field and code."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError) as unknown:
            client.chat.completions.create(model="nobody", messages=QUESTION)
        with pytest.raises(openai.BadRequestError) as wrong:
            client.chat.completions.create(model=SMOLLM, messages=QUESTION, temperature=3)
    assert unknown.value.code == "model_not_found"
    assert wrong.value.param == "temperature"


async def test_models_serve_side_by_side(server: Server) -> None:
    """Two hosted models stream at once under their names, and neither waits for the other."""
    slow = chat(SMOLLM, "Tell me a long story.", max_tokens=64, stream=True, ignore_eos=True)
    async with asking(server, slow) as story, asking(server, chat(ECHO, "a b c", stream=True)) as echo:
        await story.first()
        await echo.first()
        assert not story.ended.done()
        assert not echo.ended.done()
        await story.end()
        await echo.end()
    assert {chunk["model"] for chunk in story.chunks} == {SMOLLM}
    assert {chunk["model"] for chunk in echo.chunks} == {ECHO}
    assert echo.text() == " ".join(["a b c"] * 8)


async def test_a_client_looks_its_models_up(server: Server) -> None:
    """The SDK finds every model, an alias as one of its own, ready, with its context length."""
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
        models = {model.id: model.model_dump() async for model in client.models.list()}
    assert set(models) == {SMOLLM, ALIAS, ECHO, UPSTREAM}
    assert models[SMOLLM]["max_context_length"] == 4096
    assert models[SMOLLM]["license_name"] == "Apache-2.0"
    assert {model["state"] for model in models.values()} == {"ready"}
