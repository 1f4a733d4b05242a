"""The router against requests that are made from its OpenAPI document, good and bad, by thousands."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.end_to_end.conftest import Report
from tests.end_to_end.environments import interpreter
from tests.harness import Deployment, deployed, echo_engine, served

HERE = Path(__file__).parent

# Every check is on but for one. A schema cannot say what fields demand of each other: that stream_options
# needs a stream, that min_tokens is at most max_tokens, that a prompt fits the context. So not all that fits
# the schema of a completion is answered. What is, parameter by parameter, tests/router/test_openapi.py shows.
CONFIG = """
continue-on-failure = true
max-stream-events = 20000 # all of a stream
request-timeout = 60
suppress-health-check = ["too_slow"] # that says more of the machine
generation.database = "none"
generation.max-examples = {completions}

[dictionaries.models]
values = ["echo", "ECHO", "org/Echo:latest"]

[[operations]]
include-tag = "Completions"
parameters."body.model" = {{ dictionary = "models", probability = 0.9 }} # any other one is a 404
checks.positive_data_acceptance.enabled = false

[[operations]]
exclude-tag = "Completions"
generation.max-examples = {others}

[phases.stateful]
generation.max-examples = {others}
"""


@pytest.fixture(scope="module")
def python() -> Path:
    """The Python of an environment with schemathesis in it."""
    return interpreter(HERE / "schemathesis.txt")


@pytest_asyncio.fixture
async def deployment() -> AsyncIterator[Deployment]:
    """A model that echoes. Its context is short, so that no answer is long."""
    models = served(echo_engine(max_model_len=64), aliases=("org/Echo:latest",))
    async with deployed(models) as one:
        yield one


async def test_the_document_is_openapi(deployment: Deployment, python: Path, tmp_path: Path) -> None:
    """A validator of OpenAPI 3.1 finds nothing wrong with it."""
    path = tmp_path / "openapi.json"
    path.write_bytes((await deployment.http.get("/openapi.json")).content)
    await run(tmp_path, python, "-m", "openapi_spec_validator", "--schema", "3.1", path)


async def test_no_answer_is_outside_the_document(
    deployment: Deployment, python: Path, tmp_path: Path, report: Report
) -> None:
    """Hundreds of requests, always the same: no status of 500 or above, no answer that the document does not
    have, none to a bad request that is not a refusal."""
    options = ("--seed", "1", "--phases", "examples,fuzzing,stateful")
    assert await fuzz(deployment, python, tmp_path, options, completions=100, others=20) >= 300
    say(deployment, report, "requests made from the document")


@pytest.mark.slow
@pytest.mark.timeout(3600)
async def test_no_answer_of_ten_thousand_is_outside_the_document(
    deployment: Deployment, python: Path, tmp_path: Path, report: Report
) -> None:
    """So it is with thousands, other ones each time, and with each end of a range and what is past it."""
    await fuzz(deployment, python, tmp_path, (), completions=5000, others=200)
    assert deployment.metric("trunkline_requests_total") >= 10_000
    say(deployment, report, "requests made from the document, slow run")


async def fuzz(
    deployment: Deployment, python: Path, folder: Path, options: tuple[str, ...], **examples: int
) -> int:
    """Send requests made from the document, and check each answer; how many they were. `examples`: how many
    for each path, as CONFIG says."""
    config, report = folder / "schemathesis.toml", folder / "report.json"
    config.write_text(CONFIG.format(**examples))
    command = (python.with_name("st"), "--no-color", "--config-file", config, "run")
    await run(folder, *command, f"{deployment.url}/openapi.json", "--report-json-path", report, *options)
    summary: dict[str, Any] = json.loads(report.read_text())
    operations = summary["operations"]
    assert summary["complete"]
    assert operations["tested"] == operations["total"]
    assert deployment.metric("trunkline_requests_total", status="500") == 0
    # Without good answers there would be nothing to look at.
    assert deployment.metric("trunkline_requests_total", status="200") > examples["completions"] / 3
    assert deployment.metric("trunkline_time_to_first_token_seconds_count") > examples["completions"] / 20
    generated: int = summary["test_cases"]["generated"]
    return generated


async def run(folder: Path, *command: str | Path) -> None:
    """Run a command in a folder, which it may litter, while the server of this process answers it. Fails with
    all that it has said."""
    process = await asyncio.create_subprocess_exec(
        *command, cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, said.decode()


def say(deployment: Deployment, report: Report, name: str) -> None:
    """Report what became of the requests for tokens."""
    total = deployment.metric("trunkline_requests_total")
    good = deployment.metric("trunkline_requests_total", status="200")
    streams = deployment.metric("trunkline_time_to_first_token_seconds_count")
    report(name, f"{total:.0f} for tokens, {good:.0f} answered, {streams:.0f} of these streamed")
