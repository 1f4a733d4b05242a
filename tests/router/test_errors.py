from __future__ import annotations

import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router import errors
from router.answers import ErrorEnvelope
from router.errors import ApiError, RetryLater, from_refusal, shown
from serving.messages import Refused

PROVIDER_ERROR = errors.ProviderError(402, "pay", kind="of_its_own", param=None, code=None, headers={})

EVERY_ERROR: list[tuple[ApiError, int, str, str]] = [
    (errors.InvalidRequest("n must be", param="n"), 400, "invalid_request_error", "invalid_value"),
    (errors.WrongEndpoint("m", "is_text"), 400, "invalid_request_error", "wrong_endpoint"),
    (errors.MalformedRequest(), 400, "invalid_request_error", "malformed_request"),
    (errors.MissingProviderKey("m"), 401, "invalid_request_error", "missing_provider_key"),
    (errors.MissingKey(), 401, "invalid_request_error", "missing_api_key"),
    (errors.InvalidKey(), 401, "invalid_request_error", "invalid_api_key"),
    (errors.WrongPassword(), 401, "invalid_request_error", "wrong_password"),
    (errors.Forbidden("an admin may"), 403, "invalid_request_error", "forbidden"),
    (errors.BadCsrf(), 403, "invalid_request_error", "bad_csrf_token"),
    (errors.ModelForbidden("m"), 403, "invalid_request_error", "model_forbidden"),
    (errors.NotFound("key", "ab12"), 404, "invalid_request_error", "not_found"),
    (errors.ModelNotFound("gpt-9"), 404, "invalid_request_error", "model_not_found"),
    (errors.UnknownPath("/v1/embeddings"), 404, "invalid_request_error", "unknown_url"),
    (
        errors.MethodNotAllowed("GET", "/v1/chat/completions", ["POST"]),
        405,
        "invalid_request_error",
        "method_not_allowed",
    ),
    (errors.RequestTimeout(30.0), 408, "invalid_request_error", "request_timeout"),
    (errors.Taken("account", "ada"), 409, "invalid_request_error", "taken"),
    (errors.BodyTooLarge(1024), 413, "invalid_request_error", "body_too_large"),
    (errors.UnsupportedMediaType("text/plain"), 415, "invalid_request_error", "unsupported_media_type"),
    (errors.QuotaExceeded("it is spent"), 429, "rate_limit_error", "insufficient_quota"),
    (errors.RateLimited("too many", retry_after=3.2), 429, "rate_limit_error", "rate_limit_exceeded"),
    (errors.HeadersTooLarge(1024), 431, "invalid_request_error", "headers_too_large"),
    (errors.Overloaded("m", retry_after=3.2), 429, "rate_limit_error", "overloaded"),
    (errors.TooManyFailures(8.0), 429, "rate_limit_error", "too_many_failures"),
    (errors.SlowReader(1024), 499, "invalid_request_error", "slow_reader"),
    (errors.InternalError(), 500, "server_error", "internal_error"),
    (errors.UpstreamFailed("it broke off"), 502, "server_error", "upstream_failed"),
    (PROVIDER_ERROR, 402, "of_its_own", "upstream_error"),
    (errors.LimitsUnavailable(), 503, "server_error", "limits_unavailable"),
    (errors.NoReplica("m"), 503, "server_error", "no_replica"),
    (errors.ReplicaLost(), 503, "server_error", "replica_lost"),
    (errors.ShuttingDown(), 503, "server_error", "shutting_down"),
    (errors.StoreUnavailable(), 503, "server_error", "store_unavailable"),
    (errors.TooManyConnections(), 503, "server_error", "too_many_connections"),
    (errors.FirstTokenTimeout(300.0), 504, "server_error", "first_token_timeout"),
    (errors.Stalled(60.0), 504, "server_error", "stalled"),
    (errors.TotalTimeout(3600.0), 504, "server_error", "total_timeout"),
    (errors.UpstreamTimeout(5.0), 504, "server_error", "upstream_timeout"),
]

every_error = pytest.mark.parametrize(
    ("error", "status", "type_", "code"), EVERY_ERROR, ids=[type(row[0]).__name__ for row in EVERY_ERROR]
)


def leaves(of: type[ApiError] = ApiError) -> set[type[ApiError]]:
    """The classes of the file that have none below them."""
    below = [leaf for leaf in of.__subclasses__() if leaf.__module__ == errors.__name__]
    return set().union(*map(leaves, below)) or {of}


@every_error
def test_every_error_is_openais_envelope(error: ApiError, status: int, type_: str, code: str) -> None:
    """Each leaf knows its status, and its body is OpenAI's envelope with a type, a code and a message."""
    envelope = ErrorEnvelope.model_validate_json(error.body()).error
    assert (error.status, envelope.type, envelope.code) == (status, type_, code)
    assert envelope.message == error.message == str(error)
    assert envelope.message
    assert envelope.param == error.param


