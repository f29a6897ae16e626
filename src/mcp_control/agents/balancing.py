"""Which of several fitting agents gets the next tasks: pure functions over what is known of their load and of their speed.

    least_loaded  the smallest share of slots in use after the task
    fastest       the shortest time its tasks of this type took of late, then the least loaded; who is not known comes first
    round_robin   one after the other, whatever they have in hand

Whatever the strategy: the agent that a task's key belongs to comes before all others, one that is slow after them.
"""

import heapq
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Final

import msgspec

from mcp_control.agents.model import Strategy

BUCKETS: Final = 64
_WEIGHT: Final = 0.2
_HALF_LIFE: Final = 300.0


class Candidate(msgspec.Struct, frozen=True):
    """A place where work could go.

    Attributes:
        slots: in all.
        free: tasks it can take now.
        last: it is only for what nobody else can take.
        seconds: how long a task of this type takes there; 0 where that is not known.
        home: what is to be placed belongs there.
    """

    slots: int
    free: int
    last: bool = False
    seconds: float = 0.0
    home: bool = False


def spread(candidates: Sequence[Candidate], count: int, strategy: Strategy = "least_loaded") -> list[int]:
    """Return for each of up to `count` tasks the position of the candidate that takes it.

    Ties go to the earlier candidate, so the caller rotates the order to spread work over idle agents. Shorter than `count` when fewer
    slots are free.
    """
    if len(candidates) == 1:
        return [0] * min(count, candidates[0].free)
    heap = []
    for place, candidate in enumerate(candidates):
        if candidate.free > 0:
            load = (candidate.slots - candidate.free + 1) / candidate.slots
            first = candidate.seconds if strategy == "fastest" else 0.0
            turn = 0.0 if strategy == "round_robin" else load
            heap.append((0 if candidate.home else 2 if candidate.last else 1, first, turn, place))
    heapq.heapify(heap)
    left = [candidate.free for candidate in candidates]
    chosen: list[int] = []
    while heap and len(chosen) < count:
        tier, first, turn, place = heap[0]
        chosen.append(place)
        left[place] -= 1
        if left[place]:
            step = 1.0 if strategy == "round_robin" else 1 / candidates[place].slots
            heapq.heapreplace(heap, (tier, first, turn + step, place))
        else:
            heapq.heappop(heap)
    return chosen


class Average(msgspec.Struct, frozen=True, gc=False):
    """A moving average of seconds, and when it was last added to (monotonic seconds)."""

    seconds: float
    at: float


def added(average: Average | None, seconds: float, now: float) -> Average:
    """Return the average with one more time; the newest counts a fifth."""
    if average is None:
        return Average(seconds, now)
    return Average(average.seconds + _WEIGHT * (seconds - average.seconds), now)


def estimates(averages: Sequence[Average | None], now: float) -> list[float]:
    """Return what to expect of each now.

    What is old says less and less: it approaches the best one known, so that who was slow is tried again.
    """
    known = [average.seconds for average in averages if average is not None]
    best = min(known, default=0.0)
    return [
        0.0 if average is None else best + (average.seconds - best) * 0.5 ** (max(0.0, now - average.at) / _HALF_LIFE)
        for average in averages
    ]


def bucket_of(key: str) -> int:
    """Return the bucket of a key, 0 to 63: keys of one bucket belong to the same agent, so that there are never more lanes than buckets."""
    return blake2b(key.encode(), digest_size=2).digest()[0] % BUCKETS


def home_of(bucket: int, agents: Iterable[str]) -> str | None:
    """Return the agent that a bucket belongs to, the same on every server; None without agents.

    Rendezvous hashing (Thaler and Ravishankar, "Using name-based mappings to increase hit rates", IEEE/ACM ToN 1998): when an agent comes
    or goes, only what belongs to it moves.
    """
    return max(agents, key=lambda agent: blake2b(f"{bucket}/{agent}".encode(), digest_size=8).digest(), default=None)
