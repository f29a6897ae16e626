"""Work that is done again and again: one owner of start, stop, jitter and errors for all janitors.

A janitor is a plain `once(now)`; tests call that. The loop around it is started by the composition root.
"""

import asyncio
import random as standard_random
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from mcp_control.kernel.clock import Clock

_log = structlog.get_logger(__name__)
_JITTER: Final = 0.1
_SLOWEST: Final = 5.0  # seconds: what failed comes back within ten after the fault has gone


class Wake:
    """Tells one loop that there is something to do. However often it is set while the loop works, that is one round more."""

    __slots__ = ("_event", "_working")

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._working = False

    def set(self) -> None:
        """There is something to do."""
        self._event.set()

    async def wait(self) -> None:
        """Say that what was asked for so far is done, and wait for more."""
        self._working = False
        await self._event.wait()
        self._event.clear()
        self._working = True

    @property
    def idle(self) -> bool:
        """Whether the loop has done what it was asked for."""
        return not (self._working or self._event.is_set())


class Loop:
    """A running loop. After errors it waits longer, up to five seconds, and returns to its pace with the first success.

    Attributes:
        passes: how often `once` returned.
        failures: how often it raised, in a row.
        finished_at: wall milliseconds of its last return; None before.
    """

    def __init__(
        self,
        name: str,
        interval: float,
        once: Callable[[int], Awaitable[object]],
        clock: Clock,
        *,
        random: Callable[[], float] = standard_random.random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.name = name
        self.interval = interval
        self.passes = 0
        self.failures = 0
        self.finished_at: int | None = None
        self._once = once
        self._clock = clock
        self._random = random
        self._sleep = sleep
        self._stopping = False
        self._busy = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, after one interval. Starting twice is a no-op."""
        if self._task is None and not self._stopping:
            self._task = asyncio.create_task(self._run(), name=f"loop-{self.name}")

    async def stop(self, grace: float = 5.0) -> None:
        """End the loop; a pass under way gets `grace` seconds to finish. Stopping twice, or before the start, is a no-op."""
        self._stopping = True
        task, self._task = self._task, None
        if task is None:
            return
        if self._busy:
            await asyncio.wait([task], timeout=grace)
        task.cancel()
        await asyncio.wait([task])

    async def _run(self) -> None:
        while not self._stopping:
            await self._sleep(self._pause())
            self._busy = True
            try:
                await self._once(self._clock.now())
            except Exception as error:
                self.failures += 1
                # The first of a row with its trace; a fault that stays must not fill the log.
                _log.error(
                    "loop-failed", loop=self.name, failures=self.failures, error=str(error), exc_info=self.failures == 1
                )
            else:
                self.passes += 1
                self.failures = 0
                self.finished_at = self._clock.now()
            finally:
                self._busy = False

    def _pause(self) -> float:
        """Return the next wait: the interval, spread so that loops and servers do not beat together, and longer after failures."""
        longer = min(self.interval * (1 << min(self.failures, 10)), max(self.interval, _SLOWEST))
        return longer * (1 - _JITTER + 2 * _JITTER * self._random())


def every(
    interval: float,
    once: Callable[[int], Awaitable[object]],
    *,
    name: str,
    clock: Clock,
    random: Callable[[], float] = standard_random.random,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> Loop:
    """Start calling `once(now)` every `interval` seconds, a tenth more or less; stop with `Loop.stop`.

    Passes never overlap. Errors are logged and do not end the loop.
    """
    loop = Loop(name, interval, once, clock, random=random, sleep=sleep)
    loop.start()
    return loop
