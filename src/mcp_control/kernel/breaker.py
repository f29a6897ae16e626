"""A circuit breaker around the calls of one peer: keeps the state that `breaker_rules.py` decides on. Safe to use from any thread."""

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TypeVar

from mcp_control.kernel.breaker_rules import (
    CALL,
    CLOSED,
    BreakerStatus,
    Policy,
    Position,
    State,
    Verdict,
    abandoned,
    failed,
    judged,
    probing,
    remaining,
    succeeded,
)
from mcp_control.kernel.clock import Clock

T = TypeVar("T")
Judge = Callable[[BaseException], Verdict]


class BreakerOpen(Exception):
    """The peer is left alone: the call was not made. A probe may be made in `retry_after` seconds."""

    def __init__(self, name: str, retry_after: float) -> None:
        super().__init__(f"{name} is left alone after failures; it is tried again in {retry_after:.1f} s")
        self.name = name
        self.retry_after = retry_after


class Breaker:
    """Lets calls through while their peer answers.

    Args:
        name: of the peer, for people.
        fallback: what is done instead of a call, for people.
        moved: called after each change of state, in the thread that caused it.

    Attributes:
        policy: may be replaced at any time; it counts from the next failure on.
        since: wall milliseconds at which it last left or came back to `closed`.
        opened: how often it opened.
        refused: calls that were not let through.
    """

    def __init__(
        self,
        name: str,
        clock: Clock,
        policy: Policy,
        *,
        fallback: str = "",
        chance: Callable[[], float] = random.random,
        moved: Callable[[], None] | None = None,
    ) -> None:
        self.name = name
        self.policy = policy
        self.fallback = fallback
        self._clock = clock
        self._chance = chance
        self._moved = moved
        self._lock = threading.Lock()
        self._at = CLOSED
        self._error = ""
        self._probe_at: int | None = None
        self.since = clock.now()
        self.opened = 0
        self.refused = 0

    @property
    def state(self) -> State:
        """`closed`: calls go through; `open`: they do not; `half_open`: a probe is under way."""
        return self._at.state

    @property
    def failures(self) -> int:
        """Failed calls in a row."""
        return self._at.failures

    def enter(self) -> int:
        """Let a call through: returns its permit, with which its end has to be told. Raises BreakerOpen."""
        if self._at.state == "closed":
            return CALL
        permit = self.probe() if self.policy.by_calls else CALL
        if permit == CALL:
            self.refused += 1
            # While a probe is under way nobody knows when it ends: what comes back too early is refused once more.
            wait = self.wait() if self._at.state == "open" else min(self.wait(), self.policy.open_seconds)
            raise BreakerOpen(self.name, wait)
        return permit

    def probe(self) -> int:
        """Begin a probe where one is due and return its permit; 0: do not."""
        with self._lock:
            before = self._at
            after = probing(before, self.policy, self._clock.monotonic())
            self._move(after)
        self._tell(before)
        return after.probe if after is not before else CALL

    def succeeded(self, permit: int = CALL) -> None:
        """Hear of a call that was answered. Costs nothing while all is well."""
        if permit == CALL and not self._at.failures:
            return
        with self._lock:
            before = self._at
            self._move(succeeded(before, permit))
        self._tell(before)

    def failed(self, permit: int = CALL, error: BaseException | None = None) -> None:
        """Hear of a call that failed or took too long."""
        with self._lock:
            before = self._at
            if error is not None:
                self._error = type(error).__name__[:200]
            self._move(failed(before, self.policy, permit, self._clock.monotonic(), self._chance()))
        self._tell(before)

    def abandoned(self, permit: int = CALL) -> None:
        """Hear of a call whose end says nothing of the peer, as when it was cancelled."""
        if permit != CALL:
            with self._lock:
                before = self._at
                self._move(abandoned(before, permit, self._clock.monotonic()))
            self._tell(before)

    def wait(self) -> float:
        """Return the seconds until a probe may begin."""
        return remaining(self._at, self._clock.monotonic())

    def status(self) -> BreakerStatus:
        """Return how it stands."""
        with self._lock:
            at = self._at
            return BreakerStatus(
                name=self.name,
                state=at.state,
                since=self.since,
                failures=at.failures,
                opened=self.opened,
                probe_at=None if at.state == "closed" else self._probe_at,
                error=self._error,
                fallback=self.fallback,
            )

    def guard(self, judge: Judge = judged) -> "Guard":
        """Return a block around one call: refused at its beginning with BreakerOpen, judged by how it ends. May hold `await`."""
        return Guard(self, judge)

    async def call(
        self,
        work: Callable[[], Awaitable[T]],
        *,
        seconds: float | None = None,
        fallback: Callable[[], Awaitable[T]] | None = None,
        judge: Judge = judged,
    ) -> T:
        """Do some work that calls the peer, and return what it returns.

        Args:
            seconds: how long it may take; longer is a failure (TimeoutError).
            fallback: what to do instead where the call is refused or failed.
            judge: says of an error what it tells of the peer.

        Raises:
            BreakerOpen: the call was refused, and there is no fallback.
        """
        try:
            with self.guard(judge):
                async with asyncio.timeout(seconds):
                    return await work()
        except BreakerOpen:
            if fallback is None:
                raise
        except Exception as error:
            if fallback is None or judge(error) != "failed":
                raise
        return await fallback()

    def _move(self, after: Position) -> None:
        before, self._at = self._at, after
        if after.state == before.state and after.due == before.due:
            return
        now = self._clock.now()
        if after.state != "closed":
            self._probe_at = now + round(remaining(after, self._clock.monotonic()) * 1000)
        if (after.state == "closed") != (before.state == "closed"):
            self.since = now
            self.opened += after.state != "closed"

    def _tell(self, before: Position) -> None:
        if self._moved is not None and self._at.state != before.state:
            self._moved()


class Guard:
    """A block around one call; see `Breaker.guard`."""

    __slots__ = ("_breaker", "_judge", "_permit")

    def __init__(self, breaker: Breaker, judge: Judge) -> None:
        self._breaker = breaker
        self._judge = judge
        self._permit = CALL

    def __enter__(self) -> None:
        self._permit = self._breaker.enter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._breaker.succeeded(self._permit)
            return
        # Another peer that is left alone, behind this one or called in the same block, is not this one's failure.
        verdict = "unknown" if isinstance(error, BreakerOpen) else self._judge(error)
        if verdict == "failed":
            self._breaker.failed(self._permit, error)
        elif verdict == "answered":
            self._breaker.succeeded(self._permit)
        else:
            self._breaker.abandoned(self._permit)
