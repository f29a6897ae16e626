"""What people ask of a run: pause, resume, cancel, retry. Pure; `decide` then says what follows.

Each returns the very run it was given when there is nothing to do.
"""

from msgspec.structs import replace

from mcp_control.kernel.errors import FieldError, Invalid
from mcp_control.pipelines.model import RUN_FINAL, STAGE_FINAL, Run, RunState, StageRun, StageState
from mcp_control.pipelines.plan import Plan
from mcp_control.pipelines.transitions import allow
from mcp_control.tasks.model import Request


def pause(run: Run, request: Request) -> Run:
    """Start nothing new; what runs goes on to its end. Raises InvalidTransition when the run has ended."""
    allow("pause", run)
    if run.state is RunState.PAUSED:
        return run
    return replace(run, state=RunState.PAUSED, state_at=request.at, pause=request)


def resume(run: Run, now: int) -> Run:
    """Start again what may start. Raises InvalidTransition when the run has ended."""
    allow("resume", run)
    if run.state is not RunState.PAUSED:
        return run
    return replace(run, state=RunState.RUNNING, state_at=now, pause=None)


def cancel(run: Run, request: Request) -> Run:
    """Let nothing start and have cancelled what runs; a run that is failing already stays failed.

    Raises InvalidTransition when the run has ended.
    """
    allow("cancel", run)
    if run.cancel is not None:
        return run
    if run.ending is not None:
        return replace(run, cancel=request)
    return replace(run, cancel=request, ending=RunState.CANCELLED, reason="cancelled", message=request.reason)


def retry(plan: Plan, run: Run, from_stage: str | None, now: int) -> Run:
    """Run again what did not complete, with the outputs of what did; with `from_stage` also that stage and all after it.

    A fan-out of which items are missing keeps the results that are there, unless something before it runs again.

    Raises:
        InvalidTransition: the run has not failed or been cancelled.
        Invalid: there is no such stage.
    """
    allow("retry", run)
    anew: set[int] = set()
    if from_stage is not None:
        place = plan.place_of.get(from_stage)
        if place is None:
            detail = f"this pipeline has no stage `{from_stage[:64]}`"
            raise Invalid(detail, errors=[FieldError(pointer="#/from_stage", code="unknown-reference", detail=detail)])
        anew = {place} | plan.descendants(place)
    number = run.round + 1
    stages = list(run.stages)
    for place, stage in enumerate(stages):
        if place in anew:
            stages[place] = StageRun(id=stage.id, round=number)
        elif stage.state is not StageState.COMPLETED:
            # Its needs are completed if it has results at all, and they stay so unless they are run anew, which makes it anew too.
            stages[place] = _again(plan, place, stage, number)
    seconds = plan.spec.spec.deadline_seconds
    return replace(
        run,
        state=RunState.RUNNING,
        state_at=now,
        finished_at=None,
        reason="",
        message="",
        round=number,
        ending=None,
        stages=stages,
        pause=None,
        cancel=None,
        deadline_at=None if seconds is None else now + as_millis(seconds),
    )


def as_millis(seconds: float) -> int:
    """Return seconds as milliseconds, at least one."""
    return max(1, round(seconds * 1000))


def broken(run: Run, message: str, now: int) -> Run:
    """Return the run as failed by a fault of the engine or the store, so that it blocks nothing else."""
    if run.state in RUN_FINAL:
        return run
    stages = [
        stage
        if stage.state in STAGE_FINAL
        else replace(
            stage,
            state=StageState.FAILED if stage.state is StageState.RUNNING else StageState.SKIPPED,
            reason="engine-error" if stage.state is StageState.RUNNING else "",
            finished_at=now,
        )
        for stage in run.stages
    ]
    return replace(
        run,
        state=RunState.FAILED,
        state_at=now,
        finished_at=now,
        ending=None,
        reason="engine-error",
        message=message[:500],
        stages=stages,
    )


def _again(plan: Plan, place: int, stage: StageRun, number: int) -> StageRun:
    bad = int.from_bytes(stage.bad, "little")
    ended = int.from_bytes(stage.ended, "little") & ~bad
    planned = plan.stages[place]
    complete = stage.total > 0 and stage.done == stage.total
    if planned.over is None or not ended or complete or stage.has_output:
        return StageRun(id=stage.id, round=number)
    return StageRun(
        id=stage.id,
        round=number,
        since=stage.since,
        total=stage.total,
        done=ended.bit_count(),
        ended=ended.to_bytes((stage.total + 7) >> 3, "little"),
        counts=stage.counts,
    )
