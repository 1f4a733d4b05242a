"""The console as a person has it: in a browser, in front of a running server."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import httpx
import pytest
from playwright.sync_api import expect

from tests.end_to_end.console import ADMIN_KEY, ADMIN_PASSWORD, ECHO, MEMBERS_PASSWORD, SLOW
from tests.end_to_end.console.conftest import Visit
from tests.end_to_end.console.visitor import ANSWERED_MS, Visitor
from tests.end_to_end.server import Server, http

READY = {
    "reference": ("/reference", "#recent a, #recent .quiet"),
    "reference-text": ("/reference/completions", "#recent a, #recent .quiet"),
    "playground": ("/playground", ".column"),
    "requests": ("/requests", "#rows tr"),
    "usage": ("/usage", "#by-day svg"),
    "models": ("/models", ".model"),
    "keys": ("/keys", "#rows tr"),
    "people": ("/people", "#rows tr"),
    "account": ("/account", "#password-form"),
}
"""Each page with what is there as soon as it shows what it has."""

LOOKS = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]


def api(server: Server, path: str) -> list[dict[str, object]]:
    """What the admin's key is told."""
    with http(server) as client:
        answer = client.get(path, headers={"authorization": f"Bearer {ADMIN_KEY}"})
        assert answer.status_code == 200, answer.text
        rows: list[dict[str, object]] = answer.json()["data"]
        return rows


# ---- the whole way ------------------------------------------------------------------------------------


def test_a_person_goes_the_whole_way(visit: Visit) -> None:
    """Somebody logs in, makes a key, tries a request with it, finds that one in the history with the very
    tokens, finds it on the plot of what was used, revokes the key, and is refused with it."""
    visitor = visit()
    page = visitor.page
    key = visitor.create_key("the whole way")
    visitor.fill_in("one two three", key=key)
    answer = visitor.try_it()
    expect(answer).to_contain_text("one two three one two three")
    assert visitor.figure("status") == "200"
    tokens = visitor.figure("tokens")
    prompt, completion = map(int, tokens.split(" + "))
    assert completion == 24

    page.goto("/requests")
    row = visitor.row("the whole way")
    expect(row).to_have_count(1)
    expect(row).to_contain_text(tokens)
    expect(row).to_contain_text("Chrome")
    row.get_by_role("link").click()
    expect(page.get_by_role("heading", name="What was used")).to_be_visible()
    expect(page.locator("#request")).to_contain_text("completed")
    price = (prompt * 150 + completion * 600) / 1e9
    expect(page.locator("#request")).to_contain_text(f"${price:.9f}".rstrip("0"))
    visitor.picture("request")

    page.goto("/usage")
    plot = page.get_by_role("img", name="Tokens by key")
    expect(plot).to_contain_text("the whole way")
    expect(plot).to_contain_text(str(prompt + completion))
    table = page.locator("#by-key-table tr").filter(has_text="the whole way")
    expect(table).to_contain_text(str(prompt))
    expect(table).to_contain_text(str(completion))

    visitor.revoke_key("the whole way")
    visitor.fill_in("is anybody there", key=key)
    expect(visitor.try_it()).to_contain_text("the key is not known here")
    assert visitor.figure("status") == "401"


def test_logging_in_needs_no_pointer(visit: Visit) -> None:
    """With a keyboard alone somebody logs in, goes past the navigation, sends a request and logs out; what
    has the focus can be seen."""
    visitor = visit(logged_in=False)
    page = visitor.page
    press = page.keyboard.press
    page.goto("/keys")
    expect(page.get_by_label("Account")).to_be_focused()
    page.keyboard.type("admin")
    press("Tab")
    page.keyboard.type(ADMIN_PASSWORD)
    press("Enter")
    expect(page).to_have_url(re.compile("/keys$"))
    page.goto("/reference")
    press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    press("Enter")
    expect(page.locator("main")).to_be_focused()
    button = page.get_by_role("button", name="Try It!")
    for _ in range(100):
        press("Tab")
        if button.evaluate("element => element === document.activeElement"):
            break
    expect(button).to_be_focused()
    assert button.evaluate("element => getComputedStyle(element).outlineStyle") == "solid"
    press("Enter")
    expect(page.locator("#progress")).to_contain_text("tokens in", timeout=ANSWERED_MS)
    page.get_by_role("button", name="Log out").press("Enter")
    expect(page).to_have_url(re.compile("/login$"))
    page.goto("/keys")
    expect(page).to_have_url(re.compile(r"/login\?next=/keys$"))


