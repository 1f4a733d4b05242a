"""The environment variables that are read and set, all in one place.

Ray reads its own when it is imported, so `prepare` comes before that; what is set here is inherited by every
process of the deployment.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from pydantic import SecretStr

from router.accounts.settings import AccountsSettings

TRUNK_SECRET = "TRUNKLINE_SECRET"  # noqa: S105 - the variable's name
"""May hold the secret that trunks demand; without it each deployment makes its own."""

LEAST_SECRET = 16
"""Bytes."""


OWN_RAY = {
    # When a worker dies, Ray ends what it has started.
    "RAY_process_group_cleanup_enabled": "1",
    # By default every worker gives way to all else on the machine, as a batch job would.
    "RAY_worker_niceness": "0",
    # What follows is work that Ray does while nothing happens. Serve's controller looks at everything, and
    # asks for every node, ten times a second: 3 ms of it each time. It is also how soon it starts a replica
    # in the place of one that died.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # No request comes through Serve's handles, so there is nothing to count ten times a second.
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "0",
    # Nobody scrapes this Ray's own metrics: ours say what its processes do.
    "RAY_enable_metrics_collection": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    # Nor does anybody want its workers' output, which the log monitor looks for ten times a second.
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "3600",
    # Next to nothing is put into the object store that could fill a disk.
    "RAY_local_fs_monitor_interval_ms": "5000",
    # Ray begins with a worker for each core and keeps those that are not used.
    "RAY_num_workers_soft_limit": "1",
    # Ray has one node here, which nobody adds nodes to, and nobody looks at its tasks, events and dashboard.
    "AUTOSCALER_UPDATE_INTERVAL_S": "3600",
    "RAY_gcs_pull_resource_loads_period_milliseconds": "60000",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_event_stats": "0",
    "METRICS_RECORD_INTERVAL_S": "3600",
    "SCAN_EVENT_DIR_INTERVAL_SECONDS": "3600",
    "GCS_CHECK_ALIVE_INTERVAL_SECONDS": "60",
    "RAY_io_context_monitor_probe_interval_ms": "60000",
    # Looks that are as good once a second or less often. By default they come four to ten times a second.
    "RAY_raylet_report_resources_period_milliseconds": "1000",
    "RAY_object_manager_timer_freq_ms": "1000",
    "RAY_kill_idle_workers_interval_ms": "2000",
    "RAY_raylet_check_gc_period_milliseconds": "10000",
}
"""For a Ray of our own, unless the environment says otherwise."""


STORE = "TRUNKLINE_STORE"
REDIS = "TRUNKLINE_REDIS"
"""May hold the URLs of accounts.store and accounts.redis, passwords included."""

KEY = "TRUNKLINE_KEY"
"""May hold the key with which commands ask a running server."""

DATA = "TRUNKLINE_DATA"
"""May hold the folder of what has to be kept, unless the configuration names one."""

ADMIN_KEY = "TRUNKLINE_ADMIN_KEY"
ADMIN_PASSWORD = "TRUNKLINE_ADMIN_PASSWORD"  # noqa: S105 - the variable's name
"""May hold the first admin's key and password, for a start with an empty store."""


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
        for name, value in OWN_RAY.items():
            os.environ.setdefault(name, value)


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


def forget_secrets() -> None:
    """Take out of the environment what no process that we start has to know."""
    for name in (STORE, REDIS, ADMIN_KEY, ADMIN_PASSWORD):
        os.environ.pop(name, None)


def admin_password() -> str | None:
    """The first admin's password, if one is given."""
    return os.environ.get(ADMIN_PASSWORD) or None


def admin_key() -> str | None:
    """The first admin's key, if one is given."""
    return os.environ.get(ADMIN_KEY, "").strip() or None


def key() -> str | None:
    """The key with which commands ask, if there is one."""
    return os.environ.get(KEY, "").strip() or None


def placed(settings: AccountsSettings) -> AccountsSettings:
    """The same, with every place found out: the configuration's, or the environment's, or the default."""
    folder = settings.folder or Path(os.environ.get(DATA) or "~/.local/share/trunkline")
    folder = _from_here(folder)
    store = settings.store or _secret(STORE) or SecretStr(f"sqlite:///{folder}/trunkline.db")
    redis = settings.redis or _secret(REDIS)
    return settings.model_copy(update={"folder": folder, "store": _anchored(store), "redis": redis})


def _anchored(store: SecretStr) -> SecretStr:
    """A store in a file, as it is meant from here: every process of a deployment has a folder of its own."""
    kind, mark, path = store.get_secret_value().partition("sqlite:///")
    if kind or not mark or path in {"", ":memory:"}:
        return store
    return SecretStr(f"sqlite:///{_from_here(Path(path))}")


def _from_here(path: Path) -> Path:
    with suppress(RuntimeError):  # nobody has the name after ~
        path = path.expanduser()
    return path.absolute()


def _secret(variable: str) -> SecretStr | None:
    given = os.environ.get(variable, "").strip()
    return SecretStr(given) if given else None
