"""Every route but the streaming one, and the answers that no route gives, over real sockets."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from router.settings import ModelCard
from serving.exposition import CONTENT_TYPE
from tests.harness import Deployment, HandEngine, deployed, echo_engine, request, served

CARD = ModelCard(description="Says it again.", creator="ada", license_name="Apache-2.0")


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def deployment() -> AsyncIterator[Deployment]:
    """Three models: one with aliases and a card, one with a name like a hub's, one without a replica."""
    models = (
        served(echo_engine(), aliases=("Parrot", "org/Echo:latest"), card=CARD),
        served(HandEngine(), name="Org/Model-7B:Q4_0"),
        served(name="absent"),
    )
    async with deployed(*models) as one:
        yield one


def refused(response: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    """The message of an answer that is OpenAI's error envelope and nothing else."""
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    return str(error["message"])


# ---- models -------------------------------------------------------------------------------------------


async def test_the_list_holds_every_name(deployment: Deployment) -> None:
    """Each model and each alias has an entry under its own name, with what is known of the model."""
    listed = (await deployment.http.get("/v1/models")).json()
    assert listed["object"] == "list"
    entries = {entry["id"]: entry for entry in listed["data"]}
    assert list(entries) == ["echo", "Parrot", "org/Echo:latest", "Org/Model-7B:Q4_0", "absent"]
    for name, entry in entries.items():
        assert (entry["object"], entry["name"], entry["kind"]) == ("model", name, "hosted")
        assert entry["state"] == ("loading" if name == "absent" else "ready")
    for name in ("echo", "Parrot", "org/Echo:latest"):
        assert entries[name]["max_context_length"] == 8192
        assert (entries[name]["owned_by"], entries[name]["license_name"]) == ("ada", "Apache-2.0")
    assert "max_context_length" not in entries["absent"]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("echo", "echo"),
        ("ECHO", "echo"),
        ("parrot", "Parrot"),
        ("org/echo:latest", "org/Echo:latest"),
        ("ORG%2FECHO%3ALATEST", "org/Echo:latest"),
        ("Org/Model-7B:Q4_0", "Org/Model-7B:Q4_0"),
        ("org%2fmodel-7b:q4_0", "Org/Model-7B:Q4_0"),
        ("org/model-7b%3Aq4_0", "Org/Model-7B:Q4_0"),
    ],
)
async def test_a_model_is_found_by_its_name_in_any_case(deployment: Deployment, path: str, name: str) -> None:
    """A slash and a colon may stand in the path or be escaped; the answer has the catalog's case and is the
    list's entry."""
    response = await deployment.http.get(f"/v1/models/{path}")
    assert response.status_code == 200
    assert response.json()["id"] == name
    listed = (await deployment.http.get("/v1/models")).json()
    assert response.json() in listed["data"]


@pytest.mark.parametrize("path", ["nobody", "echo/", "echo%20", "org", "a%2Fb", "%00", "%FF", ""])
async def test_a_model_that_does_not_exist_is_not_found(deployment: Deployment, path: str) -> None:
    """Any other name is a 404 that says so, in the envelope."""
    message = refused(await deployment.http.get(f"/v1/models/{path}"), 404, "model_not_found", "model")
    assert "GET /v1/models" in message


@pytest.mark.parametrize("name", ["echo", "eChO", "PARROT", "ORG/ECHO:LATEST"])
async def test_a_model_answers_under_each_of_its_names(deployment: Deployment, name: str) -> None:
    """A request may name a model by any name in any case; its answer has the name asked for, in the
    catalog's case, whole and streamed."""
    shown = {"echo": "echo", "parrot": "Parrot", "org/echo:latest": "org/Echo:latest"}[name.lower()]
    assert (await deployment.ask("hi", model=name))["model"] == shown
    answer = await deployment.stream("hi", model=name)
    assert {event["model"] for event in answer.events} == {shown}


