"""Where a model is that a provider serves, and whose key is used there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from cluster import environment
from cluster.faults import Fault, fault
from router.settings import is_host, is_provider_key
from serving.settings import Settings

HOSTED_ONLY = (
    "source",
    "engine_args",
    "accelerator",
    "simulation",
    "tool_parser",
    "reasoning_parser",
    "replicas",
    "gpus",
    "cpus",
    "drain_s",
)
"""What can only be said of a model that runs here."""

_URL = re.compile(r"https?://[!-~]+")
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_LOOPBACK = re.compile(r"localhost|127\.[0-9.]+|::1")


class UpstreamConfig(Settings):
    """A provider that speaks OpenAI's API, and the model there."""

    base_url: str = Field(
        description="The provider's address, such as https://api.openai.com/v1; http only on loopback."
    )
    model: str | None = Field(None, description="What the provider calls the model; its name, if not given.")
    api_key_env: str | None = Field(
        None,
        description="The environment variable with the deployment's key for the provider. Without it each"
        " caller sends its own, in the header X-OpenAI-Api-Key.",
    )

    @field_validator("base_url")
    @classmethod
    def _is_base_url(cls, url: str) -> str:
        if set("@?#") & set(url):
            raise PydanticCustomError("url_parts", "")  # not shown: it may have a key in it
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port
        except ValueError:
            host = None
        if host is None or not _URL.fullmatch(url) or not is_host(host):
            raise ValueError("an address such as https://api.openai.com/v1")
        if parts.scheme == "http" and not _LOOPBACK.fullmatch(host):
            raise ValueError("https, as keys are sent there (http is only for this machine itself)")
        return url.rstrip("/")

    @field_validator("model")
    @classmethod
    def _is_model(cls, model: str | None) -> str | None:
        if model is not None and not model.strip():
            raise ValueError("a name")
        return model

    @field_validator("api_key_env")
    @classmethod
    def _is_variable(cls, name: str | None) -> str | None:
        if name is not None and not _VARIABLE.fullmatch(name):
            raise PydanticCustomError("variable_name", "")  # not shown: it may be the key
        return name


def key_faults(field: str, variable: object) -> Iterator[Fault]:
    """What is wrong with the key that an environment variable holds; of one without such a name the schema
    tells."""
    if not isinstance(variable, str) or not _VARIABLE.fullmatch(variable):
        return
    key = environment.provider_key(variable)
    if key is None:
        yield fault(field, "no_key", variable=variable)
    elif not is_provider_key(key.get_secret_value()):
        yield fault(field, "unfit_key", variable=variable)
