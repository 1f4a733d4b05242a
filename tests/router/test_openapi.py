"""The OpenAPI document against the router that it describes, over real sockets."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, NamedTuple

import httpx
import pytest
import pytest_asyncio
from fastapi.routing import APIRoute
from pydantic import SecretStr
from starlette.routing import Route

from router import errors
from router.app import build_api
from router.openapi import document
from router.settings import HostedModel, ModelLimits, ModelSettings, ModelTimeouts, UpstreamModel
from tests.harness import Deployment, HandEngine, deployed, echo_engine, request, served
from tests.router.contract import Contract
from tests.waiting import until

Json = dict[str, Any]

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
BASE: dict[str, Json] = {CHAT: request("a b c"), TEXT: {"model": "echo", "prompt": "a b c"}}

NEEDS: dict[str, Callable[[Any], Json]] = {
    "stream_options": lambda _: {"stream": True},
    "top_logprobs": lambda _: {"logprobs": True},
    "tool_choice": lambda _: {"tools": [{"type": "function", "function": {"name": "get_weather"}}]},
    "best_of": lambda best_of: {"n": best_of},
    "min_tokens": lambda min_tokens: {"max_tokens": max(1, min_tokens)},
}
"""What a parameter must not be without, by its value."""

pytestmark = pytest.mark.asyncio(loop_scope="module")

with_accounts = pytest.mark.parametrize("accounts", [False, True], ids=["open", "accounts"])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def deployment() -> AsyncIterator[Deployment]:
    """A model that echoes, one whose tokens the test puts in, and one without a replica."""
    models = (
        served(echo_engine(max_model_len=256), aliases=("org/Echo:latest",)),
        served(HandEngine(), name="hand", limits=ModelLimits(in_flight=1, queued=0)),
        served(name="absent", timeouts=ModelTimeouts(queue_s=0.05)),
    )
    async with deployed(*models) as one:
        yield one


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def contract(deployment: Deployment) -> Contract:
    """What the deployment's document promises."""
    response = await deployment.http.get("/openapi.json")
    assert response.headers["content-type"] == "application/json"
    return Contract(response.json())


@pytest.fixture
def engine(deployment: Deployment) -> HandEngine:
    """The engine of the model `hand`."""
    found = deployment.replicas["hand"][0].engine
    assert isinstance(found, HandEngine)
    return found


# ---- the document is whole ----------------------------------------------------------------------------


async def test_every_route_is_documented(deployment: Deployment, contract: Contract) -> None:
    """The document has each path and method that the router serves, and no other."""

    async def scrape(_: bool) -> bytes:
        return b""

    api = build_api(deployment.application.catalog, deployment.application.completions, scrape, None)
    served_ones = {
        (re.sub(r"{.*?}", "{}", route.path), method)
        for route in api.routes
        if isinstance(route, Route | APIRoute)
        for method in route.methods or ()
    }
    documented = {
        (re.sub(r"{.*?}", "{}", path), method.upper())
        for path, methods in contract.document["paths"].items()
        for method in methods
    }
    assert documented == served_ones


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_every_parameter_is_described(contract: Contract, path: str) -> None:
    """Each parameter of both endpoints says what it is for, its default or that it is required, its range
    where it is a number, and gives an example that it allows."""
    body = contract.body(path)
    for name, schema in body["properties"].items():
        assert schema["description"].endswith("."), name
        assert name in body["required"] or "default" in schema, name
        assert schema["examples"], name
        for example in schema["examples"]:
            contract.fits(example, schema)
        for leaf in numbers(contract, schema):
            # best_of has that of n.
            assert leaf.keys() & {"minimum", "exclusiveMinimum"} or name == "best_of", name


def numbers(contract: Contract, schema: Json) -> Iterator[Json]:
    """The alternatives of a schema that are numbers."""
    schema = contract.follow(schema)
    if schema.get("type") in {"integer", "number"}:
        yield schema
    for branch in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from numbers(contract, branch)


@with_accounts
async def test_every_field_is_described(accounts: bool) -> None:
    """So is each field of everything that is sent and answered."""
    contract = Contract(document([hosted("a")], accounts=accounts))
    bare = {
        f"{name}.{field}"
        for name, schema in contract.document["components"]["schemas"].items()
        for field, node in schema.get("properties", {}).items()
        if not contract.follow(node).get("description") and not node.get("description")
    }
    assert bare == set()


