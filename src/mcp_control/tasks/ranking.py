"""The order in which waiting tasks get their turn, as one number that never changes while they wait. Pure.

A task's rank is its virtual start: the moment it was due to wait, later by some seconds for every point its priority lacks to 100. Two
tasks that wait grow older at the same speed, so who comes first never changes and nothing has to be sorted again; and since the
difference that priorities make is bounded, so is what can overtake a task (`longest_overtaking_ms`).
"""

from collections.abc import Callable
from typing import Final

from mcp_control.storage.ports import RANK_MAX

PRIORITY_MAX: Final = 100
Expected = Callable[[str, str], int]
"""Returns how long tasks usually take, in milliseconds, by tenant and type; 0 where that is not known."""
POINT_MS: Final = 6000
"""What one point of priority is worth by default, in milliseconds of waiting."""
ORDER_SHIFT: Final = 20
"""A place in line is wall milliseconds, shifted, so that places of one millisecond differ."""
_RANK_SHIFT: Final = 10  # a rank counts 1/1024 ms, so that those of one millisecond keep their places
ORDER_STEP: Final = 1 << (ORDER_SHIFT - _RANK_SHIFT)
"""Places in line differ by so much, so that their ranks do."""


def rank_of(order: int, priority: int, deadline_at: int | None, expected_ms: int, point_ms: int = POINT_MS) -> int:
    """Return the rank of a task, lower first.

    A deadline moves it forward to the last moment at which it can begin and still end in time, where that is earlier: among tasks that
    have to hurry, the earliest deadline comes first (EDF; Liu and Layland, 1973).

    Args:
        order: its place in line.
        priority: 0 to 100.
        deadline_at: wall milliseconds.
        expected_ms: how long tasks of its type usually take, 0 where that is not known.
        point_ms: what one point of priority is worth, in milliseconds of waiting.
    """
    rank = (order >> (ORDER_SHIFT - _RANK_SHIFT)) + ranks((PRIORITY_MAX - priority) * point_ms)
    if deadline_at is not None:
        rank = min(rank, ranks(deadline_at - expected_ms))
    return min(max(rank, 0), RANK_MAX)


def unknown(tenant: str, task_type: str) -> int:
    """Know of no type how long its tasks take."""
    return 0


def ranks(ms: int) -> int:
    """Return how far apart ranks are that differ by so many milliseconds."""
    return ms << _RANK_SHIFT


def longest_overtaking_ms(priority: int, expected_ms: int, point_ms: int = POINT_MS) -> int:
    """Return how long after a task of this priority another may come that is served before it; none that comes later is.

    Args:
        expected_ms: the longest that tasks with a deadline are expected to take.
    """
    return (PRIORITY_MAX - priority) * point_ms + expected_ms
