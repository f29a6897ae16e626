"""Forecasts: the simulation keeps the rules of running, and the plan says who could do what and when it would end."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_control.agents.model import AgentSpec, AgentState, Capability
from mcp_control.pipelines.builder import PipelineBuilder
from mcp_control.pipelines.definition_model import Combine
from mcp_control.pipelines.forecast import SeenAgent, plan_run
from mcp_control.pipelines.plan import compile_plan
from mcp_control.pipelines.plan_model import RunPlan
from mcp_control.pipelines.simulation import Part, simulate
from mcp_control.tasks.statistics import Times


def agent(
    name: str, *types: str, slots: int = 1, state: AgentState = AgentState.ONLINE, spec_slots: int | None = None
) -> SeenAgent:
    spec = AgentSpec(name=name, capabilities=[Capability(name=each) for each in types], slots=spec_slots or slots)
    return SeenAgent(id=f"agent_{name}", spec=spec, state=state, slots=slots)


def took(p50: float, p90: float | None = None) -> Times:
    return Times(count=10, p50=p50, p90=p90 or p50, p99=p90 or p50)


@st.composite
def works(draw: st.DrawFn) -> tuple[list[Part], dict[frozenset[int], int], int | None]:
    count = draw(st.integers(1, 12))
    parts = [
        Part(
            group=draw(st.integers(0, 2)),
            tasks=draw(st.integers(0, 7)),
            seconds=float(draw(st.integers(0, 5))),
            needs=tuple(sorted(draw(st.sets(st.integers(0, place - 1), max_size=3)))) if place else (),
            rank=(draw(st.integers(-2, 2)), place),
        )
        for place in range(count)
    ]
    pools = draw(
        st.dictionaries(st.frozensets(st.integers(0, 2), min_size=1), st.integers(1, 4), min_size=1, max_size=3)
    )
    return parts, pools, draw(st.none() | st.integers(1, 3))


@given(works())
def test_a_simulated_run_keeps_the_rules(
    made: tuple[list[Part], dict[frozenset[int], int], int | None],
) -> None:
    """What can run ends; nothing begins before its needs; widths hold; nothing ends faster than its agents could."""
    parts, pools, width = made
    spans = simulate(parts, pools, width)
    offered = frozenset[int]().union(*pools)
    possible: list[bool] = []
    for part in parts:
        possible.append((not part.tasks or part.group in offered) and all(possible[need] for need in part.needs))
    for place, (part, span) in enumerate(zip(parts, spans, strict=True)):
        assert (span.ends is not None) == possible[place], (place, spans)
        if span.begins is None or span.ends is None:
            continue
        slots = sum(count for groups, count in pools.items() if part.group in groups)
        assert span.ends - span.begins >= (-(-part.tasks // slots) * part.seconds if part.tasks else 0)
        assert all((spans[need].ends or 0) <= span.begins for need in part.needs)
    if width is not None:
        _never_more_than(width, [(span.begins, span.ends) for span in spans])
    work = sum(part.tasks * part.seconds for part, ok in zip(parts, possible, strict=True) if ok)
    end = max((span.ends or 0.0 for span in spans), default=0.0)
    assert end * sum(pools.values()) >= work


def _never_more_than(width: int, spans: Sequence[tuple[float | None, float | None]]) -> None:
    known = [(begins, ends) for begins, ends in spans if begins is not None and ends is not None and ends > begins]
    for at, _ in known:
        assert sum(begins <= at < ends for begins, ends in known) <= width


def diamond() -> PipelineBuilder:
    p = PipelineBuilder("diamond")
    top = p.stage("top", "fetch")
    left = p.stage("left", "work", needs=[top])
    right = p.stage("right", "slow", needs=[top])
    p.stage("end", "merge", needs=[left, right])
    return p


HISTORY = {"fetch": took(1, 2), "work": took(2, 4), "slow": took(10, 20), "merge": took(1, 2)}


def planned(agents: Sequence[SeenAgent], history: dict[str, Times] = HISTORY, **waiting: int) -> RunPlan:
    return plan_run(compile_plan(diamond().build()), agents, history, {}, waiting)


def test_the_forecast_is_the_critical_path_where_agents_are_plenty() -> None:
    """Half and nine tenths of the times add up along the longest chain, and the stages say when they begin and end."""
    found = planned([agent("all", "fetch", "work", "slow", "merge", slots=4)])
    assert (found.p50, found.p90, found.routable, found.known) == (12, 24, True, True)
    assert found.critical_path == ["top", "right", "end"]
    assert [(stage.begins, stage.ends) for stage in found.stages] == [(0, 1), (1, 3), (1, 11), (11, 12)]
    assert found.one_more_agent is None


def test_one_more_agent_is_named_with_what_it_saves() -> None:
    """With one slot for everything the stages queue; a second such agent saves what then runs beside."""
    found = planned([agent("one", "fetch", "work", "slow", "merge")])
    assert found.p50 == 14
    assert found.one_more_agent is not None
    assert (found.one_more_agent.like, found.one_more_agent.saves_seconds) == ("one", 2)


def test_what_no_agent_can_take_is_said_with_the_reasons() -> None:
    """An offline agent, a missing capability and an empty fleet make a stage unroutable, and the run's end unknown."""
    found = planned([agent("a", "fetch", "work", "merge"), agent("b", "slow", state=AgentState.OFFLINE)])
    assert (found.routable, found.p50, found.one_more_agent) == (False, None, None)
    stages = {stage.stage: stage for stage in found.stages}
    assert (stages["top"].able, stages["top"].agents) == (1, ["a"])
    assert stages["right"].unable == ["b is offline", "a lacks the capability slow"]
    assert (stages["right"].begins, stages["end"].ends) == (None, None)
    assert planned([]).stages[0].unable == ["no agent is registered"]


