"""Start and end of a server."""

import asyncio
import gc
import json
from pathlib import Path

import httpx2
import pytest
import websockets
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from mcp_control.kernel.errors import StoreUnavailable
from mcp_control.server import Ready, serve
from mcp_control.testing.server import ServerProcess, running_server, settings_for
from tests.integration.support import settled

pytestmark = pytest.mark.usefixtures("backend")


async def test_installed_plugins_bring_their_pipelines(tmp_path: Path) -> None:
    """A server offers the pipelines of its plugins from the start, and names the plugins."""
    async with (
        running_server(tmp_path, plugins=["techdeck"]) as server,
        httpx2.AsyncClient(base_url=server.url, headers=server.headers) as client,
    ):
        await settled(client)
        assert [plugin["name"] for plugin in (await client.get("/api/v1/plugins")).json()["items"]] == ["techdeck"]
        assert (await client.get("/api/v1/pipelines/techdeck")).status_code == 200
        assert (await client.get("/health/ready")).json()["state"] == "ok"


async def test_a_plugin_that_is_missing_is_named_and_does_not_keep_the_server_from_work(tmp_path: Path) -> None:
    """Degraded, with a reason, and ready."""
    async with (
        running_server(tmp_path, plugins=["nope"]) as server,
        httpx2.AsyncClient(base_url=server.url, headers=server.headers) as client,
    ):
        await settled(client)
        answer = await client.get("/health/ready")
        assert (answer.status_code, answer.json()["state"]) == (200, "degraded")
        assert (await client.get("/api/v1/status")).json()["problems"] == ["plugins: nope is not installed"]


@pytest.mark.embedded
async def test_requests_leave_nothing_for_the_garbage_collector(tmp_path: Path) -> None:
    """All of a request is freed with its answer: of many, only the last of an open connection is still there."""
    async with (
        running_server(tmp_path) as server,
        httpx2.AsyncClient(base_url=server.url, headers=server.headers) as client,
    ):
        gc.collect()
        gc.disable()
        try:
            for _ in range(20):
                assert (await client.get("/api/v1/plugins")).status_code == 200
            there = sum(isinstance(one, RequestResponseCycle) for one in gc.get_objects())
        finally:
            gc.enable()
        assert there <= 2


@pytest.mark.embedded
async def test_a_second_server_on_the_same_data_is_refused(tmp_path: Path) -> None:
    """Two servers never share a data folder."""
    async with running_server(tmp_path):
        with pytest.raises(StoreUnavailable):
            await serve(settings_for(tmp_path / "data", {}))


async def test_a_server_that_ends_says_goodbye(tmp_path: Path) -> None:
    """SIGTERM closes sockets with 1012, ends streams and long polls, and exits 0."""
    server = await asyncio.to_thread(ServerProcess(tmp_path).start)
    url = server.url.replace("http", "ws", 1) + "/ws"
    async with (
        websockets.connect(url, additional_headers=server.headers, compression=None) as there,
        httpx2.AsyncClient(base_url=server.url, headers=server.headers, timeout=60) as client,
        client.stream("GET", "/api/v1/events", headers={"Accept": "text/event-stream"}) as stream,
    ):
        await there.send(json.dumps({"op": "subscribe", "id": "s"}))
        await there.recv()
        ending = asyncio.create_task(asyncio.to_thread(server.stop))
        await stream.aread()
        await there.wait_closed()
        assert there.close_code == 1012
    assert await ending == 0


async def test_a_store_that_fails_ends_the_process_with_an_error(tmp_path: Path) -> None:
    """After a fatal error of the store the server ends by itself and says so by its exit code."""

    async def ready(there: Ready) -> None:
        store = there.services.store
        store._fatal(StoreUnavailable("fsync failed"))  # type: ignore[attr-defined]  # the callback the disk's failure goes through

    assert await serve(settings_for(tmp_path / "data", {}), ready) == 1
