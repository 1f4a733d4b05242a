from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from time import perf_counter
from typing import Any

import pytest

from serving.engine import Engine
from serving.messages import ResponseFormat, Sampling, Tool
from tests.serving.asking import CONTEXT, answer, begin, chat, greedy, idle, refusal, rendered, text

PARIS = "What is the capital of France?"
LINE = "The railway was opened in"

pytestmark = [
    pytest.mark.asyncio(loop_scope="package"),
    # vLLM and what it imports warn of each other's deprecations.
    pytest.mark.filterwarnings("default"),
]


def held_to(schema: Any) -> ResponseFormat:
    """The form of an answer of this schema."""
    return ResponseFormat(json.dumps(schema))


def is_compact(written: str) -> bool:
    """Whether JSON has no more white space than Python writes."""
    return len(written) <= len(json.dumps(json.loads(written), ensure_ascii=False))


# ---- the form of an answer --------------------------------------------------------------------------------


async def test_any_json_object(engine: Engine) -> None:
    """Held to a JSON object, the model writes one, and does not wander in white space."""
    question = "Write a JSON object with the key capital for France."
    sink = await answer(engine, chat(question, greedy(200), response_format=ResponseFormat()))
    assert sink.reasons == {0: "stop"}
    assert isinstance(json.loads(sink.text()), dict)
    assert is_compact(sink.text())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_json_of_a_schema(engine: Engine, temperature: float) -> None:
    """Held to a schema, the model writes JSON of it, whatever was asked, and so in each choice."""
    schema = {
        "type": "object",
        "properties": {
            "city": {"enum": ["Paris", "Rome"]},
            "digits": {"type": "array", "items": {"enum": [1, 20, 300]}, "minItems": 2, "maxItems": 3},
            "code": {"type": "string", "pattern": "^[A-Z]{3}$"},
        },
        "required": ["city", "digits", "code"],
    }
    sampling = Sampling(max_tokens=100, temperature=temperature, n=2, seed=3)
    sink = await answer(engine, chat("Tell me of trains.", sampling, response_format=held_to(schema)))
    assert sink.reasons == {0: "stop", 1: "stop"}
    for choice in range(2):
        told = json.loads(sink.text(choice))
        assert list(told) == ["city", "digits", "code"]
        assert told["city"] in {"Paris", "Rome"}
        assert 2 <= len(told["digits"]) <= 3
        assert told["code"].isupper()
        assert len(told["code"]) == 3
        assert is_compact(sink.text(choice))


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "nonsense"}, "nonsense"),
        ({"type": "integer", "multipleOf": 3}, "not supported"),
        ({"type": "string", "pattern": "("}, "pars"),
        ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "nothing"),
        ({"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$"}, "pieces"),
        (json.loads('{"items":' * 100 + "{}" + "}" * 100), "nested too deeply"),
    ],
)
async def test_schemas_that_are_refused(engine: Engine, schema: Any, said: str) -> None:
    """A schema that is none, or that the engine could not hold an answer to, is refused before acceptance."""
    refused = await refusal(engine, chat(PARIS, greedy(8), response_format=held_to(schema)))
    assert (refused.status, refused.param) == (400, "response_format")
    assert refused.message.startswith("response_format: ")
    assert said in refused.message


async def test_a_hostile_schema_stalls_nobody(engine: Engine) -> None:
    """While a schema is tried out that would take hours, for ten seconds of processor time, other answers go
    on and the loop is free. It ends in a refusal, and at once the next time; good schemas are served."""
    longest_pause = 0.0

    async def watch() -> None:
        nonlocal longest_pause
        while True:
            before = perf_counter()
            await asyncio.sleep(0.01)
            longest_pause = max(longest_pause, perf_counter() - before)

    hours = held_to({"type": "string", "pattern": "(.{0,14}){0,14}"})
    sink = await begin(engine, chat("Tell me a long story.", greedy(1500, ignore_eos=True), "story"))
    await sink.until(lambda sink: sink.tokens > 0)
    before = sink.tokens
    watching = asyncio.create_task(watch())
    try:
        refused = await refusal(engine, chat(PARIS, greedy(8), "hostile", response_format=hours))
    finally:
        watching.cancel()
        engine.cancel("story")
    assert refused.message == "response_format: making a grammar of it takes too much time or memory"
    assert sink.tokens > before + 2
    assert longest_pause < 5
    good = await answer(engine, chat(PARIS, greedy(8), response_format=held_to({"const": "Paris"})))
    assert good.text() == '"Paris"'
    began = perf_counter()
    await refusal(engine, chat(PARIS, greedy(8), "hostile", response_format=hours))
    assert perf_counter() - began < 5
    await idle(engine)


