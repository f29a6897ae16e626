"""Ending stages and runs, as far as their tasks have ended. Pure."""

from typing import Final

import msgspec
from msgspec.structs import replace

from mcp_control.expressions.programs import ExpressionError
from mcp_control.pipelines.counting import items_in, needed, numbers, open_in, outstanding, spoiled, tasks_of, told_by
from mcp_control.pipelines.decision import Missing
from mcp_control.pipelines.draft import OPEN, Draft
from mcp_control.pipelines.expressions import Raw, join
from mcp_control.pipelines.model import RunState, StageRun, StageState
from mcp_control.pipelines.plan import PlannedStage

_SUMMARY_MAX: Final = 16 << 10
# Bound once: to look a member up in its class takes nine times as long.
_RUNNING: Final = StageState.RUNNING
_COMPLETED: Final = StageState.COMPLETED


def settle(draft: Draft, place: int) -> None:
    """Complete or fail a running stage, as far as its tasks have ended."""
    planned = draft.plan.stages[place]
    stage = draft.stages[place]
    if stage.state is not _RUNNING:
        return
    if spoiled(planned, stage):
        if planned.lenient and not stage.reason:
            stage = _too_few(planned, stage)
            draft.stages[place] = stage
        if draft.run.ending is None:
            if draft.late():
                draft.end(RunState.FAILED, "deadline-exceeded", "the deadline of the run passed")
            elif stage.reason:
                draft.end(RunState.FAILED, "stage-failed", f"stage {stage.id} failed: {stage.message or stage.reason}")
            else:
                draft.end(RunState.FAILED, "task-cancelled", f"a task of stage {stage.id} was cancelled")
        if not open_in(planned, stage):
            draft.close(place, StageState.FAILED if stage.reason else StageState.CANCELLED)
    elif stage.done + stage.failed + stage.cancelled == stage.total:
        try:
            complete(draft, place, output(draft, place))
        except ExpressionError as error:
            draft.fail(place, str(error))


def _too_few(planned: PlannedStage, stage: StageRun) -> StageRun:
    assert planned.stage.fan_out is not None
    items = items_in(planned, stage)
    bad = stage.failed + stage.cancelled
    wanted = needed(planned.stage.fan_out.at_least, items)
    message = f"{bad} of {items} items did not complete, at least {wanted} must"
    return replace(stage, reason="too-few-items", message=message)


def expire(draft: Draft) -> None:
    """Fail the running stages whose deadline has passed."""
    for place, stage in enumerate(draft.stages):
        if stage.deadline_at is not None and stage.deadline_at <= draft.now and stage.state is _RUNNING:
            if not stage.reason:
                message = "the deadline of the stage passed"
                draft.stages[place] = replace(stage, reason="deadline-exceeded", message=message)
            draft.end(RunState.FAILED, "stage-failed", f"stage {stage.id} failed: the deadline of the stage passed")


def output(draft: Draft, place: int) -> Raw:
    """Return the output of a stage whose tasks have all completed. Raises Missing."""
    stage = draft.stages[place]
    planned = draft.plan.stages[place]
    if planned.over is None or planned.combine is not None:
        return draft.results[stage.id][stage.total - 1]
    return join(items_of(draft, place))


def items_of(draft: Draft, place: int) -> list[Raw]:
    """Return the results of all items of a fan-out, in order; null for those that did not complete."""
    stage = draft.stages[place]
    planned = draft.plan.stages[place]
    bad = int.from_bytes(stage.bad, "little")
    return [b"null" if bad >> at & 1 else _told_of(draft, place, at) for at in range(items_in(planned, stage))]


def failures_of(draft: Draft, place: int) -> list[Raw]:
    """Return what is told of the items of a fan-out that did not complete, in order."""
    stage = draft.stages[place]
    bad = int.from_bytes(stage.bad, "little")
    if not bad:
        return []
    return [_told_of(draft, place, at) for at in range(items_in(draft.plan.stages[place], stage)) if bad >> at & 1]


def _told_of(draft: Draft, place: int, at: int) -> Raw:
    stage_id = draft.stages[place].id
    for known in (draft.results, draft.material.results):
        text = known[stage_id].get(at) if stage_id in known else None
        if text is not None:
            return text
    raise Missing(results=place)


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
    if bad := stage.failed + stage.cancelled:
        stage = replace(stage, message=f"{bad} of {items_in(planned, stage)} items did not complete")
    counts = numbers(told.counts) or stage.counts
    gate = planned.stage.gate
    if gate is None or planned.gate is None:
        draft.stages[place] = replace(
            stage,
            state=_COMPLETED,
            finished_at=draft.now,
            has_output=True,
            output=draft.small(output),
            counts=counts,
        )
        return
    draft.stages[place] = replace(stage, has_output=True, output=draft.small(output), counts=counts)
    passed = planned.gate.value(draft.scope(output=output))
    if not isinstance(passed, bool):
        raise ExpressionError(f"the gate `{planned.gate.source}` must give true or false")
    if passed:
        draft.close(place, _COMPLETED)
    else:
        message = gate.message or f"the gate of stage {stage.id} does not hold: {gate.check}"
        draft.close(place, StageState.FAILED, gate.reason, message)
        draft.end(RunState.FAILED, gate.reason, message)


def stop(draft: Draft, first: bool) -> None:
    """Let nothing start, have cancelled what runs (once), and close what has nothing left to wait for."""
    for start in draft.start:  # what this very decision was about to start has never existed
        place = start.stage.place
        before, stage = draft.before.stages[place], draft.stages[place]
        if stage.state is _RUNNING:
            draft.stages[place] = (
                before
                if before.state in OPEN
                else replace(stage, combining=before.combining, begun=before.begun, window=before.window)
            )
    draft.start = []
    fate = StageState.CANCELLED if draft.run.ending is RunState.CANCELLED else StageState.SKIPPED
    for place, stage in enumerate(draft.stages):
        cleaning = place in draft.plan.cleaning
        if stage.state in OPEN or stage.state is StageState.INPUT_REQUIRED:
            if not cleaning:
                draft.close(place, fate)
        elif stage.state is _RUNNING:
            failing = spoiled(draft.plan.stages[place], stage)
            if cleaning and not failing:
                continue
            left = outstanding(draft.plan.stages[place], stage)
            if not left:
                draft.close(place, StageState.FAILED if stage.reason else StageState.CANCELLED)
            elif first or cleaning:
                draft.cancel += tasks_of(draft.run.id, draft.plan.stages[place], stage, left)


def finish(draft: Draft) -> None:
    """End the run, all of whose stages have ended. Raises Missing."""
    outputs = draft.plan.outputs
    if draft.run.ending is None and outputs is not None:
        try:
            draft.result = draft.sized(outputs.render(draft.scope()))
        except ExpressionError as error:
            draft.end(RunState.FAILED, "expression-error", f"outputs: {error}"[:500])
    run = draft.run
    draft.run = replace(
        run,
        state=run.ending or RunState.COMPLETED,
        ending=None,
        has_output=draft.result is not None,
        state_at=draft.now,
        finished_at=draft.now,
        pause=None,
    )
