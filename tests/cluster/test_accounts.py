from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import select

from cluster import environment
from cluster.accounts import AccountsUnusable, account_faults, prepared
from router.accounts.bootstrap import ADMIN
from router.accounts.people import People
from router.accounts.schema import accounts
from router.accounts.settings import AccountsSettings
from router.accounts.store import Store
from router.settings import Listen
from tests.router.accounts.gated import KEY, PASSWORD

SECRET = "s3cret-of-the-store"  # noqa: S105 - nobody's
POSTGRES = f"postgresql://u:{SECRET}@127.0.0.1:1/db"
REDIS = f"redis://:{SECRET}@127.0.0.1:1/0"
VARIABLES = (
    environment.STORE,
    environment.REDIS,
    environment.DATA,
    environment.ADMIN_KEY,
    environment.ADMIN_PASSWORD,
)


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment says nothing of accounts."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def faults(host: str = "127.0.0.1", routers: int = 1, **fields: object) -> list[tuple[str, str]]:
    """What is wrong with accounts, by field."""
    settings = AccountsSettings.model_validate(fields)
    found = list(account_faults(settings, Listen(host=host), routers))
    assert SECRET not in repr(found)
    return [(each.field, each.text) for each in found]


def in_folder(folder: Path) -> AccountsSettings:
    """Accounts whose store is a file there."""
    return environment.placed(AccountsSettings(folder=folder))


def on(url: str) -> AccountsSettings:
    """Accounts on this store."""
    return AccountsSettings(store=SecretStr(url))


# ---- faults -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_nobody_has_to_log_in_on_this_machine(host: str) -> None:
    """Accounts may be off where nobody else reaches us, whatever else they would lack."""
    assert faults(host, enabled=False, routers=3) == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "example.org", "localhost.example.org"])  # noqa: S104
def test_elsewhere_somebody_has_to_say_who_calls(host: str) -> None:
    """Accounts that are off are refused where others may reach us; those that are on are not."""
    ((field, text),) = faults(host, enabled=False)
    assert field == "accounts.enabled"
    assert f'"{host}"' in text
    assert faults(host) == []


def test_several_routers_share_store_and_counters() -> None:
    """A file is one router's, and limits that several count need Redis; one router needs neither."""
    assert faults(routers=1) == []
    assert [field for field, _ in faults(routers=2)] == ["accounts.store", "accounts.redis"]
    assert [field for field, _ in faults(routers=2, redis=REDIS)] == ["accounts.store"]
    assert [field for field, _ in faults(routers=2, store=POSTGRES)] == ["accounts.redis"]
    assert faults(routers=2, store=POSTGRES, redis=REDIS) == []


def test_what_the_environment_says_is_looked_at_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """URLs of the environment count as the configuration's, and are refused as those are, unseen."""
    monkeypatch.setenv(environment.STORE, POSTGRES)
    monkeypatch.setenv(environment.REDIS, REDIS)
    assert faults(routers=2) == []
    for variable, wrong in (
        (environment.STORE, f"mysql://u:{SECRET}@h/db"),
        (environment.STORE, SECRET),
        (environment.STORE, f"postgresql://u@h:{SECRET}/db"),
        (environment.REDIS, f"memcached://:{SECRET}@h"),
    ):
        with monkeypatch.context() as patched:
            patched.setenv(variable, wrong)
            ((field, text),) = faults()
            assert (
                field == {environment.STORE: "accounts.store", environment.REDIS: "accounts.redis"}[variable]
            )
            assert "expected" in text or "not a URL" in text


# ---- where it all is ----------------------------------------------------------------------------------


def test_places_are_found_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the configuration says comes first, then the environment, then a folder of the user's."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    placed = environment.placed(AccountsSettings())
    assert placed.folder == tmp_path / "home/.local/share/trunkline"
    assert placed.url == f"sqlite:///{placed.folder}/trunkline.db"
    assert placed.redis is None

    monkeypatch.setenv(environment.DATA, str(tmp_path / "data"))
    placed = environment.placed(AccountsSettings())
    assert placed.url == f"sqlite:///{tmp_path}/data/trunkline.db"
    assert placed.spools == tmp_path / "data/spools"

    monkeypatch.setenv(environment.STORE, f" {POSTGRES}\n")
    monkeypatch.setenv(environment.REDIS, REDIS)
    placed = environment.placed(AccountsSettings())
    assert placed.url == POSTGRES
    assert placed.redis == SecretStr(REDIS)

    own = AccountsSettings.model_validate(
        {"store": "sqlite:////own/store", "redis": "redis://own", "folder": "/own/data"}
    )
    placed = environment.placed(own)
    assert (placed.url, placed.redis, placed.folder) == (
        "sqlite:////own/store",
        SecretStr("redis://own"),
        Path("/own/data"),
    )
    assert environment.placed(placed) == placed
    assert SECRET not in f"{environment.placed(AccountsSettings())!r}"


def test_places_mean_the_same_in_every_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A path is meant from where the command is run, and ~ is the user's home: processes of a deployment run
    elsewhere."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for store, folder, where in (
        ("sqlite:///own.db", "data", tmp_path / "own.db"),
        ("sqlite:///a/own.db", "./data", tmp_path / "a/own.db"),
        ("sqlite:///~/own.db", "data", tmp_path / "home/own.db"),
        (f"sqlite:///{tmp_path}/own.db", str(tmp_path / "data"), tmp_path / "own.db"),
    ):
        placed = environment.placed(AccountsSettings.model_validate({"store": store, "folder": folder}))
        assert Store(placed.url).path == where
        assert placed.folder == tmp_path / "data"
    for nowhere in ("sqlite:///:memory:", "sqlite:///", POSTGRES):
        assert environment.placed(on(nowhere)).url == nowhere
    nobody = environment.placed(AccountsSettings.model_validate({"folder": "~nobody-has-this-name/data"}))
    assert nobody.folder is not None
    assert nobody.folder.is_absolute()


