"""What the SDK does when answers are late, broken or missing: against a peer that misbehaves on demand."""

import asyncio
import contextlib
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mcp_control.sdk.artifacts import AsyncTaskArtifacts, TaskArtifacts
from mcp_control.sdk.client import AsyncClient, Client
from mcp_control.sdk.errors import Conflicting, DigestMismatch, NotNow, SdkError, Unreachable
from mcp_control.sdk.follow import Sign, SseReader
from mcp_control.sdk.profiles import DEFAULT_URL, Profile, Profiles
from mcp_control.sdk.transport import ATTEMPTS
from tests.sdk.peer import Peer, until

VIEW = {
    "id": "task_1",
    "type": "sum",
    "state": "queued",
    "state_since": "2026-01-01T00:00:00Z",
    "created_at": "2026-01-01T00:00:00Z",
    "priority": 50,
    "progress": 0.0,
    "attempt": 0,
    "fence": "1.0",
    "etag": "1",
}
CONTENT = b"0123456789" * 1000


@pytest.mark.parametrize("status", [429, 503])
async def test_patience_is_given_when_asked_for(peer: Peer, status: int) -> None:
    """After 429 and 503 with Retry-After the same submission is sent again, under the same idempotency key."""
    bodies: list[dict[str, Any]] = []

    def submit(scope: dict[str, Any], body: bytes) -> tuple[int, Any]:
        bodies.append(msgspec.json.decode(body))
        return (status, {"code": "overloaded", "retryable": True}) if len(bodies) < 3 else (201, VIEW)

    peer.routes["POST", "/tasks"] = submit

    def blocking() -> str:
        with Client(peer.url, token="t") as client:
            return client.tasks.submit("sum", [1]).id

    assert await asyncio.to_thread(blocking) == "task_1"
    assert bodies[0] == bodies[1] == bodies[2]
    assert bodies[0]["idempotency_key"]


async def test_a_conflict_that_passes_is_waited_out(peer: Peer) -> None:
    """A 409 marked retryable is repeated under the same key; one that is final is raised at once."""
    bodies: list[dict[str, Any]] = []

    def submit(scope: dict[str, Any], body: bytes) -> tuple[int, Any]:
        bodies.append(msgspec.json.decode(body))
        if bodies[-1]["type"] == "final":
            return 409, {"code": "already-terminal", "retryable": False}
        return (409, {"code": "conflict", "retryable": True}) if len(bodies) < 3 else (201, VIEW)

    peer.routes["POST", "/tasks"] = submit
    async with AsyncClient(peer.url, token="t") as client:
        assert (await client.tasks.submit("sum", [1])).id == "task_1"
        assert bodies[0] == bodies[1] == bodies[2]
        with pytest.raises(Conflicting):
            await client.tasks.submit("final", [1])
    assert len(bodies) == 4


@pytest.mark.parametrize("blocking", [True, False])
async def test_an_upload_of_a_handler_waits_for_a_server_that_restarts(
    peer: Peer, tmp_path: Path, blocking: bool
) -> None:
    """Files and bytes are sent again, whole, for longer than ordinary calls; what can be read once only is sent once."""
    file = tmp_path / "file"
    file.write_bytes(CONTENT)
    seen: list[bytes] = []
    view = msgspec.json.decode(_artifact(hashlib.sha256(CONTENT).hexdigest()).partition(b"\r\n\r\n")[2])

    def store(scope: dict[str, Any], body: bytes) -> tuple[int, Any]:
        seen.append(body)
        return (503, {"code": "shutting-down", "retryable": True}) if len(seen) < ATTEMPTS + 3 else (201, view)

    async def upload(source: Any) -> None:
        if blocking:
            with Client(peer.url, token="t") as client:
                await asyncio.to_thread(TaskArtifacts(client, {"task_id": "task_1"}).upload, source, "data")
        else:
            async with AsyncClient(peer.url, token="t") as client:
                await AsyncTaskArtifacts(client, {"task_id": "task_1"}).upload(source, "data")

    peer.routes["POST", "/artifacts"] = store
    await upload(file)
    assert seen == [CONTENT] * (ATTEMPTS + 3)
    seen.clear()
    with pytest.raises(NotNow):
        await upload(iter([CONTENT]))
    assert seen == [CONTENT]


async def test_without_retries_the_first_answer_counts(peer: Peer) -> None:
    """With `retry=False` a 503 is raised at once, with its code and Retry-After."""
    peer.routes["POST", "/tasks"] = lambda scope, body: (503, {"code": "overloaded", "retryable": True})
    async with AsyncClient(peer.url, token="t", retry=False) as client:
        with pytest.raises(NotNow) as caught:
            await client.tasks.submit("sum", [1])
    assert (caught.value.code, caught.value.retry_after, caught.value.request_id) == ("overloaded", 0.05, "req-1")


