"""Servers killed one after the other under load, Redis emptied, primaries changed: nothing acknowledged is lost or done twice."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from mcp_control.testing.databases import MongoSet, RedisServer
from tests.cluster.harness import Cluster, Follower, Submits, ended, read_tasks, running_cluster
from tests.cluster.history import History, check
from tests.integration.support import journal, say, violations


class Disaster:
    """Kills servers and starts them again, and does other things at their moments; one server always runs.

    Args:
        every: seconds between two kills.
        others: what else happens, by share of the whole time.
    """

    def __init__(self, cluster: Cluster, every: float, others: list[tuple[float, Callable[[], object]]]) -> None:
        self._cluster = cluster
        self._every = every
        self._others = others
        self._moments = random.Random(7)
        self._running = [*range(len(cluster.servers))]
        self.kills = 0
        self.longest_start = 0.0

    async def strike(self, seconds: float) -> None:
        """Go on for so long; all servers run again when this returns."""
        ends_at = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            for share, harm in self._others:
                group.create_task(self._later(share * seconds, harm))
            while time.monotonic() < ends_at:
                await asyncio.sleep(self._every * self._moments.uniform(0.5, 1.5))
                if len(self._running) >= 2:  # two of three may be away at once, on a machine where a start takes long
                    place = self._running.pop(self._moments.randrange(len(self._running)))
                    await self._cluster.kill(place)
                    self.kills += 1
                    group.create_task(self._restart(place))

    async def _later(self, seconds: float, harm: Callable[[], object]) -> None:
        await asyncio.sleep(seconds)
        await asyncio.to_thread(harm)

    async def _restart(self, place: int) -> None:
        began = time.monotonic()
        await self._cluster.restart(place)
        self.longest_start = max(self.longest_start, time.monotonic() - began)
        self._running.append(place)


class Gates:
    """Files for which tasks wait: one comes every second, so that a task is in hand for a second or so."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0

    def next(self) -> str:
        """Return the file after the one that comes next."""
        return str(self._folder / f"gate-{self._number + 1}")

    async def run(self, ends: asyncio.Event) -> None:
        """Open one after the other until told to end, and then all that were named."""
        while not ends.is_set():
            (self._folder / f"gate-{self._number}").touch()
            self._number += 1
            with suppress(TimeoutError):
                await asyncio.wait_for(ends.wait(), 1.0)
        for number in (self._number, self._number + 1):
            (self._folder / f"gate-{number}").touch()


@pytest.mark.parametrize(
    ("seconds", "every", "rate"),
    [
        pytest.param(12.0, 3.0, 20.0, id="short"),
        pytest.param(180.0, 6.0, 25.0, id="long", marks=[pytest.mark.long, pytest.mark.timeout(900)]),
    ],
)
async def test_nothing_acknowledged_is_lost_or_done_twice_while_servers_die(
    seconds: float,
    every: float,
    rate: float,
    mongo_set: MongoSet,
    mongo_uri: str,
    redis_server: RedisServer,
    tmp_path: Path,
) -> None:
    """I1 to I9 hold after kill -9 of servers every few seconds, two empty starts of Redis and two changes of the primary."""
    history = History()
    written = tmp_path / "journal"
    gates = Gates(tmp_path)

    def work() -> dict[str, object]:
        return {"type": "it.hold", "payload": {"until": gates.next(), "journal": str(written)}}

    async with running_cluster(tmp_path, mongo_uri, redis_server.url) as cluster, cluster.client() as client:
        await cluster.work(["one", "two", "three", "four"], slots=16, lease=10)
        follower = await Follower(history).start(client)
        submits = Submits(history, rate, work)
        disaster = Disaster(
            cluster,
            every,
            [
                (0.15, redis_server.restart),
                (0.35, mongo_set.step_down),
                (0.6, redis_server.restart),
                (0.8, mongo_set.step_down),
            ],
        )
        ends = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(gates.run(ends))
            group.create_task(submits.run(client, ends))
            await disaster.strike(seconds)
            ends.set()
        settled = time.monotonic()
        await ended(client, 90)
        settled = time.monotonic() - settled
        await follower.caught_up(client)
        await follower.stop()
        await read_tasks(client, history)
        for place in range(len(cluster.servers)):
            async with cluster.direct(place) as direct:
                assert await violations(direct) == {}
        history.journal(journal(written))
        attempts = Counter(reads[-1].get("attempt", 0) for reads in history.reads.values())
        say(
            f"{submits.made} submitted, {len(history.acknowledged)} acknowledged, repeated {submits.refused}; "
            f"{disaster.kills} kills, a start took up to {disaster.longest_start:.1f} s; "
            f"{len(history.events)} events, {follower.breaks} breaks of their stream; "
            f"longest wait for an acknowledgement {submits.longest:.1f} s; all had ended {settled:.1f} s after the last; "
            f"attempts {dict(attempts)}"
        )
        check(history)
        assert {reads[-1]["state"] for reads in history.reads.values()} == {"completed"}
        assert len(history.reads) == submits.made
        assert all(agent.alive for agent in cluster.agents)
