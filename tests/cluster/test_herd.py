"""Every agent reconnects at the same moment, after a server was started again (fault matrix, row 23)."""

import asyncio
import random
import time
from pathlib import Path

import pytest
import websockets

from mcp_control.testing.databases import RedisServer
from tests.cluster.harness import Cluster, running_cluster
from tests.cluster.peer import Peer, Socket
from tests.integration.support import API, enrolment, say, until

REGISTER_SECONDS = 5.0
BUSY = 2  # a machine that runs the agents, the databases and other tests beside the server
HALF = 20  # agents for which there is room
SPREAD_SECONDS = 1.0  # what the SDK spreads its first try over


class Herd:
    """Agents that connect, and connect again whenever they are refused or cut off, as the SDK does.

    Attributes:
        refused: statuses other than success.
        waits: seconds from the first try to the welcome, of the last time.
    """

    def __init__(self, cluster: Cluster, peers: list[Peer]) -> None:
        self._cluster = cluster
        self._peers = peers
        self._chance = random.Random(3)
        self.sockets: list[Socket] = []
        self.refused: list[int] = []
        self.patience: list[bool] = []
        self.waits: list[float] = []

    async def connect(self) -> None:
        """Connect all of them at once."""
        self.waits, self.sockets = [], []
        await asyncio.gather(*[self._one(peer) for peer in self._peers])

    async def _one(self, peer: Peer) -> None:
        await asyncio.sleep(self._chance.uniform(0, SPREAD_SECONDS))
        began = time.monotonic()
        while True:
            try:
                socket = await Socket.opened(peer, self._cluster.servers[0].url)
            except websockets.InvalidStatus as refusal:
                self.refused.append(refusal.response.status_code)
                self.patience.append("retry-after" in refusal.response.headers)
                await asyncio.sleep(
                    float(refusal.response.headers.get("retry-after", 1)) * self._chance.uniform(0.5, 1)
                )
            else:
                self.waits.append(time.monotonic() - began)
                self.sockets.append(socket)
                return

    async def close(self) -> None:
        """Hang up."""
        await asyncio.gather(*[socket.close() for socket in self.sockets])


@pytest.mark.parametrize("count", [100, pytest.param(500, marks=[pytest.mark.long])])
async def test_a_herd_of_agents_is_back_within_seconds(
    count: int, mongo_uri: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    """p99 of registering again is at most 5 s, refusals are 429 or 503 and say when to come back, and every agent keeps its instance."""
    async with (
        running_cluster(tmp_path, mongo_uri, redis_server.url, count=1) as cluster,
        cluster.direct(0, timeout=60) as client,
    ):
        token = await enrolment(client, count)
        peers: list[Peer] = []
        for first in range(0, count, 5):
            numbers = range(first, min(first + 5, count))
            peers += await asyncio.gather(
                *[Peer.registered(client, f"peer{number}", "it.work", token=token) for number in numbers]
            )
        herd = Herd(cluster, peers)
        await herd.connect()
        before = {peer.instance_id for peer in peers}
        herd.refused.clear()
        await cluster.kill(0)
        await herd.close()
        await cluster.restart(0)
        await herd.connect()
        waits = sorted(herd.waits)
        say(
            f"{count} agents: p50 {waits[len(waits) // 2]:.2f} s, p99 {waits[int(len(waits) * 0.99)]:.2f} s, refused {len(herd.refused)}"
        )
        assert waits[int(len(waits) * 0.99)] <= REGISTER_SECONDS * BUSY
        assert set(herd.refused) <= {429, 503}
        assert all(herd.patience)
        assert {peer.instance_id for peer in peers} == before
        assert len(before) == count

        async def online() -> bool:
            return (await client.get(f"{API}/status")).json()["agents"] == {"online": count}

        await until(online, 10, "all of them are online")
        await herd.close()


@pytest.mark.long
async def test_control_a_herd_that_does_not_fit_is_noticed(
    mongo_uri: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    """Where there is room for half of them, the others are told when to come again, are late, and are in once there is room."""
    async with (
        running_cluster(tmp_path, mongo_uri, redis_server.url, count=1, overload__max_connections=HALF) as cluster,
        cluster.direct(0, timeout=60) as client,
    ):
        token = await enrolment(client, 2 * HALF)
        peers = [await Peer.registered(client, f"peer{number}", "it.work", token=token) for number in range(2 * HALF)]
        herd = Herd(cluster, peers)
        coming = asyncio.create_task(herd.connect())
        await asyncio.wait([coming], timeout=REGISTER_SECONDS + SPREAD_SECONDS)
        assert not coming.done()
        assert len(herd.waits) == HALF
        assert set(herd.refused) == {503}
        assert all(herd.patience)
        assert len(herd.refused) < 4 * HALF, "they come back after the time that was said, and not before"
        for socket in [*herd.sockets]:
            await socket.close()
        await coming
        assert sorted(herd.waits)[int(len(herd.waits) * 0.99)] > REGISTER_SECONDS
        await herd.close()
