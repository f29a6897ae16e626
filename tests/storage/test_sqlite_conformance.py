"""The store on SQLite keeps every promise of the port."""

from pathlib import Path

import pytest

from mcp_control.storage.sqlite.store import SqliteStore
from mcp_control.testing.store_conformance import *  # noqa: F403  the tests of the port
from mcp_control.testing.store_conformance import StoreFactory
from mcp_control.testing.store_machine import *  # noqa: F403  random histories against a model


def _fatal(problem: Exception) -> None:
    raise AssertionError(problem)


@pytest.fixture
def store_factory(tmp_path: Path) -> StoreFactory:
    return lambda: SqliteStore(tmp_path / "data", fatal=_fatal, ballast_bytes=1 << 16)
