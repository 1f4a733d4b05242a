"""Models by name: what the router knows of each, and where its requests go."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from router import answers
from router.accounts.settings import Price
from router.admission import Admission
from router.backend import Backend
from router.errors import ModelNotFound
from router.metrics import ModelMetrics
from router.settings import ModelSettings

FREE = Price()


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """One model of the deployment, with everything a request for it needs."""

    settings: ModelSettings
    backend: Backend
    admission: Admission
    metrics: ModelMetrics


class Catalog:
    """The models, found by any of their names, in any case."""

    def __init__(self, models: Iterable[Model], created: int) -> None:
        """`created` is when the deployment was, in Unix seconds: every router's cards say the same."""
        self.models = tuple(models)
        self._created = created
        self._names: dict[str, tuple[str, Model]] = {}
        for model in self.models:
            for name in (model.settings.name, *model.settings.aliases):
                self._names[name.lower()] = (name, model)

    def find(self, name: str) -> tuple[str, Model]:
        """The model of that name, and the name in the catalog's case. Raises ModelNotFound."""
        found = self._names.get(name.lower())
        if found is None:
            raise ModelNotFound(name)
        return found

    def entry(self, name: str, only: frozenset[str] | None = None) -> answers.Model:
        """What `GET /v1/models/{name}` answers to a caller of `only` these models. Raises ModelNotFound."""
        name, model = self.find(name)
        if only is not None and model.settings.name not in only:
            raise ModelNotFound(name)
        return self._entry(name, model)

    def entries(self, only: frozenset[str] | None = None) -> list[answers.Model]:
        """What `GET /v1/models` answers; each alias is a model of its own."""
        return [
            self._entry(name, model)
            for name, model in self._names.values()
            if only is None or model.settings.name in only
        ]

    def _entry(self, name: str, model: Model) -> answers.Model:
        card = model.settings.card.model_dump()
        price = model.settings.price
        if price != FREE:
            card["price"] = answers.TokenPrice(prompt=f"{price.prompt:f}", completion=f"{price.completion:f}")
            card["public_endpoint_pricing"] = card["public_endpoint_pricing"] or str(price)
        return answers.Model(
            id=name,
            name=name,
            created=self._created,
            owned_by=model.settings.card.creator or "trunkline",
            state=model.backend.state,
            kind=model.backend.kind,
            **card | {"max_context_length": model.backend.context_length or card["max_context_length"]},
        )