def leaves(kind: type[errors.ApiError]) -> Iterator[type[errors.ApiError]]:
    """The classes that are raised, not only derived from."""
    subclasses = kind.__subclasses__()
    if not subclasses:
        yield kind
    for each in subclasses:
        yield from leaves(each)


async def test_every_error_is_documented() -> None:
    """Each kind of error that a client may be refused with stands in the document, in its own words."""
    upstream = UpstreamModel(name="far", base_url="http://127.0.0.1:1/v1", upstream_name="far")
    whole = document([upstream], accounts=True)
    shown = {
        example["summary"]
        for response in whole["components"]["responses"].values()
        for example in response["content"]["application/json"]["examples"].values()
    }
    raised = {
        (kind.__doc__ or "").partition("\n")[0]
        for kind in leaves(errors.ApiError)
        if kind is not errors.SlowReader  # it is only ever an event
    }
    assert raised == shown - {errors.ApiError.__doc__}


# ---- and it is true -----------------------------------------------------------------------------------


@with_accounts
async def test_examples_of_answers_are_such_answers(accounts: bool) -> None:
    """Each example of an answer, a parameter or an error fits its schema, and so does each of a body."""
    contract = Contract(document([hosted("a")], accounts=accounts))
    for methods in contract.document["paths"].values():
        for operation in methods.values():
            for reference in operation["responses"].values():
                for media, content in contract.follow(reference)["content"].items():
                    shown = [one["value"] for one in content.get("examples", {}).values()]
                    for example in shown + ([content["example"]] if "example" in content else []):
                        if media == "text/event-stream":
                            contract.streams(example, content["schema"])
                        else:
                            contract.fits(example, content["schema"])
            for reference in operation["parameters"]:
                contract.fits(contract.follow(reference)["example"], contract.follow(reference)["schema"])
            for content in operation.get("requestBody", {}).get("content", {}).values():
                for example in content["examples"].values():
                    contract.fits(example["value"], content["schema"])


async def test_examples_of_requests_are_answered(deployment: Deployment, contract: Contract) -> None:
    """Each example of a body runs as it is, and its answer is as documented."""
    for path in (CHAT, TEXT):
        content = contract.document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        for example in content["examples"].values():
            response = await deployment.http.post(path, json=example["value"])
            assert response.status_code == 200, response.text
            contract.holds(path, response)


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_examples_of_parameters_are_accepted(
    deployment: Deployment, contract: Contract, engine: HandEngine, path: str
) -> None:
    """Each example of a parameter is taken by the router, together with what it needs."""
    # A format and a forced call take more than an echo.
    model = {CHAT: "hand", TEXT: "echo"}[path]
    for name, schema in contract.body(path)["properties"].items():
        for example in schema["examples"]:
            needed = NEEDS.get(name, lambda _: {})(example)
            body = BASE[path] | needed | {name: example, "model": model}
            response = await answered(engine, deployment.http.post(path, json=body))
            assert response.status_code == 200, (name, example, response.text)
            contract.holds(path, response)


async def answered(engine: HandEngine, asking: Coroutine[Any, Any, httpx.Response]) -> httpx.Response:
    """The response to a request, to which the engine says a word if it gets it."""
    task = asyncio.create_task(asking)
    await until(lambda: task.done() or bool(engine.requests))
    engine.say("d", "stop")
    return await task


class End(NamedTuple):
    """A value at the end of a parameter's range, and the next one outside."""

    name: str
    inside: float
    outside: float