@contextlib.asynccontextmanager
async def _hanging_up(answers: list[bytes]) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that reads a request and gives the next of these raw answers, whole or not, then hangs up."""
    requests: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        requests.append(head)
        writer.write(answers.pop(0) if answers else b"")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", requests


def _raw(body: bytes, status: str = "200 OK", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {size}\r\n\r\n".encode() + body


async def test_what_may_have_taken_effect_is_not_repeated() -> None:
    """A retry of a task is no harmless repetition: after a hang-up it is sent once only, while a read is sent again."""
    async with (
        _hanging_up([b"", b"", _raw(msgspec.json.encode(VIEW))]) as (url, requests),
        AsyncClient(url, token="t") as client,
    ):
        with pytest.raises(Unreachable):
            await client.tasks.handle("task_1").retry()
        assert len(requests) == 1
        assert (await client.tasks.get("task_1")).id == "task_1"
        assert len(requests) == 3


def _artifact(sha256: str) -> bytes:
    view = {
        "id": "art_1",
        "name": "data",
        "sha256": sha256,
        "size": len(CONTENT),
        "media_type": "application/octet-stream",
        "role": "output",
        "created_at": "2026-01-01T00:00:00Z",
    }
    return _raw(msgspec.json.encode(view))


def _nowhere(sha256: str) -> bytes:
    return _raw(msgspec.json.encode({"path": None, "sha256": sha256, "size": len(CONTENT)}))


@pytest.mark.parametrize("kind", ["blocking", "awaited"])
async def test_a_broken_download_goes_on_where_it_broke(tmp_path: Path, kind: str) -> None:
    """After a drop only the missing bytes are asked for, and the whole has the right digest."""
    digest = hashlib.sha256(CONTENT).hexdigest()
    rest = _raw(CONTENT[4000:], "206 Partial Content")
    answers = [_nowhere(digest), _artifact(digest), _raw(CONTENT[:4000], length=len(CONTENT)), rest]
    async with _hanging_up(answers) as (url, requests):
        target = tmp_path / "data"
        if kind == "awaited":
            async with AsyncClient(url, token="t") as client:
                await client.artifacts.download("art_1", target)
        else:
            await asyncio.to_thread(lambda: Client(url, token="t").artifacts.download("art_1", target))
    assert target.read_bytes() == CONTENT
    assert b"range: bytes=4000-" in requests[-1].lower()
    assert os.listdir(tmp_path) == ["data"]


async def test_a_download_with_other_bytes_is_refused(tmp_path: Path) -> None:
    """Bytes that do not have the artifact's digest raise DigestMismatch and leave no file."""
    digest = hashlib.sha256(b"something else").hexdigest()
    async with (
        _hanging_up([_nowhere(digest), _artifact(digest), _raw(CONTENT)]) as (url, _),
        AsyncClient(url, token="t") as client,
    ):
        with pytest.raises(DigestMismatch):
            await client.artifacts.download("art_1", tmp_path / "data")
    assert os.listdir(tmp_path) == []


async def test_a_file_on_the_same_machine_is_used_as_it_is(tmp_path: Path) -> None:
    """Where the server names a readable file of the right size, no byte travels; a file of another size is not trusted."""
    blob = tmp_path / "blob"
    blob.write_bytes(CONTENT)
    location = {"path": str(blob), "sha256": hashlib.sha256(CONTENT).hexdigest(), "size": len(CONTENT)}
    async with (
        _hanging_up([_raw(msgspec.json.encode(location))] * 2) as (url, requests),
        AsyncClient(url, token="t") as client,
    ):
        assert await client.artifacts.local("art_1", tmp_path) == blob
        copy = await client.artifacts.download("art_1", tmp_path / "copy")
    assert copy.read_bytes() == CONTENT
    assert len(requests) == 2
    blob.write_bytes(b"short")
    async with (
        _hanging_up([_raw(msgspec.json.encode(location)), _artifact(location["sha256"]), _raw(CONTENT)]) as (
            url,
            _,
        ),
        AsyncClient(url, token="t") as client,
    ):
        fetched = await client.artifacts.local("art_1", tmp_path)
    assert fetched == tmp_path / "art_1"
    assert fetched.read_bytes() == CONTENT


async def test_a_damaged_file_on_the_same_machine_is_not_downloaded(tmp_path: Path) -> None:
    """A file of the right size with other bytes is not taken: the bytes come from the server, which answers for them."""
    blob = tmp_path / "blob"
    blob.write_bytes(CONTENT[:-1] + b"?")
    digest = hashlib.sha256(CONTENT).hexdigest()
    location = _raw(msgspec.json.encode({"path": str(blob), "sha256": digest, "size": len(CONTENT)}))
    async with (
        _hanging_up([location, _artifact(digest), _raw(CONTENT)] * 2) as (url, _),
        AsyncClient(url, token="t") as client,
    ):
        awaited = await client.artifacts.download("art_1", tmp_path / "awaited")
        blocking = await asyncio.to_thread(
            lambda: Client(url, token="t").artifacts.download("art_1", tmp_path / "blocking")
        )
    assert awaited.read_bytes() == blocking.read_bytes() == CONTENT
    assert sorted(os.listdir(tmp_path)) == ["awaited", "blob", "blocking"]


