from __future__ import annotations

from typing import Any

import pytest

from tests.end_to_end.client import ask, chat
from tests.end_to_end.server import Server
from tests.end_to_end.smollm import PARIS, SMOLLM

VOCABULARY = 49_152

# What only the replica can know is wrong → the request's parameters → the field and the code of the error.
REFUSED: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "a prompt longer than the context": (
        {"messages": [{"role": "user", "content": "word " * 5000}]},
        "messages",
        "context_length_exceeded",
    ),
    "a prompt many times longer than the context": (
        {"messages": [{"role": "user", "content": "word " * 500_000}]},
        "messages",
        "context_length_exceeded",
    ),
    "a token id past the vocabulary": ({"logit_bias": {str(VOCABULARY): 1}}, "logit_bias", None),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", REFUSED)
async def test_what_the_replica_refuses_is_a_400(server: Server, fault: str, stream: bool) -> None:
    """What takes the model's tokenizer to see is refused with its true status, streamed or not, and the next
    request is answered."""
    parameters, param, code = REFUSED[fault]
    refused = await ask(server, chat(SMOLLM, PARIS, stream=stream) | parameters)
    assert refused.status == 400
    assert set(refused.error) == {"message", "type", "param", "code"}
    assert refused.error["type"] == "invalid_request_error"
    assert refused.error["param"] == param
    assert refused.error["code"] == code
    assert param in refused.error["message"]
    good = await ask(server, chat(SMOLLM, PARIS, temperature=0, max_tokens=8))
    assert "Paris" in good.text()


async def test_the_last_token_id_is_good(server: Server) -> None:
    """A bias for the last token of the vocabulary is no fault."""
    answer = await ask(server, chat(SMOLLM, PARIS, max_tokens=1, logit_bias={str(VOCABULARY - 1): -100}))
    assert answer.status == 200
