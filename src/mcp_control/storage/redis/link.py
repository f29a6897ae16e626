"""The one way to Redis of a server: every call through one breaker and one time limit."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import structlog

from mcp_control.kernel.breaker import Breaker, BreakerOpen
from mcp_control.kernel.breaker_rules import Policy, Verdict
from mcp_control.kernel.clock import Clock
from mcp_control.storage.redis.connection import FAILURES, RedisClient, disconnect

T = TypeVar("T")
_log = structlog.get_logger(__name__)
_CALL_SECONDS: Final = 0.05
_PROBE_SECONDS: Final = 1.0
_LATE: Final = 0.2
_GRANTED: Final = 20
_CANCEL_SECONDS: Final = 0.1
_AT_ONCE: Final = 32
POLICY: Final = Policy(failures=3, open_seconds=1.0, longest_seconds=5.0, probe_seconds=10.0, by_calls=False)
"""Nobody's call is the probe, so nobody waits for a Redis that hangs."""


def breaker(clock: Clock, policy: Policy = POLICY) -> Breaker:
    """Return the breaker of a link."""
    return Breaker("redis", clock, policy, fallback="the store, and each server by itself")


class RedisTrouble(Exception):
    """Redis did not answer, not in time, or with an error; or it is left alone for the moment. Never reaches a caller of the product."""


class RedisLink:
    """Calls Redis for queue, bus and cache of one server.

    After three failures in a row calls are refused at once, and a task of its own tries until Redis accepts writes within the limit again.

    Args:
        client: see `connect`. Closed with the link.
        namespace: what the probe's key begins with.
        seconds: how long a call may take.
    """

    def __init__(
        self, client: RedisClient, namespace: str, breaker: Breaker, *, seconds: float = _CALL_SECONDS
    ) -> None:
        self.client = client
        self.breaker = breaker
        self._probe_key = f"{namespace}:probe"
        self._seconds = seconds
        self._healing: asyncio.Task[None] | None = None
        self._available = asyncio.Event()
        self._available.set()
        self._room = asyncio.Semaphore(_AT_ONCE)

    async def call(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do some work with the client and return what it returns. Raises RedisTrouble."""
        try:
            with self.breaker.guard(_judged):
                async with _Within(self._seconds), self._room:
                    return await work()
        except BreakerOpen as refused:
            raise RedisTrouble(str(refused)) from refused
        except FAILURES as error:
            if self.breaker.state != "closed" and self._available.is_set():
                _log.warning("redis-unavailable", error=type(error).__name__, detail=str(error))
                self._available.clear()
                self._healing = asyncio.create_task(self._heal(), name="redis-probe")
            raise RedisTrouble(f"{type(error).__name__}: {error}") from error

    async def available(self) -> None:
        """Wait until calls are allowed."""
        await self._available.wait()

    async def close(self) -> None:
        """End the probing and close the client. Calling it twice is a no-op."""
        await stop(self._healing)
        await disconnect(self.client)

    async def _heal(self) -> None:
        while self.breaker.state != "closed":
            await asyncio.sleep(self.breaker.wait())
            if permit := self.breaker.probe():
                try:
                    await self._probe()
                except FAILURES as error:
                    self.breaker.failed(permit, error)
                else:
                    self.breaker.succeeded(permit)
        _log.info("redis-available")
        self._available.set()

    async def _probe(self) -> None:
        async with asyncio.timeout(_PROBE_SECONDS):
            await self._write()  # connects, and finds the master or the nodes
        async with _Within(self._seconds):
            await self._write()

    async def _write(self) -> None:
        """A write: a Redis that is full answers everything else."""
        await self.client.set(self._probe_key, b"1", px=1000)


def _judged(error: BaseException) -> Verdict:
    return "failed" if isinstance(error, FAILURES) else "unknown"


async def stop(task: "asyncio.Task[None] | None") -> None:
    """Cancel a task and wait until it has ended, also where a library loses the first cancellation."""
    while task is not None and not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=_CANCEL_SECONDS)


class _Within:
    """Raises TimeoutError after so many seconds in which the event loop ran; a server that is busy itself is no fault of Redis.

    A cancellation that redis-py lost on the way is raised again at the end.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._scope = asyncio.timeout(None)
        self._granted = 0

    async def __aenter__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._cancelling = self._task.cancelling() if self._task else 0
        await self._scope.__aenter__()
        self._arm()

    async def __aexit__(self, *raised: Any) -> None:
        self._timer.cancel()
        await self._scope.__aexit__(*raised)
        if raised[0] is None and self._task is not None and self._task.cancelling() > self._cancelling:
            raise asyncio.CancelledError

    def _arm(self) -> None:
        self._due = self._loop.time() + self._seconds
        self._timer = self._loop.call_at(self._due, self._over)

    def _over(self) -> None:
        if self._loop.time() - self._due > self._seconds * _LATE and self._granted < _GRANTED:
            self._granted += 1
            self._arm()
        else:
            self._scope.reschedule(self._loop.time())
