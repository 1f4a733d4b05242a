"""How refusals are worded where the requests themselves leave a choice untried."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from router.refusals import Refusals

STRICT = ConfigDict(strict=True)


class Cat(BaseModel):
    """One branch of a union."""

    model_config = STRICT

    kind: Literal["cat"]
    size: Literal["small", "large"]


class Dog(BaseModel):
    """Another, with a field of the same name and another type; its tag is the name of a field, too."""

    model_config = STRICT

    kind: Literal["size"]
    size: Annotated[int, Field(ge=1)]


class Stone(BaseModel):
    """What has no kind."""

    model_config = STRICT

    weight: Annotated[float, Field(ge=0, title="a weight in grams")]


class Box(BaseModel):
    """What is read."""

    model_config = STRICT

    pet: Annotated[Cat | Dog, Field(discriminator="kind")] | None = None
    things: list[Stone | Annotated[str, Field(min_length=1)]] = []


REFUSALS = Refusals(Box.model_json_schema())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"pet": {"kind": "cat", "size": 1}}, 'pet.size must be one of "small", "large", not 1'),
        (
            {"pet": {"kind": "size", "size": "small"}},
            'pet.size must be an integer of at least 1, not "small"',
        ),
        ({"pet": {"kind": "size"}}, "pet.size is missing: it must be an integer of at least 1"),
        ({"pet": {"kind": "cow"}}, 'pet.kind must be one of "cat", "size", not "cow"'),
        ({"pet": {}}, 'pet.kind is missing: it must be one of "cat", "size"'),
        ({"pet": 5}, "pet must be an object, not 5"),
        ({"things": 5}, "things must be an array, each item an object or a non-empty string, not 5"),
        ({"things": ["a", ""]}, 'things[1] must be an object or a non-empty string, not ""'),
        ({"things": ["a", {}]}, "things[1].weight is missing: it must be a weight in grams"),
        ({"things": [{"weight": -1}]}, "things[0].weight must be a weight in grams, not -1"),
    ],
)
def test_the_branch_that_was_meant_is_held_against_a_value(value: Any, message: str) -> None:
    """Of alternatives with a tag it is the one that is named, even where fields of several have one name; of
    others it is the one that got furthest. A schema that has words of ours is called by them."""
    with pytest.raises(ValidationError) as caught:
        Box.model_validate(value)
    refusal = REFUSALS.of(caught.value.errors(include_url=False, include_context=False))
    assert refusal.message == message
    assert message.startswith(f"{refusal.param} ")
