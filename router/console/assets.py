"""The console's own files: what its pages load beside themselves."""

from __future__ import annotations

from functools import cached_property
from hashlib import sha256
from pathlib import Path

MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


class Assets:
    """The files of a folder, under addresses that change whenever one of them does."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def files(self) -> dict[str, bytes]:
        """Every file, by its name; read when the first is asked for."""
        return {
            path.name: path.read_bytes()
            for path in sorted(self._folder.iterdir())
            if path.suffix in MEDIA_TYPES
        }

    @cached_property
    def version(self) -> str:
        """16 hexadecimal digits that stand for what is in all of the files: they refer to each other."""
        digest = sha256()
        for name, data in self.files.items():
            digest.update(b"%b %d " % (name.encode(), len(data)))
            digest.update(data)
        return digest.hexdigest()[:16]

    def url(self, name: str) -> str:
        """Where a file is. Raises KeyError where there is none of that name."""
        if name not in self.files:
            raise KeyError(name)
        return f"/static/{self.version}/{name}"