@every_error
def test_an_event_is_one_line_of_server_sent_events(
    error: ApiError, status: int, type_: str, code: str
) -> None:
    """In a stream the same envelope is one `data:` line and the empty line that ends it."""
    event = error.event()
    assert event == b"data: " + error.body() + b"\n\n"
    assert len(event.splitlines()) == 2


def test_the_table_above_has_every_leaf() -> None:
    """No error is left out of these tests."""
    assert {type(row[0]) for row in EVERY_ERROR} == leaves()


def test_the_drawn_tree_is_the_real_one() -> None:
    """The drawing at the top of the file has every leaf, with its status."""
    drawn = dict(re.findall(r"── (\w+) +(\d{3})\b", errors.__doc__ or ""))
    assert drawn == {leaf.__name__: str(leaf.status) for leaf in leaves()}


@pytest.mark.parametrize("error", [row[0] for row in EVERY_ERROR if isinstance(row[0], RetryLater)])
def test_what_may_succeed_later_says_when(error: RetryLater) -> None:
    """Every 429 and 503 carries Retry-After in whole seconds, at least one."""
    assert int(error.headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    ("estimate", "header"),
    [(0.0, "1"), (-5.0, "1"), (1.0, "1"), (1.01, "2"), (42, "42"), (math.inf, "600"), (math.nan, "1")],
)
def test_retry_after_is_rounded_up_and_bounded(estimate: float, header: str) -> None:
    """Whatever the estimate of the wait is, the header is a whole number from 1 to 600."""
    assert errors.Overloaded("m", retry_after=estimate).headers == {"retry-after": header}


def test_a_wrong_method_is_told_the_right_ones() -> None:
    """A 405 lists the allowed methods in its header and its message."""
    error = errors.MethodNotAllowed("PUT", "/v1/models", ["GET", "HEAD"])
    assert error.headers == {"allow": "GET, HEAD"}
    assert error.message == '"/v1/models" takes GET, HEAD, not PUT'


def test_what_the_client_sent_is_named() -> None:
    """An unknown model, path or content type is repeated, so that a typing error is seen."""
    assert '"smolm2"' in errors.ModelNotFound("smolm2").message
    assert errors.ModelNotFound("smolm2").param == "model"
    assert errors.UnknownPath("/v1/embeddings").message == '"/v1/embeddings" is not served'
    assert errors.UnknownPath("/v2").message == 'no such path: "/v2"'
    assert errors.UnsupportedMediaType("text/plain").message.endswith('not "text/plain"')
    assert errors.UnsupportedMediaType(None).message == "content-type must be application/json"


def test_a_replicas_refusal_reaches_the_client_in_its_words() -> None:
    """Status, message, param and code of a refusal are the error's; the type follows from the status."""
    refused = Refused(7, 400, "messages: too long", param="messages", code="context_length_exceeded")
    error = from_refusal(refused)
    assert error.status == 400
    assert json.loads(error.body())["error"] == {
        "message": "messages: too long",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "context_length_exceeded",
    }
    assert error.headers == {}


@pytest.mark.parametrize("status", [429, 503])
def test_a_replica_that_is_busy_says_when_to_retry(status: int) -> None:
    """A refusal that may pass carries Retry-After as the router's own errors do: what the replica estimates,
    within the bounds of any estimate."""
    for told, seconds in {None: 1, 7: 7, 0.2: 1, 12.5: 13, 10_000: errors.MAX_RETRY_AFTER}.items():
        refused = Refused(7, status, "not now", retry_after=told)
        assert from_refusal(refused).headers == {"retry-after": str(seconds)}
    assert from_refusal(Refused(7, 400, "never", retry_after=5)).headers == {}


def test_refusals_do_not_mark_each_other() -> None:
    """The status and code of one refusal do not become those of the next error."""
    from_refusal(Refused(7, 418, "no", code="teapot"))
    assert (errors.InternalError().status, errors.InternalError().code) == (500, "internal_error")
    assert from_refusal(Refused(7, 400, "no")).code is None


@settings(deadline=None)
@given(st.text())
def test_any_text_can_be_said(text: str) -> None:
    """Line breaks, quotes and every character survive the envelope, which stays one line of ASCII."""
    body = errors.InvalidRequest(text, param=text).body()
    assert body.isascii()
    assert len(body.splitlines()) == 1
    assert ErrorEnvelope.model_validate_json(body).error.message == text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
)


@settings(deadline=None)
@given(json_values)
def test_a_shown_value_is_short_json(value: object) -> None:
    """A value is shown as the client wrote it, or as its beginning, never longer than the bound."""
    text = shown(value)
    assert len(text) <= errors.SHOWN
    whole = json.dumps(value, ensure_ascii=False)
    assert text == whole or (text.endswith("...") and whole.startswith(text[:-3]))
