"""`trunkline keys` and `trunkline accounts`, on a store of each kind, without a server."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import pytest

from cluster import cli
from router.accounts.keys import KeyRing, Keys
from router.accounts.people import People
from router.accounts.store import Store
from router.errors import InvalidKey, WrongPassword
from tests.router.accounts.gated import KEY, PASSWORD, prepare
from tests.stores import PostgresCluster, postgres_cluster

CONFIG = """\
models:
  - {name: Echo-1, aliases: [org/parrot:latest], engine: echo}
  - {name: other, engine: echo}
"""


class Commands:
    """The command line, on a store."""

    def __init__(self, url: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.url = url
        self.config = folder / "config.yaml"
        self.config.write_text(CONFIG)
        self._capsys = capsys

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """How it ends and what it prints: its answer, and what went wrong."""
        self._capsys.readouterr()
        status = cli.main(list(arguments))
        said = self._capsys.readouterr()
        return status, said.out, said.err

    def __call__(self, *arguments: str) -> str:
        """What it prints, where it ends well."""
        status, out, err = self.run(*arguments)
        assert (status, err) == (0, "")
        return out

    def json(self, *arguments: str) -> Any:
        """The same for programs."""
        return json.loads(self(*arguments, "--json"))

    def fails(self, *arguments: str) -> str:
        """Why it cannot be done, where it cannot."""
        status, out, err = self.run(*arguments)
        assert (status, out) == (1, "")
        assert err.startswith("trunkline: ")
        assert "Traceback" not in err
        return err.removeprefix("trunkline: ").strip()

    def works(self, key: str) -> bool:
        """Whether a router takes the key."""

        async def find() -> bool:
            store = Store(self.url)
            try:
                ring = KeyRing(store)
                await ring.refresh()
                return bool(ring.find(key))
            except InvalidKey:
                return False
            finally:
                await store.close()

        return asyncio.run(find())

    def logs_in(self, name: str, password: str) -> bool:
        """Whether an account has the password."""

        async def check() -> bool:
            store = Store(self.url)
            try:
                return bool(await People(store).check(name, password, "here"))
            except WrongPassword:
                return False
            finally:
                await store.close()

        return asyncio.run(check())


@pytest.fixture
def commands(
    store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Commands:
    """Commands on a store that has the first admin alone."""
    asyncio.run(prepare(store_url))
    monkeypatch.setenv("TRUNKLINE_STORE", store_url)
    monkeypatch.setenv("TRUNKLINE_DATA", str(tmp_path / "data"))
    return Commands(store_url, tmp_path, capsys)


# ---- keys ---------------------------------------------------------------------------------------------


def test_a_key_is_created_shown_once_and_revoked(commands: Commands) -> None:
    """What `create` prints is a key that works; no list has it, and once it is revoked it works no more."""
    created = commands.json("keys", "create", "nightly jobs")
    assert commands.works(created["key"])
    assert (created["name"], created["account"], created["models"]) == ("nightly jobs", "admin", None)
    for listed in (commands("keys", "list"), json.dumps(commands.json("keys", "list"))):
        assert created["id"] in listed
        assert created["prefix"] in listed
        assert created["key"] not in listed
    assert "is revoked" in commands("keys", "revoke", created["id"])
    assert not commands.works(created["key"])
    assert commands.works(KEY)


def test_a_person_is_shown_the_key_too(commands: Commands) -> None:
    """Alone on its line, to be copied."""
    (key,) = (line.strip() for line in commands("keys", "create").splitlines() if line.startswith("    "))
    assert commands.works(key)


def test_a_key_has_models_and_limits(commands: Commands) -> None:
    """As the command line says, under the models' own names; a change changes what it names and no more."""
    on = ("--config", str(commands.config))
    created = commands.json(
        *("keys", "create", "bounded", *on),
        *("--models", "ORG/parrot:latest,other"),
        *("--limit", "requests_per_minute=60", "--limit", "dollars_per_month=25.5"),
        *("--limit", "org/parrot:latest:tokens_per_minute=1000"),
    )
    assert created["models"] == ["Echo-1", "other"]
    nothing = dict.fromkeys(created["limits"]["overall"])
    overall = nothing | {"requests_per_minute": 60, "dollars_per_month": "25.5"}
    assert created["limits"] == {
        "overall": overall,
        "models": {"Echo-1": nothing | {"tokens_per_minute": 1000}},
    }

    change = ("keys", "change", created["id"], *on)
    renamed = commands.json(*change, "--name", "free")
    assert renamed == {name: value for name, value in created.items() if name != "key"} | {"name": "free"}
    assert "requests_per_minute=60" in commands("keys", "list")
    lifted = commands.json(*change, "--limit", "requests_per_minute=none", "--all-models")
    assert lifted["models"] is None
    assert lifted["limits"]["overall"] == overall | {"requests_per_minute": None}
    assert lifted["limits"]["models"] == created["limits"]["models"]
    unlimited = commands.json(*change, "--no-limits", "--limit", "concurrent_requests=2")
    assert unlimited["limits"] == {"overall": nothing | {"concurrent_requests": 2}, "models": {}}


