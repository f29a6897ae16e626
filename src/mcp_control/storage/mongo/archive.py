"""The database of a product as a whole: read at one moment beside running servers, or written anew.

A reader works in one snapshot session, whose history MongoDB keeps for 300 s unless `minSnapshotHistoryWindowInSeconds` says more. A
database that is being written carries a mark, and no server opens it until the mark is gone.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Final

import msgspec
from pymongo import DeleteMany, InsertOne, ReplaceOne
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import BulkWriteError, OperationFailure, PyMongoError

from mcp_control.kernel.changes import Entity, Fact, Kind, StoredFact
from mcp_control.kernel.errors import StoreUnavailable
from mcp_control.storage.mongo import schema
from mcp_control.storage.mongo.batch import pack, unpack
from mcp_control.storage.mongo.client import Client, Database, Document, connect, database_of, unavailable
from mcp_control.storage.mongo.documents import SEPARATOR, Shape, all_parts, entity, part_id, split_cold
from mcp_control.storage.mongo.facts import HEAD, newest_seq

_PAGE_BYTES: Final = 4 << 20
_PAGE_ROWS: Final = 1000
_FACT_DOCUMENTS: Final = 100
_FACTS: Final = 10_000
_RANGES: Final = 100
_TOO_OLD: Final = (239, 246)  # SnapshotTooOld, SnapshotUnavailable
_encode_fact: Final = msgspec.msgpack.Encoder().encode


class MongoArchive:
    """An `Archive` over a database.

    Args:
        uri: see `MongoStore`.
        alive: kind and field that say until when a server is alive, in milliseconds on the database's clock.
    """

    def __init__(self, uri: str, *, alive: tuple[str, str]) -> None:
        self._uri = uri
        self._alive = alive

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator["MongoSnapshot"]:
        """See `Archive.snapshot`."""
        async with opened(self._uri) as (client, database), _snapshot(client, database) as found:
            if not found.kinds:
                raise StoreUnavailable(f"there is no store in the database {database.name}")
            yield found

    @asynccontextmanager
    async def loading(self, kinds: Sequence[Kind], *, replace: bool) -> AsyncIterator["MongoLoading"]:
        """See `Archive.loading`."""
        async with opened(self._uri) as (client, database):
            await self._check_resting(client, database)
            shapes = [Shape(kind) for kind in kinds]
            if not replace and await _holds_something(database):
                raise StoreUnavailable(f"the database {database.name} holds a store already; it was not touched")
            await schema.begin_load(database)
            await schema.migrate(database, shapes)
            yield MongoLoading(client, database, shapes)

    @asynccontextmanager
    async def resting(self) -> AsyncIterator[None]:
        """See `Archive.resting`. Looks once: nothing keeps a server from starting afterwards."""
        async with opened(self._uri) as (client, database):
            await self._check_resting(client, database)
            yield

    async def alive(self) -> list[bytes]:
        """Return what servers that are there say of themselves: their hot bytes."""
        async with opened(self._uri) as (client, database):
            kind, _ = self._alive
            return [document["h"] async for document in database[kind].find(await self._living(client), {"h": 1})]

    async def contract(self, kinds: Sequence[Kind], *, drop: bool) -> list[str]:
        """See `schema.contract`."""
        async with opened(self._uri) as (_, database):
            return await schema.contract(database, [Shape(kind) for kind in kinds], drop=drop)

    async def _check_resting(self, client: Client, database: Database) -> None:
        kind, _ = self._alive
        count = await database[kind].count_documents(await self._living(client))
        if count:
            raise StoreUnavailable(f"the database {database.name} is in use by {count} server(s); stop them first")

    async def _living(self, client: Client) -> Document:
        now: datetime = (await client.admin.command("hello"))["localTime"].replace(tzinfo=UTC)
        return {f"i.{self._alive[1]}": {"$gt": round(now.timestamp() * 1000)}}


@asynccontextmanager
async def opened(uri: str) -> AsyncIterator[tuple[Client, Database]]:
    """Connect, and put the driver's errors into the product's words. Raises StoreUnavailable."""
    client = connect(uri, name="archive")
    try:
        yield client, database_of(client)
    except OperationFailure as error:
        if error.code in _TOO_OLD:
            raise StoreUnavailable(
                "MongoDB keeps its history for too short a time; raise minSnapshotHistoryWindowInSeconds above the time this takes"
            ) from None
        raise unavailable(error) from None
    except PyMongoError as error:
        raise unavailable(error) from None
    finally:
        await client.close()


@asynccontextmanager
async def _snapshot(client: Client, database: Database) -> AsyncIterator["MongoSnapshot"]:
    async with client.start_session(causal_consistency=False, snapshot=True) as session:
        found = MongoSnapshot(database, session)
        await found.begin()
        yield found


async def _holds_something(database: Database) -> bool:
    """Whether there is a store that was finished and is not empty."""
    known = {document["_id"]: document async for document in database[schema.META].find({})}
    if schema.INCOMPLETE in known:
        return False
    for name in known:
        if name.startswith("kind:") and await database[name.removeprefix("kind:")].find_one({}, {"_id": 1}):
            return True
    return False


class MongoSnapshot:
    """A `Snapshot` in one snapshot session. Facts that wait for their place get the one they would have got then."""

    def __init__(self, database: Database, session: AsyncClientSession) -> None:
        self._database = database
        self._session = session
        self._shapes: dict[str, Shape] = {}
        self._pending: list[StoredFact] = []
        self.kinds: tuple[Kind, ...] = ()
        self.newest_seq = 0

    async def begin(self) -> None:
        """Fix the moment, with the first read, and look at what there is."""
        session = self._session
        database = self._database
        known = {document["_id"]: document async for document in database[schema.META].find({}, session=session)}
        if known.get("layout", {}).get("n", 0) > schema.LAYOUT:
            raise StoreUnavailable("the store was written by a newer version; take the program of that version")
        names = sorted(name for name in known if name.startswith("kind:"))
        self.kinds = tuple(msgspec.json.decode(known[name]["declared"], type=Kind) for name in names)
        self._shapes = {kind.name: Shape(kind) for kind in self.kinds}
        placed = await newest_seq(database, session)
        waiting = await database[schema.PENDING].find({}, sort=[("ts", 1)], session=session).to_list()
        facts: list[Fact] = []
        for document in waiting:
            facts += unpack(document["d"])
        self._pending = [StoredFact(seq, fact) for seq, fact in enumerate(facts, int(placed) + 1)]
        self.newest_seq = int(placed) + len(facts)

    async def entities(self, kind: str) -> AsyncIterator[Sequence[Entity]]:
        """See `Snapshot.entities`."""
        page: list[Document] = []
        size = 0
        cursor = self._database[kind].find({}, sort=[("_id", 1)], session=self._session, batch_size=_PAGE_ROWS)
        async with cursor:
            async for document in cursor:
                page.append(document)
                size += len(document["h"]) + sum(map(len, document.get("c", {}).values()))
                if size >= _PAGE_BYTES or len(page) >= (_RANGES if document.get("x") else _PAGE_ROWS):
                    yield await self._whole(kind, page)
                    page, size = [], 0
        if page:
            yield await self._whole(kind, page)

    async def _whole(self, kind: str, page: list[Document]) -> list[Entity]:
        """Return the entities of documents, with the parts that lie outside."""
        shape = self._shapes[kind]
        pieces: dict[str, dict[str, bytes]] = {document["_id"]: {} for document in page}
        apart = [document["_id"] for document in page if document.get("x")]
        for start in range(0, len(apart), _RANGES):
            ranges = [{"_id": all_parts(one)} for one in apart[start : start + _RANGES]]
            async for found in self._database[shape.parts].find({"$or": ranges}, session=self._session):
                owner, _, name = found["_id"].partition(SEPARATOR)
                pieces[owner][name] = found["b"]
        return [entity(shape, document, pieces[document["_id"]]) for document in page]

    async def facts(self, after: int = 0) -> AsyncIterator[Sequence[StoredFact]]:
        """See `Snapshot.facts`."""
        page: list[StoredFact] = []
        cursor = self._database[schema.FACTS].find(
            {"last": {"$gt": after}},
            {"d": 1},
            sort=[("last", 1)],
            session=self._session,
            batch_size=_FACT_DOCUMENTS,
        )
        async with cursor:
            async for document in cursor:
                placed = (StoredFact(seq, fact) for seq, fact in enumerate(unpack(document["d"]), int(document["_id"])))
                page += [stored for stored in placed if stored.seq > after]
                if len(page) >= _FACTS:
                    yield page
                    page = []
        page += [stored for stored in self._pending if stored.seq > after]
        if page:
            yield page


class MongoLoading:
    """A `Loading` into a database that carries the mark."""

    def __init__(self, client: Client, database: Database, shapes: Sequence[Shape]) -> None:
        self._client = client
        self._database = database
        self._shapes = {shape.name: shape for shape in shapes}
        self._fresh = True  # nothing was read back yet, so what comes is new

    async def put(self, kind: str, entities: Sequence[Entity]) -> None:
        """See `Loading.put`."""
        shape = self._shapes[kind]
        documents = []
        parts: list[Document] = []
        for one in entities:
            known = {name: data for name, data in one.cold.items() if name.partition("/")[0] in shape.cold}
            inside, outside = split_cold(known)
            values = {name: value for name, value in one.index.items() if name in shape.types}
            document: Document = {"_id": one.id, "v": one.version, "h": one.hot, "i": shape.check_index(values)}
            if inside:
                document["c"] = inside
            if outside:
                document["x"] = sorted({name.partition("/")[0] for name in outside})
                parts += [{"_id": part_id(one.id, name), "b": data} for name, data in outside.items()]
            documents.append(document)
        try:
            if not self._fresh:
                await self._forget_parts(shape, [one.id for one in entities])
            await self._database[kind].bulk_write(
                [
                    InsertOne(document) if self._fresh else ReplaceOne({"_id": document["_id"]}, document, upsert=True)
                    for document in documents
                ],
                ordered=False,
            )
            if parts:
                await self._database[shape.parts].insert_many(parts, ordered=False)
        except BulkWriteError as error:
            first = (error.details or {}).get("writeErrors", [{}])[0].get("code")
            raise StoreUnavailable(
                f"a {kind} cannot be written (code {first}); restore into an empty database"
            ) from None

    async def _forget_parts(self, shape: Shape, ids: Sequence[str]) -> None:
        if shape.cold and ids:
            await self._database[shape.parts].bulk_write([DeleteMany({"_id": all_parts(one)}) for one in ids])

    async def drop(self, kind: str, ids: Sequence[str]) -> None:
        """See `Loading.drop`."""
        await self._forget_parts(self._shapes[kind], ids)
        await self._database[kind].delete_many({"_id": {"$in": list(ids)}})

    async def append(self, facts: Sequence[StoredFact]) -> None:
        """See `Loading.append`."""
        for start in range(0, len(facts), _FACTS):
            some = facts[start : start + _FACTS]
            packed = pack([_encode_fact(stored.fact) for stored in some], len(some))
            row = {
                "_id": some[0].seq,
                "last": some[-1].seq,
                "at": max(stored.fact.at for stored in some),
                "d": packed,
            }
            await self._database[schema.FACTS].insert_one(row)

    @asynccontextmanager
    async def loaded(self) -> AsyncIterator[MongoSnapshot]:
        """See `Loading.loaded`."""
        self._fresh = False
        async with _snapshot(self._client, self._database) as found:
            yield found

    async def finish(self, newest_seq: int) -> None:
        """See `Loading.finish`."""
        await self._database[schema.FACTS].update_one({"_id": HEAD}, {"$max": {"newest": newest_seq}}, upsert=True)
        await schema.end_load(self._database)
