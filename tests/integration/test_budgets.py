"""Budgets on real servers and agents, on a folder and on a cluster."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from mcp_control.testing.server import ServerProcess, databases_for
from tests.integration.support import (
    API,
    AgentProcess,
    admin,
    agents_online,
    enrolment,
    in_state,
    journal,
    submit,
    task,
    until,
    violations,
)


class Place:
    """Servers with one agent, and a client of the last server."""

    def __init__(self, servers: list[ServerProcess], client: httpx2.AsyncClient, folder: Path) -> None:
        self.servers = servers
        self.client = client
        self.folder = folder

    def payload(self, tokens: int, steps: int = 100_000, name: str = "journal") -> dict[str, Any]:
        """Return what makes an agent use tokens step by step."""
        return {"tokens": tokens, "steps": steps, "journal": str(self.folder / name)}

    async def budget(self, owner: str) -> dict[str, Any]:
        """Return a budget as the server shows it."""
        noun = "runs" if owner.startswith("run_") else "tasks"
        answer = await self.client.get(f"{API}/{noun}/{owner}/budget")
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def change(self, owner: str, **edit: object) -> None:
        """Change a budget."""
        noun = "runs" if owner.startswith("run_") else "tasks"
        answer = await self.client.patch(f"{API}/{noun}/{owner}/budget", json=edit)
        assert answer.status_code == 200, answer.text


@asynccontextmanager
async def place(backend: str, folder: Path, **agent: object) -> AsyncIterator[Place]:
    """Start it: a single server, or two that share databases, the agent at the first and the client at the last."""
    servers = [ServerProcess(folder / "one", node="one")]
    if backend == "cluster":
        servers.append(ServerProcess(folder / "two", node="two", **databases_for(folder / "one" / "data")))
    for server in servers:
        server.start()
    try:
        async with admin(servers[0]) as first, admin(servers[-1]) as last:
            options: dict[str, Any] = {"slots": 4, "lease": 4, **agent}
            with AgentProcess(folder, "burner", servers[0].url, await enrolment(first), **options):
                await agents_online(first, ["burner"])
                yield Place(servers, last, folder)
            assert await violations(last) == {}
    finally:
        for server in servers:
            assert server.stop() == 0


@pytest.mark.timeout(180)
async def test_a_loop_that_burns_is_stopped_within_one_report(backend: str, tmp_path: Path) -> None:
    """Tokens, of a coroutine that asks and a thread that does not listen; whoever asks before it spends ends in good order."""
    async with place(backend, tmp_path) as here:
        burning = await submit(
            here.client, "it.burn", here.payload(100), budget={"tokens": 1000, "money_micros": 10**9}
        )
        ended = await in_state(here.client, burning, "failed")
        assert (ended["reason"], ended["failure"]["cause"]) == ("budget-exhausted", "budget")
        assert ended["failure"]["data"] == {"limit": "tokens", "used": 1100, "allowed": 1000, "owner": burning}
        assert len(journal(tmp_path / "journal")) == 11
        assert ended["usage"]["money_micros"] == 22_000
        deaf = await submit(here.client, "it.deaf", here.payload(100, 200), budget={"tokens": 1000})
        assert (await in_state(here.client, deaf, "failed"))["reason"] == "budget-exhausted"
        careful = await submit(here.client, "it.careful", here.payload(300), budget={"tokens": 1000})
        done = await in_state(here.client, careful, "completed")
        assert (done["result"], done["usage"]["tokens"]) == (3, 900)
        assert await submit(here.client, "it.echo", 1)
        kinds = (
            await here.client.get(
                f"{API}/events?type=task.budget_warned&type=task.budget_exhausted",
                headers={"Accept": "application/json"},
            )
        ).json()
        told = [(event["type"], event["subject"]) for event in kinds["items"]]
        assert told.count(("task.budget_warned", burning)) == 1
        assert told.count(("task.budget_exhausted", burning)) == 1
        metrics = (await here.client.get("/metrics")).text
        assert 'mcp_control_budgets_exhausted_total{limit="tokens"} 2.0' in metrics


@pytest.mark.timeout(180)
async def test_paused_and_asking_tasks_go_on_when_their_budget_is_raised(backend: str, tmp_path: Path) -> None:
    """Both free their slot; raised, they take up again with what they used counted; refused, they fail."""
    async with place(backend, tmp_path, slots=1) as here:
        ids = {}
        for policy in ("pause", "ask", "refused"):
            budget = {"calls": 3, "on_exhausted": "pause" if policy == "pause" else "ask"}
            ids[policy] = await submit(here.client, "it.burn", here.payload(1, 5, policy), budget=budget)
            waits = await in_state(here.client, ids[policy], "input_required")
            assert (waits["reason"], waits["usage"]["calls"]) == ("budget-exhausted", 4)
        await in_state(here.client, await submit(here.client, "it.echo", 1), "completed")
        for policy in ("pause", "ask"):
            await here.change(ids[policy], add={"calls": 7})
            assert (await in_state(here.client, ids[policy], "completed"))["usage"]["calls"] == 9
        refused = await here.client.post(f"{API}/tasks/{ids['refused']}/budget/refuse")
        assert (refused.status_code, refused.json()["state"]) == (200, "failed"), refused.text


@pytest.mark.timeout(180)
async def test_time_and_depth_are_limits_too(backend: str, tmp_path: Path) -> None:
    """Seconds add up over attempts, the last one ends when they are over; no task may be deeper than its ancestors allow."""
    async with place(backend, tmp_path) as here:
        payload = {"until": str(tmp_path / "never"), "journal": str(tmp_path / "held")}
        slow = await submit(here.client, "it.hold", payload, budget={"wall_seconds": 1.5, "depth": 1}, timeout=1)
        child = await submit(here.client, "it.echo", 1, parent_id=slow)
        deeper = await here.client.post(f"{API}/tasks", json={"type": "it.echo", "parent_id": child})
        assert (deeper.status_code, deeper.json()["code"], deeper.json()["limit"]) == (409, "budget-exhausted", "depth")
        ended = await in_state(here.client, slow, "failed", 40)
        assert ended["failure"]["data"]["limit"] == "wall_seconds"
        # A late server ends the first attempt when nothing is left for a second one.
        assert [attempt["outcome"] for attempt in ended["attempts"]] in (["timeout", "budget"], ["timeout"])


@pytest.mark.timeout(180)
async def test_all_tasks_of_a_run_draw_from_one_budget(backend: str, tmp_path: Path) -> None:
    """Several tasks burn at once: together they pass the limit by one report each at most; raised, a paused run completes."""
    text = """
