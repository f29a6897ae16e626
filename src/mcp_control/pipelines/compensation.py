"""Undoing what a run did that failed or was cancelled: the compensations of its completed stages, the last one first. Pure.

The pattern is that of sagas (Garcia-Molina and Salem, 1987). One runs at a time; one that fails is told and does not stop the others.
"""

from msgspec.structs import replace

from mcp_control.expressions.programs import ExpressionError
from mcp_control.pipelines.draft import Draft
from mcp_control.pipelines.input_model import COMPENSATION, Compensation, CompensationState
from mcp_control.pipelines.model import RunState, StageState
from mcp_control.tasks.followers import Finished
from mcp_control.tasks.model import TaskState


def undone(draft: Draft) -> bool:
    """Start the next compensation of a run whose stages have all ended; say whether there is nothing left to undo. Raises Missing."""
    if not draft.plan.undoing or draft.run.ending in (None, RunState.COMPLETED):
        return True
    todo = list(draft.run.compensations or _all(draft))
    if not todo:
        return True
    for at, each in enumerate(todo):
        if each.state is CompensationState.PENDING:
            todo[at] = each = _started(draft, each)
        if each.state is CompensationState.RUNNING:
            _note(draft, todo)
            return False
    _note(draft, todo)
    _tell(draft)
    return True


def count(draft: Draft, finished: Finished) -> None:
    """Count the end of the task of a compensation, once."""
    task, run = finished.task, draft.run
    if task.links.run_id != run.id or task.links.round != run.round:
        return
    for at, each in enumerate(run.compensations):
        if each.stage == task.links.stage and each.state is CompensationState.RUNNING:
            if task.state is TaskState.COMPLETED:
                ended = replace(each, state=CompensationState.COMPLETED, finished_at=draft.now)
            else:
                failure = task.failure
                reason = (failure.code if failure else task.reason) or f"task-{task.state.value}"
                ended = _failed(draft, each, reason, failure.message if failure else task.message)
            draft.run = replace(run, compensations=[*run.compensations[:at], ended, *run.compensations[at + 1 :]])
            return


def _all(draft: Draft) -> list[Compensation]:
    """Return the compensations there are to do, in the order they are done."""
    rank = {place: at for at, place in enumerate(draft.plan.order)}
    done = [place for place in draft.plan.undoing if draft.stages[place].state is StageState.COMPLETED]
    done.sort(key=lambda place: (draft.stages[place].finished_at or 0, rank[place]), reverse=True)
    return [Compensation(stage=draft.stages[place].id) for place in done]


def _note(draft: Draft, todo: list[Compensation]) -> None:
    if todo != draft.run.compensations:  # deciding again on the same changes nothing
        draft.run = replace(draft.run, compensations=todo)


def _started(draft: Draft, each: Compensation) -> Compensation:
    planned = draft.plan.stages[draft.plan.place_of[each.stage]]
    assert planned.undo is not None
    started = replace(each, state=CompensationState.RUNNING, started_at=draft.now)
    try:
        output = draft.output_of(each.stage)
        beside = None if "output" in planned.undo.roots else {"output": output}
        payload = planned.undo.render(draft.scope(output=output), beside)
        draft.start.append(draft.made(planned, COMPENSATION, draft.run.round, payload))
    except ExpressionError as error:
        return _failed(draft, started, "expression-error", str(error))
    return started


def _failed(draft: Draft, each: Compensation, reason: str, message: str) -> Compensation:
    return replace(each, state=CompensationState.FAILED, finished_at=draft.now, reason=reason, message=message[:500])


def _tell(draft: Draft) -> None:
    """Note in the run what was undone and, loudly, what was not."""
    run = draft.run
    told = {
        "compensated": [each.stage for each in run.compensations if each.state is CompensationState.COMPLETED],
        "not_compensated": [each.stage for each in run.compensations if each.state is CompensationState.FAILED],
    }
    summary = run.summary if draft.summary is None else draft.summary
    draft.summary = {**summary, **{name: stages for name, stages in told.items() if stages}}
    if told["not_compensated"]:
        message = f"not undone: {', '.join(told['not_compensated'])}; the run ended by {run.reason}: {run.message}"
        draft.run = replace(run, reason="compensation-failed", message=message[:500])
