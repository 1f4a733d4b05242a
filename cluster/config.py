"""The configuration: which models there are, how many of each, and where clients reach them.

One YAML file, read once into frozen values. A file that cannot be used is refused with every fault in it,
each on a line of its own that names the file, the field, the value and what was expected.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError, field_validator

from cluster import environment, strict_yaml
from cluster.accounts import account_faults
from cluster.faults import ConfigError, Fault, fault, field_at, nearest, shown
from cluster.table import table
from cluster.upstream import HOSTED_ONLY, UpstreamConfig, key_faults
from router.accounts.settings import AccountsSettings, Price
from router.accounts.settings import Limits as SharedLimits
from router.settings import (
    AnswerSettings,
    HostedModel,
    Limits,
    Listen,
    ModelCard,
    ModelLimits,
    ModelTimeouts,
    RouterSettings,
    Timeouts,
    UpstreamModel,
    is_host,
)
from serving import source, vllm_arguments
from serving.echo import EchoArguments
from serving.settings import EngineSettings, Settings, SimulationSettings, TrunkSettings

__all__ = ["WORKER_ARGUMENTS", "Config", "ConfigError", "ModelConfig", "RayConfig", "describe", "load"]

_NAME = re.compile(r"[A-Za-z0-9_.~:@+-]+(/[A-Za-z0-9_.~:@+-]+)*")
_LONGEST_NAME = 200

WORKER_ARGUMENTS = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "prefill_context_parallel_size",
    "data_parallel_size",
)
"""The vLLM arguments whose product is the number of workers that one replica has."""

# ---- the schema ---------------------------------------------------------------------------------------


def _model_name(name: str) -> str:
    segments = name.split("/")
    if len(name) > _LONGEST_NAME or not _NAME.fullmatch(name) or {".", ".."} & set(segments):
        raise ValueError(
            f"a name of at most {_LONGEST_NAME} letters, digits and -._~:@+ "
            "in parts divided by single slashes, none of them . or .."
        )
    return name


def _gpus(value: object) -> object:
    if value == "auto":
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError("auto or a whole number of at least 0")
    return value


def _not_none(models: tuple[ModelConfig, ...]) -> tuple[ModelConfig, ...]:
    if not models:
        raise ValueError("at least one model")
    return models


ModelName = Annotated[str, AfterValidator(_model_name)]


class RayConfig(Settings):
    """The Ray cluster that holds everything."""

    address: str = Field(
        "local",
        description="local starts a Ray of its own, auto joins the one on this machine, or its host:port.",
    )

    @field_validator("address")
    @classmethod
    def _is_address(cls, address: str) -> str:
        if address not in {"local", "auto"}:
            found = re.fullmatch(r"(.+):([0-9]{1,5})", address)
            if not found or not is_host(found[1].strip("[]")) or not 1 <= int(found[2]) <= 65_535:
                raise ValueError("local, auto or host:port")
        return address


class ModelConfig(AnswerSettings):
    """One model: what answers for it, how often it runs, and what clients are told about it."""

    name: ModelName = Field(description="What clients ask for, in any case.")
    aliases: Annotated[tuple[ModelName, ...], Field(strict=False)] = Field(
        (), description="Further names, each listed as a model of its own."
    )
    engine: Literal["vllm", "echo"] | None = Field(
        None, description="vllm runs a real model; echo repeats the prompt."
    )
    upstream: UpstreamConfig | None = Field(
        None, description="In place of an engine: the provider that serves the model."
    )
    source: str | None = Field(None, description="A folder, a GGUF file or a hub id; not for echo.")
    engine_args: dict[str, Any] = Field({}, description="The engine's arguments by its own names.")
    accelerator: Literal["simulated"] | None = Field(
        None,
        description="simulated runs all of vLLM but the model, for which it needs neither GPU nor weights.",
    )
    simulation: SimulationSettings | None = Field(
        None, description="The time that a simulated accelerator takes for a step, and what it answers."
    )
    tool_parser: str | None = Field(
        None, description="vLLM's name for the way in which the model writes calls of functions."
    )
    reasoning_parser: str | None = Field(
        None, description="vLLM's name for the way in which the model marks its reasoning."
    )
    replicas: int = Field(1, ge=1, le=10_000, description="Engines that run the model.")
    gpus: Annotated[int | None, BeforeValidator(_gpus)] = Field(
        None,
        description="GPUs of one replica; auto is what the parallel sizes multiply to, or none without GPUs.",
    )
    cpus: float = Field(
        0.0, ge=0, le=4096, allow_inf_nan=False, description="CPU cores that Ray reserves for one replica."
    )
    drain_s: float = Field(
        30.0,
        ge=0,
        le=86_400,
        allow_inf_nan=False,
        description="Seconds that a replica's streams may take to end when it is stopped.",
    )
    limits: ModelLimits = Field(ModelLimits(), description="What differs from the top level's limits.")
    timeouts: ModelTimeouts = Field(
        ModelTimeouts(), description="What differs from the top level's timeouts."
    )
    card: ModelCard = Field(ModelCard(), description="What GET /v1/models says about it.")
    price: Price = Field(Price(), description="What its tokens cost.")
    shared_limits: SharedLimits = Field(SharedLimits(), description="What all keys together may ask of it.")

    @property
    def engine_settings(self) -> EngineSettings:
        """What the model's replicas are told. Raises ValidationError where it has none."""
        fields = self.model_dump(include=set(EngineSettings.model_fields))
        return EngineSettings.model_validate(fields)

    @property
    def application(self) -> str:
        """The Serve application that holds its replicas: readable, and different for different names."""
        readable = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:40]
        return f"{readable}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"

    @property
    def takes_gpus(self) -> bool:
        """Whether its replicas run on GPUs where there are any."""
        return self.engine == "vllm" and self.accelerator is None

    @property
    def workers(self) -> int:
        """Processes over which vLLM spreads one replica; each takes a GPU where there are GPUs."""
        return math.prod(self.engine_args.get(argument, 1) for argument in WORKER_ARGUMENTS)


