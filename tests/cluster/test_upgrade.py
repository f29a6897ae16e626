"""Servers of two versions side by side, and a migration that is killed in the middle (fault matrix, row 26)."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import msgspec
import pymongo
import pytest
from bson.binary import Binary
from msgspec.structs import replace

from mcp_control.app import KINDS
from mcp_control.kernel.changes import Change, Entity, Fact, Field, Index, Kind, Query, StoredFact, Where
from mcp_control.kernel.errors import Problem
from mcp_control.storage.mongo import schema
from mcp_control.storage.mongo.archive import MongoArchive
from mcp_control.storage.mongo.client import Database, Document
from mcp_control.storage.mongo.documents import Shape
from mcp_control.storage.mongo.store import MongoStore
from mcp_control.testing.databases import MongoSet
from tests.cluster.harness import running_cluster
from tests.integration.support import API, in_state, say, submit, until

OLD = Kind(name="thing", fields=(Field("state"),), indexes=(Index("by_state", ("state", "id")),), cold=("payload",))
NEW = replace(
    OLD,
    fields=(*OLD.fields, Field("rank", "int")),
    indexes=(*OLD.indexes, Index("by_rank", ("rank", "id")), Index("one_rank", ("state", "rank"), unique=True)),
    cold=("payload", "result"),
)


@asynccontextmanager
async def _store(uri: str, kind: Kind, told: list[StoredFact] | None = None) -> AsyncIterator[MongoStore]:
    def fatal(problem: Problem) -> None:
        raise problem

    def committed(facts: Sequence[StoredFact]) -> None:
        if told is not None:
            told.extend(facts)

    store = MongoStore(uri, node=f"server-{len(kind.fields)}", fatal=fatal)
    await store.open([kind], committed)
    try:
        yield store
    finally:
        await store.close()


def _thing(name: str, version: int = 0, **index: str | int) -> Change:
    fact = Fact("thing.changed", name, "default", 1, "system")
    return Change([Entity("thing", name, version, index, name.encode(), {"payload": b"p"})], facts=[fact])


async def _names(store: MongoStore, field: str, value: str | int) -> list[str]:
    order = "rank" if field == "rank" else None
    query = (
        Query(where=[Where(field, "eq", value)], limit=100)
        if order is None
        else Query(where=[Where(field, "eq", value)], order=order, limit=100)
    )
    return sorted(entity.id for entity in await store.find("thing", query))


async def _contracted(uri: str, kind: Kind) -> list[str]:
    return await MongoArchive(uri, alive=("node", "until")).contract([kind], drop=True)


async def test_servers_of_two_versions_work_on_one_store(mongo_uri: str) -> None:
    """One version declares a field, indexes and a part more: both read and write everything, in any order of starts, and hear all facts."""
    old_facts: list[StoredFact] = []
    new_facts: list[StoredFact] = []
    async with _store(mongo_uri, OLD, old_facts) as old:
        assert await old.commit([_thing(f"old{number}", state="a") for number in range(5)]) == [None] * 5
        old.lead = True
        await until(lambda: len(old_facts) == 5, 10, "the first facts have their places")
        async with _store(mongo_uri, NEW, new_facts) as new:
            assert await _names(new, "state", "a") == [f"old{number}" for number in range(5)]
            assert await new.commit([_thing("new0", state="a", rank=7)]) == [None]
            assert await _names(new, "rank", 7) == ["new0"]
            # The older version changes what the newer one made, and the other way round.
            assert await old.commit([_thing("new0", 1, state="b"), _thing("old5", state="a")]) == [None, None]
            assert await new.commit([_thing("old0", 1, state="a", rank=1)]) == [None]
            assert await _names(old, "state", "b") == ["new0"]
            assert await _names(old, "state", "a") == [f"old{number}" for number in range(6)]
            # A stale version loses with either of them.
            assert [str(one and one.code) for one in await old.commit([_thing("old0", 1, state="z")])] == ["conflict"]
            await until(lambda: len(new_facts) == 4 and len(old_facts) == 9, 10, "both hear all facts")
            assert [fact.seq for fact in old_facts] == [*range(1, 10)]
        # The new one is rolled back while the old one runs, and an old one starts anew on what the new one left.
        async with _store(mongo_uri, OLD) as again:
            assert await again.commit([_thing("old6", state="a")]) == [None]
            assert (await again.get("thing", ["old0"]))[0] is not None
    async with _store(mongo_uri, NEW) as new:
        assert await _names(new, "rank", 1) == ["old0"], "what an older version did not touch is kept"
        assert await _contracted(mongo_uri, NEW) == []


async def test_indexes_nobody_declares_go_only_when_asked(mongo_uri: str) -> None:
    """Expand and contract: an older version finds its indexes until the last of it has gone."""
    async with _store(mongo_uri, NEW) as new:
        assert await new.commit([_thing("one", state="a", rank=1)]) == [None]
    async with _store(mongo_uri, OLD) as old:
        assert await _names(old, "state", "a") == ["one"]
        assert sorted(await _contracted(mongo_uri, OLD)) == [
            "thing.by_rank:rank,id",
            "thing.one_rank:state,rank:unique",
        ]
        assert await _contracted(mongo_uri, OLD) == []


async def test_what_is_no_longer_declared_is_read_by_nobody_and_goes(mongo_set: MongoSet, mongo_uri: str) -> None:
    """A field leaves a document with its next write, a part with its entity, and all parts of a kind that has none any more when asked."""
    large = b"p" * 100_000  # lies outside of its document
    bare = replace(OLD, cold=())
    async with _store(mongo_uri, NEW) as new:
        assert await new.commit([_thing("kept", state="a", rank=1), _thing("gone", state="a", rank=2)]) == [None, None]
        parts = {"payload": large, "result": large}
        change = Change([Entity("thing", name, 1, {"state": "a", "rank": 1}, b"", parts) for name in ("kept",)])
        assert await new.commit([change]) == [None]
    with pymongo.MongoClient[Document](mongo_set.uri()) as direct:
        database = direct[mongo_uri.rpartition("/")[2].partition("?")[0]]
        async with _store(mongo_uri, OLD) as old:
            [found] = await old.get("thing", ["kept"])
            assert found is not None
            assert found.index == {"state": "a"}
            assert await old.commit([_thing("kept", found.version, state="b")]) == [None]
            assert [one["i"] for one in database["thing"].find({"_id": "kept"})] == [{"state": "b"}]
            assert database["thing.parts"].count_documents({}) > 0
        async with _store(mongo_uri, bare) as last:
            assert "thing.parts" in await _contracted(mongo_uri, bare)
            assert [entity.id for entity in await last.find("thing", Query())] == ["gone", "kept"]
        assert "thing.parts" not in database.list_collection_names()


@pytest.mark.parametrize("control", [False, True], ids=["product", "control"])
async def test_what_is_migrated_is_said_last(
    control: bool, mongo_set: MongoSet, mongo_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that dies between two indexes is finished by the next; one that says first that it is done would not be (control)."""
    create, declare = schema._create_indexes, schema._migrate_kind

    async def dies(database: Database, collection: str, specs: list[Document]) -> None:
        await create(database, collection, specs[:1])
        raise ZeroDivisionError

    async def too_early(database: Database, shape: Shape, known: Document | None) -> None:
        said = {"declared": Binary(msgspec.json.encode(shape.kind))}
        await database[schema.META].update_one({"_id": f"kind:{shape.name}"}, {"$set": said}, upsert=True)
        await declare(database, shape, known)

    with monkeypatch.context() as broken:
        broken.setattr(schema, "_create_indexes", lambda *given: (dies if given[1] == "thing" else create)(*given))
        if control:
            broken.setattr(schema, "_migrate_kind", too_early)
        with pytest.raises(ZeroDivisionError):
            async with _store(mongo_uri, NEW):
                raise AssertionError("it did not die")
    async with _store(mongo_uri, NEW):
        pass
    with pymongo.MongoClient[Document](mongo_set.uri()) as direct:
        there = {one["name"] for one in direct[mongo_uri.rpartition("/")[2].partition("?")[0]]["thing"].list_indexes()}
    missing = {schema.index_name(index) for index in NEW.indexes} - there
    assert bool(missing) is control


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=[pytest.mark.long, pytest.mark.timeout(900)])])
async def test_a_migration_that_is_killed_is_finished_by_the_next_start(
    kills: int, mongo_set: MongoSet, mongo_uri: str, tmp_path: Path
) -> None:
    """kill -9 at any moment of the first start: the next one goes on, and nothing is there twice or missing."""
    moments = random.Random(26)
    settings = {"mongo.uri": mongo_uri}
    command = [sys.executable, "-m", "mcp_control.testing.server", str(tmp_path / "data"), json.dumps(settings)]
    name = mongo_uri.rpartition("/")[2].partition("?")[0]
    early = 0
    with pymongo.MongoClient(mongo_set.uri()) as direct:
        for _ in range(kills):
            process = await asyncio.to_thread(_started, command)
            # Indexes appear one by one: it dies after a random number of them.
            wanted = len(direct[name].list_collection_names()) + moments.randrange(0, 8)
            began = time.monotonic()
            while process.poll() is None and time.monotonic() < began + 20:
                if len(direct[name].list_collection_names()) >= wanted or wanted > len(KINDS):
                    break
                await asyncio.sleep(0.005)
            os.kill(process.pid, signal.SIGKILL)
            told = process.communicate(timeout=20)[0]
            early += not told
        say(f"{early} of {kills} starts were killed before they answered")
        assert early >= 1, "no start was killed in the middle"
        async with running_cluster(tmp_path, mongo_uri, None, count=2) as cluster, cluster.direct(1) as client:
            await in_state(client, await submit(client, "it.nobody"), "queued")
            there = {one["name"] for one in direct[name]["task"].list_indexes()}
        async with _fresh(mongo_set) as fresh:
            assert there == {one["name"] for one in direct[fresh]["task"].list_indexes()}
        assert direct[name]["user"].count_documents({}) == 1, "one administrator"


