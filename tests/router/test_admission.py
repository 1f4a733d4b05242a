from __future__ import annotations

import asyncio

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from router.admission import LONGEST_RETRY_S, Admission, Slot
from router.errors import InvalidRequest, Overloaded
from tests.waiting import soon

CAPACITY = 5
QUEUED = 6


class Requests(RuleBasedStateMachine):
    """Requests come, wait, leave, time out and end in any order, and between any two turns of the loop."""

    asked = Bundle("asked")

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.admission = Admission("m", in_flight=CAPACITY, queued=QUEUED)
        self.sizes: list[int] = []
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

    @rule(target=asked, size=st.integers(1, CAPACITY), timeout_s=st.sampled_from([0.0, 1e6]))
    def ask(self, size: int, timeout_s: float) -> int:
        """A request for so many slots, which may be unwilling to wait."""
        self.sizes.append(size)
        self.tasks.append(self.loop.create_task(self.admission.admit(size, timeout_s)))
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
        held = [at for at in self.granted() if at not in self.closed]
        pending = [at for at, task in enumerate(self.tasks) if not task.done()]
        assert self.admission.used == sum(self.sizes[at] for at in held)
        assert self.admission.waiting == len(pending)
        if pending:
            assert self.admission.used + self.sizes[pending[0]] > CAPACITY, "a slot is free and nobody has it"
        for at, task in enumerate(self.tasks):
            if task.done() and not task.cancelled() and (error := task.exception()):
                assert isinstance(error, Overloaded), f"request {at}: {error!r}"
                assert 1 <= int(error.headers["retry-after"]) <= LONGEST_RETRY_S

    @invariant()
    def nobody_is_overtaken(self) -> None:
        """Whoever still waits came after all who were served."""
        waiting = [at for at, task in enumerate(self.tasks) if not task.done() and at not in self.left]
        # A task that has just been created, or just been served, may not have run yet.
        if waiting and self.admission.waiting == len([t for t in self.tasks if not t.done()]):
            assert max(self.granted(), default=-1) < min(waiting)

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
        self.loop.close()


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=120, stateful_step_count=40)


async def take(admission: Admission, size: int = 1) -> Slot:
    """A slot that is free."""
    return await soon(admission.admit(size, 10.0))


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
