"""Tokens and the text that they spell, on the way to a parser."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hypothesis import given
from hypothesis import strategies as st

from serving.parsing import Spelling

answers = st.lists(st.text("ab\U0001f686", max_size=3), max_size=12)
"""What each of an answer's tokens adds to the text. Token n is the nth."""


def spelled(
    answer: Sequence[str], puts: Iterator[int], *, lag: int, cut: int = 0, ended_by: str | None = None
) -> list[tuple[str, list[int]]]:
    """What a parser is told of an answer whose tokens come in such numbers, its text `lag` characters behind
    them. `cut`: characters of the end that were a stop string. `ended_by`: what a last token would say that
    ended the answer and is not in its text."""
    texts = [*answer, *([] if ended_by is None else [ended_by])]
    heard = iter(texts)
    spelling = Spelling(lambda _: next(heard))
    text = "".join(answer)
    text = text[: len(text) - cut]
    told: list[tuple[str, list[int]]] = []
    said = begun = 0
    while begun < len(texts):
        tokens = range(begun, min(begun + next(puts), len(texts)))
        begun = tokens.stop
        finished = begun == len(texts)
        end = len(text) if finished else max(said, len("".join(answer[:begun])) - lag)
        pieces = spelling.spelled(text[said:end], tokens, finished=finished)
        told += [(piece, list(ids)) for piece, ids in pieces]
        said = max(said, end)
    return told


def numbers(data: st.DataObject) -> Iterator[int]:
    """How many tokens come at once, each time."""
    while True:
        yield data.draw(st.integers(1, 4))


@given(answer=answers, lag=st.integers(0, 5), ended_by=st.none() | st.text("ab", max_size=3), data=st.data())
def test_each_token_is_told_with_its_text(
    answer: list[str], lag: int, ended_by: str | None, data: st.DataObject
) -> None:
    """However far the text lags behind, and however many tokens come at once: a parser is told each token by
    itself, with what it says; and the token that ended the answer with nothing."""
    told = spelled(answer, numbers(data), lag=lag, ended_by=ended_by)
    expected = [(text, [number]) for number, text in enumerate(answer)]
    assert told == expected + ([] if ended_by is None else [("", [len(answer)])])


@given(answer=answers.filter(any), data=st.data())
def test_what_stands_before_a_stop_string_is_told(answer: list[str], data: st.DataObject) -> None:
    """A stop string may begin within a token: what stands before it is told with that token, and nothing is
    told of the string's own tokens, but for a single last one, without its text."""
    whole = "".join(answer)
    stop = data.draw(st.integers(1, len(whole)))
    told = spelled(answer, numbers(data), lag=stop, cut=stop)
    assert "".join(text for text, _ in told) == whole[:-stop]
    for number, (text, tokens) in enumerate(told):
        assert tokens == [number]
        assert answer[number] == text or (answer[number].startswith(text) and number == len(told) - 1)


def test_text_that_no_token_is_known_to_spell_is_told() -> None:
    """Where an engine says more than its tokens do, all of it is told at the end at the latest."""
    spelling = Spelling({1: "a"}.__getitem__)
    assert list(spelling.spelled("abc", (1,), finished=False)) == [("a", (1,))]
    assert list(spelling.spelled("d", (), finished=True)) == [("bcd", [])]
