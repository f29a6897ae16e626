"""Ending stages and runs, as far as their tasks have ended. Pure."""

from typing import Final

import msgspec
from msgspec.structs import replace

from mcp_control.pipelines.counting import items_in, numbers, outstanding, started_in, task_id, told_by
from mcp_control.pipelines.decision import Missing
from mcp_control.pipelines.draft import OPEN, Draft
from mcp_control.pipelines.expressions import ExpressionError, Raw, join
from mcp_control.pipelines.model import RunState, StageState

_SUMMARY_MAX: Final = 16 << 10


def settle(draft: Draft, place: int) -> None:
    """Complete or fail a running stage, as far as its tasks have ended."""
    planned = draft.plan.stages[place]
    stage = draft.stages[place]
    if stage.state is not StageState.RUNNING:
        return
    if stage.failed or stage.cancelled:
        if draft.run.ending is None:
            if draft.late():
                draft.end(RunState.FAILED, "deadline-exceeded", "the deadline of the run passed")
            elif stage.failed:
                draft.end(RunState.FAILED, "stage-failed", f"stage {stage.id} failed: {stage.message or stage.reason}")
            else:
                draft.end(RunState.FAILED, "task-cancelled", f"a task of stage {stage.id} was cancelled")
        if stage.done + stage.failed + stage.cancelled >= started_in(planned, stage):
            draft.close(place, StageState.FAILED if stage.failed else StageState.CANCELLED)
    elif stage.done == stage.total:
        try:
            complete(draft, place, output(draft, place))
        except ExpressionError as error:
            draft.fail(place, str(error))


def output(draft: Draft, place: int) -> Raw:
    """Return the output of a stage whose tasks have all completed. Raises Missing."""
    stage = draft.stages[place]
    planned = draft.plan.stages[place]
    if planned.over is None or planned.combine is not None:
        return draft.results[stage.id][stage.total - 1]
    return join(items_of(draft, place))


def items_of(draft: Draft, place: int) -> list[Raw]:
    """Return the results of all items of a fan-out, in order."""
    stage = draft.stages[place]
    planned = draft.plan.stages[place]
    before = draft.material.results.get(stage.id, {})
    fresh = draft.results.get(stage.id, {})
    found: list[Raw] = []
    for at in range(items_in(planned, stage)):
        text = fresh.get(at)
        if text is None:
            text = before.get(at)
        if text is None:
            raise Missing(results=place)
        found.append(text)
    return found


def complete(draft: Draft, place: int, output: Raw) -> None:
    """End a stage with its output; its gate decides how. A gate that fails keeps the output."""
    planned = draft.plan.stages[place]
    stage = draft.stages[place]
    told = told_by(output)
    if told.summary:
        merged = {**(draft.run.summary if draft.summary is None else draft.summary), **told.summary}
        if len(msgspec.json.encode(merged)) <= _SUMMARY_MAX:
            draft.summary = merged
    draft.outputs[stage.id] = output
    counts = numbers(told.counts) or stage.counts
    gate = planned.stage.gate
    if gate is None or planned.gate is None:
        draft.stages[place] = replace(
            stage, state=StageState.COMPLETED, finished_at=draft.now, has_output=True, counts=counts
        )
        return
    draft.stages[place] = replace(stage, has_output=True, counts=counts)
    passed = planned.gate.value(draft.scope(output=output))
    if not isinstance(passed, bool):
        raise ExpressionError(f"the gate `{planned.gate.source}` must give true or false")
    if passed:
        draft.close(place, StageState.COMPLETED)
    else:
        message = gate.message or f"the gate of stage {stage.id} does not hold: {gate.check}"
        draft.close(place, StageState.FAILED, gate.reason, message)
        draft.end(RunState.FAILED, gate.reason, message)


def stop(draft: Draft, first: bool) -> None:
    """Let nothing start, have cancelled what runs (once), and close what has nothing left to wait for."""
    for start in draft.start:  # what this very decision was about to start has never existed
        place = start.stage.place
        before, stage = draft.before.stages[place], draft.stages[place]
        if stage.state is StageState.RUNNING:
            draft.stages[place] = before if before.state in OPEN else replace(stage, combining=False)
    draft.start = []
    fate = StageState.CANCELLED if draft.run.ending is RunState.CANCELLED else StageState.SKIPPED
    for place, stage in enumerate(draft.stages):
        if stage.state in OPEN:
            draft.close(place, fate)
        elif stage.state is StageState.RUNNING:
            left = outstanding(draft.plan.stages[place], stage)
            if not left:
                draft.close(place, StageState.FAILED if stage.failed else StageState.CANCELLED)
            elif first:
                draft.cancel += [task_id(draft.run.id, stage.id, item, stage.round) for item in left]


def finish(draft: Draft) -> None:
    """End the run, all of whose stages have ended."""
    run = draft.run
    draft.run = replace(
        run,
        state=run.ending or RunState.COMPLETED,
        ending=None,
        state_at=draft.now,
        finished_at=draft.now,
        pause=None,
    )
