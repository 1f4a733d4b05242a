from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from cluster.environment import OWN_RAY

RAY = Path(ray.__file__).parent
READERS = (
    "core/src/ray/raylet/raylet",
    "serve/_private/constants.py",
    "_private/log_monitor.py",
    "autoscaler/_private/constants.py",
    "dashboard/consts.py",
    "dashboard/modules/event/event_consts.py",
    "dashboard/modules/reporter/reporter_consts.py",
)
"""The parts of Ray that read what is set here."""


def prepared(address: str, **environment: str) -> dict[str, str]:
    """The environment of a process that has prepared for Ray at an address."""
    code = f"""
import json, os
from cluster.environment import prepare
prepare({address!r})
print(json.dumps(dict(os.environ)))
"""
    inherited = {name: value for name, value in os.environ.items() if name not in OWN_RAY}
    answer = subprocess.check_output([sys.executable, "-c", code], env=inherited | environment)
    variables: dict[str, str] = json.loads(answer)
    return variables


def test_what_the_environment_says_of_ray_stays() -> None:
    """A setting of Ray's that the user has made is kept beside our own."""
    name = "RAY_SERVE_CONTROL_LOOP_INTERVAL_S"
    variables = prepared("local", **{name: "7"})
    assert {key: variables[key] for key in OWN_RAY} == {**OWN_RAY, name: "7"}


def test_a_ray_of_somebody_else_is_left_alone() -> None:
    """Nothing of how our own Ray runs is set for a cluster that we join."""
    assert not prepared("auto").keys() & OWN_RAY.keys()


@pytest.mark.parametrize("name", OWN_RAY)
def test_ray_knows_each_setting(name: str) -> None:
    """Ray reads every variable that is set for it: of one that it does not know it says nothing."""
    assert any(name.encode() in (RAY / reader).read_bytes() for reader in READERS)
