"""Every way in which the router says no, and how the client reads it.

    ApiError
    ├── InvalidRequest          400
    ├── WrongEndpoint           400
    ├── MalformedRequest        400
    ├── MissingProviderKey      401
    ├── MissingKey              401
    ├── InvalidKey              401
    ├── WrongPassword           401
    ├── Forbidden               403
    ├── BadCsrf                 403
    ├── ModelForbidden          403
    ├── ModelNotFound           404
    ├── NotFound                404
    ├── UnknownPath             404
    ├── MethodNotAllowed        405  with Allow
    ├── RequestTimeout          408
    ├── Taken                   409
    ├── BodyTooLarge            413
    ├── UnsupportedMediaType    415
    ├── QuotaExceeded           429
    ├── HeadersTooLarge         431
    ├── SlowReader              499  only ever an event: bytes had gone out
    ├── InternalError           500
    ├── UpstreamFailed          502
    ├── ProviderError           502  or the status that the provider gave
    ├── FirstTokenTimeout       504
    ├── Stalled                 504
    ├── TotalTimeout            504
    ├── UpstreamTimeout         504
    └── RetryLater                   with Retry-After
        ├── Overloaded          429
        ├── RateLimited         429
        ├── TooManyFailures     429
        ├── LimitsUnavailable   503
        ├── NoReplica           503
        ├── ReplicaLost         503
        ├── ShuttingDown        503
        ├── StoreUnavailable    503
        └── TooManyConnections  503

Before a byte of the answer has gone out an error is a status and `body()`; after that it is the stream's
last `event()`. Both carry OpenAI's envelope. Messages are for the client: they name what it sent and what it
may do, and nothing of the inside.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from serving.messages import Refused

MAX_RETRY_AFTER = 600
"""Seconds. Nobody waits longer, and an estimate beyond it says nothing."""

SHOWN = 60
"""Characters of a client's value that a message repeats."""

_BEARER = {"www-authenticate": "Bearer"}

_HOPELESS = {"x-should-retry": "false"}
"""OpenAI's SDKs repeat what was answered with 429, unless it says this."""

_json = json.JSONEncoder(ensure_ascii=False)


def shown(value: Any) -> str:
    """A value out of the client's JSON as it was written there, cut after `SHOWN` characters."""
    text = ""
    for piece in _json.iterencode(value):  # piece by piece, so that a long value is not written out whole
        text += piece
        if len(text) > SHOWN:
            return text[: SHOWN - 3] + "..."
    return text


class ApiError(Exception):
    """What a client is told instead of an answer. Each leaf has its status and code."""

    status: int
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        """The field that is wrong, as a path: `messages[2].role`."""
        if code is not None:
            self.code = code
        self.headers = headers or {}
        """Response headers of this error, names in lower case."""

    @property
    def type(self) -> str:
        """OpenAI's class of error, which follows from the status."""
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    def body(self) -> bytes:
        """OpenAI's error envelope, in ASCII and on one line."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}, separators=(",", ":")).encode()

    def event(self) -> bytes:
        """The envelope as a server-sent event, the last of a stream that cannot go on."""
        return b"data: " + self.body() + b"\n\n"


class InvalidRequest(ApiError):
    """The request is not one that the API describes."""

    status = 400
    code = "invalid_value"


class WrongEndpoint(ApiError):
    """The model answers, but not here."""

    status = 400
    code = "wrong_endpoint"

    def __init__(self, model: str, flag: str) -> None:
        super().__init__(
            f"model: {shown(model)} does not answer here: its {flag} in GET /v1/models is false",
            param="model",
        )


class MalformedRequest(ApiError):
    """What came is not HTTP."""

    status = 400
    code = "malformed_request"

    def __init__(self) -> None:
        super().__init__("this is not a request of HTTP/1.1")


class MissingProviderKey(ApiError):
    """The model is a provider's, and nobody has given a key for it."""

    status = 401
    code = "missing_provider_key"

    def __init__(self, model: str) -> None:
        super().__init__(
            f"the model {shown(model)} is served by a provider: send your key for it, in printable ASCII, in"
            " the header X-OpenAI-Api-Key"
        )


class MissingKey(ApiError):
    """The request says nothing of who sends it."""

    status = 401
    code = "missing_api_key"

    def __init__(self) -> None:
        super().__init__("no key was sent: send yours as `Authorization: Bearer KEY`", headers=_BEARER)


class InvalidKey(ApiError):
    """The key is none, or none any more."""

    status = 401
    code = "invalid_api_key"

    def __init__(self) -> None:
        super().__init__(
            "the key is not known here: it is wrong, was revoked, or its account is disabled", headers=_BEARER
        )


class WrongPassword(ApiError):
    """No account of that name has that password."""

    status = 401
    code = "wrong_password"

    def __init__(self) -> None:
        super().__init__("no account has this name and this password")


class Forbidden(ApiError):
    """It is not the caller's to do."""

    status = 403
    code = "forbidden"


class BadCsrf(ApiError):
    """A browser sent its cookie, and perhaps none of our pages made it do so."""

    status = 403
    code = "bad_csrf_token"

    def __init__(self) -> None:
        super().__init__(
            "a request that comes with the console's cookie needs the page's token in X-CSRF-Token: load the"
            " page again, or send a key"
        )


class ModelForbidden(ApiError):
    """The key is good, and not for this model."""

    status = 403
    code = "model_forbidden"

    def __init__(self, model: str) -> None:
        super().__init__(f"this key may not use the model {shown(model)}", param="model")


class ModelNotFound(ApiError):
    """No model of that name."""

    status = 404
    code = "model_not_found"

    def __init__(self, model: str) -> None:
        super().__init__(
            f"the model {shown(model)} does not exist; GET /v1/models lists those that do", param="model"
        )


class NotFound(ApiError):
    """Nothing of that kind has that id, or it is another account's."""

    status = 404
    code = "not_found"

    def __init__(self, kind: str, identifier: str) -> None:
        """`kind` is a word for what was looked for: key, account, request."""
        super().__init__(f"there is no {kind} {shown(identifier)}")


class UnknownPath(ApiError):
    """Nothing lives at that path."""

    status = 404
    code = "unknown_url"

    def __init__(self, path: str) -> None:
        super().__init__(
            f"{shown(path)} is not served" if path.startswith("/v1/") else f"no such path: {shown(path)}"
        )


class MethodNotAllowed(ApiError):
    """The path is served, by other methods."""

    status = 405
    code = "method_not_allowed"

    def __init__(self, method: str, path: str, allowed: Iterable[str]) -> None:
        methods = ", ".join(allowed)
        super().__init__(f"{shown(path)} takes {methods}, not {method}", headers={"allow": methods})


class RequestTimeout(ApiError):
    """The body, or another part of the request, came too slowly."""

    status = 408
    code = "request_timeout"

    def __init__(self, seconds: float, part: str = "body") -> None:
        super().__init__(f"the {part} did not arrive within {seconds:g} s")


class Taken(ApiError):
    """Something else has this name already."""

    status = 409
    code = "taken"

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"name: there is an {kind} {shown(name)} already", param="name")


class BodyTooLarge(ApiError):
    """The body is over the limit."""

    status = 413
    code = "body_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"the body is longer than {limit} bytes")


class UnsupportedMediaType(ApiError):
    """The body does not claim to be JSON."""

    status = 415
    code = "unsupported_media_type"

    def __init__(self, content_type: str | None) -> None:
        said = f", not {shown(content_type)}" if content_type else ""
        super().__init__(f"content-type must be application/json{said}")


class QuotaExceeded(ApiError):
    """The month's money is spent, or reserved for what is running."""

    status = 429
    code = "insufficient_quota"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers=_HOPELESS)


class HeadersTooLarge(ApiError):
    """What comes before the body is over the limit."""

    status = 431
    code = "headers_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"the request line and the headers are longer than {limit} bytes")


class SlowReader(ApiError):
    """The client reads its stream so slowly that more than its buffer holds has gathered."""

    status = 499
    code = "slow_reader"

    def __init__(self, limit: int) -> None:
        super().__init__(f"the stream was not read: {limit} bytes are waiting, which is as many as may")


class InternalError(ApiError):
    """Anything that no other error describes; the log says what."""

    status = 500
    code = "internal_error"

    def __init__(self) -> None:
        super().__init__("internal error")


class UpstreamFailed(ApiError):
    """The provider could not be asked, or what came from it is no answer."""

    status = 502
    code = "upstream_failed"


class FirstTokenTimeout(ApiError):
    """The model took the request and made nothing of it in time."""

    status = 504
    code = "first_token_timeout"

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the model produced nothing within {seconds:g} s")


