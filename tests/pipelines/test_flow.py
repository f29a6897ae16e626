"""Conditions, bounded and lenient fan-outs, execution modes and deadlines, as decisions: random graphs, orders, failures and verbs."""

import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcp_control.kernel.errors import InvalidPipeline
from mcp_control.pipelines import control
from mcp_control.pipelines.adaptive import WIDTH_MAX, after, allowed
from mcp_control.pipelines.builder import PipelineBuilder
from mcp_control.pipelines.counting import needed, open_in
from mcp_control.pipelines.definition import from_data, from_yaml
from mcp_control.pipelines.definition_model import Combine, FanOut, PipelineSpec
from mcp_control.pipelines.model import STAGE_FINAL, RunState, StageState, Window
from mcp_control.pipelines.validate import validate
from mcp_control.tasks.model import Request, TaskState
from tests.pipelines.machine import Simulation, chooser

DAY = 86_400.0


@st.composite
def definitions(draw: st.DrawFn) -> PipelineSpec:
    """Any graph of up to six stages with every kind of condition, fan-out, mode and deadline."""
    mode = draw(st.sampled_from(["concurrent", "sequential", "adaptive", "priority"]))
    width = None if mode == "sequential" else draw(st.sampled_from([None, 2]))
    p = PipelineBuilder("any", max_running=width, mode=mode)
    handles = []
    for number in range(draw(st.integers(1, 6))):
        needs = [handle for handle in handles if draw(st.booleans())]
        choices = ["all_completed"] * 3 + ["all_ended", "always"] + ["any_completed"] * bool(needs)
        states = [f'stages.{handle.id}.state == "completed"' for handle in needs]
        when = draw(st.sampled_from([None, None, "true", "false", *states[:1]]))
        p_stage = p.stage(
            f"s{number}",
            "work",
            needs=needs,
            with_={handle.id: handle.output for handle in needs},
            when=when,
            run_when=draw(st.sampled_from(choices)),
            fan_out=draw(fan_outs()),
            priority=draw(st.sampled_from([None, 10, 90])),
            deadline_seconds=draw(st.sampled_from([None, None, DAY])),
        )
        handles.append(p_stage)
    return p.build()


@st.composite
def fan_outs(draw: st.DrawFn) -> FanOut | None:
    """No fan-out, or any."""
    items = draw(st.sampled_from([None, None, 0, 1, 3, 5]))
    if items is None:
        return None
    mode = draw(st.sampled_from(["concurrent", "sequential", "adaptive", "priority"]))
    return FanOut(
        over=json.dumps(list(range(items))),
        combine=Combine(uses="join") if draw(st.booleans()) else None,
        mode=mode,
        rank="item * 10" if mode == "priority" else None,
        width=draw(st.sampled_from([None, 1, 2])) if mode in ("concurrent", "adaptive") else None,
        at_least=draw(st.sampled_from([None, None, 0, 1, "50%"])),
    )


@settings(max_examples=200, deadline=None)
@given(definitions(), st.data())
def test_whatever_happens_a_run_ends_and_a_retry_can_complete_it(spec: PipelineSpec, data: st.DataObject) -> None:
    """No double start, no illegal state, never more under way than allowed, and always an end."""
    simulation = Simulation(spec)
    choose = chooser(data)
    for _ in range(data.draw(st.integers(0, 12))):
        run = simulation.run
        request = Request(at=simulation.now, by="user_x", reason="r")
        verb = data.draw(st.sampled_from(["end", "end", "fail", "pause", "resume", "cancel", "retry", "late", "again"]))
        if verb in ("end", "fail") and simulation.open:
            identity = sorted(simulation.open)[choose(len(simulation.open) - 1)]
            simulation.step([simulation.end(identity, TaskState.COMPLETED if verb == "end" else TaskState.FAILED)])
        elif verb == "pause" and not run.final:
            simulation.step([], control.pause(run, request))
        elif verb == "resume" and not run.final:
            simulation.step([], control.resume(run, simulation.now))
        elif verb == "cancel" and not run.final:
            simulation.step([], control.cancel(run, request), insist=True)
        elif verb == "retry" and run.final and run.state is not RunState.COMPLETED:
            simulation.step([], control.retry(simulation.plan, run, request))
        elif verb == "late":
            simulation.now += round(2 * DAY * 1000)
            simulation.step([])
        elif verb == "again":
            assert not simulation.step(simulation.ended).start
    for _ in range(3):
        if simulation.run.state is RunState.PAUSED:
            simulation.step([], control.resume(simulation.run, simulation.now))
        simulation.drain(choose, lambda _: TaskState.COMPLETED)
        assert simulation.run.final, "nothing is under way, and yet the run has not ended"
        if simulation.run.state is RunState.COMPLETED:
            break
        request = Request(at=simulation.now, by="user_x")
        simulation.step([], control.retry(simulation.plan, simulation.run, request))
    assert simulation.run.state is RunState.COMPLETED
    assert {stage.state for stage in simulation.run.stages} <= {StageState.COMPLETED, StageState.SKIPPED}


