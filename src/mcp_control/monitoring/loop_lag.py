"""How late the event loop is: what every request waits for before anything is done for it."""

import asyncio
import gc
from collections import deque
from collections.abc import Awaitable, Callable

from mcp_control.kernel.clock import Clock


class LoopLag:
    """Measures by sleeping a known time and looking how long it took.

    Args:
        interval: seconds between measurements.
        window: measurements the maximum is taken over.
        noted: gets each measurement, in seconds.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        interval: float = 0.1,
        window: int = 50,
        noted: Callable[[float], None] | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._clock = clock
        self._interval = interval
        self._recent: deque[float] = deque(maxlen=window)
        self._noted = noted
        self._sleep = sleep
        self._task: asyncio.Task[None] | None = None

    @property
    def now(self) -> float:
        """Lag at the last measurement, seconds."""
        return self._recent[-1] if self._recent else 0.0

    @property
    def worst(self) -> float:
        """Largest lag in the window, seconds."""
        return max(self._recent, default=0.0)

    async def once(self) -> float:
        """Measure once and return the lag in seconds."""
        start = self._clock.monotonic()
        await self._sleep(self._interval)
        lag = max(0.0, self._clock.monotonic() - start - self._interval)
        self._recent.append(lag)
        if self._noted is not None:
            self._noted(lag)
        return lag

    def start(self) -> None:
        """Measure until stopped. Starting twice is a no-op."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="loop-lag")

    async def stop(self) -> None:
        """Stop measuring. Stopping twice is a no-op."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def _run(self) -> None:
        while True:
            await self.once()


def spare_collections() -> None:
    """Keep what the start has made out of garbage collection, and collect less often: full collections were the longest pauses."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)  # beyond what a few large requests hold while they are under way
