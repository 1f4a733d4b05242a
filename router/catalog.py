"""Models by name: what the router knows of each, and where its requests go."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from router import protocol
from router.admission import Admission
from router.errors import ModelNotFound
from router.metrics import ModelMetrics
from router.replicas import Replicas
from router.settings import HostedModel

State = Literal["ready", "loading", "failed"]


@dataclass(slots=True, eq=False)
class Model:
    """One model of the deployment, with everything a request for it needs."""

    settings: HostedModel
    replicas: Replicas
    admission: Admission
    metrics: ModelMetrics
    failed: bool = False
    """Serve has given up starting it."""

    @property
    def state(self) -> State:
        """Whether a request would be answered now."""
        if self.replicas.open:
            return "ready"
        return "failed" if self.failed else "loading"


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

    def entry(self, name: str) -> protocol.Model:
        """What `GET /v1/models/{name}` answers. Raises ModelNotFound."""
        return self._entry(*self.find(name))

    def entries(self) -> list[protocol.Model]:
        """What `GET /v1/models` answers; each alias is a model of its own."""
        return [self._entry(name, model) for name, model in self._names.values()]

    def _entry(self, name: str, model: Model) -> protocol.Model:
        return protocol.Model(
            id=name,
            name=name,
            created=self._created,
            owned_by=model.settings.card.creator or "trunkline",
            max_context_length=model.replicas.context_length,
            state=model.state,
            kind="hosted",
            **model.settings.card.model_dump(),
        )
