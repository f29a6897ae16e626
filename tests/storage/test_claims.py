"""The queue over the store itself proposes what waits, in order, whatever its length, and seldom the same twice."""

import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from mcp_control.kernel.changes import Change, Entity, Field, Index, Key, Kind, Query, Where
from mcp_control.storage.claims import StoreQueue
from mcp_control.storage.ports import Depth, Queued, waiting_value
from mcp_control.storage.sqlite.store import SqliteStore
from mcp_control.testing.clock import FakeClock

KIND = Kind(name="task", fields=(Field("waiting"),), indexes=(Index("task_waiting", ("waiting", "id")),))


class _Counting:
    """A store that counts what it is asked and how many rows it gives."""

    def __init__(self, store: SqliteStore) -> None:
        self._store = store
        self.get = store.get
        self.count = store.count
        self.asked = 0
        self.rows = 0

    async def find(self, kind: str, query: Query) -> list[Entity]:
        found = await self._store.find(kind, query)
        self.asked += 1
        self.rows += len(found)
        return found


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(tmp_path, fatal=lambda problem: None)
    await store.open([KIND], lambda facts: None)
    yield store
    await store.close()


async def _waiting(store: SqliteStore, *entries: tuple[str, str, int]) -> None:
    writes = [Entity("task", name, 0, {"waiting": waiting_value(lane, rank)}, b"{}") for lane, name, rank in entries]
    assert await store.commit([Change([write]) for write in writes]) == [None] * len(entries)


def _ids(entries: Sequence[Queued]) -> list[str]:
    return [entry.id for entry in entries]


async def test_what_waits_comes_by_rank_then_by_id(store: SqliteStore) -> None:
    """Entries come in the order of the index: rank, then id; other lanes and what does not wait stay out."""
    await _waiting(
        store, ("a", "t2", 50), ("a", "t1", 50), ("a", "t9", 0), ("a", "t0", 1 << 50), ("ab", "x", 0), ("A", "y", 0)
    )
    await store.commit([Change([Entity("task", "done", 0, {}, b"{}")])])
    taken = await StoreQueue(store, FakeClock()).take("a", 10)
    assert taken == [
        Queued("a", "t9", 0),
        Queued("a", "t1", 50),
        Queued("a", "t2", 50),
        Queued("a", "t0", 1 << 50),
    ]


async def test_a_ceiling_leaves_out_what_comes_later(store: SqliteStore) -> None:
    """Nothing above the ceiling is proposed, and what is at the ceiling is."""
    await _waiting(store, ("a", "low", 90), ("a", "medium", 50), ("a", "high", 10))
    queue = StoreQueue(store, FakeClock())
    assert _ids(await queue.take("a", 10, 50)) == ["high", "medium"]
    assert _ids(await queue.take("a", 10)) == ["low"]


async def test_what_was_given_out_comes_again_only_after_two_seconds_or_when_put_back(store: SqliteStore) -> None:
    """A server does not propose to itself what it is just claiming; what it did not claim comes again."""
    await _waiting(store, *(("a", f"t{n}", 50) for n in range(4)))
    clock = FakeClock()
    queue = StoreQueue(store, clock)
    assert _ids(await queue.take("a", 3)) == ["t0", "t1", "t2"]
    assert _ids(await queue.take("a", 3)) == ["t3"]
    await queue.push([Queued("a", "t1", 50)])
    assert _ids(await queue.take("a", 3)) == ["t1"]
    clock.advance(1.9)
    assert await queue.take("a", 3) == []
    clock.advance(0.2)
    assert _ids(await queue.take("a", 9)) == ["t0", "t1", "t2", "t3"]


async def test_servers_that_take_at_once_rarely_propose_the_same(store: SqliteStore) -> None:
    """With a random choice two servers collide less than half of the time; without one always."""
    await _waiting(store, *(("a", f"t{n:03d}", 50) for n in range(200)))

    async def both(first: random.Random | None, second: random.Random | None) -> int:
        left = await StoreQueue(store, FakeClock(), random=first).take("a", 8)
        right = await StoreQueue(store, FakeClock(), random=second).take("a", 8)
        assert len(left) == len(right) == 8
        return len({*_ids(left)} & {*_ids(right)})

    chosen = [await both(random.Random(n), random.Random(n + 1000)) for n in range(50)]
    assert sum(chosen) < 50 * 8 / 2
    assert await both(None, None) == 8


async def test_a_random_choice_never_prefers_the_less_urgent(store: SqliteStore) -> None:
    """All that come clearly before the others are proposed before any of those, and in order."""
    await _waiting(store, *(("a", f"t{n:03d}", (10 if n % 10 == 0 else 50) + n % 3) for n in range(60)))
    for seed in range(20):
        taken = await StoreQueue(store, FakeClock(), near=3, random=random.Random(seed)).take("a", 10)
        assert {*_ids(taken[:6])} == {f"t{n:03d}" for n in range(0, 60, 10)}
        assert taken == sorted(taken, key=lambda entry: (entry.rank, entry.id))


async def test_taking_everything_bit_by_bit_misses_nothing(store: SqliteStore) -> None:
    """Whatever the random choice, taking and claiming goes through all that waits, each once."""
    await _waiting(store, *(("a", f"t{n:03d}", n % 3) for n in range(150)))
    queue = StoreQueue(store, FakeClock(), random=random.Random(7))
    seen: list[str] = []
    while entries := await queue.take("a", 7):
        seen += _ids(entries)
        await store.commit([Change(deletes=[Key("task", name)]) for name in _ids(entries)])
    assert sorted(seen) == [f"t{n:03d}" for n in range(150)]


async def test_places_and_depths_are_those_of_the_index(store: SqliteStore) -> None:
    """`ahead` counts what comes before in the lane; `depths` shows each lane once, however their names nest."""
    await _waiting(store, ("a", "t1", 50), ("a", "t2", 50), ("a", "t3", 10), ("a/b", "t4", 7), ("a!", "t5", 8))
    queue = StoreQueue(store, FakeClock())
    assert [await queue.ahead("a", name) for name in ("t3", "t1", "t2", "t4", "none")] == [0, 1, 2, None, None]
    assert await queue.depths() == [
        Depth("a", 3, 10, "t3"),
        Depth("a!", 1, 8, "t5"),
        Depth("a/b", 1, 7, "t4"),
    ]


async def test_the_cost_does_not_follow_what_waits(store: SqliteStore) -> None:
    """Taking and looking at depths ask the same of the store whether 100 or 3,000 wait."""

    async def cost() -> tuple[int, int]:
        counting = _Counting(store)
        queue = StoreQueue(counting, FakeClock())  # type: ignore[arg-type]  # has the methods that are called
        assert len(await queue.take("a", 20)) == 20
        assert [depth.waiting for depth in await queue.depths()] == [min(waiting, 1000)]
        return counting.asked, counting.rows

    waiting = 100
    await _waiting(store, *(("a", f"t{n:05d}", 50) for n in range(waiting)))
    small = await cost()
    await _waiting(store, *(("a", f"t{n:05d}", 50) for n in range(waiting, 3000)))
    waiting = 3000
    assert await cost() == small
    assert await store.count("task", [Where("waiting", "ge", "")], 5000) == 3000