async def test_an_upload_that_arrives_changed_is_noticed(peer: Peer) -> None:
    """When the server's digest is not that of the bytes sent, the upload raises DigestMismatch."""
    view = msgspec.json.decode(_artifact("0" * 64).partition(b"\r\n\r\n")[2])
    peer.routes["POST", "/artifacts"] = lambda scope, body: (201, view)
    async with AsyncClient(peer.url, token="t") as client:
        with pytest.raises(DigestMismatch):
            await client.artifacts.upload(b"tiny", "data")


def test_event_streams_are_read_as_the_standard_says() -> None:
    """Comments are signs of life, data may come in several lines, ids move the cursor even without an event."""
    reader = SseReader("evt_1")
    event = {
        "id": "evt_3",
        "type": "task.queued",
        "source": "/tasks",
        "subject": "task_1",
        "time": "2026-01-01T00:00:00Z",
        "tenant": "default",
        "actor": "x",
        "data": {},
    }
    text = msgspec.json.encode(event).decode()
    assert reader.feed(": still here") is Sign.ALIVE
    assert [reader.feed(line) for line in ("id: evt_2", "")] == [None, None]
    assert reader.cursor == "evt_2"
    for line in ("id: evt_3", "event: task.queued", f"data: {text[:1]}", f"data:{text[1:]}"):
        assert reader.feed(line) is None
    found = reader.feed("")
    assert not isinstance(found, Sign)
    assert found is not None
    assert (found.id, reader.cursor) == ("evt_3", "evt_3")
    assert [reader.feed(line) for line in ("event: reread", "data: {}", "")][-1] is Sign.REREAD
    with pytest.raises(SdkError, match="cursor-expired"):
        [reader.feed(line) for line in ("event: problem", 'data: {"code":"cursor-expired"}', "")]


def test_profiles_are_kept_by_url_for_the_user_alone(tmp_path: Path) -> None:
    """A stored token is found by URL or name, the first profile is the default, and the file has mode 0600."""
    profiles = Profiles(tmp_path / "config", {})
    assert profiles.resolve() == Profile(url=DEFAULT_URL)
    profiles.save(Profile(url="http://a:1/", token="one", name="home"))
    profiles.save(Profile(url="http://b:2", token="two"))
    assert profiles.resolve().token == "one"
    assert profiles.resolve("b:2").token == "two"
    assert profiles.resolve("home").url == "http://a:1"
    assert (tmp_path / "config" / "profiles.json").stat().st_mode & 0o777 == 0o600
    profiles.remove("http://a:1")
    assert profiles.resolve("http://a:1").token == ""


def test_the_environment_wins_over_files(tmp_path: Path) -> None:
    """MCP_CONTROL_URL, MCP_CONTROL_TOKEN and MCP_CONTROL_CONFIG_DIR come before what is stored; arguments come first."""
    environ = {"MCP_CONTROL_URL": "http://env:1", "MCP_CONTROL_TOKEN": "env", "MCP_CONTROL_CONFIG_DIR": str(tmp_path)}
    profiles = Profiles(environ=environ)
    profiles.save(Profile(url="http://file:1", token="file"), default=True)
    assert profiles.folder == tmp_path
    assert profiles.resolve() == Profile(url="http://env:1", token="env")
    assert profiles.resolve("http://arg:1", "arg") == Profile(url="http://arg:1", token="arg")


def test_importing_the_package_loads_no_runtime() -> None:
    """`import mcp_control` alone loads neither HTTP nor WebSocket libraries; the names are there when asked for."""
    program = (
        "import sys, mcp_control; assert not {'httpx2', 'websockets', 'msgspec'} & set(sys.modules); "
        "[getattr(mcp_control, name) for name in mcp_control.__all__]"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


async def test_worker_processes_end_with_their_agent(peer: Peer, tmp_path: Path) -> None:
    """After kill -9 of the agent its worker processes end too, even in the middle of work."""
    program = (
        "from mcp_control import Agent\nfrom tests.sdk.handlers_for_tests import stubborn\n"
        "agent = Agent('worker')\nagent.add(stubborn)\nif __name__ == '__main__':\n    agent.run()\n"
    )
    (tmp_path / "program.py").write_text(program)
    environ = {
        "MCP_CONTROL_URL": peer.url,
        "MCP_CONTROL_TOKEN": "t",
        "MCP_CONTROL_CONFIG_DIR": str(tmp_path),
        "PYTHONPATH": os.getcwd(),
    }
    process = await asyncio.to_thread(subprocess.Popen, [sys.executable, str(tmp_path / "program.py")], env=environ)
    try:
        await until(lambda: peer.connected)
        assignment = peer.assignment("proc.stubborn")
        peer.give(assignment)
        await until(lambda: assignment.task_id in peer.progress)
        children = _children(process.pid)
        process.send_signal(signal.SIGKILL)
        await asyncio.to_thread(process.wait)
        await until(lambda: not any(_runs(pid) for pid in children))
    finally:
        process.kill()
    assert children


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
