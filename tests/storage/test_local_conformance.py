"""Queue, bus, cache and blobs of one server keep every promise of their ports."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from mcp_control.storage.local.blobs import FolderBlobs
from mcp_control.storage.local.bus import LocalBus
from mcp_control.storage.local.cache import LocalCache
from mcp_control.storage.local.queue import LocalQueue
from mcp_control.storage.ports import Blobs, Bus, Cache, Queue
from mcp_control.testing.blobs_conformance import *  # noqa: F403  the tests of the port
from mcp_control.testing.bus_conformance import *  # noqa: F403
from mcp_control.testing.cache_conformance import *  # noqa: F403
from mcp_control.testing.clock import FakeClock
from mcp_control.testing.queue_conformance import *  # noqa: F403


@pytest.fixture
def queue_factory() -> Callable[[], Awaitable[Queue]]:
    async def make() -> Queue:
        return LocalQueue()

    return make


@pytest.fixture
def bus_factory() -> Callable[[], Awaitable[Bus]]:
    async def make() -> Bus:
        return LocalBus()

    return make


@pytest.fixture
def cache_factory() -> Callable[[], Awaitable[tuple[Cache, Callable[[float], Awaitable[None]]]]]:
    async def make() -> tuple[Cache, Callable[[float], Awaitable[None]]]:
        clock = FakeClock()

        async def wait(seconds: float) -> None:
            clock.advance(seconds)

        return LocalCache(clock), wait

    return make


@pytest.fixture
def blobs_factory(tmp_path: Path) -> Callable[[], Awaitable[Blobs]]:
    async def make() -> Blobs:
        return FolderBlobs(tmp_path)

    return make
