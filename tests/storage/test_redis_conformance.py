"""Queue, bus and cache on Redis keep every promise of their ports: on one server, behind Sentinels, and on a cluster."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterator

import pytest

from mcp_control.kernel.clock import SystemClock
from mcp_control.storage.local.bus import LocalBus
from mcp_control.storage.local.cache import LocalCache
from mcp_control.storage.ports import Bus, Cache, Queue
from mcp_control.storage.redis.bus import RedisBus
from mcp_control.storage.redis.cache import RedisCache
from mcp_control.storage.redis.queue import RedisQueue
from mcp_control.testing.bus_conformance import *  # noqa: F403  the tests of the port
from mcp_control.testing.cache_conformance import *  # noqa: F403
from mcp_control.testing.databases import RedisCluster, RedisSentinel, RedisServer
from mcp_control.testing.queue_conformance import *  # noqa: F403
from tests.storage.redis_clients import linked

_SPEED = 4


@pytest.fixture(scope="module", params=[RedisServer, RedisSentinel, RedisCluster], ids=["one", "sentinel", "cluster"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with request.param(tmp_path_factory.mktemp("redis")) as servers:
        yield servers.url


@pytest.fixture
def queue_factory(url: str) -> Callable[[], Awaitable[Queue]]:
    async def make() -> Queue:
        namespace = secrets.token_hex(4)
        return RedisQueue((await linked(url, namespace)).client, namespace)

    return make


@pytest.fixture
def bus_factory(url: str) -> Callable[[], Awaitable[Bus]]:
    async def make() -> Bus:
        namespace = secrets.token_hex(4)
        return RedisBus(await linked(url, namespace), namespace, LocalBus())

    return make


class _Quick:
    """A cache whose seconds are shorter, since Redis has its own clock."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self.get = cache.get
        self.delete = cache.delete

    async def set(self, key: str, value: bytes, ttl: float) -> None:
        await self._cache.set(key, value, ttl / _SPEED)

    async def add(self, key: str, amount: int, ttl: float) -> int:
        return await self._cache.add(key, amount, ttl / _SPEED)


@pytest.fixture
def cache_factory(url: str) -> Callable[[], Awaitable[tuple[Cache, Callable[[float], Awaitable[None]]]]]:
    async def make() -> tuple[Cache, Callable[[float], Awaitable[None]]]:
        async def wait(seconds: float) -> None:
            await asyncio.sleep(seconds / _SPEED)  # there is no condition to wait for: time itself has to pass in Redis

        namespace = secrets.token_hex(4)
        local = LocalCache(SystemClock())
        return _Quick(RedisCache(await linked(url, namespace), namespace, local)), wait

    return make
