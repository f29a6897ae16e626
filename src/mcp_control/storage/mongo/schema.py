"""Collections and indexes made from the declarations of kinds, and their migration by expand and contract.

Opening only adds: a server of the version before, which may still run, finds everything it needs. What no declaration names any more is
removed by `contract`, once all servers are of the new version. Every step can be repeated, so a server that died in the middle, or several
that start at once, do no harm. The store's own collections begin with `store.`, which no kind can.

A unique index holds documents that have all its fields: to MongoDB two missing values are equal, to the port nulls never collide.
"""

import asyncio
from collections.abc import Sequence
from typing import Final

import msgspec
from bson.binary import Binary
from pymongo.errors import OperationFailure

from mcp_control.kernel.changes import Index, Kind
from mcp_control.kernel.errors import StoreUnavailable
from mcp_control.storage.mongo.client import Database, Document
from mcp_control.storage.mongo.documents import Shape

META: Final = "store.meta"
FACTS: Final = "store.facts"
PENDING: Final = "store.pending"
INCOMPLETE: Final = "incomplete"  # the mark of a database that is being filled from elsewhere
LAYOUT: Final = 1  # counts changes of the store's own collections
_DUPLICATE_KEY: Final = 11000
_EXISTS: Final = 48
_AT_ONCE: Final = 4  # kinds migrated side by side


def index_name(index: Index) -> str:
    """Return the name of an index: one whose fields changed is another, so that both can be there for a while."""
    return f"{index.name}:{','.join(index.fields)}" + (":unique" if index.unique else "")


def declared_name(name: str) -> str:
    """Return the declared name of an index from its name in MongoDB."""
    return name.partition(":")[0]


def index_specs(shape: Shape) -> list[Document]:
    """Return the indexes of a kind as `createIndexes` takes them. Rows whose first field is null are left out.

    Every index ends with the id, which every order ends with; a unique one holds each value once and needs it not.
    """
    return [
        {
            "name": index_name(index),
            "key": {shape.path(name): 1 for name in index.fields} | ({} if index.unique else {"_id": 1}),
            "partialFilterExpression": {
                shape.path(name): {"$exists": True}
                for name in (index.fields if index.unique else index.fields[:1])
                if name != "id"
            },
            **({"unique": True} if index.unique else {}),
        }
        for index in shape.kind.indexes
    ]


async def migrate(database: Database, shapes: Sequence[Shape]) -> None:
    """Bring collections and indexes up to the declarations.

    Raises:
        StoreUnavailable: a newer server wrote this database, a field changed its type, or stored documents break a new unique index.
    """
    meta = database[META]
    known = {document["_id"]: document async for document in meta.find({})}
    layout = known.get("layout", {}).get("n", 0)
    if layout > LAYOUT:
        raise StoreUnavailable(
            f"the database was written by a newer version (layout {layout}, this one knows {LAYOUT}); upgrade the server"
        )
    if layout < LAYOUT:
        await _own_collections(database)
        await meta.update_one({"_id": "layout"}, {"$max": {"n": LAYOUT}}, upsert=True)
    turns = asyncio.Semaphore(_AT_ONCE)

    async def one(shape: Shape) -> None:
        async with turns:
            await _migrate_kind(database, shape, known.get(f"kind:{shape.name}"))

    await asyncio.gather(*map(one, shapes))


async def _own_collections(database: Database) -> None:
    await _create_indexes(database, PENDING, [{"name": "ts", "key": {"ts": 1}}])
    await _create_indexes(database, FACTS, [{"name": "last", "key": {"last": 1}}])
    await database[FACTS].update_one({"_id": 0}, {"$setOnInsert": {"newest": 0}}, upsert=True)


