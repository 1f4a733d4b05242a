"""Requests of every kind, at random and the same every time."""

from __future__ import annotations

import random
from typing import Any

TEXT = (
    "the sea is wide and deep; ships cross it — slowly, by night, with lamps. Žluťoučký kůň, 水, 🚢 & {json}"
)
WORDS = TEXT.split()


def seeded(number: int, model: str, longest: int) -> dict[str, Any]:
    """Request `number` for a model: a chat or a text completion with a seed and some of the parameters, its
    answers at most `longest` tokens long."""
    chance = random.Random(number)  # noqa: S311 - the same every time on purpose
    body = {
        "model": model,
        "seed": chance.randint(-(2**63), 2**63 - 1),
        "max_tokens": chance.randint(1, longest),
        **_some(chance),
    }
    if chance.random() < 0.3:
        prompts = [_words(chance) for _ in range(chance.randint(1, 3))]
        some = {"logprobs": chance.randint(0, 5), "echo": chance.random() < 0.5}
        return body | {"prompt": chance.choice([prompts, prompts[0]])} | _chosen(chance, some)
    some = {"logprobs": True, "top_logprobs": chance.randint(0, 5)}
    if chance.random() < 0.3:
        body |= some
    roles = ["system", "user", "assistant", "user"][chance.choice([0, 1, 3]) :]
    return body | {"messages": [{"role": role, "content": _words(chance)} for role in roles]}


def _some(chance: random.Random) -> dict[str, Any]:
    return _chosen(
        chance,
        {
            "temperature": chance.choice([0, 0.3, 1, 2]),
            "top_p": chance.choice([0, 0.5, 0.95, 1]),
            "top_k": chance.choice([-1, 0, 1, 40]),
            "min_p": chance.choice([0, 0.1]),
            "frequency_penalty": chance.choice([-0.5, 0, 1]),
            "presence_penalty": chance.choice([-0.5, 0, 1]),
            "repetition_penalty": chance.choice([-0.2, 0, 0.5]),
            "logit_bias": {str(chance.randint(0, 40_000)): chance.choice([-100, 5])},
            "n": chance.randint(1, 4),
            "stop": chance.choice([".", [" the", "e s"], ["is", "🚢", ", "]]),
            "ignore_eos": True,
            "min_tokens": 1,
        },
    )


def _chosen(chance: random.Random, parameters: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if chance.random() < 0.3}


def _words(chance: random.Random) -> str:
    return " ".join(chance.choices(WORDS, k=chance.randint(1, 30)))
