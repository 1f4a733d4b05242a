from __future__ import annotations

from collections.abc import Callable

import pytest

Report = Callable[[str, str], None]

_figures = pytest.StashKey[dict[str, str]]()


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> Report:
    """Takes what was measured, by name; all of it is shown at the end of the run."""
    return pytestconfig.stash.setdefault(_figures, {}).__setitem__


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Show what was measured."""
    figures = config.stash.get(_figures, {})
    if figures:
        terminalreporter.section("measured figures")
        width = max(map(len, figures))
        for name, figure in figures.items():
            terminalreporter.write_line(f"{name:<{width}}  {figure}")
