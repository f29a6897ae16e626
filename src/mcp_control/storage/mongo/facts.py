"""The facts in their one order, as documents that hold those of several commits, and their delivery to this server.

A document `{_id: first seq, last, at, d: facts}` is written once by a sequencer (`sequencer.py`) and read by all servers. The document
whose `_id` is 0 is the head: it holds the largest `seq` ever given, and outlives the facts. What a server hands on was acknowledged by a
majority before, so it never rolls back.
"""

from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import structlog
from pymongo.asynchronous.client_session import AsyncClientSession

from mcp_control.kernel.changes import Fact, StoredFact
from mcp_control.kernel.errors import Problem, StoreUnavailable
from mcp_control.storage.mongo.background import Background
from mcp_control.storage.mongo.batch import unpack
from mcp_control.storage.mongo.client import Database, Document, Primary
from mcp_control.storage.mongo.schema import FACTS
from mcp_control.storage.ports import Committed

_log = structlog.get_logger(__name__)
HEAD: Final = 0  # `_id` of the head; facts begin at 1
_POLL: Final = 0.25
_PAGE: Final = 100  # documents
_MESSAGE_BYTES: Final = 64 * 1024

encode_range = msgspec.msgpack.Encoder().encode
_decode_range = msgspec.msgpack.Decoder(tuple[int, bytes]).decode


def announcement(first: int, packed: bytes) -> bytes:
    """Return what other servers are told of a range of facts: all of it when it is small, nothing otherwise."""
    return encode_range((first, packed)) if len(packed) <= _MESSAGE_BYTES else b""


async def newest_seq(database: Database, session: AsyncClientSession | None = None) -> int:
    """Return the largest `seq` ever given, 0 when there was none; it outlives the facts themselves."""
    head = await database[FACTS].find_one({"_id": HEAD}, session=session)
    return int(head["newest"]) if head else 0


async def read(database: Database, after: int, limit: int) -> list[StoredFact]:
    """Return the facts with `seq > after`, in order, at most `limit`."""
    found: list[StoredFact] = []
    if limit <= 0:
        return found
    documents = database[FACTS].find(
        {"last": {"$gt": after}}, {"d": 1}, sort=[("last", 1)], limit=limit, batch_size=_PAGE
    )
    async with documents:
        async for document in documents:
            for seq, fact in enumerate(unpack(document["d"]), document["_id"]):
                if seq > after:
                    found.append(StoredFact(seq, fact))
                    if len(found) >= limit:
                        return found
    return found


async def trim(database: Database, before_at: int, keep: int, limit: int) -> tuple[int, int]:
    """Delete the oldest documents that hold nothing to keep, about `limit` facts; see `Store.trim_facts`."""
    newest = await newest_seq(database)
    deleted, last = 0, 0
    documents = database[FACTS].find({"last": {"$gt": 0}}, {"last": 1, "at": 1}, sort=[("last", 1)], batch_size=_PAGE)
    async with documents:
        async for document in documents:
            if deleted >= limit or not (document["at"] < before_at or document["last"] <= newest - keep):
                break
            deleted += document["last"] - document["_id"] + 1
            last = document["last"]
    if deleted:
        await database[FACTS].delete_many({"last": {"$gt": 0, "$lte": last}})
    oldest = await database[FACTS].find_one({"last": {"$gt": 0}}, {"_id": 1}, sort=[("last", 1)])
    if oldest is not None:
        return int(oldest["_id"]), newest
    return (newest + 1 if newest else 0), newest


class Tail:
    """Hands this server all facts from the moment it opened, in order, each once.

    Args:
        primary: of the replica set.
        database: where they are.
        committed: see `Store.open`.
        position: the last `seq` that this server needs not to be told.
        lost: called when facts went before this server had read them; it must start anew.
    """

    def __init__(
        self,
        primary: Primary,
        database: Database,
        committed: Committed,
        position: int,
        lost: Callable[[Problem], None],
    ) -> None:
        self.position = position
        self._database = database
        self._committed = committed
        self._lost = lost
        self._work = Background("mongo-facts", self._once, primary)

    def start(self) -> None:
        """Begin to look for facts."""
        self._work.start()

    async def stop(self) -> None:
        """Stop looking."""
        await self._work.stop()

    def hear(self, message: bytes) -> None:
        """Take what another server announced: hand it on when it comes next, else look."""
        try:
            first, packed = _decode_range(message) if message else (0, b"")
            facts = unpack(packed) if first == self.position + 1 else []
        except msgspec.DecodeError:  # of another version; the store has it, too
            first, facts = 0, []
        if facts:
            self.deliver(first, facts)
        elif not 0 < first <= self.position:
            self._work.ask()

    def deliver(self, first: int, facts: Sequence[Fact]) -> bool:
        """Hand on the facts from `first` on when they come next; false where some before them are missing."""
        if first <= self.position:
            return True
        if first != self.position + 1:
            self._work.ask()
            return False
        self.position = first + len(facts) - 1
        self._committed([StoredFact(seq, fact) for seq, fact in enumerate(facts, first)])
        return True

    async def catch_up(self) -> None:
        """Hand on everything that is there."""
        while True:
            after = self.position
            cursor = self._database[FACTS].find({"last": {"$gt": after}}, {"d": 1}, sort=[("last", 1)], limit=_PAGE)
            documents: list[Document] = await cursor.to_list()
            for document in documents:
                if not self.deliver(document["_id"], unpack(document["d"])):
                    problem = StoreUnavailable(f"facts after {self.position} were trimmed before this server read them")
                    _log.critical("facts-lost", after=self.position, oldest=document["_id"])
                    self.position = document["_id"] - 1
                    self._lost(problem)
                    self.deliver(document["_id"], unpack(document["d"]))
            if len(documents) < _PAGE:
                return

    async def _once(self) -> float:
        await self.catch_up()
        return _POLL
