"""How agents do, judged by what they get done and not by their pulse: pure functions over what a server saw of one instance.

    slow      something takes far longer than 99 % of its type did: the agent is chosen last
    silent    it lives, and matching work waits, but it takes none, or does not begin what it was given
    stuck     everything it holds stands still, or its work loop does
    flapping  it loses its lease, or its connection, again and again

What stands still is fenced and goes to somebody else. An agent that is stuck, flapping, or sits on what it was given is quarantined;
after a time it gets one task, and how that ends decides whether it is back or stays away for twice as long (the half-open state of a
circuit breaker: Nygard, "Release It!", 2007).
"""

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec
from msgspec.structs import replace

from mcp_control.agents.model import Health, Verdict

_STALL_LEASES: Final = 3.0
_SLOW_AT_LEAST: Final = 1.0


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """From when on something counts. Times are seconds.

    Attributes:
        least_history: completed attempts of a type before its times say anything.
        slow_factor: times the 99th percentile of the type that make an attempt slow.
        stuck_factor, stuck_seconds: an attempt without a sign of life stands still after so many times the 99th percentile of its type,
            and not before `stuck_seconds`.
        silent_seconds: how long matching work may wait, or a task given be left alone.
        flapping_losses, flapping_connects: lost leases, or connections, within `window_seconds` that are too many.
        probe_seconds, probe_longest_seconds: first and longest time in quarantine; it doubles where the last was within `window_seconds`.
    """

    least_history: int = 50
    slow_factor: float = 3.0
    stuck_factor: float = 20.0
    stuck_seconds: float = 300.0
    silent_seconds: float = 60.0
    flapping_losses: int = 8
    flapping_connects: int = 60
    window_seconds: float = 600.0
    probe_seconds: float = 60.0
    probe_longest_seconds: float = 3600.0


class Expected(msgspec.Struct, frozen=True):
    """How long a type takes: attempts known, and seconds that 99 % of them took at most."""

    count: int
    p99: float


class Held(msgspec.Struct, frozen=True):
    """A task in hand: since when it runs, since when there was no sign of life (progress, a log line, its start). In seconds.

    `begun` is False while the agent has not said that it works on it.
    """

    task_id: str
    type: str
    begun: bool
    ran: float
    quiet: float


class Observed(msgspec.Struct, frozen=True, kw_only=True):
    """What a server saw of an instance.

    Attributes:
        lease_seconds: of its session.
        loop_still: seconds since its work loop moved, while it has tasks and heartbeats come.
        idle_while_waiting: seconds for which work it could do has waited, slots were free, and it asked for none.
        losses, connects: lost leases and connections of its agent within the window.
    """

    lease_seconds: float
    held: Sequence[Held] = ()
    loop_still: float = 0.0
    idle_while_waiting: float = 0.0
    losses: int = 0
    connects: int = 0


class Judgement(msgspec.Struct, frozen=True):
    """A verdict with its reason, what is to be fenced, and whether the agent is to be kept from work."""

    verdict: Verdict
    reason: str = ""
    fence: Sequence[str] = ()
    quarantine: bool = False


def judge(seen: Observed, history: Mapping[str, Expected], rules: Rules) -> Judgement:
    """Return the worst verdict that applies: flapping, stuck, silent, slow, ok."""
    still = [held.task_id for held in seen.held if held.begun and held.quiet > _still_after(held, history, rules)]
    left = [held.task_id for held in seen.held if not held.begun and held.ran > rules.silent_seconds]
    fence = still + left
    if seen.losses >= rules.flapping_losses:
        return Judgement("flapping", f"{seen.losses} leases lost in {rules.window_seconds:g} s", fence, True)
    if seen.connects >= rules.flapping_connects:
        return Judgement("flapping", f"connected {seen.connects} times in {rules.window_seconds:g} s", fence, True)
    if seen.held and seen.loop_still > _STALL_LEASES * seen.lease_seconds:
        everything = [held.task_id for held in seen.held]
        return Judgement("stuck", f"its work loop has stood still for {seen.loop_still:.0f} s", everything, True)
    if still and len(still) == len(seen.held):
        return Judgement("stuck", f"all {len(still)} tasks it holds stand still", fence, True)
    if left:
        return Judgement("silent", f"has not begun {len(left)} tasks it was given", fence, True)
    if seen.idle_while_waiting > rules.silent_seconds:
        return Judgement("silent", f"took no work for {seen.idle_while_waiting:.0f} s while some waited", fence)
    if still:
        return Judgement("slow", f"{len(still)} of {len(seen.held)} tasks it holds stand still", fence)
    late = [held for held in seen.held if held.begun and held.ran > _slow_after(held, history, rules)]
    if late:
        worst = max(late, key=lambda held: held.ran)
        usual = history[worst.type].p99
        return Judgement("slow", f"works on a {worst.type} for {worst.ran:.1f} s; 99 % took at most {usual:g} s")
    return Judgement("ok")


def _known(held: Held, history: Mapping[str, Expected], rules: Rules) -> Expected | None:
    found = history.get(held.type)
    return found if found is not None and found.count >= rules.least_history else None


def _still_after(held: Held, history: Mapping[str, Expected], rules: Rules) -> float:
    known = _known(held, history, rules)
    return float("inf") if known is None else max(rules.stuck_seconds, rules.stuck_factor * known.p99)


def _slow_after(held: Held, history: Mapping[str, Expected], rules: Rules) -> float:
    known = _known(held, history, rules)
    return float("inf") if known is None else max(_SLOW_AT_LEAST, rules.slow_factor * known.p99)


def tripped(health: Health, verdict: Verdict, reason: str, now: int, rules: Rules) -> Health:
    """Return the health of an agent that is quarantined now; longer each time, unless it has been well for a whole window since."""
    recent = health.probing or now - health.since < rules.window_seconds * 1000
    trips = health.trips + 1 if health.trips and recent else 1
    seconds = min(rules.probe_longest_seconds, rules.probe_seconds * 2.0 ** min(trips - 1, 30))
    return Health(verdict=verdict, since=now, reason=reason, trips=trips, until=now + round(seconds * 1000))


def probed(health: Health) -> Health:
    """Return the health of an agent that may show with one task that it is well."""
    return replace(health, until=None, probing=True)


def restored(health: Health, now: int) -> Health:
    """Return the health of an agent that is well again; how often it was not is remembered."""
    return Health(since=now, trips=health.trips)
