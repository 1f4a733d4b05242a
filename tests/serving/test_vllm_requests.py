from __future__ import annotations

from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.serial_utils import MsgpackEncoder

from serving.vllm_requests import without_stop


def asked(**sampling: Any) -> EngineCoreRequest:
    """A request for the engine core."""
    return EngineCoreRequest(
        request_id="1",
        prompt_token_ids=[1, 2, 3],
        mm_features=None,
        sampling_params=SamplingParams(**sampling),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def size(request: EngineCoreRequest) -> int:
    """Bytes that the engine core is sent of it."""
    parts: Any = MsgpackEncoder().encode(request)
    return sum(memoryview(part).nbytes for part in parts)


def test_stop_strings_are_not_sent_to_the_engine_core() -> None:
    """Nobody looks for them there, and each would be sent once for every choice. All else goes as it is, and
    the detokenizer, which is given the request itself, still has them."""
    strings = ["x" * 1024] * 4
    request = asked(stop=strings, stop_token_ids=[7], max_tokens=5, seed=3)
    sent = without_stop(request)
    assert size(request) > 4 * 1024
    assert size(sent) < 1024
    assert sent.sampling_params is not None
    assert request.sampling_params is not None
    assert (sent.sampling_params.stop, request.sampling_params.stop) == ([], strings)
    assert sent.sampling_params.stop_token_ids == [7]
    plain = asked(max_tokens=5)
    assert without_stop(plain) is plain
