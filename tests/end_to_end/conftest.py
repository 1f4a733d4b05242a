from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import pytest

Report = Callable[[str, str], None]

_figures = pytest.StashKey[dict[str, str]]()


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> Report:
    """Takes what was measured, by name; all of it is shown at the end of the run."""
    return pytestconfig.stash.setdefault(_figures, {}).__setitem__


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> Iterator[None]:
    """Lets Ctrl-C reach the servers: a shell's background jobs ignore it, these tests may be one, and whoever
    ignores a signal starts everything else so."""
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, found)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Show what was measured."""
    figures = config.stash.get(_figures, {})
    if figures:
        terminalreporter.section("measured figures")
        width = max(map(len, figures))
        for name, figure in figures.items():
            terminalreporter.write_line(f"{name:<{width}}  {figure}")
