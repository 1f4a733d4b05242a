"""What the documents promise is there, and what is there is documented."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from cluster.cli import build_parser
from router.accounts.settings import AccountsSettings
from router.metrics import ROUTER_METRICS
from router.settings import AnswerSettings, Limits, Listen, ModelLimits, ModelTimeouts, Timeouts
from serving.metrics import REPLICA_METRICS, SIMULATION_METRICS
from serving.settings import SimulationSettings, TrunkSettings

ROOT = Path(__file__).parent.parent
PACKAGES = ("cluster", "router", "serving")
README = (ROOT / "README.md").read_text()

SECTIONS: dict[str, type[BaseModel]] = {
    "limits": Limits,
    "timeouts": Timeouts,
    "trunk": TrunkSettings,
    "listen": Listen,
    "accounts": AccountsSettings,
    "simulation": SimulationSettings,
}
METRICS = (*ROUTER_METRICS, *REPLICA_METRICS, *SIMULATION_METRICS)
PER_MODEL = {*ModelLimits.model_fields, *ModelTimeouts.model_fields}


def settings_table() -> dict[str, tuple[bool, str]]:
    """Setting → (may differ per model, default) as the README has it."""
    rows = re.findall(r"^\| `(\w+\.\w+)`( †)? \| (\S+) \|", README, re.MULTILINE)
    return {name: (bool(dagger), default) for name, dagger, default in rows}


def test_every_setting_stands_in_the_readme_with_its_default() -> None:
    """The README's tables of limits, time-outs and the simulation are the settings, no more and no less."""
    actual = {
        f"{section}.{name}": (
            name in PER_MODEL,
            f"{field.default:g}" if isinstance(field.default, float) else str(field.default),
        )
        for section, settings in SECTIONS.items()
        for name, field in settings.model_fields.items()
    }
    assert settings_table() == actual


def test_every_answer_setting_stands_in_the_readme_with_its_default() -> None:
    """The README's table of how answers are made is the settings, each with its values and its default."""
    rows = re.findall(r"^\| `(\w+)` † \| (.*?) \| `(\S+)` \|", README, re.MULTILINE)
    shown = {name: (set(re.findall(r"`(\w+)`", values)), default) for name, values, default in rows}
    actual = {
        name: (set(get_args(field.annotation)), str(field.default))
        for name, field in AnswerSettings.model_fields.items()
    }
    assert shown == actual


def test_every_metric_stands_in_the_readme() -> None:
    """The README's table of metrics is what routers and replicas export, with labels and sentence."""
    rows = re.findall(r"^\| `(trunkline_\w+)` \| (.*?) \| (.*?) \|$", README, re.MULTILINE)
    exported = {(d.name, ", ".join(d.labels), d.sentence) for d in METRICS}
    assert set(rows) == exported


def test_every_command_stands_in_the_readme() -> None:
    """The README names each command of `trunkline`, and no other."""
    named = set(re.findall(r"^\| `trunkline (\w+)", README, re.MULTILINE))
    usage = build_parser().format_help()
    assert named == set(re.findall(r"^    (\w+) {2,}", usage, re.MULTILINE))


def test_every_environment_variable_stands_in_the_readme() -> None:
    """The README names each variable of ours that the code does, and no other."""
    named = set(re.findall(r"^\| `(TRUNKLINE_\w+)`", README, re.MULTILINE))
    sources = [path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    variable = re.compile(r"TRUNKLINE_[A-Z]+(?:_[A-Z]+)*")
    assert named == {name for source in sources for name in variable.findall(source)}


@pytest.mark.parametrize("document", ["README.md", "benchmarks/README.md"])
def test_links_lead_somewhere(document: str) -> None:
    """Every relative link of a document names a file that is there."""
    path = ROOT / document
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []
