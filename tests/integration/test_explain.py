"""Explanations on real processes: tasks, stages and runs name what they wait for, and stop doing so when it is gone."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from mcp_control.testing.server import ServerProcess
from tests.integration.support import API, AgentProcess, admin, agents_online, enrolment, submit, until

pytestmark = pytest.mark.usefixtures("backend")
YAML = {"Content-Type": "application/yaml"}
PIPELINE = """
metadata: {name: explained}
spec:
  stages:
  - {id: first, uses: it.echo, with: {a: 1}}
  - {id: second, uses: it.echo, needs: [first], with: {a: 2}}
"""


async def test_a_run_and_its_stages_say_what_they_wait_for(tmp_path: Path) -> None:
    """No agent, then a full one, then none of it: the run, its stages and its task give the same first reason each time."""
    with ServerProcess(tmp_path / "server") as server:
        async with admin(server) as client:
            token = await enrolment(client)
            answer = await client.post(f"{API}/pipelines", content=PIPELINE, headers=YAML)
            assert answer.status_code == 201, answer.text

            async def told(run: str, stage: str = "") -> dict[str, Any]:
                path = f"{API}/runs/{run}/stages/{stage}/explain" if stage else f"{API}/runs/{run}/explain"
                answer = await client.get(path)
                assert answer.status_code == 200, answer.text
                found: dict[str, Any] = answer.json()
                return found

            answer = await client.post(f"{API}/pipelines/explained/execute", json={})
            assert answer.status_code in (200, 201, 202), answer.text
            run = answer.json()["id"]
            found = await told(run)
            assert (found["code"], [stage["code"] for stage in found["stages"]]) == (
                "no-capable-agent",
                ["no-capable-agent", "needs-not-done"],
            )
            assert (await told(run, "second"))["held_by"] == ["first"]
            hold = {"until": str(tmp_path / "end"), "journal": str(tmp_path / "journal")}
            holder = await submit(client, "it.hold", hold, priority=90)
            with AgentProcess(tmp_path, "worker", server.url, token, slots=1):
                await agents_online(client, ["worker"])

                async def full() -> bool:
                    found = await told(run)
                    return (found["code"], found.get("held_by")) == ("agents-full", [holder])

                await until(full, 20, "the run waits for the task that holds the only slot")
                stage = await told(run, "first")
                assert (stage["code"], stage["held_by"]) == ("agents-full", [holder])
                assert stage["task"]["code"] == "agents-full"
                await asyncio.to_thread(Path(hold["until"]).touch)

                async def ended() -> bool:
                    return (await told(run))["code"] == "finished"

                await until(ended, 20, "the run has ended")
            assert (await client.get(f"{API}/runs/{run}/stages/none/explain")).status_code == 404


async def test_a_batch_says_of_each_task_whether_anybody_can_take_it(tmp_path: Path) -> None:
    """Unroutable work is accepted with a warning or refused, task by task, as each of them asked."""
    with ServerProcess(tmp_path / "server") as server:
        async with admin(server) as client:
            with AgentProcess(tmp_path, "worker", server.url, await enrolment(client), slots=1):
                await agents_online(client, ["worker"])
                tasks = [
                    {"type": "it.echo"},
                    {"type": "nobody.can"},
                    {"type": "nobody.can", "on_unroutable": "reject"},
                    {"type": "it.echo", "needs": {"labels": {"zone": "mars"}}, "on_unroutable": "reject"},
                ]
                answer = await client.post(f"{API}/tasks/batch", json={"tasks": tasks})
                assert answer.status_code == 200, answer.text
                plain, warned, refused, elsewhere = answer.json()["items"]
                assert "warnings" not in plain
                assert "nobody.can" in warned["warnings"][0]
                assert [item["problem"]["code"] for item in (refused, elsewhere)] == ["unroutable", "unroutable"]
                one = await client.post(f"{API}/tasks", json={"type": "nobody.can"})
                assert one.json()["warnings"] == warned["warnings"]
