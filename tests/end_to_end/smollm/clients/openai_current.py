"""The current openai, whose helpers read streams and structured output more strictly than its calls do."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any, Literal

import openai
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionUserMessageParam
from pydantic import BaseModel
from pydantic_core import from_json

from tests.end_to_end.smollm import ALIAS, ECHO, PARIS, REFUSING, SMOLLM, UPSTREAM
from tests.end_to_end.smollm.clients.checks import ANSWER, refused, run

QUESTION: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": PARIS}]
WEATHER: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": "How warm is it in Paris?"}]
PROMPT = "The capital of France is"

MOST_IN_FLIGHT = 1024
"""The choices that a model generates at once, unless its configuration says otherwise."""

client = openai.OpenAI(max_retries=0)  # a second try would hide what the first one met


class Capital(BaseModel):
    """A capital city. Nothing in it can be written without end."""

    city: Literal["Paris", "Rome"]
    country: Literal["France", "Italy"]
    large: bool


class Weather(BaseModel):
    """Look up how warm it is in a city."""

    city: Literal["Paris", "Rome"]


TOOL = openai.pydantic_function_tool(Weather)


def ask(**parameters: Any) -> ChatCompletion:
    """The whole answer to the question whose answer is known."""
    body = {"model": SMOLLM, "messages": QUESTION, "temperature": 0, **parameters}
    answer: ChatCompletion = client.chat.completions.create(**body)
    return answer


def text(chunks: list[ChatCompletionChunk]) -> str:
    """What the chunks of a stream with one choice say together."""
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


# ---- chat ---------------------------------------------------------------------------------------------


def check_chat() -> None:
    """A chat is answered whole, with its usage."""
    answer = ask()
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", ANSWER)
    assert choice.finish_reason == "stop"
    assert (answer.object, answer.model) == ("chat.completion", SMOLLM)
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def check_chat_streamed() -> None:
    """A chat is streamed, usage in a chunk of its own at its end."""
    stream = client.chat.completions.create(
        model=SMOLLM,
        messages=QUESTION,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = stream
    assert text(chunks) == ANSWER
    assert [choice.finish_reason for choice in chunks[-1].choices] == ["stop"]
    assert last.choices == []
    assert last.usage == ask().usage


def check_messages_of_every_kind() -> None:
    """Every role and both forms of content are taken, and names."""
    answer = ask(
        messages=[
            {"role": "developer", "content": "Answer in one sentence."},
            {
                "role": "system",
                "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}],
            },
            {"role": "user", "content": "Who are you?", "name": "ann"},
            {"role": "assistant", "content": "A model."},
            {"role": "user", "content": [{"type": "text", "text": PARIS}]},
        ]
    )
    assert answer.choices[0].message.content


def check_parameters_of_every_kind() -> None:
    """Every parameter of the client's that a text model can honour, or that changes nothing, is taken."""
    answer = ask(
        max_completion_tokens=8,
        frequency_penalty=0.1,
        presence_penalty=-0.1,
        logit_bias={"0": -100},
        metadata={"purpose": "test"},
        n=1,
        parallel_tool_calls=True,
        prompt_cache_key="key",
        response_format={"type": "text"},
        safety_identifier="someone",
        seed=-1,
        service_tier="auto",
        stop=["never said"],
        store=False,
        top_logprobs=None,
        top_p=0.9,
        user="someone",
        extra_body={"top_k": 5, "min_p": 0.01, "repetition_penalty": 0},
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 8


def check_several_choices() -> None:
    """Choices come under their indices, whole and accumulated from a stream, and are counted together."""
    answer = ask(n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.message.content for choice in answer.choices] == [ANSWER] * 3
    one = ask().usage
    assert answer.usage is not None
    assert one is not None
    assert answer.usage.completion_tokens == 3 * one.completion_tokens
    with client.chat.completions.stream(model=SMOLLM, messages=QUESTION, temperature=0, n=3) as stream:
        streamed = stream.get_final_completion()
    assert [choice.message.content for choice in streamed.choices] == [ANSWER] * 3


def check_logprobs() -> None:
    """Each token has its log probability and as many others as were asked for, whole and accumulated from a
    stream."""
    asked: dict[str, Any] = {"temperature": 0, "logprobs": True, "top_logprobs": 2}
    with client.chat.completions.stream(model=SMOLLM, messages=QUESTION, **asked) as stream:
        streamed = stream.get_final_completion()
    for choice in (ask(**asked).choices[0], streamed.choices[0]):
        assert choice.logprobs is not None
        tokens = choice.logprobs.content
        assert tokens is not None
        # The token that ends the answer is one of them, as with vLLM.
        assert "".join(token.token for token in tokens) == f"{ANSWER}<|im_end|>"
        for token in tokens:
            likeliest, second = token.top_logprobs
            assert token.logprob == likeliest.logprob > second.logprob  # as temperature 0 chooses


# ---- the stream helper --------------------------------------------------------------------------------


def check_stream_helper() -> None:
    """The helper's events carry the text piece by piece, and its accumulated message is the whole answer."""
    whole = ask()
    with client.chat.completions.stream(
        model=SMOLLM, messages=QUESTION, temperature=0, stream_options={"include_usage": True}
    ) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    assert "".join(event.delta for event in events if event.type == "content.delta") == ANSWER
    assert [event.content for event in events if event.type == "content.done"] == [ANSWER]
    assert final.choices[0].message.role == "assistant"
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason
    assert final.usage == whole.usage


def check_stream_left_early() -> None:
    """A stream that is closed after its first chunk leaves the client fit for the next request."""
    with client.chat.completions.create(
        model=SMOLLM, messages=QUESTION, max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        assert next(stream).choices[0].delta.role == "assistant"
    assert ask().choices[0].message.content == ANSWER


# ---- structured output --------------------------------------------------------------------------------


def check_parse() -> None:
    """parse() gives an object of the class that it was handed."""
    answer = client.chat.completions.parse(
        model=SMOLLM, messages=QUESTION, temperature=0, max_tokens=100, response_format=Capital
    )
    assert isinstance(answer.choices[0].message.parsed, Capital)
    assert answer.choices[0].finish_reason == "stop"


def check_parse_streamed() -> None:
    """The stream helper gives such an object too, from text without idle white space."""
    with client.chat.completions.stream(
        model=SMOLLM, messages=QUESTION, temperature=0, max_tokens=100, response_format=Capital
    ) as stream:
        message = stream.get_final_completion().choices[0].message
    assert isinstance(message.parsed, Capital)
    assert message.content is not None
    assert not re.search(r"\s\s", message.content)


def check_parse_cut_short() -> None:
    """An object that does not fit into max_tokens is the client's own error."""
    refused(
        openai.LengthFinishReasonError,
        client.chat.completions.parse,
        model=SMOLLM,
        messages=QUESTION,
        max_tokens=3,
        response_format=Capital,
    )


def check_json_object() -> None:
    """The JSON mode writes one JSON object and nothing else, as far as max_tokens lets it."""
    content = ask(response_format={"type": "json_object"}, max_tokens=60).choices[0].message.content
    assert content is not None
    assert isinstance(from_json(content, allow_partial=True), dict)


def check_malformed_schema() -> None:
    """A schema that is none is a BadRequestError."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}
    error = refused(openai.BadRequestError, ask, response_format=form)
    assert error.param is not None
    assert error.param.startswith("response_format")


# ---- tools --------------------------------------------------------------------------------------------


def check_tool_required() -> None:
    """A tool that must be called is called, with arguments of its class."""
    answer = client.chat.completions.parse(
        model=SMOLLM,
        messages=WEATHER,
        temperature=0,
        max_tokens=100,
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.function.name == "Weather"
    assert isinstance(call.function.parsed_arguments, Weather)
    assert call.id


def check_tool_named() -> None:
    """So is a tool that is named."""
    answer = ask(
        messages=WEATHER,
        max_tokens=100,
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "Weather"}},
    )
    assert answer.choices[0].message.tool_calls is not None
    (call,) = answer.choices[0].message.tool_calls
    assert call.type == "function"
    assert call.function.name == "Weather"
    Weather.model_validate_json(call.function.arguments)


def check_tool_streamed() -> None:
    """The stream helper accumulates a tool call's arguments, whether it is required or named."""
    for choice in ("required", {"type": "function", "function": {"name": "Weather"}}):
        body: dict[str, Any] = {"tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 100}
        with client.chat.completions.stream(
            model=SMOLLM, messages=WEATHER, temperature=0, tools=[TOOL], **body
        ) as stream:
            done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
            message = stream.get_final_completion().choices[0].message
        assert message.tool_calls is not None
        (call,) = message.tool_calls
        assert call.function.name == "Weather"
        assert isinstance(call.function.parsed_arguments, Weather)
        assert [event.parsed_arguments for event in done] == [call.function.parsed_arguments]


def check_tool_left_to_the_model() -> None:
    """Where the model may choose, it answers in one way or the other, whole and streamed."""
    for tool_choice in ("auto", "none"):
        message = (
            ask(messages=WEATHER, tools=[TOOL], tool_choice=tool_choice, max_tokens=6).choices[0].message
        )
        assert message.content or message.tool_calls
        stream = client.chat.completions.create(
            model=SMOLLM,
            messages=WEATHER,
            temperature=0,
            max_tokens=6,
            tools=[TOOL],
            tool_choice=tool_choice,
            stream=True,
        )
        assert text(list(stream)) == (message.content or "")


def check_tool_result() -> None:
    """A conversation goes on after a tool call and its result."""
    call = {"id": "c1", "type": "function", "function": {"name": "Weather", "arguments": '{"city":"Paris"}'}}
    answer = ask(
        messages=[
            *WEATHER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "21 degrees"},
        ],
        tools=[TOOL],
    )
    assert answer.choices[0].finish_reason in {"stop", "length", "tool_calls"}


# ---- completions --------------------------------------------------------------------------------------


def check_completion() -> None:
    """A prompt is completed whole and streamed, by the same text of 16 tokens where nothing is asked."""
    whole = client.completions.create(model=SMOLLM, prompt=PROMPT, temperature=0)
    assert (whole.object, whole.model) == ("text_completion", SMOLLM)
    assert "Paris" in whole.choices[0].text
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 16
    stream = client.completions.create(model=SMOLLM, prompt=PROMPT, temperature=0, stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"


def check_completion_of_several_prompts() -> None:
    """Several prompts at once are completed in their order, as strings and as tokens."""
    prompts = [PROMPT, "One, two, three, four,"]
    texts = [choice.text for choice in complete(prompt=prompts).choices]
    assert texts == [complete(prompt=prompt).choices[0].text for prompt in prompts]
    tokens = [[504, 3575, 282, 4649, 314], [2705, 28, 827, 28, 1296, 28, 1876, 28]]  # the same, encoded
    assert texts == [choice.text for choice in complete(prompt=tokens).choices]
    assert complete(prompt=tokens[0]).choices[0].text == texts[0]


def check_completion_echo() -> None:
    """The prompt comes back before its completion where that is asked for."""
    assert complete(echo=True).choices[0].text == PROMPT + complete().choices[0].text


def check_completion_logprobs() -> None:
    """Each token of a completion has its log probability."""
    choice = complete(logprobs=2).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert "".join(choice.logprobs.tokens) == choice.text
    assert len(choice.logprobs.token_logprobs or ()) == len(choice.logprobs.tokens)


def check_completion_suffix() -> None:
    """A suffix is a BadRequestError that names it."""
    assert refused(openai.BadRequestError, complete, suffix="!").param == "suffix"


def complete(**parameters: Any) -> openai.types.Completion:
    """The whole completion of the prompt."""
    body = {"model": SMOLLM, "prompt": PROMPT, "temperature": 0, "max_tokens": 4, **parameters}
    completion: openai.types.Completion = client.completions.create(**body)
    return completion


# ---- models -------------------------------------------------------------------------------------------


def check_model_list() -> None:
    """The models are listed, with more about each than OpenAI says."""
    models = {model.id: model.model_dump() for model in client.models.list()}
    assert {SMOLLM, ALIAS, ECHO} <= models.keys()
    assert {model["object"] for model in models.values()} == {"model"}
    assert models[SMOLLM]["max_context_length"] == models[ALIAS]["max_context_length"] == 4096
    assert {models[name]["state"] for name in (SMOLLM, ALIAS, ECHO)} == {"ready"}


def check_model_retrieve() -> None:
    """A model is retrieved by its id, whose slash the client quotes."""
    for name in (SMOLLM, ALIAS):
        assert client.models.retrieve(name).id == client.models.retrieve(name.upper()).id == name


# ---- other ways to call -------------------------------------------------------------------------------


def check_raw_response() -> None:
    """The response itself can be had, with the request's id in its headers."""
    raw = client.chat.completions.with_raw_response.create(
        model=SMOLLM, messages=QUESTION, temperature=0, extra_headers={"x-request-id": "from-the-caller"}
    )
    assert raw.headers["x-request-id"] == raw.request_id == "from-the-caller"
    assert raw.parse().choices[0].message.content == ANSWER
    assert ask()._request_id


def check_streaming_response() -> None:
    """The lines of a stream can be read as they come, to [DONE]."""
    with client.chat.completions.with_streaming_response.create(
        model=SMOLLM, messages=QUESTION, temperature=0, stream=True
    ) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    deltas = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines[:-1]]
    assert "".join(delta.get("content") or "" for delta in deltas) == ANSWER


async def check_async_chat() -> None:
    """The asynchronous client answers, streams, accumulates and parses."""
    async with openai.AsyncOpenAI(max_retries=0) as asynchronous:
        chat = asynchronous.chat.completions
        answer = await chat.create(model=SMOLLM, messages=QUESTION, temperature=0)
        assert answer.choices[0].message.content == ANSWER
        chunks = await chat.create(model=SMOLLM, messages=QUESTION, temperature=0, stream=True)
        assert text([chunk async for chunk in chunks]) == ANSWER
        async with chat.stream(model=SMOLLM, messages=QUESTION, temperature=0) as stream:
            final = await stream.get_final_completion()
        assert final.choices[0].message.content == ANSWER


async def check_async_parse() -> None:
    """The asynchronous client parses structured output."""
    async with openai.AsyncOpenAI(max_retries=0) as asynchronous:
        answer = await asynchronous.chat.completions.parse(
            model=SMOLLM, messages=QUESTION, temperature=0, max_tokens=100, response_format=Capital
        )
    assert isinstance(answer.choices[0].message.parsed, Capital)


async def check_async_models() -> None:
    """The asynchronous client lists and retrieves models."""
    async with openai.AsyncOpenAI(max_retries=0) as asynchronous:
        assert {SMOLLM, ALIAS, ECHO} <= {model.id async for model in asynchronous.models.list()}
        assert (await asynchronous.models.retrieve(ALIAS)).id == ALIAS


async def check_async_completion() -> None:
    """The asynchronous client completes prompts."""
    async with openai.AsyncOpenAI(max_retries=0) as asynchronous:
        completion = await asynchronous.completions.create(
            model=SMOLLM, prompt=PROMPT, temperature=0, max_tokens=4
        )
    assert completion.choices[0].text == complete().choices[0].text


# ---- errors -------------------------------------------------------------------------------------------


def check_bad_request() -> None:
    """What is missing, mistyped or out of range is a BadRequestError that names the parameter."""
    wrong: list[tuple[str, Any]] = [
        ("temperature", 3),
        ("messages", []),
        ("n", 129),
        ("stop", ["x"] * 5),
        ("max_tokens", "many"),
        ("model", 5),
    ]
    for param, value in wrong:
        error = refused(openai.BadRequestError, ask, **{param: value})
        assert (error.param, error.code, error.type) == (param, "invalid_value", "invalid_request_error")
        assert param in error.message
        assert error.request_id


def check_prompt_too_long() -> None:
    """A prompt that leaves no room in the context is a BadRequestError, streamed or not."""
    messages = [{"role": "user", "content": "word " * 5000}]
    for stream in (False, True):
        error = refused(openai.BadRequestError, ask, messages=messages, stream=stream)
        assert error.code == "context_length_exceeded"
        assert error.param == "messages"


def check_unknown_model() -> None:
    """A model that is not there is a NotFoundError."""
    for call in (ask, complete, client.models.retrieve):
        error = refused(openai.NotFoundError, call, model="team/nobody")
        assert (error.param, error.code) == ("model", "model_not_found")
        assert "team/nobody" in error.message


def check_key_of_the_provider() -> None:
    """A model of a provider asked without a key for it is an AuthenticationError that names the header."""
    error = refused(openai.AuthenticationError, ask, model=UPSTREAM)
    assert error.code == "missing_provider_key"
    assert "X-OpenAI-Api-Key" in error.message


def check_provider_out_of_reach() -> None:
    """A provider that is not there is an InternalServerError of 502."""
    key = {"X-OpenAI-Api-Key": "a-key"}
    error = refused(openai.InternalServerError, ask, model=UPSTREAM, extra_headers=key)
    assert error.status_code == 502
    assert "a-key" not in str(error)


def check_every_status() -> None:
    """Whatever status a provider answers with, the exception is the one that OpenAI's own would be, in the
    provider's words."""
    kinds: dict[int, type[openai.APIStatusError]] = {
        400: openai.BadRequestError,
        401: openai.AuthenticationError,
        403: openai.PermissionDeniedError,
        404: openai.NotFoundError,
        409: openai.ConflictError,
        418: openai.APIStatusError,
        422: openai.UnprocessableEntityError,
        429: openai.RateLimitError,
        500: openai.InternalServerError,
        503: openai.InternalServerError,
    }
    for status, kind in kinds.items():
        error = refused(kind, ask_provider, user=str(status))
        assert error.status_code == status
        assert (error.param, error.code, error.type) == ("user", "asked_for", "of_theirs")
        assert f"{status} it is" in error.message


def check_provider_that_is_late() -> None:
    """A provider that does not answer in time is an InternalServerError of 504."""
    error = refused(openai.InternalServerError, ask_provider, user="late")
    assert (error.status_code, error.code) == (504, "first_token_timeout")


def check_stream_that_breaks_off() -> None:
    """A stream that cannot go on raises an APIError in its midst, after what it has said."""
    stream: Any = ask_provider(user="begun", stream=True)
    said: list[str] = []

    def listen() -> None:
        for chunk in stream:
            said.append(chunk.choices[0].delta.content)  # noqa: PERF401 - what came before the error counts

    assert refused(openai.APIError, listen).code == "upstream_failed"
    assert said == ["Par"]


def ask_provider(**parameters: Any) -> ChatCompletion:
    """The answer of a provider that does what its `user` asks."""
    return ask(model=REFUSING, extra_headers={"X-OpenAI-Api-Key": "a-key"}, **parameters)


def check_no_connection() -> None:
    """A port at which nobody listens is an APIConnectionError."""
    with openai.OpenAI(base_url="http://127.0.0.1:9/v1", max_retries=0) as nowhere:
        create = nowhere.chat.completions.create
        refused(openai.APIConnectionError, create, model=SMOLLM, messages=QUESTION)


def check_wrong_method() -> None:
    """What cannot be done to a path that is served is an APIStatusError of 405."""
    listed = refused(openai.APIStatusError, client.chat.completions.list)
    deleted = refused(openai.APIStatusError, client.models.delete, model=SMOLLM)
    for error in (listed, deleted):
        assert (error.status_code, error.code) == (405, "method_not_allowed")


def check_body_too_large() -> None:
    """A body over the limit is an APIStatusError of 413."""
    messages = [{"role": "user", "content": "x" * 5_000_000}]
    error = refused(openai.APIStatusError, ask, messages=messages)
    assert (error.status_code, error.code) == (413, "body_too_large")
    assert ask().choices[0].message.content == ANSWER


def check_body_of_another_type() -> None:
    """A body that does not say that it is JSON is an APIStatusError of 415."""
    error = refused(openai.APIStatusError, ask, extra_headers={"Content-Type": "text/plain"})
    assert error.status_code == 415


def check_timeout() -> None:
    """An answer that takes longer than the client waits is an APITimeoutError, and the client goes on."""
    hurried = client.with_options(timeout=0.2)
    refused(
        openai.APITimeoutError,
        hurried.chat.completions.create,
        model=SMOLLM,
        messages=QUESTION,
        max_tokens=2000,
        extra_body={"ignore_eos": True},
    )
    assert ask().choices[0].message.content == ANSWER


async def check_rate_limit() -> None:
    """A request for which no place comes free is a RateLimitError that says when to come back."""
    async with openai.AsyncOpenAI(max_retries=0) as asynchronous:
        create = asynchronous.chat.completions.create
        try:
            async with asyncio.TaskGroup() as calls:  # the first to be refused ends the others
                for _ in range(MOST_IN_FLIGHT // 128 + 1):
                    calls.create_task(create(model=SMOLLM, messages=QUESTION, n=128, max_tokens=2000))
        except* openai.RateLimitError as refusals:
            error = refusals.exceptions[0]
    assert isinstance(error, openai.RateLimitError)
    assert error.code == "overloaded"
    assert int(error.response.headers["retry-after"]) >= 1


# ---- what is not served -------------------------------------------------------------------------------


def check_what_is_not_served() -> None:
    """Each other endpoint that the client knows is a NotFoundError that says so."""
    calls: dict[str, Callable[[], object]] = {
        "audio/speech": lambda: client.audio.speech.create(model=SMOLLM, input="hi", voice="alloy"),
        "audio/transcriptions": lambda: client.audio.transcriptions.create(model=SMOLLM, file=b"hi"),
        "batches": client.batches.list,
        "chat/completions/of-yesterday": lambda: client.chat.completions.retrieve("of-yesterday"),
        "containers": client.containers.list,
        "conversations": client.conversations.create,
        "embeddings": lambda: client.embeddings.create(model=SMOLLM, input="hi"),
        "evals": client.evals.list,
        "files": lambda: client.files.create(file=b"hi", purpose="batch"),
        "fine_tuning/jobs": client.fine_tuning.jobs.list,
        "images/generations": lambda: client.images.generate(prompt="hi"),
        "moderations": lambda: client.moderations.create(input="hi"),
        "realtime/client_secrets": client.realtime.client_secrets.create,
        "responses": lambda: client.responses.create(model=SMOLLM, input="hi"),
        "uploads": lambda: client.uploads.create(
            bytes=2, filename="hi", mime_type="text/plain", purpose="batch"
        ),
        "vector_stores": client.vector_stores.list,
        "videos": client.videos.list,
        "assistants": client.beta.assistants.list,
        "threads": client.beta.threads.create,
    }
    for path, call in calls.items():
        error = refused(openai.NotFoundError, call)
        assert error.code == "unknown_url"
        assert f'"/v1/{path}" is not served' in error.message


if __name__ == "__main__":
    run()
