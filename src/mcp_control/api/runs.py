"""Routes of `/runs`."""

from typing import Annotated, Final

import msgspec

from mcp_control.api.artifacts import page_of
from mcp_control.api.call import JSON, Call, Reply, reply, tagged
from mcp_control.api.decode import Body
from mcp_control.api.query import PageQuery, Query, WaitQuery
from mcp_control.api.routing import Endpoint
from mcp_control.api.tasks import Nothing, Reason, with_key
from mcp_control.artifacts.model import ArtifactView
from mcp_control.artifacts.service import ArtifactFilter
from mcp_control.kernel.paging import Page
from mcp_control.pipelines.input_model import RerunRequest
from mcp_control.pipelines.model import Run, RunState
from mcp_control.pipelines.view_model import RunExplanation, RunView, StageExplanation
from mcp_control.tasks.listing import TaskFilter
from mcp_control.tasks.view_model import TaskView


class RunsQuery(PageQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Filters; all that are given must hold."""

    state: RunState | None = None
    pipeline: str | None = None


class RetryRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The stage to go back to, the failed ones where none is named; parameters that have other values from now on; and why."""

    from_stage: Annotated[str, msgspec.Meta(max_length=128)] | None = None
    params: dict[str, msgspec.Raw] = {}
    reason: Annotated[str, msgspec.Meta(max_length=1000)] = ""


_LIST: Final = Query(RunsQuery)
_WAIT: Final = Query(WaitQuery)
_PAGE: Final = Query(PageQuery)
_REASON: Final = Body(Reason, optional=True)
_NOTHING: Final = Body(Nothing, optional=True)
_RETRY: Final = Body(RetryRequest, optional=True)
_RERUN: Final = Body(RerunRequest, optional=True, envelope=2)


async def list_runs(call: Call) -> Reply:
    """List runs, newest first."""
    query = call.query(_LIST)
    engine = call.services.pipelines
    return reply(
        await engine.runs(
            call.actor, state=query.state, pipeline=query.pipeline, cursor=query.cursor, limit=query.limit
        )
    )


async def get_run(call: Call) -> Reply:
    """Return a run, waiting for its end when asked to."""
    wait = call.query(_WAIT).wait
    engine = call.services.pipelines
    run_id = call.params["run_id"]
    run = await (call.until_gone(engine.wait(call.actor, run_id, wait)) if wait else engine.run(call.actor, run_id))
    view = await engine.view(call.actor, run)
    budget, usage = await call.services.spending.used(run_id)
    if usage is not None or budget is not None:
        view = msgspec.structs.replace(view, budget=budget, usage=usage)
    return tagged(view, view.etag)


async def pause_run(call: Call) -> Reply:
    """Let running tasks end and start nothing new."""
    reason = (await call.decode(_REASON)).reason
    return await _answer(call, await call.services.pipelines.pause(call.actor, call.params["run_id"], reason))


async def resume_run(call: Call) -> Reply:
    """Go on with a paused run."""
    await call.decode(_NOTHING)
    return await _answer(call, await call.services.pipelines.resume(call.actor, call.params["run_id"]))


async def cancel_run(call: Call) -> Reply:
    """Cancel a run and its tasks."""
    reason = (await call.decode(_REASON)).reason
    return await _answer(call, await call.services.pipelines.cancel(call.actor, call.params["run_id"], reason))


async def retry_run(call: Call) -> Reply:
    """Repeat a failed or cancelled run from the stage that failed, or from the one named."""
    request = await call.decode(_RETRY)
    engine = call.services.pipelines
    run_id = call.params["run_id"]
    return await _answer(
        call, await engine.retry(call.actor, run_id, request.from_stage, request.params, request.reason)
    )


async def rerun_rejected(call: Call) -> Reply:
    """Start a run over what this one set aside, or over the corrected records."""
    request = with_key(call, await call.decode(_RERUN))
    run, created = await call.services.reruns.start(call.actor, call.params["run_id"], request, call.origin)
    view = await call.services.pipelines.view(call.actor, run)
    return tagged(view, view.etag, 201 if created else 200)


async def _answer(call: Call, run: Run) -> Reply:
    view = await call.services.pipelines.view(call.actor, run)
    return tagged(view, view.etag)


async def run_tasks(call: Call) -> Reply:
    """List the tasks of a run, oldest first."""
    query = call.query(_PAGE)
    run = await call.services.pipelines.run(call.actor, call.params["run_id"])
    return reply(
        await call.services.tasks.list(
            call.actor, TaskFilter(run=run.id, oldest_first=True), cursor=query.cursor, limit=query.limit
        )
    )


async def explain_run(call: Call) -> Reply:
    """Say why a run is not further: the first reason, who holds it, since when; and the same for each stage that has not ended."""
    return reply(await call.services.run_explainer.run(call.actor, call.params["run_id"]))


async def explain_stage(call: Call) -> Reply:
    """Say why a stage of a run is not further."""
    return reply(await call.services.run_explainer.stage(call.actor, call.params["run_id"], call.params["stage"]))


async def stage_output(call: Call) -> Reply:
    """Return the output of a stage."""
    output = await call.services.pipelines.output(call.actor, call.params["run_id"], call.params["stage"])
    return Reply(200, output, (JSON,))


async def run_artifacts(call: Call) -> Reply:
    """List the artifacts of a run."""
    query = call.query(_PAGE)
    run = await call.services.pipelines.run(call.actor, call.params["run_id"])
    return reply(await page_of(call, ArtifactFilter(run=run.id), query))


_ONE: Final = "/runs/{run_id}"

ENDPOINTS: Final = (
    Endpoint(method="GET", path="/runs", handler=list_runs, summary="List runs", tag="runs", query=_LIST, returns=Page[RunView]),
    Endpoint(method="GET", path=_ONE, handler=get_run, summary="Get a run", tag="runs", query=_WAIT, returns=RunView),
    Endpoint(
        method="POST", path=f"{_ONE}/pause", handler=pause_run, summary="Pause a run", tag="runs", body=_REASON, returns=RunView,
        example={"reason": "maintenance"},
    ),
    Endpoint(method="POST", path=f"{_ONE}/resume", handler=resume_run, summary="Resume a run", tag="runs", body=_NOTHING, returns=RunView),
    Endpoint(
        method="POST", path=f"{_ONE}/cancel", handler=cancel_run, summary="Cancel a run", tag="runs", body=_REASON, returns=RunView,
        example={"reason": "wrong data"},
    ),
    Endpoint(
        method="POST", path=f"{_ONE}/retry", handler=retry_run, summary="Retry a run", tag="runs", weight="submit",
        body=_RETRY, returns=RunView,
        example={"from_stage": "export", "params": {"format": "jsonl"}, "reason": "the other format was wanted"},
    ),
    Endpoint(
        method="POST", path=f"{_ONE}/rerun-rejected", handler=rerun_rejected, summary="Run again what a run set aside", tag="runs",
        weight="submit", body=_RERUN, returns=RunView, others={200: RunView}, status=201, example={"params": {"quality": {"gate": "warn"}}},
    ),
    Endpoint(method="GET", path=f"{_ONE}/tasks", handler=run_tasks, summary="Tasks of a run", tag="runs", query=_PAGE,
        returns=Page[TaskView]),
    Endpoint(
        method="GET", path=f"{_ONE}/explain", handler=explain_run, summary="Why is it not further?", tag="runs", returns=RunExplanation,
    ),
    Endpoint(
        method="GET", path=f"{_ONE}/stages/{{stage:name}}/explain", handler=explain_stage, summary="Why is a stage not further?",
        tag="runs", returns=StageExplanation,
    ),
    Endpoint(method="GET", path=f"{_ONE}/stages/{{stage:name}}/output", handler=stage_output, summary="Output of a stage", tag="runs"),
    Endpoint(
        method="GET", path=f"{_ONE}/artifacts", handler=run_artifacts, summary="Artifacts of a run", tag="runs", query=_PAGE,
        returns=Page[ArtifactView],
    ),
)  # fmt: skip