metadata: {name: burning}
spec:
  params: {items: {type: array}, tokens: {type: integer}, steps: {type: integer}, journal: {type: string}}
  budget: {tokens: 2000}
  stages:
  - id: all
    uses: it.burn
    fan_out: {over: params.items}
    with: {tokens: "${{ params.tokens }}", steps: "${{ params.steps }}", journal: "${{ params.journal }}"}
"""
    async with place(backend, tmp_path) as here:
        made = await here.client.post(f"{API}/pipelines", content=text, headers={"Content-Type": "application/yaml"})
        assert made.status_code == 201, made.text
        params = {"items": [1, 2, 3], **here.payload(500)}

        async def start(**request: object) -> str:
            answer = await here.client.post(f"{API}/pipelines/burning/execute", json=request)
            assert answer.status_code in (200, 201, 202), answer.text
            run: str = answer.json()["id"]
            return run

        stopped = await start(params=params)
        ended = (await here.client.get(f"{API}/runs/{stopped}?wait=60", timeout=70)).json()
        assert (ended["state"], ended["budget"]) == ("failed", {"tokens": 2000}), ended
        assert 2000 < ended["usage"]["tokens"] <= 2000 + 3 * 500

        run = await start(params={**params, "steps": 4}, budget={"tokens": 1500, "on_exhausted": "pause"})

        async def waiting() -> bool:
            found = (await here.client.get(f"{API}/runs/{run}/tasks")).json()["items"]
            return any(one["state"] == "input_required" for one in found)

        await until(waiting, 40, "a task waits for the run's budget")
        assert (await here.budget(run))["exhausted"] == "tokens"
        await here.change(run, add={"tokens": 100_000})
        ended = (await here.client.get(f"{API}/runs/{run}?wait=60", timeout=70)).json()
        assert ended["state"] == "completed", ended
        assert (await here.budget(run))["used"]["tokens"] == ended["usage"]["tokens"]


@pytest.mark.long_on_cluster
@pytest.mark.timeout(400)
async def test_what_was_acknowledged_is_counted_after_kill_9(backend: str, tmp_path: Path) -> None:
    """A server killed in the middle of it all, again and again: the total is what the steps cost, no more and no less."""
    async with place(backend, tmp_path, lease=20) as here:
        # A call that meets the dead server ends its attempt, and the next one begins anew.
        often = {"max_attempts": 20, "first_seconds": 0.1}
        burning = await submit(here.client, "it.burn", here.payload(10, 60), budget={"tokens": 10_000}, retry=often)
        seen = 0
        for _ in range(2):

            async def further(before: int = seen) -> int:
                steps = len(journal(tmp_path / "journal"))
                return steps if steps > before + 2 else 0

            seen = await until(further, 90, "more steps")
            await asyncio.to_thread(here.servers[0].kill)
            await asyncio.to_thread(here.servers[0].start)
        ended = await in_state(here.client, burning, "completed", 150)
        steps = len(journal(tmp_path / "journal"))
        assert ended["usage"]["tokens"] == steps * 10
        assert (await here.budget(burning))["used"]["tokens"] == steps * 10
        assert (await task(here.client, burning))["usage"]["calls"] == steps
