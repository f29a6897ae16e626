"""Routes of `/pipelines`."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Final, TypeVar

import msgspec
import orjson

from mcp_control.api.call import NO_CONTENT, Call, Reply, check_media_type, reply
from mcp_control.api.decode import Body
from mcp_control.api.query import PageQuery, Query
from mcp_control.api.routing import Endpoint
from mcp_control.api.tasks import with_key
from mcp_control.kernel.errors import FieldError, Invalid, InvalidPipeline
from mcp_control.kernel.paging import Page
from mcp_control.pipelines.definition import from_data, parse_yaml
from mcp_control.pipelines.definition_model import PipelineSpec
from mcp_control.pipelines.model import RunRequest
from mcp_control.pipelines.places import located
from mcp_control.pipelines.plan_model import Difference, PlanRequest, RunPlan
from mcp_control.pipelines.validate import ERRORS_MAX, further
from mcp_control.pipelines.view_model import PipelineView, RunView

T = TypeVar("T")
YAML: Final = "application/yaml"


class VersionQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A version of the pipeline; the newest where none is named."""

    version: Annotated[int, msgspec.Meta(ge=1, le=2**31)] | None = None


class DiffQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Two versions of the pipeline: `after`, by default the newest, and `before`, by default the one before that."""

    before: Annotated[int, msgspec.Meta(ge=1, le=2**31)] | None = None
    after: Annotated[int, msgspec.Meta(ge=1, le=2**31)] | None = None


class Validated(msgspec.Struct, frozen=True, kw_only=True):
    """The definition would be accepted."""

    valid: bool
    warnings: list[str]


_SPEC: Final = Body(PipelineSpec, envelope=8, media_types=("application/json", YAML))
_PLAN: Final = Body(PlanRequest, envelope=2)
_RUN: Final = Body(RunRequest, envelope=2, optional=True)
_VERSION: Final = Query(VersionQuery)
_DIFF: Final = Query(DiffQuery)
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
        problem.errors = tuple([*problem.errors, *more][:ERRORS_MAX])
        raise


async def list_pipelines(call: Call) -> Reply:
    """List the newest version of each pipeline."""
    query = call.query(_PAGE)
    return reply(await call.services.pipelines.list(call.actor, cursor=query.cursor, limit=query.limit))


async def get_pipeline(call: Call) -> Reply:
    """Return a pipeline with its definition."""
    version = call.query(_VERSION).version
    pipeline = await call.services.pipelines.get(call.actor, call.params["pipeline"], version)
    return reply(call.services.pipelines.view_pipeline(pipeline))


async def plan_pipeline(call: Call) -> Reply:
    """Say what would become of a run that began now: who could take each stage, the critical path, and a forecast from history."""
    request = await call.decode(_PLAN)
    try:
        return reply(await call.services.planner.plan(call.actor, request))
    except (Invalid, InvalidPipeline) as problem:
        if request.definition is not None:
            problem.errors = tuple(await asyncio.to_thread(_placed, request.definition, problem.errors))
        raise


def _placed(text: str, errors: Sequence[FieldError]) -> list[FieldError]:
    """Return the errors, those of the definition with line and column."""
    ours = [error for error in errors if error.pointer.startswith("#/params")]
    return [*located(text, [error for error in errors if error not in ours]), *ours]


async def list_versions(call: Call) -> Reply:
    """List the versions of a pipeline, the newest first."""
    query = call.query(_PAGE)
    found = call.services.catalogue.versions(
        call.actor, call.params["pipeline"], cursor=query.cursor, limit=query.limit
    )
    return reply(await found)


async def compare_versions(call: Call) -> Reply:
    """Say what differs between two versions: stages added, removed and changed, and everything else by place."""
    query = call.query(_DIFF)
    return reply(await call.services.catalogue.diff(call.actor, call.params["pipeline"], query.before, query.after))


async def delete_pipeline(call: Call) -> Reply:
    """Delete a version, or the pipeline with all of them; refused while a run that has not ended, or a schedule, uses it."""
    version = call.query(_VERSION).version
    await call.services.catalogue.delete(call.actor, call.params["pipeline"], version)
    return NO_CONTENT


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

_TEXT: Final = "metadata: {name: greeting}\nspec:\n  params: {name: {}}\n  stages:\n  - {id: greet, uses: greet}\n"

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
        method="POST", path="/pipelines/plan", handler=plan_pipeline, summary="Forecast a run", tag="pipelines",
        body=_PLAN, returns=RunPlan, example={"definition": _TEXT, "params": {"name": "World"}},
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
        method="DELETE", path="/pipelines/{pipeline:name}", handler=delete_pipeline, summary="Delete a pipeline", tag="pipelines",
        query=_VERSION, status=204,
    ),
    Endpoint(
        method="GET", path="/pipelines/{pipeline:name}/versions", handler=list_versions, summary="List versions", tag="pipelines",
        query=_PAGE, returns=Page[PipelineView],
    ),
    Endpoint(
        method="GET", path="/pipelines/{pipeline:name}/diff", handler=compare_versions, summary="Compare two versions", tag="pipelines",
        query=_DIFF, returns=Difference,
    ),
    Endpoint(
        method="POST", path="/pipelines/{pipeline:name}/execute", handler=execute_pipeline, summary="Start a run", tag="pipelines",
        weight="submit", body=_RUN, returns=RunView, status=201, statuses=(200,), example={"params": {"name": "World"}},
    ),
)  # fmt: skip
