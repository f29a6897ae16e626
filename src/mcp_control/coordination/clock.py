"""One time for all servers: that of the store (reliability, rule R6)."""

from collections.abc import Awaitable, Callable

from mcp_control.kernel.clock import Clock


class StoreClock:
    """This machine's clock, moved to the store's. Durations stay on the machine's monotonic clock (rule R7).

    Args:
        clock: the machine's.
        measure: returns by how many milliseconds the store's clock is ahead.
    """

    __slots__ = ("_clock", "_measure", "offset_ms")

    def __init__(self, clock: Clock, measure: Callable[[], Awaitable[float]]) -> None:
        self._clock = clock
        self._measure = measure
        self.offset_ms = 0

    def now(self) -> int:
        """Return wall time as the store has it, milliseconds since the Unix epoch."""
        return self._clock.now() + self.offset_ms

    def monotonic(self) -> float:
        """See `Clock.monotonic`."""
        return self._clock.monotonic()

    async def once(self) -> int:
        """Measure the difference anew; returns it. Raises what the measurement raises, and keeps the last one then."""
        self.offset_ms = round(await self._measure())
        return self.offset_ms
