"""Ray Serve LLM, run by the Python of its own environment: `python -m benchmarks.peers.ray_application FILE`.

FILE holds JSON: the arguments of `ray.init`, Serve's HTTP options, and what Ray's builder of the application
is given.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ray
from ray import serve


def main(file: Path) -> None:
    """Serve until a signal comes."""
    given = json.loads(file.read_text())
    ray.init(**given["ray"])
    # Imports vLLM, and reads the environment as Serve does.
    from ray.serve.llm import build_openai_app  # noqa: PLC0415

    serve.start(http_options=given["http"])
    serve.run(build_openai_app(given["application"]), blocking=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
