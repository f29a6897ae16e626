"""The pure decision: random graphs, random orders of completion, repetitions, failures, pauses, cancels and retries."""

import json

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from mcp_control.pipelines import control
from mcp_control.pipelines.builder import PipelineBuilder
from mcp_control.pipelines.decide import decide
from mcp_control.pipelines.definition_model import Combine, FanOut, PipelineSpec
from mcp_control.pipelines.model import RunState, StageState
from mcp_control.pipelines.transitions import RUN_TRANSITIONS, STAGE_TRANSITIONS
from mcp_control.tasks.model import Request, TaskState
from tests.pipelines.machine import Simulation, chooser


@st.composite
def definitions(draw: st.DrawFn) -> PipelineSpec:
    """Any graph of up to seven stages, some of them fan-outs over up to three items, with or without a combine task."""
    p = PipelineBuilder("any", max_running=draw(st.sampled_from([None, None, 1, 2])))
    handles = []
    for number in range(draw(st.integers(1, 7))):
        needs = [handle for handle in handles if draw(st.booleans())]
        items = draw(st.sampled_from([None, None, 0, 1, 3]))
        fan_out = None
        if items is not None:
            combine = Combine(uses="join") if draw(st.booleans()) else None
            fan_out = FanOut(over=json.dumps(list(range(items))), combine=combine)
        with_ = {handle.id: handle.output for handle in needs}
        priority = draw(st.sampled_from([None, 10, 90]))
        handles.append(p.stage(f"s{number}", "work", needs=needs, with_=with_, fan_out=fan_out, priority=priority))
    return p.build()


@settings(max_examples=150, deadline=None)
@given(definitions(), st.data())
def test_every_stage_starts_once_after_its_parents_and_the_run_completes(
    spec: PipelineSpec, data: st.DataObject
) -> None:
    """Whatever the order of completion, all stages complete, each task once, and outputs are the same."""
    simulation = Simulation(spec)
    simulation.drain(chooser(data), lambda _: TaskState.COMPLETED)
    assert simulation.run.state is RunState.COMPLETED
    assert {stage.state for stage in simulation.run.stages} == {StageState.COMPLETED}
    in_order = Simulation(spec)
    in_order.drain(lambda _: 0, lambda _: TaskState.COMPLETED)
    assert {name: bytes(text) for name, text in simulation.material.outputs.items()} == {
        name: bytes(text) for name, text in in_order.material.outputs.items()
    }
    for planned, stage in zip(simulation.plan.stages, simulation.run.stages, strict=True):
        if planned.over is not None and planned.combine is None:
            items = [each["item"] for each in msgspec.json.decode(simulation.material.outputs[stage.id])]
            assert items == list(range(stage.total))
            assert stage.counts == ({"n": stage.total} if stage.total else {})


@settings(max_examples=150, deadline=None)
@given(definitions(), st.data())
def test_a_failure_anywhere_ends_the_run_failed(spec: PipelineSpec, data: st.DataObject) -> None:
    """The run ends failed exactly when a task did not complete; nothing starts after that, and everything open is cancelled."""
    simulation = Simulation(spec)
    failed = False

    def outcome(identity: str) -> TaskState:
        nonlocal failed
        if identity in simulation.to_cancel:
            return data.draw(st.sampled_from([TaskState.CANCELLED, TaskState.COMPLETED]))
        bad = data.draw(
            st.sampled_from([None, None, TaskState.FAILED, TaskState.EXPIRED, TaskState.REJECTED, TaskState.CANCELLED])
        )
        failed = failed or bad is not None
        return bad or TaskState.COMPLETED

    simulation.drain(chooser(data), outcome)
    assert simulation.run.state is (RunState.FAILED if failed else RunState.COMPLETED)


