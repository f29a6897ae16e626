"""When a waiting task may begin: what is ahead of it, on the slots that serve its lane, each as long as its type usually takes. Pure."""

import heapq
from collections.abc import Mapping, Sequence
from typing import Final

from mcp_control.tasks.statistics import Times

_STEPS: Final = 20_000


def left_ms(times: Times, elapsed_ms: int) -> int:
    """Return how much longer an attempt may take that has taken so long: until the next of the quantiles it has not passed yet.

    One that has passed them all is expected to take its median once more.
    """
    for seconds in (times.p50, times.p90, times.p99):
        if seconds * 1000 > elapsed_ms:
            return round(seconds * 1000) - elapsed_ms
    return round(times.p50 * 1000)


def expected_start(
    now: int,
    free: int,
    running: Sequence[tuple[str, int]],
    ahead: Sequence[tuple[str, int]],
    times: Mapping[str, Times],
) -> int | None:
    """Return the wall milliseconds at which a task may begin; None where that cannot be said: a type without a history, or no slot.

    Args:
        free: slots that are free now.
        running: what holds the other slots: type, and since when.
        ahead: what comes before it: type, and how many tasks.
        times: of the types.
    """
    waiting = [(name, count) for name, count in ahead if count]
    if any(name not in times for name, _ in waiting):
        return None
    slots = [now] * free + [now + left_ms(times[name], now - since) for name, since in running if name in times]
    if not slots:
        return None
    total = sum(count for _, count in waiting)
    if total > _STEPS:
        work = sum(count * times[name].p50 * 1000 for name, count in waiting)
        return round(sum(slots) / len(slots) + work / len(slots))
    heapq.heapify(slots)
    for name, count in waiting:
        for _ in range(count):
            heapq.heapreplace(slots, slots[0] + round(times[name].p50 * 1000))
    return slots[0]


def turns_before(own: int, weight: float, others: Sequence[tuple[float, int]]) -> list[int]:
    """Return how many tasks of each other share come before a task that is behind `own` tasks of its own share.

    Args:
        weight: of its share.
        others: of each other share that waits: its weight, and its tasks.
    """
    return [min(waiting, round((own + 1) * other / weight)) for other, waiting in others]
