from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from serving.words import ASCII, Words

NEWER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""As the tokenizers of newer models cut."""

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


OURS = {
    "as GPT-2": trained(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "newer": trained(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(NEWER), "isolated"), BYTES])),
    "newer, composed": trained(
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(NEWER), "isolated"), BYTES]),
        normalizer=normalizers.NFC(),
    ),
}

OTHERS = {
    "a space before": trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "cut otherwise": trained(pre_tokenizers.Whitespace()),
    "cut twice": trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()])),
    "what cuts is left out": trained(
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\s"), "removed"), BYTES])
    ),
    "in small letters": trained(
        pre_tokenizers.ByteLevel(add_prefix_space=False), normalizer=normalizers.Lowercase()
    ),
    "without ends": trained(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizer=normalizers.Strip()),
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
