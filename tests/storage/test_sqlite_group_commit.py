"""How the store on SQLite merges, bounds and orders commits."""

import asyncio
import time
from pathlib import Path

import apsw
import pytest

from mcp_control.kernel.changes import Change, Entity, Key, Query, StoredFact, Where
from mcp_control.kernel.errors import Conflict, Duplicate, Overloaded, Problem
from mcp_control.storage.sqlite.queries import find_sql
from mcp_control.storage.sqlite.schema import Table
from mcp_control.storage.sqlite.store import SqliteStore
from mcp_control.testing.store_conformance import OTHER, THING, fact, thing


def _unexpected(problem: Problem) -> None:
    raise AssertionError(problem)


async def _opened(path: Path, heard: list[StoredFact] | None = None, **options: int) -> SqliteStore:
    store = SqliteStore(path / "data", fatal=_unexpected, **{"ballast_bytes": 0, **options})
    facts: list[StoredFact] = [] if heard is None else heard
    await store.open([THING, OTHER], facts.extend)
    return store


def _blocks(path: Path) -> list[tuple[int, int]]:
    """The first and last number of the facts of each physical commit."""
    connection = apsw.Connection(str(path / "data" / "store.db"), flags=apsw.SQLITE_OPEN_READONLY)
    rows = connection.execute('SELECT first_seq, last_seq FROM ".facts" ORDER BY last_seq').fetchall()
    connection.close()
    return [(int(first), int(last)) for first, last in rows]


async def test_calls_that_arrive_during_a_commit_share_the_next_one(tmp_path: Path) -> None:
    """A hundred concurrent calls cost a few physical commits, one alone costs one."""
    store = await _opened(tmp_path)
    await store.commit([Change([thing("first")], (), [fact("first")])])
    await asyncio.gather(*(store.commit([Change([thing(f"i{n}")], (), [fact(f"i{n}")])]) for n in range(100)))
    blocks = _blocks(tmp_path)
    assert blocks[0] == (1, 1)
    assert blocks[-1][1] == 101
    assert len(blocks) <= 4
    await store.close()


async def test_a_call_is_never_split_and_a_transaction_is_bounded(tmp_path: Path) -> None:
    """A transaction takes no further call once it is large enough; one call goes whole, however large."""
    store = await _opened(tmp_path, batch_writes=50, slice_writes=7)
    large = [Change([thing(f"l{n}")], (), [fact(f"l{n}")]) for n in range(300)]
    small = [[Change([thing(f"s{n}")], (), [fact(f"s{n}")])] for n in range(200)]
    await asyncio.gather(store.commit(large), *(store.commit(changes) for changes in small))
    sizes = [last - first + 1 for first, last in _blocks(tmp_path)]
    assert sizes == [300, 50, 50, 50, 50]
    await store.close()


async def test_other_work_runs_between_the_slices_of_a_long_transaction(tmp_path: Path) -> None:
    """A call of thousands of writes does not keep the event loop from its other work."""
    store = await _opened(tmp_path, slice_writes=10)
    turns = 0
    commit = asyncio.ensure_future(store.commit([Change([thing(f"l{n}")]) for n in range(2000)]))
    while not commit.done():
        turns += 1
        await asyncio.sleep(0)
    assert turns > 150
    assert await commit == [None] * 2000
    await store.close()


async def test_too_many_waiting_changes_are_refused_and_the_rest_goes_through(tmp_path: Path) -> None:
    """Beyond the bound a call is refused at once, with nothing done; what was accepted is committed."""
    store = await _opened(tmp_path, max_waiting=50)
    outcomes = await asyncio.gather(
        *(store.commit([Change([thing(f"i{n}")])]) for n in range(80)), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes] == [list] * 50 + [Overloaded] * 30
    assert await store.count("thing", (), 1000) == 50
    assert await store.commit([Change([thing(f"large{n}")]) for n in range(60)]) == [None] * 60
    await store.close()


async def test_a_cancelled_caller_disturbs_nobody(tmp_path: Path) -> None:
    """Callers that went away leave the outcomes of the others as they are."""
    store = await _opened(tmp_path)
    calls = [asyncio.ensure_future(store.commit([Change([thing(f"i{n}")])])) for n in range(20)]
    await asyncio.sleep(0)
    for call in calls[::2]:
        call.cancel()
    assert await asyncio.gather(*calls[1::2]) == [[None]] * 10
    await store.close()


async def test_racing_writers_of_one_entity_have_one_winner_each_time(tmp_path: Path) -> None:
    """Of many changes based on the same version exactly one is applied, in one commit or in several."""
    store = await _opened(tmp_path, batch_writes=3)
    await store.commit([Change([thing("a")])])
    for version in range(1, 6):
        outcomes = await asyncio.gather(
            *(store.commit([Change([thing("a", version, hot=b"%d" % n)])]) for n in range(20))
        )
        won = [n for n, (outcome,) in enumerate(outcomes) if outcome is None]
        assert len(won) == 1
        assert all(isinstance(outcome, Conflict) for n, (outcome,) in enumerate(outcomes) if n not in won)
        (found,) = await store.get("thing", ["a"])
        assert found is not None
        assert (found.version, found.hot) == (version + 1, b"%d" % won[0])
    await store.close()


