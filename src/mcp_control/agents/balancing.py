"""Which of several fitting agents gets the next tasks: pure functions over what is known of their load."""

import heapq
from collections.abc import Sequence

import msgspec


class Candidate(msgspec.Struct, frozen=True):
    """A place where work could go: slots in all, how many tasks it can take, and whether it is only for what nobody else can take."""

    slots: int
    free: int
    last: bool = False


def least_loaded(candidates: Sequence[Candidate], count: int) -> list[int]:
    """Return for each of up to `count` tasks the position of the candidate that takes it, always the least loaded one.

    Load is the share of slots in use after the task; ties go to the earlier candidate, so the caller rotates the order to spread
    work over idle agents. Shorter than `count` when fewer slots are free.
    """
    if len(candidates) == 1:
        return [0] * min(count, candidates[0].free)
    heap = [
        ((candidate.slots - candidate.free + 1) / candidate.slots, place)
        for place, candidate in enumerate(candidates)
        if candidate.free > 0
    ]
    heapq.heapify(heap)
    left = [candidate.free for candidate in candidates]
    chosen: list[int] = []
    while heap and len(chosen) < count:
        load, place = heap[0]
        chosen.append(place)
        left[place] -= 1
        if left[place]:
            heapq.heapreplace(heap, (load + 1 / candidates[place].slots, place))
        else:
            heapq.heappop(heap)
    return chosen
