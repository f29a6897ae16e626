"""Stages that wait and stages that are undone, in any graph and any order of what happens: what must hold after each decision."""

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from mcp_control.pipelines import control
from mcp_control.pipelines.counting import task_id, waited_for
from mcp_control.pipelines.decide import decide
from mcp_control.pipelines.decision import Material
from mcp_control.pipelines.definition_model import Body, Metadata, PipelineSpec, Stage
from mcp_control.pipelines.input_model import (
    COMPENSATION,
    Answer,
    Approval,
    Compensate,
    CompensationState,
    Given,
    Signal,
    WaitFor,
)
from mcp_control.pipelines.model import Run, RunState, StageRun, StageState
from mcp_control.pipelines.plan import compile_plan
from mcp_control.pipelines.signals import received
from mcp_control.pipelines.transitions import COMPENSATION_TRANSITIONS, RUN_TRANSITIONS, STAGE_TRANSITIONS
from mcp_control.pipelines.validate import validate
from mcp_control.tasks.followers import Finished
from mcp_control.tasks.model import Links, Request, Task, TaskState
from tests.pipelines.machine import RUN_ID

WHO = Request(at=0, by="anna")


@st.composite
def definitions(draw: st.DrawFn) -> PipelineSpec:
    stages: list[Stage] = []
    for number in range(draw(st.integers(1, 6))):
        needs = [stage.id for stage in stages if draw(st.booleans())]
        kind = draw(st.sampled_from(["task", "task", "undone", "approval", "signal"]))
        due = draw(st.sampled_from([None, 0.003]))
        stages.append(
            Stage(
                id=f"s{number}",
                needs=needs,
                uses="work" if kind in ("task", "undone") else "",
                compensate=Compensate(uses="undo") if kind == "undone" else None,
                approval=Approval(
                    title="ok?", timeout_seconds=due, default=due and draw(st.sampled_from([None, "approve"]))
                )
                if kind == "approval"
                else None,
                wait_for=WaitFor(
                    signal="go", timeout_seconds=due, match=draw(st.sampled_from([None, "output.body > 1"]))
                )
                if kind == "signal"
                else None,
            )
        )
    width = draw(st.sampled_from([None, 1, 2]))
    return PipelineSpec(metadata=Metadata(name="any"), spec=Body(stages=stages, max_running=width))


class Machine:
    """A run to which anything may happen; checks what must hold after each decision."""

    def __init__(self, spec: PipelineSpec) -> None:
        validate(spec)
        self.plan = compile_plan(spec)
        self.run = Run(
            id=RUN_ID, version=1, pipeline_id="pipe_x", pipeline="any", pipeline_number=1, state=RunState.PENDING, state_at=0, created_at=0,
            stages=[StageRun(id=stage.id) for stage in spec.spec.stages],
        )  # fmt: skip
        self.material = Material({})
        self.open: dict[str, Links] = {}
        self.started: set[str] = set()
        self.undone: list[str] = []
        self.now = 0
        self.step([])

    def step(self, finished: list[Finished], run: Run | None = None) -> None:
        """Decide, check, and take what was decided as committed."""
        self.now += 1
        before = run or self.run
        decision = decide(self.plan, before, finished, self.material, self.now, insist=before.cancel is not None)
        after = decision.run
        for each in finished:
            self.open.pop(each.task.id, None)
        assert before.state is after.state or after.state in RUN_TRANSITIONS[before.state]
        for place, (old, new) in enumerate(zip(before.stages, after.stages, strict=True)):
            assert old.state is new.state or new.state in STAGE_TRANSITIONS[old.state]
            if new.state is StageState.INPUT_REQUIRED:
                assert place in self.plan.waiting
                assert not after.final
            assert new.given is None or new.state is StageState.INPUT_REQUIRED
        was = {each.stage: each.state for each in before.compensations}
        for each in after.compensations:
            old_state = was.get(each.stage, CompensationState.PENDING)
            ways = [moves.get(old_state, frozenset()) for moves in COMPENSATION_TRANSITIONS.values()]
            assert old_state is each.state or any(each.state in targets for targets in ways)
        for start in decision.start:
            name = start.stage.stage.id
            identity = task_id(RUN_ID, name, start.item, start.round)
            assert identity not in self.started, "a task was started twice"
            if start.item == COMPENSATION:
                assert all(stage.state not in (StageState.RUNNING, StageState.INPUT_REQUIRED) for stage in after.stages)
                assert after.stages[start.stage.place].state is StageState.COMPLETED
                self.undone.append(name)
            self.started.add(identity)
            self.open[identity] = Links(run_id=RUN_ID, stage=name, item=start.item, round=start.round)
        assert sum(each.state is CompensationState.RUNNING for each in after.compensations) <= 1
        taken = [signal.stage for signal in after.signals if signal.stage is not None]
        assert len(taken) == len(after.signals) - sum(signal.stage is None for signal in after.signals)
        assert set(waited_for(after, self.plan, 1000)) == set(self.open)
        assert not (after.final and self.open)
        if after.state is RunState.INPUT_REQUIRED:
            assert not self.open
        self.material.outputs.update(decision.outputs)
        self.run = after
        again = decide(self.plan, after, finished, self.material, self.now)
        assert again.run is after, "a decision repeated decided something"
        assert not again.start

    def end(self, identity: str, state: TaskState) -> Finished:
        """Return the end of an open task."""
        task = Task(
            id=identity, version=3, type="work", state=state, state_at=self.now, created_at=0, lane="", order=0, links=self.open[identity]
        )  # fmt: skip
        return Finished(task=task, result=b"{}" if state is TaskState.COMPLETED else None)

    def signal(self, body: int) -> None:
        """Send a signal, where the pipeline waits for any."""
        if any(stage.wait_for for stage in self.plan.spec.spec.stages) and not self.run.final:
            signal = Signal(id=f"sig_{len(self.run.signals)}", name="go", at=self.now, by="anna")
            self.material.signals[signal.id] = str(body).encode()
            self.step([], received(self.plan, self.run, signal))

    def answer(self, option: str) -> bool:
        """Answer the first question that waits; returns whether there was one."""
        for place, stage in enumerate(self.run.stages):
            if stage.state is StageState.INPUT_REQUIRED and self.plan.stages[place].stage.approval is not None:
                text = msgspec.json.encode(
                    Answer(option=option, by="anna", at=msgspec.convert("2026-01-01T00:00:00Z", _MOMENT))
                )
                stages = list(self.run.stages)
                stages[place] = replace(stage, given=Given(text, option))
                self.step([], replace(self.run, stages=stages))
                return True
        return False


