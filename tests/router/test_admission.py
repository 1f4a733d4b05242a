from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from router.admission import Admission, Slot
from router.errors import InvalidRequest, Overloaded
from serving.drain import LONGEST_RETRY_S
from tests.waiting import soon

CAPACITY = 5
QUEUED = 6
CALLERS = ("ada", "grace", "joan", "")


class Requests(RuleBasedStateMachine):
    """Requests of several callers come, wait, are turned away for others, leave, time out and end in any
    order, and between any two turns of the loop."""

    asked = Bundle("asked")

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.admission = Admission("m", in_flight=CAPACITY, queued=QUEUED)
        self.sizes: list[int] = []
        self.callers: list[str] = []
        self.tasks: list[asyncio.Task[Slot]] = []
        self.closed: set[int] = set()
        self.left: set[int] = set()

    def granted(self) -> list[int]:
        """Requests that have had their slot."""
        return [at for at, task in enumerate(self.tasks) if task.done() and not self.error(task)]

    @staticmethod
    def error(task: asyncio.Task[Slot]) -> bool:
        """Whether a request that is over went without."""
        return task.cancelled() or task.exception() is not None

    @rule(
        target=asked,
        size=st.integers(1, CAPACITY),
        timeout_s=st.sampled_from([0.0, 1e6]),
        caller=st.sampled_from(CALLERS),
    )
    def ask(self, size: int, timeout_s: float, caller: str) -> int:
        """A request for so many slots, which may be unwilling to wait."""
        self.sizes.append(size)
        self.callers.append(caller)
        self.tasks.append(self.loop.create_task(self.admission.admit(size, timeout_s, caller)))
        return len(self.tasks) - 1

    @rule(one=asked)
    def leave(self, one: int) -> None:
        """A client leaves: waiting, it is cancelled; served, its slot is closed."""
        self.left.add(one)
        self.tasks[one].cancel()
        self.close(one)

    @rule(one=asked)
    def end(self, one: int) -> None:
        """A request that has its slot gives it back; it may do so twice."""
        self.close(one)

    def close(self, one: int) -> None:
        task = self.tasks[one]
        if task.done() and not self.error(task):
            task.result().close()
            self.closed.add(one)

    @rule()
    def turn(self) -> None:
        """The loop goes round once."""
        self.loop.run_until_complete(asyncio.sleep(0))

    @rule()
    def settle(self) -> None:
        """Everything that can happen has happened: the books balance."""
        for _ in range(10):
            self.turn()
        held: Counter[str] = Counter()
        for at in self.granted():
            if at not in self.closed:
                held[self.callers[at]] += self.sizes[at]
        assert self.admission.used == held.total()
        assert self.admission._held == held
        first: dict[str, int] = {}
        for at, task in enumerate(self.tasks):
            if not task.done():
                first.setdefault(self.callers[at], self.sizes[at])
        assert self.admission.waiting == sum(not task.done() for task in self.tasks)
        if first:
            fewest = min(held[caller] for caller in first)
            next_ones = [size for caller, size in first.items() if held[caller] == fewest]
            assert self.admission.used + max(next_ones) > CAPACITY, "a slot is free and nobody has it"
        for at, task in enumerate(self.tasks):
            if task.done() and not task.cancelled() and (error := task.exception()):
                assert isinstance(error, Overloaded), f"request {at}: {error!r}"
                assert 1 <= int(error.headers["retry-after"]) <= LONGEST_RETRY_S

    @invariant()
    def nobody_is_overtaken(self) -> None:
        """Of one caller, whoever still waits came after all who were served."""
        # A task that has just been created, or just been served, may not have run yet.
        if self.admission.waiting != len([t for t in self.tasks if not t.done()]):
            return
        granted = self.granted()
        for caller in CALLERS:
            own = [at for at, each in enumerate(self.callers) if each == caller]
            waiting = [at for at in own if not self.tasks[at].done() and at not in self.left]
            if waiting:
                assert max((at for at in granted if at in own), default=-1) < min(waiting)

    @invariant()
    def never_more_than_there_are(self) -> None:
        """No more slots are in use than there are, and no more requests wait than may."""
        assert 0 <= self.admission.used <= CAPACITY
        assert self.admission.waiting <= QUEUED

    def teardown(self) -> None:
        """When all have left nothing remains of them."""
        for at in range(len(self.tasks)):
            self.leave(at)
        self.settle()
        assert self.admission.used == self.admission.waiting == 0
        assert not self.admission._held
        assert not self.admission._queues
        self.loop.close()


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=120, stateful_step_count=40)


async def take(admission: Admission, size: int = 1, caller: str = "") -> Slot:
    """A slot that is free."""
    return await soon(admission.admit(size, 10.0, caller))