# ---- a start ------------------------------------------------------------------------------------------


def test_the_first_start_makes_an_admin(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty store is made ready and gets its first admin, with the key and the password of the environment
    where it has them; every later start finds it ready."""
    monkeypatch.setenv(environment.ADMIN_KEY, f" {KEY}\n")
    monkeypatch.setenv(environment.ADMIN_PASSWORD, PASSWORD)
    with prepared(on(store_url)) as first:
        assert first == (ADMIN, PASSWORD, KEY)
    with prepared(on(store_url)) as again:
        assert again is None


def test_what_the_environment_gives_must_be_fit(
    store_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A key or a password that cannot be one is refused by the name of its variable, and not shown."""
    for variable, value in ((environment.ADMIN_KEY, "tk-weak"), (environment.ADMIN_PASSWORD, "pass-weak")):
        with monkeypatch.context() as patched:
            patched.setenv(variable, value)
            with pytest.raises(AccountsUnusable, match=f"^{variable}: .* characters, not ") as refusal:
                prepared(on(store_url)).__enter__()
            assert value not in str(refusal.value)
    with prepared(on(store_url)) as first:
        assert first is not None
    assert "weak" not in "".join(capsys.readouterr())


def test_where_accounts_are_off_there_is_no_store(tmp_path: Path) -> None:
    """Nothing is made, and nothing is asked for."""
    with prepared(AccountsSettings(enabled=False, folder=tmp_path / "data")) as first:
        assert first is None
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_is_not_there_ends_the_start_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that does not answer, a folder that cannot be, and a file that is no store are each told by
    where they are, without a password."""
    (tmp_path / "text").write_text("no store" * 1000)
    for url, words in (
        (POSTGRES, "accounts.store: the PostgreSQL server cannot be reached, or is not a store"),
        (
            f"sqlite:///{tmp_path}/text",
            f"accounts.store: {tmp_path}/text cannot be reached, or is not a store",
        ),
        (f"sqlite:///{tmp_path}/text/store", f"accounts.store: {tmp_path}/text/store.lock cannot be made: "),
    ):
        with pytest.raises(AccountsUnusable) as refusal:
            prepared(on(url)).__enter__()
        assert str(refusal.value).startswith(words)
    assert SECRET not in "".join(capsys.readouterr())


def test_a_store_of_a_later_version_ends_the_start_in_words(sqlite_url: str) -> None:
    """Whoever goes back to an earlier version is told that the store does not."""
    with prepared(on(sqlite_url)):
        pass
    store = Store(sqlite_url)
    with store.connect_ledger() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
        connection.commit()
    with pytest.raises(AccountsUnusable, match=r"^accounts.store: .*later version .*9999"):
        prepared(on(sqlite_url)).__enter__()


# ---- one deployment for a file ------------------------------------------------------------------------


def test_two_deployments_do_not_share_a_file(tmp_path: Path) -> None:
    """While one deployment runs on a file another is refused, by whatever path it comes; others, and the same
    one afterwards, are not."""
    (tmp_path / "way").symlink_to(tmp_path / "data")
    with prepared(in_folder(tmp_path / "data")):
        (tmp_path / "link.db").symlink_to(tmp_path / "data/trunkline.db")
        for same in (
            in_folder(tmp_path / "data"),
            in_folder(tmp_path / "way"),
            on(f"sqlite:///{tmp_path}/link.db"),
        ):
            with pytest.raises(AccountsUnusable, match="another deployment runs on"):
                prepared(same).__enter__()
        with prepared(in_folder(tmp_path / "other")) as other:
            assert other is not None
    with prepared(in_folder(tmp_path / "data")) as again:
        assert again is None


def test_a_file_is_free_when_its_deployment_was_killed(tmp_path: Path) -> None:
    """Of a deployment that was killed nothing is in the way of the next, whatever processes it leaves."""
    code = """
import sys, subprocess
from pathlib import Path
from cluster import environment
from cluster.accounts import prepared
from router.accounts.settings import AccountsSettings
with prepared(environment.placed(AccountsSettings(folder=Path(sys.argv[1])))):
    orphan = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL)
    print(orphan.pid, flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "data"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as killed:
        assert killed.stdout is not None
        orphan = int(killed.stdout.readline())
        try:
            with pytest.raises(AccountsUnusable, match="another deployment runs on"):
                prepared(in_folder(tmp_path / "data")).__enter__()
            killed.kill()
            killed.wait()
            with prepared(in_folder(tmp_path / "data")) as again:
                assert again is None
        finally:
            os.kill(orphan, 9)


def test_commands_work_on_the_file_of_a_running_deployment(tmp_path: Path) -> None:
    """What is not a deployment may use the store meanwhile."""

    async def names(store: Store) -> list[str]:
        await People(store).create("ada", "member", PASSWORD)
        async with store.begin() as connection:
            found = list((await connection.execute(select(accounts.c.name))).scalars())
        await store.close()
        return found

    settings = in_folder(tmp_path / "data")
    with prepared(settings):
        assert sorted(asyncio.run(names(Store(settings.url)))) == ["ada", ADMIN]
