"""Schedules as a client keeps, watches and steers them."""

from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from mcp_control.kernel.paging import Page
from mcp_control.pipelines.schedule_model import (
    BackfillRequest,
    BackfillView,
    FireView,
    Moment,
    Moments,
    ScheduleReady,
    ScheduleSpec,
    ScheduleView,
)
from mcp_control.sdk.calls import Flow, Request, query
from mcp_control.sdk.submission import encode_json, fresh_key
from mcp_control.sdk.transport import Call

if TYPE_CHECKING:
    from mcp_control.sdk.client import AsyncClient, Client

Spec = ScheduleSpec | Mapping[str, Any]


def _path(name: str, verb: str = "") -> str:
    return f"/schedules/{quote(name, safe='')}" + (f"/{verb}" if verb else "")


def _request(
    type: Any,
    method: str,
    path: str,
    body: object = None,
    *,
    repeatable: bool = True,
    etag: str = "",
    params: Mapping[str, object] | None = None,
) -> Request[Any]:
    call = Call(
        method=method,
        path=path,
        params=query(params or {}),
        body=None if method in ("GET", "DELETE") else b"{}" if body is None else encode_json(body),
        headers=(("If-Match", f'"{etag}"'),) if etag else (),
        repeatable=repeatable,
    )
    return Request(call, lambda reply: None if type is None else reply.json(type))


def create(spec: Spec) -> Request[ScheduleView]:
    """Keep a schedule; one that is there already, just so, stays as it is."""
    return _request(ScheduleView, "POST", "/schedules", spec)


def check(spec: Spec) -> Request[ScheduleReady]:
    """Say when a schedule would fire, without keeping it."""
    return _request(ScheduleReady, "POST", "/schedules", spec, params={"dry_run": True})


def apply(spec: Spec) -> Flow[Any]:
    """Make a schedule what the spec says, whether it is there or not."""
    name = spec.name if isinstance(spec, ScheduleSpec) else str(spec.get("name", ""))
    known = (yield _there(name)) if name else None
    if known is None:
        made: ScheduleView = yield create(spec)
        return made
    changed: ScheduleView = yield _request(
        ScheduleView, "PUT", _path(known.id), spec, repeatable=False, etag=known.etag
    )
    return changed


def _there(name: str) -> Request[ScheduleView | None]:
    call = Call(path=_path(name), repeatable=True, statuses=(404,))
    return Request(call, lambda reply: None if reply.status == 404 else reply.json(ScheduleView))


def get(name: str) -> Request[ScheduleView]:
    """Read a schedule by id or name."""
    return _request(ScheduleView, "GET", _path(name))


def listed(**filters: object) -> Request[Page[ScheduleView]]:
    """Read a page of schedules."""
    return _request(Page[ScheduleView], "GET", "/schedules", params=filters)


def verb(name: str, what: str, **body: object) -> Request[ScheduleView]:
    """Pause or resume a schedule."""
    return _request(ScheduleView, "POST", _path(name, what), {k: v for k, v in body.items() if v is not None})


def delete(name: str) -> Request[None]:
    """Remove a schedule."""
    return _request(None, "DELETE", _path(name))


def trigger(name: str, key: str | None) -> Request[FireView]:
    """Start its work now; a fresh key makes the request repeatable."""
    return _request(FireView, "POST", _path(name, "trigger"), {"idempotency_key": key or fresh_key()})


def backfill(name: str, request: BackfillRequest) -> Request[BackfillView]:
    """Fire slots of the past that were not fired."""
    return _request(BackfillView, "POST", _path(name, "backfill"), request, repeatable=request.dry_run)


def stop_backfill(name: str) -> Request[ScheduleView]:
    """Fire no more slots of the past."""
    return _request(ScheduleView, "DELETE", _path(name, "backfill"))


def upcoming(name: str, count: int) -> Request[Moments]:
    """Read the slots to come."""
    return _request(Moments, "GET", _path(name, "next"), params={"count": count})


def fires(name: str, **filters: object) -> Request[Page[FireView]]:
    """Read a page of what became of slots."""
    return _request(Page[FireView], "GET", _path(name, "fires"), params=filters)