class Line:
    """Requests that wait, and who has been served, in order."""

    def __init__(self, admission: Admission) -> None:
        self.served: list[tuple[str, Slot]] = []
        self.refused: list[tuple[str, Overloaded]] = []
        self._admission = admission
        self._tasks: set[asyncio.Task[None]] = set()

    async def join(self, caller: str, times: int = 1, size: int = 1) -> None:
        """So many requests of a caller come."""
        for _ in range(times):
            task = asyncio.create_task(self._wait(caller, size))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            await turns()

    async def _wait(self, caller: str, size: int) -> None:
        try:
            self.served.append((caller, await self._admission.admit(size, 1e6, caller)))
        except Overloaded as error:
            self.refused.append((caller, error))

    async def leave(self) -> None:
        """Whoever waits leaves, and all slots are given back."""
        for task in self._tasks:
            task.cancel()
        await turns()
        for _, slot in self.served:
            slot.close()
        assert self._admission.used == self._admission.waiting == 0


async def turns() -> None:
    """Everything that can happen has happened."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_request_takes_a_slot_for_each_choice() -> None:
    """A request has a slot for each choice and gives them back once, however often it is closed."""
    admission = Admission("m", in_flight=10, queued=0)
    slot = await take(admission, 7)
    assert admission.used == 7
    other = await take(admission, 3)
    slot.close()
    slot.close()
    assert admission.used == 3
    other.close()
    assert admission.used == 0


async def test_more_choices_than_there_are_slots_are_never_admitted() -> None:
    """A request that no amount of waiting could serve is refused at once, naming n and the limit."""
    admission = Admission("m", in_flight=3, queued=10)
    with pytest.raises(InvalidRequest, match=r"n: 4 choices .* at most 3") as refusal:
        await admission.admit(4, 10.0)
    assert refusal.value.param == "n"


async def test_a_full_queue_is_an_answer_at_once() -> None:
    """Past the queue's limit a request is turned away without waiting, and told when to come back."""
    admission = Admission("m", in_flight=1, queued=1)
    slot = await take(admission)
    waiting = asyncio.create_task(admission.admit(1, 10.0))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await admission.admit(1, 10.0)
    slot.close()
    (await soon(waiting)).close()
    assert admission.used == 0


async def test_a_turn_that_does_not_come_in_time_is_given_up() -> None:
    """A request that has waited for its time-out is turned away and leaves no trace in the queue."""
    admission = Admission("m", in_flight=1, queued=5)
    slot = await take(admission)
    with pytest.raises(Overloaded):
        await soon(admission.admit(1, 0.01))
    assert admission.waiting == 0
    slot.close()
    (await take(admission)).close()


async def test_retry_after_follows_how_fast_work_drains() -> None:
    """The more slots were freed lately, the sooner a client may come back; before any was, it is told the
    most; a longer queue means longer."""

    async def advice(admission: Admission, size: int = 1) -> int:
        with pytest.raises(Overloaded) as refusal:
            await soon(admission.admit(size, 10.0))
        return int(refusal.value.headers["retry-after"])

    admission = Admission("m", in_flight=100, queued=0)
    held = [await take(admission) for _ in range(100)]
    assert await advice(admission, 40) == LONGEST_RETRY_S
    told = []
    for freed in (1, 9, 30):
        for _ in range(freed):
            held.pop().close()
            held.append(await take(admission))
        told.append(await advice(admission, 40))
    assert told == sorted(told, reverse=True)
    assert told[0] > told[1] > told[2]
    assert await advice(admission, 80) >= told[2]
    for slot in held:
        slot.close()


# ---- callers ------------------------------------------------------------------------------------------


async def test_a_caller_with_many_waiting_does_not_delay_anothers_first() -> None:
    """However long one caller's queue is, another's first request is the next."""
    admission = Admission("m", in_flight=3, queued=1000)
    held = [await take(admission, caller="ada") for _ in range(3)]
    line = Line(admission)
    await line.join("ada", 200)
    await line.join("grace")
    held[0].close()
    await turns()
    assert [caller for caller, _ in line.served] == ["grace"]
    for slot in held[1:]:
        slot.close()
    await line.leave()


async def test_callers_have_equal_shares() -> None:
    """Where all want more than there is, each holds as many slots as any other, whoever came first and
    however many choices each request has."""
    admission = Admission("m", in_flight=12, queued=1000)
    held = [await take(admission, caller="ada") for _ in range(12)]
    line = Line(admission)
    await line.join("ada", 20)
    await line.join("grace", 10, size=2)
    await line.join("joan", 5, size=4)
    for slot in held:
        slot.close()
        await turns()
    assert admission._held == {"ada": 4, "grace": 4, "joan": 4}
    await line.leave()


