"""Server-sent events, out of bytes that come cut up anywhere."""

from __future__ import annotations

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class EventReader:
    """The events of one stream. Of an event only its data is of interest; comments are none."""

    def __init__(self, limit: int) -> None:
        """`limit`: bytes that an event may have."""
        self._limit = limit
        self._line = bytearray()
        """A line whose end has not come."""
        self._data: list[bytes] = []
        """Of the event whose end has not come."""
        self._size = 0
        self._after_return = False
        """Whether the last byte was a carriage return: a line feed now is the rest of that line's end."""
        self._mark = _BYTE_ORDER_MARK
        """What the next line may begin with."""

    def feed(self, data: bytes) -> list[bytes]:
        """The data of each event that is complete now. Raises ValueError for an event that is too long."""
        if self._after_return and data:
            self._after_return = False
            data = data.removeprefix(b"\n")
        events = []
        for line in self._lines(data):
            field, _, value = line.partition(b":")
            if not line:
                events.append(b"\n".join(self._data))
                self._data, self._size = [], 0
            elif field == b"data":
                self._data.append(value.removeprefix(b" "))
                self._size += len(line)
            self._check(self._size)
        return list(filter(None, events))

    def end(self) -> list[bytes]:
        """The same where no more will come: an event whose closing blank line is missing counts."""
        return self.feed(b"\n\n")

    def _lines(self, data: bytes) -> list[bytes]:
        """The lines that are complete now, without their ends."""
        if b"\n" not in data and b"\r" not in data:
            self._line += data
            self._check(self._size + len(self._line))
            return []
        lines = (self._line + data).splitlines()
        self._line.clear()
        if data.endswith((b"\n", b"\r")):
            self._after_return = data.endswith(b"\r")
        else:
            self._line += lines.pop()
        lines[0] = lines[0].removeprefix(self._mark)
        self._mark = b""
        return [bytes(line) for line in lines]

    def _check(self, size: int) -> None:
        if size > self._limit:
            raise ValueError(f"an event of more than {self._limit} bytes")
