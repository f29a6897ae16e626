"""Schedules on real servers that are killed: every slot fires, and once."""

import asyncio
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest

from mcp_control.testing.server import ServerProcess, databases_for
from tests.integration.pipelines import parts_pipeline
from tests.integration.support import API, admin, read_store, until, violations

JSON = {"Content-Type": "application/json"}


async def _fires(client: httpx2.AsyncClient, name: str) -> list[dict[str, Any]]:
    answer = await client.get(f"{API}/schedules/{name}/fires", params={"limit": 500})
    assert answer.status_code == 200, answer.text
    items: list[dict[str, Any]] = answer.json()["items"]
    return items[::-1]


async def _all(client: httpx2.AsyncClient, noun: str) -> list[dict[str, Any]]:
    answer = await client.get(f"{API}/{noun}", params={"limit": 500})
    assert answer.status_code == 200, answer.text
    items: list[dict[str, Any]] = answer.json()["items"]
    return items


@pytest.mark.timeout(240)
async def test_every_slot_fires_once_though_servers_are_killed(backend: str, tmp_path: Path) -> None:
    """kill -9 in the middle of firing, again and again: with `catch_up: all` no slot is missing and none fired twice."""
    servers = [ServerProcess(tmp_path / "one", node="one")]
    if backend == "cluster":
        there = databases_for(tmp_path / "one" / "data")
        servers.append(ServerProcess(tmp_path / "two", node="two", **there))
    for server in servers:
        server.start()
    every = {"every": 1, "overlap": "allow", "catch_up": "all"}
    try:
        async with admin(servers[0]) as client:
            made = await client.post(f"{API}/pipelines", content=msgspec.json.encode(parts_pipeline()), headers=JSON)
            assert made.status_code == 201, made.text
            params = {"seed": "${{ run.slot }}", "parts": 2}
            for spec in (
                {"name": "tasks", "task": {"type": "it.nobody", "payload": "${{ run.slot }}"}, **every},
                {"name": "runs", "run": {"pipeline": "parts", "params": params}, **every},
            ):
                answer = await client.post(f"{API}/schedules", json=spec)
                assert answer.status_code == 201, answer.text
        for count in (2, 5):
            for server in servers:
                # The other server, where there is one, takes over meanwhile.
                await asyncio.to_thread(server.kill)
                await asyncio.to_thread(server.start)

            async def enough(count: int = count) -> bool:
                async with admin(servers[0]) as client:
                    return len(await _fires(client, "runs")) >= count

            await until(enough, 60, f"{count} fires")
        async with admin(servers[0]) as client:
            for name in ("tasks", "runs"):
                assert (await client.post(f"{API}/schedules/{name}/pause")).status_code == 200
            for name, noun in (("tasks", "tasks"), ("runs", "runs")):
                fires = await _fires(client, name)
                assert {fire["outcome"] for fire in fires} == {"started"}
                slots = [datetime.fromisoformat(fire["slot"]) for fire in fires]
                assert slots == [slots[0] + timedelta(seconds=place) for place in range(len(slots))]
                things = [one for one in await _all(client, noun) if one.get("labels", {}).get("schedule") == name]
                assert sorted(one["id"] for one in things) == sorted(fire["target"] for fire in fires)
            assert await violations(client) == {}
    finally:
        for server in servers:
            assert server.stop() == 0
    found = await read_store(tmp_path / "one" / "data")
    fired = [stored.fact for stored in found.facts if stored.fact.type == "schedule.fired"]
    told = [(fact.subject, msgspec.json.decode(fact.data)["slot"]) for fact in fired]
    assert len(told) == len(set(told))


@pytest.mark.usefixtures("backend")
async def test_a_finished_schedule_is_removed_after_its_time(tmp_path: Path) -> None:
    """One that fired its single moment goes with its history, and what it started stays."""
    second = 1 / 86_400
    with ServerProcess(
        tmp_path / "server", retention__runs_days=second, retention__tasks_days=30, retention__interval_seconds=0.2
    ) as server:
        async with admin(server) as client:
            spec = {"name": "once", "every": 1, "task": {"type": "it.nobody"}}
            shown = (await client.post(f"{API}/schedules", params={"dry_run": True}, json=spec)).json()
            at = shown["next"][0]["slot"]
            made = await client.post(f"{API}/schedules", json={"name": "once", "at": at, "task": {"type": "it.nobody"}})
            assert made.status_code == 201, made.text

            async def gone() -> bool:
                return (await client.get(f"{API}/schedules/once")).status_code == 404

            await until(gone, 20, "the schedule is removed")
            assert [one["labels"] for one in await _all(client, "tasks")] == [{"schedule": "once"}]