async def test_callers_who_hold_as_many_take_turns() -> None:
    """Among callers who hold nothing the one is next that was served longest ago."""
    admission = Admission("m", in_flight=1, queued=1000)
    held = await take(admission, caller="other")
    line = Line(admission)
    await line.join("ada", 3)
    await line.join("grace", 3)
    await line.join("joan", 2)
    held.close()
    await turns()
    for n in range(8):
        line.served[n][1].close()
        await turns()
    served = [caller for caller, _ in line.served]
    assert served == ["ada", "grace", "joan", "ada", "grace", "joan", "ada", "grace"]
    await line.leave()


async def test_who_comes_with_less_does_not_wait_behind_what_does_not_fit() -> None:
    """A request of a caller who holds fewer slots is next as soon as it comes: where it fits it is served at
    once, though another that does not fit has waited longer."""
    admission = Admission("m", in_flight=4, queued=10)
    held = await take(admission, 2, "ada")
    line = Line(admission)
    await line.join("ada", size=3)
    await line.join("grace")
    assert [caller for caller, _ in line.served] == ["grace"]
    # But of one caller nobody is overtaken.
    await line.join("ada")
    assert [caller for caller, _ in line.served] == ["grace"]
    held.close()
    await turns()
    assert [caller for caller, _ in line.served] == ["grace", "ada"]
    await line.leave()


async def test_a_full_queue_makes_room_for_a_caller_that_has_none() -> None:
    """Whoever has none in a full queue takes the place of the newest request of the caller that has the most.
    That one is told when to come back, and where nobody has more than another the newcomer is."""
    admission = Admission("m", in_flight=1, queued=4)
    held = await take(admission, caller="ada")
    line = Line(admission)

    async def refused_by(caller: str) -> list[str]:
        """Whom it costs a place that this caller's request comes."""
        line.refused.clear()
        await line.join(caller)
        assert admission.waiting == 4
        for _, error in line.refused:
            assert 1 <= int(error.headers["retry-after"]) <= LONGEST_RETRY_S
        return [caller for caller, _ in line.refused]

    await line.join("ada", 4)
    assert await refused_by("ada") == ["ada"]
    assert await refused_by("grace") == ["ada"]
    assert await refused_by("joan") == ["ada"]
    # One more of hers would be as many as ada has.
    assert await refused_by("joan") == ["joan"]
    assert await refused_by("mary") == ["ada"]
    assert await refused_by("anne") == ["anne"]
    held.close()
    await turns()
    for n in range(3):
        line.served[n][1].close()
        await turns()
    # It is the oldest of ada's that is left.
    assert [caller for caller, _ in line.served] == ["ada", "grace", "joan", "mary"]
    await line.leave()


async def test_who_is_turned_away_for_another_is_the_newest() -> None:
    """Of the caller that has the most it is the one that came last, not one that has waited long."""
    admission = Admission("m", in_flight=1, queued=3)
    held = await take(admission, caller="ada")
    waiting = []
    for _ in range(3):
        waiting.append(asyncio.create_task(admission.admit(1, 1e6, "ada")))
        await turns()
    other = asyncio.create_task(admission.admit(1, 1e6, "grace"))
    await turns()
    assert [task.done() for task in waiting] == [False, False, True]
    with pytest.raises(Overloaded):
        await waiting[2]
    held.close()
    for task in (waiting[0], other, waiting[1]):
        (await soon(task)).close()
    assert admission.used == admission.waiting == 0


async def test_a_queue_without_places_has_none_for_anybody() -> None:
    """Where nobody may wait nobody does, whoever comes."""
    admission = Admission("m", in_flight=1, queued=0)
    held = await take(admission, caller="ada")
    with pytest.raises(Overloaded):
        await admission.admit(1, 10.0, "grace")
    held.close()


async def test_who_leaves_as_its_place_is_taken_leaves_nothing() -> None:
    """A request that is turned away in the same moment in which its client leaves is simply gone."""
    admission = Admission("m", in_flight=1, queued=2)
    held = await take(admission, caller="ada")
    waiting = [asyncio.create_task(admission.admit(1, 1e6, "ada")) for _ in range(2)]
    await turns()
    other = asyncio.create_task(admission.admit(1, 1e6, "grace"))
    await asyncio.sleep(0)
    waiting[1].cancel()
    with pytest.raises((asyncio.CancelledError, Overloaded)):
        await waiting[1]
    held.close()
    for task in (waiting[0], other):
        (await soon(task)).close()
    assert admission.used == admission.waiting == 0
