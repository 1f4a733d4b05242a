from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.accounts.limits import Bound, bound
from router.accounts.settings import Price
from serving.messages import Chat, Message, Sampling, Text

PRICE = Price.model_validate({"prompt": 3, "completion": 7})
"""3,000 nano-dollars for a token of a prompt, 7,000 for one of an answer."""


def chat(max_tokens: int, n: int = 1) -> Chat:
    """A chat of which only what it may generate matters."""
    return Chat("r", "m", 0, (Message("user", "hello"),), Sampling(max_tokens=max_tokens, n=n))


def text(prompts: int, max_tokens: int, n: int = 1) -> Text:
    """A text completion, likewise."""
    return Text("r", "m", 0, ("",) * prompts, Sampling(max_tokens=max_tokens, n=n))


def test_what_a_chat_may_use_at_most() -> None:
    """A token for each byte of its body, as many as a template adds, and max_tokens for each choice."""
    assert bound(chat(50, n=2), 100, None, PRICE) == Bound(456, 356 * 3_000 + 100 * 7_000)


def test_prompt_and_answer_share_the_context() -> None:
    """Where the context is known, one answer and its prompt have no more than that together; but in money
    the worst of either counts."""
    assert bound(chat(1000), 100_000, 2048, PRICE) == Bound(2048, 2048 * 3_000 + 1000 * 7_000)
    assert bound(chat(9999), 10, 2048, PRICE) == Bound(2048, 266 * 3_000 + 2048 * 7_000)


def test_several_prompts_each_have_a_context() -> None:
    """Each prompt of a text completion may fill a context with each of its answers."""
    assert bound(text(3, 48, n=2), 10**6, 2048, Price()) == Bound(3 * 2000 + 6 * 48, 0)


@given(
    prompts=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    n=st.integers(1, 3),
    max_tokens=st.integers(0, 80),
    context=st.integers(1, 64),
    data=st.data(),
)
def test_nothing_uses_more_than_its_bound(
    prompts: list[int], n: int, max_tokens: int, context: int, data: st.DataObject
) -> None:
    """However long prompts and answers turn out to be, tokens and money stay within the bound, with a known
    context and without."""
    prompts = [min(length, context) for length in prompts]
    answers = [
        data.draw(st.integers(0, min(max_tokens, context - length))) for length in prompts for _ in range(n)
    ]
    # As many bytes as a template of no words would need.
    body = max(0, sum(prompts) - 256 * len(prompts))
    used = Bound(sum(prompts) + sum(answers), PRICE.of(sum(prompts), sum(answers)))
    for known in (context, None):
        most = bound(text(len(prompts), max_tokens, n), body, known, PRICE)
        assert used.tokens <= most.tokens
        assert used.nano <= most.nano
