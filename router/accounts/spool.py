"""Rows of the ledger that wait in a local file for the store to come back.

A row is a length, big-endian in 4 bytes, and so many bytes of MessagePack. What a process had written when it
died is there afterwards; a last row that is not whole was never promised to anybody. The file is locked for
as long as its router lives, so that another one knows which files are nobody's any more.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import structlog

from router.accounts.row import Row

log = structlog.get_logger(__name__)

_LENGTH = struct.Struct(">I")
_SUFFIX = ".spool"

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Row).decode


class Spool:
    """Rows, first in, first out. A file is made when the first one comes, and gone when the last has left."""

    def __init__(self, folder: Path, name: str, capacity: int) -> None:
        """`capacity`: bytes above which `full` says so; a row is taken nevertheless."""
        self.folder = folder
        self._name = name
        self._capacity = capacity
        self._made = 0
        """Files that there were."""
        self._path: Path | None = None
        self._file: int | None = None
        self._size = 0
        self._read = 0
        self._taken = 0
        """Up to where rows have left for the store, and up to where `first` has given them."""

    @property
    def empty(self) -> bool:
        """Whether no row waits."""
        return self._read == self._size

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the rows that wait."""
        return self._size - self._read

    @property
    def full(self) -> bool:
        """Whether new requests have to be refused, as their rows would have no place."""
        return self.waiting_bytes >= self._capacity

    def put(self, row: Row) -> None:
        """Add a row; it outlives this process from now on. Raises OSError where the disk does not take it."""
        data = _encode(row)
        self._size += _write(self._made_file(), _LENGTH.pack(len(data)) + data, self._size)

    def first(self, count: int) -> list[Row]:
        """The first rows, at most so many. They stay until `forget` is told of them. There may be none though
        the spool is not empty: what cannot be read is passed over."""
        rows: list[Row] = []
        self._taken = self._read
        if self._file is None:
            return rows
        for data, end in _records(self._file, self._read, self._size):
            self._taken = end
            try:
                rows.append(_decode(data))
            except msgspec.MsgspecError as error:
                log.warning("a row cannot be read", spool=str(self._path), error=str(error))
            if len(rows) == count:
                return rows
        self._size = self._taken  # what a dead router has left behind that is no whole row
        return rows

    def forget(self) -> None:
        """What `first` gave last is in the store."""
        self._read = self._taken
        if self.empty:
            self.close()

    def close(self) -> None:
        """Leave the file, and remove it where no row waits in it; others will find those that do. A row that
        comes afterwards comes into a new file."""
        file, path, empty, read = self._file, self._path, self.empty, self._read
        self._file = self._path = None
        self._size = self._read = self._taken = 0
        if file is None or path is None:
            return
        if empty:
            path.unlink(missing_ok=True)
        elif read:
            with suppress(OSError):  # what is in the store already may be brought to it again
                _shorten(path, read)
        os.close(file)

    def _made_file(self) -> int:
        while self._file is None:
            self._made += 1
            self._path = self.folder / f"{self._name}-{self._made:06}{_SUFFIX}"
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Another router that looks for those of dead ones may just be the first to lock it, and removes
            # it then, as it is empty: the next one will do.
            with suppress(FileExistsError):
                self._file = _open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        return self._file

    @classmethod
    def adopt(cls, path: Path) -> Spool | None:
        """A file that a dead router has left; None where its router lives, or another has adopted it."""
        spool = cls(path.parent, path.name.removesuffix(_SUFFIX), capacity=0)
        try:
            spool._file = _open(path, os.O_RDWR)
        except OSError:
            return None
        if spool._file is None:
            return None
        spool._path, spool._size = path, os.fstat(spool._file).st_size
        return spool


def left_behind(folder: Path) -> Iterator[Spool]:
    """The spools of routers that are dead."""
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        if spool := Spool.adopt(path):
            yield spool


def _open(path: Path, flags: int) -> int | None:
    """The file, ours alone; None where it is another's, or has been removed meanwhile. Raises OSError."""
    file = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file), path.stat()):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(file)
        raise
    os.close(file)
    return None


def _write(file: int, data: bytes, place: int) -> int:
    """Write at the end of a file, whole or not at all; how many bytes these are. Raises OSError."""
    written = 0
    try:
        written = os.pwrite(file, data, place)
    finally:
        if written < len(data):
            os.ftruncate(file, place)
    if written < len(data):
        raise OSError("the disk is full")
    return written


def _records(file: int, start: int, end: int) -> Iterator[tuple[bytes, int]]:
    """Each whole row between two places, and where it ends."""
    while start + _LENGTH.size <= end:
        (length,) = _LENGTH.unpack(os.pread(file, _LENGTH.size, start))
        start += _LENGTH.size + length
        if start > end:
            return
        yield os.pread(file, length, start - length), start


def _shorten(path: Path, start: int) -> None:
    """Drop the beginning of a file."""
    fresh = path.with_suffix(".fresh")
    with path.open("rb") as old, open(fresh, "wb", opener=_private) as new:
        old.seek(start)
        shutil.copyfileobj(old, new)
    fresh.replace(path)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
