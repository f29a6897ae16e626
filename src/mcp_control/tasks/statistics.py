"""How long tasks of a type take: counts and a bounded sketch of their times. Pure.

The sketch is DDSketch (Masson, Rim, Lee: "DDSketch", VLDB 2019): buckets that grow by a constant factor, so that every quantile is right
within 5 %, whatever the times are. When it holds many times, all weights are halved: what was long ago counts less and less.
"""

import math
from collections.abc import Mapping
from typing import Final

import msgspec
from msgspec.structs import replace

from mcp_control.kernel.changes import Field, Index, Kind
from mcp_control.security.model import DEFAULT_TENANT

_ACCURACY: Final = 0.05
_GAMMA: Final = (1 + _ACCURACY) / (1 - _ACCURACY)
_LOG_GAMMA: Final = math.log(_GAMMA)
_SHORTEST: Final = 0.001
_LONGEST: Final = 366 * 86_400.0
REMEMBERED: Final = 4096
"""From this many times on, older ones count half."""
_FORGOTTEN: Final = 0.1


class Statistic(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is known of a task type in a tenant.

    Attributes:
        completed, failed: attempts that ended so, ever.
        weights: by bucket, how many completed attempts took about so long.
    """

    id: str
    version: int
    tenant: str = DEFAULT_TENANT
    type: str
    completed: int = 0
    failed: int = 0
    weights: dict[int, float] = {}
    updated_at: int = 0


class Times(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds an attempt takes: half, 90 % and 99 % of those that completed took at most so long. `count`: attempts that completed."""

    count: int
    p50: float
    p90: float
    p99: float


class Tally:
    """Attempts that ended since a moment, in memory."""

    __slots__ = ("completed", "failed", "weights")

    def __init__(self) -> None:
        self.completed = 0
        self.failed = 0
        self.weights: dict[int, float] = {}

    def ran(self, seconds: float, completed: bool) -> None:
        """Count an attempt."""
        if completed:
            self.completed += 1
            at = bucket(seconds)
            self.weights[at] = self.weights.get(at, 0.0) + 1.0
        else:
            self.failed += 1


def bucket(seconds: float) -> int:
    """Return the bucket of a time."""
    return math.ceil(math.log(min(max(seconds, _SHORTEST), _LONGEST)) / _LOG_GAMMA)


def added(statistic: Statistic, tally: Tally, now: int) -> Statistic:
    """Return the statistic with what was counted."""
    weights = dict(statistic.weights)
    for at, weight in tally.weights.items():
        weights[at] = weights.get(at, 0.0) + weight
    while sum(weights.values()) > REMEMBERED:
        weights = {at: weight / 2 for at, weight in weights.items() if weight / 2 >= _FORGOTTEN}
    return replace(
        statistic,
        completed=statistic.completed + tally.completed,
        failed=statistic.failed + tally.failed,
        weights=weights,
        updated_at=now,
    )


def quantile(weights: Mapping[int, float], share: float) -> float | None:
    """Return the time in seconds that this share of attempts (0 to 1) took at most, within 5 %; None where nothing is known."""
    left = share * sum(weights.values())
    ordered = sorted(weights.items())
    for at, weight in ordered:
        left -= weight
        if left <= 0:
            return _middle(at)
    return _middle(ordered[-1][0]) if ordered else None


def _middle(at: int) -> float:
    return float(f"{2 * _GAMMA**at / (_GAMMA + 1):.3g}")


def times(statistic: Statistic) -> Times | None:
    """Return the times of a type; None where none has completed."""
    p50, p90, p99 = (quantile(statistic.weights, share) for share in (0.5, 0.9, 0.99))
    if p50 is None or p90 is None or p99 is None:
        return None
    return Times(count=statistic.completed, p50=p50, p90=p90, p99=p99)


STATISTIC_KIND: Final = Kind(
    name="statistic",
    fields=(Field("name"), Field("updated", "int")),
    indexes=(Index("statistic_name", ("name",), unique=True), Index("statistic_updated", ("updated", "id"))),
)
