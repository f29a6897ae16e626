"""What every `Store` promises, as tests; `store_machine.py` adds random histories against a model.

An adapter's test module provides the fixture `store_factory` and imports all of this:
`from mcp_control.testing.store_conformance import *`. The fixture is a callable that returns a store that is not open; all stores of one
test lie on the same data, which is empty when the test begins, and one at a time is open.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

import pytest

from mcp_control.kernel.changes import (
    Change,
    Entity,
    Fact,
    Field,
    Index,
    IndexValue,
    Key,
    Kind,
    Query,
    StoredFact,
    Where,
)
from mcp_control.kernel.errors import Conflict, Duplicate, StoreUnavailable
from mcp_control.storage.ports import Store

StoreFactory = Callable[[], Store]

THING: Final = Kind(
    name="thing",
    fields=(Field("tenant"), Field("state"), Field("due", "int"), Field("name")),
    indexes=(
        Index("thing_state", ("tenant", "state", "id")),
        Index("thing_due", ("due", "id")),
        Index("thing_name", ("tenant", "name"), unique=True),
    ),
    cold=("payload", "output"),
)
OTHER: Final = Kind(name="other", fields=(Field("owner"),), indexes=(Index("other_owner", ("owner", "id")),))


def thing(
    id: str, version: int = 0, *, hot: bytes = b"hot", cold: dict[str, bytes] | None = None, **index: IndexValue
) -> Entity:
    """Return an entity of the kind `thing`."""
    return Entity("thing", id, version, index, hot, cold or {})


def fact(subject: str, at: int = 1) -> Fact:
    """Return a fact about a thing."""
    return Fact("thing.changed", subject, "t", at, "system", b'{"n":1}', "run_1")


async def opened(
    factory: StoreFactory, heard: list[StoredFact] | None = None, kinds: Sequence[Kind] = (THING, OTHER)
) -> Store:
    """Return an open store that reports the facts it commits."""
    store = factory()
    facts: list[StoredFact] = [] if heard is None else heard
    await store.open(kinds, facts.extend)
    return store


async def told(heard: list[StoredFact], count: int) -> None:
    """Wait until `committed` was told so many facts: a store that several servers share tells them soon after the commit.

    Raises TimeoutError when it does not.
    """
    async with asyncio.timeout(15):
        while len(heard) < count:  # noqa: ASYNC110  the store tells a callback that knows of no event
            await asyncio.sleep(0.002)


async def test_values_read_back_are_plain(store_factory: StoreFactory) -> None:
    """Versions and index fields are Python's own integers and texts, however large, so that any encoder takes them."""
    store = await opened(store_factory)
    await store.commit([Change([thing("a", state="new", due=2**53)])])
    (found,) = await store.get("thing", ["a"])
    assert found is not None
    assert type(found.version) is int
    assert [type(value) for value in found.index.values() if value is not None] == [str, int]
    await store.close()


async def test_what_was_committed_is_read_back(store_factory: StoreFactory) -> None:
    """An entity comes back with its version, index fields, hot bytes and the cold parts asked for; nulls are named."""
    store = await opened(store_factory)
    assert await store.commit(
        [Change([thing("a", state="new", due=7, cold={"payload": b"p", "output/x": b"1", "output/y": b"2"})])]
    ) == [None]
    index = {"tenant": None, "state": "new", "due": 7, "name": None}
    assert await store.get("thing", ["a", "none"]) == [Entity("thing", "a", 1, index, b"hot", {}), None]
    (found,) = await store.get("thing", ["a"], ["payload", "output/y", "output/z"])
    assert found is not None
    assert found.cold == {"payload": b"p", "output/y": b"2"}
    (found,) = await store.get("thing", ["a"], ["output"])
    assert found is not None
    assert found.cold == {"output/x": b"1", "output/y": b"2"}
    await store.close()


async def test_an_update_keeps_the_cold_parts_it_does_not_name(store_factory: StoreFactory) -> None:
    """Index fields and hot bytes are replaced as a whole; cold parts stay until they are written again."""
    store = await opened(store_factory)
    await store.commit([Change([thing("a", state="new", due=7, cold={"payload": b"p"})])])
    assert await store.commit([Change([thing("a", 1, hot=b"2", state="old", cold={"output": b"r"})])]) == [None]
    (found,) = await store.get("thing", ["a"], ["payload", "output"])
    index = {"tenant": None, "state": "old", "due": None, "name": None}
    assert found == Entity("thing", "a", 2, index, b"2", {"payload": b"p", "output": b"r"})
    await store.close()