def _states(simulation: Simulation) -> dict[str, str]:
    return {stage.id: stage.state.value for stage in simulation.run.stages}


def _complete_all(simulation: Simulation) -> None:
    simulation.drain(lambda _: 0, lambda _: TaskState.COMPLETED)


def test_what_follows_from_a_skipped_stage_is_as_the_need_says() -> None:
    """A false condition skips; what needs all of it is skipped, too; what needs any or an end of it runs."""
    p = PipelineBuilder("branches")
    left = p.stage("left", "work", when="${{ 1 > 2 }}")
    right = p.stage("right", "work", when="1 < 2")
    p.stage("after_left", "work", needs=[left])
    p.stage("after_both", "work", needs=[left, right])
    p.stage("after_any", "work", needs=[left, right], run_when="any_completed", with_={"left": left.output})
    p.stage("after_none", "work", needs=[left], run_when="any_completed")
    p.stage("after_end", "work", needs=[left], run_when="all_ended", when='stages.left.state == "skipped"')
    p.stage("clean", "work", needs=[left, right], run_when="always")
    simulation = Simulation(p.build())
    _complete_all(simulation)
    assert simulation.run.state is RunState.COMPLETED
    assert _states(simulation) == {
        "left": "skipped",
        "right": "completed",
        "after_left": "skipped",
        "after_both": "skipped",
        "after_any": "completed",
        "after_none": "skipped",
        "after_end": "completed",
        "clean": "completed",
    }
    reasons = {stage.id: stage.reason for stage in simulation.run.stages}
    assert (reasons["left"], reasons["after_left"]) == ("condition-false", "needs-not-met")


def test_a_stage_that_runs_always_cleans_up_after_a_failure_and_after_a_cancel() -> None:
    """It starts when what it needs has ended, the run ends after it, and keeps the reason it failed for."""
    p = PipelineBuilder("cleaning", deadline_seconds=DAY)
    work = p.stage("work", "work")
    p.stage("later", "work", needs=[work])
    p.stage("clean", "work", needs=[work], run_when="always", with_={"state": "${{ stages.work.state }}"})
    for verb in ("fail", "cancel"):
        simulation = Simulation(p.build())
        (identity,) = simulation.open
        if verb == "cancel":
            simulation.step([], control.cancel(simulation.run, Request(at=1, by="anna")), insist=True)
            assert simulation.to_cancel == {identity}
        ended = TaskState.FAILED if verb == "fail" else TaskState.CANCELLED
        decision = simulation.step([simulation.end(identity, ended)])
        (start,) = decision.start
        assert (start.stage.stage.id, json.loads(start.payload)) == ("clean", {"state": ended.value})
        assert not simulation.run.final
        simulation.step([], insist=True)
        assert simulation.to_cancel <= {identity}, "what cleans up is not cancelled with the rest"
        _complete_all(simulation)
        assert simulation.run.state is (RunState.FAILED if verb == "fail" else RunState.CANCELLED)
        assert simulation.run.reason == ("stage-failed" if verb == "fail" else "cancelled")
        assert _states(simulation)["clean"] == "completed"
        simulation.step([], control.retry(simulation.plan, simulation.run, Request(at=simulation.now, by="anna")))
        _complete_all(simulation)
        assert simulation.run.state is RunState.COMPLETED
        assert simulation.run.stages[2].round == 1, "it cleans up again after the retry"


def test_a_condition_that_is_no_truth_value_fails_its_stage() -> None:
    """The message names the expression."""
    p = PipelineBuilder("odd")
    p.stage("odd", "work", when="1 + 1")
    simulation = Simulation(p.build())
    assert (simulation.run.state, simulation.run.reason) == (RunState.FAILED, "expression-error")
    assert "1 + 1" in simulation.run.message


def test_the_next_item_starts_when_one_ends() -> None:
    """With width 2 of 5 items, two are under way until the last ones; the output is in the order of the items."""
    p = PipelineBuilder("wide")
    p.stage("each", "work", fan_out=FanOut(over="[10, 20, 30, 40, 50]", width=2), with_={"n": "${{ item }}"})
    simulation = Simulation(p.build())
    order = []
    while simulation.open:
        assert len(simulation.open) == min(2, 5 - len(order))
        newest = max(simulation.open.values(), key=lambda start: start.item or 0)
        order.append(newest.item)
        simulation.step([simulation.end(next(key for key, each in simulation.open.items() if each is newest))])
    assert order == [1, 2, 3, 4, 0]
    assert [each["item"] for each in msgspec.json.decode(simulation.material.outputs["each"])] == [0, 1, 2, 3, 4]