@settings(max_examples=150, deadline=None)
@given(definitions(), st.data())
def test_any_sequence_of_verbs_leads_to_an_end(spec: PipelineSpec, data: st.DataObject) -> None:
    """Pause, resume, cancel, fail and retry in any order keep every promise; a retried run can always complete."""
    simulation = Simulation(spec)
    choose = chooser(data)
    for _ in range(data.draw(st.integers(0, 12))):
        run, now = simulation.run, simulation.now
        verb = data.draw(
            st.sampled_from(["end", "end", "fail", "pause", "resume", "cancel", "retry", "retry_from", "again"])
        )
        request = Request(at=now, by="user_x", reason="r")
        if verb in ("end", "fail") and simulation.open:
            identity = sorted(simulation.open)[choose(len(simulation.open) - 1)]
            simulation.step([simulation.end(identity, TaskState.COMPLETED if verb == "end" else TaskState.FAILED)])
        elif verb == "pause" and not run.final:
            simulation.step([], control.pause(run, request))
        elif verb == "resume" and not run.final:
            simulation.step([], control.resume(run, now))
        elif verb == "cancel" and not run.final:
            simulation.step([], control.cancel(run, request), insist=True)
            assert set(simulation.open) <= simulation.to_cancel
        elif verb.startswith("retry") and run.state in (RunState.FAILED, RunState.CANCELLED):
            name = None if verb == "retry" else simulation.plan.stages[choose(len(run.stages) - 1)].stage.id
            kept = {stage.id for stage in run.stages if stage.state is StageState.COMPLETED}
            simulation.step([], control.retry(simulation.plan, run, Request(at=now, by="anna"), name))
            if name is None:
                assert all(stage.state is StageState.COMPLETED for stage in simulation.run.stages if stage.id in kept)
        elif verb == "again" and simulation.ended:
            assert not simulation.step(simulation.ended).start
    while simulation.run.state is not RunState.COMPLETED:
        if simulation.run.state in (RunState.FAILED, RunState.CANCELLED):
            simulation.step(
                [], control.retry(simulation.plan, simulation.run, Request(at=simulation.now, by="anna"), None)
            )
        elif simulation.run.state is RunState.PAUSED:
            simulation.step([], control.resume(simulation.run, simulation.now))
        simulation.drain(choose, lambda _: TaskState.COMPLETED)
    assert not simulation.open


@settings(max_examples=50, deadline=None)
@given(definitions(), st.data())
def test_an_ended_run_stays_as_it_is(spec: PipelineSpec, data: st.DataObject) -> None:
    """Final states absorb: no report, no time and no insisting changes a run that has ended."""
    simulation = Simulation(spec)
    simulation.drain(chooser(data), lambda _: TaskState.FAILED)
    run = simulation.run
    assert run.final
    late = replace(run, deadline_at=1)
    assert decide(simulation.plan, late, simulation.ended, simulation.material, 10**9, insist=True).run is late


def test_a_retry_within_a_fan_out_keeps_completed_items() -> None:
    """Only items that did not complete are started again, under a new round."""
    p = PipelineBuilder("fan")
    p.stage("each", "work", fan_out="[1, 2, 3]", combine="join")
    simulation = Simulation(p.build())
    by_item = {start.item: identity for identity, start in simulation.open.items()}
    simulation.step([simulation.end(by_item[1]), simulation.end(by_item[0], TaskState.FAILED)])
    assert simulation.to_cancel == {by_item[2]}
    simulation.step([simulation.end(by_item[2], TaskState.CANCELLED)])
    assert simulation.run.state is RunState.FAILED
    decision = simulation.step(
        [], control.retry(simulation.plan, simulation.run, Request(at=simulation.now, by="anna"), None)
    )
    assert [(start.item, start.round) for start in decision.start] == [(0, 1), (2, 1)]
    anew = simulation.step(simulation.ended)
    assert anew.run is simulation.run, "what ended in an earlier round does not count again"


def test_every_state_in_the_tables_can_be_left_only_to_states_in_the_tables() -> None:
    """The transition tables are closed, and final states of runs lead only to a retry."""
    for table in (RUN_TRANSITIONS, STAGE_TRANSITIONS):
        assert {target for targets in table.values() for target in targets} <= set(table)
    assert RUN_TRANSITIONS[RunState.COMPLETED] == frozenset()