@pytest.mark.parametrize("version", [0, 2], ids=["as-new", "from-the-future"])
async def test_a_write_at_another_version_conflicts(store_factory: StoreFactory, version: int) -> None:
    """A write that was not based on the current version changes nothing, not even through its other parts."""
    store = await opened(store_factory)
    await store.commit([Change([thing("a")])])
    change = Change([thing("b"), thing("a", version, hot=b"lost")], (), [fact("a")])
    (outcome,) = await store.commit([change])
    assert isinstance(outcome, Conflict)
    assert [found and found.hot for found in await store.get("thing", ["a", "b"])] == [b"hot", None]
    assert await store.facts(0, 10) == []
    await store.close()


async def test_a_write_to_what_is_not_there_conflicts(store_factory: StoreFactory) -> None:
    """An update of an entity that was deleted or never was is a conflict."""
    store = await opened(store_factory)
    assert isinstance((await store.commit([Change([thing("a", 3)])]))[0], Conflict)
    await store.close()


async def test_each_change_of_a_call_succeeds_or_fails_on_its_own(store_factory: StoreFactory) -> None:
    """One change's conflict leaves the others alone, and a change sees the effect of those before it."""
    store = await opened(store_factory)
    outcomes = await store.commit(
        [
            Change([thing("a")]),
            Change([thing("a")]),
            Change([thing("a", 1, hot=b"2")]),
            Change([thing("b")], [Key("thing", "a", 2)]),
        ]
    )
    assert [type(outcome) for outcome in outcomes] == [type(None), Conflict, type(None), type(None)]
    assert [found is not None for found in await store.get("thing", ["a", "b"])] == [False, True]
    await store.close()


async def test_a_unique_index_refuses_the_second(store_factory: StoreFactory) -> None:
    """The change fails with the index and the id that holds the value; nulls never collide."""
    store = await opened(store_factory)
    await store.commit([Change([thing("a", tenant="t", name="n"), thing("free", tenant="t")])])
    taken, null, other = await store.commit(
        [
            Change([Entity("other", "o", 0, {}, b""), thing("b", tenant="t", name="n")]),
            Change([thing("c", tenant="t")]),
            Change([thing("d", tenant="u", name="n")]),
        ]
    )
    assert isinstance(taken, Duplicate)
    assert taken.data == {"index": "thing_name", "existing": "a"}
    assert (null, other) == (None, None)
    assert await store.get("other", ["o"]) == [None]
    assert isinstance((await store.commit([Change([thing("d", 1, tenant="t", name="n")])]))[0], Duplicate)
    await store.close()


async def test_two_takers_of_one_unique_value_in_one_change_leave_nothing(store_factory: StoreFactory) -> None:
    """A change that collides with itself is refused as a whole."""
    store = await opened(store_factory)
    (outcome,) = await store.commit(
        [Change([thing("a", tenant="t", name="n"), thing("b", tenant="t", name="n")], (), [fact("a")])]
    )
    assert isinstance(outcome, Duplicate)
    assert await store.get("thing", ["a", "b"]) == [None, None]
    assert await store.facts(0, 10) == []
    await store.close()


async def test_a_delete_frees_its_unique_value_for_the_same_change(store_factory: StoreFactory) -> None:
    """Deletes of a change come before its writes."""
    store = await opened(store_factory)
    await store.commit([Change([thing("a", tenant="t", name="n")])])
    assert await store.commit([Change([thing("b", tenant="t", name="n")], [Key("thing", "a", 1)])]) == [None]
    await store.close()


async def test_deletes_are_guarded_and_take_the_cold_parts_along(store_factory: StoreFactory) -> None:
    """A delete at another version conflicts; without one it always succeeds; what comes later under that id has no old parts."""
    store = await opened(store_factory)
    await store.commit([Change([thing("a", cold={"payload": b"p", "output/x": b"1"})])])
    assert isinstance((await store.commit([Change((), [Key("thing", "a", 9)])]))[0], Conflict)
    assert isinstance((await store.commit([Change((), [Key("thing", "none", 1)])]))[0], Conflict)
    assert await store.commit([Change((), [Key("thing", "a"), Key("thing", "none")])]) == [None]
    assert await store.commit([Change([thing("a")])]) == [None]
    (found,) = await store.get("thing", ["a"], ["payload", "output"])
    assert found is not None
    assert (found.version, found.cold) == (1, {})
    await store.close()


