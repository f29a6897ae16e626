"""A run whose tasks end as a test says, decision by decision, and what must hold after each of them."""

import json
from collections.abc import Callable

from hypothesis import strategies as st

from mcp_control.pipelines.counting import open_in, outstanding, task_id
from mcp_control.pipelines.decide import decide
from mcp_control.pipelines.decision import Decision, Material, Start
from mcp_control.pipelines.definition_model import PipelineSpec
from mcp_control.pipelines.model import STAGE_FINAL, Run, RunState, StageRun, StageState
from mcp_control.pipelines.plan import Plan, PlannedStage, compile_plan
from mcp_control.pipelines.transitions import RUN_TRANSITIONS, STAGE_TRANSITIONS
from mcp_control.pipelines.validate import validate
from mcp_control.tasks.followers import Finished
from mcp_control.tasks.model import Links, Task, TaskState

RUN_ID = "run_" + "0" * 36


class Simulation:
    """A run whose tasks end when and as the test says; checks what must hold after every decision."""

    def __init__(self, spec: PipelineSpec, slots: int | None = None) -> None:
        self.slots = slots
        validate(spec)
        self.plan: Plan = compile_plan(spec)
        stages = [StageRun(id=stage.id) for stage in spec.spec.stages]
        self.run = Run(
            id=RUN_ID, version=1, pipeline_id="pipe_x", pipeline="any", pipeline_number=1, state=RunState.PENDING, state_at=0, created_at=0,
            stages=stages,
        )  # fmt: skip
        self.material = Material({})
        self.open: dict[str, Start] = {}
        self.ended: list[Finished] = []
        self.started: set[str] = set()
        self.to_cancel: set[str] = set()
        self.now = 0
        self.step([])

    def step(self, finished: list[Finished], run: Run | None = None, *, insist: bool = False) -> Decision:
        """Decide, check, and take what was decided as committed."""
        self.now += 1
        before = self.run if run is None else run
        self._look()
        decision = decide(self.plan, before, finished, self.material, self.now, insist=insist)
        after = decision.run
        for each in finished:
            self.open.pop(each.task.id, None)
        for old, new in zip(before.stages, after.stages, strict=True):
            assert old.state is new.state or new.state in STAGE_TRANSITIONS[old.state]
        assert before.state is after.state or after.state in RUN_TRANSITIONS[before.state]
        for start in decision.start:
            stage = start.stage
            identity = task_id(RUN_ID, stage.stage.id, start.item, start.round)
            assert identity not in self.started, "a task was started twice"
            self._may_run(stage, after)
            assert before.state is not RunState.PAUSED or (after.ending and stage.stage.run_when == "always")
            assert after.ending is None or stage.stage.run_when == "always", "nothing starts in a run that is ending"
            self.started.add(identity)
            self.open[identity] = start
        width = self.plan.width
        assert width is None or sum(stage.state is StageState.RUNNING for stage in after.stages) <= width
        for planned, stage in zip(self.plan.stages, after.stages, strict=True):
            self._bounded(planned, stage)
        self.run = after
        self.material.outputs.update(decision.outputs)
        for name, results in decision.results.items():
            self.material.results.setdefault(name, {}).update(results)
        waited = {
            task_id(RUN_ID, stage.id, item, stage.round)
            for place, stage in enumerate(after.stages)
            for item in outstanding(self.plan.stages[place], stage)
        }
        assert waited == set(self.open), "the run waits for exactly the tasks that are open"
        assert set(decision.cancel) <= waited
        self.to_cancel |= set(decision.cancel)
        assert not (after.final and self.open), "a run ended while its tasks did not"
        self._look()
        again = decide(self.plan, after, finished, self.material, self.now)
        assert again.run is after, "a decision repeated decided something"
        assert not again.start
        assert not again.outputs
        return decision

    def _look(self) -> None:
        if self.slots is not None:
            self.material.free = {stage.stage.id: self.slots - len(self.open) for stage in self.plan.stages}

    def _may_run(self, planned: PlannedStage, run: Run) -> None:
        states = [run.stages[need].state for need in planned.needs]
        when = planned.stage.run_when
        if when == "all_completed":
            assert set(states) <= {StageState.COMPLETED}, "a child before its parent"
        else:
            assert set(states) <= STAGE_FINAL, "a child before its parent"
            assert when != "any_completed" or StageState.COMPLETED in states

    def _bounded(self, planned: PlannedStage, stage: StageRun) -> None:
        fan_out = planned.stage.fan_out
        if fan_out is None or stage.state is not StageState.RUNNING:
            return
        width = 1 if fan_out.mode == "sequential" else fan_out.width
        assert width is None or open_in(planned, stage) <= width, "more items are under way than its width allows"
        assert open_in(planned, stage) == len(outstanding(planned, stage))

    def end(self, identity: str, state: TaskState = TaskState.COMPLETED) -> Finished:
        """Return the end of an open task."""
        start = self.open[identity]
        name = start.stage.stage.id
        links = Links(run_id=RUN_ID, stage=name, item=start.item, round=start.round)
        task = Task(
            id=identity, version=3, type="work", state=state, state_at=self.now, created_at=0, lane="", order=0, links=links,
            failures=int(state is TaskState.FAILED),
        )  # fmt: skip
        result = (
            json.dumps({"of": name, "item": start.item, "counts": {"n": 1}}).encode()
            if state is TaskState.COMPLETED
            else None
        )
        finished = Finished(task=task, result=result)
        self.ended.append(finished)
        return finished

    def drain(self, choose: Callable[[int], int], outcome: Callable[[str], TaskState]) -> None:
        """End open tasks in the order chosen, a few at a time and with repetitions, until nothing is open."""
        while self.open:
            batch: list[Finished] = []
            for _ in range(1 + choose(2)):
                left = sorted(set(self.open) - {each.task.id for each in batch})
                if left:
                    identity = left[choose(len(left) - 1)]
                    batch.append(self.end(identity, outcome(identity)))
            if choose(2) == 0 and self.ended:
                batch.append(self.ended[choose(len(self.ended) - 1)])
            self.step(batch)


def chooser(data: st.DataObject) -> Callable[[int], int]:
    return lambda top: data.draw(st.integers(0, top)) if top > 0 else 0
