"""Time as an argument: wall time in whole milliseconds since the Unix epoch, durations on a monotonic clock."""

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Tells the time. Pure code never asks a clock: it gets `now` as an argument."""

    def now(self) -> int:
        """Return wall time, milliseconds since the Unix epoch."""
        ...

    def monotonic(self) -> float:
        """Return seconds on a clock that never jumps; only differences mean something."""
        ...


class SystemClock:
    """The machine's clocks."""

    __slots__ = ()

    def now(self) -> int:
        """Return wall time, milliseconds since the Unix epoch."""
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        """Return seconds since an arbitrary moment, unaffected by changes of the wall clock."""
        return time.monotonic()


def to_datetime(millis: int) -> datetime:
    """Return the moment as an aware datetime in UTC."""
    return datetime.fromtimestamp(millis / 1000, UTC)


def to_millis(moment: datetime) -> int:
    """Return the moment in milliseconds since the Unix epoch. The datetime must be aware."""
    return round(moment.timestamp() * 1000)
