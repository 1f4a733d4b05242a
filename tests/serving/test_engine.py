from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.engine import Prompt, Refusal, fit
from serving.messages import Sampling


@given(prompt=st.integers(0, 30), asked=st.integers(1, 30), least=st.integers(0, 30))
def test_an_answer_is_fitted_into_the_context(prompt: int, asked: int, least: int) -> None:
    """max_tokens is what was asked for or what the context leaves, whichever is less, and min_tokens never
    more than that; a prompt that leaves no room is refused with the numbers."""
    sampling = Sampling(max_tokens=max(asked, least), min_tokens=least)
    if prompt >= 20:
        with pytest.raises(Refusal, match=f"has {prompt} tokens.*context of 20 tokens") as refusal:
            fit(sampling, Prompt(prompt, None), 20)
        assert (refusal.value.status, refusal.value.param) == (400, "messages")
        assert refusal.value.code == "context_length_exceeded"
        return
    fitted = fit(sampling, Prompt(prompt, None), 20)
    assert fitted.max_tokens == min(sampling.max_tokens, 20 - prompt)
    assert fitted.min_tokens == min(least, fitted.max_tokens)
    changed = {"max_tokens": fitted.max_tokens, "min_tokens": fitted.min_tokens}
    assert fitted == msgspec.structs.replace(sampling, **changed)
