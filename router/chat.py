"""POST /v1/chat/completions: validate, admit, dispatch, answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

import structlog
from starlette.types import Receive, Scope, Send

from router.call import Call, ClientLeft
from router.catalog import Catalog
from router.errors import ApiError, InternalError, ReplicaLost, ShuttingDown, TotalTimeout
from router.metrics import RouterMetrics
from router.protocol import model_name, parse_chat, read_json
from router.settings import RouterSettings
from router.trunk import Lost

log = structlog.get_logger(__name__)


class ChatCompletions:
    """The endpoint, as an ASGI application of its own: nothing stands between it and the socket."""

    def __init__(self, catalog: Catalog, settings: RouterSettings, metrics: RouterMetrics) -> None:
        self.draining = False
        self._catalog = catalog
        self._settings = settings
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = Call(scope, receive, send, self._metrics)
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
            call.finish()

    async def _complete(self, call: Call) -> None:
        if self.draining:
            raise ShuttingDown
        settings = self._settings
        data = read_json(await call.read(settings.limits.body_bytes, settings.timeouts.body_s))
        name, model = self._catalog.find(model_name(data))
        call.is_for(name, model.metrics)
        request = parse_chat(
            data,
            max_messages=model.settings.limits.messages,
            default_max_tokens=model.settings.default_max_tokens,
        )
        call.streamed = request.stream
        message = request.to_message(f"chatcmpl-{call.key}", name, int(time.time()))
        timeouts = model.settings.timeouts
        async with call.connected(), within(timeouts.total_s):
            with (
                closing(await model.admission.admit(request.n, timeouts.queue_s)),
                closing(await model.replicas.generate(message, timeouts.queue_s, call.tried)) as stream,
            ):
                await call.answer(stream)


@asynccontextmanager
async def within(total_s: float) -> AsyncIterator[None]:
    """Raises TotalTimeout in the block after `total_s` seconds."""
    try:
        async with asyncio.timeout(total_s):
            yield
    except TimeoutError:
        raise TotalTimeout(total_s) from None
