"""Routes of `/pipelines`."""

from typing import Annotated, Final

import msgspec

from mcp_control.api.call import Call, Reply, check_media_type, reply
from mcp_control.api.decode import Body
from mcp_control.api.query import PageQuery, Query
from mcp_control.api.routing import Endpoint
from mcp_control.api.tasks import with_key
from mcp_control.kernel.paging import Page
from mcp_control.pipelines.definition import from_yaml
from mcp_control.pipelines.model import PipelineSpec, PipelineView, RunRequest, RunView

YAML: Final = "application/yaml"


class CreateQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`dry_run` checks the definition and keeps nothing."""

    dry_run: bool = False


class VersionQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A version of the pipeline; the newest where none is named."""

    version: Annotated[int, msgspec.Meta(ge=1, le=2**31)] | None = None


class Validated(msgspec.Struct, frozen=True, kw_only=True):
    """The definition would be accepted; the answer to `dry_run`."""

    valid: bool
    warnings: list[str]


_SPEC: Final = Body(PipelineSpec, envelope=8, media_types=("application/json", YAML))
_RUN: Final = Body(RunRequest, envelope=2, optional=True)
_CREATE: Final = Query(CreateQuery)
_VERSION: Final = Query(VersionQuery)
_PAGE: Final = Query(PageQuery)


async def create_pipeline(call: Call) -> Reply:
    """Accept a definition as a new version, in JSON or YAML; one identical to the newest version changes nothing."""
    dry = call.query(_CREATE).dry_run
    raw = await call.read()
    check_media_type(call.headers.get(b"content-type"), _SPEC.media_types)
    spec = from_yaml(raw) if call.headers[b"content-type"].lower().startswith(YAML.encode()) else _SPEC.decode(raw)
    engine = call.services.pipelines
    if dry:
        return reply(Validated(valid=True, warnings=await engine.check(call.actor, spec)))
    pipeline, created = await engine.create(call.actor, spec)
    return reply(call.services.pipelines.view_pipeline(pipeline), 201 if created else 200)


async def list_pipelines(call: Call) -> Reply:
    """List the newest version of each pipeline."""
    query = call.query(_PAGE)
    return reply(await call.services.pipelines.list(call.actor, cursor=query.cursor, limit=query.limit))


async def get_pipeline(call: Call) -> Reply:
    """Return a pipeline with its definition."""
    version = call.query(_VERSION).version
    pipeline = await call.services.pipelines.get(call.actor, call.params["pipeline"], version)
    return reply(call.services.pipelines.view_pipeline(pipeline))


async def execute_pipeline(call: Call) -> Reply:
    """Start a run."""
    request = with_key(call, await call.decode(_RUN))
    engine = call.services.pipelines
    run, created = await engine.execute(call.actor, call.params["pipeline"], request, call.origin)
    return reply(await engine.view(call.actor, run), 201 if created else 200)


_EXAMPLE: Final = {
    "apiVersion": "mcp-control/v1",
    "kind": "Pipeline",
    "metadata": {"name": "greeting"},
    "spec": {
        "params": {"name": {"type": "string"}},
        "stages": [
            {"id": "greet", "uses": "greet", "with": {"name": "${{ params.name }}"}},
            {"id": "shout", "uses": "shout", "needs": ["greet"], "with": {"text": "${{ stages.greet.output }}"}},
        ],
    },
}

ENDPOINTS: Final = (
    Endpoint(
        method="POST", path="/pipelines", handler=create_pipeline, summary="Define a pipeline", tag="pipelines",
        body=_SPEC, query=_CREATE,
        returns=PipelineView, others={200: Validated}, status=201, example=_EXAMPLE,
    ),
    Endpoint(
        method="GET", path="/pipelines", handler=list_pipelines, summary="List pipelines", tag="pipelines",
        query=_PAGE, returns=Page[PipelineView],
    ),
    Endpoint(
        method="GET", path="/pipelines/{pipeline:name}", handler=get_pipeline, summary="Get a pipeline", tag="pipelines", query=_VERSION,
        returns=PipelineView,
    ),
    Endpoint(
        method="POST", path="/pipelines/{pipeline:name}/execute", handler=execute_pipeline, summary="Start a run", tag="pipelines",
        weight="submit", body=_RUN, returns=RunView, status=201, statuses=(200,), example={"params": {"name": "World"}},
    ),
)  # fmt: skip