def _started(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


@asynccontextmanager
async def _fresh(mongo: MongoSet) -> AsyncIterator[str]:
    """A database that one start made, undisturbed."""
    store = MongoStore(mongo.uri("upgrade_fresh"), node="fresh")
    await store.open(KINDS, lambda facts: None)
    await store.close()
    try:
        yield "upgrade_fresh"
    finally:
        mongo.drop("upgrade_fresh")


async def test_servers_are_replaced_one_by_one_without_an_error(mongo_uri: str, tmp_path: Path) -> None:
    """A rolling restart behind the load balancer: a client that repeats what was cut off sees no other error."""
    async with running_cluster(tmp_path, mongo_uri, None, count=2) as cluster, cluster.client() as client:
        statuses: list[int] = []
        ends = asyncio.Event()

        async def ask() -> None:
            while not ends.is_set():
                try:
                    statuses.append((await client.get(f"{API}/tasks", params={"limit": 1})).status_code)
                except httpx2.TransportError:
                    statuses.append(0)
                await asyncio.sleep(0.05)

        asking = asyncio.create_task(ask())
        for place in range(2):
            assert await asyncio.to_thread(cluster.servers[place].stop) == 0
            await asyncio.to_thread(cluster.servers[place].start)
        ends.set()
        await asking
        say(f"{len(statuses)} requests, {statuses.count(0)} cut off, {statuses.count(503)} sent elsewhere")
        assert set(statuses) <= {0, 200, 503}
        assert statuses.count(200) > len(statuses) * 0.7
