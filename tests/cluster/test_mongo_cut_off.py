"""One server loses its way to the database while the others keep theirs (fault matrix, row 12)."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from mcp_control.testing.databases import MongoSet
from mcp_control.testing.server import ServerProcess
from tests.cluster.harness import port_of
from tests.cluster.relay import Balancer, Door, Island, Relay, door
from tests.integration.support import (
    API,
    AgentProcess,
    admin,
    agents_online,
    enrolment,
    in_state,
    journal,
    say,
    submit,
    until,
)

NOT_READY_SECONDS = 5.0 + 1.0
CLOSED_SECONDS = 6.0 + 2.0  # found by the next look, a second later


class Islander:
    """A server in a network of its own, to which its databases are relayed; `cut` makes packets to the replica set vanish."""

    def __init__(self, folder: Path, mongo_set: MongoSet, mongo_uri: str, **settings: object) -> None:
        self._island = Island()
        self._links = [Relay(door(port)) for port in mongo_set.ports]
        self._ports = mongo_set.ports
        self.server = ServerProcess(folder, mongo__uri=mongo_uri, **settings)
        self.door: Door = self._island.door(lambda: port_of(self.server.url))
        self.front = Relay(self.door)  # for who wants this server and no other

    async def start(self) -> None:
        for link, port in zip(self._links, self._ports, strict=True):
            await link.start(self._island.listener(port))
        await asyncio.to_thread(self._island.run, self.server.start)
        await self.front.start()

    def cut(self) -> None:
        for link in self._links:
            link.freeze()

    def join(self) -> None:
        for link in self._links:
            link.thaw()

    async def close(self) -> None:
        await self.front.close()
        for link in self._links:
            link.thaw()
        code = await asyncio.to_thread(self.server.stop)
        for link in self._links:
            await link.close()
        self._island.close()
        assert code == 0


@asynccontextmanager
async def _two(
    folder: Path, mongo_set: MongoSet, mongo_uri: str, **settings: object
) -> AsyncIterator[tuple[Islander, ServerProcess, Balancer]]:
    """A server that can be cut off, another one, and a balancer in front of both."""
    islander = Islander(folder / "island", mongo_set, mongo_uri, node="island", **settings)
    other = ServerProcess(folder / "other", mongo__uri=mongo_uri, node="other", **settings)

    async def to_other() -> socket.socket:
        return await door(port_of(other.url))()

    balancer = Balancer(islander.door, to_other)
    try:
        await asyncio.to_thread(other.start)
        await islander.start()
        yield islander, other, await balancer.start()
    finally:
        await balancer.close()
        await islander.close()
        assert await asyncio.to_thread(other.stop) == 0


async def _closed(url: str, headers: dict[str, str], opened: asyncio.Event) -> tuple[int, float]:
    """Keep a socket open; return the close code and when it came."""
    async with connect(f"ws{url.removeprefix('http')}/ws", additional_headers=headers) as events:
        opened.set()
        try:
            while True:
                await events.recv()
        except ConnectionClosed as closed:
            return closed.rcvd.code if closed.rcvd else 0, time.monotonic()


async def _ready(client: httpx2.AsyncClient) -> bool:
    return (await client.get("/health/ready")).status_code == 200


async def test_a_server_that_is_cut_off_steps_back_and_its_agents_go_on_elsewhere(
    mongo_set: MongoSet, mongo_uri: str, tmp_path: Path
) -> None:
    """It is not ready within 5 s, answers 503, closes its sockets with 1013; agents keep their leases at the other, which has no errors."""
    written, gate = tmp_path / "journal", tmp_path / "gate"
    agents: list[AgentProcess] = []
    async with _two(tmp_path, mongo_set, mongo_uri) as (islander, other, balancer):
        headers = other.headers
        cut_off = httpx2.AsyncClient(base_url=islander.front.url, headers=headers, timeout=10.0)
        try:
            async with cut_off, admin(other) as client:
                token = await enrolment(client)
                balancer.aside = {1}  # the agent connects to the one that will be cut off
                agents.append(AgentProcess(tmp_path, "one", balancer.url, token, slots=2, lease=30).start())
                await agents_online(client, ["one"])
                assert "mcp_control_sessions 1.0" in (await cut_off.get("/metrics")).text
                balancer.aside = set()
                held = await submit(client, "it.hold", {"until": str(gate), "journal": str(written)})
                before = await in_state(client, held, "running")
                opened = asyncio.Event()
                following = asyncio.create_task(_closed(islander.front.url, headers, opened))
                await opened.wait()
                assert await _ready(cut_off)
                errors: list[tuple[float, int]] = []
                islander.cut()
                cut_at = time.monotonic()

                async def not_ready() -> bool:
                    answer = await client.post(f"{API}/tasks", json={"type": "it.none"})
                    if answer.status_code >= 500:
                        errors.append((time.monotonic() - cut_at, answer.status_code))
                    return not await _ready(cut_off)

                await until(not_ready, 20, "not ready")
                not_ready_after = time.monotonic() - cut_at
                refused = await cut_off.post(f"{API}/tasks", json={"type": "it.none"})
                code, closed_at = await asyncio.wait_for(following, 20)
                say(
                    f"not ready after {not_ready_after:.1f} s, sockets closed after {closed_at - cut_at:.1f} s, errors elsewhere {errors}"
                )
                assert refused.status_code == 503, refused.text
                assert code == 1013
                assert not [after for after, _ in errors if after > 5.0]
                # A task for the other slot shows that the agent is served; the one it holds is still its own, in its first attempt.
                second = await submit(client, "it.hold", {"until": "/", "journal": str(written)})
                await in_state(client, second, "completed", 30)
                gate.touch()
                done = await in_state(client, held, "completed", 30)
                assert (done["attempt"], done["fence"]) == (1, before["fence"])
                assert not [line for line in journal(written) if line.split()[1] != "1"]
                assert not_ready_after <= NOT_READY_SECONDS
                assert closed_at - cut_at <= CLOSED_SECONDS
                islander.join()
                await until(lambda: _ready(cut_off), 15, "ready again")
                submitted = await cut_off.post(f"{API}/tasks", json={"type": "it.none"})
                assert submitted.status_code == 201, submitted.text
        finally:
            for agent in agents:
                agent.kill()


@pytest.mark.long
async def test_control_a_server_that_seldom_looks_for_its_store_stays_open(
    mongo_set: MongoSet, mongo_uri: str, tmp_path: Path
) -> None:
    """The control: with a term of a minute instead of five seconds the same cut closes nothing, so above it is the product that does."""
    async with (
        _two(tmp_path, mongo_set, mongo_uri, cluster__leader_seconds=60.0) as (islander, other, _),
        httpx2.AsyncClient(base_url=islander.front.url, headers=other.headers, timeout=10.0) as client,
    ):
        opened = asyncio.Event()
        following = asyncio.create_task(_closed(islander.front.url, other.headers, opened))
        await opened.wait()
        assert await _ready(client)
        islander.cut()
        await asyncio.sleep(CLOSED_SECONDS)
        assert not following.done()
        islander.join()
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
