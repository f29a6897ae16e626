"""What an operator sets holds: hosts, connections, sizes and times."""

import asyncio
import json
import socket
from pathlib import Path

import httpx2
import pytest
import websockets

from mcp_control.api.hosts import host_name
from mcp_control.api.network import listening
from mcp_control.testing.server import running_server, settings_for


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("A.Example", "a.example"),
        ("a.example:8640", "a.example"),
        ("a.example.", "a.example"),
        ("[::1]:80", "::1"),
        ("", ""),
    ],
)
def test_the_name_in_a_host_header_is_found_however_it_is_written(header: str, name: str) -> None:
    """Case, port, brackets and the root's dot do not matter."""
    assert host_name(header) == name


@pytest.mark.usefixtures("backend")
async def test_with_a_list_of_hosts_others_are_not_answered(tmp_path: Path) -> None:
    """Row 48: 421 for an unknown Host on every route and socket, before anything else; the names of the list work."""
    async with (
        running_server(tmp_path, security__allowed_hosts=["127.0.0.1", "panel.example"]) as server,
        httpx2.AsyncClient(base_url=server.url, headers=server.headers) as client,
    ):
        for path in ("/api/v1/status", "/health/live", "/nowhere"):
            refused = await client.get(path, headers={"Host": "rebound.example"})
            assert (refused.status_code, refused.json()["code"]) == (421, "misdirected-request")
        assert (await client.get("/api/v1/status", headers={"Host": "Panel.example:8640"})).status_code == 200
        assert (await client.get("/api/v1/status")).status_code == 200
        url = server.url.replace("http", "ws", 1) + "/ws"
        with pytest.raises(websockets.InvalidStatus) as caught:
            async with websockets.connect(
                url.replace("127.0.0.1", "localhost"), additional_headers=server.headers, host="127.0.0.1"
            ):
                pass
        assert caught.value.response.status_code == 421


@pytest.mark.usefixtures("backend")
async def test_connections_end_at_their_limit(tmp_path: Path) -> None:
    """One socket more than allowed is refused with 503 and Retry-After; when one goes, the next one is welcome."""
    async with running_server(tmp_path, overload__max_connections=1) as server:
        url = server.url.replace("http", "ws", 1) + "/ws"
        async with websockets.connect(url, additional_headers=server.headers):
            with pytest.raises(websockets.InvalidStatus) as caught:
                async with websockets.connect(url, additional_headers=server.headers):
                    pass
            assert (caught.value.response.status_code, caught.value.response.headers["retry-after"]) == (503, "5")
        async with asyncio.timeout(5):
            while True:
                try:
                    async with websockets.connect(url, additional_headers=server.headers) as there:
                        await there.send(json.dumps({"op": "ping"}))
                        assert json.loads(await there.recv()) == {"op": "pong"}
                        break
                except websockets.InvalidStatus:  # the server has yet to see that the first one is gone
                    await asyncio.sleep(0.01)


@pytest.mark.usefixtures("backend")
async def test_a_body_may_have_the_size_that_is_set(tmp_path: Path) -> None:
    """One byte more is 413."""
    async with (
        running_server(tmp_path, limits__max_body_bytes=2000) as server,
        httpx2.AsyncClient(base_url=server.url, headers=server.headers) as client,
    ):
        shell = len(json.dumps({"type": "echo", "payload": ""}))
        sizes = {}
        for size in (2000, 2001):
            body = json.dumps({"type": "echo", "payload": "x" * (size - shell)})
            answer = await client.post("/api/v1/tasks", content=body, headers={"Content-Type": "application/json"})
            sizes[len(body)] = answer.status_code
        assert sizes == {2000: 201, 2001: 413}


@pytest.mark.usefixtures("backend")
async def test_headers_that_take_too_long_end_the_connection(tmp_path: Path) -> None:
    """A head sent drop by drop gets 408, also behind a complete request; a silent connection is closed; a quick one is served."""
    async with running_server(tmp_path, limits__header_timeout_seconds=0.2) as server:
        host, port = server.url.removeprefix("http://").split(":")

        async def answer(*parts: bytes) -> bytes:
            reader, writer = await asyncio.open_connection(host, int(port))
            for part in parts:
                writer.write(part)
                await writer.drain()
            async with asyncio.timeout(5):
                said = await reader.read()
            writer.close()
            return said

        slow = await answer(b"GET /health/live HTTP/1.1\r\nHost: a\r\n")
        assert slow.startswith(b"HTTP/1.1 408")
        assert b"headers-timeout" in slow
        both = await answer(b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\nGET /health")
        assert both.startswith(b"HTTP/1.1 200")
        assert b"HTTP/1.1 408" in both
        assert await answer() == b""
        reader, writer = await asyncio.open_connection(host, int(port))
        began = asyncio.get_running_loop().time()
        while asyncio.get_running_loop().time() < began + 0.5:  # a connection may live longer than a head may take
            writer.write(b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n")
            async with asyncio.timeout(5):
                assert (await reader.readline()).startswith(b"HTTP/1.1 200")
                await reader.readuntil(b'{"status":"ok"}')
        writer.close()


def test_answers_do_not_wait_for_acknowledgements(tmp_path: Path) -> None:
    """The listening socket has TCP_NODELAY, which its connections inherit."""
    listener = listening(settings_for(tmp_path, {}))
    try:
        with socket.create_connection(listener.getsockname()):
            connection, _ = listener.accept()
            with connection:
                assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
    finally:
        listener.close()


@pytest.mark.usefixtures("backend")
async def test_logins_and_requests_are_counted_as_they_were(tmp_path: Path) -> None:
    """`/metrics` counts logins by outcome, and sees itself as the one request under way."""
    async with (
        running_server(tmp_path) as server,
        httpx2.AsyncClient(base_url=server.url, headers=server.headers) as client,
    ):
        assert server.one_time_password is not None
        for password in ("wrong wrong wrong wrong", "wrong again and again"):
            wrong = await client.post("/api/v1/auth/login", json={"username": "admin", "password": password})
            assert wrong.status_code in (401, 429)
        lines = (await client.get("/metrics")).text.splitlines()
        counted = sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("mcp_control_logins_total{"))
        assert counted == 2
        assert "mcp_control_http_requests_in_flight 1.0" in lines
