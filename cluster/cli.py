"""The `trunkline` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster import environment, remote
from cluster.config import ConfigError, describe, load
from serving.source import SourceError

URL = "http://127.0.0.1:8000"

STATUSES = "Exit status: 0, 1 if it could not be done, 2 for a bad configuration or command."

Command = Callable[[argparse.Namespace], int]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. The exit status: 0, 1 for what went wrong, 2 for what was asked wrongly."""
    options = build_parser().parse_args(arguments)
    command: Command = options.command
    try:
        return command(options)
    except (ConfigError, SourceError) as error:
        print(f"trunkline: {error}", file=sys.stderr)
        return 2
    except remote.NoAnswer as error:
        print(f"trunkline: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    """Every command and its options, in words worth reading."""
    parser = argparse.ArgumentParser(
        prog="trunkline",
        description="One endpoint for many language models: engines, router and metrics in one install.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands)
    _add_check(commands)
    _add_status(commands)
    _add_models(commands)
    _add_keys(commands)
    _add_accounts(commands)
    return parser


def _add_serve(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="start everything that a configuration describes, and keep it running",
        description="Starts Ray, an engine for each model and the routers, says what it does, and ends with"
        " a curl line that works. Ctrl-C (or SIGTERM) lets running answers end, then ends everything.",
        epilog="Exit status: 0 after Ctrl-C, 1 if something could not be started, 2 for a bad configuration.",
    )
    parser.add_argument("config", type=Path, help="a configuration file, such as deploy/local.yaml")
    parser.add_argument("--port", type=port, metavar="N", help="another port than the configured one")
    parser.set_defaults(command=serve)


def _add_check(commands: Any) -> None:
    parser = commands.add_parser(
        "check",
        help="check a configuration without starting or downloading anything",
        description="Reads a configuration and finds all that is wrong: unknown keys and engine arguments,"
        " values out of range, names that clash, sources that are not there. Every fault gets a line.",
        epilog="Exit status: 0 if it can be served, 2 if it cannot.",
    )
    parser.add_argument("config", type=Path, help="the configuration file")
    parser.set_defaults(command=check)


def _add_status(commands: Any) -> None:
    parser = commands.add_parser(
        "status",
        help="say how a running server is",
        description="Asks a running server how it is, and shows each model's state, load and speed.",
        epilog="Exit status: 0 if every model is ready, 1 otherwise or if nothing answers.",
    )
    parser.add_argument("--url", default=URL, help=f"where the server is (default: {URL})")
    parser.set_defaults(command=status)


def _add_models(commands: Any) -> None:
    parser = commands.add_parser(
        "models",
        help="list the models of a running server",
        description="Asks a running server for its models and shows their names, states and context lengths.",
        epilog="Exit status: 0, or 1 if nothing answers.",
    )
    parser.add_argument("--url", default=URL, help=f"where the server is (default: {URL})")
    parser.add_argument(
        "--json", action="store_true", help="print the models as GET /v1/models describes them"
    )
    parser.set_defaults(command=models)


def _add_keys(commands: Any) -> None:
    parser = commands.add_parser(
        "keys",
        help="list, create, change and revoke keys",
        description="Works on the store itself: no server has to run, and no key is needed. Running routers"
        " learn of a change within two seconds.",
        epilog=STATUSES,
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    listing = _add_action(actions, "keys list", "list the keys, revoked ones too")
    listing.add_argument("--account", metavar="NAME", help="those of this account alone")
    create = _add_action(actions, "keys create", "create a key and show it, this once")
    create.add_argument("name", nargs="?", default="Made by hand", help="what people tell it apart by")
    create.add_argument("--account", metavar="NAME", default="admin", help="whose it is (default: admin)")
    change = _add_action(actions, "keys change", "change what a key is called and what it may do")
    change.add_argument("key", help="its id or its beginning, or as much of either as tells it apart")
    change.add_argument("--name", help="what people tell it apart by")
    for action in (create, change):
        action.add_argument(
            "--models", metavar="A,B", help="the models that it may use (default: all); needs --config"
        )
        _add_limit(action, "it")
    change.add_argument("--all-models", action="store_true", help="it may use every model")
    change.add_argument("--no-limits", action="store_true", help="it has no limits but those given here")
    revoke = _add_action(actions, "keys revoke", "end a key, for ever")
    revoke.add_argument("key", help="its id or its beginning, or as much of either as tells it apart")


def _add_accounts(commands: Any) -> None:
    parser = commands.add_parser(
        "accounts",
        help="list, create, change, disable and enable accounts, and set their passwords",
        description="Works on the store itself: no server has to run, and no key is needed. Running routers"
        " learn of a change within two seconds.",
        epilog=STATUSES,
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    _add_action(actions, "accounts list", "list the accounts")
    create = _add_action(actions, "accounts create", "create an account, with a password that is shown once")
    create.add_argument("name", help="what its holder logs in with")
    create.add_argument(
        "--role", choices=("admin", "member"), default="member", help="what it may (default: member)"
    )
    change = _add_action(
        actions, "accounts change", "change how much all keys of an account may use together"
    )
    for action in (create, change):
        _add_limit(action, "all its keys together")
    change.add_argument("--no-limits", action="store_true", help="they have no limits but those given here")
    disable = _add_action(actions, "accounts disable", "end its log-ins and make its keys do nothing")
    enable = _add_action(actions, "accounts enable", "let it log in and use its keys again")
    password = _add_action(actions, "accounts password", "give it a new password, which is shown once")
    for action in (change, disable, enable, password):
        action.add_argument("name", help="the account's name")
    for action in (create, password):
        action.add_argument(
            "--stdin", action="store_true", help="read the password from a line of standard input instead"
        )


def _add_action(actions: Any, name: str, what: str) -> Any:
    """A command of two words, which `accounts_command` knows by them."""
    parser = actions.add_parser(
        name.partition(" ")[2], help=what, description=f"{what[0].upper()}{what[1:]}.", epilog=STATUSES
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="the configuration that says where the store is (default: TRUNKLINE_STORE, or the default file)",
    )
    parser.add_argument("--json", action="store_true", help="print it as the API describes it")
    parser.set_defaults(command=accounts, action=name)
    return parser


def _add_limit(action: Any, whose: str) -> None:
    action.add_argument(
        "--limit",
        action="append",
        default=[],
        metavar="[MODEL:]WHAT=VALUE",
        help=f"how much {whose} may use, over all models or of one; may be given again. WHAT is"
        " requests_per_minute, tokens_per_minute, dollars_per_month or concurrent_requests; the value"
        " none lifts the limit",
    )


def port(text: str) -> int:
    """A TCP port out of the command line."""
    if not (text.isascii() and text.isdecimal()) or not 1 <= int(text[:6]) <= 65_535:
        raise argparse.ArgumentTypeError(f"expected a port from 1 to 65535, got {text!r}")
    return int(text)


# ---- the commands --------------------------------------------------------------------------------------


def serve(options: argparse.Namespace) -> int:
    """Start a deployment and keep it running."""
    config = load(options.config)
    if options.port is not None:
        config = config.model_copy(update={"listen": config.listen.model_copy(update={"port": options.port})})
    environment.prepare(config.ray.address)
    from cluster import session  # noqa: PLC0415 - it loads Ray, which the other commands do without

    return session.serve(config)


def check(options: argparse.Namespace) -> int:
    """Read a configuration and say what it describes."""
    print(describe(load(options.config)))
    return 0


def status(options: argparse.Namespace) -> int:
    """Ask a running server how it is."""
    return remote.status(options.url)


def models(options: argparse.Namespace) -> int:
    """Ask a running server for its models."""
    return remote.models(options.url, as_json=options.json)


def accounts(options: argparse.Namespace) -> int:
    """Work on accounts and keys, in the store."""
    from cluster import accounts_command  # noqa: PLC0415 - it loads what talks to databases

    try:
        print(accounts_command.run(options))
    except accounts_command.CommandFailed as error:
        print(f"trunkline: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
