"""Verdicts on agents: pure rules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_control.agents.health import Expected, Held, Observed, Rules, judge, probed, restored, tripped
from mcp_control.agents.model import VERDICTS, Health

RULES = Rules()
HISTORY = {"fast": Expected(1000, 0.1), "long": Expected(1000, 100.0), "new": Expected(3, 0.1)}
HELD = st.builds(
    Held,
    st.uuids().map(str),
    st.sampled_from(["fast", "long", "new", "unheard"]),
    st.booleans(),
    st.floats(0, 10_000),
    st.floats(0, 10_000),
)
SEEN = st.builds(
    Observed,
    lease_seconds=st.floats(2, 60),
    held=st.lists(HELD, max_size=6),
    loop_still=st.floats(0, 1000),
    idle_while_waiting=st.floats(0, 200),
    losses=st.integers(0, 10),
    connects=st.integers(0, 80),
)


def _held(
    kind: str = "fast", ran: float = 0.0, quiet: float | None = None, begun: bool = True, name: str = "t"
) -> Held:
    return Held(name, kind, begun, ran, ran if quiet is None else quiet)


@pytest.mark.parametrize(
    ("seen", "verdict", "fence", "quarantine"),
    [
        (Observed(lease_seconds=10), "ok", [], False),
        (Observed(lease_seconds=10, held=[_held(ran=0.2)]), "ok", [], False),
        (Observed(lease_seconds=10, held=[_held(ran=2)]), "slow", [], False),
        (Observed(lease_seconds=10, held=[_held(ran=400)]), "stuck", ["t"], True),
        (Observed(lease_seconds=10, held=[_held(ran=400, quiet=1)]), "slow", [], False),
        (Observed(lease_seconds=10, held=[_held(ran=400), _held(name="u")]), "slow", ["t"], False),
        (Observed(lease_seconds=10, held=[_held("long", 400)]), "slow", [], False),
        (Observed(lease_seconds=10, held=[_held("long", 250)]), "ok", [], False),
        (Observed(lease_seconds=10, held=[_held("new", 9999)]), "ok", [], False),
        (Observed(lease_seconds=10, held=[_held("unheard", 9999)]), "ok", [], False),
        (Observed(lease_seconds=10, held=[_held(ran=61, begun=False)]), "silent", ["t"], True),
        (Observed(lease_seconds=10, idle_while_waiting=61), "silent", [], False),
        (Observed(lease_seconds=10, held=[_held("new")], loop_still=31), "stuck", ["t"], True),
        (Observed(lease_seconds=10, loop_still=31), "ok", [], False),
        (Observed(lease_seconds=10, losses=8), "flapping", [], True),
        (Observed(lease_seconds=10, connects=5), "ok", [], False),
        (Observed(lease_seconds=10, connects=60), "flapping", [], True),
    ],
)
def test_verdicts_follow_from_what_is_done(seen: Observed, verdict: str, fence: list[str], quarantine: bool) -> None:
    """Progress against the history of the type decides, and what stands still is what is fenced."""
    found = judge(seen, HISTORY, RULES)
    assert (found.verdict, list(found.fence), found.quarantine) == (verdict, fence, quarantine)
    assert bool(found.reason) == (verdict != "ok")


@given(seen=SEEN)
def test_nobody_is_judged_by_what_is_not_known(seen: Observed) -> None:
    """Without a history nothing is slow or stands still; only what was never begun, or a loop that stands still, is fenced."""
    found = judge(seen, {}, RULES)
    assert found.verdict in VERDICTS
    stalled = bool(seen.held) and seen.loop_still > 3 * seen.lease_seconds
    flapping = seen.losses >= RULES.flapping_losses or seen.connects >= RULES.flapping_connects
    for held in seen.held:
        if held.task_id in found.fence and not (stalled and not flapping):
            assert not held.begun
            assert held.ran > RULES.silent_seconds


@given(seen=SEEN, more=st.floats(0, 1000))
def test_more_progress_never_makes_a_verdict_worse(seen: Observed, more: float) -> None:
    """Where every task showed a sign of life later, and began later, no more tasks are fenced."""
    better = Observed(
        lease_seconds=seen.lease_seconds,
        held=[Held(h.task_id, h.type, h.begun, max(0, h.ran - more), max(0, h.quiet - more)) for h in seen.held],
        loop_still=max(0, seen.loop_still - more),
        idle_while_waiting=seen.idle_while_waiting,
        losses=seen.losses,
        connects=seen.connects,
    )
    flapping = judge(seen, HISTORY, RULES).verdict == "flapping"
    if not flapping:
        assert set(judge(better, HISTORY, RULES).fence) <= set(judge(seen, HISTORY, RULES).fence)


@given(outcomes=st.lists(st.tuples(st.booleans(), st.integers(0, 3_000_000)), max_size=12))
def test_quarantine_doubles_with_each_failure_and_is_bounded(outcomes: list[tuple[bool, int]]) -> None:
    """A failed probe doubles the time up to the longest; one that was well for a whole window begins anew."""
    now = 1_000_000
    health = tripped(Health(), "stuck", "why", now, RULES)
    assert (health.trips, health.until) == (1, now + 60_000)
    for succeeded, later in outcomes:
        before = health
        assert before.until is not None
        now = before.until
        health = probed(before)
        assert (health.until, health.probing) == (None, True)
        well = 0
        if succeeded:
            health = restored(health, now)
            assert (health.verdict, health.probing) == ("ok", False)
            well = later
            now += later
        health = tripped(health, "stuck", "again", now, RULES)
        assert health.trips == (1 if well >= 600_000 else before.trips + 1)
        assert health.until is not None
        assert health.until - now == min(3_600_000, 60_000 * 2 ** (health.trips - 1))