def ends(contract: Contract, path: str) -> Iterator[End]:
    """Both ends of each parameter that is a number, as the document has them."""
    for name, schema in contract.body(path)["properties"].items():
        for leaf in numbers(contract, schema):
            step = 1 if leaf["type"] == "integer" else 0.001
            if "minimum" in leaf:
                yield End(name, leaf["minimum"], leaf["minimum"] - step)
            if "maximum" in leaf:
                yield End(name, leaf["maximum"], leaf["maximum"] + step)


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_ranges_end_where_the_document_says(
    deployment: Deployment, contract: Contract, path: str
) -> None:
    """A number at the end of its documented range is taken, and the one past it refused by its name."""
    found = list(ends(contract, path))
    assert len({end.name for end in found}) > 10
    for name, inside, outside in found:
        needed = NEEDS.get(name, lambda _: {})
        taken = await deployment.http.post(path, json=BASE[path] | needed(inside) | {name: inside})
        assert taken.status_code == 200, (name, inside, taken.text)
        refused = await deployment.http.post(path, json=BASE[path] | needed(1) | {name: outside})
        assert refused.status_code == 400, (name, outside)
        assert refused.json()["error"]["param"] == name
        contract.holds(path, taken)
        contract.holds(path, refused)


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"n": 3, "stop": "b"},
        {"logprobs": 1, "echo": True},
        {"stream_options": {"include_usage": True}},
        {"max_tokens": 0},
        {"temperature": 3},
    ],
    ids=json.dumps,
)
async def test_answers_are_as_documented(
    deployment: Deployment, contract: Contract, path: str, stream: bool, parameters: Json
) -> None:
    """Whole answers, streams and refusals have the status, the headers and the fields of the document, and no
    others."""
    if path == CHAT and "echo" in parameters:
        parameters = {"logprobs": True, "top_logprobs": 1}
    response = await deployment.http.post(path, json=BASE[path] | parameters | {"stream": stream})
    contract.holds(path, response)


async def test_a_stream_that_breaks_off_is_as_documented(
    deployment: Deployment, contract: Contract, engine: HandEngine
) -> None:
    """The event of an error that ends a stream is one that the document has."""
    answering = asyncio.create_task(deployment.post(request("a", model="hand", stream=True)))
    await until(lambda: bool(engine.requests))
    engine.say("b")
    engine.fail(RuntimeError("broken"))
    response = await answering
    assert "internal_error" in response.text
    contract.holds(CHAT, response)


class Refused(NamedTuple):
    """A request that is refused before it has a body to speak of."""

    status: int
    content: bytes
    content_type: str = "application/json"


BODY = json.dumps(request("a")).encode()


@pytest.mark.parametrize(
    "refused",
    [
        Refused(400, b"{"),
        Refused(404, json.dumps(request("a", model="nobody")).encode()),
        Refused(413, b" " * 4_194_305),
        Refused(415, BODY, "text/plain"),
        Refused(503, json.dumps(request("a", model="absent")).encode()),
    ],
    ids=lambda refused: str(refused.status),
)
async def test_refusals_are_as_documented(
    deployment: Deployment, contract: Contract, refused: Refused
) -> None:
    """Each comes with the headers that are promised for its status."""
    response = await deployment.http.post(
        CHAT, content=refused.content, headers={"content-type": refused.content_type}
    )
    assert response.status_code == refused.status
    contract.holds(CHAT, response)


@pytest.mark.parametrize(
    ("sent", "status"),
    [(b"x: " + b"a" * 70_000, 431), (b"no header\r\n\r\n", 400)],
    ids=["431", "400"],
)
async def test_what_is_no_request_is_refused_as_documented(
    deployment: Deployment, contract: Contract, sent: bytes, status: int
) -> None:
    """So are those of which no path ever hears."""
    wire = await deployment.dial()
    wire.send(b"GET /health HTTP/1.1\r\nhost: t\r\n" + sent)
    body = await wire.body()
    assert wire.status == status
    asked = httpx.Request("GET", f"{deployment.url}/health")
    contract.holds("/health", httpx.Response(wire.status, headers=wire.headers, content=body, request=asked))


async def test_a_full_model_refuses_as_documented(
    deployment: Deployment, contract: Contract, engine: HandEngine
) -> None:
    """Where no place is left the answer says when to come again."""
    first = asyncio.create_task(deployment.post(request("a", model="hand")))
    await until(lambda: bool(engine.requests))
    second = await deployment.post(request("a", model="hand"))
    assert second.status_code == 429
    contract.holds(CHAT, second)
    engine.say("b", "stop")
    contract.holds(CHAT, await first)


async def test_other_paths_answer_as_documented(deployment: Deployment, contract: Contract) -> None:
    """So do the paths that only take GET, and all of them while the router shuts down."""
    paths = {path: methods["get"] for path, methods in contract.document["paths"].items() if "get" in methods}
    assert len(paths) == len(contract.document["paths"]) - 2
    for draining in (False, True):
        deployment.application.completions.draining = draining
        for path in paths:
            for name in ("org%2FEcho:latest", "nobody") if "{" in path else ("",):
                response = await deployment.http.get(path.replace("{id}", name))
                contract.holds(path, response)
    contract.holds(CHAT, await deployment.post(request("a")))
    deployment.application.completions.draining = False