def test_a_lenient_fan_out_completes_with_nulls_and_a_list_of_failures() -> None:
    """Items that fail leave a null in their place; the combining task sees which they were and why."""
    p = PipelineBuilder("lenient")
    p.stage("each", "work", fan_out=FanOut(over="[1, 2, 3, 4]", at_least="50%", combine=Combine(uses="join")))
    simulation = Simulation(p.build())
    by_item = {start.item: identity for identity, start in simulation.open.items()}
    bad = [simulation.end(by_item[0], TaskState.FAILED), simulation.end(by_item[2], TaskState.EXPIRED)]
    simulation.step(bad)
    assert simulation.run.ending is None
    decision = simulation.step([simulation.end(by_item[item]) for item in (1, 3)])
    payload = json.loads(decision.start[0].payload)
    assert [None if each is None else each["item"] for each in payload["items"]] == [None, 1, None, 3]
    assert [(each["index"], each["state"]) for each in payload["failures"]] == [(0, "failed"), (2, "expired")]
    _complete_all(simulation)
    assert simulation.run.state is RunState.COMPLETED
    assert simulation.run.stages[0].message == "2 of 4 items did not complete"

    simulation = Simulation(p.build())
    by_item = {start.item: identity for identity, start in simulation.open.items()}
    simulation.step([simulation.end(by_item[item], TaskState.FAILED) for item in (0, 1, 2)])
    assert simulation.to_cancel == {by_item[3]}, "what can no longer suffice is given up at once"
    simulation.step([simulation.end(by_item[3], TaskState.CANCELLED)])
    assert (simulation.run.state, simulation.run.stages[0].reason) == (RunState.FAILED, "too-few-items")
    simulation.step([], control.retry(simulation.plan, simulation.run, Request(at=simulation.now, by="anna")))
    _complete_all(simulation)
    assert simulation.run.state is RunState.COMPLETED


@given(st.integers(0, 10_000), st.integers(0, 100), st.integers(0, 12_000))
def test_how_many_items_must_complete(items: int, percent: int, number: int) -> None:
    """A share is rounded up, exactly; a number is at most all."""
    assert needed(None, items) == items
    assert needed(number, items) == min(number, items)
    share = needed(f"{percent}%", items)
    assert share * 100 >= items * percent > (share - 1) * 100


def test_a_stage_that_passes_its_deadline_fails_and_its_tasks_are_cancelled() -> None:
    """The cause is told, and the deadline is that of the stage, not of the run."""
    p = PipelineBuilder("late")
    p.stage("slow", "work", deadline_seconds=10)
    simulation = Simulation(p.build())
    (identity,) = simulation.open
    assert simulation.run.stage_due == simulation.run.stages[0].deadline_at == simulation.now + 10_000
    simulation.now += 9_000
    simulation.step([])
    assert simulation.run.ending is None
    simulation.now += 2_000
    simulation.step([])
    assert simulation.to_cancel == {identity}
    simulation.step([simulation.end(identity, TaskState.CANCELLED)])
    assert (simulation.run.state, simulation.run.reason) == (RunState.FAILED, "stage-failed")
    assert (simulation.run.stages[0].state, simulation.run.stages[0].reason) == (StageState.FAILED, "deadline-exceeded")


def test_with_priority_nothing_lower_starts_while_something_higher_runs() -> None:
    """The low one waits for the high one and for what follows from it; one at a time is the order of the definition."""
    p = PipelineBuilder("strict", mode="priority")
    p.stage("low", "work", priority=10)
    high = p.stage("high", "work", priority=90)
    p.stage("after", "work", needs=[high], priority=90)
    simulation = Simulation(p.build())
    order = []
    while simulation.open:
        (identity,) = simulation.open
        order.append(simulation.open[identity].stage.stage.id)
        simulation.step([simulation.end(identity)])
    assert order == ["high", "after", "low"]


def test_items_with_a_rank_have_the_priority_it_says() -> None:
    """The scheduler takes them by it; a rank that is no priority fails the stage."""
    p = PipelineBuilder("ranked")
    p.stage("each", "work", fan_out=FanOut(over="[5, 90, 30]", mode="priority", rank="item"))
    assert [start.priority for start in Simulation(p.build()).open.values()] == [5, 90, 30]
    p = PipelineBuilder("wrong")
    p.stage("each", "work", fan_out=FanOut(over="[5, 101]", mode="priority", rank="item"))
    assert Simulation(p.build()).run.reason == "expression-error"


outcomes = st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=60)