def test_keys_are_listed_by_account(commands: Commands) -> None:
    """All of them, or those of one account, in any case of its name."""
    commands("accounts", "create", "ada")
    own = commands.json("keys", "create", "ada's", "--account", "Ada")
    assert {key["account"] for key in commands.json("keys", "list")} == {"admin", "ada"}
    assert [key["id"] for key in commands.json("keys", "list", "--account", "ADA")] == [own["id"]]


def test_a_key_is_told_by_as_much_as_there_is_of_it(commands: Commands) -> None:
    """By its id or itself, whole or its beginning, and never by what several have in common."""
    for n, part in enumerate(["id", "key", "prefix"]):
        created = commands.json("keys", "create", f"key {n}")
        commands("keys", "revoke", created[part])
        assert not commands.works(created["key"])
        again = commands.json("keys", "revoke", created["id"][:8])
        assert again["revoked"] is not None
    whole = "tk-" + "x" * 40
    missing = commands.fails("keys", "revoke", whole)
    assert "there is no key" in missing
    assert whole not in missing


def test_the_consoles_key_cannot_be_revoked(commands: Commands) -> None:
    """It stands for what an account does in the console."""

    async def make() -> str:
        store = Store(commands.url)
        try:
            (admin,) = await People(store).everyone()
            return (await Keys(store).console(admin.id)).id
        finally:
            await store.close()

    assert "console's own" in commands.fails("keys", "revoke", asyncio.run(make()))


REFUSED = {
    ("keys", "create", "--account", "nobody"): "there is no account 'nobody'",
    ("keys", "create", " x"): "name must be a string of 1 to 200 characters",
    ("keys", "create", "a\x1b[2J"): "name must be a string of 1 to 200 characters",
    ("keys", "create", "--models", "other"): "give --config with a model",
    (
        "keys",
        "create",
        "--config",
        "CONFIG",
        "--models",
        "gpt-9",
    ): "no model 'gpt-9'; there are Echo-1, other",
    ("keys", "create", "--limit", "requests=5"): "expected [MODEL:]WHAT=VALUE",
    ("keys", "create", "--limit", "requests_per_minute=-5"): "--limit requests_per_minute=-5: ",
    (
        "keys",
        "create",
        "--limit",
        "requests_per_minute=0",
    ): "expected at least 1, got 0; none lifts the limit",
    ("keys", "create", "--limit", "tokens_per_minute=x"): 'expected a whole number, got the text "x"',
    (
        "keys",
        "create",
        "--limit",
        "dollars_per_month=0.0000000001",
    ): "expected dollars from 0 to 1000000 with up to 9 decimals, got",
    (
        "accounts",
        "change",
        "admin",
        "--limit",
        "dollars_per_month=lots",
    ): 'decimals, got the text "lots"; none lifts the limit',
    ("accounts", "change", "admin", "--limit", "Echo-1:requests_per_minute=5"): "give --config with a model",
    ("accounts", "change", "nobody", "--no-limits"): "there is no account 'nobody'",
    ("accounts", "create", "bob", "--limit", "requests_per_minute=0"): "expected at least 1, got 0",
    ("keys", "revoke", "tk-"): "give 6 characters of it",
    ("accounts", "disable", "nobody"): "there is no account 'nobody'",
    ("accounts", "create", "a b"): "name must be",
    ("accounts", "create", "admin"): "there is an account",
}


def test_what_cannot_be_done_is_said(commands: Commands) -> None:
    """In a line that says what was wrong with it, and nothing is changed."""
    before = commands("keys", "list"), commands("accounts", "list")
    for arguments, words in REFUSED.items():
        failed = commands.fails(*(str(commands.config) if one == "CONFIG" else one for one in arguments))
        assert words in failed
        assert failed.isprintable()
    assert (commands("keys", "list"), commands("accounts", "list")) == before


# ---- accounts -----------------------------------------------------------------------------------------


def test_an_account_is_created_with_a_password_that_is_shown_once(commands: Commands) -> None:
    """With it its holder logs in; the list has it without."""
    created = commands.json("accounts", "create", "Ada", "--role", "admin")
    assert (created["name"], created["role"]) == ("ada", "admin")
    assert commands.logs_in("ada", created["password"])
    assert created["password"] not in json.dumps(commands.json("accounts", "list"))
    text = commands("accounts", "create", "bob")
    (password,) = (line.strip() for line in text.splitlines() if line.startswith("    "))
    assert commands.logs_in("bob", password)
    assert [one["name"] for one in commands.json("accounts", "list")] == ["ada", "admin", "bob"]


