"""One server for the tests of a module, and a client that is its administrator."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest
import pytest_asyncio

from mcp_control.testing.backends import backend, pytest_generate_tests
from mcp_control.testing.server import RunningServer, running_server

__all__ = ["backend", "pytest_generate_tests"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(backend: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningServer]:
    folder: Path = tmp_path_factory.mktemp("server")
    async with running_server(folder, limits__body_timeout_seconds=0.4) as running:
        await told(running)
        yield running


async def told(server: RunningServer) -> None:
    """Wait until all events of the start were told; on a shared store that is soon after their commit."""
    services = server.services
    deadline = time.monotonic() + 10
    while True:
        facts = await services.store.facts(0, 100)
        if (
            any(stored.fact.type == "token.created" for stored in facts)
            and services.broadcaster.newest == facts[-1].seq
        ):
            return
        assert time.monotonic() < deadline, facts
        await asyncio.sleep(0.02)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(server: RunningServer) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=server.url, headers=server.headers) as there:
        yield there
