"""One server for the tests of a module, and a client that is its administrator."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest
import pytest_asyncio

from mcp_control.testing.server import RunningServer, running_server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningServer]:
    folder: Path = tmp_path_factory.mktemp("server")
    async with running_server(folder, limits__body_timeout_seconds=0.4) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(server: RunningServer) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=server.url, headers=server.headers) as there:
        yield there
