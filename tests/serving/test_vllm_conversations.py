from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
from msgspec.structs import astuple, replace

from serving.engine import Engine, Parsed, Prompt
from serving.messages import Chat, Message, NamedTool, ResponseFormat, Sampling, Tool, ToolCall
from serving.parsing import ParsedChoice
from tests.serving import recorder, replayed
from tests.serving.asking import Recorder, begin, chat, refusal, rendered, running
from tests.waiting import until

THOUGHT = "<think>What is asked?</think>"
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>'
OTHER_CALL = '<tool_call>\n{"name": "get_time", "arguments": {"city": "Rome"}}\n</tool_call>'
WEATHER = ("get_weather", {"city": "Paris", "days": 3})
TIME = ("get_time", {"city": "Rome"})

CPU_S = 10.0
"""Seconds of processor time that a trial may take."""

ANSWERS = {
    "says": "Paris.",
    "thinks": THOUGHT + "\n\nParis.",
    "only thinks": "<think>What is",
    "thinks and calls": THOUGHT + "\n\n" + CALL,
    "thinks, says and calls twice": THOUGHT + "Let me see.\n" + CALL + "\n" + OTHER_CALL,
    "calls in broken JSON": THOUGHT
    + '<tool_call>\n{"name": "get_weather", "arguments": {"city": \n</tool_call>',
    "has to call": THOUGHT + CALL.replace("\n", ""),
    "has to answer": THOUGHT + '{"city":"Paris"}',
}
SEEDS = {kind: seed for seed, kind in enumerate(ANSWERS)}

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
DAYS = {**CITY, "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS = (
    Tool("get_weather", "The weather in a city.", json.dumps(DAYS)),
    Tool("get_time", None, json.dumps(CITY)),
)
WITHOUT_THINKING = '{"enable_thinking": false}'

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    # vLLM and what it imports warn of each other's deprecations.
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture(scope="module")
def replayed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that thinks and calls as it is told to."""
    return replayed.folder(tmp_path_factory.mktemp("model"))


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["qwen3", "deepseek_r1"])
async def engine(request: pytest.FixtureRequest, replayed_folder: Path) -> AsyncIterator[Engine]:
    """It with a tool parser and a reasoning parser: of vLLM's newer kind and of its older one."""
    settings = replayed.settings(
        replayed_folder, list(ANSWERS.values()), max_model_len=2048, kv_cache_memory_bytes=256 << 20
    )
    parsers = {"tool_parser": "hermes", "reasoning_parser": request.param}
    async with running(settings.model_copy(update=parsers)) as engine:
        yield engine


def asking(kind: str, max_tokens: int = 200, stop: tuple[str, ...] = (), **others: Any) -> Chat:
    """A request that is answered in this way."""
    sampling = Sampling(max_tokens=max_tokens, seed=SEEDS[kind], stop=stop)
    return chat("Hello", sampling, f"to {kind}", **others)


async def heard(engine: Engine, request: Chat) -> tuple[Prompt, Recorder]:
    """The rendered prompt of a request with one choice, and all that the engine said."""
    prompt = await rendered(engine, request)
    sink = await begin(engine, request)
    return prompt, await sink.finished()


def whole(prompt: Prompt, sink: Recorder) -> Parsed:
    """The message that a client reads who waits for all of it."""
    assert prompt.parser
    return prompt.parser().whole(sink.text(), sink.token_ids[0])


def streamed(prompt: Prompt, sink: Recorder) -> Parsed:
    """The message that a client puts together from a stream, who takes each call's id and name once."""
    assert prompt.parser
    parser = prompt.parser()
    content, reasoning = "", ""
    calls: list[list[str]] = []
    tokens = iter(sink.token_ids[0])
    for number, piece in enumerate(sink.pieces[0], 1):
        delta = parser.delta(piece, [next(tokens)], finished=number == len(sink.pieces[0]))
        if delta is None:
            continue
        assert any(delta)
        content += delta.content or ""
        reasoning += delta.reasoning or ""
        for call in delta.tool_calls:
            if call.id is not None:
                assert call.call == len(calls)
                assert call.name
                calls.append([call.id, call.name, ""])
            calls[call.call][2] += call.arguments
    assert parser.reasoning_tokens(sink.token_ids[0]) == prompt.parser().reasoning_tokens(sink.token_ids[0])
    return Parsed(content or None, reasoning or None, [ToolCall(*call) for call in calls])


def read(request: Chat, prompt: Prompt, sink: Recorder, at_once: int = 1) -> Parsed:
    """The message that every client reads, where an engine says so many tokens at once."""
    choice = ParsedChoice(request, prompt)
    pieces, tokens = sink.pieces[0], sink.token_ids[0]
    assert len(pieces) == len(tokens)
    for start in range(0, len(pieces), at_once):
        end = start + at_once
        choice.delta("".join(pieces[start:end]), tokens[start:end], finished=end >= len(pieces))
    return choice.message()


