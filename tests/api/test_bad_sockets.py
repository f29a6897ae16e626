"""What arrives over bare sockets and WebSockets and is not as it should be: rows 16 to 18, 49 and 50 of the list of bad input."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx2
import pytest
import websockets
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, InvalidStatus

from mcp_control.testing.server import RunningServer

pytestmark = pytest.mark.asyncio(loop_scope="module")

HELLO = {"op": "hello", "agent": {"name": "socket-agent", "capabilities": [{"name": "socket-work"}], "slots": 2}}


async def raw(server: RunningServer, data: bytes) -> bytes:
    """Send bytes and return everything the server answers until it closes."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(data)
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    return answer


def parts(answer: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), json.loads(body)


def request(*headers: str, body: str = "") -> bytes:
    return "\r\n".join(("POST /api/v1/tasks HTTP/1.1", "Host: x", *headers, "", body)).encode()


async def test_length_and_chunks_together_are_refused(server: RunningServer) -> None:
    """Row 16: Content-Length with Transfer-Encoding is 400 and closes the connection."""
    status, problem = parts(
        await raw(server, request("Content-Length: 5", "Transfer-Encoding: chunked", body="0\r\n\r\n"))
    )
    assert (status, problem["code"]) == (400, "malformed-request")


@pytest.mark.parametrize(
    "data",
    [
        request("X-Long: " + "a" * 17_000),
        b"POST /api/v1/tasks HTTP/1.1\r\nX-Endless: " + b"a" * 40_000,
        request(*[f"X-{n}: {'b' * 100}" for n in range(200)]),
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=["one long header", "a header without an end", "many headers", "a long path"],
)
async def test_more_than_16_kib_of_headers_are_refused(server: RunningServer, data: bytes) -> None:
    """Row 17: 431, complete or not, and the connection is closed."""
    status, problem = parts(await raw(server, data))
    assert (status, problem["code"]) == (431, "headers-too-large")


async def test_a_body_that_stalls_is_given_up(server: RunningServer) -> None:
    """Row 18: 408 after the body timeout (0.4 s here), and the connection is closed."""
    head = request(
        f"Authorization: Bearer {server.admin_token}",
        "Content-Type: application/json",
        "Content-Length: 100",
        body='{"type"',
    )
    status, problem = parts(await raw(server, head))
    assert (status, problem["code"], problem["retryable"]) == (408, "request-timeout", True)


async def test_what_is_no_http_is_refused(server: RunningServer) -> None:
    """Bytes that are no request get 400 and an end."""
    status, problem = parts(await raw(server, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n"))
    assert (status, problem["code"]) == (400, "malformed-request")


# --- WebSockets -------------------------------------------------------------------------------------------------------


async def credential(server: RunningServer, name: str = "socket-agent") -> str:
    """Register an agent and return its credential."""
    spec = {**HELLO["agent"], "name": name}  # type: ignore[dict-item]  # a dict
    async with httpx2.AsyncClient(base_url=server.url) as client:
        answer = await client.post(
            "/api/v1/agents/register", json=spec, headers={"Authorization": f"Bearer {await server.enrolment_token()}"}
        )
    assert answer.status_code == 201, answer.text
    found: str = answer.json()["credential"]
    return found


@asynccontextmanager
async def socket(
    server: RunningServer, path: str, token: str | None, **headers: str
) -> AsyncIterator[ClientConnection]:
    given = {"Authorization": f"Bearer {token}"} if token is not None else {}
    url = server.url.replace("http", "ws", 1) + path
    async with websockets.connect(
        url, additional_headers={**given, **headers}, compression=None, max_size=None
    ) as there:
        yield there


async def received(there: ClientConnection) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(await asyncio.wait_for(there.recv(), 10))
    return found


async def closing(there: ClientConnection) -> int:
    """Read to the end and return the close code."""
    async with asyncio.timeout(10):
        with suppress(ConnectionClosed):
            async for _ in there:
                pass
        await there.wait_closed()
    assert there.close_code is not None
    return there.close_code


@pytest.mark.parametrize("path", ["/ws", "/ws/agent"])
@pytest.mark.parametrize(
    ("token", "headers", "status", "code"),
    [
        (None, {}, 401, "unauthenticated"),
        ("garbage", {}, 401, "invalid-token"),
        ("right", {"Origin": "https://evil.example"}, 403, "forbidden"),
    ],
    ids=["no credential", "bad credential", "foreign page"],
)
async def test_a_socket_is_refused_before_the_upgrade(
    server: RunningServer, path: str, token: str | None, headers: dict[str, str], status: int, code: str
) -> None:
    """Row 49: who may not is told so by an HTTP answer."""
    given = server.admin_token if token == "right" else token
    with pytest.raises(InvalidStatus) as refused:
        async with socket(server, path, given, **headers):
            pass
    assert refused.value.response.status_code == status
    assert refused.value.response.body is not None
    assert json.loads(refused.value.response.body)["code"] == code


async def test_a_token_in_the_url_of_a_socket_is_refused(server: RunningServer) -> None:
    """Row 32 for sockets."""
    with pytest.raises(InvalidStatus) as refused:
        async with socket(server, f"/ws?token={server.admin_token}", server.admin_token):
            pass
    assert refused.value.response.status_code == 400


async def test_the_agent_socket_is_for_agents(server: RunningServer) -> None:
    """A user's token opens no agent session."""
    with pytest.raises(InvalidStatus) as refused:
        async with socket(server, "/ws/agent", server.admin_token):
            pass
    assert refused.value.response.status_code == 403


@pytest.mark.parametrize(
    ("frame", "code"),
    [("not json", 1007), ('{"op":', 1007), (b"\x00\x01", 1003), ('"' + "a" * (1 << 20) + '"', 1009)],
    ids=["text that is no JSON", "half of JSON", "binary", "more than 1 MiB"],
)
@pytest.mark.parametrize("path", ["/ws", "/ws/agent"])
async def test_a_frame_that_cannot_be_read_closes_the_socket(
    server: RunningServer, path: str, frame: str | bytes, code: int
) -> None:
    """Row 49: 1007, 1003 and 1009."""
    token = (
        server.admin_token
        if path == "/ws"
        else await credential(server, f"reader-{abs(hash((str(frame)[:20], code)))}")
    )
    async with socket(server, path, token) as there:
        await there.send(frame)
        assert await closing(there) == code


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ({"op": "dance"}, "unknown-op"),
        ({"op": "subscribe"}, "missing-field"),
        ({"op": "subscribe", "id": "s", "colour": 1}, "unknown-field"),
        ({"op": "subscribe", "id": 5}, "wrong-type"),
        ({"op": "subscribe", "id": "s", "types": ["no type!"]}, "invalid-filter"),
        ({"op": "subscribe", "id": "s", "after": "evt_999999"}, "cursor-expired"),
    ],
)
async def test_a_wrong_frame_gets_a_problem_and_the_socket_stays(
    server: RunningServer, frame: dict[str, object], code: str
) -> None:
    """Row 49: an error frame with the code; then the socket still works."""
    async with socket(server, "/ws", server.admin_token) as there:
        await there.send(json.dumps(frame))
        answer = await received(there)
        assert (answer["op"], answer["code"]) == ("problem", code)
        await there.send('{"op":"ping"}')
        assert await received(there) == {"op": "pong"}


@pytest.mark.parametrize("path", ["/ws", "/ws/agent"])
async def test_ten_problems_close_the_socket(server: RunningServer, path: str) -> None:
    """Row 49: the tenth is the last, with 1008."""
    token = server.admin_token if path == "/ws" else await credential(server, "troublemaker")
    async with socket(server, path, token) as there:
        for _ in range(10):
            await there.send('{"op":"dance"}')
        assert await closing(there) == 1008


async def test_an_agent_says_hello_first_and_once(server: RunningServer) -> None:
    """Other frames before hello, and a second hello, are problems."""
    async with socket(server, "/ws/agent", await credential(server)) as there:
        await there.send('{"op":"beat","beat":{}}')
        assert (await received(there))["code"] == "hello-expected"
        await there.send(json.dumps(HELLO))
        assert (await received(there))["op"] == "welcome"
        await there.send(json.dumps(HELLO))
        assert (await received(there))["code"] == "unexpected-frame"


async def test_a_name_is_resumed_only_with_its_own_credential(server: RunningServer) -> None:
    """An agent that says another's name is sent away with 1008."""
    async with socket(server, "/ws/agent", await credential(server, "somebody")) as there:
        await there.send(json.dumps(HELLO))
        assert (await received(there))["code"] == "forbidden"
        assert await closing(there) == 1008


async def test_a_newer_connection_of_an_instance_supersedes_the_older(server: RunningServer) -> None:
    """The older one is closed with 4409, and the newer one goes on."""
    token = await credential(server, "twice")
    hello = {**HELLO, "agent": {**HELLO["agent"], "name": "twice"}}  # type: ignore[dict-item]  # a dict
    async with socket(server, "/ws/agent", token) as older, socket(server, "/ws/agent", token) as newer:
        await older.send(json.dumps(hello))
        instance_id = (await received(older))["instance_id"]
        await newer.send(json.dumps({**hello, "instance_id": instance_id}))
        assert (await received(newer))["instance_id"] == instance_id
        assert await closing(older) == 4409
        await newer.send('{"op":"beat","beat":{}}')
        assert (await received(newer))["op"] == "beat_ack"


async def test_a_revoked_credential_ends_an_open_socket(server: RunningServer) -> None:
    """The next heartbeat after revocation is answered by 4401."""
    token = await credential(server, "revoked")
    hello = {**HELLO, "agent": {**HELLO["agent"], "name": "revoked"}}  # type: ignore[dict-item]  # a dict
    async with socket(server, "/ws/agent", token) as there:
        await there.send(json.dumps(hello))
        agent_id = (await received(there))["agent_id"]
        admin = await server.services.accounts.administrator()
        await server.services.credentials.revoke_agent(admin, agent_id)
        await there.send('{"op":"beat","beat":{}}')
        assert await closing(there) == 4401


async def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds, at most 10 s."""
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.01)


async def test_a_client_that_never_reads_is_closed_and_nothing_waits_for_it(server: RunningServer) -> None:
    """Row 50: its buffer stays below 1 MiB, it is closed, and what it missed is still there to be read."""
    before = server.services.broadcaster.newest
    async with (
        httpx2.AsyncClient(base_url=server.url, headers=server.headers, timeout=30) as client,
        deaf(server) as closed,
    ):
        await until(lambda: server.services.broadcaster.subscribers > 0)
        batch = {"tasks": [{"type": "unread"}] * 250}
        async with asyncio.timeout(60):
            while server.services.broadcaster.subscribers:
                # A machine that is busy with other things may say so; what counts here is the socket.
                assert (await client.post("/api/v1/tasks/batch", json=batch)).status_code in (200, 503)
        assert await closed() == 1013
        page = (await client.get(f"/api/v1/events?after=evt_{before}&type=task.queued&limit=250")).json()
        assert len(page["items"]) == 250


async def test_a_client_that_never_reads_holds_up_no_other(server: RunningServer) -> None:
    """Row 50: who follows the same beside it gets every event, in order and once."""
    seen: list[str] = []
    told: list[str] = []
    async with (
        httpx2.AsyncClient(base_url=server.url, headers=server.headers, timeout=30) as client,
        deaf(server),
        socket(server, "/ws", server.admin_token) as reading,
    ):
        await reading.send('{"op":"subscribe","id":"s","types":["task.queued"]}')
        assert (await received(reading))["op"] == "subscribed"
        await until(lambda: server.services.broadcaster.subscribers == 2)
        for _ in range(20):
            answer = await client.post("/api/v1/tasks/batch", json={"tasks": [{"type": "beside"}] * 100})
            told += [item["id"] for item in answer.json()["items"]] if answer.status_code == 200 else []
            while len(seen) < len(told):
                frame = await received(reading)
                seen += [event["subject"] for event in frame.get("events") or [frame["event"]]]
    assert told
    assert seen == told


async def test_a_socket_that_is_closed_gets_what_came_before(server: RunningServer) -> None:
    """A follower that is served with the crowd hears of the end after its last event, and nothing behind it."""
    async with (
        httpx2.AsyncClient(base_url=server.url, headers=server.headers, timeout=30) as client,
        socket(server, "/ws", server.admin_token) as there,
    ):
        await there.send('{"op":"subscribe","id":"s","types":["task.queued"]}')
        assert (await received(there))["op"] == "subscribed"
        made = (await client.post("/api/v1/tasks", json={"type": "before"})).json()
        assert (await received(there))["event"]["subject"] == made["id"]
        server.services.sockets.close(4401, "credential expired")
        await client.post("/api/v1/tasks", json={"type": "behind"})
        with pytest.raises(ConnectionClosed):
            await received(there)
        assert there.close_code == 4401


@asynccontextmanager
async def deaf(server: RunningServer) -> AsyncIterator[Callable[[], Any]]:
    """Subscribe to everything over a socket whose other end is not read; the result reads on to the close code."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
    upgrade = (
        "GET /ws HTTP/1.1", "Host: x", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", f"Authorization: Bearer {server.admin_token}", "", "",
    )  # fmt: skip
    writer.write("\r\n".join(upgrade).encode())
    await reader.readuntil(b"\r\n\r\n")
    frame = b'{"op":"subscribe","id":"s"}'
    writer.write(bytes([0x81, 0x80 | len(frame), 0, 0, 0, 0]) + frame)

    async def closed() -> int:
        last = b""
        while data := await asyncio.wait_for(reader.read(1 << 20), 10):
            last = (last + data)[-64:]
        at = last.rindex(b"\x88")
        return int.from_bytes(last[at + 2 : at + 4], "big")

    try:
        yield closed
    finally:
        writer.close()


# --- agents without a socket --------------------------------------------------------------------------------------------


async def test_only_the_holder_of_a_lease_may_end_a_task_and_only_once(
    server: RunningServer, client: httpx2.AsyncClient
) -> None:
    """Rows 35 and 36: a foreign or old lease is 409 lease-superseded, the same result again 200, a different one 409 already-terminal."""
    token = await credential(server, "poller")
    headers = {"Authorization": f"Bearer {token}"}
    agent = {"name": "poller", "capabilities": [{"name": "polled"}], "slots": 2}
    async with httpx2.AsyncClient(base_url=server.url, headers=headers, timeout=30) as poller:
        await poller.post("/api/v1/agents/register", json=agent)
        welcome = (await poller.post("/api/v1/agents/session", json={"op": "hello", "agent": agent})).json()
        session = f"/api/v1/agents/session/{welcome['instance_id']}"
        made = (await client.post("/api/v1/tasks", json={"type": "polled", "payload": {"n": 1}})).json()
        claimed = (await poller.post(f"{session}/claim?wait=5")).json()["tasks"]
        assert [task["task_id"] for task in claimed] == [made["id"]]

        async def end(lease: str, result: object) -> httpx2.Response:
            done = {"task_id": made["id"], "lease_token": lease, "outcome": "completed", "result": result}
            return await poller.post(f"{session}/report", json={"op": "report", "id": 1, "done": [done]})

        forged = await end("forged", 1)
        assert (forged.status_code, forged.json()["code"]) == (409, "lease-superseded")
        assert welcome["agent_id"] not in forged.json()["detail"]
        lease = claimed[0]["lease_token"]
        assert (await end(lease, 1)).status_code == 200
        assert (await end(lease, 1)).status_code == 200
        other = await end(lease, 2)
        assert (other.status_code, other.json()["code"]) == (409, "already-terminal")
        assert (await client.get(f"/api/v1/tasks/{made['id']}")).json()["result"] == 1
        beat = await poller.post(f"{session}/heartbeat", json={"beat": {"tick": 1}})
        assert beat.json()["lease_ms"] == welcome["lease_ms"]
        assert (await poller.delete(session)).status_code == 204
        gone = await poller.post(f"{session}/heartbeat", json={"beat": {"tick": 2}})
        assert (gone.status_code, gone.json()["code"]) == (409, "lease-superseded")


async def test_a_result_of_20_mb_is_too_large(server: RunningServer) -> None:
    """Row 46: 413."""
    headers = {"Authorization": f"Bearer {await credential(server, 'large')}", "content-type": "application/json"}
    body = (
        b'{"op":"report","id":1,"done":[{"task_id":"t","lease_token":"x","outcome":"completed","result":"'
        + b"a" * 20_000_000
        + b'"}]}'
    )
    async with httpx2.AsyncClient(base_url=server.url, headers=headers, timeout=30) as agent:
        answer = await agent.post("/api/v1/agents/session/inst_1/report", content=body)
    assert (answer.status_code, answer.json()["code"]) == (413, "payload-too-large")
