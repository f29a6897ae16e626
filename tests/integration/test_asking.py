"""Handlers that ask people, on real servers that are killed while the questions are open."""

import asyncio
from pathlib import Path
from typing import Any

import httpx2
import pytest

from mcp_control.testing.server import ServerProcess, databases_for
from tests.integration.support import API, AgentProcess, admin, agents_online, enrolment, read_store, until, violations


async def _pending(client: httpx2.AsyncClient, count: int) -> list[dict[str, Any]]:
    async def there() -> list[dict[str, Any]] | None:
        answer = await client.get(f"{API}/approvals", params={"state": "pending"})
        assert answer.status_code == 200, answer.text
        items: list[dict[str, Any]] = answer.json()["items"]
        return items if len(items) == count else None

    found = await until(there, 30, f"{count} questions wait")
    assert found is not None
    return found


@pytest.mark.timeout(240)
async def test_a_task_waits_for_a_person_over_the_death_of_its_server(backend: str, tmp_path: Path) -> None:
    """kill -9 while questions are open: they stay open, the only slot is free, of many answers one wins, and the handlers get it."""
    servers = [ServerProcess(tmp_path / "one", node="one")]
    if backend == "cluster":
        servers.append(ServerProcess(tmp_path / "two", node="two", **databases_for(tmp_path / "one" / "data")))
    for server in servers:
        server.start()
    journal = tmp_path / "journal"
    try:
        async with admin(servers[0]) as client:
            token = await enrolment(client)
        with AgentProcess(tmp_path, "worker", servers[-1].url, token, slots=1, lease=3):
            async with admin(servers[0]) as client:
                await agents_online(client, ["worker"])
                ids = []
                for kind in ("it.ask", "it.ask_sync", "it.ask"):
                    spec = {"type": kind, "payload": {"journal": str(journal)}, "retry": {"max_attempts": 1}}
                    answer = await client.post(f"{API}/tasks", json=spec)
                    assert answer.status_code == 201, answer.text
                    ids.append(answer.json()["id"])
                asked = {one["task_id"]: one for one in await _pending(client, 3)}
                assert sorted(asked) == sorted(ids)
            for server in servers:
                await asyncio.to_thread(server.kill)
                await asyncio.to_thread(server.start)
            async with admin(servers[0]) as first, admin(servers[-1]) as last:
                assert {one["id"] for one in await _pending(first, 3)} == {one["id"] for one in asked.values()}
                explained = (await last.get(f"{API}/tasks/{ids[0]}/explain")).json()
                assert (explained["code"], explained["state"]) == ("input-required", "input_required")
                assert asked[ids[0]]["id"] in explained["message"]
                withdrawn = await last.post(f"{API}/tasks/{ids[2]}/cancel", json={})
                assert withdrawn.status_code == 200, withdrawn.text
                for task_id in ids[:2]:
                    path = f"{API}/approvals/{asked[task_id]['id']}/answer"
                    headers = {"If-Match": f'"{asked[task_id]["etag"]}"'}
                    wrong = await first.post(path, json={"option": "maybe"}, headers=headers)
                    assert (wrong.status_code, wrong.json()["errors"][0]["pointer"]) == (422, "#/option")
                    answers = await asyncio.gather(
                        *(door.post(path, json={"option": "yes"}, headers=headers) for door in (first, last) * 4)
                    )
                    codes = [answer.status_code for answer in answers]
                    assert codes.count(200) == 1
                    assert set(codes) <= {200, 409, 412}
                    ended = (await last.get(f"{API}/tasks/{task_id}", params={"wait": 30})).json()
                    assert (ended["state"], ended["result"]["option"]) == ("completed", "yes")
                    assert ended["result"]["by"].startswith("user_")
                    assert [one["outcome"] for one in ended["attempts"]] == ["asked", "completed"]
                late = f"{API}/approvals/{asked[ids[2]]['id']}"
                assert (await first.get(late)).json()["state"] == "withdrawn"
                assert await violations(first) == {}

                async def told_of_all() -> bool:
                    page = await first.get(f"{API}/events", params={"type": "approval.*", "limit": 100})
                    return page.status_code == 200 and len(page.json()["items"]) >= 6

                # On a shared store events get their order soon after the commit, by the server that leads.
                await until(told_of_all, 30, "all events of the questions")
    finally:
        for server in servers:
            assert server.stop() == 0
    assert sorted(line.split()[0] for line in journal.read_text().splitlines()) == sorted([*ids, *ids[:2]])
    facts = [one.fact for one in (await read_store(tmp_path / "one" / "data")).facts]
    told = [fact.type for fact in facts if fact.type.startswith("approval.")]
    assert sorted(told) == ["approval.answered"] * 2 + ["approval.requested"] * 3 + ["approval.withdrawn"]
