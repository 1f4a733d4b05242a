"""The router's settings: where it listens, which models it answers for, and every limit and time-out.

Times are seconds (`_s`), sizes are bytes (`_bytes`). Whatever is refused because of one of these says which.
"""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator

from router.accounts.settings import AccountsSettings, Price
from router.accounts.settings import Limits as SharedLimits
from serving.messages import MAX_FRAME
from serving.settings import Settings, TrunkSettings

Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]

# As MessagePack a request is at most twice as long as the JSON it came in, so it always fits a frame.
LONGEST_BODY = MAX_FRAME // 2

_PROVIDER_KEY = re.compile(r"[!-~]+")
_HOST_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")


class Listen(Settings):
    """The socket that clients connect to."""

    host: str = Field("127.0.0.1", description="Address or host name to listen on; loopback unless changed.")
    metrics_token: SecretStr | None = Field(
        None, description="What GET /metrics asks for as a Bearer; open to all without one."
    )
    port: int = Field(8000, ge=1, le=65_535, description="TCP port, shared by all routers of a node.")

    @field_validator("host")
    @classmethod
    def _is_host(cls, host: str) -> str:
        if not is_host(host):
            raise ValueError("an IP address or a host name")
        return host


class ModelLimits(Settings):
    """What one model may hold at once in one router process."""

    messages: int = Field(2048, ge=1, le=1_000_000, description="Messages of one request.")
    in_flight: int = Field(
        1024,
        ge=1,
        le=1_000_000,
        description="Choices of a model that are generated at once; a request takes n of them.",
    )
    queued: int = Field(
        1024, ge=0, le=1_000_000, description="Requests for a model that wait for one of those places."
    )
    stream_buffer_bytes: int = Field(
        1024 * 1024,
        ge=1024,
        le=1024**3,
        description="Bytes of an answer that wait for a slow reader before its request is cancelled.",
    )


class Limits(ModelLimits):
    """What a router process accepts, and what each of its models may hold unless the model says otherwise."""

    connections: int = Field(
        16_384, ge=1, le=1_000_000, description="Connections of clients that are open at once."
    )
    header_bytes: int = Field(
        65_536, ge=1024, le=1024**2, description="Bytes of a request line and its headers."
    )
    body_bytes: int = Field(4 * 1024 * 1024, ge=1024, le=LONGEST_BODY, description="Bytes of a request body.")


class ModelTimeouts(Settings):
    """How long a request for one model may take, part by part."""

    queue_s: Seconds = Field(
        30.0, description="For a place in the in-flight work, and again for a replica to be there."
    )
    upstream_connect_s: Seconds = Field(5.0, description="For a connection to an upstream provider.")
    first_token_s: Seconds = Field(
        300.0, description="From handing the request to a replica or a provider to the first token."
    )
    stall_s: Seconds = Field(60.0, description="Between two tokens.")
    total_s: Seconds = Field(
        3600.0, description="From the whole request having been read to the end of the answer."
    )


class Timeouts(ModelTimeouts):
    """How long a router process waits, and its models unless a model says otherwise."""

    header_s: Seconds = Field(
        30.0, description="For a request's headers to arrive, or the rest of a body that is answered already."
    )
    reader_s: Seconds = Field(
        60.0, description="For a client to take any of what its connection holds for it."
    )
    body_s: Seconds = Field(30.0, description="For the whole of a request body to arrive.")


class ModelCard(Settings):
    """What `GET /v1/models` tells of a model beside its name and state."""

    description: str | None = Field(None, description="A sentence or two for people who choose a model.")
    creator: str | None = Field(None, description="Who made the model.")
    license_name: str | None = Field(None, description="The license of its weights.")
    license_url: str | None = Field(None, description="Where that license can be read.")
    docs_url: str | None = Field(None, description="Where the model is documented.")
    prompt_guide_url: str | None = Field(None, description="How to prompt it.")
    public_endpoint_pricing: str | None = Field(
        None, description='The price in words, such as "$0.0003 / 1k tokens".'
    )
    max_context_length: int | None = Field(
        None,
        ge=1,
        description="Tokens that prompt and answer may have together; of a hosted model its engine tells.",
    )
    is_chat: bool = Field(default=True, description="Whether it answers chat completions.")
    is_text: bool = Field(default=True, description="Whether it answers text completions.")


StreamRole = Literal["first", "every"]
RepetitionPenalty = Literal["additive", "multiplicative"]


class AnswerSettings(Settings):
    """How requests that leave something open are read, and how answers are written."""

    default_max_tokens: int = Field(24, ge=1, description="max_tokens of a chat request that gives none.")
    stream_role: StreamRole = Field(
        "first",
        description="Which chunks of a chat stream have a role: the first of a choice, as OpenAI's, or every"
        " one, with a content that is never null, as Konko's had and LlamaIndex's client for it needs.",
    )
    repetition_penalty: RepetitionPenalty = Field(
        "additive",
        description="What the parameter of that name means: additive, -2 to 2 and neutral at 0, as the API"
        " says; or multiplicative, above 0 to 2 and neutral at 1, as vLLM and Hugging Face have it.",
    )


class ModelSettings(AnswerSettings):
    """One model of the deployment, as the router knows it, whatever answers for it."""

    name: str = Field(description="The name that clients ask for, in the case in which it is shown.")
    aliases: tuple[str, ...] = Field(
        (), description="Further names; each has an entry of its own in the list."
    )
    card: ModelCard = ModelCard()
    price: Price = Price()
    shared_limits: SharedLimits = SharedLimits()
    limits: ModelLimits = ModelLimits()
    timeouts: ModelTimeouts = ModelTimeouts()


class HostedModel(ModelSettings):
    """A model that replicas of this deployment run."""

    application: str = Field(description="The Serve application that holds the model's replicas.")


class UpstreamModel(ModelSettings):
    """A model that a provider serves."""

    base_url: str = Field(description="The provider's address, to which /chat/completions is appended.")
    upstream_name: str = Field(description="What the provider calls the model.")
    api_key: SecretStr | None = Field(
        None, description="The deployment's key there; without one each caller has to send its own."
    )


class RouterSettings(Settings):
    """Everything that a router process is told at its start."""

    created: int = Field(0, description="When the deployment was made, in Unix seconds.")
    listen: Listen = Listen()
    drain_s: float = Field(30.0, ge=0, description="Seconds that answers may take to end at a shut-down.")
    models: tuple[HostedModel | UpstreamModel, ...] = ()
    accounts: AccountsSettings = AccountsSettings(enabled=False)
    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()
    trunk: TrunkSettings = TrunkSettings()


def is_provider_key(text: str) -> bool:
    """Whether a text can be a key: printable ASCII, without spaces."""
    return _PROVIDER_KEY.fullmatch(text) is not None


def is_host(text: str) -> bool:
    """Whether a text is an IP address or has the form of a host name."""
    try:
        ip_address(text)
    except ValueError:
        labels = text.removesuffix(".").split(".")
        # A name that ends in digits is an IP address with a mistake in it.
        return len(text) <= 253 and all(map(_HOST_LABEL.fullmatch, labels)) and not labels[-1].isdigit()
    return True
