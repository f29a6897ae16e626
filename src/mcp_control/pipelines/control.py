"""What people ask of a run: pause, resume, cancel, retry. Pure; `decide` then says what follows.

Each returns the very run it was given when there is nothing to do.
"""

from collections.abc import Collection
from typing import Final

from msgspec.structs import replace

from mcp_control.kernel.errors import FieldError, Invalid
from mcp_control.pipelines.expressions import Expression
from mcp_control.pipelines.model import (
    NOT_REACHED,
    NOT_WANTED,
    RUN_FINAL,
    STAGE_FINAL,
    Retry,
    Run,
    RunState,
    StageRun,
    StageState,
)
from mcp_control.pipelines.plan import Plan, PlannedStage
from mcp_control.pipelines.templates import Template
from mcp_control.pipelines.transitions import allow
from mcp_control.tasks.model import Request

RETRIES_MAX: Final = 20


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


def retry(
    plan: Plan, run: Run, request: Request, from_stage: str | None = None, changed: Collection[str] = frozenset()
) -> Run:
    """Run again what did not complete, with the outputs of what did; with `from_stage` also that stage and all after it.

    A fan-out of which items are missing keeps the results that are there, unless something before it runs again, or it reads a changed
    parameter.

    Args:
        changed: names of the parameters that have other values from now on.

    Raises:
        InvalidTransition: the run has not failed or been cancelled.
        Invalid: there is no such stage; a result that would be kept was made with the old value of a changed parameter; or nothing that
            runs again reads it.
    """
    allow("retry", run)
    # What was undone, or may have been, must be done again.
    anew = {plan.place_of[each.stage] for each in run.compensations}
    anew = anew.union(*map(plan.descendants, anew))
    if from_stage is not None:
        place = plan.place_of.get(from_stage)
        if place is None:
            detail = f"this pipeline has no stage `{from_stage[:64]}`"
            raise Invalid(detail, errors=[FieldError(pointer="#/from_stage", code="unknown-reference", detail=detail)])
        anew |= {place} | plan.descendants(place)
    number = run.round + 1
    stages = list(run.stages)
    again = {place for place, stage in enumerate(stages) if _runs_again(plan.stages[place], stage, changed)}
    for place in plan.order:  # needs come first
        if any(need in again or need in anew for need in plan.stages[place].needs):
            anew.add(place)
    _check_changes(plan, run, anew, changed)
    for place, stage in enumerate(stages):
        if place in anew:
            stages[place] = StageRun(id=stage.id, round=number, since=number)
        elif place in again:
            # Its needs are completed if it has results at all, and they stay so unless they are run anew, which makes it anew too.
            fresh = bool(changed) and not changed_in(plan.stages[place], changed).isdisjoint(changed)
            stages[place] = (
                StageRun(id=stage.id, round=number, since=number) if fresh else _again(plan, place, stage, number)
            )
    seconds = plan.spec.spec.deadline_seconds
    now = request.at
    told = Retry(
        round=number, at=now, by=request.by, reason=request.reason, from_stage=from_stage, params=sorted(changed)
    )
    return replace(
        run,
        state=RunState.RUNNING,
        state_at=now,
        finished_at=None,
        reason="",
        message="",
        round=number,
        retries=[*run.retries[1 - RETRIES_MAX :], told],
        ending=None,
        stages=stages,
        compensations=[],
        pause=None,
        cancel=None,
        deadline_at=None if seconds is None else now + as_millis(seconds),
    )


def _runs_again(planned: PlannedStage, stage: StageRun, changed: Collection[str]) -> bool:
    if stage.state is StageState.SKIPPED and stage.reason in (NOT_WANTED, NOT_REACHED):
        return bool(changed) and bool(changed_in(planned, changed))
    return stage.state is not StageState.COMPLETED


def changed_in(planned: PlannedStage, names: Collection[str]) -> set[str]:
    """Return which of these parameters a stage reads; all of them where it looks at the parameters as a whole."""
    found: set[str] = set()
    for name in planned.__struct_fields__:
        part = getattr(planned, name)
        for expression in part.expressions if isinstance(part, Template) else (part,):
            if isinstance(expression, Expression):
                whole = "params" in expression.roots and not expression.params
                found.update(names if whole else expression.params.intersection(names))
    return found


def _check_changes(plan: Plan, run: Run, anew: set[int], changed: Collection[str]) -> None:
    """Raise Invalid where changed parameters and kept results do not go together."""
    read: set[str] = set()
    found: list[FieldError] = []
    for place in plan.order if changed else ():
        names = changed_in(plan.stages[place], changed)
        if place in anew or run.stages[place].state is not StageState.COMPLETED:
            read |= names
            continue
        for name in sorted(names):
            stage = run.stages[place].id
            detail = f"stage `{stage}` keeps its result, which was made with the old value of `{name}`: retry from it"
            found.append(FieldError(pointer=f"#/params/{name}", code="stale-result", detail=detail))
    for name in sorted(set(changed) - read - {error.pointer.removeprefix("#/params/") for error in found}):
        detail = f"nothing that runs again reads `{name}`"
        found.append(FieldError(pointer=f"#/params/{name}", code="no-effect", detail=detail))
    if found:
        raise Invalid(found[0].detail, errors=found[:50])


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
    if stage.has_output or (planned.nested is None and (planned.over is None or not ended or complete)):
        return StageRun(id=stage.id, round=number, since=number)
    if planned.over is None:  # its run is retried, too
        return StageRun(id=stage.id, round=number, since=stage.since)
    return StageRun(
        id=stage.id,
        round=number,
        since=stage.since,
        total=stage.total,
        done=ended.bit_count(),
        ended=ended.to_bytes((stage.total + 7) >> 3, "little"),
        counts=stage.counts,
        cached=stage.cached,
    )