class Stalled(ApiError):
    """The model stopped producing in the middle of an answer."""

    status = 504
    code = "stalled"

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the model produced nothing more for {seconds:g} s")


class TotalTimeout(ApiError):
    """The answer took longer than an answer may."""

    status = 504
    code = "total_timeout"

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the answer was not complete within {seconds:g} s")


class UpstreamTimeout(ApiError):
    """The provider could not be connected to in time."""

    status = 504
    code = "upstream_timeout"

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the provider could not be connected to within {seconds:g} s")


class ProviderError(ApiError):
    """The provider said no, and this is what it said."""

    status = 502
    code = "upstream_error"

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str | None,
        param: str | None,
        code: str | None,
        headers: Mapping[str, str],
    ) -> None:
        """`kind` is its class of error, where it told one."""
        super().__init__(message, param=param, code=code, headers=headers)
        self.status = status
        self._kind = kind

    @property
    def type(self) -> str:
        return self._kind or super().type


class RetryLater(ApiError):
    """Nothing is wrong with the request: the same one may succeed after `Retry-After`."""

    def __init__(self, message: str, *, retry_after: float = 1) -> None:
        super().__init__(message, headers=_retry_after(retry_after))


class Overloaded(RetryLater):
    """The model has as many requests in flight and waiting as it may."""

    status = 429
    code = "overloaded"

    def __init__(self, model: str, *, retry_after: float) -> None:
        super().__init__(
            f"the model {shown(model)} has no room for this request now", retry_after=retry_after
        )


class TooManyFailures(RetryLater):
    """Somebody has tried passwords for that account too often."""

    status = 429
    code = "too_many_failures"

    def __init__(self, retry_after: float) -> None:
        super().__init__(
            f"too many failed log-ins: try again in {math.ceil(retry_after)} s", retry_after=retry_after
        )


class RateLimited(RetryLater):
    """The key, or the model for all, has had as much as its limits let it have now."""

    status = 429
    code = "rate_limit_exceeded"

    def __init__(
        self,
        message: str,
        *,
        retry_after: float,
        headers: Mapping[str, str] | None = None,
        never: bool = False,
    ) -> None:
        """`headers`: what is left of the limits. `never`: this request will not fit later either."""
        super().__init__(message, retry_after=retry_after)
        self.headers = {**self.headers, **(headers or {}), **(_HOPELESS if never else {})}


class LimitsUnavailable(RetryLater):
    """What is left of the limits cannot be looked up now."""

    status = 503
    code = "limits_unavailable"

    def __init__(self) -> None:
        super().__init__("the limits cannot be counted now")


class NoReplica(RetryLater):
    """The model is known, and nothing healthy took the request in time."""

    status = 503
    code = "no_replica"

    def __init__(self, model: str, *, retry_after: float = 1) -> None:
        super().__init__(f"the model {shown(model)} is not ready", retry_after=retry_after)


class ReplicaLost(RetryLater):
    """What was generating the answer is gone."""

    status = 503
    code = "replica_lost"

    def __init__(self) -> None:
        super().__init__("generation was interrupted: the replica that ran it was lost")


class ShuttingDown(RetryLater):
    """The server ends what it has begun and begins nothing."""

    status = 503
    code = "shutting_down"

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class StoreUnavailable(RetryLater):
    """Who may call, or what is used, cannot be looked up or kept now."""

    status = 503
    code = "store_unavailable"

    def __init__(self) -> None:
        super().__init__("the store of accounts cannot be reached now")


class TooManyConnections(RetryLater):
    """The server has as many connections open as it may."""

    status = 503
    code = "too_many_connections"

    def __init__(self) -> None:
        super().__init__("the server has as many connections as it may have")


def from_refusal(refused: Refused) -> ApiError:
    """The error that a replica's refusal is to the client, in the replica's words."""
    headers = _retry_after(refused.retry_after or 1) if refused.status in {429, 503} else None
    error = ApiError(refused.message, param=refused.param, code=refused.code, headers=headers)
    error.status = refused.status
    return error


def _retry_after(seconds: float) -> dict[str, str]:
    """Whole seconds, at least one, also where the estimate is infinite or not a number."""
    return {"retry-after": str(math.ceil(min(MAX_RETRY_AFTER, max(1, seconds))))}
