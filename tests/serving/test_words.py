from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from serving.words import ASCII, EXPRESSIONS, LONGEST_KEPT, Words

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

TEXTS = (
    "a railway's way",
    "THE way, I'LL say: 12345 ways!\r\n\r\n  no\tway  \n",
    "don't 'say' it's 1,000.5 $ {x}[y]",
)


def trained(pre_tokenizer: Any, *, normalizer: Any = None, **model: Any) -> Tokenizer:
    """A small tokenizer that cuts like that."""
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    return tokenizer


def cut(expression: str) -> Any:
    """What cuts at an expression, as the tokenizers of newer models do."""
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"), BYTES])


OURS = {
    "as GPT-2": trained(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    **{
        expression: trained(cut(expression), normalizer=normalizers.NFC())
        for expression in sorted(EXPRESSIONS)
    },
}

OTHERS = {
    "a space before": trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "cut otherwise": trained(pre_tokenizers.Whitespace()),
    "cut twice": trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()])),
    # An interval that gives nothing back to Python, and may come again to a tokenizer.
    "an expression of two meanings": trained(cut(r"\p{N}{1,3}+|\P{N}+")),
    "what cuts is left out": trained(
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\s"), "removed"), BYTES])
    ),
    "in small letters": trained(
        pre_tokenizers.ByteLevel(add_prefix_space=False), normalizer=normalizers.Lowercase()
    ),
    "without ends": trained(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizer=normalizers.Strip()),
    "three points as one": trained(
        pre_tokenizers.ByteLevel(add_prefix_space=False), normalizer=normalizers.Replace("...", "!")
    ),
    "by chance": trained(pre_tokenizers.ByteLevel(add_prefix_space=False), dropout=0.5),
}

texts = st.lists(
    st.sampled_from([*TEXTS, *ASCII, "way", "rail", "12", "  ", "\n\n", "'s", "'LL"])
    | st.text(ASCII, max_size=5),
    max_size=12,
).map("".join)


@settings(max_examples=300, deadline=None)
@pytest.mark.parametrize("name", OURS)
@given(text=texts)
def test_words_are_the_whole(name: str, text: str) -> None:
    """Word by word, any text in ASCII has the tokens that the tokenizer makes of all of it, whether its words
    have been seen before or not."""
    words = Words.of(OURS[name])
    assert words is not None
    for _ in range(2):
        assert words.tokens(text) == OURS[name].encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_left_alone(name: str) -> None:
    """A tokenizer that does anything else to a text is not taken apart."""
    assert Words.of(OTHERS[name]) is None


def test_tokens_that_are_looked_for_in_words_are_found() -> None:
    """A tokenizer with tokens of its own that may stand within a word is not taken apart."""
    tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.add_tokens(["rail"])
    assert Words.of(tokenizer) is None


def test_long_words_are_not_kept() -> None:
    """What is kept has a bound, whatever clients say."""
    words = Words.of(OURS["as GPT-2"])
    assert words is not None
    before = words._kept.cache_info().currsize
    assert words.tokens("a" * LONGEST_KEPT)
    assert words.tokens("b" * (LONGEST_KEPT + 1))
    assert words._kept.cache_info().currsize == before + 1
