"""A clock that moves only when it is told to."""


class FakeClock:
    """A `Clock` for tests; wall and monotonic time advance together unless the wall clock is set.

    Args:
        now: wall time to begin with, milliseconds since the Unix epoch.
    """

    def __init__(self, now: int = 1_800_000_000_000) -> None:
        self._now = now
        self._elapsed = 0  # milliseconds

    def now(self) -> int:
        """Return wall time, milliseconds since the Unix epoch."""
        return self._now

    def monotonic(self) -> float:
        """Return seconds since this clock was made, whatever happened to the wall clock."""
        return self._elapsed / 1000

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        millis = round(seconds * 1000)
        if millis < 0:
            raise ValueError("time does not run backwards; set_wall moves the wall clock")
        self._now += millis
        self._elapsed += millis

    def set_wall(self, millis: int) -> None:
        """Set the wall clock, as an administrator or a time server would; monotonic time does not notice."""
        self._now = millis
