"""Plans, versions and their deletion on real servers, on a folder and on a cluster."""

import asyncio
from pathlib import Path
from typing import Any

import httpx2
import pytest

from mcp_control.testing.server import ServerProcess, databases_for
from tests.integration.support import API, AgentProcess, admin, enrolment, submit, until, violations

YAML = {"Content-Type": "application/yaml"}
TEXT = """
metadata: {name: planned}
spec:
  params: {days: {type: array}}
  stages:
  - {id: first, uses: it.echo}
  - {id: each, uses: it.echo, needs: [first], fan_out: {over: params.days}}
"""


async def _plan(client: httpx2.AsyncClient) -> dict[str, Any]:
    answer = await client.post(f"{API}/pipelines/plan", json={"definition": TEXT, "params": {"days": [1, 2, 3]}})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.timeout(180)
async def test_plans_follow_agents_and_history_and_what_is_used_stays(backend: str, tmp_path: Path) -> None:
    """Whichever server is asked: routable once the agent is there, known once it worked; a version goes only when its run ended."""
    servers = [ServerProcess(tmp_path / "one", node="one")]
    if backend == "cluster":
        servers.append(ServerProcess(tmp_path / "two", node="two", **databases_for(tmp_path / "one" / "data")))
    for server in servers:
        server.start()
    last = servers[-1]
    try:
        async with admin(servers[0]) as first, admin(last) as other:
            for text in (TEXT, TEXT.replace("id: first,", "id: first, priority: 60,")):
                made = await first.post(f"{API}/pipelines", content=text, headers=YAML)
                assert made.status_code == 201, made.text
            plan = await _plan(other)
            assert (plan["routable"], plan["known"], plan["p50"]) == (False, False, None)
            run = (
                await first.post(f"{API}/pipelines/planned/execute", json={"params": {"days": [1]}, "version": 1})
            ).json()
            refused = await other.delete(f"{API}/pipelines/planned?version=1")
            assert (refused.status_code, refused.json()["runs"]) == (409, [run["id"]]), refused.text

            with AgentProcess(tmp_path, "worker", servers[0].url, await enrolment(first), slots=2):
                ended = (await first.get(f"{API}/runs/{run['id']}?wait=20", timeout=30)).json()
                assert (ended["state"], ended["pipeline_version"]) == ("completed", 1)
                for _ in range(5):
                    await submit(first, "it.echo", 1)

                async def known() -> bool:
                    found = await _plan(other)
                    return bool(found["known"] and found["routable"] and found["expected_finish"])

                await until(known, 30, "a history")
                plan = await _plan(other)
                assert plan["critical_path"] == ["first", "each"]
                assert [stage["agents"] for stage in plan["stages"]] == [["worker"]] * 2
                assert plan["stages"][1]["tasks"] == 3
                assert plan["p50"] == pytest.approx(3 * plan["stages"][0]["p50"], abs=0.001), (
                    "one, then two waves of three"
                )
            assert (await other.delete(f"{API}/pipelines/planned?version=1")).status_code == 204
            assert (await first.get(f"{API}/runs/{run['id']}")).json()["stages"][0]["uses"] == "it.echo"
            assert (await first.get(f"{API}/pipelines/planned?version=1")).status_code == 404
            await asyncio.to_thread(servers[0].kill)
            await asyncio.to_thread(servers[0].start)
            listed = await other.get(f"{API}/tasks/statistics")
            assert [one["type"] for one in listed.json()["items"]] == ["it.echo"]
        async with admin(servers[0]) as again:
            assert await violations(again) == {}
    finally:
        for server in servers:
            assert server.stop() == 0
