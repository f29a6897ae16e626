"""The pure rules of agents: matching, balancing, registration, states."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_control.agents.balancing import Candidate, spread
from mcp_control.agents.matching import Demand, in_range, misfit, parse_range
from mcp_control.agents.model import Agent, AgentSpec, AgentState, Capability, Drain, Resources
from mcp_control.agents.registration import check, settle
from mcp_control.kernel.errors import Invalid

CANDIDATES = st.lists(
    st.integers(1, 8).flatmap(lambda slots: st.builds(Candidate, st.just(slots), st.integers(0, slots))), max_size=8
)


@given(candidates=CANDIDATES, count=st.integers(0, 40))
def test_balancing_never_gives_more_than_is_free_and_takes_the_spread(candidates: list[Candidate], count: int) -> None:
    """As many tasks as fit are placed, nobody over its free slots, each on a candidate that is the least loaded after it."""
    chosen = spread(candidates, count)
    assert len(chosen) == min(count, sum(candidate.free for candidate in candidates))
    left = [candidate.free for candidate in candidates]
    for place in chosen:
        load = [(c.slots - left[n] + 1) / c.slots for n, c in enumerate(candidates)]
        assert left[place] > 0
        assert load[place] <= min(load[n] for n, free in enumerate(left) if free) + 1e-9
        left[place] -= 1


def test_balancing_spreads_over_equal_agents() -> None:
    """Equal agents get equal shares."""
    assert sorted(spread([Candidate(4, 4)] * 3, 6)) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("1.4.2", "*", True),
        ("1.4.2", "1", True),
        ("1.4.2", "1.4", True),
        ("1.4.2", "2", False),
        ("10", "1", False),
        ("1.4.2", ">=1.2,<2", True),
        ("2.0", ">=1.2,<2", False),
        ("2.0b1", ">=1", True),
        ("night", "*", True),
        ("night", "1", False),
    ],
)
def test_version_ranges(version: str, wanted: str, fits: bool) -> None:
    """`*` is any, a number is that version and what is below it, comparisons are comparisons."""
    assert in_range(version, wanted) is fits


def test_what_is_no_range_is_said_so() -> None:
    """A text that is no version range raises ValueError."""
    with pytest.raises(ValueError, match="range"):
        parse_range("~~1")


SPEC = AgentSpec(
    name="w",
    capabilities=[Capability(name="echo", version="1.2"), Capability(name="gpu", version="3")],
    labels={"zone": "a"},
    resources=Resources(cpu=4, memory_mb=1000, gpu=1),
)


@pytest.mark.parametrize(
    ("demand", "reason"),
    [
        ({}, None),
        ({"agent": "w"}, None),
        ({"agent": "agent_1"}, None),
        ({"agent": "x"}, "pinned to agent x"),
        ({"type": "sum"}, "lacks the capability sum"),
        ({"type_version": "2"}, "has echo 1.2, wanted 2"),
        ({"capabilities": {"gpu": ">=3"}}, None),
        ({"capabilities": {"gpu": ">=4"}}, "has gpu 3, wanted >=4"),
        ({"labels": {"zone": "a"}}, None),
        ({"labels": {"zone": "b"}}, "label zone is not b"),
        ({"resources": Resources(cpu=4, memory_mb=1000, gpu=1)}, None),
        ({"resources": Resources(gpu=2)}, "too few resources"),
    ],
)
def test_matching_says_what_is_missing(demand: dict[str, Any], reason: str | None) -> None:
    """An agent fits, or the first thing it lacks is named."""
    assert misfit("agent_1", SPEC, Demand(**{"type": "echo"} | demand)) == reason


@pytest.mark.parametrize(
    ("fields", "code", "pointer"),
    [
        ({"name": ""}, "out-of-range", "#/name"),
        ({"name": "a\r\nb"}, "invalid-character", "#/name"),
        ({"name": "<script>"}, "invalid-character", "#/name"),
        ({"name": "\u202egnp"}, "invalid-character", "#/name"),
        ({"slots": 0}, "out-of-range", "#/slots"),
        ({"slots": 10_001}, "out-of-range", "#/slots"),
        ({"lease_seconds": 1}, "out-of-range", "#/lease_seconds"),
        ({"lease_seconds": 3601}, "out-of-range", "#/lease_seconds"),
        ({"capabilities": [Capability(name=f"c{n}") for n in range(501)]}, "limit-exceeded", "#/capabilities"),
        ({"capabilities": [Capability(name="a")] * 2}, "duplicate", "#/capabilities/1/name"),
        ({"capabilities": [Capability(name="a", version="x")]}, "invalid-version", "#/capabilities/0/version"),
        ({"resources": Resources(cpu=-1)}, "out-of-range", "#/resources/cpu"),
        ({"owner": "x" * 129}, "limit-exceeded", "#/owner"),
    ],
)
def test_bad_registrations_are_refused_at_their_place(fields: dict[str, Any], code: str, pointer: str) -> None:
    """What is wrong with a registration is told by a stable code and a pointer."""
    with pytest.raises(Invalid) as refused:
        check(AgentSpec(**{"name": "w"} | fields))
    assert [(error.code, error.pointer) for error in refused.value.errors] == [(code, pointer)]


S = AgentState
NOTE = Drain(at=1, by="u")


@pytest.mark.parametrize(
    ("fields", "live", "free", "stalled", "state"),
    [
        ({}, False, 0, False, S.OFFLINE),
        ({}, True, 1, False, S.ONLINE),
        ({}, True, 0, False, S.BUSY),
        ({}, True, 1, True, S.STALLED),
        ({"drain": NOTE}, True, 1, True, S.DRAINING),
        ({"drain": NOTE, "quarantine": NOTE}, True, 1, False, S.QUARANTINED),
        ({"drain": NOTE, "quarantine": NOTE, "retired_at": 1}, True, 1, False, S.RETIRED),
    ],
)
def test_orders_win_over_observations(
    fields: dict[str, Any], live: bool, free: int, stalled: bool, state: AgentState
) -> None:
    """Retired, quarantined, draining; then offline, stalled, busy, online."""
    agent = Agent(id="agent_1", version=1, spec=SPEC, created_at=0, **fields)
    assert settle(agent, live=live, free=free, stalled=stalled) is state
