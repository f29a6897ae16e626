"""What follows for a run from tasks that ended: pure and idempotent (architecture, section 5).

`decide` counts each task's end once, however often it is told of it, completes and fails stages, starts those whose needs are met and
ends the run. Running it again on what it returned starts nothing and changes nothing.
"""

from collections.abc import Iterable, Sequence
from typing import Final

import msgspec
from msgspec.structs import replace

from mcp_control.pipelines.counting import count, items_in, numbers, outstanding, started_in, task_id, told_by
from mcp_control.pipelines.decision import Decision, Material, Missing, Start
from mcp_control.pipelines.expressions import ExpressionError, Raw, Scope, elements, join
from mcp_control.pipelines.model import RUN_FINAL, STAGE_FINAL, Run, RunState, StageRun, StageState
from mcp_control.pipelines.plan import Plan, PlannedStage
from mcp_control.tasks.followers import Finished
from mcp_control.tasks.model import TaskState

ITEMS_MAX: Final = 10_000
PAYLOAD_MAX: Final = 1 << 20
_SUMMARY_MAX: Final = 16 << 10
_OPEN: Final = frozenset({StageState.PENDING, StageState.READY})


def decide(
    plan: Plan, run: Run, finished: Sequence[Finished], material: Material, now: int, *, insist: bool = False
) -> Decision:
    """Say what follows.

    Args:
        finished: tasks of this run in their final states; others, and those counted before, are ignored.
        now: wall milliseconds, for the deadline and the times noted.
        insist: name again what is to be cancelled in a run that is ending.

    Raises:
        Missing: `material` lacks something; nothing was decided.
    """
    if run.state in RUN_FINAL:
        return Decision(run=run)
    return _Draft(plan, run, material, now).decide(finished, insist)