class Schedules:
    """`client.schedules`."""

    def __init__(self, client: "Client") -> None:
        self._client = client

    def create(self, spec: Spec) -> ScheduleView:
        """Keep a schedule; one that is there already, just so, stays as it is. Raises Conflicting for another of its name."""
        return self._client.do(create(spec))

    def apply(self, spec: Spec) -> ScheduleView:
        """Make a schedule what the spec says, whether it is there or not."""
        made: ScheduleView = self._client.drive(apply(spec))
        return made

    def check(self, spec: Spec) -> list[Moment]:
        """Return when a schedule would fire, without keeping it. Raises InvalidRequest with what is wrong, place by place."""
        return self._client.do(check(spec)).next

    def get(self, name: str) -> ScheduleView:
        """Read a schedule by id or name."""
        return self._client.do(get(name))

    def iter(self, **filters: Any) -> Iterator[ScheduleView]:
        """Yield schedules by name."""
        return self._client.pages(lambda cursor: listed(cursor=cursor, **filters))

    def next(self, name: str, count: int = 5) -> list[Moment]:
        """Return the slots to come."""
        return self._client.do(upcoming(name, count)).items

    def fires(self, name: str, **filters: Any) -> Iterator[FireView]:
        """Yield what became of slots, newest first."""
        return self._client.pages(lambda cursor: fires(name, cursor=cursor, **filters))

    def pause(self, name: str, reason: str | None = None) -> ScheduleView:
        """Fire nothing until it is resumed."""
        return self._client.do(verb(name, "pause", reason=reason))

    def resume(self, name: str) -> ScheduleView:
        """Fire again, from the next slot on."""
        return self._client.do(verb(name, "resume"))

    def trigger(self, name: str, key: str | None = None) -> FireView:
        """Start its work now, beside the slots; repeated with the same key it is the same fire."""
        return self._client.do(trigger(name, key))

    def backfill(
        self, name: str, since: datetime, to: datetime, *, width: int = 1, dry_run: bool = False
    ) -> BackfillView:
        """Fire the slots of the past that were not fired, `width` of them at once at most; `dry_run` only says which."""
        return self._client.do(backfill(name, BackfillRequest(since=since, to=to, width=width, dry_run=dry_run)))

    def stop_backfill(self, name: str) -> ScheduleView:
        """Fire no more slots of the past; what runs goes on."""
        return self._client.do(stop_backfill(name))

    def delete(self, name: str) -> None:
        """Remove a schedule and its history; what it started goes on."""
        self._client.do(delete(name))


class AsyncSchedules:
    """`client.schedules` of the async client; the same names."""

    def __init__(self, client: "AsyncClient") -> None:
        self._client = client

    async def create(self, spec: Spec) -> ScheduleView:
        """Keep a schedule; one that is there already, just so, stays as it is. Raises Conflicting for another of its name."""
        return await self._client.do(create(spec))

    async def apply(self, spec: Spec) -> ScheduleView:
        """Make a schedule what the spec says, whether it is there or not."""
        return await self._client.drive(apply(spec))

    async def check(self, spec: Spec) -> list[Moment]:
        """Return when a schedule would fire, without keeping it. Raises InvalidRequest with what is wrong, place by place."""
        return (await self._client.do(check(spec))).next

    async def get(self, name: str) -> ScheduleView:
        """Read a schedule by id or name."""
        return await self._client.do(get(name))

    def iter(self, **filters: Any) -> AsyncIterator[ScheduleView]:
        """Yield schedules by name."""
        return self._client.pages(lambda cursor: listed(cursor=cursor, **filters))

    async def next(self, name: str, count: int = 5) -> list[Moment]:
        """Return the slots to come."""
        return (await self._client.do(upcoming(name, count))).items

    def fires(self, name: str, **filters: Any) -> AsyncIterator[FireView]:
        """Yield what became of slots, newest first."""
        return self._client.pages(lambda cursor: fires(name, cursor=cursor, **filters))

    async def pause(self, name: str, reason: str | None = None) -> ScheduleView:
        """Fire nothing until it is resumed."""
        return await self._client.do(verb(name, "pause", reason=reason))

    async def resume(self, name: str) -> ScheduleView:
        """Fire again, from the next slot on."""
        return await self._client.do(verb(name, "resume"))

    async def trigger(self, name: str, key: str | None = None) -> FireView:
        """Start its work now, beside the slots; repeated with the same key it is the same fire."""
        return await self._client.do(trigger(name, key))

    async def backfill(
        self, name: str, since: datetime, to: datetime, *, width: int = 1, dry_run: bool = False
    ) -> BackfillView:
        """Fire the slots of the past that were not fired, `width` of them at once at most; `dry_run` only says which."""
        return await self._client.do(backfill(name, BackfillRequest(since=since, to=to, width=width, dry_run=dry_run)))

    async def stop_backfill(self, name: str) -> ScheduleView:
        """Fire no more slots of the past; what runs goes on."""
        return await self._client.do(stop_backfill(name))

    async def delete(self, name: str) -> None:
        """Remove a schedule and its history; what it started goes on."""
        await self._client.do(delete(name))
