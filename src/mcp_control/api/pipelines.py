"""Routes of `/pipelines`."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated, Final, TypeVar

import msgspec
import orjson

from mcp_control.api.call import Call, Reply, check_media_type, reply
from mcp_control.api.decode import Body
from mcp_control.api.query import PageQuery, Query
from mcp_control.api.routing import Endpoint
from mcp_control.api.tasks import with_key
from mcp_control.kernel.errors import Invalid, InvalidPipeline
from mcp_control.kernel.paging import Page
from mcp_control.pipelines.definition import from_data, parse_yaml
from mcp_control.pipelines.model import PipelineSpec, PipelineView, RunRequest, RunView
from mcp_control.pipelines.places import located
from mcp_control.pipelines.validate import ERRORS_MAX, further

T = TypeVar("T")
YAML: Final = "application/yaml"


class VersionQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A version of the pipeline; the newest where none is named."""

    version: Annotated[int, msgspec.Meta(ge=1, le=2**31)] | None = None


class Validated(msgspec.Struct, frozen=True, kw_only=True):
    """The definition would be accepted."""

    valid: bool
    warnings: list[str]


_SPEC: Final = Body(PipelineSpec, envelope=8, media_types=("application/json", YAML))
_RUN: Final = Body(RunRequest, envelope=2, optional=True)
_VERSION: Final = Query(VersionQuery)
_PAGE: Final = Query(PageQuery)


async def create_pipeline(call: Call) -> Reply:
    """Accept a definition as a new version, in JSON or YAML; one identical to the newest version changes nothing."""
    pipeline, created = await _defined(call, lambda spec: call.services.pipelines.create(call.actor, spec))
    return reply(call.services.pipelines.view_pipeline(pipeline), 201 if created else 200)


async def validate_pipeline(call: Call) -> Reply:
    """Check a definition, in JSON or YAML, and keep nothing: it is refused with all that is wrong, place by place."""
    warnings = await _defined(call, lambda spec: call.services.pipelines.check(call.actor, spec))
    return reply(Validated(valid=True, warnings=warnings))


async def _defined(call: Call, use: Callable[[PipelineSpec], Awaitable[T]]) -> T:
    """Read the definition in the body and use it; what is wrong is told all at once, with lines and columns."""
    raw = await call.read()
    check_media_type(call.headers.get(b"content-type"), _SPEC.media_types)
    yaml = call.headers[b"content-type"].lower().startswith(YAML.encode())
    try:
        return await use(await asyncio.to_thread(_read, raw, yaml))
    except (Invalid, InvalidPipeline) as problem:
        problem.errors = tuple(await asyncio.to_thread(located, raw, problem.errors))
        raise


def _read(raw: bytes, yaml: bool) -> PipelineSpec:
    data = parse_yaml(raw) if yaml else None
    try:
        return from_data(data) if yaml else _SPEC.decode(raw)
    except Invalid as problem:
        more = further(data if yaml else orjson.loads(raw)) if raw else []
        raise Invalid(problem.detail, errors=[*problem.errors, *more][:ERRORS_MAX]) from None


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
        body=_SPEC, returns=PipelineView, status=201, statuses=(200,), example=_EXAMPLE,
    ),
    Endpoint(
        method="POST", path="/pipelines/validate", handler=validate_pipeline, summary="Check a definition", tag="pipelines",
        body=_SPEC, returns=Validated, example=_EXAMPLE,
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