def test_a_wrong_password_is_said_so(visit: Visit, server: Server) -> None:
    """A wrong password leaves the name in the form and says why; after too many somebody is told how long to
    wait."""
    visitor = visit(logged_in=False, address="192.0.2.7")
    page = visitor.page
    page.goto("/login")
    for _ in range(12):
        page.get_by_label("Account").fill("somebody")
        page.get_by_label("Password", exact=True).fill("not the password")
        page.get_by_role("button", name="Log in").click()
        expect(page.get_by_role("alert")).to_be_visible()
        expect(page.get_by_label("Account")).to_have_value("somebody")
        if "Too many" in page.get_by_role("alert").inner_text():
            break
    expect(page.get_by_role("alert")).to_contain_text(re.compile("Please wait [0-9]+ seconds?"))
    visitor.picture("login-refused")


# ---- the reference ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "schema"), [("/reference", "ChatRequest"), ("/reference/completions", "TextRequest")]
)
def test_the_form_has_every_parameter(visit: Visit, server: Server, path: str, schema: str) -> None:
    """For each parameter of a body that the OpenAPI document has there is a field with its description, its
    range and its default."""
    visitor = visit()
    visitor.page.goto(path)
    with http(server) as client:
        document = client.get("/openapi.json").json()
    for name, described in document["components"]["schemas"][schema]["properties"].items():
        if name == "stream_options":
            continue  # an object of one field, which is there in its place
        field = visitor.field(name)
        expect(field).to_have_count(1)
        expect(field.locator(".field-text")).to_have_text(described["description"])
        assert field.locator("input, select, textarea, [data-add]").count()
        for bounds in described.get("anyOf", ()):
            for bound in ("minimum", "maximum"):
                if bound in bounds:
                    expect(field.locator(".kind")).to_contain_text(str(bounds[bound]))
        default = described.get("default")
        if isinstance(default, int | float) and not isinstance(default, bool):
            expect(field).to_contain_text(f"default {default:g}")
    expect(visitor.field("stream_options.include_usage")).to_have_count(1)


def test_an_answer_streams_in(visit: Visit) -> None:
    """The text of an answer is there piece by piece, and so are its events; at the end there are its timings
    and its headers."""
    visitor = visit()
    page = visitor.page
    visitor.fill_in("piece by piece", model=SLOW)
    visitor.field("max_tokens").locator("input").fill("30")
    page.get_by_role("button", name="Try It!").click()
    text = page.locator("#view-text")
    expect(text).to_contain_text("piece by", timeout=ANSWERED_MS)
    expect(page.locator("#stop")).to_be_enabled()
    early = len(text.inner_text())
    expect(page.locator("#stop")).to_be_disabled(timeout=ANSWERED_MS)
    assert len(text.inner_text()) > early
    assert visitor.figure("tokens").endswith(" + 30")
    assert 10 < float(visitor.figure("speed")) < 30
    assert re.fullmatch(r"[0-9.]+ m?s", visitor.figure("first"))
    page.get_by_role("tab", name="Raw").click()
    expect(page.locator("#raw")).to_contain_text("data: [DONE]")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#response-headers")).to_contain_text("x-request-id: ")


def test_an_answer_can_be_stopped(visit: Visit, server: Server) -> None:
    """Stop ends an answer, and the history says that it was cancelled."""
    visitor = visit()
    page = visitor.page
    visitor.fill_in("stop me", model=SLOW)
    visitor.field("max_tokens").locator("input").fill("2000")
    page.get_by_role("button", name="Try It!").click()
    expect(page.locator("#view-text")).to_contain_text("stop me", timeout=ANSWERED_MS)
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.locator("#progress")).to_have_text("Stopped.")
    page.goto("/requests?outcome=cancelled")
    expect(visitor.row(SLOW).first).to_contain_text("499")


def test_a_refusal_is_shown(visit: Visit) -> None:
    """A value out of range is marked, may be sent all the same, and what the server says of it is shown."""
    visitor = visit()
    visitor.fill_in("hot")
    temperature = visitor.field("temperature")
    temperature.locator("input").fill("3")
    expect(temperature.locator(".field-error")).to_have_text("Above 2: the server will refuse it.")
    answer = visitor.try_it()
    expect(answer).to_contain_text("temperature must be a number from 0 to 2, not 3")
    assert visitor.figure("status") == "400"