def called(message: Parsed) -> list[tuple[str, Any]]:
    """The calls of a message, without their ids, which are all different."""
    assert len({call.id for call in message.tool_calls}) == len(message.tool_calls)
    return [(call.name, json.loads(call.arguments)) for call in message.tool_calls]


def said(message: Parsed) -> tuple[str | None, str | None, list[tuple[str, Any]]]:
    """A message, to be compared."""
    return message.content, message.reasoning, called(message)


# ---- reasoning and calls ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("thinks", ("\n\nParis.", "What is asked?", [])),
        ("only thinks", (None, "What is", [])),
        ("thinks and calls", (None, "What is asked?", [WEATHER])),
        ("thinks, says and calls twice", ("Let me see.\n", "What is asked?", [WEATHER, TIME])),
    ],
)
async def test_an_answer_is_taken_apart(engine: Engine, kind: str, message: Any) -> None:
    """Reasoning, content and calls come apart, the same whole and streamed token by token."""
    prompt, sink = await heard(engine, asking(kind, tools=TOOLS))
    assert said(whole(prompt, sink)) == message
    assert said(streamed(prompt, sink)) == message


async def test_reasoning_without_tools(engine: Engine) -> None:
    """A model with a reasoning parser has its reasoning apart in every chat, and its tokens counted."""
    prompt, sink = await heard(engine, asking("thinks"))
    assert whole(prompt, sink) == streamed(prompt, sink) == ("\n\nParis.", "What is asked?", [])
    assert prompt.parser
    assert prompt.parser().reasoning_tokens(sink.token_ids[0]) == 4


async def test_a_template_can_be_told_not_to_think(engine: Engine) -> None:
    """`chat_template_kwargs` reach the template and the parser: what follows a closed thought is content."""
    plain = await rendered(engine, asking("says"))
    prompt, sink = await heard(engine, asking("says", chat_template_kwargs=WITHOUT_THINKING))
    assert prompt.length > plain.length
    assert streamed(prompt, sink) == ("Paris.", None, [])


async def test_tool_choice_none_calls_nothing(engine: Engine) -> None:
    """Tools that must not be called are shown to the model, and what looks like a call is content."""
    request = asking("thinks and calls", tools=TOOLS, tool_choice="none")
    prompt, sink = await heard(engine, request)
    assert prompt.length == (await rendered(engine, asking("says", tools=TOOLS))).length
    assert whole(prompt, sink) == streamed(prompt, sink) == ("\n\n" + CALL, "What is asked?", [])


@pytest.mark.parametrize("choice", ["required", NamedTool("get_weather")])
async def test_a_call_that_is_required(engine: Engine, choice: Any) -> None:
    """A required call, and that of a named function, is held to after the reasoning: whatever the model
    wants to say."""
    request = asking("has to call", tools=TOOLS, tool_choice=choice)
    prompt, sink = await heard(engine, request)
    assert said(whole(prompt, sink)) == said(streamed(prompt, sink)) == (None, "What is asked?", [WEATHER])
    prompt, sink = await heard(engine, asking("thinks", tools=TOOLS, tool_choice=choice))
    ((name, _),) = called(streamed(prompt, sink))
    assert name == "get_weather" or choice == "required"


async def test_a_strict_tool_is_called_as_its_schema_says(engine: Engine) -> None:
    """The arguments of a strict tool are held to its schema, whatever the model wants to write."""
    tools = (Tool("get_time", None, json.dumps(CITY), strict=True),)
    prompt, sink = await heard(engine, asking("thinks", tools=tools, tool_choice="required"))
    ((_, arguments),) = called(whole(prompt, sink))
    assert list(arguments) == ["city"]


async def test_a_form_of_the_answer_begins_after_the_reasoning(engine: Engine) -> None:
    """The reasoning is free, and what follows it is held to the schema."""
    form = ResponseFormat(json.dumps(CITY))
    for kind in ("has to answer", "thinks"):
        prompt, sink = await heard(engine, asking(kind, response_format=form))
        message = streamed(prompt, sink)
        assert message == whole(prompt, sink)
        assert message.reasoning == "What is asked?"
        assert list(json.loads(message.content or "")) == ["city"]


async def test_a_schema_with_a_dead_end(engine: Engine) -> None:
    """An answer that no token can go on with ends alone, and the client is told why."""
    loop = {"$ref": "#/$defs/loop"}
    form = {"$defs": {"loop": loop}, "type": "object", "properties": {"a": loop}, "required": ["a"]}
    request = asking("thinks", response_format=ResponseFormat(json.dumps(form)))
    outlet = await recorder.answer(engine, request)
    assert outlet.refusal
    assert (outlet.refusal.status, outlet.refusal.param) == (400, "response_format")
    assert "nothing can follow" in outlet.refusal.message
    await heard(engine, asking("thinks"))


