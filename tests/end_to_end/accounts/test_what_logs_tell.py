from __future__ import annotations

from urllib.parse import urlsplit

from tests.end_to_end.accounts import ADMIN_KEY, ADMIN_PASSWORD, ECHO
from tests.end_to_end.accounts.office import Office, bearer
from tests.end_to_end.client import ask, chat
from tests.end_to_end.server import Server


async def test_no_log_has_a_secret(server: Server, office: Office, store: str) -> None:
    """No key and no password, of a person or of the store, right or wrong, is in any file of any log, or in
    what the routers say of themselves; nor is what was sent in the place of one."""
    new_key = office.key("secret")
    wrong, strange = new_key.secret[:-1] + "!", "no-key-at-all-7f3a9c51"
    guessed, chosen = "a wrong guess at it", "chosen by the member"
    for secret, status in ((new_key.secret, 200), (wrong, 401), (strange, 401)):
        assert (await ask(server, chat(ECHO, "hi", max_tokens=1), bearer(secret))).status == status
        assert Office(server, secret).ask("GET", "/api/me").status_code == status
    new = {"name": "secretive", "password": chosen}
    assert office.ask("POST", "/api/accounts", new).status_code == 201
    assert office.ask("POST", "/api/accounts", new | {"role": "king"}).status_code == 400
    change = {"old": guessed, "new": ADMIN_PASSWORD}
    assert office.ask("POST", "/api/me/password", change).status_code == 401
    change = {"old": ADMIN_PASSWORD, "new": ADMIN_PASSWORD}
    assert office.ask("POST", "/api/me/password", change).status_code == 200

    files = server.log_files()
    assert len(files) > 10
    told = [path.read_bytes() for path in files] + [server.metrics().text.encode()]
    of_the_store = urlsplit(store).password or ""
    for secret in (ADMIN_KEY, new_key.secret, wrong, strange, ADMIN_PASSWORD, guessed, chosen, of_the_store):
        assert secret
        assert not any(secret.encode() in text for text in told)
