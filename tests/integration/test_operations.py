"""Many tasks at once on real processes: an operation survives kill -9, dead letters are replayed once, the silent are forced."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest

from mcp_control.testing.server import ServerProcess
from tests.integration.support import (
    API,
    AgentProcess,
    admin,
    agents_online,
    enrolment,
    in_state,
    read_store,
    submit,
    until,
    violations,
)

pytestmark = pytest.mark.usefixtures("backend")


async def _operation(client: httpx2.AsyncClient, **request: Any) -> dict[str, Any]:
    answer = await client.post(f"{API}/operations", json=request)
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def _ended(client: httpx2.AsyncClient, operation_id: str) -> dict[str, Any]:
    async def ended() -> dict[str, Any] | None:
        answer = await client.get(f"{API}/operations/{operation_id}", params={"wait": 10})
        found: dict[str, Any] = answer.json()
        return found if found.get("state") == "completed" else None

    found = await until(ended, 60, "the operation is complete")
    assert found is not None
    return found


@pytest.mark.timeout(240)
async def test_an_operation_goes_on_after_kill_9_and_counts_each_task_once(tmp_path: Path) -> None:
    """kill -9 while 2,000 tasks are being cancelled: after the restart all are cancelled, and the count is 2,000."""
    # How fast this machine is just now is not what is tested.
    server = ServerProcess(tmp_path / "server", overload__loop_lag_seconds=60).start()
    try:
        async with admin(server) as client:
            specs = [{"type": "it.nobody", "labels": {"batch": "wrong"}}] * 1000
            for _ in range(2):
                assert (await client.post(f"{API}/tasks/batch", json={"tasks": specs})).status_code == 200
            kept = await submit(client, "it.nobody")
            where = {"labels": {"batch": "wrong"}}
            shown = await client.post(f"{API}/operations", json={"verb": "cancel", "where": where, "dry_run": True})
            assert (shown.status_code, shown.json()["matched"], shown.json()["more"]) == (200, 2000, False)
            refused = await client.post(
                f"{API}/operations", json={"verb": "cancel", "where": where, "expected_at_most": 1999}
            )
            assert (refused.status_code, refused.json()["code"]) == (409, "selection-too-large")
            begun = await _operation(client, verb="cancel", where=where, expected_at_most=2000)

            async def under_way() -> bool:
                found = (await client.get(f"{API}/operations/{begun['id']}")).json()
                return bool(found["matched"])

            await until(under_way, 20, "the operation has begun")
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        async with admin(server) as client:
            found = await _ended(client, begun["id"])
            assert (found["matched"], found["changed"], found["refused"]) == (2000, 2000, 0)
            assert (await client.get(f"{API}/tasks/{kept}")).json()["state"] == "queued"
            assert await violations(client) == {}
    finally:
        assert server.stop() == 0
    stored = await read_store(tmp_path / "server" / "data")
    assert sum(one.state == "cancelled" for one in stored.tasks.values()) == 2000
    ended = [fact.fact.subject for fact in stored.facts if fact.fact.type == "task.cancelled"]
    assert len(ended) == len(set(ended)) == 2000


async def test_dead_letters_are_listed_and_replayed_once_each(tmp_path: Path) -> None:
    """Tasks that failed for good are replayed by their code, again without effect; what is paused is given to nobody."""
    with ServerProcess(tmp_path / "server") as server:
        async with admin(server) as client:
            with AgentProcess(tmp_path, "worker", server.url, await enrolment(client), slots=10):
                await agents_online(client, ["worker"])
                once = {"max_attempts": 1}
                failed = [await submit(client, "it.hold", {"wrong": True}, retry=once) for _ in range(3)]
                for task_id in failed:
                    await in_state(client, task_id, "failed")
                letters = (await client.get(f"{API}/dead-letters", params={"type": "it.hold"})).json()["items"]
                assert {one["id"] for one in letters} == set(failed)
                code = letters[0]["failure"]["code"]
                before = datetime.now(UTC).isoformat()
                assert (await client.get(f"{API}/dead-letters/{failed[0]}")).json()["payload"] == {"wrong": True}
                changed = await client.post(
                    f"{API}/dead-letters/{failed[0]}/replay",
                    json={"payload": {"until": str(tmp_path), "journal": str(tmp_path / "journal")}},
                )
                assert changed.status_code == 201, changed.text
                assert changed.json()["retry_of"] == failed[0]
                await in_state(client, changed.json()["id"], "completed")
                for changed_now in (2, 0):
                    # The replays fail as their originals did; they are later than what is meant.
                    begun = await _operation(client, verb="replay", where={"code": code, "ended_before": before})
                    found = await _ended(client, begun["id"])
                    assert (found["matched"], found["changed"]) == (changed_now, changed_now)
                waiting = await submit(client, "it.nobody")
                held = await client.post(f"{API}/tasks/{waiting}/pause", json={"reason": "later"})
                assert (held.status_code, held.json()["held"], held.json()["state"]) == (200, True, "queued")
                let_go = await client.post(f"{API}/tasks/{waiting}/resume")
                assert "held" not in let_go.json()