@pytest.mark.parametrize(("kind", "max_tokens"), [("calls in broken JSON", 200), ("thinks and calls", 25)])
async def test_a_call_that_is_broken_off(engine: Engine, kind: str, max_tokens: int) -> None:
    """Of a call that is no JSON, or that has no end, clients are told what there is of it. That it was a call
    is what a stream has said by then, so a whole message says it too, and so does what ends both."""
    request = asking(kind, max_tokens, tools=TOOLS)
    message, ended = await told(engine, request)
    assert ended == ("tool_calls" if max_tokens == 200 else "length")
    assert message["content"] is None
    (call,) = message["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert call["function"]["arguments"].startswith('{"city"')


# ---- text that comes later than its tokens, and tokens that come together ---------------------------------


STOPS = ("\nObservation:", "###", "STOP")
"""Of each more or less text is held back, as it might be the beginning of one."""


@pytest.mark.parametrize("kind", [kind for kind in ANSWERS if not kind.startswith("has to")])
@pytest.mark.parametrize("stop", STOPS)
async def test_a_stop_string_that_never_comes_changes_nothing(engine: Engine, kind: str, stop: str) -> None:
    """With a stop string the engine holds text back and tells its tokens at once; nothing of that is to be
    seen in what is thought, said and called."""
    without = await told(engine, asking(kind, tools=TOOLS))
    assert await told(engine, asking(kind, stop=(stop,), tools=TOOLS)) == without


@pytest.mark.parametrize(
    ("kind", "stop", "expected"),
    [
        ("thinks, says and calls twice", "me see", ("Let ", "What is asked?", [])),
        ("thinks", "is as", (None, "What ", [])),
        ("thinks", "</think>", (None, "What is asked?", [])),
        (
            "thinks, says and calls twice",
            "ays",
            ("Let me see.\n", "What is asked?", ['{"city": "Paris", "d']),
        ),
    ],
)
async def test_a_stop_string_ends_what_it_stands_in(
    engine: Engine, kind: str, stop: str, expected: tuple[str | None, str, list[str]]
) -> None:
    """A stop string ends an answer in its reasoning, in a text or in a call: all before it is told, and
    nothing of the string."""
    message, ended = await told(engine, asking(kind, stop=(stop,), tools=TOOLS))
    calls = message.get("tool_calls", ())
    assert ended == ("tool_calls" if calls else "stop")
    content, reasoning, arguments = expected
    assert message["content"] == (content if content or calls else "")
    assert message["reasoning_content"] == reasoning
    assert [call["function"]["arguments"] for call in calls] == arguments


@pytest.mark.parametrize("kind", list(ANSWERS))
@pytest.mark.parametrize("at_once", [2, 3, 5, 1000])
async def test_tokens_that_come_together(engine: Engine, kind: str, at_once: int) -> None:
    """As many tokens as an engine likes to say at once, as with speculative decoding, are read as one after
    the other."""
    request = asking(kind, tools=TOOLS)
    prompt, sink = await heard(engine, request)
    together, alone = read(request, prompt, sink, at_once), read(request, prompt, sink)
    assert together[:2] == alone[:2]
    assert [call[1:] for call in map(astuple, together.tool_calls)] == [
        call[1:] for call in map(astuple, alone.tool_calls)
    ]


async def told(engine: Engine, request: Chat) -> tuple[dict[str, Any], str]:
    """The message that a client is told and its finish_reason: the same streamed and whole, with the same
    usage, but for the ids of calls."""
    whole = await recorder.answer(engine, request)
    stream = await recorder.answer(engine, replace(request, stream=True, include_usage=True))
    assert not whole.refusal
    assert (
        stream.events[-1]["usage"]["completion_tokens_details"]
        == (whole.body["usage"]["completion_tokens_details"])
    )
    told = recorder.joined(stream.choices(0))
    (choice,) = whole.body["choices"]
    for call in (*told["message"].get("tool_calls", ()), *choice["message"].get("tool_calls", ())):
        assert call.pop("id")
    assert told["message"] == choice["message"]
    assert told["finish_reason"] == choice["finish_reason"]
    return choice["message"], choice["finish_reason"]


# ---- rendering --------------------------------------------------------------------------------------------


def words(engine: Any, prompt: Prompt) -> str:
    """The text of a rendered prompt."""
    text: str = engine._running.get_tokenizer().decode(prompt.content.input["prompt_token_ids"])
    return text


def conversation(*messages: Message) -> Sequence[Message]:
    """Messages after a question."""
    return [Message("user", "Hello"), *messages]


async def test_calls_and_their_answers_are_rendered(engine: Engine) -> None:
    """A template sees what the model called, with its arguments as values, what it thought, and the
    answer."""
    call = ToolCall("call-1", "get_weather", '{"city": "Paris"}')
    messages = conversation(
        Message("assistant", None, tool_calls=(call,), reasoning="Rain?"),
        Message("tool", "21", tool_call_id="call-1"),
    )
    text = words(engine, await rendered(engine, chat(messages, Sampling(max_tokens=1), tools=TOOLS)))
    assert '{"name": "get_weather", "arguments": {"city": "Paris"}}' in text
    assert "<think>\nRain?\n</think>" in text
    assert "<tool_response>\n21\n</tool_response>" in text
    assert '"description": "The weather in a city."' in text


async def test_broken_arguments_in_a_conversation(engine: Engine) -> None:
    """What a model once called in broken JSON does not end the conversation."""
    call = ToolCall("call-1", "get_weather", '{"city": ')
    messages = conversation(
        Message("assistant", None, tool_calls=(call,)), Message("tool", "?", tool_call_id="call-1")
    )
    await rendered(engine, chat(messages, Sampling(max_tokens=1), tools=TOOLS))


async def test_a_prompt_past_the_context_is_counted(engine: Engine) -> None:
    """It is refused with its length, as a plain one is; a far longer one as longer than that."""
    some = await rendered(engine, chat(" word" * 3000, Sampling(max_tokens=1), tools=TOOLS))
    assert some.length > engine.context_length
    refused = await refusal(engine, chat(" word" * 20_000, Sampling(max_tokens=1), tools=TOOLS))
    assert (refused.param, refused.code) == ("messages", "context_length_exceeded")
    assert str(4 * engine.context_length) in refused.message


@pytest.mark.parametrize("name", ["tokenize", "chat_template", "tools", "conversation", "model_config"])
async def test_template_words_that_are_not_the_requests(engine: Engine, name: str) -> None:
    """A request has no say in how a template is rendered, but for what the template asks for."""
    request = asking("says", chat_template_kwargs=json.dumps({name: 1}))
    refused = await refusal(engine, request)
    assert (refused.status, refused.param) == (400, "chat_template_kwargs")
    assert name in refused.message


async def test_a_tool_that_nobody_could_hold_to(engine: Engine) -> None:
    """A strict tool with a schema that takes hours is refused by its field; unless strict it is only
    shown."""
    evil = json.dumps({"type": "object", "properties": {"a": {"type": "string", "pattern": "a{1,999}"}}})
    refused = await refusal(engine, asking("says", tools=(Tool("f", None, evil, strict=True),)))
    assert (refused.status, refused.param) == (400, "tools")
    assert "999 pieces" in refused.message
    await rendered(engine, asking("says", tools=(Tool("f", None, evil),)))


async def test_schemas_that_nobody_waits_for_are_not_tried(engine: Any) -> None:
    """When clients with costly schemas have left, who comes after them waits for the one that is being tried
    at most, and nothing is left of the others."""
    names = {"type": "integer"}
    costly = [
        json.dumps({"type": "object", "properties": {f"{letter}{i}": names for i in range(1500)}})
        for letter in "abcd"
    ]
    asked = [
        asyncio.create_task(engine.render(asking("has to answer", response_format=ResponseFormat(schema))))
        for schema in costly
    ]
    grammars = engine._grammars
    await until(lambda: len(grammars._trials) == len(costly) and grammars._process is not None)
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    assert not grammars._trials
    before = worked(grammars)
    fresh = json.dumps({"type": "object", "properties": {"fresh": {"type": "string"}}})
    await engine.render(asking("has to answer", response_format=ResponseFormat(fresh)))
    # Less than two of them take.
    assert worked(grammars) - before < CPU_S


def worked(grammars: Any) -> float:
    """The seconds of processor time that the program which tries schemas has used."""
    return psutil.Process(grammars._process.pid).cpu_times().user


async def test_a_prompt_without_a_token_is_refused(tmp_path: Path) -> None:
    """Where a template makes nothing of the messages, the request is refused and the engine lives on, with
    the next request's text as it should be."""
    folder = replayed.folder(tmp_path)
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    async with running(replayed.settings(folder, ["Paris."])) as bare:
        refused = await refusal(bare, chat("", Sampling(max_tokens=4)))
        assert (refused.status, refused.param) == (400, "messages")
        assert "no token" in refused.message
        _, told = await heard(bare, chat("Hello", Sampling(max_tokens=4)))
        assert told.text() == "Paris."
