"""Every router metric: its name, unit, labels and sentence, and how it is counted.

No label value comes from a client, or there would be no bound on the number of series: `model` is a name of
the catalog, or empty where a request was refused before it was known to name one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from prometheus_client.registry import CollectorRegistry

from serving.metrics import (
    TRUNK_BYTES,
    TRUNK_FRAMES,
    Counter,
    CounterFamily,
    Definition,
    HistogramFamily,
    TrunkTraffic,
    gauge,
)

Outcome = Literal["completed", "cancelled", "failed", "refused"]
"""How a request ended: its whole answer was handed over; its client left; it failed after a replica had
accepted it; or it was turned away before."""

RATE_SPAN = 5.0
"""Seconds over which `trunkline_tokens_per_second` looks back, and up to one tick more."""

PROMPT_TOKENS = Definition(
    "trunkline_prompt_tokens_total",
    "counter",
    "tokens",
    ("model",),
    "Prompt tokens of accepted requests, each request once.",
)
GENERATION_TOKENS = Definition(
    "trunkline_generation_tokens_total",
    "counter",
    "tokens",
    ("model",),
    "Generated tokens that were handed to a client's socket, whatever became of the request.",
)
TOKENS_PER_SECOND = Definition(
    "trunkline_tokens_per_second",
    "gauge",
    "tokens per second",
    ("model",),
    "Growth of trunkline_generation_tokens_total over the last five to six seconds.",
)
REQUESTS = Definition(
    "trunkline_requests_total",
    "counter",
    "requests",
    ("model", "outcome", "status"),
    "Requests that have ended: completed, cancelled, failed or refused, by HTTP status (499: client left).",
)
TTFT = Definition(
    "trunkline_time_to_first_token_seconds",
    "histogram",
    "seconds",
    ("model",),
    "Time from a streamed request's arrival until its first token was handed to the client's socket.",
    (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0),
)
ITL = Definition(
    "trunkline_inter_token_latency_seconds",
    "histogram",
    "seconds",
    ("model",),
    "Time between two chunks with tokens handed to the same client's socket, once per chunk.",
    (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5, 10.0, 60.0),
)
REQUEST_DURATION = Definition(
    "trunkline_request_duration_seconds",
    "histogram",
    "seconds",
    ("model",),
    "Time from a completed request's arrival until its last byte was handed to the client's socket.",
    (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
IN_FLIGHT = Definition(
    "trunkline_in_flight",
    "gauge",
    "slots",
    ("model",),
    "Slots of the model's in-flight limit in use: one for each choice of each admitted request.",
)
WAITING = Definition(
    "trunkline_waiting",
    "gauge",
    "requests",
    ("model",),
    "Requests that wait in the router for a replica to take them.",
)
TRUNKS = Definition(
    "trunkline_trunks",
    "gauge",
    "connections",
    ("model",),
    "Trunks between this router and the model's replicas that are up.",
)

STORE_UP = Definition(
    "trunkline_store_up",
    "gauge",
    "1 or 0",
    (),
    "Whether the store of accounts takes this router's rows: 1, or 0 while they go to its spool.",
)
SPOOLED = Definition(
    "trunkline_spooled_bytes",
    "gauge",
    "bytes",
    (),
    "Rows of the ledger that wait in this router's spool for the store.",
)

ROUTER_METRICS = (
    PROMPT_TOKENS,
    GENERATION_TOKENS,
    TOKENS_PER_SECOND,
    REQUESTS,
    TTFT,
    ITL,
    REQUEST_DURATION,
    IN_FLIGHT,
    WAITING,
    TRUNKS,
    TRUNK_FRAMES,
    TRUNK_BYTES,
    STORE_UP,
    SPOOLED,
)
"""Every metric of a router beside its process's (`process_*`, ...)."""


class RouterMetrics:
    """A router's metrics in `registry`, counted on one event loop. One per registry."""

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float] = time.perf_counter) -> None:
        """`clock` gives the same seconds as every `now` that is passed in."""
        self.clock = clock
        self._registry = registry
        self.prompt_tokens = CounterFamily(PROMPT_TOKENS, registry)
        self.generation_tokens = CounterFamily(GENERATION_TOKENS, registry)
        self.tokens_per_second = gauge(TOKENS_PER_SECOND, registry)
        self.requests = CounterFamily(REQUESTS, registry)
        self.ttft = HistogramFamily(TTFT, registry)
        self.itl = HistogramFamily(ITL, registry)
        self.duration = HistogramFamily(REQUEST_DURATION, registry)
        self.in_flight = gauge(IN_FLIGHT, registry)
        self.waiting = gauge(WAITING, registry)
        self.trunks = gauge(TRUNKS, registry)
        self.trunk_frames = CounterFamily(TRUNK_FRAMES, registry)
        self.trunk_bytes = CounterFamily(TRUNK_BYTES, registry)
        self._models: dict[str, ModelMetrics] = {}

    def for_model(self, name: str) -> ModelMetrics:
        """The metrics of a model of the catalog; the same object every time."""
        model = self._models.get(name)
        if model is None:
            model = self._models[name] = ModelMetrics(self, name)
        return model

    def watch_ledger(self, *, up: Callable[[], float], spooled: Callable[[], float]) -> None:
        """Add the gauges of a ledger. Each function is called at every scrape, possibly from a thread."""
        gauge(STORE_UP, self._registry).set_function(up)
        gauge(SPOOLED, self._registry).set_function(spooled)

    def refused(self, status: int) -> None:
        """A request was turned away before it was known to name a model."""
        self.requests.child("", "refused", str(status)).add(1)

    def tick(self, now: float) -> None:
        """Keep the rates' windows moving; to be called about once a second."""
        for model in self._models.values():
            model.rate.tick(now)