async def test_tools_need_a_parser(engine: Engine) -> None:
    """A model without a tool parser calls nothing: tools that it might call are refused."""
    tools = (Tool("get_weather"),)
    refused = await refusal(engine, chat(PARIS, greedy(8), tools=tools))
    assert (refused.status, refused.param) == (400, "tools")
    assert "no tool parser configured" in refused.message
    await answer(engine, chat(PARIS, greedy(8), tools=tools, tool_choice="none"))


async def test_rendering_plain_messages_is_the_same_either_way(engine: Engine) -> None:
    """Plain messages are the same prompt whether the request asks for more or not."""
    plain = await rendered(engine, chat(PARIS, greedy(8)))
    other = await rendered(engine, chat(PARIS, greedy(8), chat_template_kwargs='{"unknown": 1}'))
    assert plain.content.input["prompt_token_ids"] == other.content.input["prompt_token_ids"]


# ---- logprobs ---------------------------------------------------------------------------------------------


async def test_logprobs(engine: Engine) -> None:
    """Each token comes with its own logprob and those of the likeliest, likeliest first; at temperature 0 it
    is the first of them."""
    sink = await answer(engine, chat(PARIS, greedy(12, n=2), logprobs=5))
    for choice in range(2):
        told = sink.logprobs[choice]
        assert len(told) == len(sink.token_ids[choice])
        for chosen, likeliest in told:
            assert likeliest[0] == chosen
            values = [token.logprob for token in likeliest]
            assert len(values) == 5
            assert values == sorted(values, reverse=True)
            assert sum(map(math.exp, values)) <= 1.0001
    spelled = "".join(chosen.token for chosen, _ in sink.logprobs[0][:-1])
    assert spelled == sink.text()


async def test_logprobs_are_the_models_own(engine: Engine) -> None:
    """They are those before bias and penalties: a token that was forced is as unlikely as the model thinks,
    and not among the likeliest."""
    sink = await answer(engine, chat(PARIS, greedy(1, logit_bias={1000: 100.0}), logprobs=2))
    ((chosen, likeliest),) = sink.logprobs[0]
    assert sink.token_ids[0] == [1000]
    assert chosen.logprob < likeliest[1].logprob <= likeliest[0].logprob
    assert len(likeliest) == 2


async def test_logprobs_of_the_chosen_alone(engine: Engine) -> None:
    """Nothing of the others is told where nothing was asked."""
    sink = await answer(engine, chat(PARIS, greedy(3), logprobs=0))
    assert [len(likeliest) for _, likeliest in sink.logprobs[0]] == [0, 0, 0]
    sink = await answer(engine, chat(PARIS, greedy(3)))
    assert not sink.logprobs[0]


# ---- text completions -------------------------------------------------------------------------------------


async def test_text_and_its_tokens_are_the_same_prompt(engine: Engine) -> None:
    """A prompt as text and the same as token ids are continued alike."""
    asked = text(LINE, sampling=greedy(12))
    prompt = await rendered(engine, asked)
    ids = tuple(prompt.content.input["prompt_token_ids"])
    assert prompt.text is None
    assert (await answer(engine, asked)).text() == (
        await answer(engine, text(ids, sampling=greedy(12)))
    ).text()


async def test_echo_gives_the_prompts_text(engine: Engine) -> None:
    """Where the prompt is to be echoed it comes with its text, of token ids too."""
    asked = text(LINE, sampling=greedy(1), echo=True)
    prompt = await rendered(engine, asked)
    ids = tuple(prompt.content.input["prompt_token_ids"])
    of_ids = await rendered(engine, text(ids, sampling=greedy(1), echo=True))
    assert prompt.text == of_ids.text == LINE
    assert prompt.length == of_ids.length == len(ids)


