"""Circuit breakers around what handlers call themselves: one for each name in each process of an agent."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Final, TypeVar

from msgspec.structs import replace

from mcp_control.kernel.breaker import Breaker, BreakerOpen, Guard
from mcp_control.kernel.breaker_rules import NAME_MAX, NAMES_MAX, BreakerStatus, Policy, State, Verdict, judged
from mcp_control.kernel.clock import SystemClock
from mcp_control.sdk.asking import Asking
from mcp_control.sdk.errors import Cancelled, Permanent, Unavailable

T = TypeVar("T")
Counts = Callable[[Exception], bool]
_WORST: Final[dict[State, int]] = {"closed": 0, "half_open": 1, "open": 2}


class Guards:
    """The breakers of one process, and what its worker processes tell of theirs. Safe to use from any thread.

    Args:
        told: called with all of them whenever one opens, closes or is probed.
    """

    def __init__(self, told: Callable[[list[BreakerStatus]], None] | None = None) -> None:
        self._told = told
        self._clock = SystemClock()
        self._lock = threading.Lock()
        self._breakers: dict[str, Breaker] = {}
        self._others: dict[object, Sequence[BreakerStatus]] = {}

    def get(self, name: str, failures: int, open_for: float) -> Breaker:
        """Return the breaker of a name; what is said of it last counts. Raises ValueError: it cannot be, or there are too many."""
        found = self._breakers.get(name)
        if found is None:
            found = self._made(name)
        if (found.policy.failures, found.policy.open_seconds) != (failures, open_for):
            if failures < 1 or not open_for > 0:
                raise ValueError("a breaker opens after 1 failure or more, for more than no time")
            longest = max(Policy().longest_seconds, open_for)
            found.policy = replace(found.policy, failures=failures, open_seconds=open_for, longest_seconds=longest)
        return found

    def _made(self, name: str) -> Breaker:
        if not 1 <= len(name) <= NAME_MAX:
            raise ValueError(f"the name of a breaker has 1 to {NAME_MAX} characters")
        with self._lock:
            if name not in self._breakers and len(self._breakers) >= NAMES_MAX:
                raise ValueError(f"an agent has at most {NAMES_MAX} breakers; name them after peers, not after calls")
            made = Breaker(name, self._clock, Policy(), fallback="tasks are tried again later", moved=self._moved)
            return self._breakers.setdefault(name, made)

    def _moved(self) -> None:
        if self._told is not None:
            self._told(self.statuses())

    def heard(self, worker: object, statuses: Sequence[BreakerStatus]) -> None:
        """Take what a worker process tells of its breakers."""
        self._others[worker] = statuses

    def forget(self, worker: object) -> None:
        """Hear that a worker process has ended."""
        self._others.pop(worker, None)

    def statuses(self) -> list[BreakerStatus]:
        """Return how the breakers stand, by name; of those of one name in several processes the worst."""
        found: dict[str, BreakerStatus] = {}
        own = [breaker.status() for breaker in list(self._breakers.values())]
        for status in [*own, *(status for told in list(self._others.values()) for status in told)]:
            other = found.get(status.name)
            if other is not None:
                worse = max(status, other, key=lambda one: (_WORST[one.state], one.since))
                status = replace(worse, opened=status.opened + other.opened)
            found[status.name] = status
        return [found[name] for name in sorted(found)][:NAMES_MAX]


class _Block:
    """What blocks of both kinds share: one call at a time, judged by how it ends."""

    def __init__(self, breaker: Breaker, reason: Callable[[], str], counts: Counts | None) -> None:
        self._breaker = breaker
        self._reason = reason
        self._counts = counts
        self._guard: Guard | None = None

    def _begin(self) -> None:
        if self._guard is not None:
            raise RuntimeError("this block is in use; ask the context for another one")
        guard = self._breaker.guard(self._judge)
        try:
            guard.__enter__()
        except BreakerOpen as refused:
            raise _unavailable(refused) from None
        self._guard = guard

    def _end(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.__exit__(kind, error, trace)

    def _judge(self, error: BaseException) -> Verdict:
        if isinstance(error, Permanent):
            return "answered"
        if isinstance(error, Cancelled | Unavailable | Asking):
            return "unknown"
        if isinstance(error, asyncio.CancelledError):
            # An attempt that took too long is how a peer that hangs shows.
            return "failed" if self._reason() == "timeout" else "unknown"
        if self._counts is not None and isinstance(error, Exception):
            return "failed" if self._counts(error) else "answered"
        return judged(error)


class Guarded(_Block):
    """`with ctx.breaker(...):` around a call that blocks."""

    def __enter__(self) -> None:
        self._begin()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(kind, error, trace)

    def call(self, work: Callable[[], T], *, fallback: Callable[[], T] | None = None) -> T:
        """Call the peer, or do something else where it is left alone or the call fails. Raises Unavailable without a fallback."""
        try:
            with self:
                return work()
        except Exception as error:
            if fallback is None or not (isinstance(error, Unavailable) or self._judge(error) == "failed"):
                raise
        return fallback()


class AsyncGuarded(_Block):
    """`async with ctx.breaker(...):` around a call that is awaited."""

    async def __aenter__(self) -> None:
        self._begin()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(kind, error, trace)

    async def call(
        self,
        work: Callable[[], Awaitable[T]],
        *,
        seconds: float | None = None,
        fallback: Callable[[], Awaitable[T]] | None = None,
    ) -> T:
        """Call the peer, or do something else where it is left alone or the call fails.

        Args:
            seconds: how long the call may take; longer is a failure.

        Raises:
            Unavailable: it is left alone, and there is no fallback.
        """
        try:
            return await self._breaker.call(work, seconds=seconds, fallback=fallback, judge=self._judge)
        except BreakerOpen as refused:
            raise _unavailable(refused) from None


def _unavailable(refused: BreakerOpen) -> Unavailable:
    return Unavailable(
        str(refused), retry_after=refused.retry_after, code="breaker-open", data={"breaker": refused.name}
    )
