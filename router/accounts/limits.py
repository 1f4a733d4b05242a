"""What a key or an account may do: over all its requests, and of single models. And what a request can use at
most."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic import Field

from router.accounts.settings import Limits, Price
from serving.messages import Request, Text
from serving.settings import Settings

UNLIMITED = Limits()

TEMPLATE_TOKENS = 256
"""What a chat template may say of its own, beside what it makes of the request."""


class KeyLimits(Settings):
    """The limits of one key, or of all keys of an account together."""

    overall: Limits = Field(Limits(), description="Over all its requests.")
    models: dict[str, Limits] = Field({}, description="Of its requests for a model, by the model's name.")

    def kept(self) -> dict[str, Any]:
        """As the store has them."""
        return self.model_dump(mode="json", exclude_defaults=True)


class Claim(NamedTuple):
    """One of the limits that a request falls under."""

    scope: str
    """What they count for: `key:<id>` or `account:<id>`, `/<model>` behind either, or `model:<name>`."""
    limits: Limits


class Scope(NamedTuple):
    """The parts of a scope."""

    kind: str
    """key, account or model."""
    holder: str
    """The id of the key or account; empty of a model."""
    model: str
    """Empty over all models."""


def scope_of(text: str) -> Scope:
    """The parts of a scope as a claim has it."""
    kind, _, name = text.partition(":")
    if kind == "model":
        return Scope(kind, "", name)
    holder, _, model = name.partition("/")
    return Scope(kind, holder, model)


class Bound(NamedTuple):
    """What a request can use at most."""

    tokens: int
    nano: int


def bound(request: Request, body_bytes: int, context_length: int | None, price: Price) -> Bound:
    """What a request can use at most, of which only the length of its body is known, in bytes.

    Each token of a prompt stands for at least one byte of what the template renders, and what is written as
    JSON is longer than what a template puts around it, but for the template's own words. `context_length`:
    tokens that a prompt and its answer may have together, where that is known.
    """
    prompts = len(request.prompts) if isinstance(request, Text) else 1
    prompt_tokens = body_bytes + TEMPLATE_TOKENS * prompts
    answer_tokens = request.sampling.max_tokens
    if context_length is None:
        completion_tokens = request.sequences * answer_tokens
        return Bound(prompt_tokens + completion_tokens, price.of(prompt_tokens, completion_tokens))
    answer_tokens = min(answer_tokens, context_length)
    completion_tokens = request.sequences * answer_tokens
    # A prompt that leaves less than max_tokens to its answers gains no more than each of them loses. But the
    # one may cost more than the other.
    tokens = min(prompt_tokens, prompts * (context_length - answer_tokens)) + completion_tokens
    return Bound(tokens, price.of(min(prompt_tokens, prompts * context_length), completion_tokens))