class Config(AnswerSettings):
    """The whole file."""

    listen: Listen = Listen()
    routers: int = Field(1, ge=1, le=1024, description="Router processes that share the port.")
    log_dir: Annotated[Path, Field(strict=False)] | None = Field(
        None, description="Folder for log files; without it each start makes a temporary one."
    )
    ray: RayConfig = RayConfig()
    accounts: AccountsSettings = AccountsSettings()
    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()
    trunk: TrunkSettings = TrunkSettings()
    models: Annotated[tuple[ModelConfig, ...], Field(strict=False), AfterValidator(_not_none)]

    @property
    def hosted(self) -> tuple[ModelConfig, ...]:
        """The models that run here."""
        return tuple(model for model in self.models if model.upstream is None)

    @property
    def drain_s(self) -> float:
        """Seconds that a router's answers may take to end: as long as those of its slowest model."""
        return max(model.drain_s for model in self.models)

    @property
    def router_settings(self) -> RouterSettings:
        """What every router process is told."""
        return RouterSettings(
            created=int(time.time()),
            listen=self.listen,
            drain_s=self.drain_s,
            models=tuple(map(self._router_model, self.models)),
            accounts=environment.placed(self.accounts),
            limits=self.limits,
            timeouts=self.timeouts,
            trunk=self.trunk,
        )

    def _router_model(self, model: ModelConfig) -> HostedModel | UpstreamModel:
        common: dict[str, Any] = {
            "name": model.name,
            "aliases": model.aliases,
            "card": model.card,
            "price": model.price,
            "shared_limits": model.shared_limits,
            "limits": _inherit(self.limits, model.limits),
            "timeouts": _inherit(self.timeouts, model.timeouts),
            **self._answers(model),
        }
        if model.upstream is None:
            return HostedModel(application=model.application, **common)
        variable = model.upstream.api_key_env
        return UpstreamModel(
            base_url=model.upstream.base_url,
            upstream_name=model.upstream.model or model.name,
            api_key=environment.provider_key(variable) if variable else None,
            **common,
        )

    def _answers(self, model: ModelConfig) -> dict[str, Any]:
        """How the model's requests are read and answered: as it says itself, or else the top level."""
        return {
            name: getattr(model if name in model.model_fields_set else self, name)
            for name in AnswerSettings.model_fields
        }


M = TypeVar("M", bound=BaseModel)


def _inherit(defaults: BaseModel, own: M) -> M:
    """`own` where it says something, `defaults` elsewhere."""
    kind = type(own)
    inherited = defaults.model_dump(include=set(kind.model_fields))
    return kind(**inherited | own.model_dump(exclude_unset=True))


# ---- reading it ---------------------------------------------------------------------------------------


def load(path: str | Path) -> Config:
    """Read a configuration file.

    Raises ConfigError, with every fault of the file, where it cannot be used.
    """
    path = Path(path)
    data, faults = strict_yaml.read(path)
    _anchor_sources(data, path.parent)
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        faults += _schema_faults(error, Config)
    faults += [*_name_faults(data), *_backend_faults(data)]
    if faults:
        raise ConfigError(path, faults)
    if faults := [*account_faults(config.accounts, config.listen, config.routers)]:
        raise ConfigError(path, faults)
    return config


