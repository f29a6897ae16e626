"""The store on one MongoDB replica set, for any number of servers.

Changes go through `writer.py` in transactions, facts get their order from `sequencer.py` and reach this server through `facts.py`. Reads
are majority reads on the primary: they never show what a failover could take back, and show every change that was acknowledged before.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Final, TypeVar

import structlog
from bson.binary import UUID_SUBTYPE, Binary
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import PyMongoError

from mcp_control.kernel.changes import Change, Entity, Kind, Query, StoredFact, Where
from mcp_control.kernel.errors import Problem, StoreUnavailable
from mcp_control.storage.mongo import facts as factlog
from mcp_control.storage.mongo import schema
from mcp_control.storage.mongo.batch import shape_of
from mcp_control.storage.mongo.client import (
    Client,
    Database,
    Document,
    NewPrimaryError,
    Primary,
    connect,
    database_of,
    findings,
    unavailable,
)
from mcp_control.storage.mongo.documents import (
    SEPARATOR,
    Filter,
    Shape,
    conditions,
    entity,
    outside,
    phases,
    projection,
)
from mcp_control.storage.mongo.facts import Tail
from mcp_control.storage.mongo.sequencer import Announce, Sequencer
from mcp_control.storage.mongo.writer import GroupCommit
from mcp_control.storage.ports import Committed

_log = structlog.get_logger(__name__)
T = TypeVar("T")
_RANGES: Final = 200  # parts asked for in one find


class MongoStore:
    """A `Store` in a database of a replica set.

    Args:
        uri: `mongodb://…`; the database it names, else `mcp_control`.
        node: the name of this server.
        single: whether a replica set of fewer than three members is accepted, for trials.
        max_waiting: changes that may wait for a commit before `Overloaded`.
        batch_writes: entity writes after which a transaction takes no further calls.
        fatal: called on the loop when this server can no longer tell all facts in order and must start anew.

    Attributes:
        announce: tells the other servers something, as `(topic, message)`; what they tell comes in by `hear`. Optional.
        warnings: what is not as it should be with the deployment, found at `open`.
    """

    def __init__(
        self,
        uri: str,
        *,
        node: str,
        single: bool = False,
        max_waiting: int = 20_000,
        batch_writes: int = 500,
        fatal: Callable[[Problem], None] | None = None,
    ) -> None:
        self.announce: Announce | None = None
        self.warnings: list[str] = []
        self._uri = uri
        self._node = node
        self._single = single
        self._max_waiting = max_waiting
        self._batch_writes = batch_writes
        self._fatal = fatal
        self._seen: Primary | None = None
        self._shapes: dict[str, Shape] = {}
        self._lead = False
        self._client: Client | None = None
        self._writer: GroupCommit | None = None  # while open
        self._watch: asyncio.Task[None]
        self._tail: Tail
        self._sequencer: Sequencer
        self._database: Database

    # --- state for others -----------------------------------------------------------------------------------------

    @property
    def writable(self) -> bool:
        """Whether commits can succeed: the store is open and the replica set has a primary."""
        return self._writer is not None and self.primary is not None

    @property
    def database(self) -> Database:
        """The open store's database, for the blobs that lie in it."""
        if self._writer is None:
            raise StoreUnavailable("the store is not open")
        return self._database

    @property
    def waiting(self) -> int:
        """Changes that wait for a commit."""
        return self._writer.waiting if self._writer is not None else 0

    @property
    def primary(self) -> str | None:
        """Host and port of the primary; None while there is none."""
        return self._seen.address if self._seen is not None else None

    @property
    def elections(self) -> int:
        """Grows when another member, or the same in a new term, is primary than when this was last asked."""
        return self._seen.elections if self._seen is not None else 0

    @property
    def lead(self) -> bool:
        """Whether this server gives facts their order at once; one should, and no harm is done by none or several."""
        return self._lead

    @lead.setter
    def lead(self, value: bool) -> None:
        self._lead = value
        if self._writer is not None:
            self._sequencer.lead = value

    @property
    def position(self) -> int:
        """The `seq` of the last fact this server was told, or of the last before it opened."""
        return self._tail.position if self._writer is not None else 0

    # --- open and close -------------------------------------------------------------------------------------------

    async def open(self, kinds: Sequence[Kind], committed: Committed) -> None:
        """See `Store.open`."""
        self._shapes = {kind.name: Shape(kind) for kind in kinds}
        self._client = connect(self._uri, name=self._node)
        self._seen = Primary(self._client)
        try:
            self.warnings = await self._check(self._client)
            self._database = database_of(self._client)
            await schema.refuse_incomplete(self._database)
            await schema.migrate(self._database, [*self._shapes.values()])
            position = await factlog.newest_seq(self._database)
        except BaseException as error:
            await self._client.close()
            self._client = None
            if isinstance(error, PyMongoError):
                raise unavailable(error) from None
            raise
        self._watch = asyncio.create_task(self._seen.watch(), name="mongo-primary")
        self._tail = Tail(self._seen, self._database, committed, position, self._lost)
        self._sequencer = Sequencer(self._client, self._seen, self._database, self._tail, self._tell)
        self._sequencer.lead = self._lead
        self._writer = GroupCommit(
            self._client,
            self._seen,
            self._database,
            self._shapes,
            max_waiting=self._max_waiting,
            batch_writes=self._batch_writes,
            sequencer=self._sequencer,
            wrote=self._wrote,
        )
        self._tail.start()
        self._sequencer.start()

    async def _check(self, client: Client) -> list[str]:
        found = await findings(client, single=self._single)
        for finding in found:
            if finding.level == "fail":
                raise StoreUnavailable(f"MongoDB cannot be used: {finding.what}; {finding.advice}")
        warnings = [f"{finding.what}; {finding.advice}" for finding in found if finding.level == "warn"]
        for warning in warnings:
            _log.warning("mongodb", detail=warning)
        return warnings

    async def close(self) -> None:
        """See `Store.close`."""
        writer, self._writer = self._writer, None
        if writer is None or self._client is None:
            return
        await writer.close()
        await self._sequencer.stop()
        await self._tail.stop()
        self._watch.cancel()
        await self._client.close()
        self._client = None

    # --- the contract ---------------------------------------------------------------------------------------------

    async def commit(self, changes: Sequence[Change]) -> list[Problem | None]:
        """See `Store.commit`."""
        if not changes:
            return []
        return await self._open_writer().submit(changes)

    async def get(self, kind: str, ids: Sequence[str], cold: Sequence[str] = ()) -> list[Entity | None]:
        """See `Store.get`."""
        self._open_writer()
        shape = shape_of(self._shapes, kind)
        fields = projection(shape, cold)
        if not ids:
            return []
        wanted: Filter = {"_id": ids[0]} if len(ids) == 1 else {"_id": {"$in": [*dict.fromkeys(ids)]}}

        async def read(session: AsyncClientSession | None) -> list[Entity]:
            documents = await self._database[kind].find(wanted, fields, session=session).to_list()
            return await self._entities(shape, documents, cold, session)

        found = {one.id: one for one in await self._read(read, snapshot=bool(cold))}
        return [found.get(one) for one in ids]

    async def find(self, kind: str, query: Query) -> list[Entity]:
        """See `Store.find`."""
        self._open_writer()
        shape = shape_of(self._shapes, kind)
        fields = projection(shape, query.cold)
        finds = phases(shape, query)

        async def read(session: AsyncClientSession | None) -> list[Entity]:
            documents: list[Document] = []
            for condition, order in finds:
                left = query.limit - len(documents)
                if left > 0:
                    cursor = self._database[kind].find(
                        condition, fields, sort=order, limit=left, batch_size=left, session=session
                    )
                    documents += await cursor.to_list()
            return await self._entities(shape, documents, query.cold, session)

        return await self._read(read, snapshot=bool(query.cold))

    async def count(self, kind: str, where: Sequence[Where], limit: int) -> int:
        """See `Store.count`."""
        self._open_writer()
        every = conditions(shape_of(self._shapes, kind), where)
        if every is None or limit <= 0:
            return 0
        condition: Filter = {"$and": every} if every else {}
        return await self._read(lambda session: self._database[kind].count_documents(condition, limit=limit))

    async def facts(self, after: int, limit: int) -> list[StoredFact]:
        """See `Store.facts`."""
        self._open_writer()
        return await self._read(lambda session: factlog.read(self._database, after, limit))

    async def trim_facts(self, before_at: int, keep: int, limit: int) -> tuple[int, int]:
        """See `Store.trim_facts`. Facts go by whole documents, so some may stay a little longer than asked."""
        self._open_writer()
        return await self._read(lambda session: factlog.trim(self._database, before_at, keep, limit))

    # --- what servers do for each other ---------------------------------------------------------------------------

    def wake(self) -> None:
        """Another server committed something."""
        if self._writer is not None:
            self._sequencer.wake(told=True)

    def hear(self, topic: str, message: bytes) -> None:
        """Take what a store announced on some server, this one or another."""
        if self._writer is None:
            return
        if topic == "pending":
            self.wake()
        elif topic == "facts":
            self._tail.hear(message)

    def session_ids(self) -> list[bytes]:
        """Return the ids of the sessions in which this server's transactions run, for `end_sessions` elsewhere after its death."""
        return [self._writer.session_id, self._sequencer.session_id] if self._writer is not None else []

    async def end_sessions(self, ids: Sequence[bytes]) -> None:
        """Take back what servers that died have open. MongoDB would keep their locks until transactions expire, a minute by default."""
        self._open_writer()
        if ids:
            sessions = [{"id": Binary(one, UUID_SUBTYPE)} for one in ids]
            await self._read(lambda session: self._admin({"killSessions": sessions}))

    async def offset_ms(self) -> float:
        """Return by how many milliseconds the primary's clock is ahead of this machine's; half the round trip is allowed for."""
        self._open_writer()
        sent_wall, sent = time.time(), time.monotonic()
        answer = await self._read(lambda session: self._admin({"hello": 1}))
        half = (time.monotonic() - sent) / 2
        there: datetime = answer["localTime"].replace(tzinfo=UTC)  # the driver leaves the zone out
        return (there.timestamp() - sent_wall - half) * 1000

    # --- inside ---------------------------------------------------------------------------------------------------

    def _open_writer(self) -> GroupCommit:
        if self._writer is None:
            raise StoreUnavailable("the store is not open")
        return self._writer

    async def _admin(self, command: Document) -> Document:
        self._open_writer()
        assert self._client is not None
        return await self._client.admin.command(command)

    async def _read(self, read: Callable[[AsyncClientSession | None], Awaitable[T]], *, snapshot: bool = False) -> T:
        """Read, in one snapshot where an entity is put together from several documents."""
        seen = self._seen
        assert self._client is not None
        assert seen is not None
        try:
            while True:
                # A snapshot belongs to its session, so each try has its own.
                async with AsyncExitStack() as stack:
                    session: AsyncClientSession | None = None
                    if snapshot:
                        made = self._client.start_session(causal_consistency=False, snapshot=True)
                        session = await stack.enter_async_context(made)
                    try:
                        async with seen.lasting():
                            return await read(session)
                    except NewPrimaryError:
                        continue
        except PyMongoError as error:
            raise unavailable(error) from error

    async def _entities(
        self, shape: Shape, documents: list[Document], cold: Sequence[str], session: AsyncClientSession | None
    ) -> list[Entity]:
        if not cold:
            return [entity(shape, document, {}) for document in documents]
        pieces: dict[str, dict[str, bytes]] = {document["_id"]: {} for document in documents}
        ranges = outside(shape, documents, cold)
        for at in range(0, len(ranges), _RANGES):
            cursor = self._database[shape.parts].find({"$or": ranges[at : at + _RANGES]}, session=session)
            async for found in cursor:
                owner, _, name = found["_id"].partition(SEPARATOR)
                pieces[owner][name] = found["b"]
        return [entity(shape, document, pieces[document["_id"]]) for document in documents]

    def _wrote(self) -> None:
        self._sequencer.wake()
        if not self._lead:
            self._tell("pending", b"")

    def _tell(self, topic: str, message: bytes) -> None:
        if self.announce is not None:
            self.announce(topic, message)

    def _lost(self, problem: Problem) -> None:
        if self._fatal is not None:
            self._fatal(problem)
