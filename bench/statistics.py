"""Medians and percentiles, and the shape of a result line."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

Line = dict[str, Any]


def median(values: Iterable[float]) -> float:
    """Return the median."""
    return float(statistics.median(values))


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value below which `percent` of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def rounded(value: float) -> float:
    """Return milliseconds as they are shown."""
    return round(value, 2)
