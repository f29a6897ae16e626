"""`/metrics` after work of every kind: the golden signals, the inside of the server, and no broken promise."""

import re
from pathlib import Path

import msgspec
import pytest

from mcp_control.testing.server import ServerProcess
from tests.integration.pipelines import completed, parts_pipeline, started
from tests.integration.support import (
    API,
    admin,
    agents_online,
    enrolment,
    in_state,
    started_agents,
    submit,
    until,
    violations,
)

pytestmark = pytest.mark.usefixtures("backend")

_SAMPLE = re.compile(r"^(?P<name>[a-z_]+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$")


def parsed(text: str) -> dict[str, dict[str, float]]:
    """Return the values by metric name and label text."""
    found: dict[str, dict[str, float]] = {}
    for line in text.splitlines():
        if match := _SAMPLE.match(line):
            found.setdefault(match["name"], {})[match["labels"] or ""] = float(match["value"])
    return found


async def test_the_figures_show_what_happened_and_no_broken_promise(tmp_path: Path) -> None:
    """Rate, errors and latency per route, outcomes and times of tasks, lanes, loop lag, writer queue, sessions; invariants at 0."""
    with ServerProcess(tmp_path / "server") as server:
        async with admin(server) as client:
            agents = started_agents(tmp_path, server.url, await enrolment(client), ["one", "two"], slots=20, lease=2)
            try:
                await agents_online(client, ["one", "two"])
                definition = msgspec.json.encode(parts_pipeline())
                made = await client.post(
                    f"{API}/pipelines", content=definition, headers={"Content-Type": "application/json"}
                )
                assert made.status_code == 201
                run_id = await started(client, "parts", {"seed": "a", "parts": 10}, "one")
                specs = [{"type": "it.echo", "payload": number} for number in range(500)]
                await client.post(f"{API}/tasks/batch", json={"tasks": specs})
                failing = await submit(
                    client, "it.busy", "not a number", retry={"max_attempts": 2, "first_seconds": 0.01}
                )
                await in_state(client, failing, "failed")
                unwanted = await submit(client, "it.nobody")
                await client.post(f"{API}/tasks/{unwanted}/cancel", json={})
                held = await submit(
                    client, "it.hold", {"until": str(tmp_path / "go"), "journal": str(tmp_path / "journal")}
                )
                await in_state(client, held, "running")
                holder = (await client.get(f"{API}/tasks/{held}")).json()["agent_id"]
                names = {item["id"]: item["name"] for item in (await client.get(f"{API}/agents")).json()["items"]}
                next(agent for agent in agents if agent.name == names[holder]).kill()
                await in_state(client, await submit(client, "it.nobody"), "queued")
                wrong = {"username": "admin", "password": "not the password"}
                assert (await client.post(f"{API}/auth/login", json=wrong)).status_code == 401
                assert (await client.get(f"{API}/tasks/{run_id.replace('run_', 'task_')}")).status_code == 404
                await completed(client, run_id, 30)

                async def lost() -> bool:
                    figures = parsed((await client.get("/metrics")).text)
                    return figures["mcp_control_tasks_total"].get('outcome="lost",type="other"', 0) >= 1

                await until(lost, 20, "the lost lease is counted")
                (tmp_path / "go").touch()
                await in_state(client, held, "completed")

                async def seen() -> bool:
                    figures = parsed((await client.get("/metrics")).text)
                    return figures["mcp_control_lane_waiting"]['type="other"'] == 1

                await until(seen, 10, "the waiting task is seen")
                text = (await client.get("/metrics")).text
            finally:
                for agent in agents:
                    agent.kill()
            figures = parsed(text)
            requests = figures["mcp_control_http_requests_total"]
            assert any('route="/api/v1/tasks/batch"' in key and 'status="200"' in key for key in requests)
            assert any('route="/api/v1/tasks/{task_id}"' in key and 'status="404"' in key for key in requests)
            assert sum(figures["mcp_control_http_request_seconds_count"].values()) >= 10
            assert figures["mcp_control_logins_total"]['outcome="refused"'] == 1
            outcomes = figures["mcp_control_tasks_total"]
            assert outcomes['outcome="completed",type="other"'] >= 512
            assert outcomes['outcome="failed",type="other"'] == 1
            assert outcomes['outcome="cancelled",type="other"'] == 1
            assert outcomes['outcome="lost",type="other"'] >= 1
            assert figures["mcp_control_task_queue_seconds_count"]['type="other"'] >= 500
            assert figures["mcp_control_task_run_seconds_count"]['type="other"'] >= 512
            assert figures["mcp_control_event_loop_lag_seconds_count"][""] > 0
            assert figures["mcp_control_lanes"][""] == 1
            assert figures["mcp_control_lane_oldest_seconds"]['type="other"'] > 0
            for name in (
                "store_waiting",
                "sessions",
                "subscriptions",
                "facts_total",
                "orphans_total",
                "clock_holds_total",
            ):
                assert "" in figures[f"mcp_control_{name}"], name
            assert sum(figures["mcp_control_agents"].values()) == 2
            assert figures["mcp_control_orphans_total"][""] == 0
            assert "it.echo" not in text, "names that users choose are no labels"
            assert "parts" not in text
            assert await violations(client) == {}