def test_a_password_can_be_handed_over(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """On standard input, where no list of processes shows it; then it is printed nowhere."""
    chosen = "a password of one's own"
    for command in (("accounts", "create", "ada"), ("accounts", "password", "admin")):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{chosen}\n"))
        assert chosen not in commands(*command, "--stdin")
        assert commands.logs_in(command[2], chosen)
    monkeypatch.setattr("sys.stdin", io.StringIO("short\n"))
    refused = commands.fails("accounts", "password", "admin", "--stdin")
    assert "12 to 200 characters" in refused
    assert "short" not in refused


def test_an_account_has_limits(commands: Commands) -> None:
    """Of all its keys together, as a key has its own; a change changes what it names and no more."""
    on = ("--config", str(commands.config))
    created = commands.json("accounts", "create", "ada", "--limit", "dollars_per_month=0.000000001")
    nothing = dict.fromkeys(created["limits"]["overall"])
    overall = nothing | {"dollars_per_month": "0.000000001"}
    assert created["limits"] == {"overall": overall, "models": {}}

    change = ("accounts", "change", "ADA", *on)
    given = ("--limit", "requests_per_minute=60", "--limit", "org/parrot:latest:tokens_per_minute=1000")
    changed = commands.json(*change, *given)
    assert changed["limits"] == {
        "overall": overall | {"requests_per_minute": 60},
        "models": {"Echo-1": nothing | {"tokens_per_minute": 1000}},
    }
    shown = "requests_per_minute=60 dollars_per_month=0.000000001 Echo-1:tokens_per_minute=1000"
    for said in (commands(*change), commands("accounts", "list")):
        assert shown in said
    lifted = commands.json(*change, "--limit", "dollars_per_month=none")
    assert lifted["limits"]["overall"] == nothing | {"requests_per_minute": 60}
    unlimited = commands.json(*change, "--no-limits", "--limit", "concurrent_requests=2")
    assert unlimited["limits"] == {"overall": nothing | {"concurrent_requests": 2}, "models": {}}
    assert [one["limits"] for one in commands.json("accounts", "list")] == [
        unlimited["limits"],
        {"overall": nothing, "models": {}},
    ]


def test_a_new_password_replaces_the_old_one(commands: Commands) -> None:
    """Made up and shown, where none is handed over."""
    fresh = commands.json("accounts", "password", "ADMIN")["password"]
    assert commands.logs_in("admin", fresh)
    assert not commands.logs_in("admin", PASSWORD)


def test_a_disabled_account_can_do_nothing(commands: Commands) -> None:
    """Its keys do not work and it cannot log in, until it is enabled again."""
    commands("accounts", "disable", "admin")
    assert not commands.works(KEY)
    assert not commands.logs_in("admin", PASSWORD)
    assert "disabled" in commands("accounts", "list")
    commands("accounts", "enable", "admin")
    assert commands.works(KEY)
    assert commands.logs_in("admin", PASSWORD)


# ---- stores that are none -----------------------------------------------------------------------------


def test_no_store_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where there is no store yet the command says so, and leaves none behind."""
    monkeypatch.delenv("TRUNKLINE_STORE", raising=False)
    monkeypatch.setenv("TRUNKLINE_DATA", str(tmp_path / "data"))
    assert "`trunkline serve` makes it" in Commands("", tmp_path, capsys).fails("keys", "list")
    assert not (tmp_path / "data").exists()


def test_a_store_without_tables_is_left_alone(
    store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A database that no server has used yet is not upgraded by a command."""
    if store_url.startswith("sqlite"):
        Path(store_url.removeprefix("sqlite:///")).touch()
    monkeypatch.setenv("TRUNKLINE_STORE", store_url)
    commands = Commands(store_url, tmp_path, capsys)
    for _ in range(2):
        assert "`trunkline serve` makes them" in commands.fails("accounts", "list")


def test_a_store_that_is_down_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a line without its password, and what is printed for programs stays empty."""
    with postgres_cluster() as server:
        url = server.url(server.create_database())
        asyncio.run(prepare(url))
        server.stop()
        monkeypatch.setenv("TRUNKLINE_STORE", url)
        commands = Commands(url, tmp_path, capsys)
        status, out, err = commands.run("keys", "list", "--json")
        assert (status, out) == (1, "")
        assert err.splitlines()[-1].startswith(
            "trunkline: the PostgreSQL server of the store cannot be reached"
        )
        assert password(server) not in err
        server.start()
        assert len(commands.json("keys", "list")) == 1


def password(server: PostgresCluster) -> str:
    """What nobody may read."""
    return server.url("").partition("@")[0].rpartition(":")[2]


def test_a_url_that_is_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without repeating it: it may hold a password."""
    monkeypatch.setenv("TRUNKLINE_STORE", "mysql://me:secret@localhost/x")
    refused = Commands("", tmp_path, capsys).fails("keys", "list")
    assert "postgresql: is expected" in refused
    assert "secret" not in refused


def test_a_bad_configuration_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As by every other command."""
    path = tmp_path / "bad.yaml"
    path.write_text("modles: []\n")
    status, out, err = Commands("", tmp_path, capsys).run("keys", "list", "--config", str(path))
    assert (status, out) == (2, "")
    assert "unknown key" in err