async def test_a_conflict_at_the_end_of_a_change_leaves_nothing_of_it(tmp_path: Path) -> None:
    """A change with writes to several kinds, deletes and facts is all or nothing, and later changes of its commit see that."""
    heard: list[StoredFact] = []
    store = await _opened(tmp_path, heard)
    await store.commit([Change([thing("taken", tenant="t", name="n"), thing("old")])])
    outcomes = await store.commit(
        [
            Change(
                [Entity("other", "o", 0, {"owner": "x"}, b"1"), thing("new"), thing("twin", tenant="t", name="n")],
                [Key("thing", "old", 1)],
                [fact("no")],
            ),
            Change([thing("new"), thing("old", 1, hot=b"2")], (), [fact("yes")]),
        ]
    )
    assert isinstance(outcomes[0], Duplicate)
    assert outcomes[1] is None
    assert await store.get("other", ["o"]) == [None]
    assert [found and found.hot for found in await store.get("thing", ["old", "new", "twin"])] == [b"2", b"hot", None]
    assert [item.fact.subject for item in heard] == ["yes"]
    await store.close()


async def test_another_program_that_writes_is_waited_for_and_noticed(tmp_path: Path) -> None:
    """While a backup or a person at the sqlite3 prompt holds the write lock the loop goes on; what they changed is seen by guards."""
    store = await _opened(tmp_path)
    await store.commit([Change([thing("a")])])
    other = apsw.Connection(str(tmp_path / "data" / "store.db"))
    other.execute("BEGIN IMMEDIATE")
    other.execute("UPDATE thing SET version = 7")
    waiting = asyncio.ensure_future(store.commit([Change([thing("a", 1)])]))
    began = time.monotonic()
    for _ in range(20):
        await asyncio.sleep(0)
    assert not waiting.done()
    assert time.monotonic() - began < 1
    other.execute("COMMIT")
    other.close()
    assert isinstance((await waiting)[0], Conflict)
    assert await store.commit([Change([thing("a", 7)])]) == [None]
    await store.close()


async def test_closing_finishes_what_was_accepted(tmp_path: Path) -> None:
    """Commits that were under way when the store was closed are done, and are there after reopening."""
    store = await _opened(tmp_path)
    calls = [asyncio.ensure_future(store.commit([Change([thing(f"i{n}")])])) for n in range(50)]
    await asyncio.sleep(0)
    await store.close()
    assert await asyncio.gather(*calls) == [[None]] * 50
    store = await _opened(tmp_path)
    assert await store.count("thing", (), 100) == 50
    await store.close()


async def test_the_log_does_not_grow_without_bound(tmp_path: Path) -> None:
    """Checkpoints keep the write-ahead log near its limit while commits go on."""
    store = await _opened(tmp_path, checkpoint_pages=50)
    for version in range(400):
        await store.commit([Change([thing("a", version, hot=b"x" * 6000)])])
    assert (tmp_path / "data" / "store.db-wal").stat().st_size < 100 * 4200
    await store.close()


@pytest.mark.parametrize(
    ("query", "index"),
    [
        (Query(where=[Where("tenant", "eq", "t"), Where("state", "eq", "new")]), "thing_state"),
        (Query(where=[Where("tenant", "eq", "t"), Where("state", "eq", "new")], after=["i1"]), "thing_state"),
        (Query(where=[Where("due", "le", 5)], order="due"), "thing_due"),
        (Query(where=[Where("due", "le", 5)], order="due", after=[3, "i1"]), "thing_due"),
        (Query(where=[Where("tenant", "eq", "t"), Where("name", "eq", "n")]), "thing_name"),
    ],
    ids=["two-equal", "two-equal-later-page", "range", "range-later-page", "unique"],
)
async def test_queries_seek_in_the_declared_index(tmp_path: Path, query: Query, index: str) -> None:
    """A query whose fields are the first of an index is answered from it, without a scan or a sort."""
    store = await _opened(tmp_path)
    await store.close()
    connection = apsw.Connection(str(tmp_path / "data" / "store.db"))
    for sql, values in find_sql(Table(THING), query):
        plan = " ".join(str(row[3]) for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", (*values, 10)))
        assert f"SEARCH thing USING INDEX thing:{index}" in plan
        assert "TEMP B-TREE" not in plan
        assert "SCAN" not in plan
    connection.close()


async def test_a_busy_loop_does_not_starve_commits_and_long_reads(tmp_path: Path) -> None:
    """Beside a loop that never rests, commits and reads in threads still get the interpreter lock."""
    store = await _opened(tmp_path)
    await store.commit([Change([thing(f"i{n}", due=n)]) for n in range(500)])
    done = False

    async def never_rests() -> None:
        while not done:
            until = time.perf_counter() + 0.0002
            while time.perf_counter() < until:
                pass
            await asyncio.sleep(0)

    busy = asyncio.ensure_future(never_rests())
    began = time.monotonic()
    for version in range(1, 21):
        assert await store.commit([Change([thing("i0", version)])]) == [None]
        assert len(await store.find("thing", Query(where=[Where("due", "ge", 400)], limit=100))) == 100
    assert time.monotonic() - began < 10
    done = True
    await busy
    await store.close()


async def test_undeclared_names_are_the_callers_mistake(tmp_path: Path) -> None:
    """Kinds, fields and parts that were not declared are ValueErrors for reads, too."""
    store = await _opened(tmp_path)
    await store.commit([Change([thing("a")])])
    with pytest.raises(ValueError, match="not declared"):
        await store.get("nothing", ["a"])
    with pytest.raises(ValueError, match="cold part"):
        await store.get("thing", ["a"], ["secret"])
    with pytest.raises(ValueError, match="index field"):
        await store.find("thing", Query(where=[Where("1=1 --", "eq", "x")]))
    with pytest.raises(ValueError, match="index field"):
        await store.count("thing", [Where("hot", "eq", "x")], 5)
    with pytest.raises(ValueError, match="more than once"):
        await store.commit([Change([thing("b"), thing("b")])])
    await store.close()