async def test_a_request_for_an_unknown_model_is_not_found(deployment: Deployment) -> None:
    """It is a 404 that names the model, counted under no model's name."""
    before = deployment.metric("trunkline_requests_total", model="", status="404")
    message = refused(await deployment.post(request("hi", model="gpt")), 404, "model_not_found", "model")
    assert '"gpt"' in message
    assert deployment.metric("trunkline_requests_total", model="", status="404") == before + 1


async def test_models_serve_side_by_side(deployment: Deployment) -> None:
    """While one model is slow to answer, another answers."""
    slow = await deployment.open("hi", model="org/model-7b:q4_0", stream=True)
    assert (await deployment.ask("one two", max_tokens=2))["choices"][0]["message"]["content"] == "one two"
    engine = deployment.replicas["Org/Model-7B:Q4_0"][0].engine
    assert isinstance(engine, HandEngine)
    engine.say("done", "stop")
    answer = await slow.answer()
    assert (answer.done, answer.text()) == (True, "done")


# ---- what is not there --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["/", "/v1", "/v1/", "/v1/embeddings", "/v1/chat/completions/", "/v2/models", "/%FF", "//v1/models"],
)
async def test_a_path_that_does_not_exist_is_not_found(deployment: Deployment, path: str) -> None:
    """Any other path is a 404 in the envelope, whatever the method."""
    for method in ("GET", "POST", "DELETE", "OPTIONS"):
        url = httpx.URL(deployment.url, raw_path=path.encode())
        response = await deployment.http.request(method, url)
        message = refused(response, 404, "unknown_url")
        assert ("is not served" in message) == path.startswith("/v1/")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("PUT", "/v1/chat/completions", "POST"),
        ("POST", "/v1/models", "GET"),
        ("DELETE", "/v1/models/echo", "GET"),
        ("POST", "/health", "GET"),
        ("POST", "/metrics", "GET"),
        ("PATCH", "/-/healthz", "GET"),
    ],
)
async def test_a_wrong_method_is_told_the_right_one(
    deployment: Deployment, method: str, path: str, allowed: str
) -> None:
    """A path that is served by other methods answers 405 and says which."""
    response = await deployment.http.request(method, path)
    message = refused(response, 405, "method_not_allowed")
    assert response.headers["allow"] == allowed
    assert allowed in message
    assert method in message


@pytest.mark.parametrize("host", ["[", "a/b", "", "x" * 3000, "\x80"])
async def test_a_strange_host_header_changes_nothing(deployment: Deployment, host: str) -> None:
    """What a client calls this server has no part in how it is answered."""
    for path, status in (("/nowhere", 404), ("/v1/chat/completions", 405), ("/health", 200)):
        wire = await deployment.dial()
        wire.send(f"GET {path} HTTP/1.1\r\nhost: {host}\r\n\r\n".encode("latin-1"))
        body = json.loads(await wire.body())
        assert wire.status == status
        wire.leave()
        if status != 200:
            assert body["error"]["message"].endswith(f'"{path}"') or body["error"]["message"].startswith(
                f'"{path}"'
            )


# ---- request ids --------------------------------------------------------------------------------------

fit = st.from_regex(r"[A-Za-z0-9._-]{1,128}", fullmatch=True).map(lambda name: (name, True))
unfit = st.sampled_from(["", "a b", "ä", "x" * 129, "a/b", "{}", "a,b"]).map(lambda name: (name, False))
paths = st.sampled_from(["/health", "/v1/models", "/nowhere", "/v1/chat/completions", "/metrics?scope=x"])


