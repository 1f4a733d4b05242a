"""One request in the replica: render, generate, bytes.

The bytes that leave here are the ones that the client reads; nothing after it looks inside them.
"""

from __future__ import annotations

from collections.abc import Sequence

import structlog
from msgspec.structs import replace

from serving.answers import INTERNAL, Outlet
from serving.chat import ChatBody, ChatStream
from serving.engine import Engine, EngineDead, Prompt, Refusal, Sink
from serving.messages import Request, Text, Usage
from serving.rich_chat import RichBody, RichStream
from serving.text import TextBody, TextStream

log = structlog.get_logger(__name__)


async def generate(engine: Engine, request: Request, outlet: Outlet) -> None:
    """Render the prompts and start generating into `outlet`; returns when the engine has the request.

    Never raises: what the client may know becomes a refusal, the rest is logged and refused as internal.
    """
    try:
        asked = _asked(request)
        prompts = await engine.render(asked)
        await engine.generate(asked, prompts, sink_for(request, prompts, outlet))
    except Refusal as refusal:
        outlet.refused(refusal)
    except EngineDead as error:
        log.warning("the engine took no request", completion=request.id, error=str(error))
        outlet.ended(b"", 0, Usage(0, 0), failed=True)
    except Exception:
        log.exception("request failed before generation", completion=request.id)
        outlet.refused(INTERNAL)


def sink_for(request: Request, prompts: Sequence[Prompt], outlet: Outlet) -> Sink:
    """Where an engine is to put what it makes of the request: the one place that decides who writes the
    client's bytes.

    Raises Refusal for an answer that would be too long before it has begun.
    """
    if isinstance(request, Text):
        return (TextStream if request.stream else TextBody)(request, prompts, outlet)
    if prompts[0].parser is None and request.logprobs is None:
        return (ChatStream if request.stream else ChatBody)(request, prompts, outlet)
    return (RichStream if request.stream else RichBody)(request, prompts, outlet)


def _asked(request: Request) -> Request:
    """The request as an engine can do it: with at least one token. Who wanted none is not shown it."""
    if request.sampling.max_tokens:
        return request
    return replace(request, sampling=replace(request.sampling, max_tokens=1))