async def _migrate_kind(database: Database, shape: Shape, known: Document | None) -> None:
    kind = shape.kind
    if known is not None:
        old = msgspec.json.decode(known["declared"], type=Kind)
        if old == kind:
            return
        before = {field.name: field.type for field in old.fields}
        for field in kind.fields:
            if before.get(field.name, field.type) != field.type:
                raise StoreUnavailable(
                    f"field {field.name} of {kind.name} was {before[field.name]} and is declared {field.type}; give it a new name"
                )
    specs = index_specs(shape)
    if specs:
        await _create_indexes(database, shape.name, specs)
    else:
        await _create_collection(database, shape.name)
    if shape.cold:
        await _create_collection(database, shape.parts)
    declared = Binary(msgspec.json.encode(kind))
    await database[META].update_one({"_id": f"kind:{kind.name}"}, {"$set": {"declared": declared}}, upsert=True)


async def refuse_incomplete(database: Database) -> None:
    """Raise StoreUnavailable where a restore or a move into this database has not ended."""
    if await database[META].find_one({"_id": INCOMPLETE}) is not None:
        raise StoreUnavailable(
            f"a restore or a move into the database {database.name} is under way or was broken off; wait for it, or repeat it"
        )


async def begin_load(database: Database) -> None:
    """Mark the database, and empty it: no server opens it before `end_load`. Blobs stay."""
    await database[META].update_one({"_id": INCOMPLETE}, {"$currentDate": {"at": True}}, upsert=True)
    known = [document["_id"] async for document in database[META].find({"_id": {"$ne": INCOMPLETE}}, {"_id": 1})]
    for name in known:
        if str(name).startswith("kind:"):
            kind = str(name).removeprefix("kind:")
            await database.drop_collection(kind)
            await database.drop_collection(f"{kind}.parts")
    await database.drop_collection(FACTS)
    await database.drop_collection(PENDING)
    await database[META].delete_many({"_id": {"$ne": INCOMPLETE}})


async def end_load(database: Database) -> None:
    """Remove the mark."""
    await database[META].delete_one({"_id": INCOMPLETE})


async def contract(database: Database, shapes: Sequence[Shape], *, drop: bool) -> list[str]:
    """Return the names of what no declaration names any more, and drop it where that is said. For when no older server runs any longer.

    That is indexes, and the parts of kinds that have none any more: both cost or keep something for ever. An index field that is gone is
    read by nobody and leaves a document with its next write; a part that is gone, of a kind that has others, goes with its entity. So
    documents are not rewritten. Kinds that nobody declares are left alone: a plugin may come back.

    Raises:
        StoreUnavailable: the last server that started here was of another version: its declarations are not these.
    """
    known = {document["_id"]: document async for document in database[META].find({})}
    for shape in shapes:
        stored = known.get(f"kind:{shape.name}", {}).get("declared")
        if stored is None or msgspec.json.decode(stored, type=Kind) != shape.kind:
            raise StoreUnavailable(
                f"the last server that started on the database {database.name} was not of this version: it declares {shape.name} otherwise"
            )
    found: list[str] = []
    there = set(await database.list_collection_names())
    for shape in shapes:
        if not shape.cold and shape.parts in there:
            if drop:
                await database.drop_collection(shape.parts)
            found.append(shape.parts)
        wanted = {"_id_", *map(index_name, shape.kind.indexes)}
        async for index in await database[shape.name].list_indexes():
            if index["name"] not in wanted:
                if drop:
                    await database[shape.name].drop_index(index["name"])
                found.append(f"{shape.name}.{index['name']}")
    return found


async def _create_collection(database: Database, name: str) -> None:
    try:
        await database.command({"create": name})
    except OperationFailure as error:
        if error.code != _EXISTS:
            raise


async def _create_indexes(database: Database, collection: str, specs: list[Document]) -> None:
    try:
        await database.command({"createIndexes": collection, "indexes": specs})
    except OperationFailure as error:
        if error.code == _DUPLICATE_KEY:
            name = next((spec["name"] for spec in specs if str(spec["name"]) in str(error)), "")
            raise StoreUnavailable(
                f"stored {collection} rows break the new unique index {declared_name(name)}".rstrip()
            ) from None
        raise