def test_without_history_the_forecast_says_that_it_is_the_least() -> None:
    """A stage without history counts nothing, and the plan says that not everything is known."""
    found = planned([agent("all", "fetch", "work", "slow", "merge", slots=4)], {"fetch": took(1)})
    assert (found.known, found.p50) == (False, 1)
    assert (found.stages[1].history, found.stages[1].p50) == (0, None)
    assert found.critical_path == ["top", "left", "end"], "of equally long chains one is chosen"


def test_what_waits_for_people_signals_or_runs_is_said_and_not_counted_as_no_time() -> None:
    """Such a stage has no end, asks no agents, and what comes after it begins then at the earliest; what does not is told exactly."""
    p = PipelineBuilder("asking")
    top = p.stage("top", "fetch")
    asked = p.approval("ask", "Go on?", needs=[top])
    told = p.wait_for("told", "payment", needs=[top])
    inner = p.stage("inner", "pipeline:diamond", needs=[top])
    p.stage("beside", "work", needs=[top])
    p.stage("end", "merge", needs=[asked, told, inner])
    found = plan_run(compile_plan(p.build()), [agent("all", "fetch", "work", "merge", slots=4)], HISTORY, {}, {})
    stages = {stage.stage: stage for stage in found.stages}
    assert [stages[name].waits_for for name in ("ask", "told", "inner", "top")] == ["people", "signal", "run", None]
    assert {(stages[name].begins, stages[name].ends) for name in ("ask", "told", "inner")} == {(1, None)}
    assert stages["ask"].unable == []
    assert {name for name, stage in stages.items() if stage.at_least} == {"ask", "told", "inner", "end"}
    assert (stages["end"].begins, stages["end"].ends, stages["beside"].ends) == (1, 2, 3)
    assert (found.routable, found.known) == (True, False)


def test_work_that_waits_already_goes_first() -> None:
    """Five queued tasks of a type on one slot put off what needs that slot."""
    agents = [agent("a", "fetch", "merge", "slow"), agent("b", "work")]
    assert planned(agents, work=5).waiting == 5
    assert planned(agents).stages[1].ends == 3
    assert planned(agents, work=5).stages[1].ends == 12
    assert planned(agents, elsewhere=5).waiting == 0


@pytest.mark.parametrize(("size", "wanted"), [(10, 10 / 2 * 2 + 1), (None, 2 + 1), (0, 1)])
def test_a_fan_out_runs_in_waves_and_ends_with_its_combining_task(size: int | None, wanted: float) -> None:
    """Ten elements on two slots are five waves; an unknown number counts as one; the combining task follows."""
    p = PipelineBuilder("fan")
    p.stage("each", "work", fan_out="params.x", combine=Combine(uses="merge"))
    found = plan_run(compile_plan(p.build()), [agent("a", "work", "merge", slots=2)], HISTORY, {"each": size}, {})
    assert (found.p50, found.stages[0].tasks) == (wanted, size)
