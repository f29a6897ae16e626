"""What the store on MongoDB does beyond the port: hostile values, its layout, several servers, addresses, refusals."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from pymongo import MongoClient

from mcp_control.app import KINDS
from mcp_control.kernel.changes import Change, Field, Index, Key, Kind, Query, StoredFact, Where
from mcp_control.kernel.errors import Conflict, Duplicate, StoreUnavailable
from mcp_control.storage.mongo.archive import MongoArchive
from mcp_control.storage.mongo.client import connect, findings
from mcp_control.storage.mongo.documents import Shape, conditions, phases
from mcp_control.storage.mongo.store import MongoStore
from mcp_control.testing.databases import MongoSet, free_ports
from mcp_control.testing.store_conformance import OTHER, THING, fact, thing, told


@asynccontextmanager
async def serving(
    uri: str,
    heard: list[StoredFact] | None = None,
    *,
    node: str = "n1",
    lead: bool = True,
    kinds: Sequence[Kind] = (THING, OTHER),
) -> AsyncIterator[MongoStore]:
    """An open store, closed at the end."""
    store = MongoStore(uri, node=node)
    store.lead = lead
    await store.open(kinds, ([] if heard is None else heard).extend)
    try:
        yield store
    finally:
        await store.close()


HOSTILE = ("$secret", "$$ROOT", "$where", "a.b", "{'$gt': ''}", "\x00", "", "$set", "ünï \U0001f600", "i.name")


async def test_values_are_never_operators_or_expressions(mongo_uri: str) -> None:
    """Whatever an id, an index value, hot bytes or the name of a piece look like, they are stored, found and returned as they are."""
    async with serving(mongo_uri) as store:
        for at, value in enumerate(HOSTILE):
            ident = f"{value}{at}"
            cold = {"payload": value.encode(), f"output/{value}": b"x" * at}
            made = thing(ident, hot=value.encode(), state=value, tenant="t", name=ident, cold=cold)
            assert await store.commit([Change([made], (), [fact(value)])]) == [None]
            changed = thing(
                ident, 1, hot=b"$v" + value.encode(), state=value, tenant=value, name=value, cold={"payload": b"$h"}
            )
            assert await store.commit([Change([changed])]) == [None]
            assert isinstance((await store.commit([Change([thing(ident, 1, state=value)])]))[0], Conflict)
            (found,) = await store.get("thing", [ident], ["payload", "output"])
            assert found is not None
            assert (found.hot, found.index["state"], found.index["tenant"]) == (changed.hot, value, value)
            assert found.cold == {"payload": b"$h", f"output/{value}": b"x" * at}
            twin = thing(f"twin{at}", tenant=value, name=value)
            (taken,) = await store.commit([Change([twin])])
            assert isinstance(taken, Duplicate)
            assert taken.data["existing"] == ident
            for where in (Where("state", "eq", value), Where("state", "in", [value]), Where("id", "eq", ident)):
                assert [row.id for row in await store.find("thing", Query(where=[where]))] == [ident]
                assert await store.count("thing", [where], 9) == 1
            page = Query(where=[Where("tenant", "ge", value)], order="tenant", after=[value, ""], limit=1)
            assert [row.id for row in await store.find("thing", page)] == [ident]


async def test_parts_move_between_document_and_outside(mongo_uri: str) -> None:
    """A part reads as it was last written, whether small, large, or in pieces; a delete takes all of it along."""
    async with serving(mongo_uri) as store:
        small, large = b"s", b"L" * 3_000_000
        for version, part in enumerate((small, large, small, large, b"")):
            assert await store.commit([Change([thing("a", version, cold={"payload": part})])]) == [None]
            (found,) = await store.get("thing", ["a"], ["payload"])
            assert found is not None
            assert found.cold == {"payload": part}
        with MongoClient(mongo_uri) as client:
            assert client.get_default_database()["thing.parts"].count_documents({}) == 0, (
                "an emptied part takes no room outside"
            )
        pieces = {f"output/{n}": b"%d" % n for n in range(300)}
        await store.commit(
            [Change([thing("a", 5, cold={**pieces, "output": large}), thing("a\x21", cold={"output": b"near"})])]
        )
        (found,) = await store.find("thing", Query(where=[Where("id", "eq", "a")], cold=["output", "payload"]))
        assert found.cold == {**pieces, "output": large, "payload": b""}
        changes = [Change((), [Key("thing", "a", 6)]), Change([thing("a", cold={"output/1": b"new"})])]
        assert await store.commit(changes) == [None, None]
        found_, near = await store.get("thing", ["a", "a\x21"], ["output", "payload"])
        assert found_ is not None
        assert found_.cold == {"output/1": b"new"}
        assert near is not None
        assert near.cold == {"output": b"near"}


async def test_a_batch_larger_than_a_message_goes_through(mongo_uri: str) -> None:
    """A call is one transaction even when its bytes fill several commands."""
    async with serving(mongo_uri) as store:
        changes = [
            Change([thing(f"b{n}", hot=b"h" * 1_000_000, cold={"payload": b"p" * 1_000_000})]) for n in range(10)
        ]
        assert await store.commit(changes) == [None] * 10
        assert await store.count("thing", (), 100) == 10
        with pytest.raises(ValueError, match="larger than"):
            await store.commit([Change([thing("huge", hot=bytes(16 << 20))])])


async def test_one_change_may_swap_unique_values(mongo_uri: str) -> None:
    """A change is judged by what it leads to; values may change hands within it, and in a row of changes."""
    async with serving(mongo_uri) as store:
        await store.commit([Change([thing("a", tenant="t", name="1"), thing("b", tenant="t", name="2")])])
        swap = Change([thing("a", 1, tenant="t", name="2"), thing("b", 1, tenant="t", name="1")])
        assert await store.commit([swap]) == [None]
        row = [
            Change([thing("c", tenant="t", name="1")]),
            Change([thing("b", 2, tenant="t")]),
            Change([thing("c", tenant="t", name="1")]),
            Change((), [Key("thing", "c", 1)]),
            Change([thing("c", tenant="t", name="1"), thing("d", tenant="t", name="3")]),
        ]
        first, *rest = await store.commit(row)
        assert isinstance(first, Duplicate)
        assert first.data == {"index": "thing_name", "existing": "b"}
        assert rest == [None] * 4


# --- queries and indexes ----------------------------------------------------------------------------------------------

_QUERIES: list[tuple[str, Query]] = [
    ("task", Query(where=[Where("waiting", "eq", "lane\x1f050")], limit=50)),
    (
        "task",
        Query(
            where=[Where("waiting", "ge", "lane\x1f"), Where("waiting", "lt", "lane\x20")], order="waiting", limit=50
        ),
    ),
    (
        "task",
        Query(where=[Where("waiting", "ge", "a"), Where("waiting", "lt", "b")], order="waiting", after=["a1", "x"]),
    ),
    ("task", Query(where=[Where("due", "le", 5)], order="due")),
    ("task", Query(where=[Where("due", "le", 5)], order="due", after=[3, "x"])),
    ("task", Query(where=[Where("state", "eq", "queued")], after=["x"], limit=2000)),
    (
        "task",
        Query(where=[Where("state", "eq", "queued"), Where("id", "ge", "a"), Where("id", "lt", "b")], descending=True),
    ),
    ("task", Query(where=[Where("type", "eq", "t")], descending=True, after=["x"])),
    ("task", Query(where=[Where("run", "eq", "r")])),
    ("task", Query(where=[Where("agent", "eq", "a")], descending=True)),
    ("task", Query(where=[Where("holder", "eq", "i")])),
    ("task", Query(where=[Where("unique_key", "eq", "k")], limit=1)),
    ("task", Query(where=[Where("finished", "lt", 5)], order="finished")),
    ("task", Query(descending=True, after=["x"])),
    ("log", Query(where=[Where("task", "eq", "t"), Where("first", "gt", 5)], order="first")),
    ("log", Query(where=[Where("task", "eq", "t"), Where("first", "le", 5)], order="first", descending=True, limit=1)),
    ("run", Query(where=[Where("state", "in", ["running", "waiting"])], after=["x"])),
    ("run", Query(where=[Where("pipeline", "eq", "p")], descending=True)),
    ("run", Query(where=[Where("unique_key", "eq", "k")], limit=1)),
    ("run", Query(where=[Where("due", "le", 5)], order="due")),
    ("run", Query(where=[Where("finished", "lt", 5)], order="finished")),
    ("pipeline", Query(where=[Where("name_number", "eq", "k")], limit=1)),
    (
        "pipeline",
        Query(where=[Where("latest", "ge", "t"), Where("latest", "lt", "u")], order="latest", after=["t1", "x"]),
    ),
    ("pipeline", Query(where=[Where("latest", "eq", "k")], limit=1)),
    ("limit_rule", Query(where=[Where("name", "ge", "t"), Where("name", "lt", "u")], order="name", descending=True)),
    ("share", Query(where=[Where("name", "ge", "t"), Where("name", "lt", "u")], order="name", after=["t1", "x"])),
    ("agent", Query(where=[Where("state", "eq", "retired")])),
    ("agent", Query(where=[Where("name", "eq", "n"), Where("tenant", "eq", "t")], limit=1)),
    ("agent", Query(after=["x"], limit=1000)),
    ("instance", Query(where=[Where("agent", "eq", "a")])),
    ("instance", Query(where=[Where("lease_until", "lt", 5)], order="lease_until")),
    ("artifact", Query(where=[Where("sha256", "eq", "s")])),
    ("artifact", Query(where=[Where("run", "eq", "r")], after=["x"])),
    ("artifact", Query(where=[Where("tenant", "eq", "t")], order="created", descending=True, after=[5, "x"])),
    ("blob_check", Query(where=[Where("due", "le", 5)], order="due")),
    ("user", Query(where=[Where("name", "eq", "n"), Where("tenant", "eq", "t")], limit=1)),
    ("api_token", Query(where=[Where("owner", "eq", "o")])),
    ("credential", Query(where=[Where("agent", "eq", "a")])),
    ("enrolment", Query(where=[Where("expires", "lt", 5)], order="expires")),
]


async def test_every_query_of_the_product_is_led_by_an_index(mongo_uri: str) -> None:
    """No collection is scanned and nothing is sorted in memory; the negative control, a field in no index, is."""
    shapes = {kind.name: Shape(kind) for kind in KINDS}
    async with serving(mongo_uri, kinds=KINDS):
        with MongoClient(mongo_uri) as client:
            database = client.get_default_database()

            def stages(kind: str, find: dict[str, object]) -> set[str]:
                plan = database.command({"explain": {"find": kind, **find}, "verbosity": "queryPlanner"})
                return set(_stages(plan["queryPlanner"]["winningPlan"]))

            for kind, query in _QUERIES:
                for condition, order in phases(shapes[kind], query):
                    found = stages(kind, {"filter": condition, "sort": dict(order), "limit": query.limit})
                    assert found & {"IXSCAN", "IDHACK"}, (kind, query, found)
                    assert not found & {"COLLSCAN", "SORT"}, (kind, query, found)
                counted = conditions(shapes[kind], query.where)
                if counted:
                    assert "COLLSCAN" not in stages(kind, {"filter": {"$and": counted}})
            assert "COLLSCAN" in stages("log", {"filter": {"i.nowhere": {"$eq": "x"}}})


def _stages(plan: object) -> list[str]:
    if isinstance(plan, dict):
        own = [plan["stage"]] if "stage" in plan else []
        return own + [name for value in plan.values() for name in _stages(value)]
    if isinstance(plan, list):
        return [name for value in plan for name in _stages(value)]
    return []


async def test_indexes_are_added_at_open_and_dropped_on_demand(mongo_uri: str) -> None:
    """A newer declaration leaves what older servers use; `contract` removes it. Several servers may open at once."""
    newer = Kind(
        name="thing",
        fields=THING.fields,
        indexes=(Index("thing_due", ("due", "id")), Index("thing_state", ("state", "id"))),
        cold=THING.cold,
    )
    async with serving(mongo_uri) as old:
        stores = [MongoStore(mongo_uri, node=f"m{n}") for n in range(3)]
        await asyncio.gather(*(store.open((newer, OTHER), lambda facts: None) for store in stores))
        first = Change([thing("a", tenant="t", name="n")])
        assert await old.commit([first]) == [None]
        assert isinstance((await old.commit([Change([thing("b", tenant="t", name="n")])]))[0], Duplicate)
        archive = MongoArchive(mongo_uri, alive=("node", "until"))
        surplus = ["thing.thing_name:tenant,name:unique", "thing.thing_state:tenant,state,id"]
        with pytest.raises(StoreUnavailable, match="not of this version"):
            await archive.contract((THING, OTHER), drop=True)
        assert sorted(await archive.contract((newer, OTHER), drop=False)) == surplus
        assert sorted(await archive.contract((newer, OTHER), drop=True)) == surplus
        assert await archive.contract((newer, OTHER), drop=True) == []
        assert await stores[2].commit([Change([thing("c", tenant="t", name="n")])]) == [None]
        for store in stores:
            await store.close()


async def test_what_a_newer_version_wrote_is_refused(mongo_uri: str) -> None:
    """A layout of a later version, and a field that changed its type, are refused at open with what to do."""
    async with serving(mongo_uri):
        pass
    other = Kind(name="thing", fields=(Field("due", "text"),))
    with pytest.raises(StoreUnavailable, match="give it a new name"):
        await MongoStore(mongo_uri, node="n").open((other,), lambda facts: None)
    with MongoClient(mongo_uri) as client:
        client.get_default_database()["store.meta"].update_one({"_id": "layout"}, {"$set": {"n": 99}})
    with pytest.raises(StoreUnavailable, match="newer version"):
        await MongoStore(mongo_uri, node="n").open((THING,), lambda facts: None)


# --- several servers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "leads", [(True, False), (False, False), (True, True)], ids=["one-leads", "nobody-leads", "both-lead"]
)
@pytest.mark.parametrize("bus", [True, False], ids=["bus", "no-bus"])
async def test_servers_tell_the_same_facts_in_the_same_order(
    mongo_uri: str, leads: tuple[bool, bool], bus: bool
) -> None:
    """Two servers that race for the same entities lose nothing, and hear one gapless history in which effects come after causes."""
    heard: tuple[list[StoredFact], list[StoredFact]] = ([], [])
    async with (
        serving(mongo_uri, heard[0], lead=leads[0]) as one,
        serving(mongo_uri, heard[1], node="n2", lead=leads[1]) as two,
    ):
        if bus:

            def announce(topic: str, message: bytes) -> None:
                for store in (one, two):
                    asyncio.get_running_loop().call_soon(store.hear, topic, message)

            one.announce = two.announce = announce
        won: dict[str, int] = {}

        async def client(store: MongoStore, number: int) -> None:
            for step in range(12):
                ident = f"e{(number + step) % 4}"
                (found,) = await store.get("thing", [ident])
                version = 0 if found is None else found.version
                told_of = fact(f"{ident}@{version + 1}")
                (outcome,) = await store.commit([Change([thing(ident, version, hot=b"%d" % number)], (), [told_of])])
                if outcome is None:
                    won[ident] = won.get(ident, 0) + 1
                    assert ((await store.get("thing", [ident]))[0] or thing("")).version > version
                else:
                    assert isinstance(outcome, Conflict)

        await asyncio.gather(*(client(store, number) for number in range(4) for store in (one, two)))
        total = sum(won.values())
        for facts in heard:
            await told(facts, total)
        assert heard[0] == heard[1] == await two.facts(0, 1000)
        assert [item.seq for item in heard[0]] == list(range(1, total + 1))
        for ident, count in won.items():
            versions = [item.fact.subject for item in heard[0] if item.fact.subject.startswith(f"{ident}@")]
            assert versions == [f"{ident}@{n}" for n in range(1, count + 1)]


async def test_a_killed_servers_transaction_is_ended_by_another(mongo_uri: str) -> None:
    """Documents that a server held when it was killed are free once its sessions are ended; until then they are not."""
    code = (
        "import sys; from pymongo import MongoClient\n"
        "c = MongoClient(sys.argv[1]); s = c.start_session(); s.start_transaction()\n"
        "c.get_default_database()['thing'].update_one({'_id': 'a'}, {'$set': {'h': b'held'}}, session=s)\n"
        "print(s.session_id['id'].hex(), flush=True); sys.stdin.read()\n"
    )
    async with serving(mongo_uri) as store:
        await store.commit([Change([thing("a")])])
        assert len(store.session_ids()) == 2
        holder = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, mongo_uri, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert holder.stdout is not None
        session = bytes.fromhex((await holder.stdout.readline()).decode().strip())
        holder.kill()
        await holder.wait()
        waiting = asyncio.ensure_future(store.commit([Change([thing("a", 1, hot=b"free")])]))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(waiting), 0.5)
        await store.end_sessions([session])
        assert await waiting == [None]


async def test_facts_of_a_killed_sequencer_are_taken_over(mongo_uri: str) -> None:
    """When the server that gives facts their order dies, another does so after a second; nothing is lost or told twice."""
    heard: list[StoredFact] = []
    async with serving(mongo_uri, heard, lead=False) as store:
        code = (
            "import asyncio, sys; from tests.storage import mongo_leading; asyncio.run(mongo_leading.main(sys.argv[1]))"
        )
        leader = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, mongo_uri, stdout=asyncio.subprocess.PIPE, cwd=os.getcwd()
        )
        assert leader.stdout is not None
        while not (line := (await leader.stdout.readline()).decode()).startswith("sessions "):
            assert line, "the leader ended"
        sessions = [bytes.fromhex(one) for one in line.split()[1:]]
        made = 0
        for round_ in range(30):
            if round_ == 15:
                leader.send_signal(signal.SIGKILL)
                await leader.wait()
                await store.end_sessions(sessions)  # as the next leader does for a server that is gone
            assert await store.commit([Change((), (), [fact(f"mine{round_}")])]) == [None]
            made += 1
        async with asyncio.timeout(15):
            while sum(item.fact.subject.startswith("mine") for item in heard) < made:  # noqa: ASYNC110  a callback without an event
                await asyncio.sleep(0.01)
        assert [item.seq for item in heard] == list(range(heard[0].seq, heard[0].seq + len(heard)))
        mine = [item.fact.subject for item in heard if item.fact.subject.startswith("mine")]
        assert mine == [f"mine{n}" for n in range(30)]
        assert await store.facts(heard[0].seq - 1, 10_000) == heard


# --- addresses and refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    [
        "w=1",
        "readConcernLevel=local",
        "readPreference=secondary",
        "retryWrites=false",
        "journal=false",
        "directConnection=true",
    ],
)
async def test_an_address_that_weakens_the_promises_is_refused(option: str) -> None:
    """The option is named and the rest of the address is not repeated."""
    with pytest.raises(StoreUnavailable) as caught:
        connect(f"mongodb://user:hunter2@h1.invalid/db?{option}", name="n")
    assert option.partition("=")[0] in caught.value.detail
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "mongodb://user:hunter2@:x",
        "mongodb://us:er:hunter2@h/db",
        "hunter2",
        "mongodb://u:hunter2@h/?w=majority&nonsense",
        "mongodb://u:hunter2@h:99999/",
    ],
)
async def test_credentials_are_never_in_errors(uri: str) -> None:
    """An address that cannot be used is refused without a part of it in the message, its cause or its repr."""
    with pytest.raises(StoreUnavailable) as caught:
        await MongoStore(uri, node="n").open((THING,), lambda facts: None)
    error: BaseException | None = caught.value
    while error is not None:
        assert "hunter2" not in f"{error} {error!r}"
        error = error.__cause__
    assert "hunter2" not in repr(MongoStore(uri, node="n"))


async def test_a_database_that_is_down_is_said_to_be(mongo_set: MongoSet) -> None:
    """Opening against nothing ends within five seconds with what is wrong."""
    (port,) = free_ports(1)
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="no primary"):
        await MongoStore(f"mongodb://127.0.0.1:{port}/?replicaSet=rs", node="n").open((THING,), lambda facts: None)
    assert time.monotonic() - began < 6


async def test_the_deployment_is_looked_at(mongo_uri: str) -> None:
    """Members, arbiters, journals and timings of the replica set are checked; the clock of the primary is compared."""
    async with connect(mongo_uri, name="doctor") as client:
        found = await findings(client)
    assert not [finding for finding in found if finding.level == "fail"]
    assert any("3 members" in finding.what for finding in found)
    async with serving(mongo_uri) as store:
        assert store.writable
        assert store.primary is not None
        assert store.elections == 0
        assert abs(await store.offset_ms()) < 250
        assert all("majority acknowledges" not in warning for warning in store.warnings)
    assert not store.writable