async def test_many_prompts(engine: Engine) -> None:
    """Choice i belongs to prompt i // n, and takes the seed of choice i % n."""
    sampling = Sampling(max_tokens=6, n=2, seed=7)
    together = await answer(engine, text(LINE, PARIS, sampling=sampling))
    for prompt, line in enumerate([LINE, PARIS]):
        for choice in range(2):
            alone = await answer(engine, text(line, sampling=Sampling(max_tokens=6, seed=7 + choice)))
            assert together.text(2 * prompt + choice) == alone.text()


async def test_cancel_ends_every_prompt(engine: Engine) -> None:
    """A cancelled request leaves nothing running of any of its prompts."""
    sink = await begin(engine, text(LINE, PARIS, sampling=greedy(1500, n=2, ignore_eos=True)))
    await sink.until(lambda sink: len(sink.pieces) == 4)
    engine.cancel("text-1")
    await idle(engine)


async def test_prompt_logprobs(engine: Engine) -> None:
    """An echoed request for logprobs hears those of each prompt's tokens but the first, before that prompt's
    choices, once, and as the model saw them."""
    sink = await answer(engine, text(LINE, PARIS, sampling=greedy(2, n=2), echo=True, logprobs=3))
    for prompt, line in enumerate([LINE, PARIS]):
        first, logprobs = sink.prompts[prompt]
        assert first + "".join(chosen.token for chosen, _ in logprobs) == line
        for chosen, likeliest in logprobs:
            assert len(likeliest) == 3
            assert chosen.logprob <= likeliest[0].logprob
    # What was likely to come after a prompt's beginning is what its next token was likely to be.
    head = await rendered(engine, text(LINE, sampling=greedy(1)))
    begun = tuple(head.content.input["prompt_token_ids"])[:-1]
    following = await answer(engine, text(begun, sampling=greedy(1), logprobs=3))
    told, expected = sink.prompts[0][1][-1].likeliest, following.logprobs[0][0].likeliest
    assert [token.token for token in told] == [token.token for token in expected]
    assert [token.logprob for token in told] == pytest.approx([token.logprob for token in expected], abs=1e-3)


async def test_no_prompt_logprobs_unasked(engine: Engine) -> None:
    """Neither an echo nor logprobs alone has vLLM compute what nobody is told."""
    for others in ({"echo": True}, {"logprobs": 3}):
        assert not (await answer(engine, text(LINE, sampling=greedy(1), **others))).prompts


@pytest.mark.parametrize(
    ("prompt", "said"),
    [((1, 49152), "49152"), ((1, -1), "-1"), ("", "no token"), ((1,) * CONTEXT, "2048 tokens")],
)
async def test_prompts_that_are_refused(engine: Engine, prompt: Any, said: str) -> None:
    """A token that does not exist, an empty prompt and one that leaves no room are refused by name."""
    refused = await refusal(engine, text(LINE, prompt, sampling=greedy(1)))
    assert (refused.status, refused.param) == (400, "prompt")
    assert said in refused.message
    assert refused.message.startswith("prompt: ")


async def test_a_huge_prompt_is_refused_at_once(engine: Engine) -> None:
    """A megabyte is not tokenized to its end."""
    before = perf_counter()
    refused = await refusal(engine, text("a" * 1_000_000, sampling=greedy(1)))
    assert refused.code == "context_length_exceeded"
    assert perf_counter() - before < 5


# ---- penalties --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [{"repetition_penalty": 2.0}, {"repetition_factor": 1.5}])
async def test_repetition_penalties(engine: Engine, penalty: dict[str, float]) -> None:
    """Either penalty, the additive and vLLM's own, makes a text repeat itself less."""
    line = "A: 10\n\n" * 5 + "A:"
    free, held = await asyncio.gather(
        answer(engine, text(line, sampling=greedy(24, ignore_eos=True), request_id="free")),
        answer(engine, text(line, sampling=greedy(24, ignore_eos=True, **penalty), request_id="held")),
    )
    repeats = [max(Counter(sink.token_ids[0]).values()) for sink in (free, held)]
    assert repeats[1] < repeats[0]
