"""Overload (promise G12): new work is shed first, what moves accepted work on is shed last."""

from collections.abc import Callable
from typing import Final, Literal

import msgspec

from mcp_control.kernel.errors import Overloaded

Weight = Literal["submit", "read", "keep"]


class Load(msgspec.Struct, frozen=True):
    """How busy the server is: submits under way, changes that wait for the store, seconds by which the event loop is late, queued tasks."""

    submits: int = 0
    waiting: int = 0
    lag: float = 0.0
    queued: int = 0


class Limits(msgspec.Struct, frozen=True):
    """From where on submits are shed, and after how many seconds to come back.

    Reads are shed at four times the lag; what keeps accepted work moving at the store's own bound only.
    """

    submits: int = 2000
    waiting: int = 8000
    lag: float = 0.5
    queued: int = 2_000_000
    after: float = 1.0


DEFAULT_LIMITS: Final = Limits()


def admit(weight: Weight, load: Load, limits: Limits = DEFAULT_LIMITS) -> float | None:
    """Return None where a request may go on, else the seconds after which to come back. Pure."""
    if weight == "submit":
        busy = load.submits >= limits.submits or load.waiting >= limits.waiting or load.queued >= limits.queued
        if load.lag >= limits.lag:
            return 2 * limits.after
        if busy:
            return limits.after
    elif weight == "read" and load.lag >= 4 * limits.lag:
        return 2 * limits.after
    return None


class Gate:
    """Counts what is under way and asks `admit`.

    Args:
        waiting: how many changes wait for the store right now.
        shed: hears of every refusal.

    Attributes:
        submits: submits under way.
        lag: how late the event loop is, in seconds; written by whoever measures it.
        queued: tasks that wait for an agent; written by whoever counts them.
    """

    __slots__ = ("_limits", "_shed", "lag", "queued", "submits", "waiting")

    def __init__(
        self, waiting: Callable[[], int], shed: Callable[[str], None], limits: Limits = DEFAULT_LIMITS
    ) -> None:
        self._limits = limits
        self._shed = shed
        self.waiting = waiting
        self.submits = 0
        self.lag = 0.0
        self.queued = 0

    def check(self, weight: Weight) -> None:
        """Let a request through. Raises Overloaded with the seconds to wait."""
        after = admit(weight, Load(self.submits, self.waiting(), self.lag, self.queued), self._limits)
        if after is not None:
            self._shed(weight)
            raise Overloaded("the server is busy with the work it has accepted; come back later", retry_after=after)