async def test_one_callers_mistake_hurts_nobody_else(store_factory: StoreFactory) -> None:
    """A value that cannot be stored fails its own call as a whole with an ordinary error; a call beside it goes through."""
    store = await opened(store_factory)
    for wrong in (
        thing("w", due=2**63),
        thing("w", state="\ud800"),
        thing("w", undeclared="x"),
        Entity("unknown", "w", 0, {}, b""),
    ):
        good = store.commit([Change([thing(f"g{id(wrong)}")])])
        with pytest.raises((ValueError, OverflowError)):
            await store.commit([Change([thing("w2")]), Change([thing("w3"), wrong])])
        assert await good == [None]
    assert await store.get("thing", ["w", "w2", "w3"]) == [None, None, None]
    await store.close()


async def test_facts_are_numbered_without_gaps_and_told_in_order(store_factory: StoreFactory) -> None:
    """Facts of successful changes alone get numbers, in the order of the changes, and `committed` hears each once, in order."""
    heard: list[StoredFact] = []
    store = await opened(store_factory, heard)
    await store.commit(
        [
            Change([thing("a")], (), [fact("a"), fact("a2")]),
            Change([thing("a")], (), [fact("no")]),
            Change((), (), [fact("f")]),
        ]
    )
    await told(heard, 3)
    assert [(item.seq, item.fact.subject) for item in heard] == [(1, "a"), (2, "a2"), (3, "f")]
    await store.commit([Change([thing("b")], (), [fact("b")])])
    await told(heard, 4)
    assert [item.seq for item in heard] == [1, 2, 3, 4]
    assert await store.facts(0, 10) == heard
    assert await store.facts(1, 2) == heard[1:3]
    assert await store.facts(4, 2) == []
    await store.close()


async def test_trimming_removes_old_facts_and_never_their_numbers(store_factory: StoreFactory) -> None:
    """Facts go when they are too old or too many, the oldest first; numbering goes on after it, also after a restart."""
    heard: list[StoredFact] = []
    store = await opened(store_factory, heard)
    assert await store.trim_facts(0, 100, 100) == (0, 0)
    for number in range(1, 11):
        await store.commit([Change((), (), [fact(f"f{number}", at=number)])])
        await told(heard, number)
    assert await store.trim_facts(0, 100, 100) == (1, 10)
    assert await store.trim_facts(4, 100, 100) == (4, 10)
    assert await store.trim_facts(0, 5, 100) == (6, 10)
    oldest, newest = await store.trim_facts(100, 0, 2)
    assert 6 < oldest < 11
    assert newest == 10
    assert await store.trim_facts(100, 0, 100) == (11, 10)
    await store.close()
    heard = []
    store = await opened(store_factory, heard)
    await store.commit([Change((), (), [fact("next")])])
    await told(heard, 1)
    assert [item.seq for item in heard] == [11]
    await store.close()


async def test_everything_is_there_after_reopening(store_factory: StoreFactory) -> None:
    """Entities, cold parts and facts outlive the process."""
    heard: list[StoredFact] = []
    store = await opened(store_factory, heard)
    await store.commit([Change([thing("a", tenant="t", name="n", cold={"payload": b"p"})], (), [fact("a")])])
    await told(heard, 1)
    before = await store.get("thing", ["a"], ["payload"]), await store.facts(0, 10)
    await store.close()
    store = await opened(store_factory)
    assert (await store.get("thing", ["a"], ["payload"]), await store.facts(0, 10)) == before
    assert isinstance((await store.commit([Change([thing("b", tenant="t", name="n")])]))[0], Duplicate)
    await store.close()


