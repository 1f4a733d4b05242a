"""When an actor's process looks for garbage: not while it starts, and then among what is new alone.

Python walks over all that is alive time and again, and what an actor imports and builds stays. With vLLM that
is a million objects: looking through them took a fifth of its import, and an eighth of what a whole request
cost the router.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

YOUNG = 10_000
"""Objects that may have come and not gone before the youngest are searched."""


@contextmanager
def starting() -> Iterator[None]:
    """No search in the block. What is there at its end stays and is never searched, and searches begin.

    What became garbage in the block stays too: of an engine's start that is 4 MB, and Serve, which searches
    everything once an actor has started, would take half a second to find it.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.set_threshold(YOUNG)
        gc.enable()