@settings(max_examples=40)
@given(paths, fit | unfit, st.sampled_from(["GET", "POST"]))
async def test_every_answer_has_a_request_id(
    deployment: Deployment, path: str, caller: tuple[str, bool], method: str
) -> None:
    """A caller's own id comes back where it is fit for a header and a log, on errors too; otherwise there is
    a fresh one."""
    name, taken = caller
    ids = []
    for _ in range(2):
        wire = await deployment.dial()
        wire.send(f"{method} {path} HTTP/1.1\r\nhost: test\r\nx-request-id: {name}\r\n\r\n".encode())
        await wire.body()
        ids.append(wire.headers["x-request-id"])
        wire.leave()
    if taken:
        assert ids == [name] * 2
    else:
        assert len({*ids, name}) == 3
        assert all(each.isalnum() for each in ids)


async def test_answers_of_the_endpoint_have_the_callers_id(deployment: Deployment) -> None:
    """So do whole answers, streams and refusals of chat completions; the completion's id is another."""
    for parameters in ({}, {"stream": True}, {"max_tokens": 0}):
        response = await deployment.post(request("hi", **parameters), **{"x-request-id": "my-own.id_1"})
        assert response.headers["x-request-id"] == "my-own.id_1"
    first, second = [
        await deployment.post(request("hi"), **{"x-request-id": "my-own.id_1"}) for _ in range(2)
    ]
    assert first.json()["id"] != second.json()["id"]
    assert first.json()["id"].startswith("chatcmpl-")


# ---- health and metrics -------------------------------------------------------------------------------


async def test_health_says_what_is_ready(deployment: Deployment) -> None:
    """Each model has its state; probes of Ray's own proxy find what they look for."""
    health = await deployment.http.get("/health")
    assert health.json() == {
        "status": "ok",
        "models": {"echo": "ready", "Org/Model-7B:Q4_0": "ready", "absent": "loading"},
    }
    assert (await deployment.http.get("/-/healthz")).text == "success"
    assert (await deployment.http.get("/-/routes")).json() == {"/": "router"}


async def test_a_model_that_cannot_start_is_failed_until_it_has_a_replica(deployment: Deployment) -> None:
    """Serve's word that it has given up is shown, and a replica that answers is worth more than it."""
    for name in ("absent", "echo"):
        deployment.backend(name).failed = True
    try:
        states = (await deployment.http.get("/health")).json()["models"]
        assert (states["absent"], states["echo"]) == ("failed", "ready")
        assert (await deployment.http.get("/v1/models/absent")).json()["state"] == "failed"
    finally:
        deployment.backend("absent").failed = deployment.backend().failed = False


async def test_a_router_that_ends_is_not_healthy() -> None:
    """While it shuts down, every probe is told to send nobody here; models can still be listed."""
    async with deployed(served(echo_engine())) as ending:
        ending.application.completions.draining = True
        health = await ending.http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "shutting down")
        assert (await ending.http.get("/-/healthz")).status_code == 503
        assert (await ending.http.get("/v1/models")).status_code == 200


async def test_metrics_are_text_of_one_scope_or_the_other(deployment: Deployment) -> None:
    """A scrape is Prometheus's text; any other scope is refused, naming the two."""
    await deployment.ask("one two", max_tokens=3)
    tokens = deployment.metric("trunkline_generation_tokens_total", model="echo")
    for scope in ("", "?scope=deployment", "?scope=process"):
        response = await deployment.http.get(f"/metrics{scope}")
        assert response.headers["content-type"] == CONTENT_TYPE
        sample = f'trunkline_generation_tokens_total{{model="echo",replica="router-0"}} {tokens}'
        assert sample in response.text
    message = refused(await deployment.http.get("/metrics?scope=all"), 400, "invalid_value", "scope")
    assert message == 'scope must be "deployment" or "process", not \'all\''


async def test_an_error_of_ours_says_nothing_of_the_inside() -> None:
    """A route that fails answers 500 with two words."""
    async with deployed(served(echo_engine())) as broken:
        broken.model().metrics.watch(in_flight=lambda: 1 / 0, waiting=lambda: 0)
        response = await broken.http.get("/metrics")
        assert refused(response, 500, "internal_error") == "internal error"
        assert (await broken.http.get("/health")).status_code == 200
