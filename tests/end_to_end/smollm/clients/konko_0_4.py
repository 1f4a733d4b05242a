"""konko 0.4.1 upon openai 0.27.10, the last of both before openai's client was rewritten."""

from __future__ import annotations

from typing import Any

import konko  # type: ignore[import-not-found]  # only this script's own environment has it
from konko import openai  # what konko is built upon; the type checker knows a later one

from tests.end_to_end.smollm import ALIAS, ECHO, PARIS, SMOLLM
from tests.end_to_end.smollm.clients.checks import ANSWER, refused, run

QUESTION = {"model": SMOLLM, "messages": [{"role": "user", "content": PARIS}], "temperature": 0}
COUNT = {**QUESTION, "messages": [{"role": "user", "content": "Count from one to twenty in words."}]}
PROMPT = {"model": SMOLLM, "prompt": "The capital of France is", "temperature": 0}

InvalidRequestError: type[Any] = openai.error.InvalidRequestError
APIError: type[Any] = openai.error.APIError


def text(chunks: list[Any]) -> str:
    """What the chunks of a chat stream say together."""
    return "".join(choice.delta.get("content", "") for chunk in chunks for choice in chunk.choices)


def check_chat() -> None:
    """A chat is answered whole, with its usage."""
    answer = konko.ChatCompletion.create(**QUESTION, n=1, max_tokens=24)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", ANSWER)
    assert choice.finish_reason == "stop"
    assert answer.model == SMOLLM
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def check_chat_streamed() -> None:
    """A chat is streamed."""
    chunks = list(konko.ChatCompletion.create(**QUESTION, stream=True))
    assert text(chunks) == ANSWER
    assert [choice.finish_reason for choice in chunks[-1].choices] == ["stop"]


async def check_async_chat() -> None:
    """A chat is answered whole and streamed without threads too."""
    answer = await konko.ChatCompletion.acreate(**QUESTION)
    assert answer.choices[0].message.content == ANSWER
    stream = await konko.ChatCompletion.acreate(**QUESTION, stream=True)
    assert text([chunk async for chunk in stream]) == ANSWER


def check_default_length() -> None:
    """A chat that gives no max_tokens gets the 24 of Konko's page."""
    answer = konko.ChatCompletion.create(**COUNT)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 24


def check_repetition_penalty() -> None:
    """Konko's own parameter is one like any other, is neutral at 0 and changes the text at 2, the same whole
    and streamed."""
    short = {**COUNT, "max_tokens": 8}
    plain, neutral, penalised = (
        konko.ChatCompletion.create(**short, **given).choices[0].message.content
        for given in ({}, {"repetition_penalty": 0}, {"repetition_penalty": 2})
    )
    assert plain == neutral != penalised
    assert text(list(konko.ChatCompletion.create(**short, repetition_penalty=2, stream=True))) == penalised


def check_completion() -> None:
    """A prompt is completed whole and streamed, by the same text; this konko leaves that to the openai below
    it."""
    whole = openai.Completion.create(**PROMPT)
    assert whole.object == "text_completion"
    assert "Paris" in whole.choices[0].text
    assert whole.usage.completion_tokens == 16
    chunks = list(openai.Completion.create(**PROMPT, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"


async def check_async_completion() -> None:
    """A prompt is completed whole and streamed without threads too."""
    whole = await openai.Completion.acreate(**PROMPT)
    assert "Paris" in whole.choices[0].text
    stream = await openai.Completion.acreate(**PROMPT, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == whole.choices[0].text


async def check_async_models() -> None:
    """The models are listed and retrieved so."""
    assert {SMOLLM, ALIAS, ECHO} <= {model.id for model in (await konko.Model.alist()).data}
    for name in (SMOLLM, ALIAS):
        assert (await konko.Model.aretrieve(name)).id == name


def check_model_list() -> None:
    """The models are listed, with what Konko says of each beside OpenAI's fields."""
    models = {model.id: model for model in konko.Model.list().data}
    assert {SMOLLM, ALIAS, ECHO} <= models.keys()
    assert all(model.name == model.id and model.is_chat for model in models.values())
    assert models[SMOLLM].max_context_length == 4096


def check_model_retrieve() -> None:
    """A model is retrieved by its id, whose slash the client quotes."""
    for name in (SMOLLM, ALIAS, ALIAS.upper()):
        assert konko.Model.retrieve(name).id.casefold() == name.casefold()
    unknown = refused(InvalidRequestError, konko.Model.retrieve, id="team/nobody")
    assert (unknown.http_status, unknown.code) == (404, "model_not_found")


def check_openai_key() -> None:
    """The caller's key for OpenAI may come with every request for a hosted model."""
    konko.set_openai_api_key("another")
    assert konko.ChatCompletion.create(**QUESTION).choices[0].message.content == ANSWER
    assert konko.Model.list().data


def check_invalid_request() -> None:
    """What is out of range, and what is not there, is an InvalidRequestError that names the parameter,
    streamed or not."""
    wrong: list[tuple[dict[str, Any], int, str, str]] = [
        ({"temperature": 3}, 400, "temperature", "invalid_value"),
        ({"repetition_penalty": 2.5}, 400, "repetition_penalty", "invalid_value"),
        ({"messages": []}, 400, "messages", "invalid_value"),
        ({"model": "nobody"}, 404, "model", "model_not_found"),
    ]
    for parameters, status, param, code in wrong:
        for stream in (False, True):
            body = {**QUESTION, **parameters, "stream": stream}
            error = refused(InvalidRequestError, konko.ChatCompletion.create, **body)
            assert (error.http_status, error.param, error.code) == (status, param, code)


def check_what_is_not_served() -> None:
    """Every other endpoint that the clients know is an InvalidRequestError that says it is not served."""
    calls = {
        "embeddings": lambda: konko.Embedding.create(model="text-embedding-ada-002", input="hi"),
        "edits": lambda: openai.Edit.create(model=SMOLLM, instruction="hi"),
        "moderations": lambda: openai.Moderation.create(input="hi"),
        "images/generations": lambda: openai.Image.create(prompt="hi"),
        "files": openai.File.list,
        "fine-tunes": openai.FineTune.list,
        "fine_tuning/jobs": openai.FineTuningJob.list,
        "engines": openai.Engine.list,
    }
    for path, call in calls.items():
        error = refused(InvalidRequestError, call)
        assert (error.http_status, error.code) == (404, "unknown_url")
        assert f'"/v1/{path}" is not served' in str(error)


def check_wrong_method() -> None:
    """A model cannot be deleted, which the client says is an error of the API."""
    error = refused(APIError, konko.Model.delete, sid=SMOLLM)
    assert error.http_status == 405


if __name__ == "__main__":
    run()
