"""Fixtures of the security tests."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mcp_control.storage.sqlite.store import SqliteStore
from mcp_control.testing.clock import FakeClock
from tests.security.world import Server, open_store


@pytest.fixture
def clock() -> FakeClock:
    """A clock at a fixed moment."""
    return FakeClock()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    """A real, empty store."""
    store = await open_store(tmp_path / "data")
    yield store
    await store.close()


@pytest.fixture
def server(store: SqliteStore, clock: FakeClock) -> Server:
    """A server without users."""
    return Server(store, clock)