def describe(config: Config) -> str:
    """The models of a configuration as a plain table."""
    rows = [("model", "engine", "source", "replicas", "gpus each")]
    return table(rows + [_row(model) for model in config.models])


def _row(model: ModelConfig) -> tuple[str, ...]:
    names = ", ".join((model.name, *model.aliases))
    if model.upstream is not None:
        return names, "upstream", model.upstream.base_url, "-", "-"
    gpus = "auto" if model.gpus is None and model.takes_gpus else str(model.gpus or 0)
    engine = " ".join(filter(None, (model.accelerator, model.engine)))
    return names, engine, model.source or "-", str(model.replicas), gpus


def _anchor_sources(data: dict[Any, Any], folder: Path) -> None:
    """A relative path to a model is meant from the configuration's folder, wherever the command is run."""
    for _, model in _models(data):
        if isinstance(given := model.get("source"), str):
            # A path that cannot be made absolute is refused by source.check, with the other faults.
            with suppress(OSError, RuntimeError, ValueError):
                model["source"] = source.anchored(given, folder)


# ---- finding faults -----------------------------------------------------------------------------------


def _schema_faults(error: ValidationError, kind: type[BaseModel], *within: str | int) -> list[Fault]:
    """What pydantic found, in our words; `within` is where in the file a value of `kind` stands."""
    faults = []
    for found in error.errors(include_url=False):
        location, wording, context = found["loc"], found["type"], found.get("ctx", {})
        if wording == "invalid_key":
            location = location[:-1]
        elif location[-1:] == ("[key]",):  # of engine_args, whose values may be anything
            location, wording = location[:-2], "invalid_key"
        details = {
            name: f"{bound:g}" if isinstance(bound, float) else bound for name, bound in context.items()
        }
        if wording == "extra_forbidden":
            details["known"] = nearest(str(location[-1]), _keys(kind, location[:-1]))
        faults.append(fault(field_at(*within, *location), wording, value=shown(found["input"]), **details))
    return faults


def _keys(kind: type[BaseModel], location: Iterable[str | int]) -> list[str]:
    """The keys that the schema knows at a location."""
    for step in location:
        if isinstance(step, str):
            annotation = kind.model_fields[step].annotation
            kind = next(
                inner
                for inner in (annotation, *get_args(annotation))
                if isinstance(inner, type) and issubclass(inner, BaseModel)
            )
    return list(kind.model_fields)


def _name_faults(data: dict[Any, Any]) -> Iterator[Fault]:
    names: dict[str, tuple[str, str]] = {}
    for field, name in _names(data):
        first, taken = names.setdefault(name.lower(), (field, name))
        if first != field:
            kind = "name_taken" if taken == name else "name_case"
            yield fault(field, kind, value=shown(name), first=first)


def _names(data: dict[Any, Any]) -> Iterator[tuple[str, str]]:
    for index, model in _models(data):
        aliases = model.get("aliases")
        named = [(field_at("models", index, "name"), model.get("name"))]
        if isinstance(aliases, list):
            named += [(field_at("models", index, "aliases", n), alias) for n, alias in enumerate(aliases)]
        yield from ((field, name) for field, name in named if isinstance(name, str))


def _backend_faults(data: dict[Any, Any]) -> Iterator[Fault]:
    for index, model in _models(data):
        match model.get("engine"), model.get("upstream"):
            case None, None:
                yield fault(field_at("models", index), "no_backend")
            case None, upstream:
                yield from _upstream_faults(index, model, upstream)
            case "vllm", None:
                yield from _vllm_faults(index, model)
            case "echo", None:
                yield from _echo_faults(index, model)
            case _, upstream if upstream is not None:
                yield fault(field_at("models", index, "upstream"), "two_backends")


def _upstream_faults(index: int, model: dict[Any, Any], upstream: object) -> Iterator[Fault]:
    for key in HOSTED_ONLY:
        if key in model:
            yield fault(field_at("models", index, key), "hosted_only")
    if isinstance(upstream, dict):
        field = field_at("models", index, "upstream", "api_key_env")
        yield from key_faults(field, upstream.get("api_key_env"))


