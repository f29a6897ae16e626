"""A server that starts, answers and stops."""

from pathlib import Path

import httpx2
import pytest

from mcp_control.testing.server import ServerProcess, running_server

pytestmark = pytest.mark.usefixtures("backend")


async def test_a_server_in_the_test_answers(tmp_path: Path) -> None:
    """`running_server` gives a server that knows its administrator."""
    async with (
        running_server(tmp_path) as server,
        httpx2.AsyncClient(base_url=server.url, headers=server.headers) as client,
    ):
        answer = await client.get("/api/v1/auth/me")
        assert answer.status_code == 200
        assert answer.json()["kind"] == "token"


def test_what_a_killed_server_acknowledged_is_there_after_its_restart(tmp_path: Path) -> None:
    """kill -9 loses no acknowledged task."""
    with ServerProcess(tmp_path) as server:
        made = httpx2.post(f"{server.url}/api/v1/tasks", json={"type": "echo", "payload": [1]}, headers=server.headers)
        assert made.status_code == 201
        server.kill()
        server.start()
        found = httpx2.get(f"{server.url}/api/v1/tasks/{made.json()['id']}", headers=server.headers)
        assert found.json()["payload"] == [1]
