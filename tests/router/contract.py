"""An OpenAPI document that answers can be held to."""

from __future__ import annotations

import copy
import json
from typing import Any

import httpx
from jsonschema import Draft202012Validator

Json = dict[str, Any]


class Contract:
    """A document that answers can be held to, more strictly than it has to be read: what it does not name
    must not be there."""

    def __init__(self, document: Json) -> None:
        self.document = document
        self._closed = copy.deepcopy(document)
        for schema in self._closed["components"]["schemas"].values():
            if "properties" in schema:
                schema["additionalProperties"] = False

    def schema(self, name: str) -> Json:
        """One of the schemas."""
        schema: Json = self.document["components"]["schemas"][name]
        return schema

    def body(self, path: str) -> Json:
        """The schema of a request body."""
        content = self.document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        return self.follow(content["schema"])

    def follow(self, node: Json) -> Json:
        """What a reference stands for."""
        if "$ref" not in node:
            return node
        found = self.document
        for step in node["$ref"].removeprefix("#/").split("/"):
            found = found[step]
        return found

    def fits(self, value: Any, schema: Json) -> None:
        """Fails if a value is not what a schema says, or has more."""
        Draft202012Validator(self._closed | schema).validate(value)

    def holds(self, path: str, response: httpx.Response) -> None:
        """Fails if a response is none that the document has."""
        methods = self.document["paths"][path]
        responses = methods[response.request.method.lower()]["responses"]
        promised = self.follow(responses[str(response.status_code)])
        for name, reference in promised["headers"].items():
            header = self.follow(reference)
            if header.get("required") or name in response.headers:
                value = response.headers[name]
                self.fits(int(value) if header["schema"]["type"] == "integer" else value, header["schema"])
        media = response.headers["content-type"].partition(";")[0]
        schema = promised["content"][media]["schema"]
        if media == "text/event-stream":
            self.streams(response.text, schema)
        else:
            self.fits(response.json() if media == "application/json" else response.text, schema)

    def streams(self, text: str, schema: Json) -> None:
        """Fails if a stream's events are not what a schema says."""
        *events, rest = text.split("\n\n")
        assert not rest
        data = schema["properties"]["data"]["anyOf"]
        for event in events:
            line = event.removeprefix("data: ")
            assert event != line
            if line == data[1]["const"]:
                assert event is events[-1]
            else:
                self.fits(json.loads(line), data[0]["contentSchema"])
