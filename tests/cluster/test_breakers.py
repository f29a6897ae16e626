"""The breaker around Redis on a cluster: every server tells of it and of the others', and it closes by itself."""

import asyncio
from pathlib import Path
from typing import Any

import httpx2

from mcp_control.testing.databases import RedisServer
from tests.cluster.harness import running_cluster
from tests.integration.support import API, agents_online, enrolment, in_state, settled, started_agents, submit, until


async def _redis(client: httpx2.AsyncClient, state: str) -> set[str]:
    """Return the servers whose breaker around Redis has this state, as one server tells."""
    found: list[dict[str, Any]] = (await client.get(f"{API}/breakers", params={"state": state})).json()["items"]
    return {one["owner"] for one in found if (one["owner_kind"], one["name"]) == ("server", "redis")}


async def test_a_paused_redis_is_left_alone_by_all_and_everybody_can_see_it(
    mongo_uri: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    """Both breakers open, on whichever server one looks; tasks are done meanwhile; they close when Redis answers, and events tell."""
    servers = {"server-0", "server-1"}
    async with (
        running_cluster(tmp_path, mongo_uri, redis_server.url, count=2, overload__loop_lag_seconds=10) as cluster,
        cluster.direct(0) as client,
        cluster.direct(1) as other,
    ):
        await settled(client)
        cluster.agents += started_agents(tmp_path, cluster.servers[1].url, await enrolment(client), ["one"])
        await agents_online(client, ["one"])
        assert await _redis(client, "closed") == servers
        await asyncio.to_thread(redis_server.command, "CLIENT", "PAUSE", 60_000, "ALL")

        async def seen(there: httpx2.AsyncClient, state: str) -> bool:
            return await _redis(there, state) == servers

        for there in (client, other):
            await until(lambda there=there: seen(there, "open"), 20, "both are seen open")
        done = await submit(client, "it.echo", 1)
        await in_state(other, done, "completed", 10)
        text = (await client.get("/metrics")).text
        assert 'mcp_control_breakers{state="closed"} 0.0' in text
        await asyncio.to_thread(redis_server.restart)
        for there in (client, other):
            await until(lambda there=there: seen(there, "closed"), 30, "both are seen closed")

        async def told() -> bool:
            page = await client.get(
                f"{API}/events", params={"type": "breaker.*", "after": "evt_0"}, headers={"accept": "application/json"}
            )
            events = [(one["data"]["owner"], one["type"]) for one in page.json()["items"]]
            return {
                events.count((server, f"breaker.{verb}")) for server in servers for verb in ("opened", "closed")
            } == {1}

        await until(told, 10, "each server tells once that it opened and closed")
