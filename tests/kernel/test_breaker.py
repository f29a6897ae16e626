"""A breaker leaves a failing peer alone, probes it with one call at a time, and comes back by itself."""

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_control.kernel.breaker import Breaker, BreakerOpen
from mcp_control.kernel.breaker_rules import (
    CALL,
    CLOSED,
    TRANSITIONS,
    BreakerStatus,
    Policy,
    Position,
    abandoned,
    failed,
    judged,
    news,
    probing,
    remaining,
    succeeded,
)
from mcp_control.testing.clock import FakeClock

CHANCE = st.floats(0, 1, exclude_max=True)
POLICIES = st.builds(
    Policy,
    failures=st.integers(1, 5),
    open_seconds=st.floats(0.1, 30),
    longest_seconds=st.floats(30, 300),
    jitter=st.floats(0, 0.5),
    probe_seconds=st.floats(0.5, 60),
)
STEP = st.tuples(
    st.sampled_from(["fail", "succeed", "abandon", "enter", "wait"]), st.integers(0, 9), st.floats(0, 40), CHANCE
)


@given(POLICIES, st.lists(STEP, max_size=60))
def test_whatever_happens_there_is_one_probe_and_a_way_back(
    policy: Policy, steps: list[tuple[str, int, float, float]]
) -> None:
    """Only moves of the table happen, two probes never count at once, it is open after enough failures, and it always gets to probe."""
    at, now, row = CLOSED, 0.0, 0
    under_way: list[int] = []
    began: dict[int, float] = {}
    for verb, place, seconds, chance in steps:
        before = at
        if verb == "wait":
            now += seconds
            continue
        if verb == "enter":
            at = CLOSED if before.state == "closed" else probing(before, policy, now)
            at = before if before.state == "closed" else at
            if before.state == "closed":
                under_way.append(CALL)
            elif at is not before:
                previous = began.get(before.probe)
                assert before.state == "open" or previous is None or now - previous >= policy.probe_seconds
                began[at.probe] = now
                under_way.append(at.probe)
                verb = "probe"
            else:
                continue
        elif under_way:
            permit = under_way.pop(place % len(under_way))
            if verb == "fail":
                at = failed(before, policy, permit, now, chance)
                row = row + 1 if permit == CALL and before.state == "closed" else row
            elif verb == "succeed":
                at = succeeded(before, permit)
                row = 0 if permit == CALL and before.state == "closed" else row
            else:
                at = abandoned(before, permit, now)
            if before.state != "closed" and permit != before.probe:
                assert at == before, "what began before decides nothing"
        if at.state != before.state:
            assert at.state in TRANSITIONS[verb][before.state]
        if at.state == "closed":
            row = at.failures
            assert row < policy.failures
        elif before.state == "closed":
            assert row == policy.failures
        longest = max(policy.longest_seconds * (1 + policy.jitter), policy.probe_seconds)
        assert remaining(at, now) <= longest + 1e-6
    if at.state != "closed":
        now += remaining(at, now) + 1e-6
        due = probing(at, policy, now)
        assert due.state == "half_open"
        assert due.probe == at.probe + 1
        assert probing(due, policy, now) is due
        assert succeeded(due, due.probe) == Position(probe=due.probe)


@given(POLICIES, st.lists(CHANCE, min_size=1, max_size=12))
def test_pauses_grow_up_to_the_longest(policy: Policy, chances: list[float]) -> None:
    """Each probe that fails makes the next pause longer, none is longer than the longest and its jitter, none shorter than the first."""
    at, now = CLOSED, 0.0
    for _ in range(policy.failures):
        at = failed(at, policy, CALL, now, chances[0])
    for number, chance in enumerate(chances):
        pause = remaining(at, now)
        usual = min(policy.longest_seconds, policy.open_seconds * 2.0**number)
        assert usual * 0.999 <= pause <= usual * (1 + policy.jitter) * 1.001
        now = at.due
        probe = probing(at, policy, now)
        at = failed(probe, policy, probe.probe, now, chance)


class _Answer(Exception):
    def __init__(self, status: int) -> None:
        super().__init__()
        self.status_code = status


class _Wrapped(Exception):
    def __init__(self, status: int) -> None:
        super().__init__()
        self.response = _Answer(status)


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (ConnectionError(), "failed"),
        (TimeoutError(), "failed"),
        (_Answer(503), "failed"),
        (_Answer(404), "answered"),
        (_Wrapped(422), "answered"),
        (_Wrapped(429), "failed"),
        (_Wrapped(408), "failed"),
        (asyncio.CancelledError(), "unknown"),
    ],
)
def test_a_wrong_call_is_not_the_peers_failure(error: BaseException, verdict: str) -> None:
    """An answer of 4xx says that the peer is well, but for those that ask to be left alone; a cancellation says nothing."""
    assert judged(error) == verdict


