"""Statistics of task types: right within their accuracy, bounded, and kept by the server that leads."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_control.kernel.errors import Problem
from mcp_control.security.model import DEFAULT_TENANT, Actor
from mcp_control.storage.sqlite.store import SqliteStore
from mcp_control.tasks.history import TaskHistory
from mcp_control.tasks.statistics import REMEMBERED, STATISTIC_KIND, Statistic, Tally, added, quantile, times
from mcp_control.testing.clock import FakeClock

ANNA = Actor(id="user_anna", kind="user", roles=("administrator",))
NONE = Statistic(id="stat_x", version=0, type="t")
SECONDS = st.floats(min_value=0.001, max_value=1e6)


def _tally(seconds: list[float]) -> Tally:
    tally = Tally()
    for each in seconds:
        tally.ran(each, True)
    return tally


@given(st.lists(SECONDS, min_size=1, max_size=200), st.floats(min_value=0.01, max_value=1))
def test_quantiles_are_right_within_their_accuracy(seconds: list[float], share: float) -> None:
    """A quantile of the sketch is within 5 % of the time at its rank (and what rounding to three digits adds)."""
    found = quantile(_tally(seconds).weights, share)
    ranked = sorted(seconds)
    true = ranked[max(0, math.ceil(share * len(seconds) - 1e-9) - 1)]
    assert found is not None
    assert abs(found - true) <= 0.056 * true


@given(st.lists(SECONDS, max_size=50), st.lists(SECONDS, max_size=50))
def test_counting_in_parts_is_counting_at_once(first: list[float], second: list[float]) -> None:
    """What two passes wrote is what one pass would have written."""
    parts = added(added(NONE, _tally(first), 1), _tally(second), 2)
    whole = added(NONE, _tally([*first, *second]), 2)
    assert (parts.completed, parts.weights) == (whole.completed, whole.weights)


def test_history_is_bounded_and_follows_changes() -> None:
    """Weights never exceed their bound, and when tasks become slower, so does the history."""
    statistic = NONE
    for _ in range(20):
        statistic = added(statistic, _tally([0.01] * 1000), 1)
    assert sum(statistic.weights.values()) <= REMEMBERED
    assert statistic.completed == 20_000
    for _ in range(10):
        statistic = added(statistic, _tally([5.0] * 1000), 1)
    found = times(statistic)
    assert found is not None
    assert found.p50 == pytest.approx(5.0, rel=0.06)


async def test_the_leader_keeps_what_all_hear_and_types_nobody_uses_are_forgotten(tmp_path: Path) -> None:
    """Two servers hear the same; the one that leads writes it once; failures give no times; after 90 days it is gone."""
    problems: list[Problem] = []
    store = SqliteStore(tmp_path, fatal=problems.append)
    await store.open([STATISTIC_KIND], lambda _: None)
    try:
        clock = FakeClock()
        leader, other = TaskHistory(store, clock), TaskHistory(store, clock)
        for _ in range(2):
            for each in (leader, other):
                each.ran(DEFAULT_TENANT, "sum", 2.0, True)
                each.ran(DEFAULT_TENANT, "sum", 9.0, False)
                each.ran(DEFAULT_TENANT, "bad", 1.0, False)
                each.ran("elsewhere", "sum", 7.0, True)
            assert await leader.once(clock.now()) == 3
            assert await other.once(clock.now(), leading=False) == 0
        found = await other.times(DEFAULT_TENANT, ["sum", "bad", "unknown"])
        assert set(found) == {"sum"}
        assert (found["sum"].count, found["sum"].p50) == (2, pytest.approx(2.0, rel=0.06))
        first = await other.list(ANNA, limit=1)
        second = await other.list(ANNA, limit=1, cursor=first.next_cursor)
        shown = [*first.items, *second.items]
        assert [(view.type, view.completed, view.failed) for view in shown] == [("bad", 0, 2), ("sum", 2, 2)]
        assert second.next_cursor is None
        assert await leader.forget(clock.now()) == 0
        assert await leader.forget(clock.now() + 91 * 86_400_000) == 3
    finally:
        await store.close()
    assert not problems
