"""What the cluster is measured on: servers and agents as processes, a MongoDB replica set of three and Redis, all on this machine."""

import asyncio
import contextlib
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pymongo

from bench.http import connections
from bench.stand import Stand, cpu_seconds, own_cpu
from mcp_control.testing.databases import MongoSet, RedisServer
from mcp_control.testing.server import ServerProcess

_READY_SECONDS: Final = 900.0  # a million waiting tasks are read into Redis first
SIDES: Final = ("servers", "primary", "secondaries", "redis", "agents", "client")


@dataclass
class Databases:
    """The databases of all measurements."""

    mongo: MongoSet
    redis: RedisServer


@contextlib.contextmanager
def databases() -> Iterator[Databases]:
    """Run a replica set of three and a Redis server; their data is gone at the end."""
    with tempfile.TemporaryDirectory(prefix="mcp-bench-") as name:
        folder = Path(name)
        with MongoSet(folder / "mongo") as mongo, RedisServer(folder / "redis") as redis:
            yield Databases(mongo, redis)


@contextlib.contextmanager
def one_member(there: Databases) -> Iterator[Databases]:
    """Run a replica set of one beside it, with the same Redis: what is left when no second and third copy takes its share of the cores."""
    with tempfile.TemporaryDirectory(prefix="mcp-bench-") as name, MongoSet(Path(name), single=True) as mongo:
        yield Databases(mongo, there.redis)


@dataclass
class Effort:
    """What a stretch of work took: wall seconds, and processor seconds by side."""

    seconds: float = 0.0
    cpu: dict[str, float] = field(default_factory=dict)

    def per_task(self, tasks: int) -> dict[str, float]:
        """Return microseconds of processor time per task, by side."""
        return {side: round(seconds / tasks * 1e6) for side, seconds in self.cpu.items()}


@dataclass
class Cluster:
    """Servers that share one database.

    Attributes:
        stands: one for each server, with the agents that are connected to it.
        uri: of the database.
        refused: submissions that were told to come back later.
    """

    there: Databases
    stands: list[Stand]
    uri: str
    folder: Path
    refused: int = 0

    @property
    def first(self) -> Stand:
        """The server that is asked where it does not matter which."""
        return self.stands[0]

    def _cpu(self) -> dict[str, float]:
        primary = self.there.mongo.primary()
        pids = self.there.mongo.pids
        redis = [self.there.redis.pid] if self.there.redis.alive else []
        return {
            "servers": cpu_seconds([stand.server for stand in self.stands]),
            "primary": cpu_seconds([pids[primary]]),
            "secondaries": cpu_seconds([pid for place, pid in enumerate(pids) if place != primary]),
            "redis": cpu_seconds(redis),
            "agents": cpu_seconds([pid for stand in self.stands for pid in stand.agents]),
            "client": own_cpu(),
        }

    @contextlib.contextmanager
    def metered(self) -> Iterator[Effort]:
        """Fill in an Effort over the block."""
        effort = Effort()
        before = self._cpu()
        began = time.perf_counter()
        yield effort
        effort.seconds = time.perf_counter() - began
        after = self._cpu()
        effort.cpu = {side: after[side] - before[side] for side in SIDES}

    async def queue_is(self, wanted: str) -> None:
        """Wait until all servers take waiting work from there: `redis` or `store`."""
        end = time.monotonic() + _READY_SECONDS
        for stand in self.stands:
            while (await stand.api.json("GET", "/status"))["cluster"]["queue"] != wanted:
                if time.monotonic() > end:
                    raise TimeoutError(f"the servers do not take work from {wanted}")
                await asyncio.sleep(0.1)


@asynccontextmanager
async def cluster(there: Databases, servers: int, *, database: str = "", redis: bool = True) -> AsyncIterator[Cluster]:
    """Run servers on a database and Redis namespace of their own; agents and servers are gone at the end, and the database is dropped.

    Args:
        database: one that was filled before; empty makes one.
        redis: whether the servers are given Redis.
    """
    database = database or new_database()
    uri = there.mongo.uri(database)
    settings: dict[str, Any] = {"mongo.uri": uri, "mongo.allow_single_member": len(there.mongo.ports) == 1}
    if redis:
        settings |= {"redis.url": there.redis.url, "redis.namespace": database}
    async with AsyncExitStack() as stack:
        stack.callback(there.mongo.drop, database)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mcp-bench-")))
        stands: list[Stand] = []
        processes = [
            await asyncio.to_thread(stack.enter_context, ServerProcess(folder / f"server-{number}", **settings))
            for number in range(servers)
        ]
        for number, process in enumerate(processes):
            # Every server has a token; any of them holds for all servers.
            (api,) = await stack.enter_async_context(connections(process.url, process.admin_token, 1))
            stand = Stand(process.url, process.admin_token, process.pid, api, folder, name=f"s{number}-")
            stack.callback(stand.stop_agents)
            stands.append(stand)
        made = Cluster(there, stands, uri, folder)
        try:
            await made.queue_is("redis" if redis else "store")
            yield made
        except Exception as error:
            error.add_note(_logs(folder))
            raise


def _logs(folder: Path) -> str:
    return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-2000:]}" for log in sorted(folder.rglob("*.log")))


def new_database() -> str:
    """Return the name of a database that is not there yet."""
    return f"bench_{secrets.token_hex(4)}"


def commands(there: Cluster) -> dict[str, float]:
    """Return what the primary has done so far: commands by name, bytes to and from its clients and of its journal."""
    with pymongo.MongoClient[dict[str, Any]](there.uri) as client:
        status = client.admin.command("serverStatus")
    counts = {name: each["total"] for name, each in status["metrics"]["commands"].items() if isinstance(each, dict)}
    return {
        **{name: float(total) for name, total in counts.items() if total},
        "bytes in": float(status["network"]["bytesIn"]),
        "bytes out": float(status["network"]["bytesOut"]),
        "journal bytes": float(status["wiredTiger"]["log"]["log bytes written"]),
        "journal syncs": float(status["wiredTiger"]["log"]["log sync operations"]),
        "transactions": float(status["transactions"]["totalCommitted"]),
        "transactions aborted": float(status["transactions"]["totalAborted"]),
    }
