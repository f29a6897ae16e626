"""What follows for a run from tasks that ended: pure and idempotent (architecture, section 5).

`decide` counts each task's end once, however often it is told of it, completes and fails stages, starts those whose needs are met and
ends the run. Running it again on what it returned starts nothing and changes nothing. How stages start is in `launching.py`, how they and
the run end in `closing.py`; both work on a `Draft`.
"""

from collections.abc import Sequence
from typing import Final

from msgspec.structs import replace

from mcp_control.pipelines.adaptive import after
from mcp_control.pipelines.closing import expire, finish, settle, stop
from mcp_control.pipelines.compensation import count as count_undone
from mcp_control.pipelines.compensation import undone
from mcp_control.pipelines.counting import count, failure_of, open_in
from mcp_control.pipelines.decision import Decision, Material
from mcp_control.pipelines.draft import Draft
from mcp_control.pipelines.input_model import COMPENSATION
from mcp_control.pipelines.launching import go_on, start_all
from mcp_control.pipelines.model import RUN_FINAL, Run, RunState, StageRun, Window
from mcp_control.pipelines.plan import Plan, PlannedStage
from mcp_control.pipelines.waiting import attend
from mcp_control.tasks.followers import Finished
from mcp_control.tasks.model import TaskState

# Bound once: to look a member up in its class takes nine times as long.
_PAUSED: Final = RunState.PAUSED
_COMPLETED: Final = TaskState.COMPLETED


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
    draft = Draft(plan, run, material, now)
    was_ending = run.ending
    if plan.timed:
        expire(draft)
    for each in finished:
        _count(draft, each)
    for place in sorted(draft.progressed):
        settle(draft, place)
    if plan.waiting:
        attend(draft)
    if draft.late() and draft.run.ending is None and not draft.over():
        draft.end(RunState.FAILED, "deadline-exceeded", "the deadline of the run passed")
    if draft.run.ending is None:
        # What may start has become so by what ended just now; only a change from outside calls for a look at everything.
        everything = not draft.progressed or plan.choosy
        moved = range(len(draft.stages)) if everything else sorted(draft.progressed)
        if draft.run.state is not _PAUSED:
            go_on(draft, moved)
        start_all(
            draft, list(moved) if everything else [follower for place in moved for follower in plan.stages[place].after]
        )
    if draft.run.ending is not None:
        stop(draft, first=insist or was_ending is None)
        if plan.cleaning:
            go_on(draft, plan.cleaning)
            start_all(draft, list(plan.cleaning))
    if draft.over() and undone(draft):
        finish(draft)
    return draft.decision()


def _count(draft: Draft, finished: Finished) -> None:
    if finished.task.links.item == COMPENSATION:
        count_undone(draft, finished)
        return
    place = draft.plan.place_of.get(finished.task.links.stage or "")
    if place is None:
        return
    stage = draft.stages[place]
    counted = count(draft.run.id, draft.plan.stages[place], stage, finished)
    if counted is None:
        return
    planned = draft.plan.stages[place]
    changed, at = counted
    draft.stages[place] = _adapted(draft, planned, stage, changed, finished)
    if finished.task.state is _COMPLETED:
        draft.results.setdefault(stage.id, {})[at] = b"null" if finished.result is None else finished.result
    elif planned.lenient:
        draft.results.setdefault(stage.id, {})[at] = failure_of(finished.task, at)
    draft.progressed.add(place)
    draft.ended += 1


def _adapted(draft: Draft, planned: PlannedStage, before: StageRun, stage: StageRun, finished: Finished) -> StageRun:
    """Return a stage with its window after the end of a task; that of the run follows, too."""
    fan_out = planned.stage.fan_out
    if planned.place not in draft.plan.adaptive:
        return stage
    completed = finished.task.state is _COMPLETED
    if draft.plan.spec.spec.mode == "adaptive":
        window = draft.run.window or Window()
        window = after(window, failed=finished.task.failures, completed=completed, open=draft.running())
        draft.run = replace(draft.run, window=window)
    if fan_out is None or fan_out.mode != "adaptive":
        return stage
    window = stage.window or Window()
    busy = open_in(planned, before)
    return replace(stage, window=after(window, failed=finished.task.failures, completed=completed, open=busy))
