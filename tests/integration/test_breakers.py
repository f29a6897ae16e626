"""Breakers on real processes: a handler's peer that fails is left alone, everybody can see it, and no task is lost for it."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from mcp_control.testing.server import ServerProcess
from tests.integration.support import API, AgentProcess, admin, agents_online, enrolment, in_state, submit, task, until

pytestmark = pytest.mark.usefixtures("backend")


class Shop:
    """An HTTP server that answers with `status`, and counts who asks."""

    def __init__(self) -> None:
        self.status = 503
        self.asked = 0
        self.url = ""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            self.asked += 1
        writer.write(b"HTTP/1.1 %d Said\r\ncontent-length: 0\r\nconnection: close\r\n\r\n" % self.status)
        await writer.drain()
        writer.close()


@asynccontextmanager
async def _open_shop() -> AsyncIterator[Shop]:
    shop = Shop()
    server = await asyncio.start_server(shop.answer, "127.0.0.1", 0)
    shop.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    async with server:
        yield shop


def _mcpctl(server: ServerProcess, folder: Path, *args: str) -> Any:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MCP_CONTROL_")}
    environ |= {
        "MCP_CONTROL_URL": server.url,
        "MCP_CONTROL_TOKEN": server.headers["Authorization"].removeprefix("Bearer "),
        "MCP_CONTROL_CONFIG_DIR": str(folder / "cli"),
        "MCP_CONTROL_DATA": str(folder / "nothing"),
    }
    command = [sys.executable, "-m", "mcp_control.cli.main", *args, "--json"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    return json.loads(done.stdout)


async def test_a_handlers_peer_that_fails_is_left_alone_until_it_answers_again(tmp_path: Path) -> None:
    """Two failures open the breaker; tasks then wait without losing attempts or asking; it is seen; it closes, and all complete."""
    async with _open_shop() as shop:
        with ServerProcess(tmp_path / "server", overload__loop_lag_seconds=10) as server:
            async with admin(server) as client:

                async def breakers(**wanted: str) -> list[dict[str, Any]]:
                    found: list[dict[str, Any]] = (await client.get(f"{API}/breakers", params=wanted)).json()["items"]
                    return [one for one in found if one["owner_kind"] == "agent"]

                async def metric(state: str) -> float:
                    text = (await client.get("/metrics")).text
                    [line] = [each for each in text.splitlines() if f'breakers{{state="{state}"}}' in each]
                    return float(line.rpartition(" ")[2])

                token = await enrolment(client)
                with AgentProcess(tmp_path, "caller", server.url, token, slots=1, lease=6):
                    await agents_online(client, ["caller"])
                    policy = {"max_attempts": 20, "first_seconds": 0.01}
                    payload = {"url": shop.url, "open_for": 1.0}
                    shop.status = 404
                    wrong = await submit(client, "it.call", payload, retry={"max_attempts": 1})
                    await in_state(client, wrong, "failed")
                    shop.status = 503
                    first = await submit(client, "it.call", payload, retry=policy)
                    [opened] = await until(lambda: breakers(state="open"), 20, "the breaker is seen open")
                    assert (opened["owner"], opened["name"], opened["error"]) == ("caller", "shop", "HTTPStatusError")
                    assert opened["failures"] >= 2
                    assert opened["probe_at"] > opened["since"]
                    assert await metric("open") + await metric("half_open") >= 1
                    more = [await submit(client, "it.call", payload, retry=policy) for _ in range(3)]

                    async def put_off() -> bool:
                        found = [await task(client, task_id) for task_id in more]
                        return all(one.get("failure", {}).get("code") == "breaker-open" for one in found)

                    await until(put_off, 20, "what comes meanwhile is put off")
                    listed, seen = await asyncio.gather(
                        asyncio.to_thread(_mcpctl, server, tmp_path, "breakers", "ls"),
                        asyncio.to_thread(_mcpctl, server, tmp_path, "doctor"),
                    )
                    assert ("caller", "shop") in [
                        (one["owner"], one["name"]) for one in listed if one["state"] != "closed"
                    ]
                    found = [one for one in seen if one["check"] == "breaker" and "shop" in one["detail"]]
                    assert [one["state"] for one in found] == ["warn"]
                    shop.status = 200
                    asked = 0
                    for task_id in (wrong, first, *more):
                        if task_id != wrong:
                            await in_state(client, task_id, "completed", 90)
                        codes = [
                            one.get("failure", {}).get("code") for one in (await task(client, task_id))["attempts"]
                        ]
                        assert ("breaker-open" in codes) == (task_id in more) or task_id == first
                        asked += len([code for code in codes if code != "breaker-open"])
                    assert shop.asked <= asked, "nobody asks a peer that is left alone"
                    [closed] = await until(lambda: breakers(state="closed"), 20, "the breaker is seen closed")
                    assert closed["opened"] == 1

                    async def told() -> bool:
                        page = await client.get(
                            f"{API}/events",
                            params={"type": "breaker.*", "after": "evt_0"},
                            headers={"accept": "application/json"},
                        )
                        events = [one for one in page.json()["items"] if one["data"]["breaker"] == "shop"]
                        assert {one["data"]["owner"] for one in events} <= {"caller"}
                        return [one["type"] for one in events] == ["breaker.opened", "breaker.closed"]

                    await until(told, 20, "its events are heard")
