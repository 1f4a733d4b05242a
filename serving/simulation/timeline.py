"""When the modelled accelerator works and when it stands still: arithmetic on times that are given."""

from __future__ import annotations

from dataclasses import dataclass

HOST_BOUND = 0.05
"""The share of its time with work for which the accelerator may wait for the host before the host is taken to
be what bounds a run."""


@dataclass(slots=True)
class Run:
    """What an accelerator has done so far. All of it only grows."""

    steps: int = 0
    busy_s: float = 0.0
    """Seconds of modelled work."""
    late_steps: int = 0
    """Steps that the host handed over, or allowed to end, after the accelerator had run dry."""
    late_s: float = 0.0
    """Seconds for which it stood still in all because of these."""
    idle_s: float = 0.0
    """Seconds, between two steps, without work that the last one had left."""

    @property
    def host_share(self) -> float:
        """The part, 0..1, of the time with work in which the accelerator waited for the host."""
        return self.late_s / (self.busy_s + self.late_s) if self.late_s else 0.0

    @property
    def host_bound(self) -> bool:
        """Whether the run says more of the host than of the accelerator. One that takes no time for its steps
        says nothing of either.
        """
        return self.busy_s > 0 and self.host_share > HOST_BOUND


class Timeline:
    """The accelerator takes one step after another, in the order in which the host hands them over.

    Where it has no step, it stands still, for one of two reasons. The host was late: requests that the last
    step had worked on were to go on, and nobody had said so in time. Or there was nothing that it knew of:
    only new requests come next. Time in which those waited before the scheduler saw them is the host's too,
    but from here it looks like any other time without work; under a load that is never to run out, both are.
    """

    def __init__(self) -> None:
        self.run = Run()
        self._free_at = 0.0
        self._was_late = False

    def begin(self, now: float, lasts_s: float, *, continues: bool) -> None:
        """Queue a step of so many seconds. `continues`: some of its requests have been worked on before.

        `now` is of a clock that never goes back, and above 0.
        """
        run, gap = self.run, now - self._free_at
        self._was_late = False
        if gap > 0 and run.steps:
            if continues:
                self._late(gap)
            else:
                run.idle_s += gap
        run.steps += 1
        run.busy_s += lasts_s
        self._free_at = max(now, self._free_at) + lasts_s

    def end(self, now: float) -> float:
        """When the last step ends. It does not end before `now`, when the host says how it is to sample."""
        gap = now - self._free_at
        if gap > 0:
            self._late(gap)
            self._free_at = now
        return self._free_at

    def _late(self, seconds: float) -> None:
        self.run.late_steps += not self._was_late
        self.run.late_s += seconds
        self._was_late = True