def _vllm_faults(index: int, model: dict[Any, Any]) -> Iterator[Fault]:
    given = model.get("source")
    if given is None:
        yield fault(field_at("models", index, "source"), "source_missing")
    elif isinstance(given, str):
        yield from _source_faults(index, given)
    arguments = model.get("engine_args", {})
    simulated = model.get("accelerator") == "simulated"
    yield from _simulation_faults(index, model, simulated=simulated)
    try:
        if isinstance(arguments, dict):
            yield from _argument_faults(index, arguments, simulated=simulated)
            yield from _worker_faults(index, arguments, 0 if simulated else model.get("gpus", "auto"))
        yield from _parser_faults(index, model)
    except vllm_arguments.VllmMissing as error:
        yield fault(field_at("models", index, "engine"), "no_vllm", reason=error)


def _source_faults(index: int, given: str) -> Iterator[Fault]:
    try:
        source.check(given)
    except source.SourceError as error:
        yield Fault("", f"{field_at('models', index)}.{error}")  # its text begins with the word source
    except (OSError, RuntimeError, ValueError) as error:  # a path that no file system has
        yield fault(field_at("models", index, "source"), "unreadable", reason=error)


def _parser_faults(index: int, model: dict[Any, Any]) -> Iterator[Fault]:
    for kind in vllm_arguments.PARSERS:
        given, known = model.get(kind), vllm_arguments.parsers(kind)
        if isinstance(given, str) and given not in known:
            yield fault(field_at("models", index, kind), "unknown_parser", known=nearest(given, known))


def _simulation_faults(index: int, model: dict[Any, Any], *, simulated: bool) -> Iterator[Fault]:
    field = field_at("models", index, "simulation")
    if simulated and model.get("simulation") is None:
        yield fault(field, "simulation_missing")
    if not simulated and model.get("simulation") is not None and model.get("accelerator") is None:
        yield fault(field, "not_simulated")
    if simulated:
        yield from _gpu_faults(index, model, "a simulated accelerator")


def _gpu_faults(index: int, model: dict[Any, Any], engine: str) -> Iterator[Fault]:
    """What is wrong with the GPUs of an engine that uses none."""
    if type(gpus := model.get("gpus", 0)) is int and gpus > 0:
        yield fault(field_at("models", index, "gpus"), "gpus_unused", engine=engine, value=shown(gpus))


def _argument_faults(index: int, arguments: dict[Any, Any], *, simulated: bool) -> Iterator[Fault]:
    known = vllm_arguments.known()
    reserved = vllm_arguments.RESERVED | (vllm_arguments.RESERVED_BY_SIMULATION if simulated else {})
    for argument in filter(lambda key: isinstance(key, str), arguments):
        field = field_at("models", index, "engine_args", argument)
        if reason := reserved.get(argument):
            yield fault(field, "reserved_argument", reason=reason)
        elif argument not in known:
            near = nearest(argument, known - reserved.keys())
            yield fault(field, "unknown_argument", known=near)


def _worker_faults(index: int, arguments: dict[Any, Any], gpus: object) -> Iterator[Fault]:
    sizes = {argument: arguments.get(argument, 1) for argument in WORKER_ARGUMENTS}
    wrong = {argument: size for argument, size in sizes.items() if type(size) is not int or size < 1}
    for argument, size in wrong.items():
        yield fault(field_at("models", index, "engine_args", argument), "workers", value=shown(size))
    workers = None if wrong else math.prod(sizes.values())
    if workers and type(gpus) is int and gpus > 0 and gpus != workers:
        yield fault(field_at("models", index, "gpus"), "gpus", value=shown(gpus), workers=workers)


def _echo_faults(index: int, model: dict[Any, Any]) -> Iterator[Fault]:
    if model.get("source") is not None:
        yield fault(field_at("models", index, "source"), "source_unused")
    for kind in vllm_arguments.PARSERS:
        if model.get(kind) is not None:
            yield fault(field_at("models", index, kind), "parser_unused")
    for key in ("accelerator", "simulation"):
        if model.get(key) is not None:
            yield fault(field_at("models", index, key), "accelerator_unused")
    yield from _gpu_faults(index, model, "the echo engine")
    arguments = model.get("engine_args", {})
    if isinstance(arguments, dict):
        try:
            EchoArguments.model_validate(arguments)
        except ValidationError as error:
            yield from _schema_faults(error, EchoArguments, "models", index, "engine_args")


def _models(data: dict[Any, Any]) -> Iterator[tuple[int, dict[Any, Any]]]:
    """The models as they stand in the file; the schema's faults may be anywhere in them."""
    models = data.get("models")
    if isinstance(models, list):
        yield from ((index, model) for index, model in enumerate(models) if isinstance(model, dict))