@given(outcomes, st.integers(1, 50))
def test_an_adaptive_width_stays_within_bounds_and_shrinks_when_much_fails(
    ends: list[tuple[bool, int]], busy: int
) -> None:
    """Never below one; success never shrinks it; with nothing but failures it comes to one."""
    window = Window()
    for completed, failed in ends:
        later = after(window, failed=failed, completed=completed, open=busy)
        assert 1 <= later.width <= WIDTH_MAX
        assert 0 <= later.errors <= 1
        assert failed or later.width >= window.width
        window = later
    for _ in range(60):
        window = after(window, failed=3, completed=False, open=busy)
    assert window.width == 1
    assert allowed(window, open=0, free=0, top=None) == 1


def test_an_adaptive_fan_out_widens_to_the_free_slots_and_no_further() -> None:
    """While all goes well the width doubles per round, up to what agents have room for."""
    p = PipelineBuilder("adaptive")
    p.stage("each", "work", fan_out=FanOut(over=json.dumps(list(range(60))), mode="adaptive"))
    slots, widest = 12, 0
    simulation = Simulation(p.build(), slots)
    planned = simulation.plan.stages[0]
    while simulation.open:
        before = len(simulation.open)
        simulation.step([simulation.end(identity) for identity in sorted(simulation.open)[: max(1, before // 2)]])
        widest = max(widest, open_in(planned, simulation.run.stages[0]) if simulation.open else 0)
    assert simulation.run.state is RunState.COMPLETED
    assert 8 <= widest <= slots


FAULTY = """
metadata: {name: faulty}
spec:
  mode: sequential
  max_running: 3
  stages:
  - {id: one, uses: work, when: "nothing.x > 1", run_when: any_completed, deadline_seconds: 0}
  - {id: two, uses: work, when: "stages.one.output.n > 1", with: {deep: [{x: "${{ params.no }}"}]}}
  - id: three
    uses: work
    fan_out: {over: "[1]", width: 0, mode: priority, at_least: "150%"}
  - id: four
    uses: work
    fan_out: {over: "[1]", rank: "items", mode: concurrent, at_least: -1}
"""


def test_every_fault_is_named_with_its_place() -> None:
    """All at once, nested values included."""
    with pytest.raises(InvalidPipeline) as caught:
        validate(from_yaml(FAULTY))
    assert {error.pointer.removeprefix("#/spec/") for error in caught.value.errors} == {
        "max_running",
        "stages/0/when",
        "stages/0/run_when",
        "stages/0/deadline_seconds",
        "stages/1/when",
        "stages/1/with/deep/0/x",
        "stages/2/fan_out/width",
        "stages/2/fan_out/mode",
        "stages/2/fan_out/at_least",
        "stages/3/fan_out/rank",
        "stages/3/fan_out/at_least",
    }


def test_yaml_and_python_mean_the_same() -> None:
    """Every field of flow can be written both ways."""
    text = """
metadata: {name: both}
spec:
  mode: adaptive
  max_running: 4
  stages:
  - {id: first, uses: work, deadline_seconds: 5}
  - id: each
    uses: work
    needs: [first]
    when: size(stages.first.output) > 0
    run_when: all_ended
    fan_out: {over: stages.first.output, width: 3, mode: adaptive, at_least: "80%", combine: {uses: join}}
"""
    p = PipelineBuilder("both", mode="adaptive", max_running=4)
    first = p.stage("first", "work", deadline_seconds=5)
    fan_out = FanOut(over="stages.first.output", width=3, mode="adaptive", at_least="80%", combine=Combine(uses="join"))
    when = "${{ size(stages.first.output) > 0 }}"
    p.stage("each", "work", needs=[first], when=when, run_when="all_ended", fan_out=fan_out)
    assert from_yaml(text) == p.build() == from_data(json.loads(msgspec.json.encode(p.build())))


def test_every_stage_that_ended_stays_so_until_a_retry() -> None:
    """A retry leaves a stage alone that was skipped by its condition, and what completed before it."""
    p = PipelineBuilder("kept")
    no = p.stage("no", "work", when="false")
    p.stage("after", "work", needs=[no], run_when="all_ended")
    p.stage("bad", "work")
    simulation = Simulation(p.build())
    for identity, start in list(simulation.open.items()):
        bad = start.stage.stage.id == "bad"
        simulation.step([simulation.end(identity, TaskState.FAILED if bad else TaskState.COMPLETED)])
    assert simulation.run.state is RunState.FAILED
    before = simulation.run.stages
    simulation.step([], control.retry(simulation.plan, simulation.run, Request(at=simulation.now, by="anna")))
    assert simulation.run.stages[:2] == before[:2]
    assert {stage.state for stage in before} <= STAGE_FINAL
