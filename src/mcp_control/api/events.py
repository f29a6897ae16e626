"""`GET /events`: a page of JSON, or a stream of server-sent events that resumes where it broke off."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Final

import msgspec

from mcp_control.api.call import Call, Reply, reply
from mcp_control.api.query import Query
from mcp_control.api.routing import Endpoint
from mcp_control.events.backlog import Batch
from mcp_control.events.broadcaster import Subscription
from mcp_control.events.filters import filter_of
from mcp_control.events.model import Event, event_id, event_seq, to_event
from mcp_control.kernel.changes import StoredFact
from mcp_control.kernel.errors import CursorExpired
from mcp_control.security.policy import allow

HEARTBEAT_SECONDS: Final = 15.0
_encode: Final = msgspec.json.Encoder().encode


class EventsQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which events; all conditions that are given must hold."""

    type: list[str] = []
    subject: str | None = None
    run: str | None = None
    after: str | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=500)] = 100


class EventPage(msgspec.Struct, frozen=True, kw_only=True):
    """Events, oldest first; go on with `after=next`."""

    items: list[Event]
    next: str


_QUERY: Final = Query(EventsQuery)


def _patterns(given: list[str]) -> list[str]:
    return [part for value in given for part in value.split(",")]


async def list_events(call: Call) -> Reply:
    """Return events as a page, or as server-sent events where the caller accepts `text/event-stream`."""
    query = call.query(_QUERY)
    allow(call.actor, "events.list")
    broadcaster = call.services.broadcaster
    last = call.headers.get(b"last-event-id")
    after = last.decode("latin-1") if last else query.after
    position = None if after is None else event_seq(after)
    if b"text/event-stream" in call.headers.get(b"accept", b""):
        subscription = await broadcaster.subscribe(
            _patterns(query.type), query.subject, query.run, call.actor.tenant, position
        )
        headers = ((b"content-type", b"text/event-stream"), (b"x-accel-buffering", b"no"))
        return Reply(200, b"", headers, _stream(call, subscription))
    wanted = filter_of(_patterns(query.type), query.subject, query.run, call.actor.tenant)
    facts, cursor = await broadcaster.page(wanted, position, query.limit)
    return reply(EventPage(items=[to_event(stored) for stored in facts], next=event_id(cursor)))


async def _stream(call: Call, subscription: Subscription) -> AsyncIterator[bytes]:
    """Yield the chunks of one event stream; it ends when the caller hangs up, the credential ends or the server stops."""
    gone = asyncio.ensure_future(call.gone())
    following: asyncio.Future[Batch] | None = None
    try:
        yield b"retry: 1000\nid: " + event_id(subscription.after).encode() + b"\n\n"
        while True:
            following = following or asyncio.ensure_future(anext(subscription))
            done, _ = await asyncio.wait(
                (following, gone), timeout=HEARTBEAT_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            if gone in done or call.expired():
                return
            if following not in done:
                yield b": still here\n\n"
                continue
            try:
                batch = following.result()
            except StopAsyncIteration:
                return
            except CursorExpired:
                yield b'event: problem\ndata: {"code":"cursor-expired"}\n\n'
                return
            following = None
            yield chunk(batch)
    finally:
        gone.cancel()
        if following is not None:
            following.cancel()
        subscription.close()


def chunk(batch: Batch) -> bytes:
    """Return a batch in the form of the HTML standard's event streams."""
    parts: list[bytes] = []
    if batch.reread:
        parts.append(b'event: reread\ndata: {"reason":"slow"}\n\n')
    parts += [_one(stored) for stored in batch.facts]
    parts.append(
        b"id: " + event_id(batch.after).encode() + b"\n\n"
        if not batch.facts or batch.after != batch.facts[-1].seq
        else b""
    )
    return b"".join(parts)


def _one(stored: StoredFact) -> bytes:
    event = to_event(stored)
    return b"id: %b\nevent: %b\ndata: %b\n\n" % (event.id.encode(), event.type.encode(), _encode(event))


ENDPOINTS: Final = (
    Endpoint(
        method="GET", path="/events", handler=list_events, summary="Read or follow events", tag="events", query=_QUERY, returns=EventPage,
        produces=("application/json", "text/event-stream"),
    ),
)  # fmt: skip