def _breaker(clock: FakeClock, failures: int = 2) -> Breaker:
    policy = Policy(failures=failures, open_seconds=10, probe_seconds=5)
    return Breaker("peer", clock, policy, fallback="nothing", chance=lambda: 0.0)


async def _fails() -> str:
    raise ConnectionError


async def _answers() -> str:
    return "answer"


async def test_callers_get_the_fallback_while_the_peer_is_left_alone() -> None:
    """A failed call and a refused one both end in the fallback; a wrong call is raised; without a fallback both are raised."""
    clock = FakeClock()
    breaker = _breaker(clock)

    async def instead() -> str:
        return "instead"

    async def wrong() -> str:
        raise _Answer(400)

    with pytest.raises(_Answer):
        await breaker.call(wrong, fallback=instead)
    assert await breaker.call(_fails, fallback=instead) == "instead"
    with pytest.raises(ConnectionError):
        await breaker.call(_fails)
    with pytest.raises(BreakerOpen) as refused:
        await breaker.call(_answers)
    assert refused.value.retry_after == 10
    assert await breaker.call(_answers, fallback=instead) == "instead"
    clock.advance(10)
    assert await breaker.call(_answers, fallback=instead) == "answer"
    assert (breaker.state, breaker.refused) == ("closed", 2)


async def test_a_call_that_takes_too_long_is_a_failure() -> None:
    """The limit of a call is the breaker's to judge, unlike a cancellation from outside."""
    breaker = _breaker(FakeClock(), failures=1)
    with pytest.raises(TimeoutError):
        await breaker.call(asyncio.Event().wait, seconds=0.01)
    assert (breaker.state, breaker.status().error) == ("open", "TimeoutError")


async def test_a_probe_that_is_cancelled_gives_way_to_the_next_caller() -> None:
    """Nobody else gets through while it is out; when it is cancelled the next one is the probe, and closes the breaker."""
    clock = FakeClock()
    breaker = _breaker(clock, failures=1)
    with pytest.raises(ConnectionError):
        await breaker.call(_fails)
    clock.advance(10)
    probe = asyncio.ensure_future(breaker.call(asyncio.Event().wait))
    await asyncio.sleep(0)
    assert breaker.state == "half_open"
    with pytest.raises(BreakerOpen):
        await breaker.call(_answers)
    probe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probe
    assert await breaker.call(_answers) == "answer"
    assert breaker.state == "closed"


def test_its_state_is_told_with_times_people_can_read() -> None:
    """Since when, how often, when the next probe may begin, and what kind of error it was; each move is heard once."""
    clock = FakeClock()
    heard: Counter[str] = Counter()
    policy = Policy(failures=1, open_seconds=10, jitter=0)
    breaker = Breaker("peer", clock, policy, fallback="later", moved=lambda: heard.update([breaker.state]))
    clock.advance(3)
    breaker.failed(error=ConnectionError("secret"))
    assert breaker.status() == BreakerStatus(
        name="peer",
        state="open",
        since=clock.now(),
        failures=1,
        opened=1,
        probe_at=clock.now() + 10_000,
        error="ConnectionError",
        fallback="later",
    )
    clock.advance(10)
    breaker.succeeded(breaker.enter())
    assert (breaker.status().state, breaker.status().since, breaker.status().probe_at) == ("closed", clock.now(), None)
    assert heard == {"open": 1, "half_open": 1, "closed": 1}


def _at(state: str, opened: int) -> list[BreakerStatus]:
    return [BreakerStatus(name="peer", state=state, opened=opened)]  # type: ignore[arg-type]  # one of the states


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ([], _at("closed", 0), []),
        ([], _at("open", 1), ["opened"]),
        (_at("open", 1), _at("half_open", 1), []),
        (_at("half_open", 1), _at("open", 1), []),
        (_at("half_open", 1), _at("closed", 1), ["closed"]),
        (_at("closed", 1), _at("closed", 2), ["opened", "closed"]),
        (_at("closed", 1), _at("half_open", 2), ["opened"]),
        (_at("closed", 1), [], []),
    ],
)
def test_what_happened_between_two_reports_is_told_once(
    before: list[BreakerStatus], after: list[BreakerStatus], told: list[str]
) -> None:
    """Opening and closing are events; probes are not."""
    assert [verb for verb, _ in news(before, after)] == told