def test_messages_can_be_added(visit: Visit) -> None:
    """Add gives another message with a role of its own; all of them are sent, in their order."""
    visitor = visit()
    visitor.fill_in("last words", model=ECHO)
    messages = visitor.field("messages")
    messages.get_by_role("button", name="Add a message").click()
    messages.get_by_role("group", name="Message 2").get_by_label("Role").select_option("assistant")
    messages.get_by_role("group", name="Message 2").get_by_label("Content", exact=True).fill("quite")
    messages.get_by_role("button", name="Add a message").click()
    messages.get_by_role("group", name="Message 3").get_by_label("Content", exact=True).fill("first things")
    sample = visitor.page.locator("#sample")
    expect(sample).to_contain_text('"role": "assistant"')
    expect(visitor.try_it()).to_contain_text("first things first things")
    messages.get_by_role("button", name="Remove message 2").click()
    expect(sample).not_to_contain_text('"role": "assistant"')


def test_samples_run_as_they_are(visit: Visit, server: Server) -> None:
    """The programs for a shell and for Python make the request that is filled in; the others say the same."""
    visitor = visit()
    page = visitor.page
    visitor.fill_in('it\'s a "sample" \\ of all')
    visitor.field("seed").locator("input").fill("9007199254740993")
    visitor.field("repetition_penalty").locator("input").fill("0.5")
    visitor.field("stop").get_by_role("button").click()
    visitor.field("stop").locator("input").fill("\\n\\n")
    page.get_by_label("X-OpenAI-Api-Key").fill("sk-theirs")
    commands = {"shell": ["bash", "-c"], "python": [sys.executable, "-c"]}
    environment = os.environ | {
        "TRUNKLINE_KEY": ADMIN_KEY,
        "OPENAI_API_KEY": "sk-theirs",
        "NO_PROXY": "127.0.0.1",
    }
    for language in ("shell", "python", "node", "konko"):
        page.get_by_label("Language").select_option(language)
        sample = page.locator("#sample").inner_text()
        assert "9007199254740993" in sample
        assert "repetition_penalty" in sample
        assert "X-OpenAI-Api-Key" in sample or "openai_api_key" in sample
        assert "sk-theirs" not in sample
        assert server.url in sample
        if language in commands:
            done = subprocess.run(
                [*commands[language], sample],
                env=environment,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            assert ("[DONE]" if language == "shell" else 'it\'s a "sample" \\ of all') in done.stdout
            assert "error" not in done.stdout


# ---- the other pages ----------------------------------------------------------------------------------


def test_two_models_answer_side_by_side(visit: Visit) -> None:
    """The playground asks two models at once, each going on with what it said itself; the last question can
    be asked again, and everything cleared."""
    visitor = visit()
    page = visitor.page
    page.goto(f"/playground?model={ECHO}")
    page.get_by_role("button", name="Compare two models").click()
    expect(page.get_by_role("combobox", name="Model").nth(1)).to_have_value(SLOW)
    page.get_by_label("Maximum tokens").fill("6")
    page.get_by_role("textbox", name="Your message").fill("red blue")
    page.keyboard.press("Enter")
    send = page.get_by_role("button", name="Send")
    for number in (1, 2):
        chat = page.get_by_role("region", name=f"Chat {number}")
        expect(chat.locator(".turn.assistant .turn-text")).to_have_text(
            "red blue red blue red blue", timeout=ANSWERED_MS
        )
        expect(chat.locator("[data-figures]")).to_contain_text("6 tokens")
    expect(send).to_be_enabled()
    visitor.picture("playground-two")
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".turn.assistant")).to_have_count(2)
    expect(send).to_be_enabled(timeout=ANSWERED_MS)
    page.get_by_role("button", name="Clear").click()
    expect(page.locator(".turn")).to_have_count(0)


def test_the_history_is_live(visit: Visit, server: Server) -> None:
    """A request that comes while somebody looks at the history appears by itself, unless the page is paused;
    what a client says of itself is text and nothing else."""
    visitor = visit()
    page = visitor.page
    page.goto("/requests")
    hostile = "<img src=x onerror=alert(1)> \"'&amp;"
    said = {"authorization": f"Bearer {ADMIN_KEY}", "user-agent": hostile}
    body = {"model": ECHO, "prompt": "hello", "max_tokens": 3}
    httpx.post(f"{server.url}/v1/completions", json=body, headers=said, trust_env=False).raise_for_status()
    expect(visitor.row(hostile)).to_have_count(1)
    assert page.locator("#rows img").count() == 0
    page.get_by_role("button", name="Live").click()
    expect(page.get_by_role("button", name="Paused")).to_be_visible()
    page.get_by_label("Model").select_option(SLOW)
    expect(page).to_have_url(re.compile(f"model={SLOW}"))
    expect(visitor.row(hostile)).to_have_count(0)
    page.go_back()
    expect(visitor.row(hostile)).to_have_count(1)


