"""Events over SSE and WebSocket: nothing missed, nothing twice, across broken connections."""

import asyncio
import json
from typing import Any

import httpx2
import msgspec
import pytest
import websockets

from mcp_control.api.websocket import EventTexts, OneEvent, Reread, SomeEvents
from mcp_control.events.backlog import Batch
from mcp_control.events.model import to_event
from mcp_control.kernel.changes import Fact, StoredFact
from mcp_control.testing.server import RunningServer

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def submit(client: httpx2.AsyncClient, count: int, type: str) -> list[str]:
    answer = await client.post("/api/v1/tasks/batch", json={"tasks": [{"type": type}] * count})
    return [item["id"] for item in answer.json()["items"]]


async def read_stream(client: httpx2.AsyncClient, count: int, after: str | None) -> tuple[list[dict[str, Any]], str]:
    """Read so many events from a stream, then break it off; returns them and the last id."""
    headers = {"Accept": "text/event-stream"} | ({} if after is None else {"Last-Event-ID": after})
    events: list[dict[str, Any]] = []
    last = after or ""
    async with client.stream("GET", "/api/v1/events?type=task.queued", headers=headers) as stream:
        assert stream.headers["content-type"] == "text/event-stream"
        async for line in stream.aiter_lines():
            if line.startswith("id: "):
                last = line[4:]
            elif line.startswith("data: "):
                events.append(json.loads(line[6:]))
            if len(events) == count:
                break
    return events, events[-1]["id"] if events else last


async def test_an_event_stream_resumes_without_gap_or_repetition(
    server: RunningServer, client: httpx2.AsyncClient
) -> None:
    """Last-Event-ID goes on where the connection broke, through what happened meanwhile and on to what is live."""
    start = f"evt_{server.services.broadcaster.newest}"
    first = await submit(client, 40, "sse")
    seen, last = await read_stream(client, 15, start)
    more, last = await read_stream(client, 10, last)
    second = await submit(client, 10, "sse")
    reading = asyncio.create_task(read_stream(client, 30, last))
    third = await submit(client, 5, "sse")
    rest, _ = await asyncio.wait_for(reading, 10)
    assert [event["subject"] for event in (*seen, *more, *rest)] == [*first, *second, *third]


async def test_events_are_paged_as_json(server: RunningServer, client: httpx2.AsyncClient) -> None:
    """Without an event stream wanted, the same events come as pages with a cursor."""
    cursor = f"evt_{server.services.broadcaster.newest}"
    ids = await submit(client, 12, "paged")
    found: list[str] = []
    for _ in range(4):
        page = (await client.get(f"/api/v1/events?type=task.queued&limit=5&after={cursor}")).json()
        found += [event["subject"] for event in page["items"]]
        cursor = page["next"]
    assert found == ids


async def test_a_socket_resumes_without_gap_or_repetition(server: RunningServer, client: httpx2.AsyncClient) -> None:
    """A subscription that names the last event it saw gets what came after, then what is live; filters hold."""
    url = server.url.replace("http", "ws", 1) + "/ws"
    start = f"evt_{server.services.broadcaster.newest}"
    seen: list[str] = []
    last = start

    async def follow(count: int) -> None:
        nonlocal last
        async with websockets.connect(url, additional_headers=server.headers, compression=None) as there:
            await there.send(json.dumps({"op": "subscribe", "id": "s", "types": ["task.queued"], "after": last}))
            assert json.loads(await there.recv()) == {"op": "subscribed", "id": "s", "after": last}
            while count > 0:
                frame = json.loads(await asyncio.wait_for(there.recv(), 10))
                for event in frame.get("events") or [frame["event"]]:
                    assert event["type"] == "task.queued"
                    seen.append(event["subject"])
                    last = event["id"]
                    count -= 1

    first = await submit(client, 30, "ws")
    await follow(30)
    second = await submit(client, 20, "ws")
    following = asyncio.create_task(follow(25))
    third = await submit(client, 5, "ws")
    await following
    assert seen == [*first, *second, *third]


async def test_a_wait_ends_with_the_task(client: httpx2.AsyncClient) -> None:
    """`?wait=` answers when the task becomes final, long before its time is over."""
    task_id = (await client.post("/api/v1/tasks", json={"type": "waited"})).json()["id"]
    waiting = asyncio.create_task(client.get(f"/api/v1/tasks/{task_id}?wait=30", timeout=40))
    await client.post(f"/api/v1/tasks/{task_id}/cancel")
    assert (await asyncio.wait_for(waiting, 10)).json()["state"] == "cancelled"


async def test_an_event_is_encoded_once_and_read_as_it_always_was() -> None:
    """Followers share the text of an event; the frames around it say what the documented structures say."""
    texts = EventTexts(capacity=2)
    facts = [StoredFact(seq, Fact("task.queued", f"task_{seq}", "t", 1_800_000_000_000, "system")) for seq in (1, 2, 3)]
    (alone,) = texts.frames('a"b', Batch(facts[:1], False, 1))
    assert msgspec.json.decode(alone, type=OneEvent) == OneEvent(sub='a"b', event=to_event(facts[0]))
    reread, several = texts.frames("s", Batch(facts, True, 3))
    assert msgspec.json.decode(reread, type=Reread) == Reread(sub="s")
    assert msgspec.json.decode(several, type=SomeEvents) == SomeEvents(sub="s", events=[*map(to_event, facts)])
    assert texts.of(facts[2]) is texts.of(facts[2])
