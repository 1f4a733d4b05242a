from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.router.providers import CALLERS_KEY, KEY, OTHER_KEY


@pytest.fixture
def no_key_in_logs(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Everything is logged, and after the test none of the keys is in it."""
    caplog.set_level(logging.DEBUG)
    yield
    records = map(logging.Formatter().format, caplog.get_records("call"))
    logged = "".join([*records, *capsys.readouterr()])
    assert logged
    assert [key for key in (KEY, OTHER_KEY, CALLERS_KEY) if key[:8] in logged or key[8:] in logged] == []
