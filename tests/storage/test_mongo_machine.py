"""SQLite and MongoDB answer alike: the random histories of the port, on both at once."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from mcp_control.kernel.changes import Change, Entity, Kind, Query, StoredFact, Where
from mcp_control.kernel.errors import Problem
from mcp_control.storage.mongo.store import MongoStore
from mcp_control.storage.ports import Committed, Store
from mcp_control.storage.sqlite.store import SqliteStore
from mcp_control.testing.store_conformance import StoreFactory, told
from mcp_control.testing.store_machine import test_random_histories_agree_with_a_plain_model  # noqa: F401


def _fatal(problem: Problem) -> None:
    raise AssertionError(problem)


class _Both:
    """A store that asks two stores and wants one answer."""

    def __init__(self, one: Store, other: Store) -> None:
        self._one = one
        self._other = other
        self._heard: tuple[list[StoredFact], list[StoredFact]] = ([], [])

    async def open(self, kinds: Sequence[Kind], committed: Committed) -> None:
        await self._one.open(kinds, self._heard[0].extend)

        def hear(facts: Sequence[StoredFact]) -> None:
            self._heard[1].extend(facts)
            committed(facts)

        await self._other.open(kinds, hear)

    async def close(self) -> None:
        for heard in self._heard:
            await told(heard, max(map(len, self._heard)))
        assert self._heard[0] == self._heard[1]
        await self._one.close()
        await self._other.close()

    async def commit(self, changes: Sequence[Change]) -> list[Problem | None]:
        one, other = await self._one.commit(changes), await self._other.commit(changes)
        assert list(map(_said, one)) == list(map(_said, other))
        return one

    async def get(self, kind: str, ids: Sequence[str], cold: Sequence[str] = ()) -> list[Entity | None]:
        one, other = await self._one.get(kind, ids, cold), await self._other.get(kind, ids, cold)
        assert one == other
        return one

    async def find(self, kind: str, query: Query) -> list[Entity]:
        one, other = await self._one.find(kind, query), await self._other.find(kind, query)
        assert one == other
        return one

    async def count(self, kind: str, where: Sequence[Where], limit: int) -> int:
        one, other = await self._one.count(kind, where, limit), await self._other.count(kind, where, limit)
        assert one == other
        return one

    async def facts(self, after: int, limit: int) -> list[StoredFact]:
        one, other = await self._one.facts(after, limit), await self._other.facts(after, limit)
        assert one == other
        return one

    async def trim_facts(self, before_at: int, keep: int, limit: int) -> tuple[int, int]:
        one, other = (
            await self._one.trim_facts(before_at, keep, limit),
            await self._other.trim_facts(before_at, keep, limit),
        )
        assert one == other
        return one


def _said(problem: Problem | None) -> tuple[object, ...]:
    """What both must say: which of several entities in conflict a change names is open."""
    return () if problem is None else (type(problem), problem.data.get("kind"), problem.data.get("index"))


@pytest.fixture
def store_factory(mongo_uri: str, tmp_path: Path) -> StoreFactory:
    def make() -> Store:
        mongo = MongoStore(mongo_uri, node="n1", fatal=_fatal)
        mongo.lead = True
        return _Both(SqliteStore(tmp_path / "data", fatal=_fatal, ballast_bytes=1 << 16), mongo)

    return make