class _Draft:
    """A run while it is being decided. Lives for one decision."""

    __slots__ = (
        "_before",
        "_cancel",
        "_material",
        "_now",
        "_outputs",
        "_plan",
        "_progressed",
        "_results",
        "_run",
        "_stages",
        "_start",
        "_summary",
    )

    def __init__(self, plan: Plan, run: Run, material: Material, now: int) -> None:
        self._plan = plan
        self._before = run
        self._run = run
        self._stages = list(run.stages)
        self._material = material
        self._now = now
        self._start: list[Start] = []
        self._cancel: list[str] = []
        self._outputs: dict[str, Raw] = {}
        self._results: dict[str, dict[int, Raw]] = {}
        self._progressed: set[int] = set()
        self._summary: dict[str, object] | None = None

    def decide(self, finished: Sequence[Finished], insist: bool) -> Decision:
        was_ending = self._run.ending
        for each in finished:
            self._count(each)
        for place in sorted(self._progressed):
            self._settle(place)
        if self._late() and self._run.ending is None and not self._over():
            self._end(RunState.FAILED, "deadline-exceeded", "the deadline of the run passed")
        if self._run.ending is None:
            # What may start has become so by what ended just now; only a change from outside calls for a look at everything.
            everything = not self._progressed or self._plan.spec.spec.max_running is not None
            moved = range(len(self._stages)) if everything else sorted(self._progressed)
            if self._run.state is not RunState.PAUSED:
                self._combine_all(moved)
            self._start_all(
                list(moved) if everything else [after for place in moved for after in self._plan.stages[place].after]
            )
        if self._run.ending is not None:
            self._stop(first=insist or was_ending is None)
        if self._over():
            self._finish()
        return self._decision()

    def _over(self) -> bool:
        for stage in self._stages:  # noqa: SIM110  twice as fast as `all`, on the path of every task
            if stage.state not in STAGE_FINAL:
                return False
        return True

    def _late(self) -> bool:
        return self._run.deadline_at is not None and self._run.deadline_at <= self._now

    def _count(self, finished: Finished) -> None:
        place = self._plan.place_of.get(finished.task.links.stage or "")
        if place is None:
            return
        stage = self._stages[place]
        counted = count(self._run.id, self._plan.stages[place], stage, finished)
        if counted is None:
            return
        self._stages[place], at = counted
        if finished.task.state is TaskState.COMPLETED:
            self._results.setdefault(stage.id, {})[at] = b"null" if finished.result is None else finished.result
        self._progressed.add(place)

    # --- ending stages --------------------------------------------------------------------------------------------

    def _settle(self, place: int) -> None:
        """Complete or fail a running stage, as far as its tasks have ended."""
        planned = self._plan.stages[place]
        stage = self._stages[place]
        if stage.state is not StageState.RUNNING:
            return
        if stage.failed or stage.cancelled:
            if self._run.ending is None:
                if self._late():
                    self._end(RunState.FAILED, "deadline-exceeded", "the deadline of the run passed")
                elif stage.failed:
                    self._end(
                        RunState.FAILED, "stage-failed", f"stage {stage.id} failed: {stage.message or stage.reason}"
                    )
                else:
                    self._end(RunState.FAILED, "task-cancelled", f"a task of stage {stage.id} was cancelled")
            if stage.done + stage.failed + stage.cancelled >= started_in(planned, stage):
                self._close(place, StageState.FAILED if stage.failed else StageState.CANCELLED)
        elif stage.done == stage.total:
            try:
                self._complete(place, self._output(place))
            except ExpressionError as error:
                self._fail(place, str(error))

    def _output(self, place: int) -> Raw:
        stage = self._stages[place]
        planned = self._plan.stages[place]
        if planned.over is None or planned.combine is not None:
            return self._results[stage.id][stage.total - 1]
        return join(self._items_of(place))

    def _items_of(self, place: int) -> list[Raw]:
        """Return the results of all items of a fan-out, in order."""
        stage = self._stages[place]
        planned = self._plan.stages[place]
        before = self._material.results.get(stage.id, {})
        fresh = self._results.get(stage.id, {})
        found: list[Raw] = []
        for at in range(items_in(planned, stage)):
            text = fresh.get(at)
            if text is None:
                text = before.get(at)
            if text is None:
                raise Missing(results=place)
            found.append(text)
        return found

    def _complete(self, place: int, output: Raw) -> None:
        """End a stage with its output; its gate decides how. A gate that fails keeps the output."""
        planned = self._plan.stages[place]
        stage = self._stages[place]
        told = told_by(output)
        if told.summary:
            merged = {**(self._run.summary if self._summary is None else self._summary), **told.summary}
            if len(msgspec.json.encode(merged)) <= _SUMMARY_MAX:
                self._summary = merged
        self._outputs[stage.id] = output
        counts = numbers(told.counts) or stage.counts
        gate = planned.stage.gate
        if gate is None or planned.gate is None:
            self._stages[place] = replace(
                stage, state=StageState.COMPLETED, finished_at=self._now, has_output=True, counts=counts
            )
            return
        self._stages[place] = replace(stage, has_output=True, counts=counts)
        passed = planned.gate.value(self._scope(output=output))
        if not isinstance(passed, bool):
            raise ExpressionError(f"the gate `{planned.gate.source}` must give true or false")
        if passed:
            self._close(place, StageState.COMPLETED)
        else:
            message = gate.message or f"the gate of stage {stage.id} does not hold: {gate.check}"
            self._close(place, StageState.FAILED, gate.reason, message)
            self._end(RunState.FAILED, gate.reason, message)

    def _fail(self, place: int, message: str, reason: str = "expression-error") -> None:
        self._close(place, StageState.FAILED, reason, message[:500])
        self._end(RunState.FAILED, reason, f"stage {self._stages[place].id}: {message}"[:500])

    def _close(self, place: int, state: StageState, reason: str | None = None, message: str | None = None) -> None:
        stage = self._stages[place]
        self._stages[place] = replace(
            stage,
            state=state,
            finished_at=self._now,
            reason=stage.reason if reason is None else reason,
            message=stage.message if message is None else message,
        )

    # --- starting -------------------------------------------------------------------------------------------------

    def _combine_all(self, places: Iterable[int]) -> None:
        """Start the combine task of every fan-out among these stages whose items are all completed."""
        for place in places:
            stage = self._stages[place]
            if stage.state is StageState.RUNNING and not stage.combining:
                planned = self._plan.stages[place]
                if planned.combine is not None and stage.done == stage.total - 1 and self._run.ending is None:
                    try:
                        self._start_combine(place)
                    except ExpressionError as error:
                        self._fail(place, str(error))

    def _start_all(self, places: list[int]) -> None:
        """Start what may start among these stages; a fan-out over nothing ends at once, so those after it may follow in the same breath."""
        plan, run = self._plan, self._run
        width = plan.spec.spec.max_running
        if len(places) > 1:
            places.sort(key=lambda place: plan.stages[place].rank)
        for place in places:  # grows while it is gone through
            stage = self._stages[place]
            if stage.state not in _OPEN or not self._needs_met(place):
                continue
            if run.state is RunState.PAUSED or (width is not None and self._running() >= width):
                if stage.state is StageState.PENDING:
                    self._stages[place] = replace(stage, state=StageState.READY)
                continue
            try:
                self._start_stage(place)
            except ExpressionError as error:
                self._fail(place, str(error))
            if self._run.ending is not None:
                return
            if self._stages[place].state is StageState.COMPLETED:
                places += plan.stages[place].after

    def _needs_met(self, place: int) -> bool:
        stages = self._stages
        for need in self._plan.stages[place].needs:  # noqa: SIM110  as above
            if stages[need].state is not StageState.COMPLETED:
                return False
        return True

    def _running(self) -> int:
        return sum(stage.state is StageState.RUNNING for stage in self._stages)

    def _start_stage(self, place: int) -> None:
        planned = self._plan.stages[place]
        stage = self._stages[place]
        if planned.over is None:
            payload = planned.payload.render(self._scope())
            self._stages[place] = replace(
                stage, state=StageState.RUNNING, started_at=self._now, total=1, since=stage.round
            )
            self._add(planned, None, stage.round, payload)
            return
        stage = replace(stage, state=StageState.RUNNING, started_at=self._now)
        items = elements(planned.over.raw(self._scope()))
        if len(items) > ITEMS_MAX:
            raise ExpressionError(f"a fan-out has at most {ITEMS_MAX} items, this one {len(items)}")
        total = len(items) + (planned.combine is not None)
        kept = int.from_bytes(stage.ended, "little") if stage.total == total else 0
        if not kept:
            stage = replace(stage, total=total, done=0, ended=b"", counts={}, since=stage.round)
        explicit = bool(planned.payload.roots & {"item", "index"})
        for index, item in enumerate(items):
            if kept >> index & 1:
                continue
            scope = self._scope(item=item, index=index)
            beside = None if explicit else {"item": item, "index": str(index).encode()}
            self._add(planned, index, stage.round, planned.payload.render(scope, beside))
        self._stages[place] = stage
        if stage.done == len(items):
            if planned.combine is not None:
                self._start_combine(place)
            else:
                self._complete(place, join(self._items_of(place)))

    def _start_combine(self, place: int) -> None:
        planned = self._plan.stages[place]
        stage = self._stages[place]
        assert planned.combine is not None
        items = self._items_of(place)
        beside = None if "items" in planned.combine.roots else {"items": join(items)}
        payload = planned.combine.render(self._scope(items=items), beside)
        self._stages[place] = replace(stage, combining=True)
        self._add(planned, -1, stage.round, payload)

    def _add(self, planned: PlannedStage, item: int | None, round: int, payload: bytes) -> None:
        if len(payload) > PAYLOAD_MAX:
            raise ExpressionError(
                f"the payload would have {len(payload)} bytes, at most {PAYLOAD_MAX}; pass data as artifacts"
            )
        self._start.append(Start(planned, item, round, payload))

    def _scope(
        self,
        *,
        item: Raw | None = None,
        index: int | None = None,
        items: Sequence[Raw] | None = None,
        output: Raw | None = None,
    ) -> Scope:
        params = self._material.params
        if params is None:
            raise Missing(params=True)
        run = self._run
        about = {"id": run.id, "pipeline": run.pipeline, "version": run.pipeline_number, "round": run.round}
        return Scope(params, self._output_of, about, item=item, index=index, items=items, output=output)

    def _output_of(self, stage_id: str) -> Raw:
        found = self._outputs.get(stage_id)
        if found is None:
            found = self._material.outputs.get(stage_id)
        if found is None:
            raise Missing(output=stage_id)
        return found

    # --- ending the run -------------------------------------------------------------------------------------------

    def _end(self, state: RunState, reason: str, message: str) -> None:
        if self._run.ending is None:
            self._run = replace(self._run, ending=state, reason=reason, message=message)

    def _stop(self, first: bool) -> None:
        """Let nothing start, have cancelled what runs (once), and close what has nothing left to wait for."""
        for start in self._start:  # what this very decision was about to start has never existed
            place = start.stage.place
            before, stage = self._before.stages[place], self._stages[place]
            if stage.state is StageState.RUNNING:
                self._stages[place] = before if before.state in _OPEN else replace(stage, combining=False)
        self._start = []
        fate = StageState.CANCELLED if self._run.ending is RunState.CANCELLED else StageState.SKIPPED
        for place, stage in enumerate(self._stages):
            if stage.state in _OPEN:
                self._close(place, fate)
            elif stage.state is StageState.RUNNING:
                left = outstanding(self._plan.stages[place], stage)
                if not left:
                    self._close(place, StageState.FAILED if stage.failed else StageState.CANCELLED)
                elif first:
                    self._cancel += [task_id(self._run.id, stage.id, item, stage.round) for item in left]

    def _finish(self) -> None:
        run = self._run
        self._run = replace(
            run,
            state=run.ending or RunState.COMPLETED,
            ending=None,
            state_at=self._now,
            finished_at=self._now,
            pause=None,
        )

    def _decision(self) -> Decision:
        before, run, stages = self._before, self._run, self._stages
        moved: list[StageRun] = []
        progressed: list[StageRun] = []
        changed = False
        for place, (old, new) in enumerate(zip(before.stages, stages, strict=True)):
            if old is not new:
                changed = True
                if old.state is not new.state:
                    moved.append(new)
                elif place in self._progressed:
                    progressed.append(new)
        if run is before and not changed:
            return Decision(run=before, cancel=self._cancel)
        pending = run.state is RunState.PENDING
        run = replace(
            run,
            stages=stages,
            summary=run.summary if self._summary is None else self._summary,
            started_at=self._now if self._start and run.started_at is None else run.started_at,
            state=RunState.RUNNING if pending else run.state,
            state_at=self._now if pending else run.state_at,
        )
        return Decision(
            run=run,
            start=self._start,
            cancel=self._cancel,
            outputs=self._outputs,
            results=self._results,
            moved=moved,
            progressed=progressed,
        )
