from __future__ import annotations

import os
import resource
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from router.accounts.row import Row
from router.accounts.spool import Spool, left_behind

CAPACITY = 2000


def row(number: int, text: str | None = None) -> Row:
    """A row that is told from all others."""
    return Row(f"{number:032x}", "r" * 32, "a" * 32, "k" * 32, f"row-{number}", "/v1/completions", asked=text)


def framed(one: Row) -> bytes:
    """A row as it stands in a file."""
    data = msgspec.msgpack.encode(one)
    return len(data).to_bytes(4, "big") + data


def crash(spool: Spool, torn: bytes = b"") -> None:
    """What is left of a spool whose process is killed, perhaps in the middle of a row."""
    if spool._file is not None:
        os.pwrite(spool._file, torn, spool._size)
        os.close(spool._file)
        spool._file = None


def emptied(spool: Spool) -> list[Row]:
    """All rows of a spool, brought to the store and forgotten."""
    found = []
    while not spool.empty:
        found += spool.first(3)
        spool.forget()
    return found


def left(folder: Path) -> list[Row]:
    """What another router finds of those that are dead."""
    found = []
    for spool in left_behind(folder):
        found += emptied(spool)
        spool.close()
    return found


class Rows(RuleBasedStateMachine):
    """Rows come and go, and the router ends or is killed, at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.made = 0
        self.left: list[Row] = []
        """What other routers have to find."""
        self.routers = 0
        self.begin()

    def begin(self) -> None:
        """A router begins."""
        self.routers += 1
        self.spool = Spool(self.folder, f"router-{self.routers:06}", CAPACITY)
        self.in_file: list[Row] = []
        self.forgotten = 0
        """So many of them."""
        self.given = 0
        """And so many more that `first` gave last."""

    @property
    def waiting(self) -> list[Row]:
        return self.in_file[self.forgotten :]

    @rule(text=st.none() | st.text(max_size=200))
    def put(self, text: str | None) -> None:
        """A row comes."""
        self.made += 1
        self.spool.put(row(self.made, text))
        self.in_file.append(row(self.made, text))

    @rule(count=st.integers(1, 5))
    def first(self, count: int) -> None:
        """The oldest are given, in their order, and stay."""
        assert self.spool.first(count) == self.waiting[:count]
        self.given = len(self.waiting[:count])

    @rule()
    def forget(self) -> None:
        """Those that were given are in the store."""
        self.spool.forget()
        self.forgotten += self.given
        self.given = 0
        if not self.waiting:
            self.in_file, self.forgotten = [], 0

    @rule(goes_on=st.booleans())
    def close(self, goes_on: bool) -> None:
        """The router leaves what it has to others, and may put one more row."""
        self.spool.close()
        self.left += self.waiting
        if goes_on:
            self.in_file, self.forgotten, self.given = [], 0, 0
        else:
            self.begin()

    @rule(torn=st.integers(0, 60))
    def die(self, torn: int) -> None:
        """The router is killed, perhaps in the middle of a row. What it had brought to the store and not yet
        dropped comes again."""
        crash(self.spool, framed(row(self.made + 1))[:torn])
        self.left += self.in_file
        self.begin()

    @rule()
    def look(self) -> None:
        """Another router finds everything that dead ones have left, and nothing of a living one's."""
        assert left(self.folder) == self.left
        self.left = []

    @invariant()
    def says_what_it_has(self) -> None:
        """Empty and full are what they say, and where no row waits there is no file."""
        assert self.spool.empty == (not self.waiting)
        assert self.spool.full == (sum(len(framed(each)) for each in self.waiting) >= CAPACITY)
        own = list(self.folder.glob(f"router-{self.routers:06}-*"))
        assert len(own) >= bool(self.waiting)

    def teardown(self) -> None:
        """In the end no row is lost, and no file is left."""
        self.die(0)
        self.look()
        assert list(self.folder.iterdir()) == []
        shutil.rmtree(self.folder)


TestRows = Rows.TestCase
TestRows.settings = settings(max_examples=150, stateful_step_count=40)


