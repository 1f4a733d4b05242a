"""What a simulated accelerator says of its run: one line of JSON in a file, true after every step."""

from __future__ import annotations

import os

from serving.simulation.timeline import Run

REPORT_BYTES = 200
"""Of one length always: whoever reads while it is written finds neither half a line nor two."""


class Report:
    """Keeps a file up to date. A step costs one small write, about 3 us, to the system's memory."""

    def __init__(self, path: str) -> None:
        """Replaces what the file held. Raises OSError."""
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self.write(Run())

    def write(self, run: Run) -> None:
        """Put the present numbers in the place of the last ones."""
        line = (
            f'{{"steps": {run.steps}, "busy_s": {run.busy_s:.6f},'
            f' "late_steps": {run.late_steps}, "late_s": {run.late_s:.6f},'
            f' "idle_s": {run.idle_s:.6f}}}'
        )
        os.pwrite(self._file, line.ljust(REPORT_BYTES - 1).encode() + b"\n", 0)

    def close(self) -> None:
        """The file stays, with its last line."""
        os.close(self._file)
