"""One run of a deployment from a terminal: start it, say what is happening, keep it, take it down."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import threading
import time
import urllib.request
from functools import partial
from pathlib import Path

from cluster import accounts, app, environment
from cluster.config import Config
from cluster.environment import WeakSecret
from router.accounts.bootstrap import FirstStart
from serving import source

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""What asks this machine without a detour: a proxy that the environment names is for elsewhere."""

READY_S = 30.0
"""Seconds that the routers' port gets to answer once they run."""


class Narrator:
    """Says on standard output what is being done, and how many seconds after the start."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:6.1f} s  {text}", flush=True)

    def about(self, name: str, text: str) -> None:
        """The same, of one model."""
        self(f"{name}: {text}")


class Interruption:
    """The first signal that asks us to end. It raises KeyboardInterrupt, and the rest are ignored: taking all
    of it down must not be left half done, and whoever runs us may pass on what a terminal has sent us."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self._came = False
        # Whoever starts us under nohup wants us to outlive the terminal.
        hung_up = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        self._signals = [number for number in self.SIGNALS if number != signal.SIGHUP or not hung_up]

    def listen(self) -> None:
        """Take the signals, from whoever has them. Raises KeyboardInterrupt for one that came before and was
        lost: Python drops what a signal raises in the middle of a fork, and Ray's start is full of them."""
        if self._came:
            raise KeyboardInterrupt
        for number in self._signals:
            signal.signal(number, self._interrupt)

    def _interrupt(self, *_: object) -> None:
        self._came = True
        for number in self._signals:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt


def serve(config: Config) -> int:
    """Start everything, keep it running until a signal, take everything down. Returns the exit status.

    The environment must have been prepared before this module was imported. Raises SourceError.
    """
    config = config.model_copy(update={"accounts": environment.placed(config.accounts)})
    say = Narrator()
    interruption = Interruption()
    interruption.listen()
    log_dir = config.log_dir or Path(tempfile.mkdtemp(prefix="trunkline-"))
    try:
        app.check_port(config.listen)
        with accounts.prepared(config.accounts) as first:
            key = introduce(first, say)
            environment.forget_secrets()
            put_models_in_place(config, say)
            with app.ray_cluster(config.ray.address, say):
                interruption.listen()  # again: Ray has put a handler of its own in the place of ours
                with app.deployed(config, log_dir, say):
                    wait_answering(config)
                    say(f"ready; logs are in {log_dir}\n\n{advise(config, key)}\n\nCtrl-C ends it.")
                    interruption.listen()
                    threading.Event().wait()
    except (app.StartFailed, accounts.AccountsUnusable, WeakSecret) as error:
        print(f"trunkline: {error}\nLogs are in {log_dir}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("stopped")
    return 0


def put_models_in_place(config: Config, say: Narrator) -> None:
    """Download or convert each source here, where the first replica will want it, with the progress shown."""
    for model in config.models:
        if model.source is not None:
            weights = model.accelerator is None
            folder = source.resolve(model.source, partial(say.about, model.name), weights=weights)
            say.about(model.name, f"the model is in {folder}")


def wait_answering(config: Config) -> None:
    """Return when the port answers. Raises StartFailed if it does not."""
    url = f"{base_url(config)}/health"
    deadline = time.monotonic() + READY_S
    while True:
        try:
            with DIRECT.open(url, timeout=1):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise app.StartFailed(f"{url} does not answer: {error}") from None
            time.sleep(0.05)


def introduce(first: FirstStart | None, say: Narrator) -> str | None:
    """Show what has been made for the first admin, as it cannot be shown again; the key, if it was made up.

    What the environment has given is not repeated: this output may be a log.
    """
    if first is None:
        return None
    password = "that of TRUNKLINE_ADMIN_PASSWORD" if environment.admin_password() else first.password
    made_up = None if environment.admin_key() else first.key
    key = made_up or "that of TRUNKLINE_ADMIN_KEY"
    say("the store was empty; these are its first account and key, and are shown this once:")
    print(f"\n    account   {first.name}\n    password  {password}\n    key       {key}\n", flush=True)
    return made_up


def advise(config: Config, key: str | None) -> str:
    """What a person can do once everything runs; with the first admin's key, where it is known."""
    if not config.accounts.enabled:
        return curl_line(config, None)
    lines = [f"console: {base_url(config)}/", "", curl_line(config, key)]
    if key is None:
        lines.append("\n$TRUNKLINE_KEY is your key; `trunkline keys create` makes another one.")
    return "\n".join(lines)


def curl_line(config: Config, key: str | None) -> str:
    """A command that gets an answer from the first model; of those that run here, if any do, as a provider
    may want a key. Where accounts ask for a key that is not known, its variable stands in its place."""
    body = {
        "model": (*config.hosted, *config.models)[0].name,
        "temperature": 0,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    }
    bearer = ""
    if config.accounts.enabled:
        bearer = f" -H 'authorization: Bearer {key}'" if key else ' -H "authorization: Bearer $TRUNKLINE_KEY"'
    return (
        f"curl {base_url(config)}/v1/chat/completions{bearer}"
        f" -H 'content-type: application/json' -d '{json.dumps(body)}'"
    )


def base_url(config: Config) -> str:
    """Where this machine reaches the routers."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.listen.host, config.listen.host)  # noqa: S104 - read
    return f"http://[{host}]:{config.listen.port}" if ":" in host else f"http://{host}:{config.listen.port}"
