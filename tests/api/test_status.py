"""`/status`: the server at a glance, and what is wrong with it."""

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

from mcp_control.testing.server import RunningServer, running_server
from tests.integration.support import settled

pytestmark = pytest.mark.usefixtures("backend")


async def registered(client: httpx2.AsyncClient, server: RunningServer, name: str, task_type: str) -> str:
    """An agent's credential."""
    answer = await client.post(
        "/api/v1/agents/register",
        json={"name": name, "capabilities": [{"name": task_type}]},
        headers={"Authorization": f"Bearer {await server.enrolment_token()}"},
    )
    credential: str = answer.json()["credential"]
    return credential


async def poller(client: httpx2.AsyncClient, credential: str, name: str, task_type: str) -> tuple[str, dict[str, str]]:
    """An open session of an agent without socket: its path, and the headers for it."""
    headers = {"Authorization": f"Bearer {credential}", "Content-Type": "application/json"}
    hello = {"op": "hello", "protocol": 1, "agent": {"name": name, "capabilities": [{"name": task_type}], "slots": 2}}
    welcome = await client.post("/api/v1/agents/session", content=json.dumps(hello), headers=headers)
    assert welcome.status_code == 200, welcome.text
    return f"/api/v1/agents/session/{welcome.json()['instance_id']}", headers


async def test_status_counts_by_state_and_says_what_is_wrong(tmp_path: Path) -> None:
    """Tasks by state and agents by state are exact; a waiting task that nobody online takes is a problem until somebody can."""
    async with (
        running_server(tmp_path) as server,
        httpx2.AsyncClient(base_url=server.url, headers=server.headers) as client,
    ):
        await settled(client)
        for _ in range(3):
            assert (await client.post("/api/v1/tasks", json={"type": "odd"})).status_code == 201
        found = (await client.get("/api/v1/status")).json()
        assert (found["tasks"], found["agents"], found["runs"]) == ({"queued": 3}, {}, {})
        assert found["problems"] == ["tasks: 3 of type odd wait and no agent online takes them"]
        credential = await registered(client, server, "helper", "odd")
        assert (await client.get("/api/v1/status")).json()["agents"] == {"offline": 1}
        await poller(client, credential, "helper", "odd")
        found = (await client.get("/api/v1/status")).json()
        assert (found["agents"], found["problems"]) == ({"online": 1}, [])
        server.services.metrics.violation("double_final")
        assert (await client.get("/api/v1/status")).json()["problems"] == [
            "invariants: broken promises: double_final 1 times"
        ]
        assert (await client.get("/health/ready")).status_code == 200


async def test_work_whose_way_to_a_polling_agent_was_lost_is_sent_again(tmp_path: Path) -> None:
    """After two heartbeats that do not know a claimed task, the next claim brings it again under the same lease."""
    async with (
        running_server(tmp_path) as server,
        httpx2.AsyncClient(base_url=server.url, headers=server.headers, timeout=30) as client,
    ):
        credential = await registered(client, server, "helper", "odd")
        session, headers = await poller(client, credential, "helper", "odd")
        task = (await client.post("/api/v1/tasks", json={"type": "odd"})).json()

        async def claim(wait: float) -> list[dict[str, Any]]:
            answer = await client.post(f"{session}/claim", params={"wait": wait, "limit": 2}, headers=headers)
            tasks: list[dict[str, Any]] = answer.json()["tasks"]
            return tasks

        async def beat(tick: int, *running: str) -> None:
            body = {"beat": {"tick": tick, "running": list(running)}}
            assert (await client.post(f"{session}/heartbeat", json=body, headers=headers)).status_code == 200

        (lost,) = await claim(10)
        assert lost["task_id"] == task["id"]
        await beat(1)
        assert await claim(0) == []
        await beat(2)
        (again,) = await claim(10)
        assert again == lost
        await beat(3, task["id"])
        await beat(4)
        await beat(5)
        assert await claim(0) == []
        done = {"op": "report", "id": 1, "done": [{"task_id": task["id"], "lease_token": again["lease_token"],
                                                     "outcome": "completed", "result": 1}]}  # fmt: skip
        assert (await client.post(f"{session}/report", json=done, headers=headers)).json().get("refused", []) == []
        assert (await client.get("/api/v1/status")).json()["tasks"] == {"completed": 1}
