"""Why a run, or a stage of it, is not further: the first reason in the order in which things start. Pure."""

from collections.abc import Mapping
from datetime import datetime
from typing import Final

import msgspec

from mcp_control.kernel.clock import to_datetime
from mcp_control.pipelines.model import RUN_FINAL, STAGE_FINAL, Run, RunState, StageState
from mcp_control.pipelines.view_model import RunExplanation, RunView, StageExplanation, StageView
from mcp_control.tasks.model import HELD_STATES
from mcp_control.tasks.view_model import Explanation

_HELD_BY_MAX: Final = 10
_WORKING: Final = (StageState.RUNNING, StageState.INPUT_REQUIRED)


def explain_stage(run: Run, view: RunView, stage: StageView, task: Explanation | None) -> StageExplanation:
    """Return what a stage waits for, or what it is doing.

    Args:
        view: of the run.
        task: of a task of it that has not ended, one that waits before one that runs; None where there is none.
    """
    since = stage.started_at
    if stage.state in STAGE_FINAL:
        message = f"the stage is {stage.state.value}" + (f": {stage.message}" if stage.message else "")
        return _stage(stage, "finished", message, stage.finished_at)
    if run.state in RUN_FINAL:
        return _stage(stage, "finished", f"the run is {run.state.value}", view.finished_at)
    if run.ending is not None:
        message = f"the run ends {run.ending.value}; the stage starts nothing more"
        return _stage(stage, "ending", message, view.state_since, task=task)
    by_name = {each.name: each for each in view.stages}
    if stage.state is StageState.PENDING:
        missing = [name for name in stage.needs if name in by_name and by_name[name].state not in STAGE_FINAL]
        message = f"it waits for {', '.join(missing[:5])}" if missing else "it is about to become ready"
        return _stage(stage, "needs-not-done", message, view.started_at or view.created_at, missing)
    if stage.state is StageState.INPUT_REQUIRED:
        return _awaiting(stage, since)
    if run.pause is not None:
        why = f": {run.pause.reason}" if run.pause.reason else ""
        return _stage(stage, "paused", f"{run.pause.by} paused the run{why}", to_datetime(run.pause.at), [run.pause.by])
    if stage.state is StageState.READY:
        holders = [each.name for each in view.stages if each.state in _WORKING]
        message = "as many stages as the run may have are under way" if holders else "it is about to start"
        return _stage(stage, "run-full" if holders else "next", message, view.state_since, holders)
    if stage.children:
        return _stage(stage, "running", "runs of other pipelines are under way", since, stage.children)
    if task is None or task.state in HELD_STATES:
        held = [] if task is None else [task.task_id]
        return _stage(stage, "running", "agents work on its tasks", since, held, task)
    found = _stage(stage, task.code, task.message, task.since, task.held_by, task)
    return msgspec.structs.replace(found, expected_start=task.expected_start)


def _awaiting(stage: StageView, since: datetime | None) -> StageExplanation:
    wait = stage.waits_for
    if wait is None:
        return _stage(stage, "input-required", stage.message or "it waits for a person", since)
    if wait.approval is not None:
        return _stage(stage, "approval", "it waits for somebody to decide", since, [wait.approval])
    return _stage(stage, "signal", f"it waits for the signal {wait.signal}", since, [wait.signal or ""])


def explain_run(run: Run, view: RunView, tasks: Mapping[str, Explanation]) -> RunExplanation:
    """Return what a run waits for, or what it is doing, and the same for each stage that has not ended.

    It is what its first stage waits for that could start or go on; a run of which anything is worked on is running.

    Args:
        tasks: by stage, a task of it that has not ended, as for `explain_stage`.
    """
    stages = [
        explain_stage(run, view, stage, tasks.get(stage.name))
        for stage in view.stages
        if stage.state not in STAGE_FINAL and run.state not in RUN_FINAL
    ]
    if run.state in RUN_FINAL:
        message = f"the run is {run.state.value}" + (f": {view.message}" if view.message else "")
        return _run(view, "finished", message, view.finished_at or view.state_since, stages)
    if run.ending is not None:
        message = f"the run ends {run.ending.value}: it waits for what is under way"
        return _run(view, "ending", message, view.state_since, stages)
    if run.state is RunState.PAUSED and run.pause is not None:
        why = f": {run.pause.reason}" if run.pause.reason else ""
        since = to_datetime(run.pause.at)
        return _run(view, "paused", f"{run.pause.by} paused it{why}", since, stages, [run.pause.by])
    working = [stage.stage for stage in stages if stage.code == "running"]
    if working:
        return _run(view, "running", f"at work: {', '.join(working[:5])}", view.state_since, stages, working)
    first = next((stage for stage in stages if stage.code != "needs-not-done"), None)
    if first is None:
        return _run(view, "next", "its first stages are about to start", view.state_since, stages)
    found = _run(
        view, first.code, f"{first.stage}: {first.message}", first.since or view.state_since, stages, first.held_by
    )
    return msgspec.structs.replace(found, expected_start=first.expected_start)


def _stage(
    stage: StageView,
    code: str,
    message: str,
    since: datetime | None,
    held_by: list[str] | None = None,
    task: Explanation | None = None,
) -> StageExplanation:
    return StageExplanation(
        stage=stage.name,
        state=stage.state,
        code=code,
        message=message,
        since=since,
        held_by=(held_by or [])[:_HELD_BY_MAX],
        task=task,
    )


def _run(
    view: RunView,
    code: str,
    message: str,
    since: datetime,
    stages: list[StageExplanation],
    held_by: list[str] | None = None,
) -> RunExplanation:
    return RunExplanation(
        run_id=view.id,
        state=view.state,
        code=code,
        message=message,
        since=since,
        held_by=(held_by or [])[:_HELD_BY_MAX],
        stages=stages,
    )
