"""Overload (promise G12): new work is shed first, what moves accepted work on is shed last.

Everything that is written waits in one line for the store, heartbeats and results behind submits. So the line is kept short: no more
tasks are let in than were lately committed in half a second (Little's law: time in line = length of the line / throughput).
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final, Literal

import msgspec

from mcp_control.kernel.errors import Overloaded

_FIRST_ROOM: Final = 8000.0  # of an idle server nothing is known; what a first flood overfills is learnt from it
_LEAST_ROOM: Final = 20.0
_SHORTEST: Final = 0.001
_GROWING: Final = 0.05
_SHRINKING: Final = 0.2

Weight = Literal["submit", "read", "keep"]


class Load(msgspec.Struct, frozen=True):
    """How busy the server is.

    Attributes:
        submits: submits under way.
        entering: tasks of them on their way into the store.
        room: for how many such tasks there is room.
        waiting: changes that wait for the store.
        lag: seconds by which the event loop is late.
        queued: tasks that wait for an agent.
    """

    submits: int = 0
    entering: int = 0
    room: float = float("inf")
    waiting: int = 0
    lag: float = 0.0
    queued: int = 0


class Limits(msgspec.Struct, frozen=True):
    """From where on submits are shed, and `after` how many seconds to come back; `line` is how long the line may be, in seconds.

    Reads are shed at four times the lag; what keeps accepted work moving at the store's own bound only.
    """

    submits: int = 2000
    waiting: int = 8000
    lag: float = 0.5
    queued: int = 2_000_000
    after: float = 1.0
    line: float = 0.5


DEFAULT_LIMITS: Final = Limits()


def admit(weight: Weight, load: Load, limits: Limits = DEFAULT_LIMITS) -> float | None:
    """Return None where a request may go on, else the seconds after which to come back. Pure."""
    if weight == "submit":
        busy = (
            load.submits >= limits.submits
            or load.entering >= load.room
            or load.waiting >= limits.waiting
            or load.queued >= limits.queued
        )
        if load.lag >= limits.lag:
            return 2 * limits.after
        if busy:
            return limits.after
    elif weight == "read" and load.lag >= 4 * limits.lag:
        return 2 * limits.after
    return None


class Pace:
    """How many tasks a second the store takes, and so how many there is room for at once.

    It learns from each submit that is done: the tasks that were entering when it began, its own included, took that long. Submits on an
    idle server say nothing of what a busy one can do, so only those count that met at least half of the room, or took too long.

    Args:
        line: seconds that the line may be long.
        room: how many tasks there is room for before anything was learnt.
    """

    __slots__ = ("_line", "room")

    def __init__(self, line: float, room: float = _FIRST_ROOM) -> None:
        self._line = line
        self.room = room

    def learn(self, entering: int, seconds: float) -> None:
        """Hear that so many tasks took so long."""
        if entering < self.room / 2 and seconds <= self._line:
            return
        fits = entering * self._line / max(seconds, _SHORTEST)
        # What looks like more room may be luck; what looks like less is believed sooner.
        weight = _SHRINKING if fits < self.room else _GROWING
        self.room = max(_LEAST_ROOM, self.room + weight * (min(fits, 2 * self.room) - self.room))


class Turn:
    """Lets those that keep the event loop busy for milliseconds do so one by one; whatever else is ready goes on in between.

    Without it forty large bodies that come at once are decoded in one turn of the loop, and heartbeats wait for all of them.
    """

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> None:
        await self._lock.acquire()
        try:
            await asyncio.sleep(0)
        except BaseException:
            self._lock.release()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._lock.release()


class Entry:
    """Tasks on their way into the store, as a context manager."""

    __slots__ = ("_gate", "began", "entering", "tasks")

    def __init__(self, gate: "Gate", tasks: int, entering: int, began: float) -> None:
        self._gate = gate
        self.tasks = tasks
        self.entering = entering
        self.began = began

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._gate.left(self, kind is None)


class Gate:
    """Counts what is under way and asks `admit`.

    Args:
        waiting: how many changes wait for the store right now.
        shed: hears of every refusal.
        monotonic: seconds on a clock that never jumps.

    Attributes:
        submits: submits under way.
        entering: tasks on their way into the store.
        lag: how late the event loop is, in seconds; written by whoever measures it.
        queued: tasks that wait for an agent; written by whoever counts them.
        turn: for what takes the event loop for long, such as decoding a large body.
    """

    __slots__ = ("_limits", "_monotonic", "_pace", "_shed", "entering", "lag", "queued", "submits", "turn", "waiting")

    def __init__(
        self,
        waiting: Callable[[], int],
        shed: Callable[[str], None],
        limits: Limits = DEFAULT_LIMITS,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._shed = shed
        self._monotonic = monotonic
        self._pace = Pace(limits.line)
        self.waiting = waiting
        self.submits = 0
        self.entering = 0
        self.lag = 0.0
        self.queued = 0
        self.turn = Turn()

    def check(self, weight: Weight) -> None:
        """Let a request through. Raises Overloaded with the seconds to wait."""
        load = Load(self.submits, self.entering, self._pace.room, self.waiting(), self.lag, self.queued)
        self._refuse(weight, admit(weight, load, self._limits))

    def entry(self, tasks: int) -> "Entry":
        """Let so many tasks on their way into the store for the length of a block, and learn from how long that takes.

        Raises:
            Overloaded: they would make the line too long. A submit alone is never too many.
        """
        entering = self.entering + tasks
        if self.entering and entering > self._pace.room:
            self._refuse("submit", self._limits.after)
        self.entering = entering
        return Entry(self, tasks, entering, self._monotonic())

    def left(self, entry: "Entry", learn: bool) -> None:
        """Hear that an entry is over; `learn` where it tells how fast the store is."""
        self.entering -= entry.tasks
        if learn:
            self._pace.learn(entry.entering, self._monotonic() - entry.began)

    def _refuse(self, weight: Weight, after: float | None) -> None:
        if after is not None:
            self._shed(weight)
            raise Overloaded("the server is busy with the work it has accepted; come back later", retry_after=after)
