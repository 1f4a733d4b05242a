"""konko 0.5.0 upon openai 1.109.1, the last of both their lines."""

from __future__ import annotations

from typing import Any

import konko  # type: ignore[import-not-found]  # only this script's own environment has it
import openai

from tests.end_to_end.smollm import ALIAS, ECHO, PARIS, SMOLLM
from tests.end_to_end.smollm.clients.checks import ANSWER, refused, run

MESSAGES = [{"role": "user", "content": PARIS}]
REPETITION = [{"role": "user", "content": "Count from one to twenty in words."}]
PROMPT = {"model": SMOLLM, "prompt": "The capital of France is", "temperature": 0, "max_tokens": 8}
OPENAI_KEY = "X-OpenAI-Api-Key"


def ask(**parameters: Any) -> Any:
    """What the module's chat call gives for the question whose answer is known."""
    return konko.chat.completions.create(
        **{"model": SMOLLM, "messages": MESSAGES, "temperature": 0} | parameters
    )


def text(chunks: list[Any]) -> str:
    """What the chunks of a chat stream say together."""
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def check_chat() -> None:
    """A chat is answered whole, with its usage."""
    answer = ask(n=1, max_tokens=24, top_p=1)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", ANSWER)
    assert choice.finish_reason == "stop"
    assert answer.model == SMOLLM
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def check_chat_streamed() -> None:
    """A chat is streamed, usage at its end where it is asked for."""
    chunks = list(ask(stream=True))
    assert text(chunks) == ANSWER
    assert [choice.finish_reason for choice in chunks[-1].choices] == ["stop"]
    counted = list(ask(stream=True, stream_options={"include_usage": True}))
    assert text(counted) == ANSWER
    assert counted[-1].usage.completion_tokens == ask().usage.completion_tokens


def check_default_length() -> None:
    """A chat that gives no max_tokens gets the 24 of Konko's page."""
    answer = ask(messages=REPETITION)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 24


def check_null_parameters() -> None:
    """Every optional parameter may be None, which the client sends as null."""
    names = ("max_tokens", "stream", "top_p", "frequency_penalty", "presence_penalty", "logit_bias", "n")
    answer = ask(**dict.fromkeys([*names, "seed", "stop"]), extra_body={"repetition_penalty": None})
    assert answer.choices[0].message.content == ANSWER


def check_repetition_penalty() -> None:
    """Konko's own parameter goes into the body beside OpenAI's, is neutral at 0 and changes the text at 2,
    the same whole and streamed."""
    short = {"messages": REPETITION, "max_tokens": 8}
    plain, neutral, penalised = (
        ask(**short, extra_body=body).choices[0].message.content
        for body in ({}, {"repetition_penalty": 0}, {"repetition_penalty": 2})
    )
    assert plain == neutral != penalised
    streamed = list(ask(**short, stream=True, extra_body={"repetition_penalty": 2}))
    assert text(streamed) == penalised


def check_completion() -> None:
    """A prompt is completed whole, by 16 tokens where nothing is asked."""
    answer = konko.completions.create(model=SMOLLM, prompt="The capital of France is", temperature=0)
    (choice,) = answer.choices
    assert answer.object == "text_completion"
    assert "Paris" in choice.text
    assert answer.usage.completion_tokens <= 16


def check_completion_streamed() -> None:
    """A prompt is completed in a stream, by the same text."""
    whole = konko.completions.create(**PROMPT)
    chunks = list(konko.completions.create(**PROMPT, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def check_model_list() -> None:
    """The models are listed, with what Konko says of each beside OpenAI's fields."""
    models = {model.id: model for model in konko.models.list()}
    assert {SMOLLM, ALIAS, ECHO} <= models.keys()
    for model in models.values():
        assert model.object == "model"
        assert model.name == model.id
        assert model.is_chat is True
    assert models[SMOLLM].max_context_length == 4096


def check_model_retrieve() -> None:
    """A model is retrieved by its id, whose slash the client sends as it is."""
    for name in (SMOLLM, ALIAS, ALIAS.upper()):
        assert konko.models.retrieve(name).id.casefold() == name.casefold()
    unknown = refused(openai.NotFoundError, konko.models.retrieve, model="team/nobody")
    assert unknown.code == "model_not_found"


def check_client() -> None:
    """The client class does what the module does."""
    with konko.Konko() as client:
        assert client.chat.completions.create(model=ALIAS, messages=MESSAGES, temperature=0).model == ALIAS
        stream = client.chat.completions.create(model=SMOLLM, messages=MESSAGES, temperature=0, stream=True)
        assert text(list(stream)) == ANSWER
        completion = client.completions.create(**PROMPT)
        assert "Paris" in completion.choices[0].text
        pieces = client.completions.create(**PROMPT, stream=True)
        assert "".join(chunk.choices[0].text for chunk in pieces) == completion.choices[0].text
        assert SMOLLM in [model.id for model in client.models.list()]
        assert client.models.retrieve(ALIAS).id == ALIAS


async def check_async_client() -> None:
    """The asynchronous client class does so too."""
    async with konko.AsyncKonko() as client:
        request = {"model": SMOLLM, "messages": MESSAGES, "temperature": 0}
        answer = await client.chat.completions.create(**request)
        assert answer.choices[0].message.content == ANSWER
        stream = await client.chat.completions.create(**request, stream=True)
        assert text([chunk async for chunk in stream]) == ANSWER
        completion = await client.completions.create(**PROMPT)
        assert "Paris" in completion.choices[0].text
        pieces = await client.completions.create(**PROMPT, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in pieces]) == completion.choices[0].text
        assert SMOLLM in [model.id async for model in client.models.list()]
        assert (await client.models.retrieve(ALIAS)).id == ALIAS


def check_openai_key() -> None:
    """The caller's key for OpenAI may come with every request for a hosted model, from the environment or
    with the call."""
    request = {"model": SMOLLM, "messages": MESSAGES, "temperature": 0}
    with konko.Konko(openai_api_key="of-the-client") as client:
        for extra, sent in ({}, "of-the-client"), ({OPENAI_KEY: "of-the-call"}, "of-the-call"):
            raw = client.chat.completions.with_raw_response.create(**request, extra_headers=extra)
            assert raw.http_request.headers[OPENAI_KEY] == sent
            assert raw.parse().choices[0].message.content == ANSWER


def check_bad_request() -> None:
    """What is out of range is a BadRequestError, streamed or not, that names the parameter."""
    for stream in (False, True):
        error = refused(openai.BadRequestError, ask, temperature=3, stream=stream)
        assert (error.param, error.code) == ("temperature", "invalid_value")
        assert error.type == "invalid_request_error"
    error = refused(openai.BadRequestError, ask, messages=[])
    assert error.param == "messages"
    error = refused(openai.BadRequestError, ask, extra_body={"repetition_penalty": 2.5})
    assert error.param == "repetition_penalty"


def check_unknown_model() -> None:
    """A model that is not there is a NotFoundError, for each way to name one."""
    errors = [
        refused(openai.NotFoundError, ask, model="nobody"),
        refused(openai.NotFoundError, ask, model="nobody", stream=True),
        refused(openai.NotFoundError, konko.completions.create, model="nobody", prompt="hi"),
    ]
    for error in errors:
        assert (error.param, error.code) == ("model", "model_not_found")


def check_embeddings_are_not_served() -> None:
    """Embeddings are a NotFoundError that says so."""
    error = refused(openai.NotFoundError, konko.embeddings.create, model="text-embedding-ada-002", input="hi")
    assert '"/v1/embeddings" is not served' in error.message


if __name__ == "__main__":
    run()
