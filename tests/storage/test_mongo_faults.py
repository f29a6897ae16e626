"""The store on MongoDB when members and connections fail: one effect, the right outcome, and an answer within five seconds."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from pymongo import AsyncMongoClient

from mcp_control.kernel.changes import Change, StoredFact
from mcp_control.kernel.errors import OutcomeUnknown, StoreUnavailable
from mcp_control.storage.mongo.client import Document, Primary, database_of
from mcp_control.storage.mongo.facts import Tail
from mcp_control.storage.mongo.sequencer import NotPlacedError, Sequencer
from mcp_control.storage.mongo.store import MongoStore
from mcp_control.testing.databases import MongoSet
from mcp_control.testing.store_conformance import OTHER, THING, fact, thing, told

LEADS = pytest.mark.parametrize("lead", [True, False], ids=["leader", "other"])


@asynccontextmanager
async def serving(uri: str, heard: list[StoredFact], *, lead: bool) -> AsyncIterator[MongoStore]:
    """An open store; where it does not lead, another one does."""
    stores = [MongoStore(uri, node="n1")] + ([] if lead else [MongoStore(uri, node="n2")])
    stores[-1].lead = True
    for store in stores:
        await store.open((THING, OTHER), heard.extend if store is stores[0] else (lambda facts: None))
    try:
        yield stores[0]
    finally:
        for store in stores:
            await store.close()


async def _once(store: MongoStore, heard: list[StoredFact], ident: str, outcome: object) -> None:
    """Check that the change was applied exactly once, or not at all where it was said so."""
    (found,) = await store.get("thing", [ident])
    told_of = [item for item in await store.facts(0, 10_000) if item.fact.subject == ident]
    if outcome == [None]:
        assert found is not None
        assert found.version == 1
        await told(heard, 1)
        async with asyncio.timeout(15):
            while not told_of:
                told_of = [item for item in await store.facts(0, 10_000) if item.fact.subject == ident]
    assert len(told_of) <= 1


@LEADS
@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("command", ["commitTransaction", "insert", "update"])
async def test_lost_connections_leave_one_effect(
    mongo_uri: str, mongo_set: MongoSet, command: str, times: int, lead: bool
) -> None:
    """A connection that closes once or more often during a commit costs time; the change is applied once, and so are its facts."""
    heard: list[StoredFact] = []
    async with serving(mongo_uri, heard, lead=lead) as store:
        await store.commit([Change([thing("before")], (), [fact("before")])])
        await asyncio.to_thread(mongo_set.fail_command, command, times=times, closeConnection=True)
        change = Change([thing("a", tenant="t", name="n"), thing("before", 1)], (), [fact("a")])
        assert await store.commit([change]) == [None]
        await _once(store, heard, "a", [None])


@LEADS
@pytest.mark.parametrize("times", [1, 2])
async def test_a_commit_that_was_applied_and_not_confirmed_is_applied_once(
    mongo_uri: str, mongo_set: MongoSet, times: int, lead: bool
) -> None:
    """A write-concern error after the effect is asked again until a majority confirms; nothing happens twice."""
    heard: list[StoredFact] = []
    async with serving(mongo_uri, heard, lead=lead) as store:
        trouble = {"code": 91, "errmsg": "Replication is being shut down"}
        await asyncio.to_thread(mongo_set.fail_command, "commitTransaction", times=times, writeConcernError=trouble)
        assert await store.commit([Change([thing("a")], (), [fact("a")])]) == [None]
        await _once(store, heard, "a", [None])


async def test_a_commit_that_is_never_confirmed_is_unknown(mongo_uri: str, mongo_set: MongoSet) -> None:
    """Within five seconds the caller hears that nobody knows; once MongoDB answers again, what is there and what is told agree."""
    heard: list[StoredFact] = []
    async with serving(mongo_uri, heard, lead=True) as store:
        await asyncio.to_thread(mongo_set.fail_command, "commitTransaction", times=None, closeConnection=True)
        began = time.monotonic()
        with pytest.raises(OutcomeUnknown):
            await store.commit([Change([thing("a")], (), [fact("a")])])
        assert time.monotonic() - began < 6
        await asyncio.to_thread(mongo_set.clear_failures)
        assert await store.commit([Change([thing("b")], (), [fact("b")])]) == [None]
        (found,) = await store.get("thing", ["a"])
        await told(heard, 1 if found is None else 2)
        assert [item.fact.subject for item in heard] == (["b"] if found is None else ["a", "b"])


@LEADS
async def test_a_change_of_primary_is_ridden_out(mongo_uri: str, mongo_set: MongoSet, lead: bool) -> None:
    """Commits and reads that were under way when the primary stepped down end well, in order and once, and the election is seen."""
    heard: list[StoredFact] = []
    async with serving(mongo_uri, heard, lead=lead) as store:
        await store.commit([Change([thing("a")], (), [fact("0")])])
        before = store.elections
        stop = asyncio.Event()

        async def commit() -> int:
            version = 1
            while not stop.is_set():
                change = Change([thing("a", version)], (), [fact(f"{version}")])
                assert await store.commit([change]) == [None]
                version += 1
                (found,) = await store.get("thing", ["a"])
                assert found is not None
                assert found.version == version
            return version

        working = asyncio.ensure_future(commit())
        await asyncio.to_thread(mongo_set.step_down)
        await asyncio.sleep(1)
        stop.set()
        version = await working
        await told(heard, version)
        assert [item.fact.subject for item in heard] == [str(n) for n in range(version)]
        assert [item.seq for item in heard] == list(range(1, version + 1))
        assert store.elections > before


async def test_without_a_majority_callers_hear_within_five_seconds(mongo_uri: str, mongo_set: MongoSet) -> None:
    """Two members gone: writes and reads are refused in time and nothing hangs; when they are back, all goes on by itself."""
    heard: list[StoredFact] = []
    async with serving(mongo_uri, heard, lead=True) as store:
        await store.commit([Change([thing("a")], (), [fact("a")])])
        primary = await asyncio.to_thread(mongo_set.primary)
        gone = [index for index in range(3) if index != primary]
        for index in gone:
            await asyncio.to_thread(mongo_set.kill, index)
        began = time.monotonic()
        calls = [store.commit([Change([thing(f"w{n}")], (), [fact(f"w{n}")])]) for n in range(3)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} <= {OutcomeUnknown, StoreUnavailable}
        assert time.monotonic() - began < 6
        async with asyncio.timeout(20):
            while store.writable:  # noqa: ASYNC110  the state of a remote server, without an event
                await asyncio.sleep(0.1)
        began = time.monotonic()
        with pytest.raises(StoreUnavailable):
            await store.get("thing", ["a"])
        assert time.monotonic() - began < 6
        for index in gone:
            await asyncio.to_thread(mongo_set.start, index)
        await asyncio.to_thread(mongo_set.wait_healthy)
        assert await store.commit([Change([thing("back")], (), [fact("back")])]) == [None]
        kept = [found.id for found in await store.get("thing", ["a", "w0", "w1", "w2", "back"]) if found is not None]
        await told(heard, len(kept))
        assert sorted(item.fact.subject for item in heard) == sorted(kept)


async def test_what_a_call_waits_for_others_is_part_of_its_time(mongo_uri: str, mongo_set: MongoSet) -> None:
    """However slow commits are, each call hears within five seconds of its own, also those that came while another one was under way."""
    waited: list[float] = []

    async def commit(number: int) -> object:
        began = time.monotonic()
        try:
            return await store.commit([Change([thing(f"w{number}")], (), [fact(f"w{number}")])])
        except (OutcomeUnknown, StoreUnavailable) as problem:
            return problem
        finally:
            waited.append(time.monotonic() - began)

    async with serving(mongo_uri, [], lead=True) as store:
        assert await commit(0) == [None]
        await asyncio.to_thread(
            mongo_set.fail_command, "commitTransaction", times=None, blockConnection=True, blockTimeMS=3500
        )
        calls = []
        for number in range(1, 5):
            calls.append(asyncio.ensure_future(commit(number)))
            await asyncio.sleep(0)  # the first begins before the others come
        await asyncio.gather(*calls)
        await asyncio.to_thread(mongo_set.clear_failures)
        assert max(waited) < 5.5
        assert await commit(5) == [None], "what was left open does not stand in the way"


async def test_a_commit_waits_for_nobody_who_gives_facts_their_places(mongo_uri: str) -> None:
    """Where somebody has the turn, or is next as it becomes free, a commit goes on without it at once."""
    client: AsyncMongoClient[Document] = AsyncMongoClient(mongo_uri)
    primary, database = Primary(client), database_of(client)
    tail = Tail(primary, database, lambda facts: None, 0, lambda _: None)
    sequencer = Sequencer(client, primary, database, tail, lambda topic, message: None)
    await sequencer.turn.acquire()
    following = asyncio.ensure_future(sequencer.turn.acquire())
    await asyncio.sleep(0)
    for _ in ("held", "free, but promised"):
        with pytest.raises(NotPlacedError):
            async with sequencer.turn_at_once():
                pass
        if not following.done():
            sequencer.turn.release()
    await following
    sequencer.turn.release()
    async with sequencer.turn_at_once():
        assert sequencer.turn.locked()
    await client.close()
