"""The store on SQLite keeps every promise of the port."""

from pathlib import Path

import pytest

from mcp_control.kernel.changes import Change, StoredFact
from mcp_control.storage.sqlite.store import SqliteStore
from mcp_control.testing.store_conformance import *  # noqa: F403  the tests of the port
from mcp_control.testing.store_conformance import StoreFactory, fact, opened, thing
from mcp_control.testing.store_machine import *  # noqa: F403  random histories against a model


def _fatal(problem: Exception) -> None:
    raise AssertionError(problem)


@pytest.fixture
def store_factory(tmp_path: Path) -> StoreFactory:
    return lambda: SqliteStore(tmp_path / "data", fatal=_fatal, ballast_bytes=1 << 16)


async def test_facts_are_told_before_the_commit_returns(store_factory: StoreFactory) -> None:
    """A store of one server has told its facts when the caller hears that they are durable."""
    heard: list[StoredFact] = []
    store = await opened(store_factory, heard)
    for number in range(1, 6):
        await store.commit([Change([thing(f"a{number}")], (), [fact("a"), fact("b")])])
        assert [item.seq for item in heard] == list(range(1, 2 * number + 1))
        assert await store.facts(0, 100) == heard
    await store.close()
