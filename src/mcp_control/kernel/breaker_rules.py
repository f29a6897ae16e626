"""The rules of circuit breakers: pure functions over one small state. Time (monotonic seconds) and chance are arguments.

A breaker leaves a peer alone that fails again and again, so that nobody waits for it and it is not kept down by those who ask
(Nygard, "Release It!", 2007, chapter 5). After a pause one call goes through as a probe; how it ends decides.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Final, Literal

import msgspec
from msgspec.structs import replace

State = Literal["closed", "open", "half_open"]
STATES: Final[tuple[State, ...]] = ("closed", "open", "half_open")
Verdict = Literal["failed", "answered", "unknown"]
NAME_MAX: Final = 64
NAMES_MAX: Final = 20
CALL: Final = 0

TRANSITIONS: Final[Mapping[str, Mapping[State, tuple[State, ...]]]] = MappingProxyType(
    {
        "fail": {"closed": ("open",), "half_open": ("open",)},
        "succeed": {"half_open": ("closed",)},
        "probe": {"open": ("half_open",)},
        "abandon": {"half_open": ("open",)},
    }
)
"""verb -> state it starts from -> states it may change to. Everything begins `closed`."""


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """When a breaker opens, and for how long.

    Attributes:
        failures: failed calls in a row that open it, 1 or more.
        open_seconds: the first pause before a probe; each probe that fails makes the next one `factor` times as long.
        longest_seconds: the most that a pause is, but for its jitter.
        jitter: up to so many times the pause is added, so that many callers do not probe at once.
        probe_seconds: a probe that has not ended by then is lost, and another one may begin.
        by_calls: whether a call may be the probe; if not, somebody probes on purpose and no caller ever waits for a peer that hangs.
    """

    failures: int = 5
    open_seconds: float = 30.0
    factor: float = 2.0
    longest_seconds: float = 300.0
    jitter: float = 0.1
    probe_seconds: float = 60.0
    by_calls: bool = True


class Position(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Where a breaker stands.

    Attributes:
        failures: failed calls in a row.
        trips: pauses in a row, since something last succeeded.
        due: monotonic seconds from which a probe may begin; means nothing while it is closed.
        probe: number of the last probe, 0 before the first; an answer of an earlier one decides nothing.
    """

    state: State = "closed"
    failures: int = 0
    trips: int = 0
    due: float = 0.0
    probe: int = 0


CLOSED: Final = Position()


def failed(at: Position, policy: Policy, permit: int, now: float, chance: float) -> Position:
    """Hear that a call (`permit` is `CALL`) or a probe (its number) failed. What began before the breaker opened changes nothing.

    Args:
        chance: random, in [0, 1), for the jitter.
    """
    if permit == CALL:
        if at.state != "closed":
            return at
        counted = replace(at, failures=at.failures + 1)
        return counted if counted.failures < policy.failures else _opened(counted, policy, now, chance)
    if at.state != "half_open" or permit != at.probe:
        return at
    return _opened(replace(at, failures=at.failures + 1), policy, now, chance)


def _opened(at: Position, policy: Policy, now: float, chance: float) -> Position:
    # The exponent is bounded so that years of failures cannot overflow the float.
    pause = min(policy.longest_seconds, policy.open_seconds * policy.factor ** min(at.trips, 64))
    return replace(at, state="open", trips=at.trips + 1, due=now + pause * (1 + policy.jitter * chance))


def succeeded(at: Position, permit: int) -> Position:
    """Hear that a call or a probe was answered. A call that began before the breaker opened does not close it."""
    if permit == CALL:
        return at if at.state != "closed" or not at.failures else replace(at, failures=0)
    if at.state != "half_open" or permit != at.probe:
        return at
    return Position(probe=at.probe)


def probing(at: Position, policy: Policy, now: float) -> Position:
    """Begin a probe where one is due; returns `at` itself where none is, or one is under way."""
    if at.state == "closed" or now < at.due:
        return at
    return replace(at, state="half_open", probe=at.probe + 1, due=now + policy.probe_seconds)


def abandoned(at: Position, permit: int, now: float) -> Position:
    """Hear that a probe ended without saying anything of the peer, as when its caller was cancelled: the next may begin at once."""
    if permit == CALL or at.state != "half_open" or permit != at.probe:
        return at
    return replace(at, state="open", due=now)


def remaining(at: Position, now: float) -> float:
    """Return the seconds until a probe may begin; 0 where it may, or the breaker is closed."""
    return 0.0 if at.state == "closed" else max(0.0, at.due - now)


# --- what is told of breakers ---------------------------------------------------------------------------------------


class BreakerStatus(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A breaker as its owner tells of it. Times are wall milliseconds.

    Attributes:
        since: when it last left, or came back to, `closed`.
        failures: failed calls in a row.
        opened: how often it opened since its process began.
        probe_at: when the next probe may begin; None while it is closed.
        error: the kind of the last failure, e.g. `ConnectError`; without its words, which may hold what is nobody's business.
        fallback: what is done instead of a call.
    """

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=NAME_MAX)]
    state: State = "closed"
    since: int = 0
    failures: int = 0
    opened: int = 0
    probe_at: int | None = None
    error: Annotated[str, msgspec.Meta(max_length=200)] = ""
    fallback: Annotated[str, msgspec.Meta(max_length=200)] = ""


Statuses = Annotated[list[BreakerStatus], msgspec.Meta(max_length=NAMES_MAX)]


def news(
    before: Sequence[BreakerStatus], after: Sequence[BreakerStatus]
) -> list[tuple[Literal["opened", "closed"], BreakerStatus]]:
    """Return what has happened between two reports of one owner; one that opened and closed in between did both."""
    known = {status.name: status for status in before}
    found: list[tuple[Literal["opened", "closed"], BreakerStatus]] = []
    for status in after:
        was = known.get(status.name)
        was_open = was is not None and was.state != "closed"
        again = status.opened > (0 if was is None else was.opened)
        if status.state != "closed":
            if not was_open:
                found.append(("opened", status))
        elif was_open or again:
            if not was_open:
                found.append(("opened", status))
            found.append(("closed", status))
    return found


def judged(error: BaseException) -> Verdict:
    """Say what an error tells of the peer that was called: it failed, it answered, or nothing.

    An answer of 4xx means that the peer is well and the call was wrong, but for 408, 425 and 429, with which it asks to be left alone.
    The status is looked for where the HTTP libraries keep it. What is not an `Exception` (a cancellation) tells nothing.
    """
    if not isinstance(error, Exception):
        return "unknown"
    response = getattr(error, "response", None)
    for holder, name in ((response, "status_code"), (error, "status_code"), (response, "status"), (error, "status")):
        status = getattr(holder, name, None)
        if isinstance(status, int):
            return "answered" if 400 <= status < 500 and status not in (408, 425, 429) else "failed"
    return "failed"
