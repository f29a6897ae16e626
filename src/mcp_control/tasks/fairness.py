"""Fair shares: whose tasks get the next free slots while several wait. Pure.

Inside a class of priority the shares of a tenant take turns by their weights, with start-time fair queueing (Goyal, Vin, Cheng:
"Start-time Fair Queuing", SIGCOMM 1996): each has a virtual time that grows by 1 / weight with every task it is served, and the lowest
comes first. A higher class comes before a lower one; a share that got nothing for `patience_seconds` in its class gets one task all the
same. Inside a share the rank decides.
"""

import heapq
from collections.abc import Collection, Sequence
from typing import Final

GRADES: Final = 4
MEDIUM: Final = 1
_GRADE_POINTS: Final = 20
_LOWEST_POINTS: Final = 40
_GRADES: Final = tuple(
    min(GRADES - 1, max(0, (priority - _LOWEST_POINTS) // _GRADE_POINTS + 1)) for priority in range(101)
)
_OWED: Final = 16
"""So many tasks, for a weight of 1, are owed to a share at most."""


def grade_of(priority: int) -> int:
    """Return the class of a priority (0 to 100): 0 low (below 40), 1 medium (below 60), 2 high (below 80), 3 critical."""
    return _GRADES[priority]


def patience_seconds(grade: int, point_ms: int) -> float | None:
    """Return how long a share waits in this class before it gets a task ahead of higher ones; None in the highest."""
    lacking = GRADES - 1 - grade
    return lacking * _GRADE_POINTS * point_ms / 1000 if lacking else None


class Share:
    """What may claim its part of the slots: a tenant, or a key that the tenant gives to tasks.

    Attributes:
        asked: the weight that its newest task came with.
        ordered: the weight an operator gave it; None where there is none.
        recorded: whether the store knows of it, as far as this server knows.
    """

    __slots__ = ("asked", "key", "ordered", "recorded", "tenant")

    def __init__(self, tenant: str, key: str, ordered: float | None) -> None:
        self.tenant = tenant
        self.key = key
        self.asked = 1.0
        self.ordered = ordered
        self.recorded = False

    @property
    def weight(self) -> float:
        """Its part in relation to those of the others."""
        return self.asked if self.ordered is None else self.ordered


class Line:
    """A share inside a class of priority.

    Attributes:
        time: its virtual time: where the next task it is served begins.
        since: monotonic seconds; when it began to wait, or was last served.
    """

    __slots__ = ("grade", "share", "since", "time")

    def __init__(self, share: Share, grade: int) -> None:
        self.share = share
        self.grade = grade
        self.time = 0.0
        self.since = 0.0


class Shares:
    """The shares of a server, with the virtual clock of each class of each tenant.

    Attributes:
        keyed: whether any of them is more than a whole tenant. As long as there is none nothing is shared out, as the agents of a tenant
            serve no other.
    """

    def __init__(self) -> None:
        self._lines: dict[tuple[str, str, int], Line] = {}
        self._shares: dict[tuple[str, str], Share] = {}
        self._ordered: dict[tuple[str, str], float] = {}
        self._clocks: dict[tuple[str, int], float] = {}
        self.keyed = False

    def line(self, tenant: str, key: str, grade: int) -> Line:
        """Return the line of a share in a class."""
        line = self._lines.get((tenant, key, grade))
        if line is None:
            share = self._shares.get((tenant, key))
            if share is None:
                share = self._shares[(tenant, key)] = Share(tenant, key, self._ordered.get((tenant, key)))
                self.keyed = self.keyed or bool(key)
            line = self._lines[(tenant, key, grade)] = Line(share, grade)
        return line

    def order(self, tenant: str, key: str, weight: float | None) -> None:
        """Give a share a weight whatever its tasks say, or no longer."""
        if weight is None:
            self._ordered.pop((tenant, key), None)
        else:
            self._ordered[(tenant, key)] = weight
        share = self._shares.get((tenant, key))
        if share is not None:
            share.ordered = weight

    def weight(self, tenant: str, key: str) -> float:
        """Return the weight of a share, 1 where nothing is known of it."""
        share = self._shares.get((tenant, key))
        return self._ordered.get((tenant, key), 1.0) if share is None else share.weight

    def unrecorded(self) -> list[Share]:
        """Return the shares with a key of which the store does not know, as far as this server knows."""
        return [share for share in self._shares.values() if share.key and not share.recorded]

    def begin(self, line: Line, now: float) -> None:
        """Hear that a line has something to be served that had nothing: it begins where the others are, so nothing can be saved up."""
        line.time = max(line.time, self._clocks.get((line.share.tenant, line.grade), 0.0))
        line.since = now

    def catch_up(self, line: Line) -> None:
        """Forgive a line most of what it is owed: it had nobody to serve it while others were served."""
        clock = self._clocks.get((line.share.tenant, line.grade), 0.0)
        line.time = max(line.time, clock - _OWED / line.share.weight)

    def served(self, line: Line, count: int, now: float) -> None:
        """Count tasks that a line was served."""
        if count:
            clock = (line.share.tenant, line.grade)
            last = line.time + (count - 1) / line.share.weight
            self._clocks[clock] = max(self._clocks.get(clock, 0.0), last)
            line.time += count / line.share.weight
            line.since = now

    def forget(self, kept: Collection[Line]) -> None:
        """Forget all lines but these; the shares that stay keep what they are owed."""
        kept = set(kept)
        self._lines = {key: line for key, line in self._lines.items() if line in kept}
        self._shares = {key: share for key, share in self._shares.items() if any(share is line.share for line in kept)}
        self.keyed = any(key for _, key in self._shares)


def allot(lines: Sequence[tuple[Line, int]], room: int, now: float, point_ms: int) -> list[int]:
    """Return how many of so many free slots each line gets, where each has so many tasks waiting.

    Args:
        lines: of one tenant, with what waits.
        room: free slots.
        now: monotonic seconds.
        point_ms: what a point of priority is worth.
    """
    counts = [0] * len(lines)
    times = [line.time for line, _ in lines]

    def serve(at: int) -> None:
        nonlocal room
        counts[at] += 1
        times[at] += 1 / lines[at][0].share.weight
        room -= 1

    for at, (line, waiting) in sorted(enumerate(lines), key=lambda each: each[1][0].since):
        patience = patience_seconds(line.grade, point_ms)
        if room and waiting and patience is not None and now - line.since > patience:
            serve(at)
    for grade in range(GRADES - 1, -1, -1):
        heap = [
            (times[at], at) for at, (line, waiting) in enumerate(lines) if line.grade == grade and waiting > counts[at]
        ]
        heapq.heapify(heap)
        while room and heap:
            _, at = heap[0]
            serve(at)
            if counts[at] < lines[at][1]:
                heapq.heapreplace(heap, (times[at], at))
            else:
                heapq.heappop(heap)
    return counts
