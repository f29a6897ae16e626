"""Groups on real processes: kill -9 between the end of the last member and the callback loses nothing and doubles nothing."""

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest

from mcp_control.testing.server import ServerProcess
from tests.integration.support import API, AgentProcess, admin, agents_online, enrolment, read_store, until, violations

pytestmark = pytest.mark.usefixtures("backend")
MEMBERS = 20


async def _group(client: httpx2.AsyncClient, group_id: str, **params: Any) -> dict[str, Any]:
    answer = await client.get(f"{API}/groups/{group_id}", params=params)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def _ended(client: httpx2.AsyncClient, group_id: str) -> dict[str, Any]:
    async def ended() -> dict[str, Any] | None:
        found = await _group(client, group_id, wait=5)
        return found if "finished_at" in found else None

    found = await until(ended, 60, "the group has ended")
    assert found is not None
    return found


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.long)])
@pytest.mark.timeout(300)
async def test_kill_9_after_the_last_member_ended_makes_the_callback_once(tmp_path: Path, kills: int) -> None:
    """All members have ended, the server is killed before it may have looked: after the restart there is one callback of each kind."""
    server = ServerProcess(tmp_path / "server").start()
    made: list[str] = []
    try:
        async with admin(server) as client:
            token = await enrolment(client)
        with AgentProcess(tmp_path, "worker", server.url, token, slots=MEMBERS):
            for number in range(kills):
                gate, journal = tmp_path / f"gate-{number}", tmp_path / f"journal-{number}"
                async with admin(server) as client:
                    await agents_online(client, ["worker"])
                    held = {"type": "it.hold", "payload": {"until": str(gate), "journal": str(journal)}}
                    callbacks = {event: {"type": "it.echo", "payload": number} for event in ("completed", "ended")}
                    answer = await client.post(
                        f"{API}/groups", json={"tasks": [held] * MEMBERS, "on": callbacks, "name": "held"}
                    )
                    assert answer.status_code == 201, answer.text
                    made.append(answer.json()["id"])
                    await until(partial(_ran, journal, MEMBERS), 30, "all members run")
                    gate.touch()

                    async def over() -> bool:
                        return bool((await _group(client, made[-1]))["done"] == MEMBERS)

                    await until(over, 30, "all members have ended")
                await asyncio.to_thread(server.kill)
                await asyncio.to_thread(server.start)
            async with admin(server) as client:
                for group_id in made:
                    ended = await _ended(client, group_id)
                    assert (ended["state"], ended["counts"]) == ("completed", {"completed": MEMBERS})
                    for task_id in ended["callbacks"].values():
                        called = (await client.get(f"{API}/tasks/{task_id}", params={"wait": 30})).json()
                        assert called["state"] == "completed"
                        assert called["result"]["group"]["counts"] == {"completed": MEMBERS}
                assert await violations(client) == {}
    finally:
        assert server.stop() == 0
    stored = await read_store(tmp_path / "server" / "data")
    for group_id in made:
        called = [task for task in stored.tasks.values() if task.links.references == [group_id]]
        assert len(called) == 2
        ends = [
            each.fact for each in stored.facts if each.fact.subject == group_id and each.fact.type == "group.completed"
        ]
        assert len(ends) == 1


def _ran(journal: Path, count: int) -> bool:
    return _lines(journal) == count


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0
