from __future__ import annotations

from urllib.parse import quote

import pytest

from tests.end_to_end.client import ask, ask_all, chat
from tests.end_to_end.echoes import ALIAS, ECHO, LONE, PAIR, QUICK
from tests.end_to_end.server import Server, http

NAMES = [ECHO, QUICK, ALIAS, PAIR, LONE]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", [ECHO, QUICK, ALIAS])
async def test_a_model_answers_to_its_names_in_any_case(server: Server, name: str, stream: bool) -> None:
    """A model answers under its name and its aliases, slashes and colons in them, in any case; the answer
    has the name that was asked for, in the catalog's case."""
    for asked in (name, name.upper(), name.lower(), name.swapcase()):
        answer = await ask(server, chat(asked, "a b c", stream=stream))
        assert answer.status == 200
        assert answer.text() == " ".join(["a b c"] * 8)
        assert {part["model"] for part in (answer.chunks if stream else [answer.json])} == {name}


async def test_models_serve_at_once_under_their_names(server: Server) -> None:
    """Requests for several models at once each get the answer of the model that they name."""
    bodies = [chat(name, f"for {name}", max_tokens=2) for name in NAMES * 4]
    for body, answer in zip(bodies, await ask_all(server, bodies), strict=True):
        assert answer.json["model"] == body["model"]
        assert answer.text() == f"for {body['model']}"


async def test_an_unknown_name_is_not_found(server: Server) -> None:
    """An unknown name is a 404 model_not_found, streamed or not, and so is a part of a known one."""
    for name in ("nobody", "Echo-7B:free", "Org", f"{ECHO} "):
        for stream in (False, True):
            refused = await ask(server, chat(name, "hi", stream=stream))
            assert refused.status == 404
            assert refused.error["code"] == "model_not_found"
            assert refused.error["param"] == "model"
            assert name in refused.error["message"]


def test_the_catalog_lists_every_name(server: Server) -> None:
    """GET /v1/models has an entry for each name, an alias's like any other, and each can be had alone by its
    id, raw or quoted, in any case."""
    with http(server) as client:
        listed = client.get("/v1/models").json()
        assert listed["object"] == "list"
        assert [model["id"] for model in listed["data"]] == NAMES
        for model in listed["data"]:
            name = model["id"]
            assert model["name"] == name
            assert (model["object"], model["state"], model["kind"]) == ("model", "ready", "hosted")
            for path in (name, quote(name, safe=""), name.upper(), quote(name.lower(), safe="")):
                assert client.get(f"/v1/models/{path}").json() == model
        assert listed["data"][0]["max_context_length"] == 1024