class ModelMetrics:
    """One model's metrics, its label looked up once."""

    def __init__(self, metrics: RouterMetrics, name: str) -> None:
        self.name = name
        self.prompt_tokens = metrics.prompt_tokens.child(name)
        self.generation_tokens = metrics.generation_tokens.child(name)
        self.requests = metrics.requests
        self.ttft = metrics.ttft.child(name)
        self.itl = metrics.itl.child(name)
        self.duration = metrics.duration.child(name)
        self.trunk = TrunkTraffic(
            metrics.trunk_frames.child(name, "to_replica"), metrics.trunk_bytes.child(name, "to_replica")
        )
        self.rate = RateWindow(self.generation_tokens, metrics.clock())
        metrics.tokens_per_second.labels(name).set_function(lambda: self.rate.per_second(metrics.clock()))
        self._metrics = metrics

    def watch(self, *, in_flight: Callable[[], float], waiting: Callable[[], float]) -> None:
        """Where the gauges' values come from. Each is called at every scrape, possibly from a thread."""
        self._metrics.in_flight.labels(self.name).set_function(in_flight)
        self._metrics.waiting.labels(self.name).set_function(waiting)

    def watch_trunks(self, trunks: Callable[[], float]) -> None:
        """The same for the gauge that only a hosted model has."""
        self._metrics.trunks.labels(self.name).set_function(trunks)

    def started(self, now: float) -> RequestMetrics:
        """A request for this model arrived at `now`; its `finished` is to be called once, however it ends."""
        return RequestMetrics(self, now)


class RequestMetrics:
    """What one request adds to its model's metrics. Times are seconds of the router's clock."""

    __slots__ = ("_accepted", "_last_chunk", "_model", "_started")

    def __init__(self, model: ModelMetrics, now: float) -> None:
        self._model = model
        self._started = now
        self._accepted = False
        self._last_chunk: float | None = None

    def accepted(self, prompt_tokens: int) -> None:
        """A replica took the request. Counts once, though a retry makes a second replica take it."""
        if not self._accepted:
            self._accepted = True
            self._model.prompt_tokens.add(prompt_tokens)

    def chunk(self, tokens: int, now: float) -> None:
        """A chunk of a stream with so many tokens was handed to the client's socket. One without tokens
        changes nothing."""
        if not tokens:
            return
        model, last = self._model, self._last_chunk
        self._last_chunk = now
        model.generation_tokens.add(tokens)
        if last is None:
            model.ttft.observe(now - self._started)
        else:
            model.itl.observe(now - last)

    def body(self, tokens: int) -> None:
        """A whole answer with so many tokens was handed to the client's socket."""
        self._model.generation_tokens.add(tokens)

    def finished(self, outcome: Outcome, status: int, now: float) -> None:
        """The request has ended; `status` is the one that its client was sent, or 499 where it left."""
        model = self._model
        model.requests.child(model.name, outcome, str(status)).add(1)
        if outcome == "completed":
            model.duration.observe(now - self._started)


class RateWindow:
    """How fast a counter grew lately. The counting costs nothing extra: the window reads the counter at each
    tick and at each question."""

    __slots__ = ("_counter", "_samples")

    def __init__(self, counter: Counter, now: float) -> None:
        self._counter = counter
        self._samples: tuple[tuple[float, int], ...] = ((now, counter.value),)
        """(time, value), oldest first. Replaced as a whole: a question from a thread sees one state."""

    def tick(self, now: float) -> None:
        """Remember the counter's value at `now` and forget what no later question can need."""
        start = self._start(now)
        self._samples = (*(s for s in self._samples if s[0] >= start[0]), (now, self._counter.value))

    def per_second(self, now: float) -> float:
        """The mean growth since the last tick that is at least RATE_SPAN old, or since the first."""
        since, value = self._start(now)
        return (self._counter.value - value) / (now - since) if now > since else 0.0

    def _start(self, now: float) -> tuple[float, int]:
        samples = self._samples
        return next((s for s in reversed(samples) if s[0] <= now - RATE_SPAN), samples[0])
