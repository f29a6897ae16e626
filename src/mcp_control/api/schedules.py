"""Routes of `/schedules`."""

from typing import Annotated, Final

import msgspec

from mcp_control.api.call import NO_CONTENT, Call, Reply, reply, tagged
from mcp_control.api.decode import Body
from mcp_control.api.query import PageQuery, Query
from mcp_control.api.routing import Endpoint
from mcp_control.api.tasks import Nothing, Reason, with_key
from mcp_control.kernel.errors import VersionConflict
from mcp_control.kernel.paging import Page
from mcp_control.pipelines.schedule_model import (
    BackfillRequest,
    BackfillView,
    FireView,
    Moments,
    Schedule,
    ScheduleReady,
    ScheduleSpec,
    ScheduleView,
)
from mcp_control.pipelines.schedule_records import schedule_view
from mcp_control.pipelines.scheduler import NEXT_MAX


class DryRunQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`dry_run` checks the schedule and keeps nothing."""

    dry_run: bool = False


class NextQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many slots to come."""

    count: Annotated[int, msgspec.Meta(ge=1, le=NEXT_MAX)] = 5


class TriggerRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Start the work now; repeated with the same key it is the same fire."""

    idempotency_key: str | None = None


_SPEC: Final = Body(ScheduleSpec, envelope=2)
_CREATE: Final = Query(DryRunQuery)
_PAGE: Final = Query(PageQuery)
_NEXT: Final = Query(NextQuery)
_REASON: Final = Body(Reason, optional=True)
_NOTHING: Final = Body(Nothing, optional=True)
_TRIGGER: Final = Body(TriggerRequest, optional=True)
_BACKFILL: Final = Body(BackfillRequest)


def _tagged(schedule: Schedule, status: int = 200) -> Reply:
    view = schedule_view(schedule)
    return tagged(view, view.etag, status)


async def create_schedule(call: Call) -> Reply:
    """Keep a schedule; one that is there already, just so, stays as it is. With `dry_run` only say when it would fire."""
    dry = call.query(_CREATE).dry_run
    spec = await call.decode(_SPEC)
    scheduler = call.services.scheduler
    if dry:
        return reply(ScheduleReady(valid=True, next=await scheduler.check(call.actor, spec)))
    schedule, created = await scheduler.create(call.actor, spec)
    return _tagged(schedule, 201 if created else 200)


async def list_schedules(call: Call) -> Reply:
    """List schedules by name."""
    query = call.query(_PAGE)
    return reply(await call.services.scheduler.list(call.actor, cursor=query.cursor, limit=query.limit))


async def get_schedule(call: Call) -> Reply:
    """Return a schedule."""
    return _tagged(await call.services.scheduler.get(call.actor, call.params["schedule"]))


async def replace_schedule(call: Call) -> Reply:
    """Give a schedule another spec; what has fired stays fired."""
    version = call.if_match()
    spec = await call.decode(_SPEC)
    if not version.isdigit():
        raise VersionConflict("If-Match does not name the current version")
    return _tagged(await call.services.scheduler.replace(call.actor, call.params["schedule"], spec, int(version)))


async def delete_schedule(call: Call) -> Reply:
    """Remove a schedule and its history; what it started goes on."""
    await call.services.scheduler.delete(call.actor, call.params["schedule"])
    return NO_CONTENT


async def pause_schedule(call: Call) -> Reply:
    """Fire nothing until it is resumed."""
    reason = (await call.decode(_REASON)).reason
    return _tagged(await call.services.scheduler.pause(call.actor, call.params["schedule"], reason))


async def resume_schedule(call: Call) -> Reply:
    """Fire again, from the next slot on."""
    await call.decode(_NOTHING)
    return _tagged(await call.services.scheduler.resume(call.actor, call.params["schedule"]))


async def trigger_schedule(call: Call) -> Reply:
    """Start its work now, beside the slots."""
    request = with_key(call, await call.decode(_TRIGGER))
    fire = await call.services.scheduler.trigger(call.actor, call.params["schedule"], request.idempotency_key)
    return reply(fire, 201)


async def backfill_schedule(call: Call) -> Reply:
    """Fire slots of the past that were not fired; with `dry_run` only say which."""
    request = await call.decode(_BACKFILL)
    return reply(await call.services.scheduler.backfill(call.actor, call.params["schedule"], request))


async def stop_backfill(call: Call) -> Reply:
    """Fire no more slots of the past; what runs goes on."""
    return _tagged(await call.services.scheduler.stop_backfill(call.actor, call.params["schedule"]))


async def next_fires(call: Call) -> Reply:
    """Return the slots to come."""
    found = await call.services.scheduler.next(call.actor, call.params["schedule"], call.query(_NEXT).count)
    return reply(Moments(items=found))


async def list_fires(call: Call) -> Reply:
    """Say what became of slots, newest first."""
    query = call.query(_PAGE)
    scheduler = call.services.scheduler
    return reply(await scheduler.fires(call.actor, call.params["schedule"], cursor=query.cursor, limit=query.limit))


_ONE: Final = "/schedules/{schedule:name}"
_EXAMPLE: Final = {
    "name": "nightly",
    "cron": "30 2 * * *",
    "timezone": "Europe/Berlin",
    "run": {"pipeline": "greeting", "params": {"name": "${{ run.date }}"}},
    "overlap": "queue-one",
}

ENDPOINTS: Final = (
    Endpoint(
        method="POST", path="/schedules", handler=create_schedule, summary="Make a schedule", tag="schedules",
        body=_SPEC, query=_CREATE, returns=ScheduleView, others={200: ScheduleReady}, status=201, example=_EXAMPLE,
    ),
    Endpoint(
        method="GET", path="/schedules", handler=list_schedules, summary="List schedules", tag="schedules",
        query=_PAGE, returns=Page[ScheduleView],
    ),
    Endpoint(method="GET", path=_ONE, handler=get_schedule, summary="Get a schedule", tag="schedules", returns=ScheduleView),
    Endpoint(
        method="PUT", path=_ONE, handler=replace_schedule, summary="Change a schedule", tag="schedules", body=_SPEC,
        returns=ScheduleView, example=_EXAMPLE,
    ),
    Endpoint(method="DELETE", path=_ONE, handler=delete_schedule, summary="Delete a schedule", tag="schedules", status=204),
    Endpoint(
        method="POST", path=f"{_ONE}/pause", handler=pause_schedule, summary="Pause a schedule", tag="schedules", body=_REASON,
        returns=ScheduleView, example={"reason": "maintenance"},
    ),
    Endpoint(
        method="POST", path=f"{_ONE}/resume", handler=resume_schedule, summary="Resume a schedule", tag="schedules", body=_NOTHING,
        returns=ScheduleView,
    ),
    Endpoint(
        method="POST", path=f"{_ONE}/trigger", handler=trigger_schedule, summary="Start its work now", tag="schedules",
        weight="submit", body=_TRIGGER, returns=FireView, status=201, example={"idempotency_key": "by-hand-1"},
    ),
    Endpoint(
        method="POST", path=f"{_ONE}/backfill", handler=backfill_schedule, summary="Fire missed slots of the past", tag="schedules",
        weight="submit", body=_BACKFILL, returns=BackfillView,
        example={"from": "2026-01-01T00:00:00Z", "to": "2026-01-31T00:00:00Z", "width": 4, "dry_run": True},
    ),
    Endpoint(
        method="DELETE", path=f"{_ONE}/backfill", handler=stop_backfill, summary="Stop a backfill", tag="schedules",
        returns=ScheduleView,
    ),
    Endpoint(
        method="GET", path=f"{_ONE}/next", handler=next_fires, summary="The next fires", tag="schedules", query=_NEXT, returns=Moments,
    ),
    Endpoint(
        method="GET", path=f"{_ONE}/fires", handler=list_fires, summary="What became of its slots", tag="schedules", query=_PAGE,
        returns=Page[FireView],
    ),
)  # fmt: skip
