"""The environment variables that are read and set, all in one place.

Ray reads its own when it is imported, so `prepare` comes before that; what is set here is inherited by every
process of the deployment.
"""

from __future__ import annotations

import os
import secrets

from pydantic import SecretStr

TRUNK_SECRET = "TRUNKLINE_SECRET"  # noqa: S105 - the variable's name
"""May hold the secret that trunks demand; without it each deployment makes its own."""

LEAST_SECRET = 16
"""Bytes."""


class WeakSecret(Exception):
    """The environment gives a secret that could be guessed."""


def prepare(ray_address: str) -> None:
    """Set what Ray reads. To be called before `ray` is imported."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray warns otherwise that it will stop hiding GPUs from actors that asked for none.
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    if ray_address == "local":
        # Ray's ports listen on every interface: only who has this token may use them.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        # When a worker dies, Ray ends what it has started.
        os.environ["RAY_process_group_cleanup_enabled"] = "1"  # noqa: SIM112 - Ray's own spelling


def provider_key(variable: str) -> SecretStr | None:
    """The deployment's key for an upstream provider, if the variable holds any."""
    given = os.environ.get(variable, "").strip()
    return SecretStr(given) if given else None


def trunk_secret() -> bytes:
    """The secret of this deployment's trunks. Raises WeakSecret."""
    given = os.environ.get(TRUNK_SECRET, "").encode()
    if given and len(given) < LEAST_SECRET:
        raise WeakSecret(f"{TRUNK_SECRET} has {len(given)} bytes; at least {LEAST_SECRET} are expected")
    return given or secrets.token_bytes(32)