def test_pages_of_the_history_follow_each_other(visit: Visit, server: Server) -> None:
    """Older leads to what came before, and Newest back."""
    visitor = visit()
    page = visitor.page
    with http(server) as client:
        for _ in range(60):
            body = {"model": ECHO, "prompt": "hello", "max_tokens": 1}
            client.post("/v1/completions", json=body, headers={"authorization": f"Bearer {ADMIN_KEY}"})
    page.goto("/requests")
    expect(page.locator("#rows tr")).to_have_count(50)
    newest = page.locator("#rows tr").first.get_attribute("data-id")
    page.get_by_role("link", name="Older").click()
    expect(page).to_have_url(re.compile("before="))
    expect(page.locator("#rows tr").first).to_be_visible()
    assert page.locator(f'#rows tr[data-id="{newest}"]').count() == 0
    page.get_by_role("link", name="Newest").click()
    expect(page.locator(f'#rows tr[data-id="{newest}"]')).to_have_count(1)


def test_a_key_gets_models_and_limits(visit: Visit, server: Server) -> None:
    """An admin bounds a key to models and limits, and sees them in the list as the API has them."""
    visitor = visit()
    page = visitor.page
    visitor.create_key("bounded")
    page.get_by_role("button", name="Change bounded").click()
    page.get_by_label("Only these").check()
    page.get_by_label(ECHO, exact=True).check()
    page.locator("#limits-overall").get_by_label("Dollars per month").fill("25.125")
    page.get_by_label("Add limits for one model").select_option(ECHO)
    page.get_by_role("group", name=f"Limits for {ECHO}").get_by_label("Tokens per minute").fill("100000")
    page.get_by_role("button", name="Save").click()
    expect(visitor.row("bounded")).to_contain_text("$25.125/month")
    expect(visitor.row("bounded")).to_contain_text(f"{ECHO}: 100,000 tokens/min")
    (key,) = [one for one in api(server, "/api/keys") if one["name"] == "bounded"]
    assert key["models"] == [ECHO]


def test_an_account_gets_limits(visit: Visit, server: Server) -> None:
    """An admin says what all keys of an account may use together, when it is made or later, of its own too;
    the list has it as the API does, and the account's holder is told of it."""
    admin, member = visit(), visit(logged_in=False)
    page = admin.page
    page.goto("/people")
    page.get_by_role("button", name="Create an account").click()
    page.get_by_label("Name").fill("grace")
    page.locator("#limits-overall").get_by_label("Requests per minute").fill("6000")
    page.get_by_role("button", name="Create", exact=True).click()
    password = admin.take_down("The password")
    expect(admin.row("grace")).to_contain_text("6,000 requests/min")

    page.get_by_role("button", name="Limits: grace").click()
    overall = page.locator("#limits-overall")
    expect(overall.get_by_label("Requests per minute")).to_have_value("6000")
    overall.get_by_label("Dollars per month").fill("25.000000001")
    page.get_by_label("Add limits for one model").select_option(SLOW)
    page.get_by_label("Add limits for one model").select_option(ECHO)
    page.get_by_role("group", name=f"Limits for {ECHO}").get_by_label("Tokens per minute").fill("100000")
    page.get_by_role("button", name="Save").click()
    words = ("6,000 requests/min", "$25.000000001/month", f"{ECHO}: 100,000 tokens/min")
    for word in words:
        expect(admin.row("grace")).to_contain_text(word)
    (account,) = [one for one in api(server, "/api/accounts") if one["name"] == "grace"]
    limits = account["limits"]
    assert isinstance(limits, dict)
    assert limits["overall"]["dollars_per_month"] == "25.000000001"
    assert list(limits["models"]) == [ECHO]  # the other's group was left empty
    expect(page.get_by_role("button", name="Limits: admin")).to_be_visible()

    member.log_in("grace", password)
    for path in ("/keys", "/account"):
        member.page.goto(path)
        expect(member.page.locator("#together")).to_have_text(f"All your keys together: {', '.join(words)}")


