"""Many updates in one transaction put documents anew; nobody can tell."""

from mcp_control.kernel.changes import Change, Entity, Query, Where
from mcp_control.kernel.errors import Conflict, Duplicate
from mcp_control.storage.mongo.batch import assume, prepare
from mcp_control.storage.mongo.commands import many_updates, steps
from mcp_control.storage.mongo.documents import Shape
from mcp_control.storage.mongo.store import MongoStore
from mcp_control.testing.store_conformance import OTHER, THING, thing

_COUNT = 30
_LARGE = b"L" * 100_000


async def _made(uri: str) -> MongoStore:
    store = MongoStore(uri, node="n1")
    await store.open([THING, OTHER], lambda _: None)
    cold = {"payload": b"small", "output/a": b"piece"}
    made = [thing(f"t{at:02}", tenant="t", state="queued", name=f"n{at}", cold=cold) for at in range(_COUNT)]
    assert await store.commit([Change([each]) for each in made]) == [None] * _COUNT
    return store


def _next(at: int, version: int = 1, name: str = "", cold: dict[str, bytes] | None = None) -> Entity:
    return thing(f"t{at:02}", version, hot=b"new", tenant="t", state="done", name=name or f"n{at}", cold=cold)


async def test_parts_outlast_many_updates_that_do_not_name_them(mongo_uri: str) -> None:
    """Parts that lie inside and outside a document stay when many entities are written without them; parts that are named change."""
    store = await _made(mongo_uri)
    try:
        writes = [_next(at, cold={"payload": _LARGE} if at % 2 else {"output/b": b"more"}) for at in range(_COUNT)]
        assert await store.commit([Change([each]) for each in writes]) == [None] * _COUNT
        again = [_next(at, 2) for at in range(_COUNT)]
        assert await store.commit([Change([each]) for each in again]) == [None] * _COUNT
        found = await store.get("thing", [f"t{at:02}" for at in range(_COUNT)], ["payload", "output"])
        for at, each in enumerate(found):
            assert each is not None
            assert (each.version, each.hot, each.index["state"]) == (3, b"new", "done")
            more = {"payload": _LARGE} if at % 2 else {"payload": b"small", "output/b": b"more"}
            assert each.cold == {"output/a": b"piece", **more}
        assert await store.find("thing", Query(where=[Where("state", "eq", "queued")])) == []
    finally:
        await store.close()


async def test_one_stale_write_among_many_fails_alone(mongo_uri: str) -> None:
    """Of many updates the one that read another version ends in a conflict, one that takes a name in a duplicate, and the others happen."""
    store = await _made(mongo_uri)
    try:
        assert await store.commit([Change([_next(7)])]) == [None]
        writes = [_next(at, name="n0" if at == 9 else "") for at in range(_COUNT)]
        outcomes = await store.commit([Change([each]) for each in writes])
        assert isinstance(outcomes[7], Conflict)
        assert isinstance(outcomes[9], Duplicate)
        assert [at for at, outcome in enumerate(outcomes) if outcome is not None] == [7, 9]
        versions = [each and each.version for each in await store.get("thing", [f"t{at:02}" for at in range(_COUNT)])]
        assert versions == [1 if at == 9 else 2 for at in range(_COUNT)]
    finally:
        await store.close()


async def test_names_that_move_among_many_updates_keep_their_order(mongo_uri: str) -> None:
    """Who takes a name before its holder gives it up is refused, who takes it afterwards gets it."""
    store = await _made(mongo_uri)
    try:
        moved = {3: "n20", 20: "free", 21: "n20"}
        writes = [_next(at, name=moved.get(at, "")) for at in range(_COUNT)]
        outcomes = await store.commit([Change([each]) for each in writes])
        assert isinstance(outcomes[3], Duplicate)
        assert [at for at, outcome in enumerate(outcomes) if outcome is not None] == [3]
        (held,) = await store.find("thing", Query(where=[Where("name", "eq", "n20")]))
        assert held.id == "t21"
    finally:
        await store.close()


def test_many_updates_become_one_delete_and_one_insert() -> None:
    """Where the documents were read, updates delete and insert, those of another version stay guarded updates; few are not read at all."""
    shapes = {"thing": Shape(THING)}
    plan = assume(shapes, [prepare(shapes, Change([_next(at)])) for at in range(_COUNT)])
    assert plan is not None
    assert {kind: len(ids) for kind, ids in many_updates(plan).items()} == {"thing": _COUNT}
    index = {"tenant": "t", "state": "queued"}
    before = {
        ("thing", f"t{at:02}"): {"_id": f"t{at:02}", "v": 2 if at == 5 else 1, "i": {**index, "name": f"n{at}"}}
        for at in range(_COUNT)
    }
    found = [(next(iter(step.command)), step.expected) for step in steps(shapes, plan, before)]
    assert found == [("delete", _COUNT - 1), ("insert", _COUNT - 1), ("update", 1)]
    few = assume(shapes, [prepare(shapes, Change([_next(at)])) for at in range(5)])
    assert few is not None
    assert many_updates(few) == {}
