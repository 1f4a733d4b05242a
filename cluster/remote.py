"""What a running server says of itself: the commands that only ask."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections import defaultdict
from http.client import HTTPException
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from cluster import environment
from cluster.table import table

ANSWER_S = 10.0
"""Seconds that the server gets to answer."""

FIGURES = (
    ("in flight", "trunkline_in_flight"),
    ("waiting", "trunkline_waiting"),
    ("running", "trunkline_replica_running"),
    ("kv used", "trunkline_kv_cache_usage_ratio"),
    ("tokens/s", "trunkline_tokens_per_second"),
    ("tokens", "trunkline_generation_tokens_total"),
)
"""What `trunkline status` shows of each model: a title, and the metric that is summed over all processes."""


class NoAnswer(Exception):
    """Nothing that could be understood came from the server."""


def status(url: str) -> int:
    """Show each model's state and the figures that say how busy it is; 0 if every model is ready."""
    states: dict[str, str] = fetch_json(url, "/health", "models")
    figures = samples(fetch(url, "/metrics").decode())
    rows = [("model", "state", *(title for title, _ in FIGURES))]
    for model, state in states.items():
        rows.append((model, state, *(f"{figures[metric, model]:g}" for _, metric in FIGURES)))
    print(table(rows))
    return 0 if all(state == "ready" for state in states.values()) else 1


def models(url: str, *, as_json: bool) -> int:
    """Show the server's models."""
    cards: list[dict[str, Any]] = fetch_json(url, "/v1/models", "data", environment.key())
    if as_json:
        print(json.dumps(cards, indent=2))
        return 0
    rows = [("model", "state", "context", "kind", "description")]
    for card in cards:
        context = card.get("max_context_length") or "-"
        rows.append((card["id"], card["state"], str(context), card["kind"], card.get("description") or ""))
    print(table(rows))
    return 0


def fetch(url: str, path: str, key: str | None = None) -> bytes:
    """What the server answers, also with an error status. Raises NoAnswer."""
    if not url.startswith(("http://", "https://")):
        raise NoAnswer(f"--url must begin with http:// or https://, and {url!r} does not")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        request = urllib.request.Request(url.rstrip("/") + path, headers=headers)  # noqa: S310 - see above
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:  # noqa: S310
            body: bytes = answer.read()
            return body
    except urllib.error.HTTPError as error:
        return error.read()
    except (OSError, ValueError, HTTPException) as error:
        raise NoAnswer(f"nothing answers at {url}: {getattr(error, 'reason', error)}") from None


def fetch_json(url: str, path: str, field: str, key: str | None = None) -> Any:
    """What stands in a field of the server's answer. Raises NoAnswer, also where another server answers."""
    try:
        answer = json.loads(fetch(url, path, key))
        if isinstance(answer, dict) and isinstance(error := answer.get("error"), dict):
            raise NoAnswer(f"{url}{path} says: {error['message']} ({environment.KEY} may hold a key)")
        return answer[field]
    except (ValueError, KeyError, TypeError):
        raise NoAnswer(f"what answers at {url}{path} is not Trunkline") from None


def samples(exposition: str) -> dict[tuple[str, str], float]:
    """The sum over all processes of each (metric, model)."""
    sums: defaultdict[tuple[str, str], float] = defaultdict(float)
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            sums[sample.name, sample.labels.get("model", "")] += sample.value
    return sums