def test_people_come_and_go(visit: Visit) -> None:
    """An admin makes an account, whose password is shown once; its holder sees what is its own and nothing of
    other people, changes the password, and is out as soon as the account is disabled."""
    admin, member = visit(), visit(logged_in=False)
    admin.page.goto("/people")
    admin.page.get_by_role("button", name="Create an account").click()
    admin.page.get_by_label("Name").fill("ada")
    admin.page.get_by_role("button", name="Create", exact=True).click()
    password = admin.take_down("The password")
    expect(admin.row("ada")).to_contain_text("member")

    member.log_in("ada", password)
    _sees_only_its_own(member)
    _changes_its_password(member, password)

    admin.page.get_by_role("button", name="Disable: ada").click()
    admin.page.get_by_role("button", name="Disable", exact=True).click()
    expect(admin.row("ada")).to_contain_text("disabled")
    member.page.goto("/keys")
    expect(member.page).to_have_url(re.compile("/login"))


def _sees_only_its_own(member: Visitor) -> None:
    assert member.page.get_by_role("link", name="People").count() == 0
    member.page.goto("/requests")
    expect(member.page.locator("#state")).to_contain_text("No requests yet")
    member.picture("requests-none")
    answer = member.page.goto("/people")
    assert answer is not None
    assert answer.status == 403


def _changes_its_password(member: Visitor, password: str) -> None:
    page = member.page
    page.goto("/account")
    page.get_by_label("Password now").fill(password)
    page.get_by_label("New password", exact=True).fill(MEMBERS_PASSWORD)
    page.get_by_label("New password again").fill(MEMBERS_PASSWORD)
    page.get_by_role("button", name="Change it").click()
    expect(page).to_have_url(re.compile("/login"), timeout=10_000)
    member.log_in("ada", MEMBERS_PASSWORD)


def test_models_are_found(visit: Visit) -> None:
    """Each model has a card with its state, price and how to prompt it; a word finds those that have it."""
    visitor = visit()
    page = visitor.page
    page.goto("/models")
    card = page.get_by_role("article", name=ECHO, exact=True)
    for text in ("ready", "$0.15 / 1M prompt tokens", "Apache-2.0", "Org/Echo-7B:free"):
        expect(card).to_contain_text(text)
    page.get_by_label("Find").fill("says again")
    expect(page.get_by_role("article")).to_have_count(1)
    card.get_by_role("link", name="Talk to it").click()
    expect(page.get_by_role("combobox", name="Model")).to_have_value(ECHO)


# ---- how it looks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_every_page_is_open_to_everyone(visit: Visit, width: int, scheme: str) -> None:
    """On a wide screen and on a phone, light and dark: no page has a serious fault in the eyes of axe-core or
    is wider than its window, and the browser complains of nothing. How each looks is kept."""
    visitor = visit(width, scheme, logged_in=False)
    visitor.page.goto("/login")
    faults = _looked_at(visitor, f"login-{width}-{scheme}")
    visitor.log_in()
    visitor.fill_in("for the plot")
    visitor.try_it()
    faults += _looked_at(visitor, f"reference-answered-{width}-{scheme}")
    for name, (path, ready) in READY.items():
        visitor.page.goto(path)
        expect(visitor.page.locator(ready).first).to_be_visible()
        faults += _looked_at(visitor, f"{name}-{width}-{scheme}")
    visitor.page.goto("/keys")
    visitor.page.get_by_role("button", name="Create a key").click()
    faults += _looked_at(visitor, f"keys-new-{width}-{scheme}")
    visitor.page.goto("/people")
    visitor.page.get_by_role("button", name="Limits: admin").click()
    visitor.page.get_by_label("Add limits for one model").select_option(ECHO)
    faults += _looked_at(visitor, f"people-limits-{width}-{scheme}")
    assert faults == []


def _looked_at(visitor: Visitor, name: str) -> list[object]:
    """What is wrong with the page as it is, which is kept under this name."""
    visitor.picture(name)
    faults: list[object] = [(name, barrier) for barrier in visitor.barriers()]
    return [*faults, (name, "too wide")] if visitor.overflows() else faults


def test_the_theme_can_be_chosen(visit: Visit) -> None:
    """The theme follows the system until somebody chooses one, which then holds on every page."""
    visitor = visit(scheme="light")
    page = visitor.page
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    button = page.get_by_role("button", name="Theme")
    button.click()
    button.click()
    expect(button).to_have_text("Theme: dark")
    assert page.evaluate(ground) != light
    page.goto("/models")
    assert page.evaluate(ground) != light
    expect(page.get_by_role("button", name="Theme")).to_have_text("Theme: dark")
