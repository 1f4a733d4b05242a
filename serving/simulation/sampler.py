"""What a sampler adds to tokens that are given: a grammar's choice, and log-probs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def permitted(token: int, mask: NDArray[np.int32], closing: list[int]) -> int:
    """The token, if a grammar allows it; else what ends the answer soonest, as far as one can tell: the first
    of `closing` that is allowed; else the allowed token with the lowest id.

    `mask` has a bit for each token of the vocabulary, the lowest first, in words of 32. Where it allows
    nothing the token stays, and the grammar refuses it, which ends this request alone.
    """
    for candidate in (token, *closing):
        if mask[candidate // 32] >> candidate % 32 & 1:
            return candidate
    words = np.flatnonzero(mask)
    if not words.size:
        return token
    word = int(mask[words[0]])
    return 32 * int(words[0]) + (word & -word).bit_length() - 1


def logprobs(
    tokens: NDArray[np.int64], count: int, vocabulary: int
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int32]]:
    """Log-probs of a model that is rather sure: nine parts in ten for the token, nine in ten of the rest for
    the next id, and so on.

    Returns ids and log-probs [tokens, 1 + count], the token's own and then the `count` likeliest, the token
    among them; and the tokens' ranks [tokens], which are 1.
    """
    ranks = np.array([1, *range(1, count + 1)])
    ids = (tokens[:, None] + ranks - 1) % vocabulary
    likelihoods = np.tile(np.log(0.9) + (ranks - 1) * np.log(0.1), (len(tokens), 1))
    return ids.astype(np.int32), likelihoods.astype(np.float32), np.ones(len(tokens), np.int32)
