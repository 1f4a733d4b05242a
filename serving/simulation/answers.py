"""Where a simulated model's tokens come from: each depends on its request and its position alone."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain, cycle, islice
from typing import Protocol

PROSE = (
    "A train leaves the station in the morning and nobody on the platform looks up. ",
    "The baker across the street has been awake since three, and his first loaves are already sold. ",
    "It rained in the night, so the cobbles shine and the pigeons keep to the dry side of the square. ",
    "A boy counts the windows of the town hall, loses his place at twenty, and begins again. ",
    "Two women discuss the price of apples as if it were the weather, which nothing can be done about. ",
    "The clock is four minutes fast; everyone who lives here knows it, and everyone else hurries. ",
    "Behind the market a cat sleeps on a crate of lemons and moves only when the crate is sold. ",
    "The postman has a letter for a house that was pulled down in spring, and he carries it all the same. ",
    "Someone practises the same eight bars on a piano, slowly, and makes a different mistake each time. ",
    "At noon the shutters close one after another, and for an hour the street belongs to the shade. ",
    "The river runs low, so children cross it on stones that their parents never saw. ",
    "A painter has set up his easel where the view is worst, because there he is left alone. ",
    "In the library a man reads the newspaper of a city that he left forty years ago. ",
    "The tram bends around the corner with a long complaint that the dogs no longer answer. ",
    "By evening the tables are full, and the talk is of the match, the bridge and the new doctor. ",
    "Then the lamps come on along the quay, a little too early, and the day is over before it is dark.\n\n",
)
"""What is answered where nothing else is given."""


class Tokenizer(Protocol):
    """What is asked of the model's tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The tokens of a text."""


class Written:
    """Answers that were written beforehand; each comes to its end."""

    def __init__(self, answers: Sequence[str], tokenizer: Tokenizer) -> None:
        self._answers = [tokenizer.encode(answer, add_special_tokens=False) for answer in answers]

    def answer(self, seed: int | None, longest: int) -> Sequence[int]:
        """The tokens of a request's answer, without the end of the sequence."""
        return self._answers[(seed or 0) % len(self._answers)]


class Prose:
    """PROSE over and over, from the sentence that the seed chooses. The request bounds its length."""

    def __init__(self, tokenizer: Tokenizer, longest: int) -> None:
        """`longest`: the most tokens that any request may ask for."""
        sentences = [tokenizer.encode(sentence, add_special_tokens=False) for sentence in PROSE]
        lengths = [len(sentence) for sentence in sentences]
        self._starts = [sum(lengths[:index]) for index in range(len(lengths))]
        once = list(chain.from_iterable(sentences))
        # A view of an array, as a part of it is then no copy, whatever its length.
        self._tokens = memoryview(array("i", islice(cycle(once), len(once) + longest)))

    def answer(self, seed: int | None, longest: int) -> Sequence[int]:
        """The `longest` tokens of a request's answer."""
        start = self._starts[(seed or 0) % len(self._starts)]
        return self._tokens[start : start + longest]