async def test_a_declaration_may_gain_and_lose_fields_indexes_and_parts(store_factory: StoreFactory) -> None:
    """Opening with another declaration migrates: old rows have null in a new field, and a new unique index holds."""
    store = await opened(store_factory)
    await store.commit([Change([thing("a", state="x", due=1, cold={"payload": b"p"})])])
    await store.close()
    after = Kind(
        name="thing",
        fields=(Field("state"), Field("label"), Field("due", "int")),
        indexes=(Index("thing_label", ("label",), unique=True), Index("thing_due", ("due", "id"))),
        cold=("payload", "extra"),
    )
    store = await opened(store_factory, kinds=(after,))
    assert [found.index for found in await store.find("thing", Query())] == [{"state": "x", "label": None, "due": 1}]
    first, second = await store.commit(
        [Change([thing("a", 1, label="l", cold={"extra": b"e"})]), Change([thing("b", label="l")])]
    )
    assert first is None
    assert isinstance(second, Duplicate)
    (found,) = await store.get("thing", ["a"], ["payload", "extra"])
    assert found is not None
    assert found.cold == {"payload": b"p", "extra": b"e"}
    await store.close()


async def test_queries_filter_order_and_page(store_factory: StoreFactory) -> None:
    """Conditions hold together; pages by keyset give each row once, nulls of the order field first (last when descending)."""
    store = await opened(store_factory)
    rows = {f"i{n}": (n % 3 or None) for n in range(10)}
    await store.commit([Change([thing(name, due=due, state="x", tenant="t") for name, due in rows.items()])])
    ids = sorted(rows)
    up = sorted(ids, key=lambda name: (rows[name] is not None, rows[name] or 0, name))
    for order, descending, expected in (
        (None, False, ids),
        (None, True, ids[::-1]),
        ("due", False, up),
        ("due", True, up[::-1]),
    ):
        for limit in (1, 3, 100):
            assert await _pages(store, order, descending, limit) == expected
    where = [Where("due", "ge", 1), Where("due", "lt", 2), Where("state", "in", ["x", "y"]), Where("id", "gt", "i1")]
    assert [found.id for found in await store.find("thing", Query(where=where))] == ["i4", "i7"]
    assert await store.count("thing", where, 100) == 2
    assert await store.count("thing", (), 4) == 4
    assert await store.find("thing", Query(where=[Where("due", "in", [])])) == []
    assert await store.find("thing", Query(where=[Where("due", "eq", None)])) == []
    await store.close()


async def _pages(store: Store, order: str | None, descending: bool, limit: int) -> list[str]:
    ids: list[str] = []
    after: Sequence[IndexValue] | None = None
    while True:
        found = await store.find("thing", Query(order=order, descending=descending, limit=limit, after=after))
        ids += [entity.id for entity in found]
        if len(found) < limit:
            return ids
        after = [found[-1].id] if order is None else [found[-1].index[order], found[-1].id]


async def test_reads_see_every_commit_before_them(store_factory: StoreFactory) -> None:
    """A commit that returned is visible to the very next read of every kind."""
    store = await opened(store_factory)
    for version in range(30):
        await store.commit([Change([thing("a", version, hot=b"%d" % version, state=f"s{version}", tenant="t")])])
        assert [found and found.hot for found in await store.get("thing", ["a"])] == [b"%d" % version]
        where = [Where("tenant", "eq", "t"), Where("state", "eq", f"s{version}")]
        assert len(await store.find("thing", Query(where=where, limit=5))) == 1
        assert len(await store.find("thing", Query(where=where, limit=500))) == 1
        assert await store.count("thing", where, 5) == 1
    await store.close()


async def test_long_lists_of_ids(store_factory: StoreFactory) -> None:
    """A read of many ids keeps their order, repeats what is asked twice, and takes an empty list."""
    store = await opened(store_factory)
    await store.commit([Change([thing(f"i{n}")]) for n in range(300)])
    ids = [*(f"i{n}" for n in range(299, -1, -1)), "none", "i5"]
    assert [found and found.id for found in await store.get("thing", ids)] == [*ids[:300], None, "i5"]
    assert await store.get("thing", []) == []
    assert await store.commit([]) == []
    await store.close()


async def test_a_closed_store_says_so(store_factory: StoreFactory) -> None:
    """After closing, which may be done twice, every call is refused."""
    store = await opened(store_factory)
    await store.close()
    await store.close()
    with pytest.raises(StoreUnavailable):
        await store.commit([Change([thing("a")])])
    with pytest.raises(StoreUnavailable):
        await store.get("thing", ["a"])
