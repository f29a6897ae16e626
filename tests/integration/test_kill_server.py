"""kill -9 of the server under load (reliability, fault 1): nothing acknowledged is lost, nothing is done twice."""

import asyncio
import random
import time
from functools import partial
from pathlib import Path

import httpx2
import pytest

from mcp_control.testing.server import ServerProcess
from tests.integration.support import (
    API,
    Pace,
    admin,
    agents_online,
    all_final,
    check_history,
    enrolment,
    read_store,
    say,
    started_agents,
    until,
    violations,
)

pytestmark = pytest.mark.usefixtures("backend")

RATE = {"embedded": 1000, "cluster": 200}  # a second; databases on the same machine take their share of it
BATCH = 25


class Load:
    """Clients that submit at a rate and write down what was acknowledged; what was not is sent again with the same key."""

    def __init__(self, client: httpx2.AsyncClient, rate: int) -> None:
        self._client = client
        self._rate = rate
        self.acknowledged: dict[str, str] = {}
        self.unsure: list[list[str]] = []
        self._made = 0

    async def run(self, ends: asyncio.Event) -> None:
        """Submit batches until told to end."""
        pace = Pace(self._rate / BATCH)
        sending: set[asyncio.Task[None]] = set()
        while not ends.is_set():
            keys = [f"k{self._made + number}" for number in range(BATCH)]
            self._made += BATCH
            one = asyncio.create_task(self.send(keys))
            sending.add(one)
            one.add_done_callback(sending.discard)
            await pace()
        await asyncio.gather(*sending)

    async def send(self, keys: list[str]) -> None:
        """Submit one batch."""
        tasks = [{"type": "it.echo", "payload": key, "idempotency_key": key} for key in keys]
        try:
            answer = await self._client.post(f"{API}/tasks/batch", json={"tasks": tasks})
        except httpx2.TransportError:
            self.unsure.append(keys)
            return
        if answer.status_code != 200:
            assert answer.status_code == 503, answer.text
            self.unsure.append(keys)
            return
        for key, item in zip(keys, answer.json()["items"], strict=True):
            assert self.acknowledged.setdefault(key, item["id"]) == item["id"], "one key, two ids"

    def has(self, count: int) -> bool:
        """Say whether so many were acknowledged."""
        return len(self.acknowledged) >= count

    async def settle(self) -> None:
        """Send again what was not acknowledged."""
        again, self.unsure = self.unsure, []
        for keys in again:
            await self.send(keys)


@pytest.mark.parametrize(
    "loops",
    [5, pytest.param(50, marks=[pytest.mark.long, pytest.mark.timeout(1800)])],
)
async def test_every_acknowledged_submit_survives_kill_9_under_load(loops: int, backend: str, tmp_path: Path) -> None:
    """After each kill -9 all that was acknowledged is there once and ends completed once; agents come back by themselves."""
    moments = random.Random(11)
    names = ["one", "two"]
    server = ServerProcess(tmp_path / "server", leases__drift_seconds=1.0).start()
    agents = []
    try:
        async with admin(server) as client:
            token = await enrolment(client)
            agents = started_agents(tmp_path, server.url, token, names, slots=100)
            await agents_online(client, names)
            rate_wanted = RATE[backend]
            load = Load(client, rate_wanted)
            for loop in range(loops):
                ends = asyncio.Event()
                submitting = asyncio.create_task(load.run(ends))
                before, began = len(load.acknowledged), time.monotonic()
                # The moment comes by what was acknowledged, so that a slow machine is killed under load as well.
                wanted = before + moments.randrange(1, 2 * rate_wanted)
                await until(partial(load.has, wanted), 20, "the load goes on")
                rate = (len(load.acknowledged) - before) / (time.monotonic() - began)
                await asyncio.to_thread(server.kill)
                ends.set()
                await submitting
                killed = time.monotonic()
                await asyncio.to_thread(server.start)
                answer = await client.get("/health/ready")
                assert answer.status_code == 200
                say(
                    f"loop {loop}: {len(load.acknowledged)} acknowledged ({rate:.0f}/s), {sum(map(len, load.unsure))} unsure,"
                    f" serving again after {time.monotonic() - killed:.2f} s"
                )
                await load.settle()
            assert not load.unsure
            await agents_online(client, names)
            counts = await all_final(client, 60)
            assert counts == {"completed": len(load.acknowledged)}
            assert await violations(client) == {}
        assert all(agent.alive for agent in agents)
    finally:
        for agent in agents:
            agent.kill()
        assert server.stop() == 0
    check_history(await read_store(tmp_path / "server" / "data"), load.acknowledged)
