"""The forms of the reference: everything that the OpenAPI document says of a parameter."""

from __future__ import annotations

import inspect
from typing import Any, get_args

import pytest
from openai.resources.chat.completions import Completions as ChatCompletions
from openai.resources.completions import Completions as TextCompletions

from router.console.fields import BEYOND_SDK, FIRST, Form, Widget, forms
from router.openapi import document
from router.settings import HostedModel

MODELS = [HostedModel(name="one", application="m"), HostedModel(name="two", application="m")]
DOCUMENT = document(MODELS)
FORMS = forms(DOCUMENT)
SCHEMAS = {"/v1/chat/completions": "ChatRequest", "/v1/completions": "TextRequest"}

form = pytest.mark.parametrize("form", FORMS.values(), ids=lambda form: form.path)


def properties(form: Form) -> dict[str, Any]:
    """The parameters that the document has for a form."""
    found: dict[str, Any] = DOCUMENT["components"]["schemas"][SCHEMAS[form.path]]["properties"]
    return found


@form
def test_a_form_has_every_parameter(form: Form) -> None:
    """Each parameter of the document is on the form once, its description with it; an object of plain fields
    is there as these."""
    names = [one.path.partition(".")[0] for one in form.parameters]
    assert sorted(names) == sorted(properties(form))
    for one in form.parameters:
        name, _, inner = one.path.partition(".")
        if not inner:
            assert one.description == properties(form)[name]["description"]
        assert one.widget in get_args(Widget)
        assert one.kind


@form
def test_a_form_has_every_range_and_default(form: Form) -> None:
    """A number's bounds are those of the document, and so is what holds where nothing is filled in."""
    for one in form.parameters:
        if one.widget not in {"number", "integer"}:
            continue
        described = properties(form)[one.path]
        (bounds,) = [leaf for leaf in described["anyOf"] if leaf["type"] != "null"]
        assert (one.least, one.most) == (bounds.get("minimum"), bounds.get("maximum"))
        for bound in (one.least, one.most):
            assert bound is None or str(bound) in one.kind
        assert (None if one.default is None else float(one.default)) == described["default"]


def test_the_parameters_that_people_look_for_come_first() -> None:
    """Those of Konko's page come first, in an order of their own."""
    chat = [one for one in FORMS["/v1/chat/completions"].parameters if one.common]
    assert [one.path.partition(".")[0] for one in chat] == [name for name in FIRST if name != "prompt"]
    model, messages, max_tokens, *_ = chat
    assert (model.choices, model.required) == (("one", "two"), True)
    assert (messages.widget, messages.required) == ("messages", True)
    assert (max_tokens.widget, max_tokens.default) == ("integer", "24")


def test_messages_have_the_fields_of_their_roles() -> None:
    """Each role can be chosen, and a message has the fields that its role has."""
    chat = FORMS["/v1/chat/completions"]
    assert set(chat.roles) == {"system", "developer", "user", "assistant", "tool"}
    extras = {extra.path: (set(roles), extra.required) for extra, roles in chat.extras}
    assert extras["name"] == (set(chat.roles), False)
    assert extras["tool_calls"] == ({"assistant"}, False)
    assert extras["tool_call_id"] == ({"tool"}, True)
    assert FORMS["/v1/completions"].roles == ()


@form
def test_examples_are_there(form: Form) -> None:
    """There are requests to fill in, one of them streamed, and answers to look at: of each status that the
    document has for the path."""
    assert any(request.get("stream") for _, request in form.examples)
    shown = {answer["status"] for answer in form.answers}
    assert shown == set(DOCUMENT["paths"][form.path]["post"]["responses"])
    assert {answer["media"] for answer in form.answers} == {"application/json", "text/event-stream"}


@pytest.mark.parametrize(
    ("path", "method"),
    [("/v1/chat/completions", ChatCompletions.create), ("/v1/completions", TextCompletions.create)],
)
def test_samples_know_what_the_sdk_takes(path: str, method: Any) -> None:
    """A parameter goes into extra_body exactly where OpenAI's SDK has no argument of that name."""
    arguments = set(inspect.signature(method).parameters)
    names = {one.path.partition(".")[0] for one in FORMS[path].parameters}
    assert names - arguments == names & BEYOND_SDK