def test_only_one_router_has_what_a_dead_one_left(tmp_path: Path) -> None:
    """While one router works on a dead one's rows no other gets them, and afterwards there are none."""
    dead = Spool(tmp_path, "dead", CAPACITY)
    dead.put(row(1))
    assert list(left_behind(tmp_path)) == []
    crash(dead)
    (adopted,) = left_behind(tmp_path)
    assert list(left_behind(tmp_path)) == []
    assert adopted.first(9) == [row(1)]
    adopted.forget()
    adopted.close()
    assert list(tmp_path.iterdir()) == []


def test_what_was_adopted_and_not_stored_waits_for_the_next(tmp_path: Path) -> None:
    """A router that loses the store while it works on a dead one's rows leaves those that are not stored."""
    dead = Spool(tmp_path, "dead", CAPACITY)
    for number in range(5):
        dead.put(row(number))
    crash(dead)
    (adopted,) = left_behind(tmp_path)
    assert adopted.first(2) == [row(0), row(1)]
    adopted.forget()
    assert adopted.first(2) == [row(2), row(3)]
    adopted.close()
    assert left(tmp_path) == [row(2), row(3), row(4)]


def test_looking_for_the_dead_costs_a_living_router_no_row(tmp_path: Path) -> None:
    """However often others look just while a router makes its file, every row of it is kept."""
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            for spool in left_behind(tmp_path):
                assert spool.first(1) == []
                spool.forget()
                spool.close()

    others = [threading.Thread(target=look) for _ in range(2)]
    for other in others:
        other.start()
    try:
        spool = Spool(tmp_path, "router", CAPACITY)
        for number in range(500):
            spool.put(row(number))
            assert spool.first(1) == [row(number)]
            spool.forget()
    finally:
        over.set()
        for other in others:
            other.join()
    assert list(tmp_path.iterdir()) == []


def test_a_row_that_cannot_be_read_holds_up_no_other(tmp_path: Path) -> None:
    """What is no row is passed over, wherever it stands, and the file goes when the others have gone."""
    spool = Spool(tmp_path, "router", CAPACITY)
    for number in range(3):
        spool.put(row(number))
    assert spool._file is not None
    for number in (1, 2):
        os.pwrite(spool._file, b"\xc1", number * len(framed(row(0))) + 4)
    assert emptied(spool) == [row(0)]
    assert list(tmp_path.iterdir()) == []


def test_a_length_that_is_nonsense_asks_for_no_memory(tmp_path: Path) -> None:
    """A torn length may say four gigabytes: what is after it is nobody's, and nothing is read for it."""
    spool = Spool(tmp_path, "router", CAPACITY)
    spool.put(row(1))
    crash(spool, b"\xff\xff\xff\xff and so on")
    assert left(tmp_path) == [row(1)]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """In the block no file takes more bytes; of a write that does not fit it takes the beginning."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 1, 50])
def test_a_full_disk_leaves_no_half_row(tmp_path: Path, room: int) -> None:
    """A row for which there is no room is refused, and those before and after it are whole."""
    spool = Spool(tmp_path, "router", CAPACITY)
    spool.put(row(1))
    with files_of_at_most(len(framed(row(1))) + room), pytest.raises(OSError, match=r"full|too large"):
        spool.put(row(2, "a longer one than the next"))
    spool.put(row(3))
    crash(spool)
    assert left(tmp_path) == [row(1), row(3)]


def test_only_its_owner_reads_a_spool(tmp_path: Path) -> None:
    """Rows may have texts in them: neither folder nor files are for anybody else, shortened or not."""
    spool = Spool(tmp_path / "spools", "router", CAPACITY)
    for number in range(3):
        spool.put(row(number))
    spool.first(1)
    spool.forget()

    def modes() -> list[int]:
        paths = [tmp_path / "spools", *(tmp_path / "spools").iterdir()]
        return [stat.S_IMODE(path.stat().st_mode) for path in paths]

    assert modes() == [0o700, 0o600]
    spool.close()
    assert modes() == [0o700, 0o600]