# ---- what depends on the deployment -------------------------------------------------------------------


def hosted(name: str, **settings: Any) -> HostedModel:
    """The settings of a model that this deployment runs."""
    return HostedModel(name=name, application=f"model-{name}", **settings)


def properties(*models: ModelSettings, of: str = "ChatRequest") -> Json:
    """The documented parameters of a router for these models."""
    found: Json = document(models)["components"]["schemas"][of]["properties"]
    return found


async def test_the_models_that_answer_are_named() -> None:
    """Each endpoint names the models whose card says that they answer there, aliases too, and the examples
    ask for one of them."""
    chat_only = hosted("chat-only", aliases=("talker",), card={"is_text": False})
    text_only = hosted("text-only", card={"is_chat": False})
    models = [chat_only, text_only, hosted("both")]
    assert properties(*models)["model"]["anyOf"][0]["enum"] == ["chat-only", "talker", "both"]
    assert properties(*models, of="TextRequest")["model"]["anyOf"][0]["enum"] == ["text-only", "both"]
    body = document(models)["paths"][TEXT]["post"]["requestBody"]["content"]["application/json"]
    assert {example["value"]["model"] for example in body["examples"].values()} == {"text-only"}


async def test_a_default_is_that_of_the_deployment() -> None:
    """The default of max_tokens is what the configuration says; where models differ it is the API's own."""
    assert properties(hosted("a"))["max_tokens"]["default"] == 24
    assert properties(hosted("a", default_max_tokens=99))["max_tokens"]["default"] == 99
    assert properties(hosted("a", default_max_tokens=99), hosted("b"))["max_tokens"]["default"] == 24
    longer = hosted("a", limits=ModelLimits(messages=7))
    assert properties(longer)["messages"]["maxItems"] == 7


@pytest.mark.parametrize("name", ["ChatRequest", "TextRequest"])
async def test_the_penalty_is_the_one_that_is_meant(name: str) -> None:
    """A deployment of multiplicative penalties documents their range and what is neutral."""
    additive = properties(hosted("a"), of=name)["repetition_penalty"]
    other = properties(hosted("a", repetition_penalty="multiplicative"), of=name)["repetition_penalty"]
    assert (additive["anyOf"][0]["minimum"], additive["default"]) == (-2, 0)
    assert (other["anyOf"][0]["exclusiveMinimum"], other["default"]) == (0, 1)


async def test_errors_of_providers_are_documented_where_there_are_providers() -> None:
    """With a model at a provider any status may come, and nothing of its key is told."""
    far = UpstreamModel(
        name="far", base_url="http://127.0.0.1:1/v1", upstream_name="f", api_key=SecretStr("sk-secret")
    )
    with_provider, without = document([hosted("a"), far]), document([hosted("a")])
    responses = with_provider["paths"][CHAT]["post"]["responses"]
    assert {"401", "502", "default"} <= responses.keys()
    assert not {"401", "502", "default"} & without["paths"][CHAT]["post"]["responses"].keys()
    assert "sk-secret" not in json.dumps(with_provider)


async def test_a_key_is_asked_for_where_there_are_accounts() -> None:
    """There whatever is not open to all says how callers show who they are, and that they may be refused;
    without accounts any key is taken, and none."""
    closed, free = document([hosted("a")], accounts=True), document([hosted("a")])
    assert free["security"] == [{}, {"bearer": []}]
    for path, methods in closed["paths"].items():
        for method, operation in methods.items():
            schemes = operation.get("security", closed["security"])
            named = {name for scheme in schemes for name in scheme}
            assert named <= closed["components"]["securitySchemes"].keys()
            guarded = path.startswith(("/v1/", "/api/"))
            assert bool(schemes) == guarded == ("401" in operation["responses"])
            # A browser may be made to send its cookie, but not that header.
            assert ("csrf" in named) == (guarded and method != "get")
            assert {} not in schemes


async def test_what_only_some_errors_carry_is_not_promised() -> None:
    """A header is required where all errors of a status have it."""
    closed, free = document([hosted("a")], accounts=True), document([hosted("a")])
    for whole, always in ((closed, False), (free, True)):
        header = Contract(whole).follow(
            whole["components"]["responses"]["Error429"]["headers"]["retry-after"]
        )
        assert header.get("required", False) is always
