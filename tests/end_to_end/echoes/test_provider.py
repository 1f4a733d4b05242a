from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.end_to_end.client import ask, chat
from tests.end_to_end.echoes import ECHO
from tests.end_to_end.server import Server, http, serving

KEY = "sk-of-the-deployment-6c1f0e7d"
CALLERS_KEY = "sk-of-the-caller-91b3a2d4"
HEADER = "x-openai-api-key"


@pytest.fixture(scope="module")
def gateway(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that runs no model of its own: its provider is the other one."""
    place = {"base_url": f"{server.url}/v1", "model": ECHO}
    models = [
        {"name": "far/Echo", "aliases": ["gpt"], "upstream": place | {"api_key_env": "TEST_PROVIDER_KEY"}},
        {"name": "yours", "upstream": place, "card": {"max_context_length": 1024}},
    ]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TEST_PROVIDER_KEY", KEY)
        with serving({"models": models}, tmp_path_factory.mktemp("gateway")) as gateway:
            yield gateway


def test_a_providers_models_are_listed(gateway: Server) -> None:
    """They are ready at once, and of the kind upstream."""
    with http(gateway) as client:
        listed = client.get("/v1/models").json()["data"]
    assert [(each["id"], each["kind"], each["state"]) for each in listed] == [
        ("far/Echo", "upstream", "ready"),
        ("gpt", "upstream", "ready"),
        ("yours", "upstream", "ready"),
    ]
    assert gateway.states() == {"far/Echo": "ready", "yours": "ready"}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_providers_model_answers(gateway: Server, server: Server, stream: bool) -> None:
    """Its answer is the provider's, under the name that was asked for, and is counted and logged here; the
    provider's own log has it under our key for the request."""
    before = gateway.metrics().total("trunkline_generation_tokens_total", model="far/Echo")
    name = f"upstream-{stream}"
    answer = await ask(gateway, chat("GPT", "a b c", stream=stream, max_tokens=7), {"x-request-id": name})
    assert (answer.status, answer.text(), answer.finish_reason()) == (200, "a b c a b c a", "length")
    assert {part["model"] for part in (answer.chunks if stream else [answer.json])} == {"gpt"}
    assert answer.done == stream
    line = gateway.request(name)
    assert (line["model"], line["outcome"], line["replica"]) == (
        "gpt",
        "completed",
        f"127.0.0.1:{server.port}",
    )
    assert (line["prompt_tokens"], line["completion_tokens"]) == (3, 7)
    assert server.request(line["key"])["completion_tokens"] == 7
    metrics = gateway.metrics()
    assert metrics.total("trunkline_generation_tokens_total", model="far/Echo") == before + 7


async def test_a_model_without_a_key_takes_the_callers(gateway: Server) -> None:
    """Where the deployment has no key, a caller without one is refused, and with one is answered."""
    refused = await ask(gateway, chat("yours", "hi"))
    assert (refused.status, refused.error["code"]) == (401, "missing_provider_key")
    answered = await ask(gateway, chat("yours", "hi", max_tokens=2), {HEADER: CALLERS_KEY})
    assert (answered.status, answered.text()) == (200, "hi hi")


async def test_no_log_has_a_key(gateway: Server, server: Server) -> None:
    """Neither key is in any file of any log, in what the terminal is told, or in a metric: not of good
    requests, and not of bad ones."""
    for model, words in (("gpt", "hi"), ("yours", "hi"), ("gpt", "x " * 2000), ("yours", "x " * 2000)):
        for stream in (False, True):
            answer = await ask(gateway, chat(model, words, stream=stream), {HEADER: CALLERS_KEY})
            assert answer.status == (200 if words == "hi" else 400)
    said = [gateway.said, server.said, gateway.metrics().text, server.metrics().text]
    files = [*gateway.log_files(), *server.log_files()]
    assert len(files) > 20
    for key in (KEY, CALLERS_KEY):
        assert [path for path in files if key.encode() in path.read_bytes()] == []
        assert not any(key in text for text in said)
