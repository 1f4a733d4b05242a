"""What an engine is made from: plain values that travel to the replica. Imports neither vllm nor torch."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Settings(BaseModel):
    """Read once, never changed; an unknown key and a value of another type are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TrunkSettings(Settings):
    """Both ends of every trunk."""

    heartbeat_s: float = Field(0.5, gt=0, le=60, description="Seconds between two signs of life of each end.")
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


class SimulationSettings(Settings):
    """What a simulated accelerator takes for a step, and what it says."""

    step_ms: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="Milliseconds that every step takes; or `device`."
    )
    device: Literal["H100", "H200", "A100", "L4"] | None = Field(
        None,
        description="The accelerator whose arithmetic, memory traffic and memory are modelled; or `step_ms`.",
    )
    async_scheduling: bool = Field(
        True,
        description="Whether the host plans a step while the one before it runs, as vLLM does on GPUs;"
        " engine_args.async_scheduling has no effect here.",
    )
    answers: list[str] | None = Field(
        None,
        min_length=1,
        description="What is answered: the seed of a request, modulo their number, is the place of its answer"
        " among them, from 0; without a seed it is the first. Left out, answers are prose that begins at a"
        " sentence which the seed chooses and goes on for as long as the request allows.",
    )

    @model_validator(mode="after")
    def _priced_once(self) -> Self:
        if (self.step_ms is None) == (self.device is None):
            raise ValueError("exactly one of step_ms and device")
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
    accelerator: Literal["simulated"] | None = Field(
        None,
        description="simulated is vLLM without workers: steps take modelled time, and no weights are needed.",
    )
    simulation: SimulationSettings | None = Field(
        None, description="What a simulated accelerator takes for a step, and what it answers."
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
    def _simulation_fits_engine(self) -> Self:
        if self.engine != "vllm" and self.accelerator is not None:
            raise ValueError(f"accelerator: simulated is given, but the engine {self.engine} has none")
        if (self.accelerator is None) != (self.simulation is None):
            raise ValueError("accelerator: simulated and simulation together, or neither")
        return self

    @model_validator(mode="after")
    def _source_fits_engine(self) -> Self:
        if self.engine == "vllm" and self.source is None:
            raise ValueError("source: missing; the engine vllm loads its model from a source")
        if self.engine == "echo" and self.source is not None:
            raise ValueError(f"source: {self.source!r} is given, but the engine echo loads no model")
        return self
