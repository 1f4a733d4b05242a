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
def terminal() -> Iterator[None]:
    """Gives the servers the signals that a terminal's shell would: who runs the tests in the background may have
    had them ignored, and whoever ignores a signal starts everything else so."""
    ignored = [
        number for number in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_IGN
    ]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Show what was measured."""
    figures = config.stash.get(_figures, {})
    if figures:
        terminalreporter.section("measured figures")
        width = max(map(len, figures))
        for name, figure in figures.items():
            terminalreporter.write_line(f"{name:<{width}}  {figure}")
