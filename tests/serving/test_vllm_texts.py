from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.decoders import DecodeStream

from serving.vllm_texts import Decoder, Texts

SPECIAL = "<|im_end|>"


def tokenizer() -> Tokenizer:
    """A byte-level one whose tokens are words, letters, special, and every byte."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[SPECIAL], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(["the rail, the railway, trains and naïve 🚂🚂 日本語 \ufffd"] * 9, trainer)
    return made


BYTE_LEVEL = tokenizer()


class Stream:
    """A detokenizer with nothing around the tokenizer's own decoding."""

    def __init__(self, prompt: list[int]) -> None:
        self._stream = DecodeStream(ids=prompt, skip_special_tokens=True)

    def decode_next(self, token: int) -> str:
        return self._stream.step(BYTE_LEVEL, token) or ""


tokens = st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() + 2), max_size=40)

CHARACTERS = "the railwy 🚂日本ïé\n"

written = st.text(CHARACTERS + "\ufffd", max_size=12).map(lambda text: BYTE_LEVEL.encode(text).ids)
whole = st.text(CHARACTERS, max_size=12).map(lambda text: BYTE_LEVEL.encode(text).ids)


prompts = st.tuples(tokens | written, st.just(False)) | st.tuples(whole, st.just(True))
"""Of the second kind it is known that they end with a whole character."""


@given(prompt=prompts, answer=st.lists(tokens | written, max_size=4).map(lambda parts: [*chain(*parts)]))
def test_every_token_says_what_decoding_all_of_them_says(
    prompt: tuple[list[int], bool], answer: list[int]
) -> None:
    """After any prompt, each token of any answer adds what the tokenizer's own decoding of all of them adds:
    parts of characters, bytes that never become one, special and unknown tokens included."""
    texts = Texts.of(BYTE_LEVEL)
    assert texts is not None
    before, is_whole = prompt
    detokenizer: Any = Stream([] if is_whole else before)
    decoder, plain = Decoder(texts, lambda: detokenizer, whole=is_whole), Stream(before)
    assert [decoder.decode_next(token) for token in answer] == [plain.decode_next(token) for token in answer]


@pytest.mark.parametrize(
    "decoder", [decoders.Metaspace(), decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])]
)
def test_tokens_that_hang_together_are_decoded(decoder: Any) -> None:
    """Where a token may say something else at the beginning than later, no texts are kept."""
    other = tokenizer()
    other.decoder = decoder
    assert Texts.of(other) is None