_MOMENT = Answer.__annotations__["at"]


@settings(max_examples=200, deadline=None)
@given(definitions(), st.data())
def test_whatever_comes_in_whatever_order_a_run_ends_and_undoes_in_reverse(
    spec: PipelineSpec, data: st.DataObject
) -> None:
    """No task starts twice, nothing runs while it is undone, the order of undoing is the reverse of completing, and there is an end."""
    machine = Machine(spec)
    acts = ["end", "end", "fail", "approve", "reject", "signal", "time", "pause", "resume", "cancel", "retry"]
    for _ in range(data.draw(st.integers(0, 15))):
        act = data.draw(st.sampled_from(acts))
        run = machine.run
        if act in ("end", "fail") and machine.open:
            identity = data.draw(st.sampled_from(sorted(machine.open)))
            machine.step([machine.end(identity, TaskState.COMPLETED if act == "end" else TaskState.FAILED)])
        elif act in ("approve", "reject"):
            machine.answer(act)
        elif act == "signal":
            machine.signal(data.draw(st.integers(0, 2)))
        elif act == "time":
            machine.now += 5
            machine.step([])
        elif act == "retry" and run.state in (RunState.FAILED, RunState.CANCELLED):
            machine.undone = []
            machine.step([], control.retry(machine.plan, run, replace(WHO, at=machine.now)))
        elif act in ("pause", "resume", "cancel") and not run.final:
            ask = {"pause": control.pause, "cancel": control.cancel}.get(act)
            machine.step([], control.resume(run, machine.now) if ask is None else ask(run, WHO))
    _to_the_end(machine)


def _to_the_end(machine: Machine) -> None:
    for _ in range(200):
        if machine.run.final:
            break
        if machine.run.state is RunState.PAUSED and machine.run.ending is None:
            machine.step([], control.resume(machine.run, machine.now))
        elif machine.open:
            machine.step([machine.end(min(machine.open), TaskState.COMPLETED)])
        elif not machine.answer("approve"):
            machine.signal(2)
    assert machine.run.final
    done = {stage.id: stage.finished_at or 0 for stage in machine.run.stages}
    moments = [done[name] for name in machine.undone]
    assert moments == sorted(moments, reverse=True)
    if machine.run.state is RunState.COMPLETED:
        assert machine.undone == []
    else:
        undone = {planned.stage.id for planned in machine.plan.stages if planned.undo is not None}
        completed = {stage.id for stage in machine.run.stages if stage.state is StageState.COMPLETED}
        assert set(machine.undone) == undone & completed
