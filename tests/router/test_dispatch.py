from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from router.dispatch import PREFIX_CHARACTERS, expected_work, pick
from serving.messages import Chat, Load, Message, Sampling

IDLE = Load()


@dataclass(frozen=True)
class Candidate:
    """A replica and what it has to do."""

    replica: str
    load: Load = IDLE
    unreported: int = 0


def chat(*texts: str) -> Chat:
    """A conversation of these user messages."""
    messages = tuple(Message("user", text) for text in texts)
    return Chat("id", "m", 0, messages, Sampling(max_tokens=1))


few = st.integers(0, 5)
loads = st.builds(Load, few, few, st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]))
candidates = st.lists(
    st.builds(Candidate, st.text(max_size=5), loads, few), max_size=8, unique_by=lambda one: one.replica
)


@given(candidates, st.text())
def test_nobody_has_less_to_do_than_the_replica_that_is_picked(ones: list[Candidate], text: str) -> None:
    """The pick is one of the candidates, and none has less expected work; without candidates there is
    none."""
    picked = pick(ones, chat(text))
    assert (picked is None) == (not ones)
    if picked is not None:
        assert picked in ones
        assert expected_work(picked) == min(map(expected_work, ones))


@given(candidates, st.text(), st.randoms(use_true_random=False))
def test_a_tie_does_not_depend_on_the_order(ones: list[Candidate], text: str, random: object) -> None:
    """The same replicas in another order, as in another router, give the same pick."""
    shuffled = list(ones)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert pick(shuffled, chat(text)) == pick(ones, chat(text))


@given(st.text(max_size=2 * PREFIX_CHARACTERS), st.lists(st.text(), max_size=3), st.integers(2, 8))
def test_a_conversation_goes_where_it_began(opening: str, later: list[str], count: int) -> None:
    """Among equals a conversation keeps its replica as it grows, and loses it only with the replica."""
    ones = [Candidate(f"replica-{at}") for at in range(count)]
    first = pick(ones, chat(opening))
    assert pick(ones, chat(opening, *later)) == first
    others = [one for one in ones if one != first]
    second = pick(others, chat(opening))
    assert pick([*others, Candidate("a new one")], chat(opening)) in {second, Candidate("a new one")}


@settings(max_examples=20)
@given(st.lists(st.text("abcdefgh01234567", min_size=8, max_size=8), min_size=2, max_size=5, unique=True))
def test_conversations_spread_over_equals(names: list[str]) -> None:
    """Many conversations are shared out about evenly among replicas that have nothing to do, whatever the
    replicas are called."""
    ones = [Candidate(name) for name in names]
    picks = Counter(pick(ones, chat(f"conversation number {at}")) for at in range(1000))
    assert all(0.6 < picks[one] * len(ones) / 1000 < 1.4 for one in ones)


@given(loads, few)
def test_work_that_is_not_reported_yet_counts(load: Load, unreported: int) -> None:
    """A replica that a request was just sent to is expected to have one more to do, before it says so."""
    assert expected_work(Candidate("a", load, unreported)) == expected_work(Candidate("a", load)) + unreported


def test_work_that_waits_for_a_full_cache_counts_for_more() -> None:
    """Where little of the KV cache is left, what waits will wait longer; up to half, its use is no matter."""
    works = [expected_work(Candidate("a", Load(2, 3, used))) for used in (0.0, 0.5, 0.75, 1.0)]
    assert works[0] == works[1] == 5
    assert works[1] < works[2] < works[3] == 2 + 3 * 4
    empty = [expected_work(Candidate("a", Load(2, 0, used))) for used in (0.0, 1.0)]
    assert empty == [2, 2]
