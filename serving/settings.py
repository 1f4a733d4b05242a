"""What an engine is made from: plain values that travel to the replica. Imports neither vllm nor torch."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Settings(BaseModel):
    """Read once, never changed; an unknown key and a value of another type are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TrunkSettings(Settings):
    """Both ends of every trunk."""

    heartbeat_s: float = Field(
        0.5, gt=0, le=60, description="Seconds after which an end with nothing to say sends a ping."
    )
    silence_s: float = Field(
        2.0, gt=0, le=600, description="Seconds of silence after which the other end is lost."
    )
    connect_s: float = Field(
        5.0, gt=0, le=600, description="Seconds that a connection and its handshake may take."
    )

    @model_validator(mode="after")
    def _beats_in_time(self) -> Self:
        # An end that is well may be quiet for almost two heartbeats.
        if self.silence_s < 3 * self.heartbeat_s:
            raise ValueError("silence_s of at least three times heartbeat_s")
        return self


class EngineSettings(Settings):
    """One model's engine."""

    engine: Literal["vllm", "echo"] = Field("vllm", description="What makes the tokens.")
    name: str | None = Field(
        None, description="What vLLM's own metrics call the model; without one, they call it by its source."
    )
    source: str | None = Field(
        None,
        min_length=1,
        description="Where vLLM's model is: a folder (/models/llama or ./llama), a GGUF file, a file of an"
        " installed Python package (package:name/file.gguf) or a hub id (org/name, org/name@revision).",
    )
    engine_args: dict[str, Any] = Field(
        default_factory=dict,
        description="The engine's arguments: those of vLLM under their own names, or those of echo.",
    )
    tool_parser: str | None = Field(
        None,
        description="vLLM's name for the way in which the model writes calls of functions, such as hermes or"
        " llama3_json. Without one, requests with tools to be called are refused.",
    )
    reasoning_parser: str | None = Field(
        None,
        description="vLLM's name for the way in which the model marks its reasoning, such as qwen3 or"
        " deepseek_r1. With one, answers have their reasoning apart; without one, it stays in the text.",
    )

    @model_validator(mode="after")
    def _parsers_fit_engine(self) -> Self:
        for name in ("tool_parser", "reasoning_parser"):
            value = getattr(self, name)
            if self.engine != "vllm" and value is not None:
                raise ValueError(f"{name}: {value!r} is given, but the engine {self.engine} parses nothing")
        return self

    @model_validator(mode="after")
    def _source_fits_engine(self) -> Self:
        if self.engine == "vllm" and self.source is None:
            raise ValueError("source: missing; the engine vllm loads its model from a source")
        if self.engine == "echo" and self.source is not None:
            raise ValueError(f"source: {self.source!r} is given, but the engine echo loads no model")
        return self
