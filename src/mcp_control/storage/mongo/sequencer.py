"""Gives facts their place in the one order of all facts.

A transaction of a server that does not lead leaves its facts in `store.pending`. Whoever sequences takes what is there, in the order of
the cluster time at which it was written, and in one transaction moves the head, inserts one document with all of it, and removes the
pending ones. The head says which place comes next; only a sequencer that knows it can move it, so of two sequencers one is refused.

The leader sequences within its own commits: their facts get their places in the same transaction, after all that is pending, and are told
before the commit returns. That saves a second majority write.

Causal order: a transaction that builds on another began after that one's commit, so its pending document got a later cluster time. All
pending documents are read in the transaction's snapshot; it holds everything that the transaction's own facts can be built on.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

import msgspec
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import PyMongoError
from pymongo.read_preferences import ReadPreference

from mcp_control.storage.mongo.background import Background
from mcp_control.storage.mongo.batch import body, pack, unpack
from mcp_control.storage.mongo.client import MAJORITY, SNAPSHOT, Client, Database, Document, Primary
from mcp_control.storage.mongo.facts import HEAD, Tail, announcement, newest_seq
from mcp_control.storage.mongo.schema import FACTS, PENDING

_PENDING_READ: Final = 300  # documents
_BYTES: Final = 4 << 20
_POLL_ALONE: Final = 0.05  # leading, when nobody tells of commits
_POLL_TOLD: Final = 0.25
_POLL_ASIDE: Final = 0.5  # not leading
_TOLD_SECONDS: Final = 2.0
_ABANDONED: Final = 1.0  # seconds after which pending facts are everybody's business

Announce = Callable[[str, bytes], None]


class Placed(msgspec.Struct, frozen=True):
    """Facts with their places: the first `seq`, how many there are, and all of them packed."""

    first: int
    count: int
    packed: bytes


class NotPlacedError(Exception):
    """Somebody else moved the head, or more is pending than one transaction takes."""


class Sequencer:
    """Sequences facts: at once while it leads, else only what nobody else does.

    Args:
        client: for sessions of its own.
        primary: of the replica set.
        database: where the collections are.
        tail: gets what was sequenced at once.
        announce: tells the other servers.
        clock: monotonic seconds.

    Attributes:
        turn: held by whoever sequences on this server, from reading the head until the outcome is known.
    """

    def __init__(
        self,
        client: Client,
        primary: Primary,
        database: Database,
        tail: Tail,
        announce: Announce,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.turn = asyncio.Lock()
        self._session: AsyncClientSession = client.start_session(causal_consistency=False)
        self._pending = database[PENDING]
        self._database = database
        self._tail = tail
        self._announce = announce
        self._clock = clock
        self._lead = False
        self._head: int | None = None  # as long as nobody else is known to sequence
        self._told_at = -_TOLD_SECONDS
        self._oldest: tuple[object, float] | None = None  # the oldest pending document, and since when it was seen
        self._work = Background("mongo-sequencer", self._once, primary)

    @property
    def lead(self) -> bool:
        """Whether this server sequences at once."""
        return self._lead

    @lead.setter
    def lead(self, value: bool) -> None:
        if value != self._lead:
            self._lead = value
            self._head = None
            self._work.ask()

    @property
    def ready(self) -> bool:
        """Whether a commit of this server may sequence now."""
        return self._lead and self._head is not None and not self.turn.locked()

    @property
    def session_id(self) -> bytes:
        """The id of the session in which transactions of its own run."""
        return bytes(self._session.session_id["id"])

    def start(self) -> None:
        """Begin to look for pending facts."""
        self._work.start()

    async def stop(self) -> None:
        """Stop looking; what is under way finishes, or is done by others."""
        await self._work.stop()
        await self._session.end_session()

    def wake(self, *, told: bool = False) -> None:
        """Look now; `told` by another server, which will do so again."""
        if told:
            self._told_at = self._clock()
        if self._lead:
            self._work.ask()

    @asynccontextmanager
    async def turn_at_once(self) -> AsyncIterator[None]:
        """Hold `turn` for a commit. Raises NotPlacedError where somebody has it or is next: a commit waits for nobody's transaction."""
        try:
            async with asyncio.timeout(0):
                await self.turn.acquire()
        except TimeoutError:
            raise NotPlacedError from None
        try:
            yield
        finally:
            self.turn.release()

    # --- within a transaction, holding `turn` ---------------------------------------------------------------------

    async def place(self, session: AsyncClientSession, own: Sequence[bytes], count: int, at: int) -> Placed | None:
        """Give all pending facts, and after them these, their places; None where there is nothing.

        Raises:
            NotPlacedError: the transaction must be taken back, or go on without this.
        """
        head = self._head  # whoever takes the lead away meanwhile, forgets it
        if head is None:
            raise NotPlacedError
        pending, more = await self._read(session)
        if own and more:
            raise NotPlacedError
        bodies = [body(document["d"]) for document in pending] + list(own)
        if not bodies:
            return None
        count += sum(document["n"] for document in pending)
        at = max([at, *(document["at"] for document in pending)])
        placed = Placed(head + 1, count, pack(bodies, count))
        last = head + count
        updates = [
            {"q": {"_id": HEAD, "newest": head}, "u": {"$set": {"newest": last}}},
            {"q": {"_id": placed.first}, "u": {"$set": {"last": last, "at": at, "d": placed.packed}}, "upsert": True},
        ]
        answer = await self._database.command({"update": FACTS, "updates": updates}, session=session)
        if answer["n"] != 2:
            raise NotPlacedError
        if pending:
            statements = [{"q": {"_id": {"$in": [document["_id"] for document in pending]}}, "limit": 0}]
            answer = await self._database.command({"delete": PENDING, "deletes": statements}, session=session)
            if answer["n"] != len(pending):
                raise NotPlacedError
        return placed

    async def _read(self, session: AsyncClientSession) -> tuple[list[Document], bool]:
        """Return the pending documents, oldest first, and whether there may be more."""
        found: list[Document] = []
        size = 0
        cursor = self._pending.find(
            {}, sort=[("ts", 1)], limit=_PENDING_READ, batch_size=_PENDING_READ, session=session
        )
        for document in await cursor.to_list():
            size += len(document["d"])
            if found and size > _BYTES:
                return found, True
            found.append(document)
        return found, len(found) == _PENDING_READ

    def succeeded(self, placed: Placed) -> None:
        """The transaction is durable: tell this server and the others."""
        self._head = placed.first + placed.count - 1
        self._tail.deliver(placed.first, unpack(placed.packed))
        self._announce("facts", announcement(placed.first, placed.packed))

    def failed(self) -> None:
        """The transaction was taken back, or nobody knows."""
        self._head = None
        self._work.ask()

    # --- by itself ------------------------------------------------------------------------------------------------

    async def _once(self) -> float:
        while (self._lead and await self._anything()) or (not self._lead and await self._abandoned()):
            async with self.turn:
                await self._transaction()
        if not self._lead:
            return _POLL_ASIDE
        return _POLL_TOLD if self._clock() - self._told_at < _TOLD_SECONDS else _POLL_ALONE

    async def _anything(self) -> bool:
        if self._head is None:
            async with self.turn:
                self._head = await newest_seq(self._database)
        return await self._pending.find_one({}, {"_id": 1}) is not None

    async def _abandoned(self) -> bool:
        """Whether the same pending document has been the oldest for a while: those who should sequence do not."""
        oldest = await self._pending.find_one({}, {"_id": 1}, sort=[("ts", 1)])
        now = self._clock()
        if oldest is None:
            self._oldest = None
            return False
        if self._oldest is None or self._oldest[0] != oldest["_id"]:
            self._oldest = oldest["_id"], now
        return now - self._oldest[1] >= _ABANDONED

    async def _transaction(self) -> None:
        head = self._head if self._lead else None
        self._head = await newest_seq(self._database) if head is None else head
        try:
            await self._session.start_transaction(SNAPSHOT, MAJORITY, ReadPreference.PRIMARY)
            try:
                placed = await self.place(self._session, (), 0, 0)
            except BaseException:
                await self._session.abort_transaction()
                raise
            await self._session.commit_transaction()
        except NotPlacedError:
            self._head = None
            return
        except PyMongoError:
            self._head = None
            raise
        if placed is not None:
            self.succeeded(placed)
