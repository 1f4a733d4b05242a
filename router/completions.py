"""POST /v1/chat/completions and /v1/completions: validate, admit, dispatch, answer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from time import time
from typing import Any, NamedTuple

import structlog
from starlette.types import Receive, Scope, Send

from router.backend import Job
from router.call import Call, ClientLeft
from router.catalog import Catalog
from router.errors import ApiError, InternalError, ReplicaLost, ShuttingDown, WrongEndpoint
from router.gate import Gate
from router.metrics import RouterMetrics
from router.protocol import model_name, read_json
from router.reading import read_chat, read_text
from router.settings import ModelSettings, RouterSettings
from router.trunk import Lost
from serving.messages import Request

log = structlog.get_logger(__name__)


class Endpoint(NamedTuple):
    """One of the paths that answer with tokens."""

    read: Callable[[dict[str, Any], ModelSettings, str, str, int], Request]
    flag: str
    """What a model's card calls it that the model answers here."""
    prefix: str
    """What the id of an answer begins with."""


ENDPOINTS = {
    "/v1/chat/completions": Endpoint(read_chat, "is_chat", "chatcmpl-"),
    "/v1/completions": Endpoint(read_text, "is_text", "cmpl-"),
}


class Completions:
    """Both endpoints, as an ASGI application of its own: nothing stands between it and the socket."""

    def __init__(
        self,
        catalog: Catalog,
        settings: RouterSettings,
        metrics: RouterMetrics,
        gate: Gate,
    ) -> None:
        self.draining = False
        self._gate = gate
        self._catalog = catalog
        self._settings = settings
        self._metrics = metrics
        # Bound once: one that is not is looked up anew for each line.
        self._requests = structlog.get_logger("router.requests").bind()

    async def __call__(self, scope: Scope, receive: Receive, _send: Send) -> None:
        call = Call(scope, receive, self._metrics, self._settings.accounts.cors_origins)
        try:
            await self._complete(call)
        except ApiError as error:
            await call.fail(error)
        except Lost:
            await call.fail(ReplicaLost())
        except ClientLeft:
            pass
        except Exception:
            log.exception("request failed", request_id=call.request_id, key=call.key)
            await call.fail(InternalError())
        finally:
            call.finish(self._requests)

    async def _complete(self, call: Call) -> None:
        if self.draining:
            raise ShuttingDown
        settings = self._settings
        call.entry = await self._gate.enter(call.headers, call.key, call.request_id, call.path)
        body = await call.read(settings.limits.body_bytes, settings.timeouts.body_s)
        call.entry.asked(body)
        data = read_json(body)
        name, model = self._catalog.find(model_name(data))
        call.is_for(name, model.metrics)
        endpoint = ENDPOINTS[call.path]
        if not getattr(model.settings.card, endpoint.flag):
            raise WrongEndpoint(name, endpoint.flag)
        request = endpoint.read(data, model.settings, endpoint.prefix + call.key, name, int(time()))
        call.streamed = request.stream
        job = Job(call.key, request, data, call.provider_key)
        timeouts = model.settings.timeouts
        model.backend.check(job)
        await call.entry.admit(model.settings, request, len(body), model.backend.context_length)
        with (
            call.interruptible(timeouts.total_s) as work,
            closing(await model.admission.admit(request.sequences, timeouts.queue_s, call.entry.caller)),
            closing(await model.backend.generate(job, timeouts.queue_s, call.tried)) as stream,
        ):
            del (
                body,
                data,
                request,
                job,
            )  # a long conversation need not be held for as long as its answer takes
            await call.answer(stream, work)
