"""When the parts of a pipeline would begin and end on the agents there are: list scheduling, pure.

Parts whose needs are met start by rank as soon as a slot is free that may take them; how long a task takes is given. The cost grows
with parts and waves of tasks, not with tasks.
"""

import heapq
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

_NOBODY: Final = -1  # the group of what needs no agent
_BEGUN: Final = (-(1 << 62), 0)


class Part(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Equal tasks that begin together: a stage, the items of a fan-out, its combining task, or work that waits already.

    Attributes:
        group: what it asks of agents, as a number; agents are told by the groups they can take.
        tasks: how many; with 0 it ends when it begins.
        seconds: how long each takes.
        needs: places of parts that must have ended before.
        rank: lower first.
        holds: it counts against the number of stages that may run at once.
    """

    group: int
    tasks: int = 1
    seconds: float = 0.0
    needs: tuple[int, ...] = ()
    rank: tuple[int, int] = (0, 0)
    holds: bool = True


class Span(msgspec.Struct, frozen=True, gc=False):
    """Seconds from now at which a part begins and ends; None: never, since no agent can take it or what it needs."""

    begins: float | None = None
    ends: float | None = None


Pools = Mapping[frozenset[int], int]
"""Slots by the groups they can take."""


def simulate(parts: Sequence[Part], pools: Pools, width: int | None = None) -> list[Span]:
    """Return when each part begins and ends. Parts must not need one another in a circle.

    Args:
        width: how many parts that hold may run at once; None is any number.
    """
    return _Simulation(parts, pools, width).run()


class _Simulation:
    def __init__(self, parts: Sequence[Part], pools: Pools, width: int | None) -> None:
        self._parts = parts
        self._width = len(parts) + 1 if width is None else width
        self._pools = sorted(pools, key=len)  # those that can do little are used first
        self._free = dict(pools)
        self._able: dict[int, list[frozenset[int]]] = {}
        for pool in self._pools:
            for group in pool:
                self._able.setdefault(group, []).append(pool)
        self._blocked = [len(part.needs) for part in parts]
        self._after: list[list[int]] = [[] for _ in parts]
        for place, part in enumerate(parts):
            for need in part.needs:
                self._after[need].append(place)
        self._unstarted = [part.tasks for part in parts]
        self._open = [part.tasks for part in parts]
        self._begins: list[float | None] = [None] * len(parts)
        self._ends: list[float | None] = [None] * len(parts)
        self._ready: dict[int, list[tuple[tuple[int, int], int]]] = {}
        self._events: list[tuple[float, int, int, frozenset[int], int]] = []
        self._running = 0
        self._count = 0

    def run(self) -> list[Span]:
        for place, blocked in enumerate(self._blocked):
            if not blocked:
                self._release(place)
        now = 0.0
        while True:
            self._start(now)
            if not self._events:
                return [Span(*both) for both in zip(self._begins, self._ends, strict=True)]
            now = self._events[0][0]
            while self._events and self._events[0][0] == now:
                _, _, place, pool, tasks = heapq.heappop(self._events)
                if tasks:
                    self._free[pool] += tasks
                self._open[place] -= tasks
                if not self._open[place]:
                    self._end(place, now)

    def _release(self, place: int) -> None:
        part = self._parts[place]
        group = part.group if part.tasks else _NOBODY
        heapq.heappush(self._ready.setdefault(group, []), (part.rank, place))

    def _end(self, place: int, now: float) -> None:
        self._ends[place] = now
        self._running -= self._parts[place].holds
        for after in self._after[place]:
            self._blocked[after] -= 1
            if not self._blocked[after]:
                self._release(after)

    def _start(self, now: float) -> None:
        while True:
            startable = [
                (ready[0], group) for group, ready in self._ready.items() if ready and self._may(group, ready[0][1])
            ]
            if not startable:
                return
            (_, place), group = min(startable)
            part = self._parts[place]
            if self._begins[place] is None:
                self._begins[place] = now
                self._running += part.holds
            if not part.tasks:
                self._push(now, place, frozenset(), 0)
            for pool in self._able.get(group, ()):
                taken = min(self._free[pool], self._unstarted[place])
                if taken:
                    self._free[pool] -= taken
                    self._unstarted[place] -= taken
                    self._push(now + part.seconds, place, pool, taken)
            heapq.heappop(self._ready[group])
            if self._unstarted[place]:  # before all that have not begun, or they could keep it from ending
                heapq.heappush(self._ready[group], (_BEGUN, place))

    def _may(self, group: int, place: int) -> bool:
        part = self._parts[place]
        if self._begins[place] is None and part.holds and self._running >= self._width:
            return False
        return not part.tasks or any(self._free[pool] for pool in self._able.get(group, ()))

    def _push(self, at: float, place: int, pool: frozenset[int], tasks: int) -> None:
        self._count += 1
        heapq.heappush(self._events, (at, self._count, place, pool, tasks))
