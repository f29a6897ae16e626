"""Why a run, or a stage of it, is not further."""

from typing import Any

import pytest
from msgspec.structs import replace

from mcp_control.kernel.clock import to_datetime
from mcp_control.pipelines.explain import explain_run, explain_stage
from mcp_control.pipelines.model import Run, RunState, StageState
from mcp_control.pipelines.view_model import RunView, StageView, WaitView
from mcp_control.tasks.model import Request, TaskState
from mcp_control.tasks.view_model import Explanation

NOW = 1_800_000_000_000
AT = to_datetime(NOW)
S = StageState


def _stage(name: str, state: StageState, *needs: str, **more: Any) -> StageView:
    return StageView(name=name, state=state, uses="echo", needs=list(needs), progress=0.0, **more)


def _run(*stages: StageView, state: RunState = RunState.RUNNING, **more: Any) -> tuple[Run, RunView]:
    run = Run(
        id="run_1",
        version=1,
        pipeline_id="pipe_1",
        pipeline="p",
        pipeline_number=1,
        state=state,
        state_at=NOW,
        created_at=NOW,
        stages=[],
        **more,
    )
    view = RunView(
        id="run_1",
        pipeline="p",
        pipeline_version=1,
        state=state,
        state_since=AT,
        created_at=AT,
        progress=0.0,
        stages=list(stages),
        etag="1",
    )
    return run, view


def _task(code: str, state: TaskState = TaskState.QUEUED) -> Explanation:
    return Explanation(
        task_id="task_1", state=state, code=code, message="why", since=AT, held_by=["agent_1"], expected_start=AT
    )


PAUSE = Request(at=NOW, by="user_1", reason="later")
CASES: list[tuple[StageView, dict[str, Any], Explanation | None, str, list[str]]] = [
    (_stage("b", S.PENDING, "a"), {}, None, "needs-not-done", ["a"]),
    (_stage("b", S.READY), {}, None, "run-full", ["a"]),
    (_stage("b", S.READY), {"pause": PAUSE}, None, "paused", ["user_1"]),
    (_stage("b", S.INPUT_REQUIRED, waits_for=WaitView(approval="appr_1")), {}, None, "approval", ["appr_1"]),
    (_stage("b", S.INPUT_REQUIRED, waits_for=WaitView(signal="go")), {}, None, "signal", ["go"]),
    (_stage("b", S.RUNNING), {}, _task("agents-full"), "agents-full", ["agent_1"]),
    (_stage("b", S.RUNNING), {}, _task("limit-full", TaskState.BLOCKED), "limit-full", ["agent_1"]),
    (_stage("b", S.RUNNING), {}, _task("running", TaskState.RUNNING), "running", ["task_1"]),
    (_stage("b", S.RUNNING, children=["run_2"]), {}, None, "running", ["run_2"]),
    (_stage("b", S.RUNNING), {"ending": RunState.CANCELLED}, None, "ending", []),
    (_stage("b", S.COMPLETED), {}, None, "finished", []),
]


@pytest.mark.parametrize(("stage", "more", "task", "code", "held_by"), CASES)
def test_a_stage_tells_the_first_reason(
    stage: StageView, more: dict[str, Any], task: Explanation | None, code: str, held_by: list[str]
) -> None:
    """The first reason in the order in which things start, with who holds the stage."""
    run, view = _run(_stage("a", S.RUNNING), stage, **more)
    found = explain_stage(run, view, stage, task)
    assert (found.code, found.held_by, found.state) == (code, held_by, stage.state)
    assert found.message
    assert found.expected_start == (AT if task is not None and code == task.code and task.code != "running" else None)


def test_a_run_is_what_its_first_stage_that_could_go_on_waits_for() -> None:
    """Nothing is worked on: the run says why the first stage with a reason of its own waits, and lists all that have not ended."""
    done, waits, later = _stage("a", S.COMPLETED), _stage("b", S.RUNNING, "a"), _stage("c", S.PENDING, "b")
    run, view = _run(done, waits, later)
    found = explain_run(run, view, {"b": _task("no-capable-agent")})
    assert (found.code, found.message, found.expected_start) == ("no-capable-agent", "b: why", AT)
    assert [(stage.stage, stage.code) for stage in found.stages] == [
        ("b", "no-capable-agent"),
        ("c", "needs-not-done"),
    ]
    at_work = explain_run(run, view, {"b": _task("running", TaskState.RUNNING)})
    assert (at_work.code, at_work.held_by) == ("running", ["b"])


@pytest.mark.parametrize(
    ("state", "more", "code"),
    [
        (RunState.PAUSED, {"pause": PAUSE}, "paused"),
        (RunState.RUNNING, {"ending": RunState.FAILED}, "ending"),
        (RunState.FAILED, {}, "finished"),
        (RunState.PENDING, {}, "next"),
    ],
)
def test_a_run_that_starts_nothing_says_so_first(state: RunState, more: dict[str, Any], code: str) -> None:
    """Paused, ending and finished runs say that before anything of their stages."""
    run, view = _run(_stage("a", S.PENDING), state=state, **more)
    if state is RunState.FAILED:
        view = replace(view, finished_at=AT)
    found = explain_run(run, view, {})
    assert found.code == code
    assert found.state is state
    assert bool(found.stages) is (state is not RunState.FAILED)
